"""Two runs side by side: where their configs, results and environments differ."""

from typing import Any

from lora_lab.report.cells import flatten_config, read_run
from lora_lab.report.setting_values import full_text
from lora_lab.report.tables import Rows, format_number
from lora_lab.runs import Run


def difference_tables(first: Run, second: Run) -> dict[str, Rows]:
    """Title → table of what differs: config, results, cost and environment.

    A table without rows has its column titles alone. The relative difference of a result is over
    the first run's value.
    """
    one, other = read_run(first), read_run(second)
    # What training cost is never twice the same, and says nothing of the results.
    results, costs = (
        [
            {key: value for key, value in run.metrics.items() if key.startswith("cost/") is wanted}
            for run in (one, other)
        ]
        for wanted in (False, True)
    )
    environments = [flatten_config(run.environment) for run in (first, second)]
    return {
        "config": _differing_rows("key", flatten_config(one.config), flatten_config(other.config)),
        "results": _differing_results(*results),
        "cost": _differing_results(*costs),
        "environment": _differing_rows("what", *environments),
    }


def _differing_results(first: dict[str, float], second: dict[str, float]) -> Rows:
    rows: Rows = [["metric", "1", "2", "difference", "relative"]]
    for key in {**first, **second}:
        a, b = first.get(key), second.get(key)
        if a != b:
            change = relative = "–"
            if a is not None and b is not None:
                change = f"{b - a:+.5g}"
                relative = f"{(b - a) / abs(a):+.2%}" if a else "–"
            rows.append([key, format_number(a), format_number(b), change, relative])
    return rows


def _differing_rows(column: str, first: dict[str, Any], second: dict[str, Any]) -> Rows:
    """A row for each key whose values differ or that only one of the two has."""
    rows: Rows = [[column, "1", "2"]]
    for key in {**first, **second}:
        if (key in first, first.get(key)) != (key in second, second.get(key)):
            rows.append([key, *(full_text(d[key]) if key in d else "–" for d in (first, second))])
    return rows
