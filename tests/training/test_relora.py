"""ReLoRA: rounds, moments, learning rates; what of it is refused, stored and exported.

Independent truth: training in plain torch that adds each finished product to the dense weight, as
the paper does, on the same batches in float64; PEFT's outputs.

Run: make test ARGS=tests/training/test_relora.py
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.config.lora import Restarts
from lora_lab.config.schema import ConfigError
from lora_lab.data.digits import Digits
from lora_lab.models.mlp import MLP
from lora_lab.report.run_tables import run_tables
from lora_lab.seeding import generator
from lora_lab.training.callbacks.restarts import MergeAndRestart
from lora_lab.training.plan import plan
from tests.adapters.cases import restart
from tests.config.test_conf import composed
from tests.conftest import Lab, only_run

SITES, R, SCALE, RATE = {"body.fc1": (16, 64), "head": (10, 16)}, 2, 3.0, 0.02


def drawn(site: str, number: int) -> Tensor:
    """A of a round, by Kaiming's uniform init."""
    rng = generator(0, site, R, *[number] * (number > 0))
    bound = 1 / math.sqrt(SITES[site][1])
    return torch.empty(R, SITES[site][1]).uniform_(-bound, bound, generator=rng).double()


def pruned(m: Tensor, v: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The moments without the share of numbers of which m is of least magnitude."""
    limit = m.abs().flatten().sort().values[round(share * m.numel()) - 1]
    kept = m.abs() > limit
    return m * kept, v * kept


# 22 batches an epoch: with 4 of them a step, 6 steps, the last one of 2 batches.
@pytest.mark.parametrize(
    ("batches_per_step", "every", "warmup", "share", "schedule"),
    [(1, 11, 3, 0.8, "constant"), (4, 5, 2, 1.0, "cosine")],
)
def test_the_numbers_are_those_of_a_loop_that_merges_into_the_weight(
    lab: Lab, batches_per_step: int, every: int, warmup: int, share: float, schedule: str
):
    steps = {1: 44, 4: 12}[batches_per_step]
    assert lab(
        *("digits", "adapter=relora", f"adapter.r={R}", f"adapter.alpha={SCALE * R}"),
        *(f"adapter.restarts.every={every}", f"adapter.restarts.warmup={warmup}"),
        *(f"adapter.restarts.prune={share}", f"optimizer.schedule={schedule}"),
        *("trainer.precision=64-true", f"optimizer.lr={RATE}", "spectra.every_n_steps=1"),
        f"trainer.accumulate_grad_batches={batches_per_step}",
    ) == 0  # fmt: skip
    run = only_run()
    data = Digits("adapt", 64, 0)
    data.setup("fit")
    x, y = data.train.tensors  # pyright: ignore
    x, loader = x.double(), data.train_dataloader()
    rows = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # pyright: ignore
        batches = [torch.as_tensor(batch) for batch in loader.sampler]
        groups = range(0, len(batches), batches_per_step)
        rows += [torch.cat(batches[i : i + batches_per_step]) for i in groups]
    assert len(rows) == steps
    model = MLP(64, 10, [16])
    model.load_state_dict(load_file(next(Path("bases").glob("*.safetensors"))))
    base = {k: v.double() for k, v in model.state_dict().items()}
    W, W0 = ([base[f"{site}.weight"].clone() for site in SITES] for _ in range(2))
    b = [base[f"{site}.bias"] for site in SITES]
    A = [drawn(site, 0) for site in SITES]
    B = [torch.zeros(out, R, dtype=torch.float64) for out, _ in SITES.values()]
    m, v = ([torch.zeros_like(p) for p in (*A, *B)] for _ in range(2))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        one, two = (w + SCALE * b @ a for w, b, a in zip(W, B, A, strict=True))
        return nn.functional.cross_entropy((x @ one.T + b[0]).relu() @ two.T + b[1], y)

    rounds = 0
    for step, batch in enumerate(rows):
        parameters = [p.requires_grad_() for p in (*A, *B)]
        rate = RATE * ((1 + math.cos(math.pi * step / steps)) / 2 if schedule == "cosine" else 1)
        if step >= every and step % every < warmup:
            rate *= step % every / warmup
        gradients = torch.autograd.grad(loss(x[batch], y[batch]), parameters)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                corrected = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.999 ** (step + 1))
                p -= rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
            if (step + 1) % every == 0 and step + 1 < steps:
                rounds += 1
                for i, site in enumerate(SITES):
                    W[i] = W[i] + SCALE * B[i] @ A[i]
                    A[i], B[i] = drawn(site, rounds), torch.zeros_like(B[i])
                pairs = [pruned(m[i], v[i], share) for i in range(4)]
                m, v = ([pair[i] for pair in pairs] for i in (0, 1))

    assert rounds == {1: 3, 4: 2}[batches_per_step]
    changes = [w + SCALE * b @ a - w0 for w, b, a, w0 in zip(W, B, A, W0, strict=True)]
    adapters.load(model.double(), run.path / "adapter")
    for (site, delta), change in zip(adapters.deltas(model).items(), changes, strict=True):
        torch.testing.assert_close(delta, change.detach(), rtol=1e-7, atol=1e-9)
        rank = min(*SITES[site], R * (rounds + 1))
        assert torch.linalg.matrix_rank(change) == rank > R
        key = f"spectra/{site}/numerical_rank"
        measured = {row["step"]: row[key] for row in run.rows() if key in row}
        assert [measured[step] for step in (every, steps)] == [R, rank]
        singular_values = np.load(run.path / "spectra.npz")[f"{site}/singular_values"]
        assert (singular_values[[1, -1]] > 0).sum(1).tolist() == [R, rank]
    x_val, y_val = data.val.tensors  # pyright: ignore
    expected = loss(x_val.double(), y_val).item()
    for metric in ("val/loss", "merged/val/loss"):
        assert run.last(metric) == pytest.approx(expected, rel=1e-8)
    assert f"begun anew every {every}" in dict(run_tables(run)["facts"])["adapter"]


def test_a_model_in_rounds_goes_to_files_to_state_dicts_and_to_peft(tmp_path: Path):
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 9)).double()

    model, x = net(), torch.randn(3, 7, dtype=torch.float64)
    adapters.attach(model, r=1, alpha=3, form="relora", scaling="alpha/sqrt(r)")
    for _ in range(2):
        for adapter in adapters.attached(model).values():
            adapter.B.data.normal_()
        before = model(x)
        restart(model)
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, net()(x), rtol=1e-3)  # pyright: ignore
    assert adapters.count(model).adapter_bytes == 3 * adapters.count(model).trainable * 8
    first = net()
    adapters.attach(first, r=1, alpha=3, form="relora", scaling="alpha/sqrt(r)")
    first.load_state_dict(adapters.adapter_state_dict(model), strict=False)
    adapters.save(model, tmp_path / "ours")
    adapters.save_peft(model, tmp_path / "peft")
    second, third = net(), net()
    adapters.load(second, tmp_path / "ours")
    adapters.load_peft(third, tmp_path / "peft")
    theirs: Any = PeftModel.from_pretrained(net(), str(tmp_path / "peft")).double().eval()
    for other in (first, second, third, theirs):
        torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)
    assert theirs.peft_config["default"].r == 3


RELORA = ("experiment=digits", "adapter=relora", "adapter.r=2")
FSDP = ("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "fsdp": ((*RELORA, *FSDP), "trainer=fsdp: not with adapter=relora, .* trainer=ddp"),
    "other form": ((*RELORA, "adapter.form=lora"), "has no restarts, which are ReLoRA's"),
    "form alone": (("experiment=digits", "adapter.form=relora"), "take adapter=relora"),
    "an init": ((*RELORA, "adapter.init=pissa"), "init=pissa with form=relora"),
    "no length": ((*RELORA, "adapter.restarts.every=0"), "adapter.restarts.every=0"),
    "embedding": (("experiment=planted_embedding", *RELORA[1:]), "is of kind embedding"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    settings, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        plan(composed(*settings))


def test_rounds_must_fit_into_the_training():
    for every, warmup, says in ((20, 0, "every=20: must be less"), (0.25, 5, "less than the 5")):
        rounds = MergeAndRestart({}, Restarts(every=every, warmup=warmup, prune=1.0), seed=0)
        with pytest.raises(ConfigError, match=says):
            rounds.set_length(20)
