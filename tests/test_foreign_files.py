"""Files that lora_lab did not write stay where they are: beside a run's, in its folders, by links.

Independent truth: files that the test writes, read back after each way in which a run is repeated.
Run: make test ARGS=tests/test_foreign_files.py
"""

import json
import logging
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lora_lab import report
from lora_lab.report import sweep
from lora_lab.report.plotting import save
from lora_lab.run_files import file_records
from lora_lab.runs import Run, find_runs
from lora_lab.tracking.tracking import _remove_earlier  # pyright: ignore[reportPrivateUsage]
from lora_lab.training.run_record import RunDirectoryError, record_run
from lora_lab.training.written_files import WRITTEN, written_files
from tests.conftest import command, only_run
from tests.copied_runs import copy_run
from tests.training.test_stored_runs import STORED

NOTES = ("notes.md", "adapter/notes.md", "report/mine.png", "previous/notes.md", "bases/notes.md")
NOTES += ("checkpoints/mine.ckpt", "thesis/chapter.tex", "spectra.npz.bak")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its report, which takes seconds to draw."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(STORED, folder, dirs_exist_ok=True)
    shutil.rmtree(next((folder / "runs/planted_linear").glob("full*")))
    run = only_run(str(folder / "runs"))
    run.update_status(files=file_records(run.path))
    report.write_run(run)
    return folder


@pytest.fixture
def run(elsewhere: None, reported: Path) -> Run:
    """A finished run with its report."""
    shutil.copytree(reported, ".", dirs_exist_ok=True)
    return only_run()


def add_notes(run: Run) -> dict[Path, str]:
    """A person's files in a run directory and behind a link in it, by their paths."""
    Path("thesis").mkdir()
    Path("thesis/adapter.json").write_text("mine")
    (run.path / "link").symlink_to(Path("thesis").absolute())
    for name in NOTES:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text(name)
    paths = [*(run.path / name for name in NOTES), Path("thesis/adapter.json")]
    return {path: path.read_text() for path in paths}


def test_all_files_of_a_run_are_its_own(run: Run):
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert len(files) > 15
    assert {*written_files(run.path), run.path / "status.json"} == {*files}


@pytest.mark.parametrize("state", ["finished", "damaged", "failed", "interrupted"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_new_try_removes_nothing_of_a_persons(run: Run, state: str, fails: bool):
    notes = add_notes(run)
    if state == "damaged":
        (run.path / "metrics.jsonl").unlink()
    elif state != "finished":
        run.update_status(state=state)
    try:
        with record_run(run, {"name": "new"}, overwrite=True):
            left = {path.relative_to(run.path).as_posix() for path in written_files(run.path)}
            assert left == {"config.yaml", "env.json", "log.txt"}
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert {path: path.read_text() for path in notes} == notes
    assert (run.path / "link").is_symlink()
    is_kept = fails and state in ("finished", "damaged")
    assert (run.path / "previous" / "adapter" / "adapter.safetensors").exists() == is_kept
    assert (run.path / "previous" / "status.json").exists() == is_kept


@pytest.mark.parametrize("folder", sorted({glob.split("/")[0] for glob in WRITTEN if "/" in glob}))
def test_a_run_writes_into_no_linked_folder(run: Run, folder: str):
    Path("thesis").mkdir()
    shutil.rmtree(run.path / folder, ignore_errors=True)
    (run.path / folder).symlink_to(Path("thesis").absolute())
    Path("thesis/adapter.json").write_text("mine")
    assert not [file for file in written_files(run.path) if folder in file.parts]
    error = pytest.raises(RunDirectoryError, match=f"{folder} is a link")
    with error, record_run(run, {}, overwrite=True):
        pass
    assert [file.read_text() for file in Path("thesis").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("wandb", "is_removed"),
    [
        ("../wandb/offline-run-20260101_000000-abcd1234", True),
        ("../wandb/run-20260101_000000-abcd1234", True),
        *((path, False) for path in ("../../thesis", "", ".", "..", "../wandb", "../wandb/mine")),
        ("../../wandb/run-20260101_000000-abcd1234", False),
    ],
)
def test_of_wandbs_files_those_of_the_try_before_go(run: Run, wandb: str, is_removed: bool):
    folder = run.path / wandb
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chapter.tex").write_text("mine")
    _remove_earlier(run, wandb)
    assert (folder / "chapter.tex").exists() != is_removed


def test_a_report_removes_the_figures_of_the_one_before_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    figures: sweep.Figures = {"swept": ("", Figure()), "rank": ("", Figure())}
    monkeypatch.setattr(sweep, "_figures", lambda *_: figures)  # drawing takes most of the time
    folder = Path("runs/planted_linear")
    report.write_sweep([run], folder)
    (folder / "report/mine.png").write_text("mine")
    Path("thesis.png").write_text("mine")
    with (folder / "report/report.md").open("a") as file:
        file.write("\n![](../../../thesis.png)\n")
    figures["rank"] = ("", None)
    report.write_sweep([run], folder)
    assert {path.name for path in (folder / "report").glob("*.p*")} == {
        *("mine.png", "swept.png", "swept.pdf"),
    }
    assert Path("thesis.png").exists()


def test_a_reports_folder_is_below_it_whatever_a_config_says(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep, "_figures", lambda *_: {})  # drawing takes most of the time
    (other,) = copy_run(run, [{"seed": 1}], Path("runs"))
    config = (other.path / "config.yaml").read_text()
    (other.path / "config.yaml").write_text(
        config.replace("name: planted_linear", "name: ../../escaped")
    )
    other.update_status(files=file_records(other.path))
    before = {path for path in Path().rglob("*") if "report" not in path.parts}
    report.write_sweep(find_runs(Path("runs")), Path("runs"))
    assert {path for path in Path().rglob("*") if "report" not in path.parts} == before
    assert not json.loads((other.path / "status.json").read_text()).get("error")


@pytest.mark.parametrize("state", ["interrupted", "failed", "finished"])
def test_nothing_is_written_through_a_link(run: Run, state: str):
    Path("thesis.txt").write_text("mine")
    names = ("config.yaml", "log.txt", "metrics.jsonl", "advice.yaml", "report/table.md")
    for name in names:
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(Path("thesis.txt").absolute())
    run.update_status(state=state)
    with record_run(run, {"name": "new"}, overwrite=state == "finished"):
        logging.getLogger("lora_lab").warning("a line")
        assert "a line" in (run.path / "log.txt").read_text()
        assert not [name for name in names if (run.path / name).is_symlink()]
    assert Path("thesis.txt").read_text() == "mine"


def test_no_report_is_written_through_a_link(run: Run, monkeypatch: pytest.MonkeyPatch):
    Path("thesis.png").write_text("mine")
    (run.path / "report/loss.png").unlink()
    (run.path / "report/loss.png").symlink_to(Path("thesis.png").absolute())
    save(Figure(), run.path / "report/loss")
    assert Path("thesis.png").read_text() == "mine"
    assert not (run.path / "report/loss.png").is_symlink()
    Path("thesis").mkdir()
    for folder in (run.path, run.path.parent):
        shutil.rmtree(folder / "report", ignore_errors=True)
        (folder / "report").symlink_to(Path("thesis").absolute())
        assert command(monkeypatch, "report", str(folder)) == 2
    with pytest.raises(ValueError, match="report is a link"):  # as a training does at its end
        report.write_run(run)
    assert not list(Path("thesis").iterdir())
