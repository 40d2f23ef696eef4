"""The frozen base of a run: trained once for all runs that share it, or loaded from a file."""

import hashlib
import inspect
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from lora_lab import seeding
from lora_lab.config.schema import Config, TrainedBase, content_hash
from lora_lab.data import module as data
from lora_lab.data import planted
from lora_lab.runs import DEVICE_KEYS, write_atomic
from lora_lab.training import modules

log = logging.getLogger(__name__)

Row = dict[str, Any]

base_threads: int | None = None
"""With how many a base is trained here, where other runs on these cores wait for it."""


@dataclass(frozen=True)
class Base:
    """The base's weights, and what was logged while they were trained (nothing, if loaded)."""

    state: dict[str, Tensor]
    rows: list[Row]


def key(cfg: Config) -> str:
    """The hash of what can change the base or its rows: config, data, model, source, torch.

    Devices and the run's own length cannot.
    """
    trainer = cfg.trainer.model_dump()
    for other in (*DEVICE_KEYS, "max_epochs"):
        trainer.pop(other, None)
    callees = (inspect.getmodule(c.callee) or c.callee for c in (cfg.data, cfg.model))
    sources = [inspect.getsource(code) for code in (*callees, data, planted, modules, seeding)]
    nodes = [node.model_dump(by_alias=True) for node in (cfg.base, cfg.data, cfg.model)]
    # Python's too: the bytes that `bytes` learns are its own library's.
    return content_hash([*nodes, trainer, sources, torch.__version__, platform.python_version()])


def path(cfg: Config) -> Path:
    """Where the base that `cfg` trains is kept."""
    name = "-".join(c.target.rsplit(".")[-1].lower() for c in (cfg.data, cfg.model))
    return Path(cfg.bases_dir) / f"{name}-{key(cfg)[:16]}.safetensors"


def obtain(
    cfg: Config,
    train: Callable[[Path], tuple[nn.Module, list[Row]]],
    replay: Callable[[list[Row]], None],
) -> Base:
    """The base that `cfg` asks for, trained by `train` only where it is not at hand.

    `train` gives the trained model and the rows it logged; `replay` is given those rows where the
    base was trained before, so that every run's metrics hold its base's. Runs that need the same
    base at once wait for the one that trains it. Where this one is interrupted, the checkpoints in
    the folder that `train` is given are the next one's. A file that is not what was written is
    trained again.
    """
    if not isinstance(cfg.base, TrainedBase):
        return Base(load_file(cfg.base.path), [])
    file = path(cfg)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file.with_suffix(".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for the run that is training this base (%s)", file)
        held = lock.acquire()
    with held:
        if base := _kept(file):
            log.info("base found, not trained again: %s", file)
            replay(base.rows)
            return base
        started, checkpoints = time.time(), file.with_suffix(".checkpoints")
        own = torch.get_num_threads()
        torch.set_num_threads(base_threads or own)
        try:
            model, rows = train(checkpoints)
        except Exception:
            shutil.rmtree(checkpoints, ignore_errors=True)
            raise
        finally:
            torch.set_num_threads(own)
        content = save(
            {
                k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
                for k, v in model.state_dict().items()
            }
        )
        about = {
            "sha256": _checksum(content, rows),
            "seconds": time.time() - started,
            "config": {
                n: getattr(cfg, n).model_dump(by_alias=True) for n in ("base", "data", "model")
            },
            "rows": rows,
        }
        write_atomic(file, content)
        write_atomic(file.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
        shutil.rmtree(checkpoints, ignore_errors=True)
        log.info("base trained in %.1f s and kept: %s", about["seconds"], file)
        return Base(load(content), rows)


def wait(cfg: Config) -> Base:
    """The base that `cfg` asks for, once another process has it."""
    if not isinstance(cfg.base, TrainedBase):
        return Base(load_file(cfg.base.path), [])
    while not path(cfg).with_suffix(".json").exists() or not (base := _kept(path(cfg))):
        time.sleep(0.2)
    return base


def _kept(path: Path) -> Base | None:
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        about = json.loads(path.with_suffix(".json").read_text())
        if _checksum(content, about["rows"]) != about["sha256"]:
            raise ValueError("its checksum is not the one written beside it")
        return Base(load(content), about["rows"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        log.warning("the kept base %s is damaged (%s): training it again", path, error)
        return None


def _checksum(content: bytes, rows: list[Row]) -> str:
    return hashlib.sha256(content + json.dumps(rows).encode()).hexdigest()
