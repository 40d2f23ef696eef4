"""The weights of a model in safetensors: one file, or a folder with one or with shards.

One tensor is in memory at a time, so that two checkpoints larger than memory can be compared.
"""

import json
import math
import re
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.stored import StoredUpdate
from lora_lab.adapters.weight import BLOCK_NAMES

KOHYA_NAME = re.compile(r"(?:lora|lycoris)_((?:[a-z]+\d?_)?(.+))")
"""The name of a layer in kohya's files: lora_unet_NAME, lora_te1_NAME, lycoris_NAME."""

EXPERT = 0
"""Stands for the number of parts where a weight is one of the matrices of experts."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """Reads the tensors of a checkpoint by key.

    `path` is a file of safetensors, or a folder with model.safetensors.index.json and its shards,
    with model.safetensors, or with one other .safetensors file. Raises AdapterError where there is
    none or a file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files = _files(path)
        """Key → the file that has it."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key → shape, from the headers of the files."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in dict.fromkeys(self.files.values()):
            with _open(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118, the object is no dict
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
        if missing := [key for key in self.files if key not in shapes]:
            raise AdapterError(f"{self.path}: no file has {missing[0]}, which {INDEX} names")
        return {key: shapes[key] for key in self.files}

    def tensor(self, key: str, index: int | None = None) -> Tensor:
        """A copy of one tensor, or of its part `index`; nothing of the file stays in memory."""
        # The file is opened anew for each: a file that stays open keeps in memory what was read.
        with _open(self.files[key]) as tensors:
            if index is not None:
                return tensors.get_slice(key)[index].clone()
            return tensors.get_tensor(key).clone()

    def matrix(self, site: str, update: StoredUpdate) -> Tensor | None:
        """W of a site as a matrix of ΔW's shape; None where this checkpoint has no such weight."""
        for key, part, parts in self._places(site):
            shape = self.shapes[key]
            if parts == EXPERT:
                if len(shape) != 3 or part >= shape[0]:
                    continue
                weight = self.tensor(key, part)
            elif len(shape) < 2 or shape[0] % parts:
                continue
            else:
                weight = self.tensor(key).chunk(parts)[part]
            matrix = weight.flatten(1)
            options = (matrix.T, matrix) if update.transposed else (matrix, matrix.T)
            for option in options[: 2 if weight.dim() == 2 else 1]:
                if tuple(option.shape) == update.shape:
                    return option
        return None

    def kernel(self, site: str, update: StoredUpdate) -> tuple[int, ...] | None:
        """The kernel size of a site's weight of ΔW's shape, () of a matrix; None without one."""
        for key, _, parts in self._places(site):
            out, *rest = self.shapes[key] or (0,)
            if parts == 1 and (out, math.prod(rest)) == update.shape:
                return tuple(rest[1:])
        return None

    def _places(self, site: str) -> list[tuple[str, int, int]]:
        """Keys that can be the site's weight, each with which of how many parts of its rows.

        Or, with EXPERT in the place of how many, which expert's matrix.
        """
        names = [(f"{site}.weight", 0, 1), (site, 0, 1)]
        for letters in BLOCK_NAMES.values():  # in_proj_weight_q: the first third of in_proj_weight
            if site[-2:-1] == "_" and site[-1] in letters:
                names.append((site[:-2], letters.index(site[-1]), len(letters)))
        stack, _, expert = site.rpartition(".")
        if expert.isdecimal():  # experts.down_proj.3
            names.append((stack, int(expert), EXPERT))
        places = [place for place in names if place[0] in self.files]
        if places:
            return places
        # A base that was saved without or with a head has keys with another first word.
        for name, part, parts in names:
            ends = list(self._keys_after_first_word.get(name, ()))
            ends += [end for end in (name.partition(".")[2],) if end in self.files]
            places += [(ends[0], part, parts)] if len(ends) == 1 else []
        # kohya's names have a word or two before the layer's, and _ for each dot of its name. What
        # has more of the name comes first: of lycoris_encoder_fc encoder.fc before fc.
        if layer := KOHYA_NAME.fullmatch(site):
            keys = (key for name in layer.groups() for key in self._keys_by_flat_name.get(name, ()))
            places += [(key, 0, 1) for key in keys]
        return places

    @cached_property
    def _keys_after_first_word(self) -> dict[str, list[str]]:
        """The part of a key after its first word and dot → the keys that end so."""
        keys: dict[str, list[str]] = {}
        for key in self.files:
            keys.setdefault(key.partition(".")[2], []).append(key)
        return keys

    @cached_property
    def _keys_by_flat_name(self) -> dict[str, list[str]]:
        """A layer's name with _ for each dot → the keys that it can be of, the likeliest first.

        These are the weights of layers before parameters of other names, and those with fewer dots
        in their names before others.
        """
        keys: dict[str, list[str]] = {}
        for key in sorted(self.files, key=lambda k: (not k.endswith(".weight"), k.count("."))):
            keys.setdefault(key.removesuffix(".weight").replace(".", "_"), []).append(key)
        return keys


def _files(path: Path) -> dict[str, Path]:
    index, single = path / INDEX, path / SINGLE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {key: path / Path(name).name for key, name in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{index} cannot be read: {error!r}") from None
        if missing := sorted({file.name for file in files.values() if not file.is_file()}):
            raise AdapterError(f"{path} lacks {', '.join(missing)}, which {INDEX} names")
        return files
    if path.is_dir():
        stored = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
        if len(stored) != 1:
            names = ", ".join(file.name for file in stored[:3]) or "none"
            raise AdapterError(f"{path} has no {SINGLE} or {INDEX} (.safetensors files: {names})")
        path = stored[0]
    elif path.suffix != ".safetensors":
        raise AdapterError(f"{path} is no .safetensors file: other formats of weights are not read")
    with _open(path) as tensors:
        return dict.fromkeys(tensors.keys(), path)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"no tensors can be read from {path}: {error}") from None
