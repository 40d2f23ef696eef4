"""A model card: README.md of an exported folder, as the hub shows it, with ΔW's spectrum beside it.

Its header is YAML that `huggingface_hub.ModelCardData` reads; its code loads the folder.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_lab.models.transformers_config import HEADS
from lora_lab.report.run_figures import write_spectrum_picture
from lora_lab.report.run_tables import run_tables
from lora_lab.report.tables import format_number, markdown, markdown_text
from lora_lab.runs import Run, write_atomic

CARD, PICTURE = "README.md", "spectrum.png"

MAX_SITES = 40
"""How many sites a card names, at most; adapter.json of the run has all."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""What the hub takes for the name of a model."""

PIPELINES = {
    "classification": "text-classification",
    "tokens": "token-classification",
    "language": "text-generation",
    "masked": "fill-mask",
    "seq2seq": "text2text-generation",
    "image": "image-classification",
}
"""model.head → the hub's word for what such a model does."""

TRANSFORMERS_BASE = """\
from transformers import {auto}

base = {auto}.from_pretrained({path}{arguments})
"""
OTHER_BASE = """\
# `base` is the torch model whose weights were adapted, with these weights.
"""
"""What comes before the folder is loaded."""


@dataclass(frozen=True)
class Base:
    """What a card says of a base and how it is loaded.

    path: The folder or the hub's id, as it was given; None for a model of one's own.
    head: Its head, a key of `HEADS`; "" where transformers does not load it by one.
    arguments: Those of transformers' from_pretrained.
    """

    path: str | None = None
    head: str = ""
    arguments: Mapping[str, Any] | None = None

    @property
    def hub_id(self) -> str | None:
        """The path where it is a hub's id. A card with a local folder for it is refused there."""
        is_id = self.path and HUB_ID.fullmatch(self.path) and not Path(self.path).exists()
        return self.path if is_id else None


def write_model_card(run: Run, directory: Path, format: str, base: Base, adapter: str) -> None:
    """Writes README.md and the picture of ΔW's spectrum to an exported folder.

    `format` is that of the export, and `adapter` the folder in the run directory that was exported.
    """
    is_lora = run.config["adapter"]["method"] == "lora"
    has_picture = is_lora and write_spectrum_picture(run, directory / PICTURE)
    header = yaml.safe_dump(
        _header(run, format, base, adapter), sort_keys=False, allow_unicode=True
    )
    text = [
        f"# {markdown_text(run.config['name'])}: {markdown_text(run.path.name)}",
        _introduction(run, format, base, adapter),
        f"## Use\n\n```python\n{_code(directory, format, base)}```",
        f"## Adaptation\n\n{markdown([['', ''], *_settings(run, adapter)], 'l')}",
        *_measured(run, adapter),
    ]
    if has_picture:
        caption = "The singular values of ΔW of each adapted weight, over training."
        text.append(f"## What was learned\n\n![{caption}]({PICTURE})\n\n{caption}")
    write_atomic(directory / CARD, f"---\n{header}---\n\n" + "\n\n".join(text) + "\n")


def _header(run: Run, format: str, base: Base, adapter: str) -> dict[str, Any]:
    """The card's metadata, by the hub's keys. A license is left to who publishes it."""
    header: dict[str, Any] = {}
    if base.hub_id:
        relation = "adapter" if format == "peft" else "finetune"
        header |= {"base_model": base.hub_id, "base_model_relation": relation}
    if format == "peft" or base.head:
        header["library_name"] = "peft" if format == "peft" else "transformers"
    if base.head:
        header["pipeline_tag"] = PIPELINES[base.head]
    method = run.config["adapter"]["method"]
    header["tags"] = list(dict.fromkeys([method, "lora_lab", run.config["name"]]))
    if metrics := _metrics(run, adapter):
        header["metrics"] = sorted({key.rpartition("/")[2] for key in metrics})
        header["model-index"] = [{"name": run.path.name, "results": _results(run, base, metrics)}]
    return header


def _results(run: Run, base: Base, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """The results of a model-index: one for each split, validation and test."""
    kind = run.config["data"]["_target_"].rpartition(".")[2]
    results = []
    for split, name in (("val", "validation"), ("test", "test")):
        values = [
            {"type": key.partition("/")[2], "value": value, "name": key}
            for key, value in metrics.items()
            if key.startswith(f"{split}/")
        ]
        if values:
            dataset = {"type": kind.lower(), "name": kind, "split": name}
            task = {"type": PIPELINES.get(base.head, "other")}
            results.append({"task": task, "dataset": dataset, "metrics": values})
    return results


def _metrics(run: Run, adapter: str) -> dict[str, float]:
    """The last validation and test metrics of the exported adapter, as val/loss, if finite."""
    prefix = "" if adapter == "adapter" else f"{adapter}/"
    starts = (f"{prefix}val/", f"{prefix}test/")
    keys = dict.fromkeys(k for row in run.rows() for k in row if k.startswith(starts))
    last = {key.removeprefix(prefix): run.last(key) for key in keys}
    return {k: value for k, value in last.items() if value is not None and math.isfinite(value)}


def _introduction(run: Run, format: str, base: Base, adapter: str) -> str:
    """One paragraph: what the folder holds, and of which base."""
    if base.path is None:
        of = "a model of its own"
    elif base.hub_id:
        of = f"[{base.path}](https://huggingface.co/{base.path})"
    else:
        of = f"the model in the folder {markdown_text(base.path)}"
    if run.config["adapter"]["method"] == "full":
        return f"{of[0].upper()}{of[1:]}, trained in full with lora_lab."
    what = "A low-rank adapter of" if format == "peft" else "A low-rank adapter merged into"
    smaller = f" It is `{adapter}` of the run: cut to a lower rank." if adapter != "adapter" else ""
    return f"{what} {of}, trained with lora_lab.{smaller}"


def _code(directory: Path, format: str, base: Base) -> str:
    """Python that gives `model`, where this folder lies as it was written."""
    given = base.arguments or {}
    folder = repr(str(directory))
    auto = HEADS[base.head].auto_class if base.head else ""
    if format == "merged" and auto:
        # config.json, which lies in the folder, has all arguments but these.
        kept = ("dtype", "trust_remote_code")
        arguments = "".join(f", {k}={given[k]!r}" for k in kept if k in given)
        load = f"model = {auto}.from_pretrained({folder}{arguments})\n"
        return f"from transformers import {auto}\n\n{load}"
    if format == "merged":
        load = f"model.load_state_dict(load_file({str(directory / 'model.safetensors')!r}))\n"
        return f"from safetensors.torch import load_file\n\n{OTHER_BASE}model = base\n{load}"
    begin = OTHER_BASE
    if auto:
        arguments = "".join(f", {key}={value!r}" for key, value in given.items())
        begin = TRANSFORMERS_BASE.format(auto=auto, path=repr(base.path), arguments=arguments)
    load = f"model = PeftModel.from_pretrained(base, {folder})\n"
    return f"from peft import PeftModel\n{begin}{load}"


def _settings(run: Run, adapter: str) -> list[list[str]]:
    """(setting, value) rows: r, alpha, the sites and the data."""
    config, rows = run.config, []
    if config["adapter"]["method"] == "lora":
        sites = json.loads((run.path / adapter / "adapter.json").read_text())["sites"]
        for key in ("r", "alpha"):
            rows.append([key, _range([site[key] for site in sites.values()])])
        more = f" and {len(sites) - MAX_SITES} more" if len(sites) > MAX_SITES else ""
        rows.append([f"sites ({len(sites)})", ", ".join([*sites][:MAX_SITES]) + more])
    if trained := config.get("also_train"):
        rows.append(["trained in full", ", ".join(trained)])
    data = {k: v for k, v in config["data"].items() if k not in ("content", "_target_") and v}
    settings = ", ".join(f"{key}={value}" for key, value in data.items())
    return [*rows, ["data", f"{config['data']['_target_']}: {settings}"]]


def _range(values: list[float]) -> str:
    """`8`, or `2 to 8` where sites differ."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _measured(run: Run, adapter: str) -> list[str]:
    """The sections on metrics, on the run and on what training cost; those that it has."""
    parts = []
    if metrics := _metrics(run, adapter):
        rows = [[key, format_number(value)] for key, value in metrics.items()]
        parts.append(f"## Metrics\n\n{markdown([['metric', 'value'], *rows], 'l')}")
    tables = run_tables(run)
    of_run = "the run, whose adapter this one is cut from" if adapter != "adapter" else "the run"
    for title, heading in (("facts", f"Facts on {of_run}"), ("cost", "What training cost")):
        if title in tables:
            parts.append(f"## {heading}\n\n{markdown(tables[title], 'l')}")
    return parts
