"""Two runs side by side: what differs of their configs, their results and their environments."""

import json
from typing import Any

from lora_lab.report.cells import flat, plain, read
from lora_lab.report.tables import Rows, number
from lora_lab.runs import Run


def difference(one: Run, other: Run) -> dict[str, Rows]:
    """The tables of what differs, by title; a table with its head alone where nothing does.

    A result's relative difference is over the first run's value.
    """
    old, new = read(one), read(other)
    results: Rows = [["metric", "1", "2", "difference", "relative"]]
    for key in {**old.finals, **new.finals}:
        a, b = old.finals.get(key), new.finals.get(key)
        if a != b:
            change = relative = "–"
            if a is not None and b is not None:
                change = f"{b - a:+.5g}"
                relative = f"{(b - a) / abs(a):+.2%}" if a else "–"
            results.append([key, number(a), number(b), change, relative])
    return {
        "config": _differ("key", flat(old.config), flat(new.config)),
        "results": results,
        "environment": _differ("what", _environment(one), _environment(other)),
    }


def _differ(what: str, one: dict[str, Any], other: dict[str, Any]) -> Rows:
    rows: Rows = [[what, "1", "2"]]
    for key in {**one, **other}:
        if (key in one, one.get(key)) != (key in other, other.get(key)):
            rows.append([key, *(plain(v[key]) if key in v else "–" for v in (one, other))])
    return rows


def _environment(run: Run) -> dict[str, Any]:
    try:
        return flat(json.loads((run.path / "env.json").read_text()))
    except (FileNotFoundError, ValueError):
        return {}
