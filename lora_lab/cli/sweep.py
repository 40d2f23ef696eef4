"""A W&B sweep file run here, with no account: checked point by point, and launched."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lora_lab import train
from lora_lab.analysis.spectra import Spectrum
from lora_lab.config import compose
from lora_lab.config.schema import ConfigError, TrainedBase, content_hash, nearest
from lora_lab.sweeps import sweeper
from lora_lab.sweeps.multirun import Job, plan_job
from lora_lab.sweeps.search import BayesSearch, random_points, startup_points
from lora_lab.sweeps.sweep_file import Sweep, read_sweep
from lora_lab.training.callbacks.spectra import groups
from lora_lab.training.plan import Plan
from lora_lab.training.tasks import TASKS

AGAINST_BASE = ("directions", "projection", "amplification", "intruders", "intruders_among")
"""What analysis.py measures of ΔW beside W, where it is asked to."""


def run(path: Path, overrides: Sequence[str], count: int | None, seed: int, dry: bool) -> None:
    """Runs a sweep file, or prints its commands. Raises ConfigError, before anything is begun."""
    try:
        sweep = read_sweep(path, overrides)
        total = _total(sweep, count)
        train.silence_lightning()
        points = [sweep.overrides_at(values) for values in _known(sweep, total, seed)]
        tried = (
            []
            if sweep.method == "grid"
            else [sweep.overrides_at(end) for end in sweep.extreme_points()]
        )
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
    sys.argv[1:] = ["-m", "hydra/sweeper=points", *sweep.hydra_overrides, *sweep.fixed_overrides]
    if sweep.method == "bayes":
        return _bayes(path, sweep, total, seed, plans[0])
    pairs = zip(points, plans[len(tried) :], strict=True)
    search = sweeper.JobList([Job(point, plan.path, plan=plan) for point, plan in pairs])
    train.announce_multirun(search.jobs)
    sweeper.use_search(search)
    train.main(search.jobs)


def _bayes(path: Path, sweep: Sweep, total: int, seed: int, first: Plan) -> None:
    """Runs trial after trial; what they are and gave is kept in the sweep's directory."""
    space = {key: repr(swept.distribution) for key, swept in sweep.space.items()}
    about = [sweep.metric, sweep.goal, space, seed, first.cfg.identity()]
    directory = Path(first.cfg.runs_dir) / ".sweeps" / f"{path.stem}-{content_hash(about)[:10]}"
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "study.db"
    try:
        with FileLock(directory / "lock", timeout=0):
            if first.cfg.overwrite:
                file.unlink(missing_ok=True)
            search = BayesSearch(sweep, total, seed, file)
            train.announce_multirun(search.jobs, total)
            sweeper.use_search(search)
            try:
                train.main(search.jobs)
            finally:
                if best := search.best_run():
                    print(f"best {sweep.metric} {best[1]:.6g}: {best[0].path}")
    except Timeout:
        raise ConfigError(f"{path}: another process is running this sweep ({directory})") from None


def _total(sweep: Sweep, count: int | None) -> int:
    """How many runs there will be."""
    if sweep.method == "grid":
        size = sum(1 for _ in sweep.grid_points())
        return min(size, count or sweep.run_cap or size)
    if not (total := count or sweep.run_cap):
        raise ConfigError(f"run_cap: must be given with {sweep.method}, or --count")
    if not sweep.space:
        raise ConfigError(f"parameters: every one is fixed, {sweep.method} has nothing to draw")
    return total


def _known(sweep: Sweep, total: int, seed: int) -> Iterable[dict[str, Any]]:
    """The points that no result decides on."""
    if sweep.method == "grid":
        return islice(sweep.grid_points(), total)
    return (random_points if sweep.method == "random" else startup_points)(sweep.space, total, seed)


def _plans(points: Sequence[list[str]]) -> list[Plan]:
    """Every point's run, or a ConfigError that tells what is wrong with which points."""
    plans: list[Plan] = []
    wrong: dict[str, list[list[str]]] = {}
    for overrides, cfg in compose.compose_points(points):
        try:
            if isinstance(cfg, ConfigError):
                raise cfg
            plans.append(plan_job(cfg))
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


def logged_metrics(plan: Plan) -> set[str]:
    """The metrics that a run logs by its end, but for its theory."""
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
    if cfg.spectra.against_base:
        names |= {f"spectra/{site}/{measure}" for site in sites for measure in AGAINST_BASE}
    if cfg.spectra.truncation == "sites":
        names |= {"advice/loss", "advice/share"}
    if cfg.adapter.method == "lora":
        if cfg.spectra.first_step:
            names |= {"first_step/gradient_ratio", "first_step/descent"}
        names |= {f"merged/{name}" for name in of_val}
        names |= {f"bytes/{of}" for of in ("adapter", "optimizer", "full_optimizer")}
    return names


def _check_metric(sweep: Sweep, plans: Sequence[Plan]) -> None:
    if sweep.metric is None:
        return
    for run in plans:
        if sweep.metric not in (names := logged_metrics(run)):
            known = ", ".join(sorted(name for name in names if not name.startswith("spectra")))
            raise ConfigError(
                f"metric.name={sweep.metric}: a run of {run.cfg.name} with "
                f"adapter={run.cfg.adapter.method} does not log it{nearest(sweep.metric, names)} "
                f"(it logs {known}, and spectra/SITE/MEASURE)"
            )
