"""reference/metrics.md: each number that a run logs."""

from docs.pages.tables import code, table
from lora_lab.report.metric_meanings import MEASURES, METRICS, TASK_METRICS

ABOUT = """\
# Metrics

Each number that a run writes to `metrics.jsonl` and to W&B, by its name. `<site>` is the name of an
adapted weight, `<metric>` one of the metrics of the task, `<measure>` one of the measures of ΔW,
both below. Each row has `step`, the optimizer steps that were taken, and most have `epoch`. Times
are never twice the same: they are in `cost.json` and W&B, not in `metrics.jsonl`.
[Measures](../measures.md) explains what is behind those of ΔW.
"""


def text() -> str:
    """The page."""
    metrics = [[code(m.name), m.unit, m.meaning, m.when] for m in METRICS]
    names = ["name", "unit", "meaning"]
    return (
        f"{ABOUT}\n## Names\n\n{table([*names, 'when'], metrics)}"
        "\n## Metrics of a task: `<metric>` { #task-metrics }\n\n"
        f"{table(names, [[code(m.name), m.unit, m.meaning] for m in TASK_METRICS])}"
        "\n## Measures of ΔW: `<measure>` { #measures }\n\n"
        f"{table(names, [[code(m.name), m.unit, m.meaning] for m in MEASURES])}"
    )
