"""Sweeps of any size in no time: copies of one real run, each with its config and its numbers."""

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lora_lab.config.checks import parse_config
from lora_lab.run_files import file_records
from lora_lab.runs import Run, write_status

Point = dict[str, Any]
"""Dotted key of the config → value."""


def copy_run(run: Run, points: Iterable[Point], root: Path) -> list[Run]:
    """A finished run for each point, in the directory that it would have had.

    Metrics below `val/`, `train/`, `merged/`, `forget/` and `spectra/` are scaled, differently for
    each run.
    Spectra are cut or extended to the point's r.
    """
    rows, status = run.rows(), run.status
    with np.load(run.path / "spectra.npz") as file:
        arrays = dict(file)
    copies = []
    for i, point in enumerate(points):
        config = _with_values(run.config, point)
        cfg = parse_config(json.loads(json.dumps(config)))
        path = root / cfg.name / f"{cfg.cell()}-seed{cfg.seed}-{cfg.identity()[:10]}"
        shutil.copytree(run.path, path)
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        r = config["adapter"].get("r", 1)
        _write_metrics(path / "metrics.jsonl", rows, (1 + 0.1 * np.sin(7 * i)) / np.sqrt(r), r)
        resized = {
            k: _resized(v, r) if k.endswith("/singular_values") else v for k, v in arrays.items()
        }
        np.savez_compressed(path / "spectra.npz", allow_pickle=False, **resized)  # pyright: ignore
        changed = {"cell": cfg.cell(), "seed": cfg.seed, "started": time.time() + i}
        write_status(path, {**status, **changed, "files": file_records(path)})
        copies.append(Run(path))
    return copies


def as_earlier_version(run: Run) -> None:
    """Takes the records of its files from a finished run's status, as earlier versions had none."""
    status = json.loads((run.path / "status.json").read_text())
    write_status(run.path, {k: v for k, v in status.items() if k not in ("files", "checksum")})


def _with_values(config: dict[str, Any], point: Point) -> dict[str, Any]:
    """A deep copy of a nested config, with the values of dotted keys set."""
    config = json.loads(json.dumps(config))
    for key, value in point.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def _write_metrics(path: Path, rows: list[dict[str, Any]], scale: float, r: int) -> None:
    with path.open("w") as file:
        for row in rows:
            scaled = {k: v * scale if _is_scaled(k) else v for k, v in row.items()}
            if "parameters/trainable" in scaled:
                scaled["parameters/trainable"] = 90 * r
            file.write(json.dumps(scaled) + "\n")


def _is_scaled(key: str) -> bool:
    return key.startswith(("val/", "train/", "merged/", "spectra/", "forget/"))


def _resized(sigma: np.ndarray, r: int) -> np.ndarray:
    """Singular values (time × k) as (time × r); those beyond k are halves of the one before."""
    more = [sigma[:, -1:] * 0.5**i for i in range(1, 1 + max(0, r - sigma.shape[1]))]
    return np.concatenate([sigma[:, :r], *more], axis=1)
