"""The full-size experiments; each takes minutes.

Independent truth: published losses, a plain LoRA loop with its gradients, closed forms.

Run: make test ARGS='tests/training/test_published.py -m slow'
"""

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_lab import adapters
from lora_lab.adapters.init import gaussian
from lora_lab.data.shift import Shift
from lora_lab.models.linear import Linear
from lora_lab.runs import find_runs
from lora_lab.seeding import generator
from lora_lab.train import main
from tests.conftest import only_run

ROOT = Path(__file__).parents[2]
PUBLISHED = yaml.safe_load((ROOT / "conf/experiment/shift.yaml").read_text())["published"]

pytestmark = pytest.mark.slow


DRAWS = 40


def plain_draws(data_seed: int, base: torch.Tensor) -> list[dict[int, float]]:
    """LoRA's loss rows on shift for adapter seeds 0, 1, …: a plain loop with its gradients.

    With u = x Aᵀ, L = mean (u Bᵀ − R)², R what the base leaves; all draws of A in one pass.
    """
    data = Shift("adapt", 10_000, 1001, 1000, 1.0, 128, data_seed)
    data.setup("fit")
    assert data.train is not None
    X, Y = data.train.tensors
    R = Y - X @ base.T
    draws = [gaussian(base, 1, 1.0, generator(seed, "linear", 1))[0] for seed in range(DRAWS)]
    A = torch.cat(draws).requires_grad_()  # (draws, in)
    B = torch.zeros(DRAWS, 1000, requires_grad=True)  # (draws, out)
    adam = torch.optim.Adam([A, B], lr=1e-3)
    batches = data.train_dataloader().sampler
    rows: list[dict[int, float]] = [{} for _ in draws]
    with torch.no_grad():
        for epoch in range(1, 101):
            batches.set_epoch(epoch - 1)  # pyright: ignore
            for rows_of_batch in batches:
                x, residual = X[rows_of_batch], R[rows_of_batch]
                u = x @ A.T  # (batch, draws)
                B.grad = (u.square().sum(0)[:, None] * B - u.T @ residual) * 2 / residual.numel()
                A.grad = (u * B.square().sum(1) - residual @ B.T).T @ x * 2 / residual.numel()
                adam.step()
            if epoch % 10 == 0:
                for row, a, b in zip(rows, A, B, strict=True):
                    row[epoch] = (torch.outer(X @ a, b) - R).square().mean().item()
    return rows


def train(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr("sys.argv", ["lora-lab", *overrides])
    main()


@pytest.mark.parametrize("data_seed", [0, 1, 2])
def test_shift_is_as_published(monkeypatch: pytest.MonkeyPatch, data_seed: int):
    train(monkeypatch, f"data.seed={data_seed}")
    run = only_run()
    base, lora = run.curve("base/val/loss"), run.curve("val/loss")
    for epoch in range(10, 100, 10):
        bound = 0.05 if epoch <= 80 else 0.20
        assert base[epoch] == pytest.approx(PUBLISHED["base"][epoch], rel=bound), epoch
    assert base[100] < 0.001
    assert lora[100] < 0.004
    assert run.last("merged/val/loss") == pytest.approx(lora[100], rel=1e-4)
    assert run.last("parameters/trainable") == 2001
    assert run.last("parameters/base") == 1_001_000

    (path,) = Path("bases").glob("*.safetensors")
    weights = load_file(path)
    # One run's rows are those of its draw of A, and draws differ (the loss at epoch 60 by 22%, one
    # standard deviation): the run is held to a plain loop from the same A, and the published rows,
    # which are of one unknown draw, to the mean over draws.
    draws = plain_draws(data_seed, weights["linear.weight"])
    for epoch in range(10, 110, 10):
        assert lora[epoch] == pytest.approx(draws[0][epoch], rel=1e-4), epoch
    for epoch in range(10, 100, 10):
        bound = 0.12 if epoch <= 60 else 0.75
        mean = float(np.mean([row[epoch] for row in draws]))
        assert mean == pytest.approx(PUBLISHED["adapted"][epoch], rel=bound), epoch
    model = Linear(1001, 1000)
    model.load_state_dict(weights)
    adapters.load(model, run.path / "adapter")
    delta = adapters.deltas(model)["linear"].detach()
    assert (delta - 1).abs().max() < 0.01
    sigma = torch.linalg.svdvals(delta.double())
    assert sigma[0].item() == pytest.approx((1001 * 1000) ** 0.5, rel=1e-3)
    assert sigma[1] < 0.01
    with np.load(run.path / "spectra.npz") as arrays:
        assert arrays["linear/singular_values"][-1] == pytest.approx(sigma[:1].numpy(), rel=1e-6)
    adapters.merge(model)
    adapters.unmerge(model)
    assert torch.equal(model.linear.weight, weights["linear.weight"])
    # Before adaptation each output is off by Σ x: its square has mean 1001, and over 10,000 rows
    # a relative standard error of √(2/10,000).
    assert lora[0] == pytest.approx(1001, rel=4 * (2 / 10_000) ** 0.5)


def test_shift_twice_is_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    train(monkeypatch, "trainer.max_epochs=20", "base.epochs=20")
    run = only_run()
    first = (run.path / "metrics.jsonl").read_bytes()
    train(monkeypatch, "trainer.max_epochs=20", "base.epochs=20", "overwrite=true")
    assert (run.path / "metrics.jsonl").read_bytes() == first


def test_digits_accuracy_rises_with_the_rank(monkeypatch: pytest.MonkeyPatch):
    digits = ("experiment=digits", "tracking=off", "seed=0,1,2", "-m")
    train(monkeypatch, *digits, "adapter.r=1,4,9")
    train(monkeypatch, *digits, "adapter=full")
    accuracies: dict[object, list[float]] = {}
    for run in find_runs(Path("runs")):
        r = run.config["adapter"].get("r", "full")
        accuracies.setdefault(r, []).append(run.last("val/accuracy") or 0)
        assert run.curve("val/accuracy")[0] < 0.5  # the base knows five digits of ten
    assert max(accuracies[1]) < min(accuracies[4]) - 0.01
    assert max(accuracies[4]) < min(accuracies[9])
    assert mean(accuracies[9]) == pytest.approx(mean(accuracies["full"]), abs=0.01)
    assert min(accuracies["full"]) > 0.95
