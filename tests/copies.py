"""Sweeps of any size at once: copies of one real run, each with a config and numbers of its own."""

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lora_lab.config.checks import parse_config
from lora_lab.runs import Run

Point = dict[str, Any]


def copies(run: Run, points: Iterable[Point], root: Path) -> list[Run]:
    """A finished run for each point, {dotted key: value}, under the name it would have had.

    What is measured by `val/`, `train/`, `merged/` or `spectra/` is scaled, differently for each
    run; spectra are cut or filled to the point's r.
    """
    rows, status = run.rows(), run.status
    with np.load(run.path / "spectra.npz") as arrays:
        spectra = dict(arrays)
    made = []
    for i, point in enumerate(points):
        config = json.loads(json.dumps(run.config))
        for key, value in point.items():
            *path, last = key.split(".")
            node = config
            for part in path:
                node = node[part]
            node[last] = value
        cfg = parse_config(json.loads(json.dumps(config)))
        path = root / cfg.name / f"{cfg.cell()}-seed{cfg.seed}-{cfg.identity()[:10]}"
        shutil.copytree(run.path, path)
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        about = {"cell": cfg.cell(), "seed": cfg.seed, "started": time.time() + i}
        (path / "status.json").write_text(json.dumps({**status, **about}))
        r = config["adapter"].get("r", 1)
        scale = (1 + 0.1 * np.sin(7 * i)) / np.sqrt(r)
        with (path / "metrics.jsonl").open("w") as file:
            for row in rows:
                own = {k: v * scale if _scaled(k) else v for k, v in row.items()}
                if "parameters/trainable" in own:
                    own["parameters/trainable"] = 90 * r
                file.write(json.dumps(own) + "\n")
        own = {k: _cut(v, r) if k.endswith("/singular_values") else v for k, v in spectra.items()}
        np.savez_compressed(path / "spectra.npz", allow_pickle=False, **own)  # pyright: ignore
        made.append(Run(path))
    return made


def _scaled(key: str) -> bool:
    return key.startswith(("val/", "train/", "merged/", "spectra/"))


def _cut(sigma: np.ndarray, r: int) -> np.ndarray:
    """Singular values (time × k) as (time × r)."""
    more = [sigma[:, -1:] * 0.5**i for i in range(1, 1 + max(0, r - sigma.shape[1]))]
    return np.concatenate([sigma[:, :r], *more], axis=1)
