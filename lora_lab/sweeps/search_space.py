"""The search space of a W&B sweep file: each form of a parameter, as what Optuna draws."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lora_lab.config.schema import ConfigError, nearest

TAIL = 0.001
"""The share of a normal distribution that is not drawn, at each of its two ends."""

Keys = dict[str, float | None]
BOUNDS: Keys = {"min": None, "max": None}
MOMENTS: Keys = {"mu": 0.0, "sigma": 1.0}
STEP: Keys = {"q": 1}
FORMS: dict[str, Keys] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": BOUNDS,
    "uniform": BOUNDS,
    "q_uniform": {**BOUNDS, **STEP},
    "log_uniform": BOUNDS,
    "q_log_uniform": {**BOUNDS, **STEP},
    "inv_log_uniform": BOUNDS,
    "log_uniform_values": BOUNDS,
    "q_log_uniform_values": {**BOUNDS, **STEP},
    "inv_log_uniform_values": BOUNDS,
    "normal": MOMENTS,
    "q_normal": {**MOMENTS, **STEP},
    "log_normal": MOMENTS,
    "q_log_normal": {**MOMENTS, **STEP},
}
"""W&B's distributions: what each takes, with its default, or None where it must be given."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a sweep: its values in a grid, or what is drawn and what a draw stands for.

    `grid` is None where a grid cannot have it, `ends` are its outermost values, or all.
    """

    distribution: BaseDistribution
    value_of_draw: Callable[[Any], Any]
    extremes: list[Any]
    grid_values: list[Any] | None = None


def parse_parameter(said: Any) -> Parameter:
    """A parameter as W&B writes it. Raises ConfigError, which does not name the parameter."""
    if not isinstance(said, dict):
        raise ConfigError(f"{said}: must say value, values, or min and max")
    if "parameters" in said:
        raise ConfigError(
            "nested parameters reach a program as one dict, which no setting is; write the inner "
            "keys with dots (adapter.r: {values: [1, 2]})"
        )
    kind = said.get("distribution") or _implied(said)
    if kind in ("beta", "q_beta"):
        raise ConfigError(f"distribution={kind}: is not drawn here; uniform and normal are")
    if kind not in FORMS:
        known = f"{nearest(kind, FORMS)} (there are {', '.join(FORMS)})"
        raise ConfigError(f"distribution={kind}: there is no such distribution{known}")
    given = {key: value for key, value in said.items() if key != "distribution"}
    for key in given:
        if key not in FORMS[kind]:
            takes = ", ".join(FORMS[kind])
            raise ConfigError(f"{key}: {kind} has no such key{nearest(key, FORMS[kind])} ({takes})")
    full = {**FORMS[kind], **given}
    if missing := [key for key, value in full.items() if key not in given and value is None]:
        raise ConfigError(f"{missing[0]}: must be given, {kind} needs it")
    if kind == "constant":
        return _listed([full["value"]])
    if kind.startswith("categorical"):
        return _listed(full["values"], full.get("probabilities"))
    for key, value in full.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = ", and in YAML 1e-4 is text: 1.0e-4 is the number" if _is_number(value) else ""
            raise ConfigError(f"{key}={value}: must be a number{hint}")
    return _drawn(kind, full)


def _implied(said: dict[str, Any]) -> str:
    """The distribution of a parameter that names none."""
    if "value" in said:
        return "constant"
    if "values" in said or "probabilities" in said:
        return "categorical_w_probabilities" if "probabilities" in said else "categorical"
    if "min" in said or "max" in said:
        whole = all(isinstance(said.get(key), int) for key in BOUNDS)
        return "int_uniform" if whole else "uniform"
    words = ("value", "values", "min", "max", "distribution")
    hint = nearest(next(iter(said), ""), words)
    raise ConfigError(f"{said}: must say value, values, or min and max{hint}")


def _listed(values: Any, probabilities: Any = None) -> Parameter:
    """One of several values, as the text that the agent of W&B would pass on."""
    if not isinstance(values, list) or not values:
        raise ConfigError(f"values={values}: must be a list of values, [1, 2]")
    for value in values:
        if value is None or value == "":
            raise ConfigError('null: reaches a program as "None"; write "null", in quotes')
        if isinstance(value, dict):
            raise ConfigError(f"{value}: a dict is no setting; give its keys one by one, with dots")
    texts = list(dict.fromkeys(map(str, values)))
    if probabilities is None:
        return Parameter(CategoricalDistribution(texts), str, texts, texts)
    shares = probabilities if isinstance(probabilities, list) else []
    fits = len(shares) == len(values) and all(isinstance(p, int | float) and p >= 0 for p in shares)
    if not fits or not math.isclose(sum(shares), 1):
        raise ConfigError(
            f"probabilities={probabilities}: must be {len(values)} shares that add up to 1"
        )
    upto = list(accumulate(shares))

    def value(u: float) -> str:
        return str(values[min(sum(u >= edge for edge in upto), len(values) - 1)])

    return Parameter(FloatDistribution(0, 1), value, texts)


def _drawn(kind: str, of: dict[str, Any]) -> Parameter:
    """A number from a range or a normal distribution, in steps of q where the kind begins so."""
    plain = kind.removeprefix("q_")
    low, high, q = of.get("min", 0), of.get("max", 1), of.get("q")
    if low > high:
        raise ConfigError(f"min={low}: must be at most max={high}")
    if q is not None and q <= 0:
        raise ConfigError(f"q={q}: must be more than 0")
    value: Callable[[Any], Any] = float
    if plain == "int_uniform":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ConfigError(f"min={low} max={high}: must be whole numbers with int_uniform")
        return Parameter(IntDistribution(low, high), int, [low, high], [*range(low, high + 1)])
    if plain == "uniform":
        draws = FloatDistribution(low, high)
    elif "log_uniform" in plain:
        if not plain.endswith("_values"):  # the bounds are exponents of e
            low, high = (-high, -low) if plain.startswith("inv") else (low, high)
            low, high = math.exp(low), math.exp(high)
        elif low <= 0:
            raise ConfigError(f"min={low}: must be more than 0 with {kind}")
        draws = FloatDistribution(low, high, log=True)
    else:
        if of["sigma"] <= 0:
            raise ConfigError(f"sigma={of['sigma']}: must be more than 0")
        normal = NormalDist(of["mu"], of["sigma"])
        draws = FloatDistribution(TAIL, 1 - TAIL)
        value = normal.inv_cdf
        if plain == "log_normal":
            value = lambda u: math.exp(normal.inv_cdf(u))  # noqa: E731
    if q is None:
        return Parameter(draws, value, [value(draws.low), value(draws.high)])

    def step(drawn: float) -> float:
        # Whole where q is; and 0.3, not 0.30000000000000004.
        return type(q)(_short(round(value(drawn) / q) * q))

    grid = [*map(_short, np.arange(low, high, q).tolist())] if kind == "q_uniform" else None
    return Parameter(draws, step, [step(draws.low), step(draws.high)], grid)


def _short(x: float) -> float:
    return type(x)(f"{x:.12g}")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
