"""`lora-lab extract`: the adapter of a full fine-tune, of two checkpoints in files."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.analysis.extract import Extracted, Format
from lora_lab.analysis.extract import extract as extract_adapter
from lora_lab.analysis.layers import model_of_names
from lora_lab.analysis.stored_spectra import Difference, shortened
from lora_lab.cli.update_files import show_sites
from lora_lab.config.errors import first_line
from lora_lab.models.timm_model import timm_model
from lora_lab.models.transformers_checkpoint import TransformersCheckpoint
from lora_lab.models.transformers_config import quiet
from lora_lab.report.tables import Rows
from lora_lab.report.update_report import natural_order

READERS = {
    "peft": "in PEFT's format: PeftModel.from_pretrained(base, folder)",
    "lora_lab": "in our format: lora_lab.adapters.load(base, folder)",
}
"""What the printed text says of each format."""

MOST_REASONS = 6
"""How many weights that are not held have a line each."""


def extract(
    before: Path, after: Path, how: int | float, format: Format, to: Path, console: Console
) -> None:
    """Writes W − W₀ as an adapter: cut to a rank (int), or to a share of ‖W − W₀‖² (float)."""
    model, note = model_of_folder(before)
    if model is None and note == "":
        model, note = model_of_folder(after)
    old, new = (checkpoint_for(model, path) for path in (before, after))
    if model is None:
        note = f"layers are told by their names: {note or 'no config.json says what they are'}"
        model = model_of_names(old.shapes)
    difference = Difference(old, new)
    keys, hidden = difference.shared, not console.is_terminal
    tracked = track(keys, "extract", console=console, transient=True, disable=hidden)
    asked: dict[str, Any] = {"rank" if isinstance(how, int) else "energy": how}
    result = extract_adapter(difference, tracked, to, model, format, **asked)
    lines = [f"format   {READERS[format]}", *[note] * bool(note), *_clipped(result, how)]
    _report(result, difference, format, lines, to, console)


def model_of_folder(folder: Path) -> tuple[nn.Module | None, str]:
    """The model that the config.json of a folder names, on the meta device; or why there is none.

    The reason is empty where the folder has no config.json.
    """
    if not (file := folder / "config.json").is_file():
        return None, ""
    try:
        about = json.loads(file.read_text())
        if "architecture" in about:  # as timm writes it; transformers' key is `architectures`
            with torch.device("meta"):
                return timm_model(str(folder)), ""
        (name,) = about["architectures"]
        import transformers

        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            return getattr(transformers, name)(config), ""
    except KeyError as error:
        return None, f"{file} has no {error}"
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        return None, f"{file}: {first_line(error).replace(f'path={folder}: ', '')}"


def checkpoint_for(model: nn.Module | None, path: Path) -> Checkpoint:
    """The tensors at a path, by the keys that they have in the model."""
    of_transformers = hasattr(model, "base_model_prefix")
    return TransformersCheckpoint(path, model) if of_transformers else Checkpoint(path)


def _clipped(result: Extracted, how: int | float) -> list[str]:
    """A line on the sites whose weight has a lower rank than is asked."""
    names = [one.site.name for one in result.sites if isinstance(how, int) and one.k < how]
    if not names:
        return []
    many = f"of {len(names)} of {len(result.sites)} weights, where r is the weight's"
    return [f"--rank {how} exceeds the rank {many}: {shortened(names, 3)}"]


def _report(
    result: Extracted,
    difference: Difference,
    format: Format,
    lines: list[str],
    to: Path,
    console: Console,
) -> None:
    rows: Rows = [["site", "shape", "rank", "kept"]]
    for one in sorted(result.sites, key=lambda one: natural_order(one.site.name)):
        shape = " × ".join(map(str, one.site.shape))
        shape = f"{one.site.experts} of {shape}" if one.site.kind == "experts" else shape
        rows.append([one.site.name, shape, str(one.k), f"{one.kept:.2%}"])
    share = result.held_energy / result.energy
    lines = [f"kept     {share:.2%} of ‖W − W₀‖² over all tensors that both have", *lines]
    if residuals := [one.residual for one in result.sites if one.residual is not None]:
        lines.append(
            f"{len(residuals)} sites by subspace iteration: each σ within {max(residuals):.0e} σ₁ "
            "of one of W − W₀; the shares are exact"
        )
    reasons = [*result.not_held.items()]
    lines += [f"not held {key}: {reason}" for key, reason in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        lines.append(f"not held {shortened([*result.not_held])}")
    if result.held_by_ours:
        lines.append(f"--format lora_lab holds {shortened(result.held_by_ours, 3)}")
    tied = [one.site for one in result.sites if one.site.tied_to]
    if tied and format == "peft":
        name, others = tied[0].name, ", ".join(tied[0].tied_to)
        lines.append(
            f"{name} shares its adapter with {others}: PEFT's model computes it once, and its "
            "merge_and_unload adds it twice"
        )
    lines += [f"{key} is {first}, and counts once" for key, first in result.tied.items()]
    show_sites("kept: the share of ‖W − W₀‖²", rows, [*lines, *difference.lines()], to, console)
