"""`python -m tests.adapters.architecture_checks [--write]`: what holds on which architecture.

Each check raises where it does not hold. A reason is returned where something is refused on
purpose. `--write` puts the table into docs/architectures.md.

Truth: the base, the base with ΔW added to its weights by hand and autograd through that sum, PEFT,
and each run's own model.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab import adapters
from lora_lab.adapters.pack import Pack, copy_sharing_weights, reason_not_packable
from lora_lab.adapters.slots import layer_of, parameter_key
from tests.adapters import zoo

EXACT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}
SAME: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

Inputs = dict[str, Tensor]
Check = Callable[[nn.Module, Inputs], str | None]
"""A check of a base, which it may change, and inputs; a reason where something is refused."""


def outputs(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs).logits


def adapted(model: nn.Module, targets: str = "all", seed: int = 0, r: int = 2) -> None:
    """Puts adapters that have moved far from their start on a model."""
    adapters.attach(model, targets, r=r, seed=seed)
    move(model, seed)


def move(model: nn.Module, seed: int = 0) -> None:
    adapter: Any
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters.attached(model).values():
        padding = getattr(adapter, "padding", None)
        for factor in (adapter.A, adapter.B):
            nn.init.normal_(factor, std=0.3, generator=generator)
        if padding is not None:
            adapter.A.data[:, padding] = 0


def changed_parameters(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """W + ΔW by key, with autograd to the adapters; a parameter may have several blocks."""
    weights: dict[str, Tensor] = {}
    for site, adapter in adapters.attached(model).items():
        key = parameter_key(site, adapter)
        weight = weights.get(key, plain.get_parameter(key).detach())
        delta = adapter.delta(adapter.weight_of(layer_of(model, site, adapter)))
        if adapter.rows is not None:
            rows = torch.zeros_like(weight)
            rows[slice(*adapter.rows)] = delta
            delta = rows
        weights[key] = weight + delta
    return weights


def identity_at_first(model: nn.Module, inputs: Inputs) -> None:
    base = outputs(model, inputs)
    adapters.attach(model, "all", r=2)
    torch.testing.assert_close(outputs(model, inputs), base, **SAME)


def weight_plus_delta_and_its_gradients(model: nn.Module, inputs: Inputs) -> None:
    plain = copy.deepcopy(model)
    adapted(model)
    y = outputs(model, inputs)
    expected = functional_call(plain, changed_parameters(model, plain), (), inputs).logits
    torch.testing.assert_close(y, expected, **EXACT)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    truth = torch.autograd.grad(expected.square().sum(), [*trained.values()], allow_unused=True)
    got = torch.autograd.grad(y.square().sum(), [*trained.values()], allow_unused=True)
    largest = max(gradient.abs().max().item() for gradient in truth if gradient is not None)
    for name, one, other in zip(trained, got, truth, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12 * largest, msg=name)


def training_computes_as_evaluation(model: nn.Module, inputs: Inputs) -> None:
    adapted(model)
    y = outputs(model.eval(), inputs)
    torch.testing.assert_close(outputs(model.train(), inputs), y, **EXACT)


def merge_and_back(model: nn.Module, inputs: Inputs) -> None:
    base, before = outputs(model, inputs), copy.deepcopy(model.state_dict())
    adapted(model)
    y = outputs(model, inputs)
    adapters.merge(model)
    torch.testing.assert_close(outputs(model, inputs), y, **EXACT)
    adapters.unmerge(model)
    adapters.detach(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(outputs(model, inputs), base)


def cached_generation(model: Any, inputs: Inputs) -> str | None:
    if not hasattr(model, "generate") or not model.can_generate():
        return "no generation"
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    adapted(model)
    cached = torch.stack(model.generate(inputs["input_ids"], **settings).logits)
    adapters.merge(model)
    merged = torch.stack(model.generate(inputs["input_ids"], **settings).logits)
    torch.testing.assert_close(cached, merged, **EXACT)
    return None


def save_and_load(model: nn.Module, inputs: Inputs) -> None:
    fresh = copy.deepcopy(model)
    adapted(model)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(model, folder)
        adapters.load(fresh, folder)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def to_peft(model: nn.Module, inputs: Inputs) -> str | None:
    """An adapter on all linear layers, read by PEFT."""
    from peft import PeftModel

    base: Any = copy.deepcopy(model)
    adapted(model, "linear")
    with tempfile.TemporaryDirectory() as folder:
        try:
            adapters.save_peft(model, folder)
        except adapters.AdapterError as error:
            return str(error)
        try:
            theirs = PeftModel.from_pretrained(base, folder).eval()
        except ValueError as error:
            return f"PEFT: {error}"
    torch.testing.assert_close(
        outputs(theirs, inputs), outputs(model, inputs), rtol=1e-6, atol=1e-8
    )
    return None


def from_peft(model: Any, inputs: Inputs) -> str | None:
    """An adapter that PEFT made on all linear layers."""
    from peft import LoraConfig, get_peft_model

    base = copy.deepcopy(model)
    try:
        theirs = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
    except ValueError as error:
        return f"PEFT: {error}"
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        try:
            adapters.load_peft(base, folder)
        except adapters.AdapterError as error:
            return str(error)
    torch.testing.assert_close(outputs(base, inputs), outputs(theirs, inputs), rtol=1e-6, atol=1e-8)
    return None


def in_a_pack(model: nn.Module, inputs: Inputs) -> str | None:
    runs = [copy_sharing_weights(model) for _ in range(2)]
    for seed, run in enumerate(runs):
        adapted(run, seed=seed, r=seed + 1)
    expected = [outputs(run, inputs) for run in runs]
    run_adapters = [adapters.attached(run) for run in runs]
    if reason := reason_not_packable(model, run_adapters):
        return reason
    try:
        packed = Pack(model, run_adapters)(inputs)
    except RuntimeError as error:  # what torch.vmap cannot follow, as code that reads numbers
        return str(error).partition("\n")[0].partition(". ")[0]
    torch.testing.assert_close(packed, torch.stack(expected), **EXACT)
    return None


CHECKS: dict[str, Check] = {
    "base at first": identity_at_first,
    "W + ΔW, gradients": weight_plus_delta_and_its_gradients,
    "train = eval": training_computes_as_evaluation,
    "merge and back": merge_and_back,
    "cached generation": cached_generation,
    "save, load": save_and_load,
    "to PEFT": to_peft,
    "from PEFT": from_peft,
    "packed = alone": in_a_pack,
}


def result(architecture: str, check: str) -> str | None:
    """None where a check holds, else why it does not."""
    model, inputs = zoo.build(architecture)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return CHECKS[check](model, inputs)
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def table() -> tuple[list[str], list[str]]:
    """The table's lines, and those of the notes: a note for each reason."""
    lines = [f"| architecture | {' | '.join(CHECKS)} |", "|---|" + "---|" * len(CHECKS)]
    numbers: dict[str, int] = {}
    for architecture in zoo.ARCHITECTURES:
        cells = []
        for check in CHECKS:
            reason = result(architecture, check)
            if reason is None or reason == "no generation":
                cells.append("yes" if reason is None else "–")
            else:
                cells.append(f"[{numbers.setdefault(reason, len(numbers) + 1)}]")
        lines.append(f"| {architecture} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines, [f"{number}. {reason}" for reason, number in numbers.items()]


INTRODUCTION = """# Architectures

Small models of architectures that others wrote (transformers, made from configs with random
weights, in float64), and what holds for adapters on them. `yes`: checked against independent truth
(the base with ΔW added by hand, autograd through that sum, PEFT, each run alone). A number:
refused, and why. `–`: does not apply.

Written by `python -m tests.adapters.architecture_checks --write`.
"""

if __name__ == "__main__":
    lines, notes = table()
    text = "\n".join([INTRODUCTION, *lines, "", *notes, ""])
    print("\n".join(notes))
    if "--write" in sys.argv:
        PAGE.write_text(text)
