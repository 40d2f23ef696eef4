"""The subcommands on adapters and checkpoints: `spectra`, `cut`, `extract` and `evaluate`.

As in `commands`, what is heavy is imported after the checks that need nothing heavy.
"""

from pathlib import Path
from typing import Literal


def spectra(
    paths: list[Path], before: Path | None, after: Path | None, base: Path | None, to: Path
) -> None:
    """Measures ΔW of adapters, or of two checkpoints, writes the report and prints its table."""
    if bool(before) != bool(after):
        raise ValueError("--before and --after go together: two checkpoints")
    if bool(paths) == bool(before):
        raise ValueError("give paths of adapters, or --before A --after B")
    if before and base:
        raise ValueError("--base goes with adapters: --before has W already")
    for path in (*paths, *filter(None, (before, after, base))):
        _check_exists(path)
        check_outside(to, path)
    from lora_lab.cli import update_spectra
    from lora_lab.console import console

    if before and after:
        update_spectra.of_checkpoints(before, after, to, console)
    elif len(paths) == 1:
        update_spectra.of_adapter(adapter_path(paths[0]), base, to, console)
    elif base:
        raise ValueError("--base goes with one adapter: several are compared with each other")
    else:
        folders = [adapter_path(path) for path in paths]
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise ValueError("an adapter is compared with itself: give each of them once")
        update_spectra.of_pairs(dict(zip(map(str, paths), folders, strict=True)), to, console)


def _check_exists(path: Path) -> None:
    if not path.exists():
        from lora_lab.config.errors import nearest_path

        raise FileNotFoundError(f"there is no {path}{nearest_path(str(path))}")


def check_outside(to: Path, given: Path) -> None:
    """Raises ValueError where `to` is the given file or folder, or lies in it."""
    if to.resolve().is_relative_to(given.resolve()):
        raise ValueError(f"--to {to} lies in {given}, which is only read: give another folder")
    if to.is_file():
        raise ValueError(f"--to {to} is a file: give a folder, which is made if need be")


def adapter_path(path: Path) -> Path:
    """The adapter folder of a run directory, or `path` itself. Raises ValueError."""
    from lora_lab.runs import Run, is_run

    if not is_run(path):
        return path
    Run(path).check_finished("read")
    if not (path / "adapter").is_dir():
        raise ValueError(f"{path} has no adapter: its weights were trained in full")
    return path / "adapter"


def cut(
    path: Path,
    rank: int | None,
    energy: float | None,
    advice: bool,
    scale_intruders: float | None,
    base: Path | None,
    to: Path,
) -> None:
    """Writes an adapter at a lower rank to the folder `to`, and prints what it keeps by site."""
    options = (rank, energy, advice or None, scale_intruders)
    if sum(option is not None for option in options) != 1:
        raise ValueError("give one of --rank, --energy, --advice and --scale-intruders")
    if scale_intruders is not None and base is None:
        raise ValueError("--scale-intruders needs --base: W + ΔW has the intruders")
    for given in (path, *filter(None, (base,))):
        _check_exists(given)
        check_new_folder(to, given)
    from lora_lab.adapters.stored import read_adapter
    from lora_lab.cli import update_files
    from lora_lab.console import console

    stored = read_adapter(adapter_path(path))
    if base is not None and scale_intruders is not None:
        update_files.scale_intruders(stored, scale_intruders, base, to, console)
    else:
        if base is not None and all(u.kernel is not None for u in stored.updates.values()):
            raise ValueError("--base goes with --scale-intruders, or with LoHa and LoKr")
        by_pattern = update_files.advised_ranks(path) if advice else None
        rule = update_files.rank_rule(stored, rank, energy, by_pattern)
        update_files.cut(stored, rule, base, to, console)


def extract(
    before: Path,
    after: Path,
    rank: int | None,
    energy: float | None,
    format: Literal["peft", "lora_lab"],
    to: Path,
) -> None:
    """Writes the change of a full fine-tune as an adapter, and prints what it keeps by site."""
    how = _amount(rank, energy)
    for given in (before, after):
        _check_exists(given)
        check_new_folder(to, given)
    from lora_lab.cli import update_extract
    from lora_lab.console import console

    update_extract.extract(before, after, how, format, to, console)


def _amount(rank: int | None, energy: float | None) -> int | float:
    """The one of the two that is given: an int or a float. Raises ValueError."""
    given = [value for value in (rank, energy) if value is not None]
    if len(given) != 1:
        raise ValueError("give one of --rank and --energy")
    return given[0]


def check_new_folder(to: Path, given: Path) -> None:
    """As `check_outside`, and raises ValueError where `to` holds something."""
    check_outside(to, given)
    if to.is_dir() and any(to.iterdir()):
        raise ValueError(f"--to {to} is not empty: give a new folder")


def evaluate(
    path: Path,
    overrides: list[str],
    cut: int | None,
    rows: int | None,
    data: str | None,
    harness: str | None,
    to: Path | None,
    trust: bool,
    bases: Path | None,
) -> None:
    """Generates texts by a finished run's model, and prints their metrics and the file of them."""
    from lora_lab.runs import find_run

    run = find_run(path)
    from lora_lab import report
    from lora_lab.cli.evaluate import Question, evaluate
    from lora_lab.config.stored_config import checked_config
    from lora_lab.console import console, silence_lightning, visible

    silence_lightning()
    tasks = [task for task in (harness or "").split(",") if task]
    question = Question(overrides, rows, cut, data, tasks)
    found = evaluate(checked_config(run), question, to, trust, bases)
    lines = [
        ["metric", "value"],
        *([name, f"{value:.6g}"] for name, value in found.metrics.items()),
    ]
    count = f"{len(found.texts)} texts" if found.texts else "lm-eval-harness"
    console.print(report.terminal_table(count, lines))
    print(visible(str(found.file)))
