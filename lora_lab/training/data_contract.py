"""Checks, before a run is made, that a data set of the user's is what data/module.py asks for.

First its class (sizes, draw, the argument phase), then the object (task, sizes), last the rows that
it draws. Each message names what is wrong, and the nearest right thing.
"""

import inspect
import os
import traceback
from pathlib import Path
from typing import Any

import torch

from lora_lab.config.checks import parameters_of
from lora_lab.config.components import TrainedBase
from lora_lab.config.schema import Component, Config, ConfigError, nearest
from lora_lab.data import Data, Phase
from lora_lab.data.module import Rows
from lora_lab.training.tasks import IGNORED, TASKS

METHODS = {
    "sizes": "a property: the model's sizes for this data, as {'in_features': 64, 'out_features': "
    "10}",
    "draw": "gives two sets of rows, for training and for validation",
}
"""What a class has to define → what that is."""

MEAN_OUT_FEATURES = ("classes", "num_classes", "n_classes", "num_labels", "n_labels", "outputs")
"""Names that others have for out_features."""

ROWS = "rows[0:2] must give (inputs, targets) of these rows, as torch's TensorDataset does"


def check_class(component: Component) -> None:
    """Raises ConfigError where the class of a data set lacks what it has to define."""
    callee = component.callee
    start = f"data._target_={component.target}"
    names = [name for name in getattr(callee, "__dict__", ()) if not name.startswith("_")]
    for name in sorted(getattr(callee, "__abstractmethods__", ()), reverse=True):
        raise ConfigError(f"{start}: lacks `{name}` ({METHODS[name]}){nearest(name, names)}")
    parameters, _ = parameters_of(callee)
    takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "phase" not in parameters and not takes_any:
        raise ConfigError(
            f"{start}: must take the argument `phase`, base or adapt{nearest('phase', parameters)}"
        )


def check_object(cfg: Config, data: Data) -> None:
    """Raises ConfigError where a data set names no task, or does not say the model's sizes."""
    start = f"data._target_={cfg.data.target}"
    if "phase" not in vars(data):
        raise ConfigError(
            f"{start}: its __init__ must begin with super().__init__(phase, batch_size, seed)"
        )
    task, attributes = getattr(data, "task", None), [n for n in vars(type(data)) if n[0] != "_"]
    if task not in TASKS:
        near = nearest("task", attributes) if task is None else nearest(task, TASKS)
        raise ConfigError(f"{start}: its `task` must be one of {', '.join(TASKS)}{near}")
    sizes: Any = data.sizes
    if callable(sizes):
        raise ConfigError(f"{start}: its `sizes` must be a property: @property above `def sizes`")
    if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
        raise ConfigError(
            f"{start}: its `sizes` must be a dict of whole numbers, not {sizes!r:.80}"
        )
    if "out_features" not in sizes:
        meant = [name for name in sizes if name in MEAN_OUT_FEATURES]
        near = f"; nearest: {meant[0]}" if meant else nearest("out_features", sizes)
        raise ConfigError(
            f"{start}: its `sizes` must have out_features, the number of classes or of numbers to "
            f"be predicted; they have {', '.join(sizes) or 'nothing'}"
            f"{near}"
        )


_checked: set[tuple[Any, str]] = set()
"""Data sets that were drawn and are right: class, arguments. Points of a multirun share them."""


def check_rows(cfg: Config) -> None:
    """Draws the rows of a data set of the user's, in each phase of the run, and checks them.

    lora_lab's own are not drawn here, nor those of a process that another has started for one of
    the run's devices. Raises ConfigError.
    """
    key = cfg.data.callee, repr((cfg.data.arguments, cfg.data.content, cfg.base.method))
    if (
        cfg.data.target.startswith("lora_lab.")
        or key in _checked
        or "TORCHELASTIC_RUN_ID" in os.environ
    ):
        return
    phases: list[Phase] = ["base", "adapt"] if isinstance(cfg.base, TrainedBase) else ["adapt"]
    for phase in phases:
        if fault := _fault(cfg.data.callee(phase=phase, **cfg.data.arguments)):
            raise ConfigError(f"data._target_={cfg.data.target}: {fault} (in the phase {phase})")
    _checked.add(key)


def _fault(data: Data) -> str | None:
    """What is wrong with the rows that a data set draws; None where nothing is."""
    try:
        drawn = data.draw()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        users = [frame for frame in frames if frame.filename == inspect.getfile(type(data))]
        last = (users or frames)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return f"draw() raises {type(error).__name__}: {error} ({where})"
    if not isinstance(drawn, tuple | list) or len(drawn) != 2:
        return (
            f"draw() must give two sets of rows, for training and for validation, not {drawn!r:.80}"
        )
    for name, rows in zip(("training", "validation"), drawn, strict=True):
        if fault := _fault_of_rows(data, rows):
            return f"draw(): the rows for {name}: {fault}"
    try:
        data.check_batch(len(drawn[0]))
    except ValueError as error:
        return str(error)
    return None


def _fault_of_rows(data: Data, rows: Rows) -> str | None:
    """What is wrong with one set of rows, seen in its first batch; None where nothing is."""
    try:
        count = len(rows)
        if count == 0:
            return "there are none"
        size = min(count, data.eval_rows)
        inputs, targets = rows[0:size]
        if count > 1:  # training asks for rows by a tensor of their numbers
            rows[torch.tensor([count - 1, 0])]
    except Exception as error:
        return f"{ROWS}; {type(rows).__name__} raises {type(error).__name__}: {error}"
    tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    if not all(isinstance(tensor, torch.Tensor) for tensor in (*tensors, targets)):
        kinds = " and ".join(type(value).__name__ for value in (inputs, targets))
        return f"{ROWS}, a tensor or a dict of tensors and a tensor, not {kinds}"
    if any(len(tensor) != size for tensor in (*tensors, targets)):
        return f"{ROWS}: {size} of each, not {[len(tensor) for tensor in (*tensors, targets)]}"
    return _fault_of_targets(data, targets)


def _fault_of_targets(data: Data, targets: torch.Tensor) -> str | None:
    """What is wrong with targets, by their task; None where nothing is."""
    if data.task == "regression":
        if targets.is_floating_point():
            return None
        return f"targets of task regression must be numbers, targets.float(), not {targets.dtype}"
    if targets.dtype != torch.int64:
        return f"targets of task {data.task} must be int64, targets.long(), not {targets.dtype}"
    classes, counted = data.sizes["out_features"], targets[targets != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        return (
            f"targets must be from 0 to {classes - 1}, as sizes has out_features={classes}, not "
            f"{int(counted.min())} to {int(counted.max())}; out_features={int(counted.max()) + 1}?"
        )
    return None
