"""The files that lora_lab writes in a run directory, and their removal before a run is repeated.

A person may keep notes, or a link to another folder, beside them: those stay.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from lora_lab.report.page import CAPTIONS
from lora_lab.run_files import CUTS, FILES, FOLDERS, HEALED, WEIGHTS
from lora_lab.runs import CHECKPOINTS, PREVIOUS

_BASE = f"bases/*-{'[0-9a-f]' * 16}"

WRITTEN = (
    *FILES,
    *("env.json", "log.txt", "reproduction.md", ".*.[0-9]*.part"),
    *(f"{folder}/{file}" for folder in FOLDERS for file in WEIGHTS),
    *(f"{folder}/[0-9]*/{file}" for folder in (CUTS, HEALED) for file in WEIGHTS[:2]),
    *(f"{CHECKPOINTS}/last{suffix}" for suffix in (".ckpt", ".part")),
    *(f"report/{name}" for name in ("table.md", "index.html", ".*.[0-9]*.part")),
    *(f"report/{table}.csv" for table in ("facts", "cost", "curves", "theory")),
    *(f"report/{figure}{suffix}" for figure in CAPTIONS for suffix in (".png", ".pdf")),
    *(f"{_BASE}{suffix}" for suffix in (".safetensors", ".json", ".lock")),
    *(f"{_BASE}.checkpoints/last{suffix}" for suffix in (".ckpt", ".part")),
    *(f"evaluations/*-{'[0-9a-f]' * 6}{suffix}" for suffix in (".json", ".jsonl")),
    f"bases/svd/*-{'[0-9a-f]' * 16}.safetensors",
)
"""Globs of all files of a run but its lock and status.json; bases/ is of `reproduce --fresh`."""


def written_files(folder: Path, kept: Collection[str] = ()) -> list[Path]:
    """The files that lora_lab wrote in a run directory, without files and folders named in `kept`.

    Of a link the link itself is listed, and nothing that lies behind it.
    """
    globs = [glob for glob in WRITTEN if glob.partition("/")[0] not in kept]
    files = [file for glob in globs for file in folder.glob(glob)]
    return [
        file
        for file in files
        if (file.is_symlink() or file.is_file())
        and not any((folder / parent).is_symlink() for parent in _folders(file, folder))
    ]


def linked_folder(folder: Path) -> Path | None:
    """The first folder of a run that is a link to another folder; None where there is none."""
    names = dict.fromkeys([PREVIOUS, *(glob.partition("/")[0] for glob in WRITTEN if "/" in glob)])
    return next((folder / name for name in names if (folder / name).is_symlink()), None)


def remove_files(files: Iterable[Path], folder: Path) -> None:
    """Removes files in `folder`, and with them the folders within it that are empty then."""
    for file in files:
        file.unlink(missing_ok=True)
        for parent in _folders(file, folder):
            with suppress(OSError):  # a file that is not ours is in it
                (folder / parent).rmdir()


def remove_previous(folder: Path) -> None:
    """Removes what previous/ keeps of the run before, where it is kept."""
    previous = folder / PREVIOUS
    remove_files([*written_files(previous), previous / "status.json"], folder)


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a run."""
    remove_files((folder / CHECKPOINTS).glob("last.*"), folder)


def remove_bases(folder: Path) -> None:
    """Removes the bases that `reproduce --fresh` trained in a run directory."""
    files = written_files(folder)
    remove_files([f for f in files if f.relative_to(folder).parts[0] == "bases"], folder)


def _folders(file: Path, folder: Path) -> list[Path]:
    """The folders between `folder` and a file in it, the innermost first, relative to `folder`."""
    return list(file.relative_to(folder).parents[:-1])
