"""Two runs side by side: what differs of their configs, their results and their environments."""

import json
from typing import Any

from lora_lab.report.cells import flatten_config, full_text, read_run
from lora_lab.report.tables import Rows, format_number
from lora_lab.runs import Run


def difference_tables(one: Run, other: Run) -> dict[str, Rows]:
    """The tables of what differs, by title; a table with its head alone where nothing does.

    A result's relative difference is over the first run's value.
    """
    old, new = read_run(one), read_run(other)
    results: Rows = [["metric", "1", "2", "difference", "relative"]]
    for key in {**old.metrics, **new.metrics}:
        a, b = old.metrics.get(key), new.metrics.get(key)
        if a != b:
            change = relative = "–"
            if a is not None and b is not None:
                change = f"{b - a:+.5g}"
                relative = f"{(b - a) / abs(a):+.2%}" if a else "–"
            results.append([key, format_number(a), format_number(b), change, relative])
    return {
        "config": _differ("key", flatten_config(old.config), flatten_config(new.config)),
        "results": results,
        "environment": _differ("what", _environment(one), _environment(other)),
    }


def _differ(what: str, one: dict[str, Any], other: dict[str, Any]) -> Rows:
    rows: Rows = [[what, "1", "2"]]
    for key in {**one, **other}:
        if (key in one, one.get(key)) != (key in other, other.get(key)):
            rows.append([key, *(full_text(v[key]) if key in v else "–" for v in (one, other))])
    return rows


def _environment(run: Run) -> dict[str, Any]:
    try:
        return flatten_config(json.loads((run.path / "env.json").read_text()))
    except (FileNotFoundError, ValueError):
        return {}
