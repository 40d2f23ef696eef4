"""The best validation of a training: its weights are kept, and training ends where none follows."""

from collections.abc import Mapping
from math import inf
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lora_lab.adapters.files import is_adapter_key
from lora_lab.adapters.memory import full_tensor
from lora_lab.config.schema import EarlyStopping
from lora_lab.report.epochs import goal_of
from lora_lab.training.modules import BaseModule

Row = dict[str, float]
"""The metrics of one validation by name, as `val/loss`, with its `step` and `epoch`."""


class Best:
    """The best value of one metric so far. To be better it must be so by more than `min_delta`."""

    def __init__(self, metric: str, min_delta: float = 0.0):
        self.metric, self.min_delta = metric, min_delta
        self.row: Row = {}
        """The validation with the best value; {} before the first."""
        self.misses = 0
        """How many validations in a row were no better."""

    def update(self, row: Row) -> bool:
        """Takes note of a validation; True if it is the best so far. NaN is no better."""
        sign = -1 if goal_of(self.metric) == "maximize" else 1
        best = sign * self.row[self.metric] if self.row else inf
        is_better = sign * row[self.metric] < best - (self.min_delta if self.row else 0)
        self.misses = 0 if is_better else self.misses + 1
        if is_better:
            self.row = row
        return is_better


class Selection(Callback):
    """Says which weights are a run's result, and ends a training that no longer improves.

    `select` is the config's: `last`, or `best METRIC`. Then the trained weights of the best
    validation so far are held in CPU memory, and are part of a checkpoint. Validations before the
    first step do not count.
    """

    def __init__(self, select: str = "last", early_stopping: EarlyStopping | None = None):
        metric = select.removeprefix("best ") if select != "last" else None
        self.best = Best(metric) if metric else None
        self.stopping = early_stopping and Best(early_stopping.metric, early_stopping.min_delta)
        self.patience = early_stopping.patience if early_stopping else 0
        self.weights: dict[str, Tensor] = {}
        """The trained weights at the best validation; {} where `select` is `last`."""

    @property
    def reported(self) -> Best | None:
        """What `best/…` rows are about: the metric that selects, else the one that stops."""
        return self.best or self.stopping

    @property
    def ends_training(self) -> bool:
        """Whether so many validations in a row were no better that training is to end."""
        return self.stopping is not None and self.stopping.misses >= self.patience

    def observe(
        self, module: BaseModule, metrics: Mapping[str, float], step: float, epoch: float
    ) -> None:
        """Takes note of one validation: `metrics` has all its values by name, as `val/loss`."""
        row = {**metrics, "step": step, "epoch": epoch}
        if self.best and self.best.update(row):
            self.weights = trained_weights(module)
        if self.stopping:
            self.stopping.update(row)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a training at once that was interrupted after its last validation."""
        trainer.should_stop |= self.ends_training

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes note of a validation within training."""
        assert isinstance(pl_module, BaseModule)
        if self.reported and trainer.state.fn == TrainerFn.FITTING:
            values = trainer.callback_metrics.items()
            kept = ("val/", "forget/")
            metrics = {name: value.item() for name, value in values if name.startswith(kept)}
            self.observe(pl_module, metrics, **pl_module.step_and_epoch())
            # All processes have the same metrics, and so end at the same step.
            trainer.should_stop |= self.ends_training

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to know, weights included; {} where nothing is selected."""
        if not self.reported:
            return {}
        state: dict[str, Any] = {"weights": self.weights}
        for name, best in (("best", self.best), ("stopping", self.stopping)):
            state[name] = best and {"row": best.row, "misses": best.misses}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint knows."""
        if not self.reported:
            return
        self.weights = state_dict["weights"]
        for name, best in (("best", self.best), ("stopping", self.stopping)):
            if best:
                best.row, best.misses = state_dict[name]["row"], state_dict[name]["misses"]

    def best_row(self) -> Row:
        """What is logged of the best validation: `best/<metric>`, `best/step` and `best/epoch`."""
        if not (self.reported and self.reported.row):
            return {}
        names = (self.reported.metric, "step", "epoch")
        return {f"best/{name}": self.reported.row[name] for name in names}


def trained_weights(module: BaseModule) -> dict[str, Tensor]:
    """A copy in CPU memory of what trains: the adapters and what trains beside them, or all."""
    state = module.model.state_dict()
    keys = [key for key in state if is_adapter_key(key)] or list(state)
    return {key: full_tensor(state[key]).detach().to("cpu", copy=True) for key in keys}
