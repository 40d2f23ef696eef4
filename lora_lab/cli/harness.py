"""Tasks of lm-eval-harness on a model in memory: `lora-lab evaluate --harness`."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lora_lab.config.errors import ConfigError, nearest
from lora_lab.models.transformers_config import quiet


def harness_metrics(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], rows: int | None, batch_rows: int
) -> dict[str, float]:
    """The metrics of tasks by lm-eval-harness, as `harness/TASK/METRIC`, and their errors.

    A task is one that the harness knows by name, or the path of a YAML file of one's own. `rows`
    are the most of each task (None: all), `batch_rows` those of a batch. The model has no adapters.
    Raises ConfigError for a task that the harness does not know.
    """
    import lm_eval  # pyright: ignore
    from lm_eval.models import huggingface  # pyright: ignore
    from lm_eval.tasks import TaskManager  # pyright: ignore

    model_class: Any = huggingface.HFLM  # decorators hide its arguments, and those of the function
    evaluate: Any = lm_eval.simple_evaluate
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_name_in(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=[str(file.resolve().parent) for file in files] or None)
    for name in names:
        if name not in (known := manager.all_tasks):
            hint = nearest(name, known)
            raise ConfigError(f"--harness {name}: lm-eval-harness has no such task{hint}")
    with quiet():
        of_model = model_class(model.eval(), tokenizer=tokenizer, batch_size=batch_rows)
        results = evaluate(of_model, tasks=names, task_manager=manager, limit=rows)
    return {
        f"harness/{task}/{metric.removesuffix(',none')}": value
        for task, of_task in results["results"].items()
        for metric, value in of_task.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def check_installed() -> None:
    """Raises ConfigError, with the command that installs it, where there is no harness."""
    if find_spec("lm_eval") is None:
        raise ConfigError("--harness: needs lm-eval, pip install 'lora_lab[harness]'")


def _name_in(file: Path) -> str:
    """The name of the task that a YAML file defines. Raises ConfigError."""
    try:
        return str(yaml.load(file.read_text(), _TaskLoader)["task"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"--harness {file}: is no file of a task ({error!r})") from None


class _TaskLoader(yaml.SafeLoader):
    """Reads a task's YAML and leaves its tags, as !function, unread."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
