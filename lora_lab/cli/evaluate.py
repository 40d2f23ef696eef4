"""`lora-lab evaluate`: texts that a finished run's model generates, and their metrics, later on.

What it finds is written beside the run's own files, which stay as they are.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from lora_lab import adapters
from lora_lab.adapters.stored import read_adapter
from lora_lab.analysis.updates import Updates
from lora_lab.cli.harness import check_installed, harness_metrics
from lora_lab.config.checks import error_messages
from lora_lab.config.command_line import parse_overrides
from lora_lab.config.generate import Generate
from lora_lab.config.schema import ConfigError, content_hash
from lora_lab.data.prompts import prompts
from lora_lab.runs import Run, write_atomic
from lora_lab.training.generate_checks import check_head, check_texts
from lora_lab.training.generation import Text, as_lines, generate
from lora_lab.training.heal import write_cut
from lora_lab.training.restore import Restored, restore
from lora_lab.training.run_record import package_versions

EVALUATIONS = "evaluations"
"""The folder of a run directory with what was evaluated later."""

ONLY_IN_TRAINING = ("every_n_steps", "step_rows")
"""Settings of `generate` that a finished run has no use for."""


@dataclass(frozen=True)
class Question:
    """What is asked of a finished run.

    `overrides` are settings of `generate` as KEY=VALUE, `rows` the most prompts. `cut`: the rank to
    which ΔW is cut; None: it is as trained. `data`: a file, folder or hub id with the columns of
    the run's data, whose rows are taken; None: the run's own. `harness`: tasks of lm-eval-harness,
    which are computed in the place of texts.
    """

    overrides: Sequence[str] = ()
    rows: int | None = None
    cut: int | None = None
    data: str | None = None
    harness: Sequence[str] = ()

    def settings(self, run: Run) -> Generate:
        """The run's `generate` settings, or their defaults, with the overrides.

        Raises ConfigError for a key that there is not, or a value that it cannot have.
        """
        content = dict(run.config.get("generate") or {})
        for override in parse_overrides(self.overrides):
            key = override.key_or_group.removeprefix("generate.")
            if key in ONLY_IN_TRAINING:
                raise ConfigError(f"generate.{key}: is for training, which has ended")
            content[key] = override.value()
        for key in ONLY_IN_TRAINING:
            content.pop(key, None)
        if self.rows is not None:
            content["rows"] = self.rows
        if self.data is not None:
            content["split"] = "val"
        try:
            return Generate.model_validate(content)
        except ValidationError as error:
            raise ConfigError("\n".join(error_messages(error, content, ["generate"]))) from None


@dataclass(frozen=True)
class Evaluation:
    """What was measured: metrics by name, in `file`; and the texts, of which a harness has none."""

    metrics: dict[str, float]
    file: Path
    texts: Sequence[Text] = ()


def evaluate(
    run: Run, question: Question, to: Path | None, trust: bool, bases_dir: Path | None
) -> Evaluation:
    """Evaluates a finished run, and writes a JSON file of the numbers and one of the texts.

    They are written to evaluations/ in the run directory, or to the folder `to`, by a name that the
    question decides: the same question again replaces them. Raises ValueError where the run cannot
    be restored, generates no texts, or the question does not fit it.
    """
    run.check_finished("evaluated")
    settings = question.settings(run)
    if question.harness:
        check_installed()
    with _restored(run, question.cut, trust, bases_dir) as restored:
        model, data = restored.model, _data(restored, question.data)
        trainer = restored.plan.single_device_trainer(None, [])
        about: dict[str, Any] = {"run": run.path.name, "cut": question.cut}
        if question.harness:
            check_head(data, model)
            about |= {"harness": list(question.harness), "rows": question.rows}
            model = adapters.merged(model) if adapters.names(model) else model
            model = model.to(trainer.strategy.root_device)
            arguments = question.harness, question.rows, settings.batch_rows
            metrics = harness_metrics(model, data.tokenizer, *arguments)
            return _write(run, to, about, metrics, ())
        check_texts(settings, data, model)
        chosen = prompts(data, settings.split, settings.rows)
        texts, metrics = generate(trainer, model, data, chosen, settings)
        content = (data.sources.get(settings.split) or data.sources["train"]).content
        about |= {"data": question.data, "content": content, "generate": settings.model_dump()}
        return _write(run, to, about, {f"generate/{n}": v for n, v in metrics.items()}, texts)


@contextmanager
def _restored(run: Run, cut: int | None, trust: bool, bases_dir: Path | None) -> Iterator[Restored]:
    """A context with the run's model, its ΔW cut to rank `cut` at each site where it is higher.

    An adapter's factors are cut as by adapter.cut; of a model that was trained in full W − W₀ is.
    """
    with ExitStack() as exits:
        if cut is None:
            yield restore(run, trust, bases_dir)
        elif (adapter := run.path / "adapter").is_dir():
            updates = read_adapter(adapter).updates.values()
            _check_cut(cut, [update.r for update in updates])
            folder = exits.enter_context(TemporaryDirectory())
            write_cut(adapter, Path(folder), cut)
            yield restore(run, trust, bases_dir, folder)
        else:
            restored = restore(run, trust, bases_dir)
            sites = restored.plan.sites
            updates = Updates(restored.model, restored.base, sites)
            svds = {site.name: updates.svd(site.name) for site in sites}
            _check_cut(cut, [svd.k for svd in svds.values()])
            write = exits.enter_context(updates.cut_weights(svds))
            write({site: min(cut, svd.k) for site, svd in svds.items()})
            yield restored


def _check_cut(cut: int, ranks: list[int]) -> None:
    """Raises ConfigError where no site's ΔW is of a higher rank than `cut`."""
    if cut >= (highest := max(ranks, default=0)):
        raise ConfigError(f"--cut {cut}: must be below {highest}, the highest rank of ΔW")


def _data(restored: Restored, path: str | None) -> Any:
    """The run's data; or that of another file, folder or hub id, as its validation set."""
    plan = restored.plan
    if path is None:
        return plan.data("adapt")
    changes = {"val": path, "val_limit": None}
    cfg = plan.cfg.model_copy(update={"data": plan.cfg.data.model_copy(update=changes)})
    try:
        return replace(plan, cfg=cfg).data("adapt")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--data {path}: {str(error).removeprefix('val=')}") from None


def _write(
    run: Run,
    to: Path | None,
    about: dict[str, Any],
    metrics: dict[str, float],
    texts: Sequence[Text],
) -> Evaluation:
    """Writes an evaluation: the texts first, so that a JSON file's texts are there."""
    folder = to or run.path / EVALUATIONS
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link: --to DIR writes elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    name = _name(about)
    content = {**about, "metrics": metrics, "packages": package_versions()}
    if texts:
        lines = as_lines(texts)
        write_atomic(folder / f"{name}.jsonl", lines)
        content["texts"] = {"file": f"{name}.jsonl", "sha256": hashlib.sha256(lines).hexdigest()}
    file = folder / f"{name}.json"
    write_atomic(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return Evaluation(metrics, file, texts)


def _name(about: dict[str, Any]) -> str:
    """The name of an evaluation's files: what was asked in short, and a hash of all of it."""
    if "harness" in about:
        parts = ["harness"]
    else:
        parts = [Path(about["data"]).stem if about["data"] else about["generate"]["split"]]
    parts += [f"cut{about['cut']}"] if about["cut"] else []
    asked = {key: value for key, value in about.items() if key not in ("run", "data")}
    return "-".join([*parts, content_hash(asked)[:6]])
