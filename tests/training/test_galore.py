"""GaLore: its steps, bytes and resumed runs; what of it is refused.

Independent truth: algorithm 2 of the paper written out as a plain loop in float64, on the same
gradients or the same batches; torch's AdamW where nothing is projected.

Run: make test ARGS=tests/training/test_galore.py
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab.config.schema import ConfigError
from lora_lab.data.digits import Digits
from lora_lab.models.mlp import MLP
from lora_lab.report.run_tables import run_tables
from lora_lab.training.galore import GaLore, state_bytes
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.conftest import Lab, only_run

Moments = dict[str, Tensor]


def step_by_hand(
    W: Tensor, G: Tensor, memory: Moments, t: int, lr: float, r: int, every: int, decay: float = 0.0
) -> Tensor:
    """The weight after step t, from 0, of GaLore-Adam with α = 0.25; of vectors, of AdamW."""
    is_projected = W.dim() == 2 and min(W.shape) > r
    is_tall = W.dim() == 2 and W.shape[0] > W.shape[1]
    R = G
    if is_projected:
        if t % every == 0:
            U, _, V = torch.svd(G)
            memory["P"] = V[:, :r] if is_tall else U[:, :r]
        R = G @ memory["P"] if is_tall else memory["P"].T @ G
    M = 0.9 * memory.get("M", torch.zeros_like(R)) + 0.1 * R
    V = 0.999 * memory.get("V", torch.zeros_like(R)) + 0.001 * R**2
    memory |= {"M": M, "V": V}
    N = M / (1 - 0.9 ** (t + 1)) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
    if is_projected:
        N = 0.25 * (N @ memory["P"].T if is_tall else memory["P"] @ N)
    return W - lr * decay * W - lr * N


SHAPES = {"wide": (5, 9), "tall": (9, 5), "square": (6, 6), "narrow": (2, 9), "vector": (7,)}


@pytest.mark.parametrize("name", [*SHAPES, "conv"])
def test_steps_are_those_of_the_papers_algorithm(name: str):
    shape = {**SHAPES, "conv": (3, 2, 4)}[name]
    torch.manual_seed(0)
    W = torch.randn(shape, dtype=torch.float64)
    p, memory = nn.Parameter(W.clone()), {}
    optimizer = GaLore([p], lr=0.1, r=2, every=3, weight_decay=0.2)
    for t in range(8):
        p.grad = torch.randn_like(p)
        W = step_by_hand(W, p.grad, memory, t, lr=0.1, r=2, every=3, decay=0.2)
        optimizer.step()
        torch.testing.assert_close(p.detach(), W, rtol=1e-12, atol=1e-12)
    numbers = {"wide": 2 * 2 * 9 + 5 * 2, "tall": 2 * 9 * 2 + 5 * 2, "square": 2 * 2 * 6 + 6 * 2}
    assert state_bytes(optimizer) == 8 * numbers.get(name, 2 * W.numel())


def test_without_projection_it_is_adamw():
    torch.manual_seed(0)
    one, two = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))
    ours, theirs = GaLore([one], lr=0.1, r=3, weight_decay=0.3), torch.optim.AdamW([two], lr=0.1)
    theirs.param_groups[0]["weight_decay"] = 0.3
    for _ in range(5):
        one.grad = torch.randn_like(one)
        two.grad = one.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_a_run_is_a_plain_loop_and_its_bytes_are_counted(lab: Lab):
    assert lab(
        *("digits", "adapter=full", "optimizer=galore", "optimizer.r=4", "optimizer.every=15"),
        *("optimizer.lr=0.02", "optimizer.schedule=constant", "trainer.precision=64-true"),
    ) == 0  # fmt: skip
    run = only_run()
    data = Digits("adapt", 64, 0)
    data.setup("fit")
    x, y = data.train.tensors  # pyright: ignore
    x, loader = x.double(), data.train_dataloader()
    model = MLP(64, 10, [16])
    model.load_state_dict(load_file(next(Path("bases").glob("*.safetensors"))))
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    memory: dict[str, Moments] = {name: {} for name in weights}
    t = 0
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # pyright: ignore
        for batch in loader.sampler:
            leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
            output = torch.func.functional_call(model, leaves, (x[torch.as_tensor(batch)],))
            loss = nn.functional.cross_entropy(output, y[torch.as_tensor(batch)])
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            for (name, w), G in zip(weights.items(), gradients, strict=True):
                weights[name] = step_by_hand(w, G, memory[name], t, lr=0.02, r=4, every=15)
            t += 1
    assert t == 44
    trained = load_file(run.path / "model" / "model.safetensors")
    for name, w in weights.items():
        torch.testing.assert_close(trained[name], w, rtol=1e-7, atol=1e-9)
    size = 8 * (2 * 4 * 64 + 16 * 4 + 2 * 4 * 16 + 10 * 4 + 2 * (16 + 10))
    assert (
        run.last("bytes/optimizer")
        == size
        == 8 * sum(tensor.numel() for tensors in memory.values() for tensor in tensors.values())
    )
    assert run.last("bytes/full_optimizer") == 8 * 2 * sum(w.numel() for w in weights.values())
    shown = dict(run_tables(run)["facts"])["optimizer state"]
    assert shown == "6.37 kB, 19.4 kB for Adam on all weights"


GALORE = ("experiment=digits", "optimizer=galore")
FSDP = ("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "adapter": (GALORE, "optimizer=galore: projects .* adapter=lora trains others; take adapter="),
    "head alone": ((*GALORE, "adapter=none", "also_train=head"), "adapter=none trains others"),
    "fsdp": ((*GALORE, "adapter=full", *FSDP), "trainer=fsdp: not with optimizer=galore"),
    "r": ((*GALORE, "adapter=full", "optimizer.r=0"), "r=0: must be at least 1"),
    "every": ((*GALORE, "adapter=full", "optimizer.every=0"), "every=0: must be at least 1"),
    "scale": ((*GALORE, "adapter=full", "optimizer.scale=0"), "scale=0.*: must be more than 0"),
    "betas": ((*GALORE, "adapter=full", "+optimizer.betas=[1,0.9]"), "betas=.*less than 1"),
    "decay": ((*GALORE, "adapter=full", "optimizer.weight_decay=-1"), "weight_decay=-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    settings, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        plan(composed(*settings))
