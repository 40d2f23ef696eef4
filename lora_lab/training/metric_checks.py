"""Checks that the metrics and the loss that a config names are those of its task."""

from lora_lab.config.schema import Config, ConfigError, nearest
from lora_lab.data import Data
from lora_lab.training.tasks import TASKS, metric_names


def check_metrics(cfg: Config, data: Data) -> None:
    """Raises ConfigError for a metric that validation does not log, and for labels to be smoothed
    where a task has none.
    """
    try:
        logged = ["val/loss", *(f"val/{name}" for name in metric_names(data.task, data.metrics))]
    except ValueError as error:
        raise ConfigError(f"data.{error}") from None
    try:
        TASKS[data.task].training_loss(cfg.label_smoothing)
    except ValueError as error:
        raise ConfigError(f"label_smoothing={cfg.label_smoothing:g}: {error}") from None
    wanted = {"select": cfg.select.removeprefix("best ")} if cfg.select != "last" else {}
    if cfg.early_stopping:
        wanted["early_stopping.metric"] = cfg.early_stopping.metric
    for key, metric in wanted.items():
        if metric not in logged:
            value = cfg.select if key == "select" else metric
            raise ConfigError(
                f"{key}={value}: validation logs {', '.join(logged)}{nearest(metric, logged)} "
                "(data.metrics chooses others)"
            )
