"""Whether a run ended as one that nothing happened to, and whether other files are as they were."""

from collections.abc import Collection
from pathlib import Path

from lora_lab.run_files import DamagedRunError
from lora_lab.runs import Run, find_runs
from tests.faults.trial import Trial
from tests.training.test_resume import contents

NOTES = ("notes.md", "thesis/chapter.tex")
"""A person's files, by their paths in the folders of lora_lab."""


def compare_with_undisturbed(
    trial: Trial, folder: Path, undisturbed: Path, names: Collection[str] | None = None
) -> None:
    """Notes each run below `folder` that is not finished, or has other numbers than undisturbed.

    Bit for bit: metrics.jsonl, spectra.npz, advice.yaml and the trained weights. `names` are those
    of the runs that there must be: all that are undisturbed, if None.
    """
    wanted = {run.path.name: run for run in find_runs(undisturbed / "runs")}
    wanted = wanted if names is None else {name: wanted[name] for name in names}
    runs = {run.path.name: run for run in find_runs(folder / "runs")}
    for name, run in wanted.items():
        if name not in runs:
            trial.note("wrong end", f"there is no run {name}")
            continue
        try:
            state = runs[name].check()["state"]
        except DamagedRunError as error:
            state = str(error)
        if state != "finished":
            error = runs[name].status.get("error", "")
            trial.note("wrong end", f"{name} is {state} ({error})")
        elif differing := differing_files(run, runs[name]):
            trial.note("unsaid", f"{name} has other numbers in {', '.join(differing)}")


def differing_files(run: Run, other: Run) -> list[str]:
    """The files of two runs whose numbers differ, bit for bit; reports are not compared."""
    one, two = (
        {name: content for name, content in contents(r).items() if not name.startswith("report/")}
        for r in (run, other)
    )
    return [name for name in {**one, **two} if one.get(name) != two.get(name)]


def add_notes(folder: Path) -> dict[Path, bytes]:
    """Writes a person's files beside those of runs, and gives their content by path."""
    notes: dict[Path, bytes] = {}
    folders = [run.path for run in find_runs(folder / "runs")]
    folders += [run / "report" for run in folders if (run / "report").is_dir()]
    folders += [path for path in (folder / "runs", folder / "bases") if path.is_dir()]
    for each in folders:
        for name in NOTES:
            (each / name).parent.mkdir(exist_ok=True)
            (each / name).write_text(f"{each.name} {name}")
            notes[each / name] = (each / name).read_bytes()
    return notes


def expect_notes(trial: Trial, notes: dict[Path, bytes]) -> None:
    """Notes each of a person's files that is gone or has another content."""
    for path, content in notes.items():
        is_kept = path.is_file() and path.read_bytes() == content
        trial.expect(is_kept, "lost", f"{path.name} in {path.parent.name}")
