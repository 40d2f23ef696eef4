"""A W&B sweep file as it is read, with the overrides of the command line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_lab.config import compose
from lora_lab.config.schema import ConfigError, nearest
from lora_lab.sweeps.search_space import Parameter, parse_parameter

Goal = Literal["minimize", "maximize"]

METHODS = ("grid", "random", "bayes")
KEYS = ("method", "parameters", "metric", "run_cap", "early_terminate", "program", "command")
KEYS += ("name", "description", "project", "entity", "controller")
"""What a sweep file may say; the second line is W&B's own affair, and means nothing here."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file with the command line's overrides: what is fixed, and what is swept."""

    method: str
    metric: str | None
    goal: Goal
    run_cap: int | None
    early_terminate: bool
    fixed_overrides: list[str]
    space: dict[str, Parameter]
    """By name, in the order of the alphabet, which is W&B's."""
    hydra_overrides: list[str]
    """Overrides that are Hydra's own, as hydra/launcher."""

    def overrides_at(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of one run."""
        swept = [f"{key}={value}" for key, value in values.items()]
        return compose.hydra_arguments([*self.fixed_overrides, *swept])

    def extreme_points(self) -> Iterable[dict[str, Any]]:
        """Each parameter at its outermost values, the others at their first."""
        first = {key: swept.extremes[0] for key, swept in self.space.items()}
        yield first
        for key, swept in self.space.items():
            yield from ({**first, key: value} for value in swept.extremes[1:])

    def grid_points(self) -> Iterable[dict[str, Any]]:
        """The product of all values, the last parameter's changing first."""
        for values in product(*(swept.grid_values or [] for swept in self.space.values())):
            yield dict(zip(self.space, values, strict=True))


def read_sweep(path: Path, overrides: Sequence[str]) -> Sweep:
    """The sweep file, its parameters replaced by the overrides of their names.

    Raises ConfigError, which does not name the file, and OSError.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError("must be a mapping with method and parameters")
    for key in content:
        if key not in KEYS:
            raise ConfigError(
                f"{key}: there is no such key{nearest(key, KEYS)} ({', '.join(KEYS)})"
            )
    method = content.get("method")
    if method not in METHODS:
        known = f"{nearest(method, METHODS)} (there are {', '.join(METHODS)})"
        raise ConfigError(f"method={method}: there is no such method{known}")
    _check_program(content)
    metric, goal = _metric(content.get("metric"))
    if method == "bayes" and metric is None:
        raise ConfigError("metric: must be given, bayes needs it ({name: val/loss})")
    cap = content.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise ConfigError(f"run_cap={cap}: must be a whole number of runs")
    said = content.get("parameters")
    if not isinstance(said, dict) or not said:
        raise ConfigError("parameters: must be given, {adapter.r: {values: [1, 2]}}")
    # What tracking the agents' runs have is not for runs that have no agent.
    said = {str(k): v for k, v in said.items() if (k, v) != ("tracking", {"value": "online"})}
    fixed, space = _parameters(said, method, overrides)
    early, hydra = bool(content.get("early_terminate")), [o for o in overrides if _is_hydras(o)]
    return Sweep(method, metric, goal, cap, early, fixed, space, hydra)


def _parameters(
    said: dict[str, Any], method: str, overrides: Sequence[str]
) -> tuple[list[str], dict[str, Parameter]]:
    """What is fixed, as overrides, and what is swept."""
    space: dict[str, Parameter] = {}
    for key, value in said.items():
        if not all(c.isalnum() or c in "_.-" for c in key):
            raise ConfigError(f"parameters.{key}: W&B takes letters, digits and _ . - in a name")
        try:
            space[key] = parse_parameter(value)
            for text in (space[key].grid_values or []) + space[key].extremes:
                if isinstance(text, str) and len(_values(f"{key}={text}")) != 1:
                    raise ConfigError(f"{text}: would be read as a list of runs; write one value")
        except ConfigError as error:
            raise ConfigError(f"parameters.{key}: {error}") from None
    given: list[str] = []
    for override in overrides:
        if _is_hydras(override):
            continue
        key, values = override.partition("=")[0], _values(override)
        space.pop(key.lstrip("+~"), None)
        if len(values) > 1:
            space[key] = parse_parameter({"values": values})
        else:
            given.append(override)
    for key, found in space.items():
        if method == "grid" and found.grid_values is None:
            raise ConfigError(
                f"parameters.{key}: a grid takes value, values, int_uniform or q_uniform; "
                "other distributions are for random and bayes"
            )
    constant = {
        key: found.extremes[0] for key, found in space.items() if len({*found.extremes}) == 1
    }
    fixed = [f"{key}={value}" for key, value in constant.items()] + given
    return fixed, {key: space[key] for key in sorted(space) if key not in constant}


def _is_hydras(override: str) -> bool:
    return override.startswith(("hydra.", "hydra/"))


def _values(override: str) -> list[str]:
    """The value of an override, or each of those that it sweeps, as text."""
    points = compose.sweep_points(compose.hydra_arguments([override]))
    return [point[0].partition("=")[2] for point in points]


def _check_program(content: Mapping[str, Any]) -> None:
    words = [str(content.get("program", "")), *map(str, content.get("command") or [])]
    if any(words) and not any("lora_lab.train" in word or "lora-lab" in word for word in words):
        raise ConfigError(f"program={words[0]}: this runs lora_lab.train, and no other program")


def _metric(said: Any) -> tuple[str | None, Goal]:
    if said is None:
        return None, "minimize"
    if not isinstance(said, dict) or "name" not in said:
        raise ConfigError(f"metric={said}: must be {{name: val/loss, goal: minimize}}")
    for key in said:
        if key not in ("name", "goal"):
            hint = nearest(key, ("name", "goal"))
            raise ConfigError(f"metric.{key}: is not done here{hint}; a metric has name and goal")
    name, goal = str(said["name"]), said.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        known = nearest(goal, ("minimize", "maximize"))
        raise ConfigError(f"metric.goal={goal}: must be minimize or maximize{known}")
    better = {"loss": "minimize", "accuracy": "maximize"}.get(name.rpartition("/")[2], goal)
    if goal != better:
        raise ConfigError(f"metric.goal={goal}: {name} is better the other way; goal: {better}")
    return name, goal
