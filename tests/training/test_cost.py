"""What training costs: FLOPs, peak memory and the time of a step.

Independent truth: the FLOPs of a Llama counted by hand, layer by layer; the memory that the kernel
counts for the process, and on a GPU torch; steps on a clock that the test moves.

Run: make test ARGS=tests/training/test_cost.py
"""

import functools
import json
from resource import RUSAGE_SELF, getrusage
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lora_lab import adapters
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Optimizer
from lora_lab.data import Data
from lora_lab.run_files import read_cost
from lora_lab.runs import Run
from lora_lab.training import step_clock
from lora_lab.training.callbacks import checkpoint
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.cost import Cost
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.modules import BaseModule
from tests.conftest import Lab, only_run
from tests.tracking.test_tracking import wandb_content

ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01, "schedule": "constant", "warmup": 0.0}
ROWS, TOKENS, WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS, LAYERS = 2, 24, 64, 96, 80, 4, 2, 2
KV_WIDTH = WIDTH * KV_HEADS // HEADS
LINEARS = {
    **{"q": (WIDTH, WIDTH), "k": (WIDTH, KV_WIDTH), "v": (WIDTH, KV_WIDTH), "o": (WIDTH, WIDTH)},
    **{"gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)},
}
"""Inputs and outputs of each linear layer of a block."""


class Tokens(Data):
    """Rows of tokens, with the same tokens as targets."""

    task = "language"

    @property
    def sizes(self) -> dict[str, int]:
        return {"out_features": VOCABULARY}

    def draw(self) -> tuple[Any, Any]:
        rows = torch.randint(VOCABULARY, (4 * ROWS, TOKENS))
        return TensorDataset(rows, rows), TensorDataset(rows, rows)


def llama(**adapter: Any) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    model = transformers.LlamaForCausalLM(config)
    if adapter:
        adapters.attach(model, alpha=8, **adapter)
    return model


def train(model: nn.Module, *callbacks: pl.Callback, **trainer: Any) -> Cost:
    """Trains a model on Tokens for an epoch of 4 batches; the callbacks come first."""
    kind = LoRAModule if adapters.names(model) else BaseModule
    module = kind(model, "language", VOCABULARY, Optimizer.model_validate(ADAM))
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    settings = {**dict.fromkeys(off, False), "accelerator": "cpu", "max_epochs": 1, **trainer}
    cost = Cost()
    fitted = pl.Trainer(callbacks=[*callbacks, cost], **settings)
    fitted.fit(module, Tokens("adapt", ROWS, seed=0))
    return cost


def product(inputs: int, outputs: int) -> int:
    """FLOPs of x Wᵀ for all tokens of a batch: a multiplication and an addition for each weight."""
    return 2 * ROWS * TOKENS * inputs * outputs


# By layer:
#   forward          x Wᵀ of each linear layer and of the head
#   attention        Q Kᵀ and P V; backward P again, and the gradients of V, P, Q and K: 5 products
#   to the input     g W, where what comes before trains: not of q, k, v in the first block, whose
#                    input is the frozen embedding's
#   to the weight    gᵀ x of each linear layer, in full fine-tuning alone
#   an adapter       forward A x and B h; backward the gradients of B, h and A, and of x where
#                    what comes before trains
def flops_by_hand(targets: tuple[str, ...], r: int, is_full: bool) -> int:
    attention = 2 * ROWS * HEADS * TOKENS * TOKENS * (WIDTH // HEADS)
    total = (3 if is_full else 2) * product(WIDTH, VOCABULARY)  # the head: its input trains
    for block in range(LAYERS):
        total += (2 + 5) * attention
        for name, (inputs, outputs) in LINEARS.items():
            has_gradient = is_full or block > 0 or name not in ("q", "k", "v")
            total += (1 + has_gradient + is_full) * product(inputs, outputs)
            if name in targets:
                total += 2 * product(inputs, r) + 3 * product(r, outputs)
                total += has_gradient * product(inputs, r)
    return total


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_flops_are_those_counted_by_hand(precision: str):
    """Also over micro-batches. LoRA spares the gradients of the weights: a third of a step."""
    full = flops_by_hand((), 0, is_full=True)
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "full": ({}, full),
        "q and v": (
            {"targets": {"qv": adapters.Target(match=("*.q_proj", "*.v_proj"))}, "r": 4},
            flops_by_hand(("q", "v"), 4, is_full=False),
        ),
        "each linear layer": (
            {"targets": {"all": adapters.Target(match=("*.layers.*_proj",))}, "r": 8},
            flops_by_hand(tuple(LINEARS), 8, is_full=False),
        ),
    }
    counted = {}
    for name, (adapter, by_hand) in cases.items():
        counted[name] = train(llama(**adapter), precision=precision).measured["cost/flops_per_step"]
        assert counted[name] == pytest.approx(by_hand, rel=0.01), name
    assert 0.6 < counted["q and v"] / full < 0.7
    twice = train(llama(), precision=precision, accumulate_grad_batches=2)
    assert twice.measured["cost/flops_per_step"] == 2 * counted["full"]


class Allocation(pl.Callback):
    """Holds so many bytes for the length of one batch's hook."""

    def __init__(self, size: int):
        self.size = size
        self.peak_of_process = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            torch.ones(self.size, dtype=torch.uint8, device=pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak_of_process = 1024 * getrusage(RUSAGE_SELF).ru_maxrss


def test_the_peak_of_a_process_is_the_kernels_and_of_this_training_alone():
    size = 2**27
    torch.ones(4 * size, dtype=torch.uint8)  # of an earlier run in the process
    peaks = []
    for held in (0, size):
        cost = train(llama(), allocation := Allocation(held)).measured
        peaks.append(cost["cost/peak_memory_bytes"])
        assert peaks[-1] == pytest.approx(allocation.peak_of_process, abs=2**20)
        assert cost["memory_of"] == "process"
    assert peaks[1] - peaks[0] == pytest.approx(size, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_gpu_is_torchs():
    size = 2**28
    torch.ones(4 * size, dtype=torch.uint8, device="cuda")
    cost = train(llama(), Allocation(size), accelerator="gpu", devices=1).measured
    assert cost["cost/peak_memory_bytes"] == torch.cuda.max_memory_allocated()
    assert size < cost["cost/peak_memory_bytes"] < 2 * size
    assert cost["memory_of"] == "GPU"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time on the clock, which the test moves."""
    time = [0.0]
    monkeypatch.setattr(step_clock, "perf_counter", lambda: time[0])
    return time


CLOCKS: dict[str, tuple[list[tuple[int, float]], int, tuple[float, int, float]]] = {
    # windows of (steps, seconds a step), runs in a pack → seconds a step, steps, rows a step
    "without the first five": ([(1, 9), (4, 5), (6, 2)], 1, (2, 6, 3)),
    "an end of an epoch within them": ([(3, 9), (9, 2)], 1, (2, 7, 3)),
    "few steps: without the first": ([(4, 2), (2, 4)], 1, (2, 5, 3)),
    "one step": ([(1, 2)], 1, (2, 1, 3)),
    "the median of three windows": ([(5, 9), (4, 2), (3, 8), (5, 3)], 1, (3, 12, 3)),
    "a pack of four": ([(5, 9), (8, 2)], 4, (0.5, 8, 3)),
}


@pytest.mark.parametrize("case", CLOCKS)
def test_steps_are_timed_without_pauses(now: list[float], case: str):
    windows, runs, (seconds, steps, rows) = CLOCKS[case]
    clock = step_clock.StepClock(torch.device("cpu"), first_step=100)
    step = 100
    for count, length in windows:
        for _ in range(count):
            for rows_of_micro_batch in (1, 2):
                clock.batch(step, rows_of_micro_batch, tokens=0, runs=runs)
                now[0] += length / 2
            step += 1
        clock.pause(step)
        clock.pause(step)  # a validation at the end of an epoch
        now[0] += 1000
    assert clock.speed is not None
    assert clock.speed.seconds_per_step == pytest.approx(seconds)
    assert (clock.speed.steps, clock.speed.rows_per_step) == (steps, rows)


def test_nothing_but_steps_is_timed(lab: Lab, monkeypatch: pytest.MonkeyPatch, now: list[float]):
    """A step takes a second; validations, measurements of ΔW and checkpoints take hours."""
    slow = (Updates, "spectra_by_site"), (Checkpoint, "_save"), (BaseModule, "validation_step")
    seen: dict[str, int] = {}
    for seconds, owner, name in [
        (1, BaseModule, "training_step"),
        *((9999, *each) for each in slow),
    ]:
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name), now, seen))
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)  # a checkpoint before each step
    clocks = []
    end = Cost.on_train_end

    def keep_clock(cost: Cost, *args: Any) -> None:
        end(cost, *args)
        clocks.append(cost.clock)

    monkeypatch.setattr(Cost, "on_train_end", keep_clock)
    often = ("spectra.every_n_steps=3", "trainer.val_check_interval=4", "checkpoint_every=1e-9")
    assert lab("shift", *often, "trainer.max_epochs=2") == 0
    windows = clocks[-1].windows
    assert sum(window.steps for window in windows) == 16
    assert [window.seconds for window in windows] == [window.steps for window in windows]
    assert min(seen[name] for _, name in slow) > 2


def taking(seconds: float, function: Any, now: list[float], seen: dict[str, int]) -> Any:
    """The function, of which each call takes so long and is counted by its name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        now[0] += seconds
        seen[function.__name__] = seen.get(function.__name__, 0) + 1
        return function(*args, **kwargs)

    return functools.wraps(function)(call)


def cost_of(run: Run) -> dict[str, Any]:
    """A run's cost.json, which its status has a record of and metrics.jsonl has nothing of."""
    assert "cost.json" in run.status["files"]
    assert not any(key.startswith("cost/") for row in run.rows() for key in row)
    assert run.finished
    return read_cost(run.path)


def test_a_run_keeps_its_cost_and_wandb_gets_it(lab: Lab):
    assert lab("bytes_lm", "adapter.r=2", "target=all", tracking="offline") == 0
    cost = cost_of(run := only_run())
    ratio = cost["cost/tokens_per_second"] / cost["cost/rows_per_second"]
    assert ratio == pytest.approx(16)  # data.context
    rows = cost["cost/rows_per_second"] * cost["cost/seconds_per_step"]
    assert rows == pytest.approx(run.config["data"]["batch_size"])
    metrics = {key: value for key, value in cost.items() if key.startswith("cost/")}
    content = wandb_content(run)
    (row,) = [row for row in content["history"] if "cost/seconds_per_step" in row]
    for logged in (row, content["summary"]):
        assert {key: logged[key] for key in metrics} == metrics
    assert cost["steps"] < run.rows()[-1]["step"]


def test_a_frozen_base_costs_no_training(lab: Lab):
    assert lab("shift", "adapter=none") == 0
    assert not (only_run().path / "cost.json").exists()
    assert only_run().finished


@pytest.mark.slow
def test_a_run_that_goes_on_times_its_steps_and_keeps_its_flops(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    settings = ("shift", "checkpoint_every=0", "trainer.max_epochs=2")
    assert lab(*settings, "runs_dir=alone") == 0
    alone = cost_of(only_run("alone"))
    with monkeypatch.context() as patch:
        patch.setattr(Cost, "on_train_epoch_end", stop_at_epoch(1))
        assert lab(*settings) != 0
    with monkeypatch.context() as patch:
        patch.setattr(Cost, "_count", None)  # nothing is counted again
        assert lab(*settings) == 0
    resumed = cost_of(only_run())
    assert resumed["cost/flops_per_step"] == alone["cost/flops_per_step"]
    assert (alone["steps"], resumed["steps"]) == (11, 7)  # of 16, and of the last 8


def stop_at_epoch(stop: int) -> Any:
    def on_train_epoch_end(cost: Cost, trainer: pl.Trainer, module: Any) -> None:
        cost.pause()
        if trainer.current_epoch == stop:
            raise KeyboardInterrupt

    return on_train_epoch_end


def test_a_run_stopped_after_its_training_keeps_what_was_measured(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.training.finish._select", lambda trial: json.loads("no"))
        assert lab("shift") != 0
    with monkeypatch.context() as patch:
        patch.setattr(Cost, "on_train_batch_start", None)  # no step is taken
        assert lab("shift") == 0
    assert cost_of(only_run())["steps"] == 27


def test_a_pack_says_what_each_of_its_runs_costs(lab: Lab):
    """FLOPs are those of each run by itself, seconds the pack's shared, the memory the pack's."""
    from tests.packing.test_packing import train_in_pack

    points = [["adapter.r=1"], ["adapter.r=4"], ["adapter.r=4", "seed=1"]]
    packed = [cost_of(run) for run in train_in_pack("shift", points, "runs_dir=packed")]
    for r, cost in zip((1, 4), packed, strict=False):
        assert lab("shift", f"adapter.r={r}", f"runs_dir=alone{r}") == 0
        alone = cost_of(only_run(f"alone{r}"))
        assert cost["cost/flops_per_step"] == alone["cost/flops_per_step"]
        assert (cost["runs"], alone["runs"]) == (3, 1)
    same = ("cost/seconds_per_step", "cost/peak_memory_bytes", "steps")
    assert all(cost[key] == packed[0][key] for cost in packed for key in same)
    assert packed[1] == packed[2]
