"""The `shift` run's arithmetic in a plain torch loop: what a run of lora_lab is timed against."""

import sys

import torch
import torch.nn.functional as F


def fit(parameters, forward, x, y, epochs: int) -> None:
    """Adam, 78 batches of 128 rows an epoch, the loss on everything every 10 epochs."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    for epoch in range(1, epochs + 1):
        for _ in range(len(x) // 128):
            rows = torch.randperm(len(x))[:128]
            optimizer.zero_grad()
            F.mse_loss(forward(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch % 10 == 0:
            evaluate(forward, x, y)


@torch.no_grad()
def evaluate(forward, x, y) -> float:
    """The loss on everything."""
    return F.mse_loss(forward(x), y).item()


def main(epochs: int) -> None:
    """Base, shift, LoRA, merge: the losses that the experiment reports."""
    torch.manual_seed(0)
    theta, x = torch.randn(1001, 1000), torch.randn(10000, 1001)
    base = torch.nn.Linear(1001, 1000, bias=False)
    fit(base.parameters(), base, x, x @ theta, epochs)
    base.requires_grad_(False)
    x = torch.randn(10000, 1001)
    y = x @ (theta + 1)
    evaluate(base, x, y)
    A, B = torch.randn(1, 1001, requires_grad=True), torch.zeros(1000, 1, requires_grad=True)
    fit([A, B], lambda x: base(x) + (x @ A.T) @ B.T, x, y, epochs)
    with torch.no_grad():
        base.weight += B @ A
    print(evaluate(base, x, y))


if __name__ == "__main__":
    main(int(sys.argv[1]))
