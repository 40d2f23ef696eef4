"""The search space of a W&B sweep file: each form of a parameter, as a distribution for Optuna.

Optuna draws uniform numbers (on a log scale too) and choices. W&B's other distributions come
from a uniform draw by the inverse of their cumulative distribution function: `value_of_draw`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any

import numpy as np
from optuna import distributions

from lora_lab.config.command_line import MOST_RUNS
from lora_lab.config.schema import ConfigError, nearest

TAIL = 0.001
"""The probability of each of a normal distribution's two tails, which are not drawn."""

Keys = dict[str, float | None]
BOUNDS: Keys = {"min": None, "max": None}
MOMENTS: Keys = {"mu": 0.0, "sigma": 1.0}
STEP: Keys = {"q": 1}
# With U uniform on [min, max], N normal with mean mu and standard deviation sigma:
FORMS: dict[str, Keys] = {
    "constant": {"value": None},
    "categorical": {"values": None},  # each value with the same probability
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": BOUNDS,  # an integer in [min, max], both included
    "uniform": BOUNDS,  # U
    "q_uniform": {**BOUNDS, **STEP},  # round(U / q) · q
    "log_uniform": BOUNDS,  # exp(U): the bounds are exponents
    "q_log_uniform": {**BOUNDS, **STEP},  # round(exp(U) / q) · q
    "inv_log_uniform": BOUNDS,  # exp(−U): log(1 / x) is uniform on [min, max]
    "log_uniform_values": BOUNDS,  # exp(uniform on [log min, log max]): the bounds are values
    "q_log_uniform_values": {**BOUNDS, **STEP},  # the same, as round(x / q) · q
    "inv_log_uniform_values": BOUNDS,  # log(1 / x) uniform on [log 1/max, log 1/min]: the same
    "normal": MOMENTS,  # N
    "q_normal": {**MOMENTS, **STEP},  # round(N / q) · q
    "log_normal": MOMENTS,  # exp(N)
    "q_log_normal": {**MOMENTS, **STEP},  # round(exp(N) / q) · q
}
"""W&B's distributions, and the keys of each with their defaults; None where it must be given.

https://docs.wandb.ai/guides/sweeps/sweep-config-keys
"""


@dataclass(frozen=True)
class Parameter:
    """A swept parameter: what Optuna draws for it, and what its value is then.

    `extremes` are the least and the greatest value, or all values of a list. `grid_values` are the
    values in a grid; None where the form cannot be in a grid.
    """

    distribution: distributions.BaseDistribution
    value_of_draw: Callable[[Any], Any]
    extremes: list[Any]
    grid_values: Sequence[Any] | None = None


Space = dict[str, Parameter]
"""The swept parameters by name."""


def parse_parameter(spec: Any) -> Parameter:
    """A parameter from its YAML, as {values: [1, 2]} or {min: 0.1, max: 1.0}.

    Raises ConfigError with what is wrong, but without the parameter's name.
    """
    if not isinstance(spec, dict):
        raise ConfigError(f"{spec}: must say value, values, or min and max")
    if "parameters" in spec:
        raise ConfigError(
            "nested parameters reach a program as one dict, which no setting is; write the inner "
            "keys with dots (adapter.r: {values: [1, 2]})"
        )
    kind = spec.get("distribution") or _default_distribution(spec)
    keys = _check_keys(kind, spec)
    if kind == "constant":
        return _choice([keys["value"]])
    if kind.startswith("categorical"):
        return _choice(keys["values"], keys.get("probabilities"))
    for key, value in keys.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = ", and in YAML 1e-4 is text: 1.0e-4 is the number" if _is_number(value) else ""
            raise ConfigError(f"{key}={value}: must be a number{hint}")
        if not abs(value) <= 1e300:  # a NaN is not either
            raise ConfigError(f"{key}={value}: must be a finite number")
    return _number(kind, keys)


def _default_distribution(spec: dict[str, Any]) -> str:
    """The distribution of a parameter that names none, as W&B chooses it from the keys."""
    if "value" in spec:
        return "constant"
    if "values" in spec or "probabilities" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if "min" in spec or "max" in spec:
        are_integers = all(isinstance(spec.get(key), int) for key in BOUNDS)
        return "int_uniform" if are_integers else "uniform"
    hint = nearest(next(iter(spec), ""), ("value", "values", "min", "max", "distribution"))
    raise ConfigError(f"{spec}: must say value, values, or min and max{hint}")


def _check_keys(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The keys of a distribution as given, with defaults for the others."""
    if kind in ("beta", "q_beta"):
        raise ConfigError(f"distribution={kind}: is not supported here; uniform and normal are")
    if kind not in FORMS:
        known = f"{nearest(kind, FORMS)} (there are {', '.join(FORMS)})"
        raise ConfigError(f"distribution={kind}: there is no such distribution{known}")
    given = {key: value for key, value in spec.items() if key != "distribution"}
    if unknown := [key for key in given if key not in FORMS[kind]]:
        known = f"{nearest(unknown[0], FORMS[kind])} ({', '.join(FORMS[kind])})"
        raise ConfigError(f"{unknown[0]}: {kind} has no such key{known}")
    keys = {**FORMS[kind], **given}
    if missing := [key for key, value in keys.items() if key not in given and value is None]:
        raise ConfigError(f"{missing[0]}: must be given, {kind} needs it")
    return keys


def _choice(values: Any, probabilities: Any = None) -> Parameter:
    """One of several values, as the text that W&B's agent would pass on."""
    if not isinstance(values, list) or not values:
        raise ConfigError(f"values={values}: must be a list of values, [1, 2]")
    for value in values:
        if value is None or value == "":
            raise ConfigError('null: reaches a program as "None"; write "null", in quotes')
        if isinstance(value, dict):
            raise ConfigError(f"{value}: a dict is no setting; give its keys one by one, with dots")
    texts = list(dict.fromkeys(map(str, values)))
    if probabilities is None:
        return Parameter(distributions.CategoricalDistribution(texts), str, texts, texts)
    count, shares = len(values), probabilities if isinstance(probabilities, list) else []
    fits = len(shares) == count and all(isinstance(p, int | float) and p >= 0 for p in shares)
    if not fits or not math.isclose(sum(shares), 1):
        raise ConfigError(f"probabilities={probabilities}: must be {count} shares that add up to 1")
    # Probabilities [0.7, 0.3] have the upper edges [0.7, 1]: u = 0.8 is past one edge, value 1.
    edges = list(accumulate(shares))

    def value_of(u: float) -> str:
        index = sum(u >= edge for edge in edges)
        return str(values[min(index, count - 1)])

    return Parameter(distributions.FloatDistribution(0, 1), value_of, texts)


def _number(kind: str, keys: dict[str, Any]) -> Parameter:
    """A number from a range or a normal distribution; a multiple of q where `kind` is q_…"""
    unstepped = kind.removeprefix("q_")
    low, high, q = keys.get("min", 0), keys.get("max", 1), keys.get("q")
    if low > high:
        raise ConfigError(f"min={low}: must be at most max={high}")
    if q is not None and q <= 0:
        raise ConfigError(f"q={q}: must be more than 0")
    value: Callable[[Any], Any] = float
    if unstepped == "int_uniform":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ConfigError(f"min={low} max={high}: must be whole numbers with int_uniform")
        grid = range(low, high + 1)
        return Parameter(distributions.IntDistribution(low, high), int, [low, high], grid)
    if unstepped == "uniform":
        distribution = distributions.FloatDistribution(low, high)
    elif "log_uniform" in unstepped:
        distribution = _log_uniform(kind, low, high)
    else:
        distribution = distributions.FloatDistribution(TAIL, 1 - TAIL)
        value = _normal_quantile(unstepped, keys["mu"], keys["sigma"])
    if q is None:
        return Parameter(distribution, value, [value(distribution.low), value(distribution.high)])

    def step(draw: float) -> float:
        # An integer where q is one; and 0.3, not 0.30000000000000004.
        return type(q)(_round_off(round(value(draw) / q) * q))

    # W&B's grid of q_uniform leaves out max, as np.arange does.
    is_list = kind == "q_uniform" and (high - low) / q <= MOST_RUNS
    grid = [*map(_round_off, np.arange(low, high, q).tolist())] if is_list else None
    return Parameter(distribution, step, [step(distribution.low), step(distribution.high)], grid)


def _log_uniform(kind: str, low: float, high: float) -> distributions.FloatDistribution:
    """The distribution of x where log x, or log 1/x, is uniform; see FORMS for the bounds."""
    if not kind.endswith("_values"):  # the bounds are exponents of e
        low, high = (-high, -low) if kind.startswith("inv") else (low, high)
        _check_exponents(kind, low, high, f"; {kind}_values takes the values themselves")
        low, high = math.exp(low), math.exp(high)
    elif low <= 0:
        raise ConfigError(f"min={low}: must be more than 0 with {kind}")
    return distributions.FloatDistribution(low, high, log=True)


def _check_exponents(kind: str, low: float, high: float, hint: str) -> None:
    """Raises ConfigError for exponents of e that can only be meant as values: e^14 is a million."""
    if not (low > -700 and high <= 14):
        raise ConfigError(
            f"{kind} takes exponents of e: its values go from e^{low:g} to e^{high:g}, and end at "
            f"a million, e^14{hint}"
        )


def _normal_quantile(unstepped: str, mu: float, sigma: float) -> Callable[[float], float]:
    """u in (0, 1) → the value below which a normal (or log_normal) draw is with probability u."""
    if sigma <= 0:
        raise ConfigError(f"sigma={sigma}: must be more than 0")
    normal = NormalDist(mu, sigma)
    if unstepped == "log_normal":
        _check_exponents(unstepped, normal.inv_cdf(TAIL), normal.inv_cdf(1 - TAIL), " by mu, sigma")
        return lambda u: math.exp(normal.inv_cdf(u))
    return normal.inv_cdf


def _round_off(x: float) -> float:
    """x to 12 digits, in its type."""
    return type(x)(f"{x:.12g}")


def _is_number(value: Any) -> bool:
    """Whether a text is a number to Python, as 1e-4 is but to YAML is not."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
