"""The hash of what a path or a hub id holds, which stands in a run's identity for the path."""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Literal

from lora_lab.config.errors import nearest_path

Kind = Literal["dataset", "model", "tokenizer"]
"""What is hashed. Of a `tokenizer`, a folder's weights are left out."""

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}
"""Suffixes of the files that a tokenizer does not read."""


FORMATS = {
    **{".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".txt": "text"},
}
"""Suffix of a file of rows → the builder of `datasets` that reads it."""


class HubUnreachableError(ValueError):
    """No hub answers, and nothing of the id is in the local cache."""


def content_hash(path_or_id: str, revision: str | None = None, kind: Kind = "dataset") -> str:
    """The SHA-256 of a file or a folder, or the commit of a hub id at `revision` (None: main).

    A folder is hashed by its files' relative names and bytes, without hidden files and the caches
    of `datasets`. A split named behind a colon, as in `imdb:test`, is part of the hash. Bytes are
    read once in a process, and again where a file's size or time of change is another. Raises
    ValueError where there is no such file or hub id, HubUnreachableError where no hub answers.
    """
    path, split = split_of(path_or_id)
    file = Path(path).expanduser()
    if file.is_dir():
        content = _folder_hash(file, kind)
    elif file.exists():
        content = _file_hash(file)
    else:
        check_hub_id(path)
        content = hub_commit(path, revision, "dataset" if kind == "dataset" else "model")
    return f"{content}:{split}" if split else content


def split_of(path_or_id: str) -> tuple[str, str | None]:
    """The path or id, and the split behind its last colon, if there is one: `imdb:test`."""
    path, colon, split = path_or_id.rpartition(":")
    if colon and re.fullmatch(r"[\w.-]+", split) and not Path(path_or_id).expanduser().exists():
        return path, split
    return path_or_id, None


def check_hub_id(path: str) -> None:
    """Raises ValueError where a path that does not exist cannot be a hub id either."""
    file = Path(path).expanduser()
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) and file.suffix not in {*FORMATS, *WEIGHTS}:
        return
    folder = file.parent
    if not folder.is_dir():
        raise ValueError(f"{path}: no such file, nor is there a folder {folder}")
    raise ValueError(f"{path}: no such file or folder{nearest_path(path)}")


def _file_hash(file: Path) -> str:
    status = file.stat()
    return _digest(file.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file's bytes. Size and time of change tell the cache that it is the same."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_hash(folder: Path, kind: Kind) -> str:
    digest = hashlib.sha256()
    for file in files_in(folder):
        if kind != "tokenizer" or file.suffix not in WEIGHTS:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{_file_hash(file)}\0".encode())
    return digest.hexdigest()


def files_in(folder: Path) -> list[Path]:
    """A folder's files at any depth, sorted, without hidden ones and the caches of `datasets`."""
    return sorted(
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not (file.name.startswith("cache-") and file.suffix == ".arrow")
        and file.is_file()
    )


@cache
def hub_commit(repo: str, revision: str | None, kind: Literal["dataset", "model"]) -> str:
    """The commit of a hub's repository: as the hub says, or as the local cache last saw it."""
    from huggingface_hub import HfApi, constants, errors

    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return str(revision)
    try:
        api = HfApi()
        info = api.dataset_info if kind == "dataset" else api.model_info
        return str(info(repo, revision=revision, timeout=10).sha)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        where = f"{repo} at revision {revision}" if revision else repo
        raise ValueError(f"{where}: the hub has no such {kind} ({type(error).__name__})") from None
    except Exception as error:  # the transport's errors have no common base class
        name = f"{kind}s--{repo.replace('/', '--')}/refs/{revision or 'main'}"
        cached = Path(constants.HF_HUB_CACHE) / name
        if cached.exists():
            return cached.read_text().strip()
        raise HubUnreachableError(
            f"{repo}: no file or folder here has that name, and as a hub id it cannot be looked up,"
            f" since no hub is reachable ({type(error).__name__}) and it is not in the local cache;"
            f" the path of a local file or folder works without a hub{nearest_path(repo)}"
        ) from None
