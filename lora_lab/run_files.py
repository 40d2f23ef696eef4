"""The files that a finished run is made of, and what is wrong with one that has changed since.

status.json of a finished run has a record of each (`files`: its bytes, its SHA-256 and, of
metrics.jsonl its rows) and a checksum of its own fields. report/, log.txt and W&B's files have
none. That of env.json, in which no number of the run is, is compared by `Run.environment` alone.
How much is read depends on who asks. Everyone compares sizes and the content of the texts and of
files up to SMALL bytes, so that `ls` and reports of a thousand runs stay fast. Whoever reads a
larger file (analyze, export, reproduce; a report reads spectra.npz) has it hashed first. A file
that stays as it is (inode, time and size) is hashed once in a process.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import yaml

COST = "cost.json"
"""The file with what a run's training cost: its metrics `cost/…`, and how they were measured.

They are apart from metrics.jsonl because they differ each time that a run is trained.
"""

TEXTS = ("config.yaml", "metrics.jsonl", "advice.yaml", COST)
"""Files whose content is always compared, whatever their size."""

GENERATED = "generated.jsonl"
"""The file of the texts that the trained model generated, a line for each prompt."""

FILES = (*TEXTS, "spectra.npz", GENERATED)
"""The files of a run that lie in its directory itself; one that no record names is a fault."""

PLANNED_FILE = "planned.json"
"""The file in an experiment's folder that lists the runs of its multiruns: name → overrides."""

ENVIRONMENT = "env.json"
"""The file that says on which machine and with which versions a run was made."""

FOLDERS = ("adapter", "adapter_last", "model", "model_last")
"""The folders of trained weights."""

CUTS, HEALED = "cut", "healed"
"""The folders of the trained adapter cut to lower ranks, and of these after more training.

In each is a folder by rank, as cut/8.
"""

WEIGHTS = ("adapter.json", "adapter.safetensors", "model.safetensors")
"""The files in such folders."""

SMALL = 2**20
"""Bytes of the largest file of arrays whose content is always compared."""

MISSING = "is missing"
"""What is wrong with a file that there is not."""

IN_FULL = ("",)
"""For `in_full`: the content of all files is compared."""

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The YAML loader: libyaml's where it is installed, which is ten times as fast."""

Record = dict[str, Any]


class DamagedRunError(ValueError):
    """A file of a run is missing, cut, changed or cannot be read; the message names it."""


def file_records(folder: Path) -> dict[str, Record]:
    """A record of each file that the run in `folder` is made of, by its name in that folder."""
    paths = [folder / name for name in (*FILES, ENVIRONMENT)]
    paths += [folder / name / file for name in FOLDERS for file in WEIGHTS]
    paths += [p for name in (CUTS, HEALED) for p in sorted(folder.glob(f"{name}/*/adapter.*"))]
    files = [path for path in paths if path.is_file()]
    return {file.relative_to(folder).as_posix(): record(file) for file in files}


def record(file: Path) -> Record:
    """The record of one file, from what is on disk."""
    if file.name == "metrics.jsonl":
        return content_record(file.name, file.read_bytes())
    return {"bytes": file.stat().st_size, "sha256": _digest_of(file)}


def content_record(name: str, content: bytes) -> Record:
    """The record that a file of this name and content will have."""
    rows = {"rows": content.count(b"\n")} if name == "metrics.jsonl" else {}
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **rows}


def with_checksum(status: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a finished run's status.json, with the checksum of its other fields."""
    fields = {key: value for key, value in status.items() if key != "checksum"}
    text = json.dumps(fields, sort_keys=True).encode()
    return {**fields, "checksum": hashlib.sha256(text).hexdigest()}


def fault(folder: Path, status: Mapping[str, Any], in_full: tuple[str, ...] = ()) -> str:
    """A file of a finished run that is not as it was, and what is wrong with it; "" if none is.

    config.yaml comes first, then a file that is missing. `in_full` are beginnings of names: the
    content of these files is compared whatever their size. Of a run of an earlier version, which
    has no records, it is told which file is missing or cannot be read.
    """
    if "files" not in status and "checksum" not in status:
        return _fault_without_records(folder, "spectra.npz".startswith(in_full))
    if with_checksum(status)["checksum"] != status.get("checksum"):
        return "status.json was changed"
    records, replacing, texts = status["files"], status.get("replacing", {}), []
    for name in dict.fromkeys((*FILES, *(n for n in records if n != ENVIRONMENT))):
        # While a file is being replaced, it may be the old one or the new one.
        wanted = [records.get(name), *([replacing[name]] if name in replacing else [])]
        faults = [difference(folder / name, each, name.startswith(in_full)) for each in wanted]
        if all(faults):
            texts.append(f"{name} {faults[0]}")
    texts.sort(key=lambda text: (not text.startswith(FILES[0]), not text.endswith(MISSING)))
    return texts[0] if texts else ""


def difference(file: Path, wanted: Record | None, in_full: bool) -> str:
    """How a file differs from its record, as `is cut: 3 of 4 rows`; "" where it does not."""
    try:
        size = file.stat().st_size
        if wanted is None:
            return "was added after the run"
        if size < wanted["bytes"]:
            return f"is cut: {_amount(file, wanted)}"
        is_compared = in_full or file.name in TEXTS or size <= SMALL
        is_other = is_compared and _digest_of(file) != wanted["sha256"]
        return "was changed after the run" if size > wanted["bytes"] or is_other else ""
    except FileNotFoundError:
        return MISSING if wanted else ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _amount(file: Path, wanted: Record) -> str:
    """How much a file has of what it had: in rows, or in bytes where no row is missing."""
    rows = file.read_bytes().count(b"\n") if "rows" in wanted else None
    if rows is not None and rows < wanted["rows"]:
        return f"{rows} of {wanted['rows']} rows"
    return f"{file.stat().st_size} of {wanted['bytes']} bytes"


def _digest_of(file: Path) -> str:
    status = file.stat()
    return _digest(file.absolute(), status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2**16)
def _digest(file: Path, inode: int, modified_ns: int, size: int) -> str:
    """The SHA-256 of a file; inode, time and size tell the cache that it is the same."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fault_without_records(folder: Path, in_full: bool) -> str:
    """What can be told of a finished run of an earlier version; "" where all can be read.

    `in_full`: the arrays of spectra.npz are held to the checksums that a zip has.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    files = [file for pattern in ("*.*", "*/*.safetensors") for file in folder.glob(pattern)]
    stamps = sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _unreadable_file(folder.absolute(), in_full, tuple(stamps))


@lru_cache(maxsize=2**12)
def _unreadable_file(folder: Path, in_full: bool, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """The first file that cannot be parsed; `stamps` tell the cache that the files are the same."""
    for name in FOLDERS:
        for file in sorted((folder / name).glob("*.safetensors")):
            if not _has_its_length(file):
                return f"{name}/{file.name} is cut"
    try:
        config = read_config(folder / "config.yaml")
        if not isinstance(config.get("adapter"), dict) or "name" not in config:
            return "config.yaml is no config of a run"
        read_rows(folder / "metrics.jsonl", is_complete=True)
        if (spectra := folder / "spectra.npz").exists():
            with ZipFile(spectra) as arrays:
                if in_full and (changed := arrays.testzip()):
                    return f"spectra.npz was changed after the run: {changed} in it is damaged"
    except DamagedRunError as error:
        return str(error).removeprefix(f"{folder}/")
    except (OSError, BadZipFile):
        return "spectra.npz is cut: its list of arrays is missing"
    return ""


def _has_its_length(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says.

    It is 8 bytes with the header's length, the header (JSON, with the bytes at which each tensor
    begins and ends), the tensors.
    """
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > (size := file.stat().st_size):
            return False
        try:
            header = json.loads(stream.read(start - 8))
            ends = [node["data_offsets"][1] for key, node in header.items() if key[:2] != "__"]
        except (ValueError, TypeError, LookupError, AttributeError):
            return False
    return size == start + max(ends, default=0)


def read_config(file: Path) -> dict[str, Any]:
    """A config.yaml. Raises DamagedRunError where it cannot be read, or holds no mapping."""
    try:
        config = yaml.load(file.read_text(), LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedRunError(f"{file} cannot be read: no YAML ({reason})") from None
    if not isinstance(config, dict):
        raise DamagedRunError(f"{file} cannot be read: it holds no settings")
    return config


def read_rows(file: Path, is_complete: bool = False) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Raises DamagedRunError for a line that is no row.

    A last line without an end, as a crash or a run that is writing leaves it, is left out. It is an
    error too where the file `is_complete`, and so is a file without rows.
    """
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        try:
            if line.endswith(b"\n"):
                rows.append({**json.loads(line)})
            elif is_complete:
                raise DamagedRunError(f"{file} is cut in line {number}")
        except (TypeError, ValueError) as error:
            if isinstance(error, DamagedRunError):
                raise
            raise DamagedRunError(f"{file} cannot be read: line {number} is no row") from None
    if is_complete and not rows:
        raise DamagedRunError(f"{file} is cut: it has no rows")
    return rows


def read_cost(folder: Path) -> dict[str, Any]:
    """The content of a run's cost.json; {} where it has none, as a run of an earlier version.

    Raises DamagedRunError where it cannot be read.
    """
    try:
        return {**json.loads((folder / COST).read_text())}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise DamagedRunError(f"{folder / COST} cannot be read: no costs of a run") from None


def cost_metrics(folder: Path) -> dict[str, float]:
    """The metrics `cost/…` of a run. Raises DamagedRunError as `read_cost`."""
    return {k: v for k, v in read_cost(folder).items() if k.startswith("cost/")}


def planned_runs(folder: Path) -> dict[str, list[str]]:
    """Name → overrides of each run that multiruns were asked to run in an experiment's folder.

    Raises DamagedRunError, with the file, where it cannot be read.
    """
    file = folder / PLANNED_FILE
    try:
        content = json.loads(file.read_text())
        checksum = content.pop("sha256", None)  # earlier versions wrote none
        if checksum not in (None, planned_checksum(content)):
            raise DamagedRunError(f"{file} was changed after its multirun")
        planned = {str(name): list(values) for name, values in content.items()}
    except FileNotFoundError:
        return {}
    except DamagedRunError:
        raise
    except (ValueError, TypeError, AttributeError):
        raise DamagedRunError(f"{file} cannot be read: no list of planned runs") from None
    return planned


def planned_checksum(planned: Mapping[str, list[str]]) -> str:
    """The SHA-256 of planned.json's content, which is stored in it."""
    return hashlib.sha256(json.dumps(planned, sort_keys=True).encode()).hexdigest()
