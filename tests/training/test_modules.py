"""The LightningModules: what trains, what is frozen, and how the learning rate changes.

Independent truth: a plain mean over all steps or rows, rates computed by hand, weights compared.

Run: make test ARGS=tests/training/test_modules.py
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lora_lab import adapters
from lora_lab.config.schema import Optimizer
from lora_lab.data.digits import Digits
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.modules import LOSS_READ_INTERVAL, BaseModule, DivergedError
from lora_lab.training.schedule import lr_factor

ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01, "schedule": "constant", "warmup": 0.0}


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 10)
    )


def fit(module: BaseModule, batch_size: int = 64, **trainer) -> pl.Trainer:
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    fitted = pl.Trainer(max_epochs=2, accelerator="cpu", **quiet, **trainer)
    fitted.fit(module, Digits("adapt", batch_size, seed=0))
    return fitted


def test_a_frozen_base_does_not_move_its_running_statistics_included():
    model = normed()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapters.attach(model, r=2, alpha=2)
    module = LoRAModule(model, "classification", 10, Optimizer.model_validate(ADAM))
    trainer = fit(module)
    after = adapters.base_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(adapter.B.abs().max() > 0 for adapter in adapters.attached(model).values())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for a in adapters.attached(model).values() for p in (a.A, a.B)}
    assert model[2].training


def test_weight_decay_is_off_unless_asked_for_and_the_zero_factor_has_its_own_rate():
    model = normed()
    adapters.attach(model, r=2, alpha=2)
    quiet = {"_target_": "torch.optim.AdamW", "lr": 0.1, "schedule": "constant", "warmup": 0.0}
    for settings, decay in (({}, 0.0), ({"weight_decay": 0.3}, 0.3)):
        optimizer = Optimizer.model_validate({**quiet, **settings})
        module = LoRAModule(model, "classification", 10, optimizer, lr_ratio=4.0)
        groups = module.configure_optimizers().param_groups
        attached = adapters.attached(model).values()
        assert [g["weight_decay"] for g in groups] == [decay, decay]
        assert [g["lr"] for g in groups] == [0.1, 0.4]
        assert [id(p) for p in groups[1]["params"]] == [id(adapter.B) for adapter in attached]


def test_a_base_in_training_moves_all_of_it():
    model = normed()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(BaseModule(model, "classification", 10, Optimizer.model_validate(ADAM)))
    assert all(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Seen(BaseModule):
    """Notes each training loss; that of step `bad` is not finite."""

    bad = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = super().training_step((x / (batch_idx + 1 != self.bad), y), batch_idx)
        self.seen[batch_idx] = loss.item()
        return loss

    seen: dict[int, float]


def test_the_training_loss_is_the_mean_over_all_steps_of_an_epoch_however_often_it_is_read():
    module = Seen(normed(), "classification", 10, Optimizer.model_validate(ADAM))
    module.seen = {}
    trainer = fit(module, batch_size=8)
    assert len(module.seen) > 2 * LOSS_READ_INTERVAL
    assert len(module.seen) % LOSS_READ_INTERVAL
    mean = sum(module.seen.values()) / len(module.seen)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(mean, rel=1e-6)
    assert module.train_loss == module.seen[len(module.seen) - 1]


def test_a_divergence_after_the_first_look_is_told_by_its_step_of_the_epoch():
    module = Seen(normed(), "classification", 10, Optimizer.model_validate(ADAM))
    module.seen, module.bad = {}, LOSS_READ_INTERVAL + 7
    with pytest.raises(DivergedError, match=f"in epoch 1, step {module.bad} of"):
        fit(module, batch_size=8)
    assert len(module.seen) < 2 * LOSS_READ_INTERVAL


def test_validation_is_the_mean_over_all_rows():
    data = Digits("adapt", batch_size=64, seed=0)
    data.eval_rows = 100  # 360 rows: the last batch is smaller
    data.setup("fit")
    model = normed()
    module = BaseModule(model, "classification", 10, Optimizer.model_validate(ADAM))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (values,) = trainer.validate(module, data, verbose=False)
    x, y = data.val.tensors  # pyright: ignore
    with torch.no_grad():
        logits = model.eval()(x)
    assert values["val/loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item())
    assert values["val/accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, [0, 0.5, 1, 0.5, 0]),
        ("cosine", 0, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
    ],
)
def test_rates(schedule: str, warmup: float, rates: list[float]):
    assert [lr_factor(schedule, warmup, 4, step) for step in range(5)] == pytest.approx(rates)


def test_the_rate_that_is_used_is_the_schedules():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    optimizer = Optimizer.model_validate({**ADAM, "schedule": "linear", "warmup": 0.25})
    fit(BaseModule(normed(), "classification", 10, optimizer), callbacks=[Watch()])
    steps = 2 * (1437 // 64)
    expected = [0.01 * lr_factor("linear", steps / 4, steps, step) for step in range(steps)]
    assert seen == pytest.approx(expected)
