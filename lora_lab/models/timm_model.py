"""Models of timm by the folder, the file or the hub id that they lie in: the model itself.

The functions are those of models/pretrained.py. Which weights fit, and how those of older files are
renamed, is decided by timm's own loading.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from unittest.mock import patch

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_lab.config.errors import first_line, nearest, nearest_folder, nearest_path

DType = Literal["float32", "bfloat16", "float16", "float64"]


def timm_model(
    path: str,
    name: str | None = None,
    out_features: int | None = None,
    revision: str | None = None,
    dtype: DType = "float32",
    image_size: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    gradient_checkpointing: bool = False,
    new_head: bool = False,
) -> nn.Module:
    """A model of timm; its weights are not loaded.

    Args:
        path: A folder that timm's save_for_hf wrote, a file of weights, or a hub's id, as
            timm/convnext_atto.d2_in1k.
        name: timm's name of the architecture, of which `path` is a file of weights.
        out_features: The data's classes. Where the weights have another number, the classifier is
            new.
        revision: A branch, tag or commit of the hub.
        dtype: In which the weights are held.
        image_size: Pixels of a side, for a model that has a vector for each position.
        dropout: Before the classifier; None: as the model's author chose.
        drop_path: The rate of stochastic depth (Huang et al. 2016) at the last block.
        gradient_checkpointing: Keeps fewer activations and computes the others again.
        new_head: Draws the classifier anew though the weights have one with this many classes.

    Raises ValueError, `argument=value: rule`, where there is no such model.
    """
    for argument, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"{argument}={rate}: must be at least 0 and less than 1")
    settings = {"name": name, "revision": revision, "dtype": dtype, "image_size": image_size}
    settings |= {"dropout": dropout, "drop_path": drop_path, "new_head": new_head}
    return _build(path, None, out_features, gradient_checkpointing, **settings)


timm_model.path_arguments = ("path",)  # pyright: ignore[reportFunctionMemberAccess]


def load_weights(path: str, **arguments: Any) -> nn.Module:
    """The model of `timm_model` with the weights that lie at `path`.

    The `new_parameters` have values that are to be drawn again. Arguments as `timm_model`'s.
    """
    with torch.random.fork_rng(devices=[]):  # timm draws a model before it reads the weights
        return _build(path, {}, **arguments).train()


def new_parameters(model: nn.Module, path: str, **arguments: Any) -> list[str]:
    """The names of those parameters of `model` that no file at `path` holds, as a new head's.

    Only a file's header is read. `model` is that of `timm_model` with these arguments, which may be
    on the meta device. Raises ValueError where the file is not this model's.
    """
    (file,) = weight_files(path, arguments.get("revision"))
    arguments["out_features"] = getattr(model, "num_classes", None)
    loaded: dict[str, Tensor] = {}

    def record(module: nn.Module, state: dict[str, Tensor], strict: bool = True) -> Any:
        loaded.update(state)
        return nn.modules.module._IncompatibleKeys([], [])

    # timm renames a file's tensors as the architecture needs, leaves out a head of another number
    # of classes, and hands the rest to load_state_dict. Here that only notes what it is handed.
    with torch.device("meta"), patch.object(type(model), "load_state_dict", record):
        _build(path, {"source": "", "state_dict": _shapes(path, file)}, **arguments)
    return _compare(model, loaded, path)


def _compare(model: Any, loaded: dict[str, Tensor], path: str) -> list[str]:
    """The parameters of the classifier that are not `loaded`; errors for what else differs."""
    state = model.state_dict()
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = tuple(f"{classifier}." for classifier in classifiers)
    architecture = model.pretrained_cfg.get("architecture")
    missing = [key for key in state if key not in loaded and not key.startswith(heads)]
    unknown = [key for key in loaded if key not in state and not key.startswith(heads)]
    for keys, problem in ((missing, "is missing"), (unknown, "is no weight of it")):
        if keys:
            others = f", and {len(keys) - 1} more" if keys[1:] else ""
            raise ValueError(
                f"path={path}: its weights are not those of {architecture}: "
                f"{keys[0]} {problem}{others}"
            )
    for key in state.keys() & loaded.keys():
        if state[key].shape != loaded[key].shape:
            shapes = [" × ".join(map(str, t.shape)) for t in (loaded[key], state[key])]
            raise ValueError(
                f"path={path}: {key} is {shapes[0]} in the file, and {shapes[1]} in {architecture}"
            )
    return [name for name, _ in model.named_parameters() if name not in loaded]


def weight_files(path: str, revision: str | None = None) -> list[str]:
    """The file that holds the weights at `path`; that of a hub is downloaded if need be."""
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        # timm takes the first of these, and of one suffix the first by name.
        patterns = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
        for pattern in (*patterns, "*.safetensors", "*.pth", "*.bin"):
            if files := sorted(Path(path).glob(pattern)):
                return [str(files[0])]
        raise ValueError(f"path={path}: the folder has no file of weights, as model.safetensors")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in ("model.safetensors", "pytorch_model.bin"):
        try:
            return [hf_hub_download(path, file, revision=revision)]
        except EntryNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"path={path}: {first_line(error)}") from None
    raise ValueError(f"path={path}: neither the hub's nor its cache has a model.safetensors")


def check_path(path: str) -> None:
    """Raises ValueError where a path is neither a file, nor a model's folder, nor a hub's id."""
    if Path(path).is_dir() and not Path(path, "config.json").exists():
        raise ValueError(
            f"path={path}: the folder has no config.json, which timm's save_for_hf writes"
            f"{nearest_folder(path, 'config.json')}"
        )
    if Path(path).exists() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        return
    timm, architecture = _timm(path), path.partition(".")[0]
    if timm.is_model(architecture):
        weights = [w for w in timm.list_pretrained(f"{architecture}.*") if w.startswith(path)]
        if weights:
            raise ValueError(
                f"path={path}: no folder or file; the hub's id of timm's weights of this name is "
                f"timm/{weights[0]}"
            )
    near = nearest_path(path) or nearest(path, timm.list_models())
    raise ValueError(f"path={path}: no such folder or file, and no hub's id{near}")


def _build(
    path: str,
    weights: dict[str, Any] | None,
    out_features: int | None = None,
    gradient_checkpointing: bool = False,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    image_size: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    new_head: bool = False,
) -> nn.Module:
    """The model without weights (None), with those at `path` ({}), or with those in `weights`."""
    overlay = {**_file_settings(path, name), **(weights or {})}
    if new_head and out_features is not None:
        overlay["num_classes"] = -1  # another number than the model's: timm leaves the head out
    change = {"img_size": image_size, "drop_rate": dropout, "drop_path_rate": drop_path}
    model = _create(
        path,
        _source(path, name, revision),
        pretrained=weights is not None,
        pretrained_cfg_overlay=overlay,
        **{"num_classes": out_features, **change},
    )
    if gradient_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            name = type(model).__name__
            raise ValueError(f"gradient_checkpointing=true: {name} of timm has none") from None
    return model.to(getattr(torch, dtype))


def _source(path: str, name: str | None, revision: str | None) -> str:
    """What timm's create_model calls the model."""
    file = Path(path)
    if file.is_file():
        return _architecture(path, name)
    if name is not None:
        raise ValueError(f"name={name}: only for a file of weights, and path={path} is none")
    check_path(path)
    if file.is_dir():
        return f"local-dir:{path}"
    return f"hf-hub:{path}{f'@{revision}' if revision else ''}"


def _file_settings(path: str, name: str | None) -> dict[str, Any]:
    """Where a file of weights lies, and its number of classes, which timm cannot know."""
    if not Path(path).is_file():
        return {}
    cfg = _timm(path).get_pretrained_cfg(_architecture(path, name))
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else (cfg.classifier or "_")[0]
    weight = _shapes(path, path).get(f"{classifier}.weight")
    classes = {} if weight is None else {"num_classes": len(weight)}
    return {"file": path, **classes}


def _architecture(path: str, name: str | None) -> str:
    timm = _timm(path)
    if name is None:
        raise ValueError(
            f"path={path}: a file; model.name says of which architecture, as model.name=resnet18"
        )
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"name={name}: timm has no such model{nearest(name, timm.list_models())}")
    return name


def _create(path: str, source: str, **arguments: Any) -> Any:
    """timm's create_model. Raises ValueError, `argument=value: rule`, where it refuses."""
    try:
        return _timm(path).create_model(source, **arguments)
    except KeyError as error:
        raise ValueError(
            f"path={path}: its config.json has no {error}, which timm's save_for_hf writes; "
            "model=pretrained reads what transformers' save_pretrained wrote"
        ) from None
    except TypeError as error:
        for argument, key in (("image_size", "img_size"), ("drop_path", "drop_path_rate")):
            if f"'{key}'" in str(error):
                value = arguments[key]
                raise ValueError(f"{argument}={value}: {path} takes no {key}") from None
        raise
    except (RuntimeError, AssertionError, OSError, ValueError) as error:
        raise ValueError(f"path={path}: {first_line(error)}") from None


def _shapes(path: str, file: str) -> dict[str, Tensor]:
    """The tensors of a file on the meta device, where they have shapes and no values."""
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt") as tensors:
                shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
            return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        from timm.models import load_state_dict  # pyright: ignore[reportMissingImports]

        # Without weights_only the file is a pickle, which runs code; timm itself reads it later.
        return load_state_dict(file, device="meta", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"path={path}: {file} cannot be read: {first_line(error)}") from None


def _timm(path: str) -> Any:
    if find_spec("timm") is None:
        raise ValueError(f"path={path}: needs timm, pip install 'lora_lab[images]'")
    import timm  # pyright: ignore[reportMissingImports]

    return timm
