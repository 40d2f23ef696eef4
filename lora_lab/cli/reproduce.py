"""The `lora-lab reproduce` command: a finished run from its config again, held against itself."""

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from lora_lab import adapters, train
from lora_lab.config.checks import parse_config
from lora_lab.config.schema import CheckpointBase, Lora
from lora_lab.report.cells import flatten_config
from lora_lab.report.run import singular_values_by_site
from lora_lab.report.tables import Rows, markdown
from lora_lab.runs import Run, RunFailedError, write_atomic
from lora_lab.training import bases, experiment
from lora_lab.training.plan import Plan, on_one_device, plan

SAID = "reproduction.md"
"""What was found, in the new directory: a directory that has it may be run over again."""

OURS = ("runs_dir", "bases_dir", "overwrite", "figures", "tracking.mode")
"""Settings that a reproduction changes itself."""

BEYOND = "≠"

WEIGHTS = ("adapter/adapter.safetensors", "model/model.safetensors")
"""Where a run keeps what it has trained: the one or the other."""


@dataclass(frozen=True)
class Held:
    """A number of both runs, or of an array the largest entry; None where a run has no such thing.

    `absolute` is the largest difference of an entry, `relative` that over the largest stored one.
    """

    name: str
    stored: float | None
    new: float | None
    absolute: float
    relative: float


@dataclass(frozen=True)
class Reproduction:
    """A run beside itself run again."""

    old: Run
    new: Run
    base: str
    """Where the new run's base came from, and whether it is the stored run's."""

    def held(self) -> list[Held]:
        """Every metric at its end, every site's singular values over time, every trained tensor."""
        old, new = _numbers(self.old), _numbers(self.new)
        return [_difference(name, old.get(name), new.get(name)) for name in {**old, **new}]

    def files(self) -> dict[str, bool]:
        """Which of the files that hold numbers are the stored run's bit for bit."""
        rows = [(r.path / "metrics.jsonl").read_bytes().splitlines() for r in (self.old, self.new)]
        # `lora-lab analyze` adds rows to a run that was finished.
        same = {"metrics.jsonl": rows[0][: len(rows[1])] == rows[1]}
        for name in WEIGHTS:
            both = [r.path / name for r in (self.old, self.new)]
            if all(path.exists() for path in both):
                same[name] = both[0].read_bytes() == both[1].read_bytes()
        return same

    def differ(self) -> Rows:
        """What of the environment and the settings is not the same: its name, stored, new."""
        found: Rows = []
        for read in (_environment, _settings):
            old, new = read(self.old), read(self.new)
            for name in {**old, **new}:
                both = [str(values.get(name, "–")) for values in (old, new)]
                if both[0] != both[1]:
                    found.append([name, *both])
        return found


def reproduce_run(run: Run, to: Path, console: Console, fresh: bool = False) -> Reproduction:
    """Runs it again below `to`, untracked; the run itself is only read.

    On one device, whatever it was trained on. The base is found in bases/ as any run finds it; with
    `fresh` it is trained again, in the new
    directory. Raises ValueError where the run is not finished, its config can no longer be, the
    file of its base has changed or the new directory is another run's; RunFailedError where the new
    run fails.
    """
    planned = _planned(run, to, fresh)
    file = bases.path(planned.cfg)
    before = _written(file)
    console.print(f"reproducing {run.path} in {planned.path}", soft_wrap=True, highlight=False)
    train.show_log(console)
    try:
        new = experiment.run(planned, console)
    except (KeyboardInterrupt, SystemExit) as stop:
        console.print("interrupted: the same command begins again")
        sys.exit(train.interruption_code(stop))
    except Exception as error:
        raise RunFailedError(
            f"{type(error).__name__}: {error}\nthe traceback is in {planned.path / 'log.txt'}"
        ) from error
    if isinstance(planned.cfg.base, CheckpointBase):
        base = f"loaded from {planned.cfg.base.path}, the file that the stored run had"
    else:
        how = "found, not trained again" if before == _written(file) else "trained again"
        base = f"{how} ({file})"
    if isinstance(planned.cfg.adapter, Lora):
        stored, now = (adapters.base_hash(r.path / "adapter")[:10] for r in (run, new))
        base += f"; its weights' hash: stored {stored}, new {now}"
    return Reproduction(run, new, base)


def _planned(run: Run, to: Path, fresh: bool) -> Plan:
    if (state := run.status["state"]) != "finished":
        raise ValueError(f"{run.path} is {state}: only a finished run can be reproduced")
    try:
        cfg = parse_config(dict(run.config))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{run.path / 'config.yaml'} cannot be read: {error}") from None
    tracking = cfg.tracking.model_copy(update={"mode": "off"})
    change = {"runs_dir": str(to), "overwrite": True, "figures": False, "tracking": tracking}
    planned = plan(on_one_device(cfg.model_copy(update=change)))
    if isinstance(cfg.base, CheckpointBase) and planned.cfg.base != cfg.base:
        raise ValueError(f"{cfg.base.path} is not the file that {run.path.name} was trained on")
    path = planned.path
    if path.resolve().is_relative_to(run.path.resolve()):
        raise ValueError(f"--to {to}: the run itself is there; give another folder")
    if Run(path).finished and not (path / SAID).exists():
        raise ValueError(f"--to {to}: {path} is a run of its own; give another folder")
    if fresh:
        cfg = planned.cfg.model_copy(update={"bases_dir": str(path / "bases")})
        planned = replace(planned, cfg=cfg)
    return planned


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def show(made: Reproduction, tolerance: float, console: Console) -> bool:
    """Prints both runs side by side, and writes it to SAID. Gives whether they are the same.

    They are where no stored value differs by more than `tolerance` of itself. A metric that only
    the new run has, of a newer version, is no difference; one that only the stored run has is.
    """
    held = made.held()
    beyond = [one for one in held if one.stored is not None and one.relative > tolerance]
    body = [_line(one, beyond) for one in held]
    values: Rows = [["", "stored", "new", "absolute", "relative", "beyond"], *body]
    differ: Rows = [["differs", "stored", "new"], *made.differ()]
    files = made.files()
    said = [f"base: {made.base}"]
    if len(differ) == 1:
        said.append("environment and settings: the same")
    if any(_environment(run).get("git_changes") for run in (made.old, made.new)):
        said.append("code: with uncommitted changes, so that a commit does not tell it")
    for same, words in ((True, "bit for bit equal"), (False, "not equal bit for bit")):
        if names := [name for name, is_same in files.items() if is_same is same]:
            said.append(f"{words}: {', '.join(names)}")
    if beyond:
        most = max(beyond, key=lambda one: one.relative)
        said.append(
            f"NOT REPRODUCED: {len(beyond)} of {len(held)} values differ by more than "
            f"--tolerance {tolerance:g}, most {most.name} ({most.relative:.3g} of what is stored)"
        )
    else:
        most = max(one.relative for one in held if one.stored is not None)
        how = f"none differs by more than {most:.3g} of what is stored" if most else "all equal"
        said.append(f"reproduced: {len(held)} values, {how}")
    for rows in (values, differ):
        if len(rows) > 1:
            table = Table(box=box.SIMPLE, pad_edge=False)
            for i, heading in enumerate(rows[0]):
                right = i > 0 and rows is values
                table.add_column(heading, justify="right" if right else "left", overflow="fold")
            for row in rows[1:]:
                table.add_row(*row, style="bold red" if row[-1] == BEYOND else None)
            console.print(table)
    for line in said:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    parts = [f"# {made.old.path} again", "\n".join(f"- {line}" for line in said)]
    parts += [markdown(rows, "l") for rows in (values, differ) if len(rows) > 1]
    write_atomic(made.new.path / SAID, "\n\n".join(parts) + "\n")
    return not beyond


def _line(one: Held, beyond: list[Held]) -> list[str]:
    missing = None in (one.stored, one.new)
    values = ["–" if value is None else f"{value:.9g}" for value in (one.stored, one.new)]
    gaps = ["–" if missing else f"{gap:.3g}" for gap in (one.absolute, one.relative)]
    return [one.name, *values, *gaps, BEYOND if one in beyond else ""]


def _difference(name: str, old: np.ndarray | None, new: np.ndarray | None) -> Held:
    stored, now = (None if a is None else float(a.flat[np.abs(a).argmax()]) for a in (old, new))
    if old is None or new is None or old.shape != new.shape:
        return Held(name, stored, now, math.inf, math.inf)
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    with np.errstate(invalid="ignore"):
        gap = np.nan_to_num(np.where(same, 0, np.abs(new - old)), nan=math.inf)
    absolute, scale = float(gap.max()), float(np.abs(old).max())
    relative = absolute / scale if scale else math.inf
    return Held(name, stored, now, absolute, relative if absolute else 0.0)


def _numbers(run: Run) -> dict[str, np.ndarray]:
    """By name: every metric's last value, singular values (time × k), every trained tensor."""
    last: dict[str, Any] = {}
    for row in run.rows():
        last |= row
    found = {k: np.array([float(last[k])]) for k in last if k not in ("step", "epoch")}
    found |= {
        f"{site}: singular values": S for site, S in singular_values_by_site(run).items() if S.size
    }
    for file in WEIGHTS:
        if (run.path / file).exists():
            for key, tensor in load_file(run.path / file).items():
                found[f"{file.partition('/')[0]}: {key}"] = tensor.double().numpy()
    return found


def _environment(run: Run) -> dict[str, Any]:
    path = run.path / "env.json"
    found = flatten_config(json.loads(path.read_text())) if path.exists() else {}
    return found | {key: run.status.get(key, "–") for key in ("host", "threads")}


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in flatten_config(run.config).items() if k not in OURS}
