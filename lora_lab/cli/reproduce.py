"""`lora-lab reproduce`: runs a finished run again and compares each number with the stored one."""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from lora_lab import adapters
from lora_lab.cli.comparison import (
    WEIGHTS,
    Comparison,
    comparisons,
    differing_settings,
    environment,
)
from lora_lab.cli.settled import movement_line
from lora_lab.cli.stored_devices import on_devices
from lora_lab.config.checks import parse_config
from lora_lab.config.schema import CheckpointBase, Lora
from lora_lab.config.trust import check_trusted
from lora_lab.console import show_log
from lora_lab.exit_codes import end_on_hangup, interruption_code
from lora_lab.report.tables import Rows, markdown, markdown_text
from lora_lab.runs import Run, RunFailedError, write_atomic
from lora_lab.training import bases, devices, part_checks
from lora_lab.training.plan import Plan, plan
from lora_lab.training.source_code import changed_names
from lora_lab.training.stored_paths import with_paths_from_here

REPORT = "reproduction.md"
"""The comparison's file in the new directory. A directory that has it may be overwritten."""

BEYOND = "≠"
"""Marks a value that differs by more than the tolerance."""


@dataclass(frozen=True)
class Reproduction:
    """A stored run and the new run of the same config."""

    stored: Run
    new: Run
    base: str
    """A text: where the base of the new run came from, and the hashes of both runs' bases."""
    devices: str
    """A line: the devices of both runs."""

    def identical_files(self) -> dict[str, bool]:
        """For each file that holds numbers, whether it is the same bit for bit in both runs."""
        runs = (self.stored, self.new)
        rows = [(run.path / "metrics.jsonl").read_bytes().splitlines() for run in runs]
        # `lora-lab analyze` adds rows to a finished run: those after the last new one do not count.
        identical = {"metrics.jsonl": rows[0][: len(rows[1])] == rows[1]}
        for name in WEIGHTS:
            stored, new = (run.path / name for run in runs)
            if stored.exists() and new.exists():
                identical[name] = stored.read_bytes() == new.read_bytes()
        return identical


def reproduce_run(
    run: Run,
    to: Path,
    console: Console,
    fresh: bool = False,
    trust: bool = False,
    bases_dir: Path | None = None,
    device_count: int | None = None,
) -> Reproduction:
    """Runs a finished run again in a new directory below `to`; the stored run is only read.

    The new run is untracked, and on the devices of the stored one, or on `device_count` of them
    (`on_devices` says which where this machine lacks those). Its base is taken from bases/ as for
    any run; with `fresh` it is trained again, in the new directory. Raises ValueError where the run
    is damaged or not finished, its config is not valid (any more), the file of its base has
    changed, `device_count` devices are not here or the new directory is another run's;
    RunFailedError where the new run fails.
    """
    end_on_hangup()
    new_plan, devices_line = _new_plan(run, to, fresh, trust, bases_dir, device_count)
    base_file = bases.path(new_plan.cfg)
    modified_before = _modified_ns(base_file)
    where = f"reproducing {run.path} in {new_plan.path}"
    for line in (where, devices_line):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    show_log(console)
    try:
        _train(new_plan, console)
    except (KeyboardInterrupt, SystemExit) as stop:
        console.print("interrupted: the same command begins again")
        sys.exit(interruption_code(stop))
    except Exception as error:
        where = f"the traceback is in {new_plan.path / 'log.txt'}"
        raise RunFailedError(f"{type(error).__name__}: {error}\n{where}") from error
    new = Run(new_plan.path)
    if isinstance(new_plan.cfg.base, CheckpointBase):
        base = f"loaded from {new_plan.cfg.base.path}, the file that the stored run had"
    else:
        is_reused = modified_before == _modified_ns(base_file)
        base = f"{'found, not trained again' if is_reused else 'trained again'} ({base_file})"
    if isinstance(new_plan.cfg.adapter, Lora):
        stored_hash, new_hash = (adapters.base_hash(r.path / "adapter")[:10] for r in (run, new))
        base += f"; its weights' hash: stored {stored_hash}, new {new_hash}"
    return Reproduction(run, new, base, devices_line)


def _train(new_plan: Plan, console: Console) -> None:
    """Trains the new run in this process, or in one for each device, which read its config."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(yaml.safe_dump(new_plan.cfg.to_dict(), sort_keys=False))
        command = ("-m", "lora_lab.cli.reproduce_process", str(config))
        devices.train(new_plan, command, console)


def _new_plan(
    run: Run,
    to: Path,
    fresh: bool,
    trust: bool,
    bases_dir: Path | None,
    device_count: int | None,
) -> tuple[Plan, str]:
    """The plan of the new run, and a line on its devices. Raises ValueError as `reproduce_run`."""
    run.check_finished("reproduced")
    cfg = parse_config(dict(run.config))
    if not trust:
        check_trusted(cfg, run.path)
    cfg = with_paths_from_here(cfg, run, bases_dir)
    tracking = cfg.tracking.model_copy(update={"mode": "off"})
    changes = {"runs_dir": str(to), "overwrite": True, "figures": False, "tracking": tracking}
    part_checks.check_directory("runs_dir", to)
    part_checks.check_directory("bases_dir", to if fresh else Path(cfg.bases_dir))
    new_cfg, devices_line = on_devices(cfg.model_copy(update=changes), run, device_count)
    new_plan = replace(plan(new_cfg, is_stored=True), is_reproduction=True)
    if isinstance(cfg.base, CheckpointBase) and new_plan.cfg.base != cfg.base:
        raise ValueError(f"{cfg.base.path} is not the file that {run.path.name} was trained on")
    path = new_plan.path
    if path.resolve().is_relative_to(run.path.resolve()):
        raise ValueError(f"--to {to}: the stored run is in that folder; give another one")
    is_reproduction = (path / REPORT).exists() or Run(path).status.get("is_reproduction", False)
    if Run(path).finished and not is_reproduction:
        raise ValueError(f"--to {to}: {path} is another run; give another folder")
    if fresh:
        cfg = new_plan.cfg.model_copy(update={"bases_dir": str(path / "bases")})
        new_plan = replace(new_plan, cfg=cfg)
    return new_plan, devices_line


def _modified_ns(file: Path) -> int | None:
    """When a file was last written, in nanoseconds; None where it does not exist."""
    return file.stat().st_mtime_ns if file.exists() else None


def print_comparison(reproduction: Reproduction, tolerance: float, console: Console) -> bool:
    """Prints the numbers of both runs side by side, and writes them to reproduction.md.

    Returns whether the run is reproduced: no stored number differs by more than `tolerance`
    relative to itself. A metric that only the stored run has counts as a difference. One that only
    the new run has does not: a newer version may log more.
    """
    stored, new = reproduction.stored, reproduction.new
    compared = comparisons(stored, new)
    beyond = [c for c in compared if c.stored is not None and c.relative > tolerance]
    values: Rows = [["", "stored", "new", "absolute", "relative", "beyond"]]
    values += [_row(c, c in beyond) for c in compared]
    settings: Rows = [["differs", "stored", "new"], *differing_settings(stored, new)]
    lines = [f"base: {reproduction.base}", reproduction.devices]
    if runs_in_pack := stored.status.get("packed"):
        beside = f"in a pack of {runs_in_pack}, the new one alone"
        lines.append(f"pack: stored {beside}: equal up to rounding (dropout's masks are others)")
    lines += ["environment and settings: the same"] if len(settings) == 1 else []
    lines += _code_and_files(reproduction)
    lines += [line] if (line := movement_line(stored, compared)) else []
    lines.append(_verdict(compared, beyond, tolerance))
    for rows in (values, settings):
        if len(rows) > 1:
            console.print(_terminal_table(rows, numeric=rows is values))
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    parts = [markdown_text(f"# {reproduction.stored.path} again")]
    parts.append("\n".join(markdown_text(f"- {line}") for line in lines))
    parts += [markdown(rows, "l") for rows in (values, settings) if len(rows) > 1]
    write_atomic(reproduction.new.path / REPORT, "\n\n".join(parts) + "\n")
    return not beyond


def _code_and_files(reproduction: Reproduction) -> list[str]:
    """Lines on uncommitted changes of the code, and on the files that are and are not identical."""
    lines = []
    if any(environment(r).get("git_changes") for r in (reproduction.stored, reproduction.new)):
        lines.append("code: with uncommitted changes, so that a commit does not tell it")
    before, now = (r.status.get("code") or {} for r in (reproduction.stored, reproduction.new))
    if before and (names := changed_names(before, now)):
        lines.append(f"code: changed since the stored run: {', '.join(names)}")
    files = reproduction.identical_files()
    for wanted, text in ((True, "bit for bit equal"), (False, "not equal bit for bit")):
        if names := [name for name, is_identical in files.items() if is_identical is wanted]:
            lines.append(f"{text}: {', '.join(names)}")
    return lines


def _verdict(compared: list[Comparison], beyond: list[Comparison], tolerance: float) -> str:
    """The last line: whether the run is reproduced, and the largest difference."""
    if beyond:
        largest = max(beyond, key=lambda comparison: comparison.relative)
        differing = f"{len(beyond)} of {len(compared)} values differ"
        most = f"{largest.name} ({largest.relative:.3g} of what is stored)"
        return f"NOT REPRODUCED: {differing} by more than --tolerance {tolerance:g}, most {most}"
    largest_gap = max(c.relative for c in compared if c.stored is not None)
    how = f"none differs by more than {largest_gap:.3g} of what is stored"
    return f"reproduced: {len(compared)} values, {how if largest_gap else 'all equal'}"


def _terminal_table(rows: Rows, numeric: bool) -> Table:
    """A table whose lines beyond the tolerance are red; `numeric`: columns stand to the right."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, heading in enumerate(rows[0]):
        justify = "right" if numeric and i > 0 else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row, style="bold red" if row[-1] == BEYOND else None)
    return table


def _row(comparison: Comparison, is_beyond: bool) -> list[str]:
    """A comparison as texts: name, stored, new, absolute, relative, mark."""
    numbers = (comparison.stored, comparison.new)
    values = ["–" if number is None else f"{number:.9g}" for number in numbers]
    gaps = (comparison.absolute, comparison.relative)
    gap_texts = ["–" if None in numbers else f"{gap:.3g}" for gap in gaps]
    return [comparison.name, *values, *gap_texts, BEYOND if is_beyond else ""]
