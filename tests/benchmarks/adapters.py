"""Adapters against PEFT's, loralib's and plain products: step time and memory, as ratios.

A step is forward, backward and zero_grad of one adapted frozen layer; its input takes a gradient
too, as inside any model. All contenders hold the same factors and take turns in one process; a
ratio is of two neighbours in time, and the table shows the median and the quartiles of all rounds.
With one thread, processor time is taken: what else the machine does hardly moves it.

Two memory counts, both exact and the same in each run. *saved*: bytes of all storages that
autograd keeps for backward, each once, parameters and the input left out. *peak*: the most bytes
that torch's CPU allocator held at once within a step, temporaries inside kernels included, above
what it held before it, from the profiler's record of allocations.
"""

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.autograd.profiler import profile

from lora_lab import adapters
from tests.adapters import zoo

ALPHA = 12.0
"""Over r = 8 or 64: a scale that is not 1, so that no contender may leave it out."""


@dataclass(frozen=True)
class Row:
    """One layer, the inputs it takes and the rank of its adapter."""

    name: str
    kind: str
    layer: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    r: int = 8


def tokens(vocabulary: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocabulary, shape)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, requires_grad=True)


def linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs)


def conv2d(channels: int, k: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(channels, channels, k, padding=k // 2)


def conv1d(channels: int, k: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv1d(channels, channels, k, padding=k // 2)


def embedding(vocabulary: int, features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(vocabulary, features)


ROWS = [
    Row("linear 64→64, 32", "linear", linear(64, 64), floats(32, 64)),
    Row("linear 1024→1024, 512", "linear", linear(1024, 1024), floats(512, 1024)),
    Row("linear 768→3072, 16×128", "linear", linear(768, 3072), floats(16, 128, 768)),
    Row("linear 768→3072, r=64", "linear", linear(768, 3072), floats(16, 128, 768), 64),
    Row("conv2d 8→8 3×3, 4×8²", "conv", conv2d(8, 3), floats(4, 8, 8, 8)),
    Row("conv2d 64→64 3×3, 16×32²", "conv", conv2d(64, 3), floats(16, 64, 32, 32)),
    Row("conv2d 128→128 1×1, 16×32²", "conv", conv2d(128, 1), floats(16, 128, 32, 32)),
    Row("conv1d 64→64 3, 16×512", "conv", conv1d(64, 3), floats(16, 64, 512)),
    Row("embedding 65×64, 16×32", "embedding", embedding(65, 64), tokens(65, 16, 32)),
    Row("embedding 30k×384, 32×128", "embedding", embedding(30_000, 384), tokens(30_000, 32, 128)),
]
"""r = 8 where none is given."""


class Plain(nn.Module):
    """The update as it stands in the paper, added to the frozen layer's output."""

    def __init__(self, layer: nn.Module, A: Tensor, B: Tensor):
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), ALPHA / len(A)
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.change(x, self.A, self.B) * self.scale

    def change(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return (x @ A.T) @ B.T
        if isinstance(self.layer, nn.Embedding):
            return F.embedding(x, A.T) @ B.T
        layer: Any = self.layer
        down = layer._conv_forward(x, A.view(-1, *layer.weight.shape[1:]), None)
        conv = F.conv1d if down.dim() == 3 else F.conv2d
        return conv(down, B.view(*B.shape, *[1] * (down.dim() - 2)))


def plain(row: Row, layer: nn.Module, A: Tensor, B: Tensor) -> nn.Module:
    return Plain(layer, A, B)


def ours(row: Row, layer: nn.Module, A: Tensor, B: Tensor) -> nn.Module:
    model = nn.Sequential(layer)
    adapters.attach(model, row.kind, r=row.r, alpha=ALPHA)
    (adapter,) = adapters.attached(model).values()
    with torch.no_grad():
        adapter.A.copy_(A)
        adapter.B.copy_(B)
    return model


def peft(row: Row, layer: nn.Module, A: Tensor, B: Tensor) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=row.r, lora_alpha=int(ALPHA), target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(layer))
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    for factor, value in zip(factors, (A, B), strict=True):
        factor.data.copy_(value.view(factor.shape))
    return model


def loralib(row: Row, layer: nn.Module, A: Tensor, B: Tensor) -> nn.Module | None:
    """None where it has no such layer: its Conv1d raises for kernels wider than 1."""
    import loralib as library

    scaled: dict[str, Any] = {"r": row.r, "lora_alpha": ALPHA}
    if isinstance(layer, nn.Conv1d):
        return None
    if isinstance(layer, nn.Conv2d):
        k = layer.kernel_size[0]
        size = (layer.in_channels, layer.out_channels, k)
        model: Any = library.Conv2d(*size, padding=layer.padding, **scaled)
        model.conv = layer
        # Its product is (out·k) × (in·k): the same ΔW is r·k of its ranks.
        A, B = A.reshape(row.r * k, -1), torch.kron(B, torch.eye(k))
    else:
        weight: Any = layer.weight
        size = weight.T.shape if isinstance(layer, nn.Linear) else weight.shape
        layer_class = library.Linear if isinstance(layer, nn.Linear) else library.Embedding
        model = layer_class(*size, **scaled)
        model.load_state_dict(layer.state_dict(), strict=False)
    model.lora_A.data.copy_(A)
    model.lora_B.data.copy_(B)
    library.mark_only_lora_as_trainable(model)
    return model


CONTENDERS = {"plain": plain, "PEFT": peft, "loralib": loralib}


@contextmanager
def silence() -> Iterator[None]:
    """Torch's profiler writes lines to stderr from below Python."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass
class Step:
    """One training step, to be timed and counted."""

    model: nn.Module
    x: Tensor
    gradient: Tensor | None = None
    """What comes back from above; None: a squared error, and Adam moves the parameters."""
    fused: bool | None = None
    """Adam's; None: torch's default."""

    def __post_init__(self):
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        is_optimized = self.gradient is None
        self.adam = torch.optim.Adam(self.parameters, fused=self.fused) if is_optimized else None

    def __call__(self) -> None:
        y = self.model(self.x)
        if self.adam is None:
            y.backward(self.gradient)
        else:
            y.square().mean().backward()
            self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.x.grad = None

    def saved(self) -> int:
        """Bytes that autograd keeps between forward and backward."""
        known = {t.untyped_storage().data_ptr() for t in [self.x, *self.model.parameters()]}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.model(self.x)
        del y  # until here nothing that was saved could be freed and its address used again
        return sum(kept.values())

    def peak(self) -> int:
        """The most bytes held at once, above those held before the step."""
        with silence(), profile(use_kineto=False, profile_memory=True) as record:
            self()
        results: Any = record.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
        changes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
        held = [0, *accumulate(changes)]
        assert held[-1] == 0, "a step gives back whatever it took"
        return max(held)


def steps(row: Row) -> dict[str, Step]:
    """The same layer, factors and input with every contender, seen to give the same output."""
    torch.manual_seed(0)
    layer, x = row.layer(), row.input()
    weight: Any = layer.weight
    out, rest = weight.flatten(1).shape if row.kind != "embedding" else weight.T.shape
    A, B = torch.randn(row.r, rest) / rest**0.5, torch.randn(out, row.r) / row.r**0.5
    if row.kind == "embedding":
        A *= rest**0.5
    gradient = torch.randn_like(layer(x))
    steps: dict[str, Step] = {}
    for name, build in {"ours": ours, **CONTENDERS}.items():
        if (model := build(row, copy.deepcopy(layer), A, B)) is None:
            continue
        steps[name] = Step(model, x, gradient)
        assert sum(p.numel() for p in steps[name].parameters) >= A.numel() + B.numel()
        y = model(x)
        reference = steps["ours"].model(x)
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5)
        if x.requires_grad:
            (dx,) = torch.autograd.grad(y, x, gradient)
            (expected,) = torch.autograd.grad(reference, x, gradient)
            torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-4)
    return steps


def full_or_adapted(batch: int, fused: bool | None) -> dict[str, Step]:
    """Six linear layers in a row: training the adapters alone, and training all weights.

    Of the base's 17 products full fine-tuning does all (the first layer's input takes no gradient)
    and an adapter 11: 0.65 before the thin products, which add, and Adam, which moves 64 times
    fewer numbers and so takes the more off the ratio the fewer the rows and the slower it is.
    """
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(6)])
    x, adapted = torch.randn(batch, 1024), copy.deepcopy(base)
    adapters.attach(adapted, r=8, alpha=ALPHA)
    return {"ours": Step(adapted, x, fused=fused), "full": Step(base, x, fused=fused)}


class Logits(nn.Module):
    """A model of transformers whose output is the logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def llama(dora: bool, **config: int) -> dict[str, Step]:
    """All linear layers of a Llama but its head, with us and with PEFT; one adapter in both."""
    from peft import PeftModel

    ours, _ = zoo.build("llama", **config)
    ours = ours.float().train()
    theirs = copy.deepcopy(ours)
    layers = {"linear": adapters.Target("linear", exclude="lm_head")}
    adapters.attach(ours, layers, r=8, alpha=ALPHA, dora=dora)
    for adapter in adapters.attached(ours).values():
        nn.init.normal_(adapter.factors()[1], std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save_peft(ours, folder)
        theirs = PeftModel.from_pretrained(theirs, folder, is_trainable=True)  # pyright: ignore
    tokens = torch.randint(3, 40, (4, 64))
    steps = {name: Step(Logits(m), tokens) for name, m in {"ours": ours, "peft": theirs}.items()}
    outputs = [step.model(tokens) for step in steps.values()]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert len({sum(p.numel() for p in step.parameters) for step in steps.values()}) == 1
    for step in steps.values():
        step.gradient, step.adam = torch.randn_like(outputs[0]), None
    return steps


@contextmanager
def no_garbage() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def race(contenders: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """ours/theirs by contender, one ratio a round, until the `seconds` are over."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def turn(step: Step, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            step()
        return clock() - start

    for step in contenders.values():
        turn(step, 3)
    repeats = max(1, round(0.005 / turn(contenders["ours"], 1)))
    ratios: dict[str, list[float]] = {name: [] for name in contenders if name != "ours"}
    end, rounds = time.perf_counter() + seconds, 0
    with no_garbage():
        while time.perf_counter() < end or rounds < 8:
            for name, values in ratios.items():
                pair = ["ours", name] if rounds % 2 else [name, "ours"]
                took = {side: turn(contenders[side], repeats) for side in pair}
                values.append(took["ours"] / took[name])
            rounds += 1
    return ratios


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.adapters")
    parser.add_argument("rows", nargs="*", help="rows whose name contains one of these words (all)")
    parser.add_argument("--seconds", type=float, default=8, help="for each row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    makers: dict[str, Callable[[], dict[str, Step]]]
    makers = {row.name: partial(steps, row) for row in ROWS}
    for batch, fused in ((128, None), (128, True), (512, True)):
        name = f"6 linear 1024, {batch}, {'fused ' if fused else ''}Adam"
        makers[name] = partial(full_or_adapted, batch, fused)
    wide = {"hidden_size": 512, "intermediate_size": 1408, "head_dim": 64, "num_key_value_heads": 4}
    wide |= {"num_attention_heads": 8, "vocab_size": 1000}
    for size, config in {"32": {}, "512": wide}.items():
        for variant in ("LoRA", "DoRA"):
            makers[f"Llama {size}, {variant}"] = partial(llama, variant == "DoRA", **config)
    table = Table(title=f"ours / theirs, threads: {options.threads}")
    for heading in ("", "theirs"):
        table.add_column(heading, no_wrap=True)
    for heading in ("step time [quartiles]", "rounds", "peak", "saved", "our peak MB", "our saved"):
        table.add_column(Text(heading), justify="right")
    for name, make in makers.items():
        if options.rows and not any(word in name for word in options.rows):
            continue
        contenders = make()
        ratios = race(contenders, options.seconds)
        peak = {other: step.peak() for other, step in contenders.items()}
        saved = {other: step.saved() for other, step in contenders.items()}
        for i, (other, values) in enumerate(ratios.items()):
            low, middle, high = statistics.quantiles(values, n=4)
            table.add_row(
                "" if i else name,
                other,
                Text(f"{middle:.3f} [{low:.3f}, {high:.3f}]"),
                str(len(values)),
                *(f"{sizes['ours'] / sizes[other]:.3f}" for sizes in (peak, saved)),
                *("" if i else f"{sizes['ours'] / 1e6:.3g}" for sizes in (peak, saved)),
                end_section=i == len(ratios) - 1,
            )
    Console(width=124).print(table)


if __name__ == "__main__":
    main()
