"""A W&B sweep file run here, with no account: read, checked point by point, and launched."""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from hydra_plugins import lora_lab_sweeper  # pyright: ignore[reportAttributeAccessIssue]

from lora_lab import compose, multirun, train
from lora_lab.callbacks.spectra import groups
from lora_lab.config import ConfigError, TrainedBase, content_hash, nearest
from lora_lab.data import Data
from lora_lab.modules import TASKS
from lora_lab.multirun import Job
from lora_lab.plan import Plan, plan
from lora_lab.search import STARTUP, Bayes, Listed, at_random, startup
from lora_lab.space import Parameter, parameter
from lora_lab.spectra import Spectrum

METHODS = ("grid", "random", "bayes")
KEYS = ("method", "parameters", "metric", "run_cap", "early_terminate", "program", "command")
KEYS += ("name", "description", "project", "entity", "controller")
"""What a sweep file may say; the second line is W&B's own affair, and means nothing here."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file with the command line's overrides: what is fixed, and what is swept."""

    method: str
    metric: str | None
    goal: str
    cap: int | None
    early_terminate: bool
    fixed: list[str]
    space: dict[str, Parameter]
    """By name, in the order of the alphabet, which is W&B's."""
    hydra: list[str]
    """Overrides that are Hydra's own, as hydra/launcher."""

    def point(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of one run."""
        swept = [f"{key}={value}" for key, value in values.items()]
        return compose.prepare([*self.fixed, *swept])

    def ends(self) -> Iterable[dict[str, Any]]:
        """Each parameter at its outermost values, the others at their first."""
        first = {key: parameter.ends[0] for key, parameter in self.space.items()}
        yield first
        for key, parameter in self.space.items():
            yield from ({**first, key: value} for value in parameter.ends[1:])

    def grid(self) -> Iterable[dict[str, Any]]:
        """The product of all values, the last parameter's changing first."""
        for values in product(*(parameter.grid or [] for parameter in self.space.values())):
            yield dict(zip(self.space, values, strict=True))


def run(path: Path, overrides: Sequence[str], count: int | None, seed: int, dry: bool) -> None:
    """Runs a sweep file, or prints its commands. Raises ConfigError, before anything is begun."""
    try:
        sweep = read(path, overrides)
        total = _total(sweep, count)
        train.quiet()
        points = [sweep.point(values) for values in _known(sweep, total, seed)]
        tried = [] if sweep.method == "grid" else [sweep.point(end) for end in sweep.ends()]
        plans = _plans([*tried, *points])
        _check_metric(sweep, plans)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if sweep.early_terminate:
        print(f"{path}: early_terminate is for W&B's agents: here every run goes to its end")
    if dry:
        for point in points:
            print(shlex.join(["lora-lab", "train", *point]))
        if len(points) < total:
            print(f"# {total - len(points)} more, which depend on the results of these")
        return
    sys.argv[1:] = ["-m", "hydra/sweeper=points", *sweep.hydra, *sweep.fixed]
    if sweep.method == "bayes":
        return _bayes(path, sweep, total, seed, plans[0])
    paths = [plan.path for plan in plans[len(tried) :]]
    search = Listed([Job(point, at) for point, at in zip(points, paths, strict=True)])
    train.begin(search.jobs)
    lora_lab_sweeper.use(search)
    train.main(search.jobs)


def _bayes(path: Path, sweep: Sweep, total: int, seed: int, first: Plan) -> None:
    """Runs trial after trial; what they are and gave is kept in the sweep's directory."""
    space = {key: repr(parameter.draws) for key, parameter in sweep.space.items()}
    about = [sweep.metric, sweep.goal, space, seed, first.cfg.identity()]
    directory = Path(first.cfg.runs_dir) / ".sweeps" / f"{path.stem}-{content_hash(about)[:10]}"
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "study.db"
    try:
        with FileLock(directory / "lock", timeout=0):
            if first.cfg.overwrite:
                file.unlink(missing_ok=True)
            assert sweep.metric is not None
            goal = sweep.goal
            search = Bayes(sweep.space, sweep.point, sweep.metric, goal, total, seed, file)
            train.begin(search.jobs, total)
            lora_lab_sweeper.use(search)
            try:
                train.main(search.jobs)
            finally:
                if best := search.best():
                    print(f"best {sweep.metric} {best[1]:.6g}: {best[0].path}")
    except Timeout:
        raise ConfigError(f"{path}: another process is running this sweep ({directory})") from None


def read(path: Path, overrides: Sequence[str]) -> Sweep:
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
            raise ConfigError(f"{key}: there is no such key{nearest(key, KEYS)} ({', '.join(KEYS)})")
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
            space[key] = parameter(value)
            for text in (space[key].grid or []) + space[key].ends:
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
            space[key] = parameter({"values": values})
        else:
            given.append(override)
    for key, found in space.items():
        if method == "grid" and found.grid is None:
            raise ConfigError(
                f"parameters.{key}: a grid takes value, values, int_uniform or q_uniform; "
                "other distributions are for random and bayes"
            )
    constant = {key: found.ends[0] for key, found in space.items() if len({*found.ends}) == 1}
    fixed = [f"{key}={value}" for key, value in constant.items()] + given
    return fixed, {key: space[key] for key in sorted(space) if key not in constant}


def _is_hydras(override: str) -> bool:
    return override.startswith(("hydra.", "hydra/"))


def _values(override: str) -> list[str]:
    """The value of an override, or each of those that it sweeps, as text."""
    points = compose.points(compose.prepare([override]))
    return [point[0].partition("=")[2] for point in points]


def _check_program(content: Mapping[str, Any]) -> None:
    words = [str(content.get("program", "")), *map(str, content.get("command") or [])]
    if any(words) and not any("lora_lab.train" in word or "lora-lab" in word for word in words):
        raise ConfigError(f"program={words[0]}: this runs lora_lab.train, and no other program")


def _metric(said: Any) -> tuple[str | None, str]:
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


def _total(sweep: Sweep, count: int | None) -> int:
    """How many runs there will be."""
    if sweep.method == "grid":
        size = sum(1 for _ in sweep.grid())
        return min(size, count or sweep.cap or size)
    if not (total := count or sweep.cap):
        raise ConfigError(f"run_cap: must be given with {sweep.method}, or --count")
    if not sweep.space:
        raise ConfigError(f"parameters: every one is fixed, {sweep.method} has nothing to draw")
    return total


def _known(sweep: Sweep, total: int, seed: int) -> Iterable[dict[str, Any]]:
    """The points that no result decides on."""
    if sweep.method == "grid":
        return islice(sweep.grid(), total)
    return (at_random if sweep.method == "random" else startup)(sweep.space, total, seed)


def _plans(points: Sequence[list[str]]) -> list[Plan]:
    """Every point's run, or a ConfigError that tells what is wrong with which points."""
    plans: list[Plan] = []
    wrong: dict[str, list[list[str]]] = {}
    for overrides, cfg in compose.every(points):
        try:
            if isinstance(cfg, ConfigError):
                raise cfg
            plans.append(plan(cfg))
        except ConfigError as error:
            wrong.setdefault(str(error), []).append(overrides)
    if not wrong:
        return plans
    said = [f"parameters: {error} ({_where(bad, points)})" for error, bad in wrong.items()]
    raise ConfigError("\n".join(said))


def _where(bad: Sequence[list[str]], points: Sequence[list[str]]) -> str:
    if len(bad) == len(points):
        return "at every point"
    alike = set.intersection(*map(set, points))
    point = " ".join(o for o in bad[0] if o not in alike)
    return f"at {len(bad)} of {len(points)} points that were tried, the first {point}"


def logged(plan: Plan) -> set[str]:
    """The metrics that a run surely logs by its end."""
    cfg, data = plan.cfg, plan.data("adapt")
    of_val = {"val/loss", *(f"val/{name}" for name in TASKS[data.task].metrics)}
    names = {*of_val, "parameters/trainable", "parameters/base"}
    if isinstance(cfg.base, TrainedBase):
        names |= {f"base/{name}" for name in {*of_val, "train/loss"}}
    if cfg.adapter.method == "none":
        return names
    names.add("train/loss")
    one = Spectrum(torch.ones(1, dtype=torch.float64), (1, 1), 0.0)
    sites = {site.name: site for site in plan.sites}
    spectra = {f"spectra/{site}" for site in sites}
    spectra |= {f"spectra_of/{group}" for group in groups(dict.fromkeys(sites, one), sites)}
    names |= {f"{prefix}/{measure}" for prefix in spectra for measure in one.measures()}
    if cfg.adapter.method == "lora":
        names |= {f"merged/{name}" for name in of_val}
        names |= {f"bytes/{of}" for of in ("adapter", "optimizer", "full_optimizer")}
    return names


def _check_metric(sweep: Sweep, plans: Sequence[Plan]) -> None:
    if sweep.metric is None:
        return
    kinds = {(plan.cfg.adapter.method, str(plan.sites), plan.cfg.data.target): plan for plan in plans}
    for plan_ in kinds.values():
        if sweep.metric not in (names := logged(plan_)):
            rest = ", ".join(sorted(name for name in names if not name.startswith("spectra")))
            raise ConfigError(
                f"metric.name={sweep.metric}: a run with adapter={plan_.cfg.adapter.method} does "
                f"not log it{nearest(sweep.metric, names)} (it logs {rest}, "
                "and spectra/SITE/MEASURE)"
            )
