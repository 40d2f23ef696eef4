"""A W&B sweep file as it is read, with the overrides of the command line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_lab.config import compose
from lora_lab.config.command_line import MOST_RUNS
from lora_lab.config.schema import ConfigError, nearest
from lora_lab.report.epochs import goal_of
from lora_lab.sweeps.search_space import Space, parse_parameter

Goal = Literal["minimize", "maximize"]

METHODS = ("grid", "random", "bayes")
KEYS = ("method", "parameters", "metric", "run_cap", "early_terminate", "program", "command")
KEYS += ("name", "description", "project", "entity", "controller")
"""The keys that a sweep file may have. Those of the second line are for W&B and ignored here."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file, with the overrides of the command line in place of its parameters."""

    method: str
    metric: str | None
    goal: Goal
    run_cap: int | None
    early_terminate: bool
    fixed_overrides: list[str]
    """Overrides of all runs: parameters with one value, and the command line's."""
    space: Space
    """The swept parameters, in alphabetical order as W&B takes them."""
    hydra_overrides: list[str]
    """Overrides of Hydra itself, as hydra/launcher=joblib."""

    def overrides_at(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of the run with these values of the swept parameters."""
        swept = [f"{key}={value}" for key, value in values.items()]
        return compose.hydra_arguments([*self.fixed_overrides, *swept])

    def extreme_points(self) -> Iterable[dict[str, Any]]:
        """Points to check before a search: one parameter at its extremes, the others at a first.

        With r from 1 to 8 and lr from 0.1 to 1 they are (1, 0.1), (8, 0.1) and (1, 1).
        """
        first = {key: parameter.extremes[0] for key, parameter in self.space.items()}
        yield first
        for key, parameter in self.space.items():
            yield from ({**first, key: value} for value in parameter.extremes[1:])

    def grid_points(self) -> Iterable[dict[str, Any]]:
        """The product of all values. The last parameter changes from one point to the next."""
        values_by_parameter = (parameter.grid_values or [] for parameter in self.space.values())
        for values in product(*values_by_parameter):
            yield dict(zip(self.space, values, strict=True))


def read_sweep(path: Path, overrides: Sequence[str]) -> Sweep:
    """Reads a sweep file. An override replaces the parameter of its name.

    Raises ConfigError with the key that is wrong, but without the file's name, and OSError.
    """
    content = _read_yaml(path)
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
    specs = content.get("parameters")
    if not isinstance(specs, dict) or not specs:
        raise ConfigError("parameters: must be given, {adapter.r: {values: [1, 2]}}")
    # Our files ask W&B's agents for tracking=online. Runs here have no agent and may have no
    # account, so that the user's tracking setting stands.
    specs = {str(k): v for k, v in specs.items() if (k, v) != ("tracking", {"value": "online"})}
    fixed, space = _with_overrides(_parse_parameters(specs), method, overrides)
    early_terminate = bool(content.get("early_terminate"))
    hydra = [override for override in overrides if _is_hydras(override)]
    return Sweep(method, metric, goal, cap, early_terminate, fixed, space, hydra)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's content, a mapping with no unknown key."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ConfigError("is no text") from None
    if not isinstance(content, dict):
        raise ConfigError("must be a mapping with method and parameters")
    if unknown := [key for key in content if key not in KEYS]:
        known = f"{nearest(unknown[0], KEYS)} ({', '.join(KEYS)})"
        raise ConfigError(f"{unknown[0]}: there is no such key{known}")
    return content


def _parse_parameters(specs: dict[str, Any]) -> Space:
    """The parameters of the file by name, each checked to be one value per run."""
    space: Space = {}
    for key, spec in specs.items():
        if not all(c.isalnum() or c in "_.-" for c in key):
            raise ConfigError(f"parameters.{key}: W&B takes letters, digits and _ . - in a name")
        try:
            space[key] = parse_parameter(spec)
            for text in space[key].extremes:  # of a list they are all its values
                # Hydra would read the text "olora,pissa" as a sweep over two values.
                if isinstance(text, str) and len(_override_values(f"{key}={text}")) != 1:
                    raise ConfigError(f"{text}: would be read as a list of runs; write one value")
        except ConfigError as error:
            raise ConfigError(f"parameters.{key}: {error}") from None
    return space


def _with_overrides(space: Space, method: str, overrides: Sequence[str]) -> tuple[list[str], Space]:
    """The fixed overrides and the swept parameters, after the command line's overrides.

    `adapter.r=4` fixes a parameter; `adapter.r=2,4` sweeps over these values in its place.
    """
    command_line: list[str] = []
    for override in overrides:
        if _is_hydras(override):
            continue
        key, values = override.partition("=")[0], _override_values(override)
        space.pop(key.lstrip("+~"), None)
        if len(values) > 1:
            space[key] = parse_parameter({"values": values})
        else:
            command_line.append(override)
    for key, parameter in space.items():
        if method == "grid" and parameter.grid_values is None:
            raise ConfigError(
                f"parameters.{key}: a grid takes value, values, int_uniform or q_uniform "
                f"(of {MOST_RUNS} values at most); other distributions are for random and bayes"
            )
    constant = {key: p.extremes[0] for key, p in space.items() if len({*p.extremes}) == 1}
    fixed = [f"{key}={value}" for key, value in constant.items()] + command_line
    return fixed, {key: space[key] for key in sorted(space) if key not in constant}


def _is_hydras(override: str) -> bool:
    return override.startswith(("hydra.", "hydra/"))


def _override_values(override: str) -> list[str]:
    """The value of an override as text, or each of the values it sweeps: r=2,4 gives [2, 4]."""
    points = compose.sweep_points(compose.hydra_arguments([override]))
    return [point[0].partition("=")[2] for point in points]


def _check_program(content: Mapping[str, Any]) -> None:
    words = [str(content.get("program", "")), *map(str, content.get("command") or [])]
    if any(words) and not any("lora_lab.train" in word or "lora-lab" in word for word in words):
        raise ConfigError(f"program={words[0]}: this runs lora_lab.train, and no other program")


def _metric(spec: Any) -> tuple[str | None, Goal]:
    """The name and the goal of the file's metric; None and minimize where it has none."""
    if spec is None:
        return None, "minimize"
    if not isinstance(spec, dict) or "name" not in spec:
        raise ConfigError(f"metric={spec}: must be {{name: val/loss, goal: minimize}}")
    if unknown := [key for key in spec if key not in ("name", "goal")]:
        key, hint = unknown[0], nearest(unknown[0], ("name", "goal"))
        raise ConfigError(f"metric.{key}: is not supported here{hint}; a metric has name and goal")
    name, goal = str(spec["name"]), spec.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        known = nearest(goal, ("minimize", "maximize"))
        raise ConfigError(f"metric.goal={goal}: must be minimize or maximize{known}")
    better = goal_of(name)
    if better is not None and goal != better:
        raise ConfigError(f"metric.goal={goal}: {name} is better the other way; goal: {better}")
    return name, goal
