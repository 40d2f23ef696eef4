"""What a run forgets of what its pretrained base knew, by the head that the base had.

Independent truth: transformers' own models with W + ΔW written into their weights, row by row; the
contrastive loss as sentence-transformers defines it, with loops; a run by itself for one in a pack.

Run: make test ARGS=tests/training/test_forgetting_pretrained.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from lora_lab import adapters
from lora_lab.config.schema import ConfigError
from lora_lab.packing.runs import run_pack
from lora_lab.runs import Run
from lora_lab.training import experiment
from lora_lab.training.forgetting import Forgetting
from lora_lab.training.plan import Plan, plan
from lora_lab.training.tasks import TASKS
from tests.config.test_conf import composed
from tests.packing.test_packing import check_same_runs
from tests.text_files import save_jsonl, save_rows, save_tokenizer, text_of
from tests.tiny_models import tiny_model

PAIRS = ("forget=pairs", "forget.train=pairs.jsonl", "forget.val=pairs.jsonl")
LANGUAGE = ("forget=language", "forget.train=known.jsonl", "forget.val=known.jsonl")
MASKED = (*LANGUAGE, "forget.objective=masked", "forget.mask_share=0.4")
PACK = ("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "optimizer.lr=0.02")


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_CACHE", "cache")
    save_rows("train.jsonl", 24)
    save_jsonl("known.jsonl", [{"text": text_of(i)} for i in range(3, 14)])
    pairs = [{"first": text_of(i), "second": text_of(i + 40)} for i in range(11)]
    save_jsonl("pairs.jsonl", pairs)


def plan_of(family: str, checkpoint_head: str, head: str, *settings: str) -> Plan:
    kind = "bert" if family == "bert" else "gpt"
    tiny_model(family, "model", checkpoint_head)
    save_tokenizer("model", kind)
    data = ("data=language", "data.text=text") if head == "language" else ("data=text",)
    fixed = ("name=ours", "model=pretrained", "model.path=model", f"model.head={head}")
    fixed += (*data, "data.train=train.jsonl", "base=pretrained", "target=all", "model.dropout=0")
    fixed += ("++target.all.match=" + ("*query" if family == "bert" else "*c_attn"),)
    new = {"bert": "[classifier,*pooler]", "gpt2": "[score]"}[family]
    also = () if head == "language" else (f"also_train={new}",)
    fixed += ("data.batch_size=8", "trainer.accelerator=cpu", "tracking=off", "figures=false")
    fixed += ("spectra.against_base=false", "spectra.truncation=model")
    return plan(composed(*fixed, *also, "forget.eval_batch_size=4", *settings))


def adapted_model(run_plan: Plan) -> nn.Module:
    """The run's model, with adapters that are not at their start."""
    model = run_plan.pretrained_model().eval()
    run_plan.attach(model)
    torch.manual_seed(1)
    for adapter in adapters.attached(model).values():
        nn.init.normal_(adapter.B, std=0.3)
    return model


def measured(run_plan: Plan, model: nn.Module) -> tuple[float, float]:
    """The loss and the accuracy by `Forgetting`, over the batches of a validation."""
    data = run_plan.training_data()
    data.setup("fit")
    assert data.known is not None
    forgetting = Forgetting(data.known)
    _, loader = data.val_dataloader()
    with torch.no_grad():
        for inputs, targets in loader:
            forgetting.add(model, inputs, targets)
    row = forgetting.row(torch.stack)
    return row["loss"].item(), row["accuracy"].compute().item()


def merged_layers(run_plan: Plan, model: nn.Module, into: Any) -> Any:
    """`into`, a model of transformers, with W + ΔW in its weights."""
    state = into.state_dict()
    for site, delta in adapters.deltas(model).items():
        state[f"{site}.weight"] += delta
    into.load_state_dict(state)
    return into.eval()


def test_the_contrastive_loss_is_that_of_sentence_transformers():
    """−log softmax of 20 cos(first i, second j) at j = i, for each i, in a loop."""
    outputs = torch.randn(10, 6, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 4, *[-100] * 5])
    total, right = 0.0, 0
    for i in range(5):
        scores = torch.stack([20 * cosine_similarity(outputs[i], b, dim=0) for b in outputs[5:]])
        total -= scores.log_softmax(0)[i].item()
        right += int(scores.argmax() == i)
    task = TASKS["pairs"]
    assert task.loss_sum(outputs, targets).item() == pytest.approx(total, rel=1e-12)
    assert task.count(targets) == 5
    metric = task.metrics["accuracy"](1)
    metric.update(outputs, targets)
    assert metric.compute().item() == pytest.approx(right / 5)


def test_pairs_are_those_of_the_merged_layers_in_whole_batches():
    run_plan = plan_of("bert", "masked", "classification", *PAIRS)
    model = adapted_model(run_plan)
    tokenizer: Any = run_plan.training_data().known.tokenizer  # pyright: ignore
    below = merged_layers(run_plan, model, AutoModelForMaskedLM.from_pretrained("model")).bert
    texts = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]

    def embedding(text: str) -> torch.Tensor:
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            return below(**ids).last_hidden_state[0].mean(0)

    losses = []
    for start in (0, 4):  # of 11 pairs two batches of 4; the last three fill none
        batch = texts[start : start + 4]
        seconds = torch.stack([embedding(pair["second"]) for pair in batch])
        for i, pair in enumerate(batch):
            scores = 20 * cosine_similarity(embedding(pair["first"])[None], seconds)
            losses.append(cross_entropy(scores, torch.tensor(i)).item())
    assert measured(run_plan, model)[0] == pytest.approx(sum(losses) / 8, rel=1e-4)


HEADS = {
    "masked": ("bert", "masked", "classification", MASKED, AutoModelForMaskedLM),
    "language": ("gpt2", "language", "classification", LANGUAGE, AutoModelForCausalLM),
    "same": ("gpt2", "language", "language", LANGUAGE, AutoModelForCausalLM),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_language_loss_is_that_of_the_checkpoints_head_over_the_merged_layers(name: str):
    family, checkpoint_head, head, settings, auto = HEADS[name]
    run_plan = plan_of(family, checkpoint_head, head, *settings)
    model = adapted_model(run_plan)
    whole = merged_layers(run_plan, model, auto.from_pretrained("model"))
    data = run_plan.training_data()
    data.setup("fit")
    batches = [list(data.val_dataloader()[1]) for _ in range(2)]
    total, count, right = 0.0, 0, 0
    for (inputs, targets), (again, same) in zip(*batches, strict=True):
        assert all(torch.equal(inputs[key], again[key]) for key in inputs)  # the masks too
        assert torch.equal(targets, same)
        for row in range(len(targets)):
            with torch.no_grad():
                logits = whole(**{key: value[row : row + 1] for key, value in inputs.items()})[0]
            known = targets[row] != -100
            total += cross_entropy(logits[0][known], targets[row][known], reduction="sum").item()
            right += int((logits[0][known].argmax(-1) == targets[row][known]).sum())
            count += int(known.sum())
    assert measured(run_plan, model) == pytest.approx((total / count, right / count), rel=1e-4)
    names = {name for name, _ in model.named_modules()}
    assert not any("predictions" in name or "lm_head" in name for name in names - {"lm_head"})


# name → checkpoint's head, the run's, settings of forget, what is said
WRONG = {
    "no head": ("none", "classification", MASKED, "has no head for it (model.head=masked)"),
    "a set with other classes": (
        *("none", "classification"),
        ("forget=text", "forget.train=three.jsonl"),
        "has 3 outputs to be predicted, and the model has 2",
    ),
    "too long": ("masked", "classification", (*PAIRS, "forget.max_length=99"), "64 positions"),
    "no such file": ("masked", "classification", (PAIRS[0], "forget.train=no.jsonl"), "forget."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_measured_is_said_before_the_run(name: str):
    checkpoint_head, head, settings, message = WRONG[name]
    save_jsonl("three.jsonl", [{"text": "good", "label": f"l{i % 3}"} for i in range(30)])
    with pytest.raises(ConfigError) as error:
        plan_of("bert", checkpoint_head, head, *settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings", [pytest.param(PAIRS, id="pairs"), pytest.param(MASKED, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_in_a_pack_each_run_forgets_what_it_forgets_by_itself(settings: tuple[str, ...]):
    points = (["adapter.r=1"], ["adapter.r=3", "seed=1"])
    plans = [
        [plan_of("bert", "masked", "classification", *settings, *PACK, *point, f"runs_dir={root}")]
        for root in ("packed", "alone")
        for point in points
    ]
    together, alone = [p[0] for p in plans[:2]], [p[0] for p in plans[2:]]
    assert run_pack(together, Console(quiet=True)) == [None, None]
    others = [experiment.run(one, Console(quiet=True)) for one in alone]
    runs = [Run(one.path) for one in together]
    check_same_runs(runs, others, 1e-4)
    for run in runs:
        curve = run.curve("forget/loss")
        assert len(curve) == 3
        end = run.last("forget/increase")
        assert end == pytest.approx(curve[2] - curve[0], abs=1e-9)
        assert end != 0
    assert runs[0].curve("forget/loss")[0] == pytest.approx(runs[1].curve("forget/loss")[0])


def test_a_config_without_it_has_the_identity_that_it_had():
    cfg = composed("experiment=digits")
    assert cfg.forget is None
    assert "forget" not in cfg._identifying_settings()
    one = plan_of("bert", "masked", "classification", *PAIRS).cfg
    assert one.forget is not None
    assert {"train", "val"} <= (one.forget.content or {}).keys()  # by content, and not by path
