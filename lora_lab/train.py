"""The Hydra entry, overrides → config → checks → run: `lora-lab train`, or with python -m."""

import gc
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from lora_lab.config import compose
from lora_lab.config.schema import ConfigError
from lora_lab.runs import RunFailedError
from lora_lab.sweeps.launchers import fork_server

if TYPE_CHECKING:
    from lora_lab.sweeps.multirun import Job
    from lora_lab.training.plan import Plan

log = logging.getLogger(__name__)
# Piped, a line is a line: paths are not broken to fit 80 columns.
console = Console(width=None if sys.stdout.isatty() else 200)
error_console = Console(stderr=True)
entry = hydra.main(version_base="1.3", config_path="pkg://lora_lab.conf", config_name="train")


def run_job(content: DictConfig, pack: "Sequence[list[str] | Plan]" = ()) -> None:
    """One job: a single run, or one of a multirun, where it raises so that the rest goes on.

    `pack`: the plans, or overrides, of all runs of a pack, of which this is the first.
    """
    told = HydraConfig.get()
    single = told.mode == RunMode.RUN
    show_log()
    try:
        if pack:
            _pack(pack)
        else:
            _run(content, single)
    except (ConfigError, RunFailedError) as error:
        wrong = isinstance(error, ConfigError)
        what = "config error" if wrong else "failed"
        error_console.print(f"[red]{what}:[/] {escape(str(error))}", soft_wrap=True)
        fail_fast = OmegaConf.select(content, "sweep.fail_fast") is True
        if single or (fail_fast and told.launcher._target_.endswith(".BasicLauncher")):
            sys.exit(2 if wrong else 1)
        raise
    finally:
        if not single:
            from lora_lab.sweeps import multirun

            multirun.set_directory(Path(told.sweep.dir))
            if line := multirun.progress_line():
                console.print(f"[bold]multirun:[/] {line}", highlight=False)


def _run(content: DictConfig, single: bool) -> None:
    cfg = compose.config_from_hydra(content, HydraConfig.get().overrides.task)
    # Lightning and wandb take seconds to import: after the first checks, not before.
    with frozen_imports():
        from lora_lab import report
        from lora_lab.runs import Run, RunBusyError, RunFinishedError
        from lora_lab.tracking import tracking
        from lora_lab.training import devices, experiment, plan
    silence_lightning()
    planned = _with_published(plan.plan(cfg))
    if devices.is_worker():
        return devices.run_worker(planned, console)
    run = Run(planned.path)
    try:
        if planned.processes > 1:
            devices.launch(planned, HydraConfig.get().overrides.task)
        else:
            experiment.run(planned, console)
        report.write_run(run, single if cfg.figures is None else cfg.figures)
    except RunFinishedError:
        again = "overwrite=true repeats it"
        console.print(f"Finished before, not repeated ({again}): {run.path}", soft_wrap=True)
        if "WANDB_SWEEP_ID" in os.environ:  # an agent of W&B waits for a run of its own
            tracking.copy_to_wandb(planned.cfg, run)
        if not (run.path / "report" / "table.md").exists():
            report.write_run(run)
    except RunBusyError as error:
        raise RunFailedError(str(error)) from None
    except (KeyboardInterrupt, SystemExit) as stop:
        if "SUBMITIT_EXECUTOR" in os.environ:
            raise  # its code tells submitit whether the job was queued again
        console.print(f"interrupted: the same command goes on with it ({run.path})")
        sys.exit(interruption_code(stop))
    except Exception as error:
        raise RunFailedError(
            f"{type(error).__name__}: {error}\nthe traceback is in {run.path / 'log.txt'}"
        ) from error
    if single:
        report.show_run(run, console)


def _with_published(planned: "Plan") -> "Plan":
    """The plan with what was published of it, where base or run are as they were published."""
    from lora_lab.training import bases

    cfg = planned.cfg
    if cfg.published is None:
        return planned
    paper = compose.published_config(HydraConfig.get().runtime.choices["experiment"], cfg)
    rows = {
        "base": cfg.published.base if bases.key(cfg) == bases.key(paper) else {},
        "adapted": cfg.published.adapted if cfg.identity() == paper.identity() else {},
    }
    published = cfg.published.model_copy(update=rows)
    return replace(planned, cfg=cfg.model_copy(update={"published": published}))


def _pack(pack: "Sequence[list[str] | Plan]") -> None:
    """The runs of a pack. Raises RunFailedError where any of them failed."""
    from lora_lab import report
    from lora_lab.packing.runs import run_pack
    from lora_lab.runs import Run, RunFinishedError
    from lora_lab.training import plan

    silence_lightning()
    plans = [
        _with_published(plan.plan(compose.compose_config(one)) if isinstance(one, list) else one)
        for one in pack
    ]
    try:
        errors = run_pack(plans, console)
    except (KeyboardInterrupt, SystemExit) as stop:
        if "SUBMITIT_EXECUTOR" in os.environ:
            raise  # its code tells submitit whether the job was queued again
        sys.exit(interruption_code(stop))
    failed = []
    for planned, error in zip(plans, errors, strict=True):
        run = Run(planned.path)
        if error is None or isinstance(error, RunFinishedError):
            report.write_run(run, planned.cfg.figures is True)
        else:
            failed.append(f"{type(error).__name__}: {error}")
            errors_of = f"[red]failed:[/] {escape(failed[-1])} ({run.path / 'log.txt'})"
            console.print(errors_of, soft_wrap=True)
    if failed:
        raise RunFailedError(f"{len(failed)} of {len(plans)} runs of the pack; {failed[0]}")


@contextmanager
def frozen_imports() -> Iterator[None]:
    """What is imported within it is never garbage, and need not be looked at again, nor at exit."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    if len(sys.modules) > known:  # not again in a later job: what others left is garbage
        gc.freeze()


def interruption_code(by: BaseException) -> int:
    """The exit code of what was stopped: 143 by SIGTERM, 130 by Ctrl-C.

    Lightning turns Ctrl-C into SystemExit(1), and SIGTERM into a kind of its own.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    terminated = isinstance(by, SIGTERMException) or getattr(by, "code", None) == 143
    return 143 if terminated else 130


def main(every: "list[Job] | None" = None) -> None:
    """Runs what the command line says. `every` are its jobs, where another sweeper decides on them.

    Exits with 0: finished, 1: failed, 2: config error, 130: Ctrl-C, 143: SIGTERM.
    """
    # Hydra then raises what it would otherwise print in its own words.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = compose.hydra_arguments(sys.argv[1:])
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # what it logs it also raises
    show_log()
    fork_server.start(sys.argv)
    if any(argument.startswith("hydra/launcher=") for argument in sys.argv):
        from lora_lab.sweeps.launchers.register import register

        register()
    try:
        every = _multirun(sys.argv[1:]) if every is None else every
        try:
            if not (wrong := any(job.error for job in every)) or "sweep.fail_fast=true" not in map(
                str.lower, sys.argv
            ):
                entry(run_job)()
        finally:
            if every:
                _ended(every)
        if wrong:
            sys.exit(2)
    except (ConfigError, RunFailedError) as error:  # of a multirun: the first
        failed = isinstance(error, RunFailedError) or any(j.state == "failed" for j in every or [])
        sys.exit(1 if failed else 2)
    except (HydraException, OmegaConfBaseException) as error:
        error_console.print(
            f"[red]config error:[/] {escape(compose.hydra_error_message(error))}", soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _multirun(arguments: list[str]) -> "list[Job]":
    """The jobs of a multirun, said in one line before the first begins; [] of a single run."""
    if not {"-m", "--multirun"} & set(arguments):
        return []
    with frozen_imports():
        from lora_lab.sweeps import multirun, sweeper

    silence_lightning()
    every = multirun.plan_jobs(compose.sweep_points(arguments))
    if every:
        announce_multirun(every)
        sweeper.use_search(sweeper.JobList(every))
        sys.argv.append("hydra/sweeper=points")
    return every


def announce_multirun(jobs: "list[Job]", total: int = 0) -> None:
    """Says in one line what the multirun is made of, of `total` runs if not all are known."""
    from lora_lab.sweeps import multirun

    multirun.set_jobs(jobs, total)
    states = Counter(job.state for job in jobs)
    told = ", ".join(f"{n} {state}" for state, n in states.items() if state != "none")
    rest = f" ({told})" if told else ""
    console.print(f"[bold]multirun:[/] {max(total, len(jobs))} runs{rest}", highlight=False)
    for cause, n in Counter(job.error for job in jobs if job.error).items():
        of = f" ({n} of the runs)" if n > 1 else ""
        error_console.print(f"[red]config error:[/] {escape(cause)}{of}", soft_wrap=True)


def _ended(every: "list[Job]") -> None:
    """The table of all jobs, and of those that failed the causes."""
    from lora_lab import report
    from lora_lab.sweeps import multirun

    left = multirun.close()
    console.print(
        report.job_table([(job.overrides, job.path, job.state, job.cause) for job in every])
    )
    if left:
        console.print(f"output of jobs that were lost: {left}", soft_wrap=True, highlight=False)


def show_log(to: Console = console) -> None:
    """Shows what the package logs; a run's log.txt has it besides."""
    handler = RichHandler(console=to, show_path=False, show_level=False, show_time=False)
    logging.getLogger("lora_lab").handlers = [handler]
    logging.getLogger("lora_lab").setLevel(logging.INFO)


def silence_lightning() -> None:
    """Silences what Lightning says of things that are as we want them."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The data sets are in memory: worker processes would only copy them.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*on epoch level in distributed setting.*")  # equal on all
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    warnings.filterwarnings("ignore", "There is a performance drop because.*batching rule.*")
    # Lightning 2.6 on torch 2.13.
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    # By its name, under which a launcher's processes know it.
    from lora_lab import train

    train.main()
