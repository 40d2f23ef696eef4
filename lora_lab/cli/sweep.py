"""`lora-lab sweep`: runs a W&B sweep file here, without an account, after a check of each point."""

import math
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
from lora_lab.config.command_line import check_count
from lora_lab.config.schema import ConfigError, TrainedBase, content_hash, nearest
from lora_lab.console import silence_lightning
from lora_lab.sweeps import command, sweeper
from lora_lab.sweeps.multirun import Job, plan_jobs
from lora_lab.sweeps.search import BayesSearch, random_points, startup_points
from lora_lab.sweeps.sweep_file import Sweep, read_sweep
from lora_lab.training.callbacks.spectra import groups
from lora_lab.training.known_data import known_data
from lora_lab.training.plan import Plan
from lora_lab.training.tasks import metric_names

AGAINST_BASE = ("directions", "projection", "amplification", "intruders", "intruders_among")
"""Measures of ΔW against W, which a run logs where spectra.against_base is set."""


def run(path: Path, overrides: Sequence[str], count: int | None, seed: int, dry: bool) -> None:
    """Runs a sweep file, or with `dry` prints the command of each run.

    `overrides` come before what the file says, `count` before its run_cap; `seed` draws the points
    of random and bayes. All points, and both ends of each distribution, are checked before anything
    runs. Raises ConfigError.
    """
    try:
        sweep = read_sweep(path, overrides)
        if sweep.hydra_overrides:
            command.check_launcher(sweep.hydra_overrides)
        total = _run_count(sweep, count)
        silence_lightning()
        points = [sweep.overrides_at(values) for values in _known_points(sweep, total, seed)]
        extremes = [] if sweep.method == "grid" else sweep.extreme_points()
        checked = [sweep.overrides_at(values) for values in extremes]
        jobs = _plan_points([*checked, *points])
        plans = [job.plan for job in jobs if job.plan]
        _check_metric(sweep, plans)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if sweep.early_terminate:
        print(f"{path}: early_terminate is for W&B's agents: here all runs go to their end")
    if dry:
        for point in points:
            print(shlex.join(["lora-lab", "train", *point]))
        if len(points) < total:
            print(f"# {total - len(points)} more, which depend on the results of these")
        return
    # train.main() reads the command line of a multirun, as if it had been typed.
    sys.argv[1:] = ["-m", "hydra/sweeper=points", *sweep.hydra_overrides, *sweep.fixed_overrides]
    if sweep.method == "bayes":
        return _run_bayes(path, sweep, total, seed, plans[0])
    search = sweeper.JobList(jobs[len(checked) :])
    command.announce(search.jobs)
    sweeper.use_search(search)
    train.main(search.jobs)


def _run_bayes(path: Path, sweep: Sweep, total: int, seed: int, first: Plan) -> None:
    """Runs a Bayesian search, whose trials are stored in runs/.sweeps/NAME-HASH/study.db.

    The hash is of the metric, the search space, the seed and the fixed settings (by the `first`
    plan), so that the same sweep goes on with its trials. A lock lets one process run it at a time.
    """
    space = {key: repr(swept.distribution) for key, swept in sweep.space.items()}
    identity = [sweep.metric, sweep.goal, space, seed, first.cfg.identity()]
    directory = Path(first.cfg.runs_dir) / ".sweeps" / f"{path.stem}-{content_hash(identity)[:10]}"
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "study.db"
    try:
        with FileLock(directory / "lock", timeout=0):
            if first.cfg.overwrite:
                file.unlink(missing_ok=True)
            search = BayesSearch(sweep, total, seed, file)
            command.announce(search.jobs, total)
            sweeper.use_search(search)
            try:
                train.main(search.jobs)
            finally:
                if best := search.best_run():
                    print(f"best {sweep.metric} {best[1]:.6g}: {best[0].path}")
    except Timeout:
        raise ConfigError(f"{path}: another process is running this sweep ({directory})") from None


def _run_count(sweep: Sweep, count: int | None) -> int:
    """How many runs the sweep has. Raises ConfigError where neither file nor options say it."""
    if sweep.method == "grid":
        size = math.prod(len(swept.grid_values or []) for swept in sweep.space.values())
        total = min(size, count or sweep.run_cap or size)
    elif not (total := count or sweep.run_cap):
        raise ConfigError(f"run_cap: must be given with {sweep.method}, or --count")
    check_count(total, "the sweep")
    if sweep.method == "grid":
        return total
    if not sweep.space:
        raise ConfigError(f"parameters: all are fixed, {sweep.method} has nothing to draw")
    return total


def _known_points(sweep: Sweep, total: int, seed: int) -> Iterable[dict[str, Any]]:
    """The values of the runs that do not depend on results: of bayes only the first draws."""
    if sweep.method == "grid":
        return islice(sweep.grid_points(), total)
    return (random_points if sweep.method == "random" else startup_points)(sweep.space, total, seed)


def _plan_points(points: Sequence[list[str]]) -> list[Job]:
    """The job of each point. Raises a ConfigError with all errors and the points they are of."""
    jobs = plan_jobs(points)
    points_by_error: dict[str, list[list[str]]] = {}
    for job in jobs:
        if job.error:
            points_by_error.setdefault(job.error, []).append(job.overrides)
    if not points_by_error:
        return jobs
    lines = [f"parameters: {e} ({_where(bad, points)})" for e, bad in points_by_error.items()]
    raise ConfigError("\n".join(lines))


def _where(bad: Sequence[list[str]], points: Sequence[list[str]]) -> str:
    """How many points have an error, and the first of them by the overrides that vary."""
    if len(bad) == len(points):
        return "at all points"
    fixed = set.intersection(*map(set, points))
    first = " ".join(o for o in bad[0] if o not in fixed)
    return f"at {len(bad)} of {len(points)} points that were tried, the first {first}"


def logged_metrics(plan: Plan) -> set[str]:
    """The names of all metrics that a run logs, but for theory/ (which a data set adds)."""
    cfg, data = plan.cfg, plan.data("adapt")
    measured = ["loss", *metric_names(data.task, data.metrics)]
    validation = {f"val/{name}" for name in measured}
    names = {*validation, "parameters/trainable", "parameters/base"}
    if data.has_test:
        names |= {f"test/{name}" for name in measured}
    if isinstance(cfg.base, TrainedBase):
        names |= {f"base/{name}" for name in {*validation, "train/loss"}}
    if (known := known_data(cfg, plan.data("base"))) is not None:
        forgetting = {f"forget/{m}" for m in ("loss", *metric_names(known.task, known.metrics))}
        validation, names = validation | forgetting, names | forgetting | {"forget/increase"}
    if cfg.adapter.method == "none":
        return names
    names |= {"train/loss", "bytes/optimizer", "bytes/full_optimizer"}
    # A spectrum of one singular value: it has the names of the measures of any other.
    spectrum = Spectrum(torch.ones(1, dtype=torch.float64), (1, 1), 0.0)
    sites = {site.name: site for site in plan.sites}
    spectra = {f"spectra/{site}" for site in sites}
    of_sites = {site: [spectrum] for site in sites}
    spectra |= {f"spectra_of/{group}" for group in groups(of_sites, sites)}
    names |= {f"{prefix}/{measure}" for prefix in spectra for measure in spectrum.measures()}
    if cfg.spectra.against_base:
        names |= {f"spectra/{site}/{measure}" for site in sites for measure in AGAINST_BASE}
    if cfg.spectra.truncation == "sites":
        names |= {"advice/loss", "advice/share"}
    if cfg.adapter.method == "lora":
        if cfg.adapter.allocation is not None or cfg.adapter.rho != 1:
            names |= {f"spectra/{site}/allocated_rank" for site in sites}
        if cfg.spectra.first_step:
            names |= {"first_step/gradient_ratio", "first_step/descent"}
        names |= {f"merged/{name}" for name in validation}
        names.add("bytes/adapter")
    return names


def _check_metric(sweep: Sweep, plans: Sequence[Plan]) -> None:
    """Raises ConfigError where a run does not log the metric that the sweep file names."""
    if sweep.metric is None:
        return
    for plan in plans:
        if sweep.metric not in (names := logged_metrics(plan)):
            known = ", ".join(sorted(name for name in names if not name.startswith("spectra")))
            raise ConfigError(
                f"metric.name={sweep.metric}: a run of {plan.cfg.name} with "
                f"adapter={plan.cfg.adapter.method} does not log it{nearest(sweep.metric, names)} "
                f"(it logs {known}, and spectra/SITE/MEASURE)"
            )
