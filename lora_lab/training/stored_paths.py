"""Where the files lie that a stored run's config names, for a run that was sent or moved."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_lab.config.checks import import_target
from lora_lab.config.schema import CheckpointBase, Config, Lora
from lora_lab.data import Data
from lora_lab.data.content import split_of
from lora_lab.runs import Run


def with_paths_from_here(cfg: Config, run: Run, bases_dir: Path | None = None) -> Config:
    """The config of a stored run, its paths as they lead from the current folder.

    A relative path that leads nowhere from here is taken from the folder in which the run was
    started, if that is where the run directory lies in `runs_dir`. `bases_dir`: where bases are
    looked for instead; there a base that was loaded from a file is known by its SHA-256. Raises
    FileNotFoundError where that is nowhere, and ConfigError where the data or the model cannot be
    imported.
    """
    depth = 1 + len(Path(cfg.runs_dir).parts)
    started_in = run.path.resolve().parents[depth : depth + 1]
    changes: dict[str, Any] = {"bases_dir": str(bases_dir or _from_here(cfg.bases_dir, started_in))}
    kinds = {"data": Data, "model": nn.Module, **({"forget": Data} if cfg.forget else {})}
    for key, kind in kinds.items():
        component = getattr(cfg, key)
        callee = import_target(key, component, kind)
        paths = {
            name: _from_here(path, started_in)
            for name in getattr(callee, "path_arguments", ())
            if isinstance(path := component.arguments.get(name), str)
        }
        changes[key] = component.model_copy(update=paths)
    if isinstance(cfg.adapter, Lora) and cfg.adapter.start_from is not None:
        path = _from_here(cfg.adapter.start_from, started_in)
        changes["adapter"] = cfg.adapter.model_copy(update={"start_from": path})
    if isinstance(cfg.base, CheckpointBase):
        path = _from_here(cfg.base.path, started_in)
        if not Path(path).exists():
            path = str(_file_of(cfg.base, run, Path(changes["bases_dir"])))
        changes["base"] = cfg.base.model_copy(update={"path": path})
    return cfg.model_copy(update=changes)


def _file_of(base: CheckpointBase, run: Run, folder: Path) -> Path:
    """The file in a folder that has the base's SHA-256. Raises FileNotFoundError."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == base.sha256:
                return file
    raise FileNotFoundError(
        f"base.path={base.path}: the base that {run.path.name} was trained on is not there, and no "
        f"file in {folder}/ has its SHA-256 ({base.sha256}); --bases DIR names the folder that has "
        "it"
    )


def _from_here(path: str, started_in: Sequence[Path]) -> str:
    """The path; where nothing lies there, the one from `started_in` if something lies there."""
    if Path(split_of(path)[0]).expanduser().exists():
        return path
    other = next((str(folder / path) for folder in started_in), path)
    return other if Path(split_of(other)[0]).exists() else path
