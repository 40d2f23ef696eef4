"""A base whose weights lie at model.path: which of them are new, what identifies them, loading.

The module of such a model (models/pretrained.py) has three functions beside the model itself:
`load_weights`, `new_parameters` and `weight_files`. It may have two more: `check_path`, that raises
ValueError for what can be no path of such a model, and `quantized_parameters`, if it takes
`quantization`.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lora_lab.config.components import PretrainedBase
from lora_lab.config.schema import Component, Config, ConfigError, Full
from lora_lab.data.content import check_hub_id, content_hash, hub_commit
from lora_lab.runs import write_atomic
from lora_lab.seeding import generator

HASHES = "hashes.json"
"""The file in bases_dir that keeps the hashes of large files: path → [size, time, SHA-256]."""

LARGE = 50_000_000
"""Bytes of a file whose hash is kept: a smaller one is hashed in less than a tenth of a second."""

_new_parameters: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
"""The new parameters of models on the meta device, which several plans share."""


def check_path(model: Component) -> None:
    """Raises ConfigError where model.path can be none, before a hub is asked for it."""
    module: Any = inspect.getmodule(model.callee)
    path, revision = model.arguments.get("path", ""), model.arguments.get("revision")
    try:
        if hasattr(module, "check_path"):
            module.check_path(path)
        if hasattr(module, "load_weights") and not Path(path).exists():
            _check_hub_id(path, revision)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def _check_hub_id(path: str, revision: str | None) -> None:
    """Raises ValueError, with the folder most like `path`, where no hub's model has this id."""
    try:
        check_hub_id(path)
        hub_commit(path, revision, "model")
    except ValueError as error:
        raise ValueError(f"path={error}") from None


def with_content(cfg: Config) -> Config:
    """The config with the content of the files and folders that its data and model read.

    Raises ConfigError where one cannot be read, or is another than the config's `content` says.
    """
    for key in ("data", "model", *(["forget"] if cfg.forget else [])):
        component: Component = getattr(cfg, key)
        content = {
            name: _content(key, name, path, component.arguments)
            for name in getattr(component.callee, "path_arguments", ())
            if (path := component.arguments.get(name)) is not None
        }
        for name, stored in (component.content or {}).items():
            if content.get(name) != stored:
                raise ConfigError(
                    f"{key}.{name}={component.arguments.get(name)}: it is another now than in the "
                    f"config, whose {key}.content.{name} is {stored[:12]}"
                )
        if content:
            cfg = cfg.model_copy(update={key: component.model_copy(update={"content": content})})
    return cfg


def _content(key: str, name: str, path: str, arguments: dict[str, Any]) -> str:
    """What identifies that which lies at a path: of a model's folder, its config.json."""
    is_of_model = key != "model" and name in ("tokenizer", "processor")
    revision = arguments.get("revision") if not is_of_model else None
    try:
        if key == "model" and Path(path).is_dir():
            return content_hash(str(Path(path, "config.json")))
        kind = "model" if key == "model" else "tokenizer" if is_of_model else "dataset"
        return content_hash(path, revision, kind)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}.{name}={path}: {error}") from None


def check(cfg: Config, model: nn.Module) -> tuple[list[str], str]:
    """The names of the model's new parameters, and the hash of the weights that lie at its path.

    `model` is on the meta device. Raises ConfigError where the files are not its weights.
    """
    module = _module(cfg)
    try:
        if model not in _new_parameters:
            _new_parameters[model] = module.new_parameters(model, **cfg.model.arguments)
        sha256 = _weights_hash(cfg, module)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    assert cfg.base.method == "pretrained"
    if cfg.base.sha256 not in (None, sha256):
        raise ConfigError(
            f"model.path={cfg.model.arguments['path']}: its weights are not those of the config, "
            f"whose base.sha256 is {cfg.base.sha256[:12]}"
        )
    return _new_parameters[model], sha256


def check_quantized(
    cfg: Config, model: nn.Module, new: list[str], also_trained: Iterable[str]
) -> None:
    """Raises ConfigError where the weights that model.quantization holds would have to train.

    `model` is on the meta device, `new` are its new parameters.
    """
    if (quantization := cfg.model.arguments.get("quantization")) is None:
        return
    where = f"model.quantization={quantization}"
    if not isinstance(cfg.base, PretrainedBase):
        raise ConfigError(f"{where}: is for weights that are loaded, base=pretrained")
    if isinstance(cfg.adapter, Full):
        raise ConfigError(f"{where}: quantized weights cannot train, and adapter=full trains all")
    if cfg.trainer.model_dump().get("strategy") == "fsdp":
        raise ConfigError(f"{where}: trainer.strategy=fsdp splits no quantized weights; ddp does")
    held = _module(cfg).quantized_parameters(model, new, **cfg.model.arguments)
    if both := [name for name in also_trained if name in {*held}]:
        shown = ", ".join(both[:3]) + ", …" * (len(both) > 3)
        raise ConfigError(f"also_train: {where} holds {shown}, which cannot train then")


def load(cfg: Config, sizes: dict[str, int], new: Iterable[str], seed: int | None) -> nn.Module:
    """The model with the weights at its path, and its new parameters drawn from `seed`."""
    model = _module(cfg).load_weights(**sizes, **cfg.model.arguments)
    with torch.no_grad():
        for name, value in draw_new(model, new, seed).items():
            model.get_parameter(name).copy_(value)
    return model


def draw_new(model: nn.Module, names: Iterable[str], seed: int | None) -> dict[str, Tensor]:
    """First values of parameters that no file holds, each from a generator of (seed, name).

    They have the distribution that the model itself gives them, in float32 where the model is in
    half precision: also_train trains them so. `seed` None stands for values that runs of all seeds
    share.
    """
    values = {}
    for name in names:
        path, _, parameter = name.rpartition(".")
        layer = copy.deepcopy(model.get_submodule(path))
        if layer.get_parameter(parameter).dtype in (torch.bfloat16, torch.float16):
            layer.float()
        with torch.random.fork_rng(devices=[]):
            key = generator("shared" if seed is None else seed, "head", name).initial_seed()
            torch.manual_seed(key)
            _initialize(model, layer)
        values[name] = layer.get_parameter(parameter).detach()
    return values


def _initialize(model: Any, layer: Any) -> None:
    """Draws a layer's weights as torch, and then as transformers does in this model."""
    for parameter in layer.parameters():
        # transformers marks what it has loaded, and leaves it as it is.
        vars(parameter).pop("_is_hf_initialized", None)
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    if hasattr(model, "_init_weights"):
        with torch.no_grad():
            model._init_weights(layer)


def _module(cfg: Config) -> Any:
    """The module of the model, which loads its weights. Raises ConfigError for another's."""
    module = inspect.getmodule(cfg.model.callee)
    if not hasattr(module, "load_weights"):
        raise ConfigError(
            "base=pretrained: needs a model whose weights lie at model.path, as model=pretrained; "
            f"this model is {cfg.model.target}"
        )
    return module


def _weights_hash(cfg: Config, module: Any) -> str:
    """The commit of a hub's model; else the SHA-256 of its file, or of its files' hashes."""
    path, revision = cfg.model.arguments["path"], cfg.model.arguments.get("revision")
    if not Path(path).exists():
        return hub_commit(path, revision, "model")
    hashes = [_file_hash(Path(file), cfg.bases_dir) for file in module.weight_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _file_hash(file: Path, bases_dir: str) -> str:
    """The SHA-256 of a file; that of a large one is kept in bases_dir until the file changes."""
    status, kept = file.stat(), Path(bases_dir, HASHES)
    if status.st_size < LARGE:
        return content_hash(str(file))
    known, name, state = {}, str(file.resolve()), [status.st_size, status.st_mtime_ns]
    with suppress(OSError, ValueError):
        known = json.loads(kept.read_text())
    if known.get(name, [])[:2] == state:
        return known[name][2]
    digest = content_hash(str(file))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, json.dumps({**known, name: [*state, digest]}, indent=1) + "\n")
    return digest
