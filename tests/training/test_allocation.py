"""AdaLoRA: scores, masks, penalty and schedule; what of it is refused, reported and exported.

Independent truth: PEFT's allocator on the same values and gradients; training in plain torch with
the paper's equations written out, on the same batches.

Run: make test ARGS=tests/training/test_allocation.py
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import save_peft
from lora_lab.config.lora import Allocation
from lora_lab.config.schema import ConfigError
from lora_lab.data.digits import Digits
from lora_lab.models.mlp import MLP
from lora_lab.report.run_tables import run_tables
from lora_lab.training.callbacks.allocation import RankAllocation
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.conftest import Lab, only_run


def schedule(**change: float) -> Allocation:
    lengths = {"warmup": 2, "final": 3, "interval": 2}
    return Allocation(**{**lengths, "beta1": 0.85, "beta2": 0.7, "orthogonality": 0.1, **change})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 9), nn.Linear(9, 4)).double()


# PEFT's allocator fails where nothing is to be pruned, so that here each allocation prunes.
@pytest.mark.parametrize("interval", [1, 3])
def test_scores_budgets_and_masks_are_those_of_peft(interval: int):
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=interval, total_step=14, beta1=0.85,
        beta2=0.7, target_modules=["0", "2", "3"],
    )  # fmt: skip
    theirs: Any = get_peft_model(net(), config).double()
    allocator, ours = theirs.base_model.rankallocator, net()
    adapters.attach(ours, r=4, form="adalora")
    by_site = adapters.attached(ours)
    layers = {site: theirs.base_model.model.get_submodule(site) for site in by_site}
    pairs = [
        (adapter.get_parameter(name), getattr(layers[site], f"lora_{letter}")["default"])
        for site, adapter in by_site.items()
        for name, letter in (("A", "A"), ("B", "B"), ("lambdas", "E"))
    ]
    torch.manual_seed(1)
    for p, q in pairs:
        p.data.normal_()
        q.data.copy_(p.data.view_as(q))
    ranks = RankAllocation(by_site, 2, schedule(final=4, interval=interval))
    ranks.set_length(14)
    pruned = []
    for step in range(1, 15):
        for p, q in pairs:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.view_as(q).clone()
            p.data -= 0.1 * p.grad
            q.data -= 0.1 * q.grad
        assert ranks.budget(step) == allocator.budget_schedule(step)[0]
        theirs.base_model.update_and_allocate(step)
        ranks.after_step(step)
        for p, q in pairs:
            assert torch.equal(p, q.view_as(p)), step
        if step < 10:
            for site in by_site:
                name = f"{site}.lora_%s.default"
                score = allocator._element_score
                one = score(name % "E").view(-1) + score(name % "A").mean(1)
                torch.testing.assert_close(
                    ranks.importance(site), one + score(name % "B").mean(0), rtol=1e-12, atol=0
                )
        pruned.append(sum(int((a.get_parameter("lambdas") == 0).sum()) for a in by_site.values()))
    assert [ranks.budget(step) for step in (1, 2, 10, 14)] == [12, 12, 6, 6]
    assert (pruned[1], pruned[8], pruned[9], pruned[-1]) == (0, pruned[8], 6, 6)
    assert pruned[2] > 0
    assert ranks.ranks() == {
        s: int((a.get_parameter("lambdas") != 0).sum()) for s, a in by_site.items()
    }
    assert set(ranks.ranks().values()) != {2}


def smoothed(old: Tensor | float, new: Tensor, beta: float) -> Tensor:
    return beta * old + (1 - beta) * new


# 22 batches an epoch: with 4 of them a step, 6 steps, the last one of 2 batches.
@pytest.mark.parametrize("batches_per_step", [1, 4])
def test_the_numbers_are_those_of_a_plain_loop(
    lab: Lab, batches_per_step: int, monkeypatch: pytest.MonkeyPatch
):
    steps, seen, real = {1: 44, 4: 12}[batches_per_step], [], RankAllocation.after_step

    def after_step(allocation: RankAllocation, step: int) -> None:
        seen.append(step)
        real(allocation, step)

    monkeypatch.setattr(RankAllocation, "after_step", after_step)
    assert lab(
        *("digits", "adapter=adalora", "adapter.r=3", "adapter.budget=1.5", "adapter.alpha=6"),
        *("trainer.precision=64-true", "optimizer.schedule=constant", "optimizer.lr=0.02"),
        *(f"trainer.accumulate_grad_batches={batches_per_step}", "adapter.allocation.interval=2"),
        *("adapter.allocation.warmup=0.2", "adapter.allocation.final=0.3"),
        "spectra.every_n_steps=1",
    ) == 0  # fmt: skip
    run = only_run()
    assert seen == list(range(1, steps + 1))

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
    adapters.attach(model, r=3, alpha=6, form="adalora", seed=0)
    first = adapters.attached(model)
    sites = list(first)
    start = [a.get_parameter(n) for a in first.values() for n in ("B", "lambdas", "A")]
    assert [p.std().item() for p in (start[0], start[2])] == pytest.approx([0.02] * 2, rel=0.3)
    tensors = [p.detach().double().requires_grad_() for p in start]
    P, L, Q = tensors[::3], tensors[1::3], tensors[2::3]
    W = [model.body[0].weight.detach().double(), model.head.weight.detach().double()]  # pyright: ignore
    b = [model.body[0].bias.detach().double(), model.head.bias.detach().double()]  # pyright: ignore

    def changes() -> list[Tensor]:
        return [6 / 3 * p @ lambdas.diag() @ q for p, lambdas, q in zip(P, L, Q, strict=True)]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        weights = [w + change for w, change in zip(W, changes(), strict=True)]
        hidden = (x @ weights[0].T + b[0]).relu()
        return nn.functional.cross_entropy(hidden @ weights[1].T + b[1], y)

    optimizer, warmup, last = (
        torch.optim.Adam(tensors, 0.02),
        int(0.2 * steps),
        steps - int(0.3 * steps),
    )
    means: list[Any] = [0.0] * len(tensors)
    spreads: list[Any] = [0.0] * len(tensors)
    masks = [torch.ones(3, dtype=torch.bool)] * 2
    for step, batch in enumerate(rows, start=1):
        optimizer.zero_grad()
        eye = torch.eye(3, dtype=torch.float64)
        penalty = sum(((p.T @ p - eye) ** 2).sum() for p in P)
        penalty = penalty + sum(((q @ q.T - eye) ** 2).sum() for q in Q)
        (loss(x[batch], y[batch]) + 0.1 * penalty).backward()
        optimizer.step()
        if step < last:
            for i, w in enumerate(tensors):
                assert w.grad is not None
                sensitivity = (w * w.grad).abs().detach()
                means[i] = smoothed(means[i], sensitivity, 0.85)
                spreads[i] = smoothed(spreads[i], (sensitivity - means[i]).abs(), 0.85)
        is_due = warmup < step < last and step % 2 == 0
        if is_due or step == last:
            s = [mean * spread for mean, spread in zip(means, spreads, strict=True)]
            scores = [s[i + 1] + s[i].mean(0) + s[i + 2].mean(1) for i in (0, 3)]
            left = (1 - (step - warmup) / (last - warmup)) ** 3
            least = torch.cat(scores).sort(descending=True).values[int(3 + 3 * left) - 1]
            masks = [score >= least for score in scores]
        if is_due or step >= last:
            for lambdas, mask in zip(L, masks, strict=True):
                lambdas.data[~mask] = 0

    ranks = {site: int(mask.sum()) for site, mask in zip(sites, masks, strict=True)}
    assert sum(ranks.values()) == 3
    assert {s: run.last(f"spectra/{s}/allocated_rank") for s in sites} == ranks
    for site, rank in ranks.items():
        key = f"spectra/{site}/numerical_rank"
        measured = {row["step"]: row[key] for row in run.rows() if key in row}
        assert [measured[step] for step in range(last, steps + 1)] == [rank] * (steps + 1 - last)
    adapters.detach(model)
    adapters.load(model.double(), run.path / "adapter")
    for site, change in zip(sites, changes(), strict=True):
        torch.testing.assert_close(
            adapters.deltas(model)[site], change.detach(), rtol=1e-7, atol=1e-9
        )
    data_val: Any = data.val.tensors  # pyright: ignore
    expected = loss(data_val[0].double(), data_val[1]).item()
    assert run.last("val/loss") == pytest.approx(expected, rel=1e-8)
    assert run.last("merged/val/loss") == pytest.approx(expected, rel=1e-8)
    facts = dict(run_tables(run)["facts"])
    assert facts["ranks that AdaLoRA left, 3 in all"] == ", ".join(
        f"{s} {k}" for s, k in ranks.items()
    )
    assert set(
        yaml.safe_load((run.path / "advice.yaml").read_text())["adapter"]["rank_pattern"]
    ) == {*sites}


@pytest.mark.parametrize("dora", [False, True])
def test_peft_holds_the_triplets_that_are_left_as_lora(dora: bool, tmp_path: Path):
    model, x = net(), torch.randn(3, 7, dtype=torch.float64)
    adapters.attach(model, r=3, alpha=5, form="adalora", dora=dora)
    left = {"0": [0, 2], "2": [1], "3": []}
    for site, adapter in adapters.attached(model).items():
        lambdas = adapter.get_parameter("lambdas")
        lambdas.data[left[site]] = torch.randn(len(left[site]), dtype=torch.float64)
    save_peft(model, tmp_path)
    theirs: Any = PeftModel.from_pretrained(net(), str(tmp_path)).double().eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x), net()(x), rtol=1e-3)
    layers = {site: theirs.base_model.model.get_submodule(site) for site in left}
    ranks = {site: len(layer.lora_A["default"].weight) for site, layer in layers.items()}
    assert ranks == {"0": 2, "2": 1, "3": 1}


def test_pruned_triplets_train_on_until_the_last_allocation(tmp_path: Path):
    """And a resumed allocation knows what the first one knew."""
    model = net()
    adapters.attach(model, r=2, form="adalora")
    by_site = adapters.attached(model)
    one = RankAllocation(by_site, 1, schedule(interval=1))
    one.set_length(20)

    def step(allocation: RankAllocation, number: int) -> None:
        torch.manual_seed(number)
        for adapter in by_site.values():
            for parameter in adapter.parameters():
                parameter.grad = torch.randn_like(parameter)
                parameter.data -= 0.3 * parameter.grad
        allocation.after_step(number)

    for number in range(1, 4):
        step(one, number)
    state = copy.deepcopy((model.state_dict(), one.state_dict()))
    masks = []
    for number in range(4, 21):
        step(one, number)
        masks.append(torch.cat(list(one.kept.values())))
    assert any((after & ~before).any() for before, after in pairwise(masks))
    ends = copy.deepcopy(model.state_dict())
    torch.save(state, tmp_path / "state")
    model_state, allocation_state = torch.load(tmp_path / "state", weights_only=True)
    model.load_state_dict(model_state)
    two = RankAllocation(by_site, 1, schedule(interval=1))
    two.set_length(20)
    two.load_state_dict(allocation_state)
    for number in range(4, 21):
        step(two, number)
    assert all(torch.equal(value, ends[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="leave no step of the run's 5 between them"):
        one.set_length(5)


ADALORA = ("experiment=digits", "adapter=adalora", "adapter.r=3")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "more than the start": ((*ADALORA, "adapter.budget=4"), r"at most 3, the mean of the ranks"),
    "less than a rank": ((*ADALORA, "adapter.budget=0.1"), r"adapter.budget=0.1: must be at least"),
    "best": ((*ADALORA, "select='best val/loss'"), "select=best val/loss: not with adapter="),
    "fsdp": ((*ADALORA, "trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"),
             "trainer=fsdp: not with adapter=adalora, .* trainer=ddp"),
    "float16": ((*ADALORA, "trainer.precision=16-mixed"), "trainer.precision=16-mixed: not with"),
    "other form": (("experiment=digits", "+adapter.budget=2"), "take adapter=adalora"),
    "form alone": (("experiment=digits", "adapter.form=adalora"), "take adapter=adalora"),
    "no form": ((*ADALORA, "adapter.form=lora"), "take adapter=adalora"),
    "shares": ((*ADALORA, "adapter.allocation.warmup=0.6"), "must be less than 1 together"),
    "convolutions": (("experiment=digits_targets", "target=conv", ADALORA[1]), "is of kind conv"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    settings, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        plan(composed(*settings))
