"""`lora-lab export`: writes a finished run's adapter as PEFT loads it, or its merged model."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lora_lab import adapters
from lora_lab.adapters import AdapterError
from lora_lab.cli import model_card
from lora_lab.models.transformers_config import HEADS
from lora_lab.run_files import CUTS, HEALED
from lora_lab.runs import Run
from lora_lab.training.restore import Restored, restore

FORMATS = {"peft": "adapter_model.safetensors", "merged": "model.safetensors"}
"""Format → the main file of what it writes."""

TASK_TYPES = {"classification": "SEQ_CLS", "language": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
TASK_TYPES |= {"tokens": "TOKEN_CLS"}
"""model.head → PEFT's word for it."""


def export(
    run: Run,
    format: str,
    directory: Path,
    trust: bool = False,
    bases_dir: Path | None = None,
    adapter: str = "adapter",
) -> Path:
    """Writes a run's adapter (peft), or its model with ΔW added to the weights (merged).

    `adapter` is the folder in the run directory with the adapter, as `cut/8` of a smaller one.
    Returns the path of the file written. A fully fine-tuned model is written as it was stored. A
    whole model of transformers has its config and tokenizer beside it, for `from_pretrained`.
    Raises AdapterError where the run has no such adapter, the format cannot represent it or the
    file exists, and what `restore` raises: all files are compared with their records first.
    """
    path = directory / FORMATS[format]
    if path.exists():
        raise AdapterError(f"{path} exists: give a folder without one")
    if existing := next((p for p in (directory, *directory.parents) if p.is_file()), None):
        raise AdapterError(f"{existing} is a file: give a folder, which is made if need be")
    run.check_finished("exported")
    method = run.config["adapter"]["method"]
    if method == "full" and format == "merged":
        directory.mkdir(parents=True, exist_ok=True)
        save_file(load_file(run.path / "model" / "model.safetensors"), path, {"format": "pt"})
        base = model_card.Base()
        if run.config["base"]["method"] == "pretrained":
            restored = restore(run, trust, bases_dir)
            _save_config(restored.model, restored, directory)
            base = _base_of(restored)
        model_card.write_model_card(run, directory, format, base, adapter)
        return path
    if method != "lora" and not (method == "none" and run.config.get("also_train")):
        raise AdapterError(f"adapter={method}: the run has no adapter to write")
    if not (run.path / adapter).is_dir():
        smaller = [p for name in (CUTS, HEALED) for p in sorted(run.path.glob(f"{name}/*"))]
        names = ", ".join(p.relative_to(run.path).as_posix() for p in smaller) or "none"
        raise AdapterError(f"{run.path} has no {adapter}; smaller adapters in it: {names}")
    restored = restore(run, trust, bases_dir, adapter)
    model = restored.model
    if format == "peft":
        adapters.save_peft(model, directory, **_about_base(restored))
    else:
        directory.mkdir(parents=True, exist_ok=True)
        # Tied weights are one tensor under two keys, which safetensors refuses: each gets a copy.
        merged = adapters.merged(model)
        state = {key: value.clone() for key, value in merged.state_dict().items()}
        save_file(state, path, {"format": "pt"})
        _save_config(merged, restored, directory)
    model_card.write_model_card(run, directory, format, _base_of(restored), adapter)
    return path


def _base_of(restored: Restored) -> model_card.Base:
    """What a model card says of the base; with a head and arguments where transformers loads it."""
    plan, model = restored.plan, restored.model
    if plan.cfg.base.method != "pretrained":
        return model_card.Base()
    given = plan.cfg.model.arguments
    if given.get("head") not in HEADS or given.get("quantization"):
        return model_card.Base(given["path"])
    arguments: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}
    if HEADS[given["head"]].has_labels:
        config: Any = model.config
        arguments["num_labels"] = config.num_labels
    renamed = {"revision": "revision", "remote_code": "trust_remote_code"}
    renamed["new_head"] = "ignore_mismatched_sizes"
    arguments |= {theirs: given[ours] for ours, theirs in renamed.items() if given.get(ours)}
    return model_card.Base(given["path"], given["head"], arguments)


def _save_config(model: Any, restored: Restored, directory: Path) -> None:
    """Writes config.json, with the classes' names, and the tokenizer of a transformers model."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        data = restored.plan.data("adapt")
        if names := getattr(data, "class_names", None):
            config.id2label = dict(enumerate(names))
            config.label2id = {name: i for i, name in enumerate(names)}
        config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
        if tokenizer := getattr(data, "tokenizer", None):
            tokenizer.save_pretrained(directory)


def _about_base(restored: Restored) -> dict[str, str | None]:
    """What PEFT's AutoPeftModel classes read: where the base lies, and what its head is for.

    Raises AdapterError where the base has a new head that the adapter does not hold.
    """
    plan = restored.plan
    if plan.cfg.base.method != "pretrained":
        return {}
    if plan.base_seed is not None:
        new = [name for name in plan.new_parameters if name not in plan.also_trained]
        raise AdapterError(
            f"{', '.join(new)}: drawn anew and not trained, so that neither the base nor the "
            "adapter holds it; also_train makes it a part of the adapter, --format merged writes it"
        )
    arguments = plan.cfg.model.arguments
    return {"base_model": arguments["path"], "task_type": TASK_TYPES.get(arguments.get("head", ""))}
