"""Stored adapters: ΔW of each site as files hold it, read without a model.

PEFT's folders and ours are read here, single files of LyCORIS and kohya in `lycoris`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_lab.adapters.adapter import TENSOR_NAMES
from lora_lab.adapters.files import read_folder
from lora_lab.adapters.forms import FORMS
from lora_lab.adapters.lycoris import LOHA, LOKR, read_lycoris, update_of_parts
from lora_lab.adapters.peft_folder import FILES, peft_type, read_peft, split_by_layer
from lora_lab.adapters.peft_parameters import experts_from_peft, key_of_path
from lora_lab.adapters.peft_tensors import (
    EMBEDDING_TENSOR_KEYS,
    factors_from_peft,
    rank_and_scale,
    tensor_keys,
)
from lora_lab.adapters.peft_trained_in_full import PREFIX
from lora_lab.adapters.recipe import AdapterError


@dataclass(frozen=True)
class StoredUpdate:
    """ΔW of one site as a matrix: scale · B A, or scale · outer ⊗ (B A) for LoKr.

    With a `magnitude` (DoRA) the rows of W + ΔW are then scaled to these norms, for which W is
    needed. `transposed` says that the layer holds W as rest × out, as an embedding does. `kernel`
    is a convolution's kernel size, and () of other layers; None where the files do not tell which
    of these it is. `experts_site` is the site of a mixture's experts, of one of which this is ΔW.
    """

    A: Tensor  # (r, rest)
    B: Tensor  # (out, r)
    scale: float = 1.0
    magnitude: Tensor | None = None  # (out,)
    outer: Tensor | None = None  # (out₁, rest₁)
    transposed: bool = False
    kernel: tuple[int, ...] | None = ()
    experts_site: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of ΔW as a matrix: out × rest."""
        out, rest = (1, 1) if self.outer is None else self.outer.shape
        return out * len(self.B), rest * self.A.shape[1]

    @property
    def r(self) -> int:
        """The number of rows of A, or what the factors of LoKr can have as rank."""
        return len(self.A) * (1 if self.outer is None else min(self.outer.shape))

    def product(self) -> Tensor:
        """ΔW before DoRA's magnitude, in float64: a dense matrix."""
        product = self.scale * (self.B.double() @ self.A.double())
        return product if self.outer is None else torch.kron(self.outer.double(), product)

    def delta(self, W: Tensor) -> Tensor:
        """ΔW with DoRA's magnitude, for the base's weight as a matrix; dense, in float64."""
        matrix = self.product()
        if self.magnitude is None:
            return matrix
        W = W.double()
        norms = torch.linalg.vector_norm(W + matrix, dim=1)
        gain = torch.where(norms > 0, self.magnitude.double() / norms, 1.0)
        return gain[:, None] * (W + matrix) - W


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read from files: ΔW of each site, and all that the files hold."""

    path: Path
    format: Literal["lora_lab", "peft", "kohya"]
    """Whose folder it is, or whose single file."""
    tensors_file: Path
    updates: dict[str, StoredUpdate]
    about: dict[str, Any]
    """What the folder's JSON says, or the metadata of a single file."""
    tensors: dict[str, Tensor]


def read_updates(path: Path) -> dict[str, StoredUpdate]:
    """ΔW of each site of an adapter in files; raises as `read_adapter`."""
    return read_adapter(path).updates


def read_adapter(path: Path) -> StoredAdapter:
    """The adapter of a PEFT folder, of one of ours, or of a file of LyCORIS or kohya.

    Raises AdapterError where it is none of them, is damaged, or holds what is not read.
    """
    if path.is_dir():
        if (path / "adapter.json").is_file():
            adapter = _of_our_folder(path)
        elif (path / FILES[1]).is_file():
            is_lycoris = peft_type(path) in ("LOHA", "LOKR")
            adapter = _of_peft_lycoris(path) if is_lycoris else _of_peft_folder(path)
        else:
            raise AdapterError(
                f"{path} holds no adapter: PEFT's folders have adapter_config.json, ours "
                "adapter.json; LyCORIS and kohya write one file, which is given itself"
            )
    elif path.suffix == ".safetensors":
        fields, metadata, tensors = read_lycoris(path)
        updates = {site: StoredUpdate(**parts) for site, parts in fields.items()}
        adapter = StoredAdapter(path, "kohya", path, updates, metadata, tensors)
    else:
        raise AdapterError(f"{path} is no folder and no .safetensors file")
    if not adapter.updates:
        raise AdapterError(f"{path} holds no low-rank update: only what was trained in full")
    return adapter


def _of_peft_folder(directory: Path) -> StoredAdapter:
    if peft_type(directory) == "VERA":
        raise AdapterError(
            f"{directory}: a VERA folder does not say how many inputs each layer has: put it on "
            "its model by `load_peft`, and save that"
        )
    config, tensors = read_peft(directory)
    by_layer, _ = split_by_layer(tensors)
    updates, errors = {}, []
    for path, named in by_layer.items():
        site = path
        try:
            key = key_of_path(path, by_layer, config["target_parameters"])
        except AdapterError as error:
            errors.append(str(error))
            continue
        is_embedding = EMBEDDING_TENSOR_KEYS["A"] in named
        keys = tensor_keys("embedding" if is_embedding else "linear")
        if not {keys["A"], keys["B"]} <= {*named} <= {*keys.values()}:
            errors.append(f"'{site}' has {', '.join(named)}, not {keys['A']} and {keys['B']}")
            continue
        A, B, magnitude = named[keys["A"]], named[keys["B"]], named.get(keys["magnitude"])
        r, scale = rank_and_scale(config, key or path)
        if key is not None:
            site = key.removesuffix(".weight")
            if experts := _experts(A, B, r):
                A, B = experts_from_peft(A, B, experts)
                updates |= updates_of_experts(site, A, B, scale)
                continue
        groups = r // B.shape[1] if B.dim() > 1 and B.shape[1] else 0
        if len(A) != r or groups * B.shape[1] != r:
            shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
            errors.append(f"'{site}': B and A are {shapes}, and adapter_config.json says r={r}")
            continue
        kernel = tuple(A.shape[2:])
        factors = factors_from_peft(A, B, groups, kernel)
        magnitude = None if magnitude is None else magnitude.flatten()
        transposed = is_embedding or (bool(config.get("fan_in_fan_out")) and not kernel)
        updates[site] = StoredUpdate(
            *factors, scale, magnitude, transposed=transposed, kernel=kernel
        )
    if errors:
        raise AdapterError(f"{directory}: {'; '.join(errors)}")
    return StoredAdapter(directory, "peft", directory / FILES[0], updates, config, tensors)


def _experts(A: Tensor, B: Tensor, r: int) -> int:
    """How many experts PEFT's A (E · r, in) and B (out, r · E) are of; 0 where they are of none."""
    experts = len(A) // r
    fits = A.dim() == B.dim() == 2 and len(A) == B.shape[1] == experts * r
    return experts if fits and experts > 1 else 0


def updates_of_experts(site: str, A: Tensor, B: Tensor, scale: float) -> dict[str, StoredUpdate]:
    """ΔW of each expert by name, `<site>.<expert>`, from A (E, r, in) and B (E, out, r)."""
    return {
        f"{site}.{expert}": StoredUpdate(a, b, scale, experts_site=site)
        for expert, (a, b) in enumerate(zip(A, B, strict=True))
    }


def experts_by_site(updates: Mapping[str, StoredUpdate]) -> dict[str, list[str]]:
    """Site of experts → the names of their matrices, in order."""
    names: dict[str, list[str]] = {}
    for name, update in updates.items():
        if update.experts_site:
            names.setdefault(update.experts_site, []).append(name)
    return names


def _of_peft_lycoris(directory: Path) -> StoredAdapter:
    """PEFT's LoHa or LoKr, whose scale is always alpha/r."""
    config: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config |= json.loads((directory / FILES[1]).read_text())
    config["lora_alpha"] = config.get("alpha", 8)
    try:
        tensors = load_file(directory / FILES[0])
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"no PEFT adapter can be read from {directory}: {error}") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, _, part = key.removeprefix(PREFIX).rpartition(".")
        if part in LOHA | LOKR:
            layers.setdefault(site, {})[part] = tensor
    updates = {}
    for site, parts in layers.items():
        if "lokr_w2" in parts and parts["lokr_w2"].dim() == 3:
            raise AdapterError(f"'{site}': PEFT's LoKr of a conv1d is no Kronecker product")
        try:
            fields = update_of_parts(parts)
        except (AdapterError, KeyError, RuntimeError) as error:
            raise AdapterError(f"{directory}: '{site}': {error}") from None
        updates[site] = replace(StoredUpdate(**fields), scale=rank_and_scale(config, site)[1])
    return StoredAdapter(directory, "peft", directory / FILES[0], updates, config, tensors)


def _of_our_folder(directory: Path) -> StoredAdapter:
    description, tensors = read_folder(directory)
    updates = {}
    try:
        for site, about in description["sites"].items():
            prefix = f"{site}." if site else ""
            named = {n: tensors[prefix + n] for n in TENSOR_NAMES if prefix + n in tensors}
            form = FORMS[about.get("form", "lora")]
            factors = stored_factors(named) if form is None else form.factors(named)
            shape = (len(factors[1]), factors[0].shape[1])
            # Folders of earlier versions tell by the weight's shape which way round it lies: not
            # of a square one, which is then taken to lie as nn.Linear's.
            is_reversed = tuple(about["shape"]) == shape[::-1] != shape
            transposed = about.get("transposed", about["kind"] == "embedding" or is_reversed)
            if about["kind"] == "experts":
                updates |= updates_of_experts(site, *factors, about["scale"])
                continue
            magnitude = tensors.get(f"{prefix}magnitude")
            updates[site] = StoredUpdate(*factors, about["scale"], magnitude, transposed=transposed)
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"no adapter can be read from {directory}: {error!r}") from None
    file = directory / "adapter.safetensors"
    return StoredAdapter(directory, "lora_lab", file, updates, description, tensors)


def stored_factors(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of an adapter's tensors by name; of rank 2r with A0 and B0, as `Adapter.factors`."""
    A, B = tensors["A"], tensors["B"]
    if (core := tensors.get("core")) is not None:
        return A, B @ core
    A0, B0 = tensors.get("A0"), tensors.get("B0")
    if A0 is not None and B0 is not None:
        return torch.cat([A, A0], -2), torch.cat([B, -B0], -1)
    return A, B
