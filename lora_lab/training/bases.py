"""The frozen base of a run: trained once for all runs that share it, or loaded from a file."""

import ast
import functools
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
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from lora_lab import seeding
from lora_lab.config.schema import CheckpointBase, Config, ConfigError, content_hash
from lora_lab.config.trust import components_of
from lora_lab.data import module as data
from lora_lab.data import planted
from lora_lab.runs import write_atomic
from lora_lab.training import gradient_mean, modules, tasks
from lora_lab.training.source_code import code_of, is_ours, without_docstrings

log = logging.getLogger(__name__)

Row = dict[str, Any]

Train = Callable[[Path], tuple[nn.Module, list[Row]]]
"""A function that trains a base.

It is given a folder for checkpoints, and gives the trained model and the rows that it logged.
"""

NOT_FOR_BASES = {"max_steps": -1, "val_check_interval": None, "log_every_n_steps": None}
"""Settings of the Trainer that are about the run alone, with their values while a base trains."""

base_threads: int | None = None
"""CPU threads for training a base while other runs here wait for it; None: as for a run."""


@dataclass(frozen=True)
class Base:
    """A base's weights, and the rows logged while it was trained (none if it came from a file)."""

    state: dict[str, Tensor]
    rows: list[Row]


def key(cfg: Config) -> str:
    """The hash of what can change a trained base; it names the stored file.

    It is of the config's base, data, model and trainer (without devices and the run's length), of
    torch's and Python's versions, and of the code that decides the base's numbers: the files of the
    model's and the data's class, and this package's data contract, planted data, LightningModules,
    tasks and seeding, and what the user's own code imports of the user's. Code is hashed as its
    syntax tree, so that comments, docstrings and layout do not change the key. A renamed function
    does change it.
    """
    trainer = cfg.trainer.identifying_settings()
    for name in ("max_epochs", *NOT_FOR_BASES):
        trainer.pop(name, None)
    # A callee whose module is not known is hashed by its own source.
    callees = (inspect.getmodule(c.callee) or c.callee for c in (cfg.data, cfg.model))
    parts = (*callees, data, planted, modules, gradient_mean, tasks, seeding)
    code = [_syntax_tree(inspect.getsource(part)) for part in parts]
    components = [c for key, c in components_of(cfg).items() if key not in ("optimizer", "forget")]
    hashed = {part.__name__ for part in parts}
    if more := {n: c for n, c in code_of(components).items() if not is_ours(n) and n not in hashed}:
        code.append(str(more))
    nodes = [cfg.base.model_dump(by_alias=True)]
    nodes += [node.identifying_settings() for node in (cfg.data, cfg.model)]
    # Python's version too: the bytes experiments learn the source text of Python's library, and
    # ast.dump's format differs between versions.
    return content_hash([*nodes, trainer, code, torch.__version__, platform.python_version()])


@functools.cache
def _syntax_tree(source: str) -> str:
    """A source's syntax tree, as text, without docstrings; each run of a sweep asks for it."""
    return ast.dump(without_docstrings(source))


def path(cfg: Config) -> Path:
    """The file in which the base that `cfg` trains is stored."""
    name = "-".join(c.target.rsplit(".")[-1].lower() for c in (cfg.data, cfg.model))
    return Path(cfg.bases_dir) / f"{name}-{key(cfg)[:16]}.safetensors"


def obtain(cfg: Config, train: Train, replay: Callable[[list[Row]], None]) -> Base:
    """The base that `cfg` asks for: loaded from its file, or trained if it is not stored yet.

    An interrupted training goes on from the checkpoints in its folder, in this run or in the next.
    `replay` logs the rows again where the base was stored before, so that each run's metrics hold
    those of its base. Of several runs that need one base at the same time, one trains it and the
    others wait. A stored file whose checksum is wrong is trained again.
    """
    if isinstance(cfg.base, CheckpointBase):
        return Base(load_file(cfg.base.path), [])
    file = path(cfg)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        if base := _load(file):
            log.info("base found, not trained again: %s", file)
            replay(base.rows)
            return base
        return _train_and_store(cfg, file, train)


def _locked(file: Path) -> AcquireReturnProxy:
    """The lock on a base, acquired; the log says so where another run holds it for a while."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for the run that is training this base (%s)", file)
        return lock.acquire()


def _train_and_store(cfg: Config, file: Path, train: Train) -> Base:
    started, checkpoints = time.time(), file.with_suffix(".checkpoints")
    run_threads = torch.get_num_threads()
    torch.set_num_threads(base_threads or run_threads)
    try:
        model, rows = train(checkpoints)
    except Exception:
        # An error would come again from the same checkpoint. An interruption is no Exception: its
        # checkpoints are what the next run goes on from.
        shutil.rmtree(checkpoints, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(run_threads)
    state = model.state_dict().items()
    # Cloned because safetensors refuses two names for one memory, which tied weights have.
    content = save({key: value.cpu().contiguous().clone() for key, value in state})
    about = {
        "sha256": _checksum(content, rows),
        "seconds": time.time() - started,
        "config": {n: getattr(cfg, n).model_dump(by_alias=True) for n in ("base", "data", "model")},
        "rows": rows,
    }
    # The .json last: it is complete only when the weights are, and `wait` looks for it.
    write_atomic(file, content)
    write_atomic(file.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    shutil.rmtree(checkpoints, ignore_errors=True)
    log.info("base trained in %.1f s and kept: %s", about["seconds"], file)
    return Base(load(content), rows)


def wait(cfg: Config) -> Base:
    """The base that `cfg` asks for, once another process of this run has stored it."""
    if isinstance(cfg.base, CheckpointBase):
        return Base(load_file(cfg.base.path), [])
    while not path(cfg).with_suffix(".json").exists() or not (base := _load(path(cfg))):
        time.sleep(0.2)
    return base


def _load(file: Path) -> Base | None:
    """A stored base; None if it is missing or its checksum is wrong."""
    if not file.exists():
        return None
    try:
        return read(file)
    except ValueError as error:
        log.warning("%s: training it again", error)
        return None


def read(file: Path) -> Base:
    """A stored base. Raises ValueError where its checksum is not the one beside it."""
    about_file = file.with_suffix(".json")
    try:
        content = file.read_bytes()
        about = json.loads(about_file.read_text())
        if _checksum(content, about["rows"]) != about["sha256"]:
            raise ValueError(f"its checksum is not that in {about_file.name}")
        return Base(load(content), about["rows"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        # A ValueError of JSON, or of bytes that are no text, does not name the file.
        unreadable = TypeError | KeyError | UnicodeDecodeError | json.JSONDecodeError
        reason = f"{about_file} cannot be read" if isinstance(error, unreadable) else error
        raise ValueError(f"the base {file} is damaged ({reason})") from None


def _checksum(content: bytes, rows: list[Row]) -> str:
    """The SHA-256 of a base's weights and rows together."""
    return hashlib.sha256(content + json.dumps(rows).encode()).hexdigest()


def check_checkpoint(base: CheckpointBase, model: nn.Module) -> str:
    """A base file's SHA-256. Raises ConfigError unless it holds exactly the model's weights."""
    where = f"base.path={base.path}"
    try:
        with safe_open(base.path, "pt") as file:
            stored = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: no safetensors file to be read: {error}") from None
    wanted = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    if stored != wanted:
        differ = sorted(k for k in {**stored, **wanted} if stored.get(k) != wanted.get(k))
        shown = "; ".join(f"{k}: file {stored.get(k)}, model {wanted.get(k)}" for k in differ[:4])
        raise ConfigError(
            f"{where}: does not hold this model's weights ({len(differ)} tensors differ: {shown})"
        )
    with open(base.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
