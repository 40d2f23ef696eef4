"""Tables of rows from files, folders and the hub, through the `datasets` library."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_lab.config.schema import nearest
from lora_lab.data.content import (
    FORMATS,
    check_hub_id,
    content_hash,
    files_in,
    hub_commit,
    split_of,
)
from lora_lab.data.file_lines import broken_line, lines_of_rows

log = logging.getLogger(__name__)

__all__ = ["Source", "Table", "cache_folder", "content_hash", "source"]

SPLITS = {
    "train": ("train",),
    "base": ("train",),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}
"""Argument → the splits that it means in a source of several, where its path names none."""


IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
"""Suffixes of image files."""


def cache_folder() -> Path:
    """The folder of what is computed once from data: $LORA_LAB_CACHE, or ~/.cache/lora_lab."""
    return Path(os.environ.get("LORA_LAB_CACHE", "~/.cache/lora_lab")).expanduser()


@dataclass(frozen=True)
class Table:
    """The rows of one source, and where each of them comes from.

    `key` and `path` are the argument of the data set and its value, for messages. `rows` is a
    `datasets.Dataset`. `files`, in the order of their rows, are empty where rows come from a hub or
    a saved data set. `has_header`: the first line of a CSV or TSV file names the columns.
    """

    key: str
    path: str
    rows: Any
    files: tuple[Path, ...] = ()
    has_header: bool = True

    def column(self, argument: str, name: str) -> list[Any]:
        """The values of a column. `argument` is the data set's that names it, for the error."""
        self.check_column(argument, name)
        return list(self.rows[name][:])  # a slice is read at once, an iterator row by row

    def check_column(self, argument: str, name: str) -> None:
        """Raises ValueError where there is no such column."""
        if name not in (names := self.rows.column_names):
            raise ValueError(
                f"{argument}={name}: {self.key}={self.path} has no such column"
                f" (it has {', '.join(names)}){nearest(name, names)}"
            )

    def where(self, row: int) -> str:
        """The place of a row, for messages: `train=train.jsonl, line 3`."""
        before = 0
        for file in self.files:
            lines = list(lines_of_rows(file, self.has_header))
            if row < before + len(lines):
                name = f" {file.name}," if len(self.files) > 1 else ""
                return f"{self.key}={self.path},{name} {lines[row - before]}"
            before += len(lines)
        return f"{self.key}={self.path}, row {row + 1}"


@dataclass(frozen=True)
class Source:
    """What names a table, as a key of caches: equal sources have equal rows."""

    key: str
    path: str
    revision: str | None
    subset: str | None
    content: str
    column_names: tuple[str, ...] | None = None

    def table(self) -> Table:
        """The rows. Raises ValueError where there are none, or where a file cannot be read."""
        return _read(self)


def source(
    key: str,
    path: str,
    revision: str | None = None,
    subset: str | None = None,
    column_names: Sequence[str] | None = None,
) -> Source:
    """The source at a path or hub id. `subset` is a hub set's configuration, as sst2 of glue.

    `column_names` are those of CSV or TSV files without a line that names them. Raises ValueError,
    with `key` and the path, where there is none.
    """
    location, split = split_of(path)
    place = Path(location).expanduser()
    if place.is_file() and split:
        raise ValueError(f"{key}={path}: a file has no splits; {key}={location} reads its rows")
    for name, value in (("revision", revision), ("subset", subset)):
        if value is not None and key == "train" and place.exists():
            raise ValueError(
                f"{name}={value}: of a hub id only, and {key}={path} is a local file or folder"
            )
    try:
        names = tuple(column_names) if column_names else None
        return Source(key, path, revision, subset, content_hash(path, revision), names)
    except ValueError as error:
        raise ValueError(f"{key}={error}") from None


@lru_cache(maxsize=8)
def _read(source: Source) -> Table:
    key, path = source.key, source.path
    location, split = split_of(path)
    place = Path(location).expanduser()
    if place.is_file():
        table = _read_files(key, path, [place], source.column_names)
    elif (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        table = _read_saved(key, path, place, split)
    elif place.is_dir() and (images := _images_by_class(key, path, place, split)):
        table = _read_images(key, path, images)
    elif place.is_dir():
        files = _files_of_split(key, path, place, split)
        table = _read_files(key, path, files, source.column_names)
    else:
        table = _read_hub(source, location, split)
    if not len(table.rows):
        raise ValueError(f"{key}={path}: holds no rows")
    return table


def _images_by_class(key: str, path: str, folder: Path, split: str | None) -> dict[str, list[Path]]:
    """The images of a folder that has a folder for each class, or such a folder for each split."""
    files = [file for file in files_in(folder) if file.suffix.lower() in IMAGES]
    if not files:
        return {}
    names = sorted(inner.name for inner in folder.iterdir() if inner.is_dir())
    if split or any(name in SPLITS["train"] + SPLITS["val"] for name in names):
        folder /= _choose_split(key, path, names, split)
    images: dict[str, list[Path]] = {}
    for file in files:
        if folder in file.parents[1:]:
            images.setdefault(file.relative_to(folder).parts[0], []).append(file)
    return images


def _read_images(key: str, path: str, images: dict[str, list[Path]]) -> Table:
    """A table of the images' paths, and the names of their folders as labels."""
    from datasets import Dataset

    for file in (files := [file for of_class in images.values() for file in of_class]):
        if not file.stat().st_size:
            raise ValueError(f"{key}={path}: {file.name} is empty")
    labels = [name for name, of_class in images.items() for _ in of_class]
    return Table(key, path, Dataset.from_dict({"image": list(map(str, files)), "label": labels}))


def _files_of_split(key: str, path: str, folder: Path, split: str | None) -> list[Path]:
    """The files of a folder that hold rows; of one split, where names of files tell splits."""
    files = [file for file in files_in(folder) if file.suffix in FORMATS]
    if not files:
        raise ValueError(f"{key}={path}: no files of rows in this folder ({', '.join(FORMATS)})")
    pattern = re.compile(rf"({'|'.join(s for names in SPLITS.values() for s in names)})(?![a-z])")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        for part in file.relative_to(folder).parts:  # train/a.csv, data/train-0.parquet
            if match := pattern.match(part):
                by_split.setdefault(match[1], []).append(file)
                break
    if split or by_split:
        chosen = by_split.get(_choose_split(key, path, list(by_split), split), [])
        if unread := {*files}.difference(*by_split.values()):
            names = ", ".join(sorted(file.name for file in unread)[:4])
            log.warning("%s=%s: files named by no split are not read (%s)", key, path, names)
        files = chosen
    if len(kinds := {FORMATS[file.suffix] for file in files}) > 1:
        raise ValueError(f"{key}={path}: files of one kind are read, here are {', '.join(kinds)}")
    return files


def _choose_split(key: str, path: str, splits: Sequence[str], split: str | None) -> str:
    """The split that the path names, or else the one that the key means."""
    for name in (split,) if split else SPLITS[key]:
        if name in splits:
            return name
    wanted = split or SPLITS[key][0]
    raise ValueError(
        f"{key}={path}: has no split {wanted} (it has {', '.join(splits) or 'none'}); a split is"
        f" named behind a colon, {key}={split_of(path)[0]}:SPLIT{nearest(wanted, splits)}"
    )


def _read_saved(key: str, path: str, folder: Path, split: str | None) -> Table:
    """A folder that `save_to_disk` of `datasets` wrote."""
    from datasets import DatasetDict, load_from_disk

    rows = load_from_disk(str(folder))
    if isinstance(rows, DatasetDict):
        rows = rows[_choose_split(key, path, list(map(str, rows)), split)]
    return Table(key, path, rows)


def _read_hub(source: Source, repo: str, split: str | None) -> Table:
    import datasets

    check_hub_id(repo)
    commit = hub_commit(repo, source.revision, "dataset")
    try:
        splits = datasets.get_dataset_split_names(repo, source.subset, revision=commit)
        name = _choose_split(source.key, source.path, list(map(str, splits)), split)
        rows = datasets.load_dataset(repo, source.subset, split=name, revision=commit)
    except Exception as error:
        raise ValueError(f"{source.key}={source.path}: {_one_line(error)}") from None
    return Table(source.key, source.path, rows)


def _read_files(
    key: str, path: str, files: list[Path], column_names: tuple[str, ...] | None
) -> Table:
    """The rows of files of one kind, which `datasets` keeps in its cache as Arrow tables."""
    import datasets

    for file in files:
        if file.suffix not in FORMATS:
            raise ValueError(
                f"{key}={path}: files that are read end in {', '.join(FORMATS)}"
                f"{nearest(file.suffix, FORMATS)}"
            )
        if not file.stat().st_size:
            raise ValueError(f"{key}={path}: {file.name} is empty")
    kind, names = FORMATS[files[0].suffix], column_names and list(column_names)
    if names and kind != "csv":
        raise ValueError(f"column_names={names}: of .csv and .tsv files only, and {key}={path}")
    options = {
        # pandas would read the text "None" or "NA" as a missing one.
        "csv": {
            "sep": "\t" if files[0].suffix == ".tsv" else ",",
            "keep_default_na": False,
            "column_names": names,
        },
        "text": {"sample_by": "document"},
    }
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            kind,
            data_files={"rows": [str(file.resolve()) for file in files]},
            split="rows",
            cache_dir=str(cache_folder() / "tables"),
            **options.get(kind, {}),
        )
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{key}={path}: holds no rows") from None
        broken = next(filter(None, map(broken_line, files)), None)
        raise ValueError(f"{key}={path}{broken or f': {_one_line(error)}'}") from None
    finally:
        datasets.enable_progress_bars()
    return Table(key, path, rows, tuple(files), has_header=not names)


def _one_line(error: BaseException) -> str:
    """The message of an error of `datasets`, or of its cause, in one line."""
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__
