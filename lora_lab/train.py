"""Where `lora-lab train` begins: the only @hydra.main.

One run: `main` → Hydra composes the config → `run_job` → the config is checked → the run.

A multirun (-m): `main` checks all jobs first (sweeps/command.py) → Hydra → the sweeper → the
launcher → `run_job` for each job or pack of jobs. Hydra's basic launcher calls it in this process,
the launchers of sweeps/launchers in others.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.config import compose, project
from lora_lab.config.schema import ConfigError
from lora_lab.console import console, print_error, print_labelled, show_log, silence_lightning
from lora_lab.exit_codes import CONFIG_ERROR, CTRL_C, FAILED, end_on_hangup, interruption_code
from lora_lab.runs import Run, RunBusyError, RunFailedError, RunFinishedError
from lora_lab.sweeps import command

if TYPE_CHECKING:
    from lora_lab.sweeps.multirun import Job
    from lora_lab.training.plan import Plan

entry = hydra.main(version_base="1.3", config_path="pkg://lora_lab.conf", config_name="train")


def main(jobs: "list[Job] | None" = None) -> None:
    """Runs what the command line says. Exits with a code of exit_codes.py, 0 by returning.

    `jobs` are given by `lora-lab sweep`, which has set the search that the sweeper asks
    (sweeper.use_search): the jobs of the sweep that are known so far.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, to be printed below
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # what it logs it also raises
    show_log()
    end_on_hangup()
    try:
        jobs = command.plan_command(jobs)
        has_config_error = any(job.error for job in jobs)
        fail_fast = "sweep.fail_fast=true" in map(str.lower, sys.argv)
        try:
            if not (has_config_error and fail_fast):
                entry(run_job)()
        finally:
            if jobs:
                command.finish(jobs)
        if has_config_error:
            sys.exit(CONFIG_ERROR)
    except (ConfigError, RunFailedError) as error:
        # The sweeper raises the first job's error. A later one may have failed in a worse way.
        failed = isinstance(error, RunFailedError) or any(j.state == "failed" for j in jobs or [])
        sys.exit(FAILED if failed else CONFIG_ERROR)
    except (HydraException, OmegaConfBaseException) as error:
        print_error("config error", compose.hydra_error_message(error))
        sys.exit(CONFIG_ERROR)
    except OSError as error:  # of the multirun's own files: a full disk
        print_error("failed", f"{type(error).__name__}: {error}")
        sys.exit(FAILED)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on")
        sys.exit(CTRL_C)


def run_job(content: DictConfig, pack: "Sequence[list[str] | Plan]" = ()) -> None:
    """The task that Hydra calls: a single run, or one job of a multirun.

    A single run that fails exits here. A job of a multirun raises, so that the sweeper notes it and
    the other jobs run. `content` is the composed config. `pack` has all runs of a pack, whose first
    is that of `content`: as plans, or as overrides on another machine, where they are planned anew.
    """
    hydra_config = HydraConfig.get()
    is_single = hydra_config.mode == RunMode.RUN
    show_log()
    if not is_single:
        from lora_lab.sweeps import multirun

        multirun.set_directory(Path(hydra_config.sweep.dir))
    try:
        project.enter()  # this may be a new process, of a launcher or of a cluster
        if pack:
            _run_pack(pack)
        else:
            _run_one(content, is_single)
    except (ConfigError, RunFailedError) as error:
        is_config_error = isinstance(error, ConfigError)
        print_error("config error" if is_config_error else "failed", str(error))
        # Hydra's basic launcher runs all jobs of a batch whatever becomes of each: to end it at the
        # first failure, this process, which is also the multirun's, has to exit.
        fail_fast = OmegaConf.select(content, "sweep.fail_fast") is True
        if is_single or (fail_fast and hydra_config.launcher._target_.endswith(".BasicLauncher")):
            sys.exit(CONFIG_ERROR if is_config_error else FAILED)
        raise
    finally:
        if not is_single:
            from lora_lab.sweeps import multirun

            if line := multirun.progress_line():
                print_labelled("multirun", line)


def _run_one(content: DictConfig, is_single: bool) -> None:
    """Checks a config and runs it. Raises ConfigError before, and RunFailedError after it began."""
    cfg = compose.config_from_hydra(content, HydraConfig.get().overrides.task)
    # Lightning and wandb take seconds to import: after the first checks, not before.
    with command.frozen_imports():
        from lora_lab import report
        from lora_lab.training import devices, plan
    silence_lightning()
    run_plan = _with_published(plan.plan(cfg))
    if devices.is_worker():
        return devices.run_worker(run_plan, console)
    run = Run(run_plan.path)
    try:
        _train(run_plan, run)
        if not run.has_report:
            _write_report(run, is_single if cfg.figures is None else cfg.figures)
    except RunFailedError:
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        if "SUBMITIT_EXECUTOR" in os.environ:
            raise  # its exit code tells submitit whether the job was queued again
        console.print(f"interrupted: the same command goes on with it ({run.path})")
        sys.exit(interruption_code(stop))
    except Exception as error:
        cause = f"{type(error).__name__}: {error}\nthe traceback is in {run.path / 'log.txt'}"
        raise RunFailedError(cause) from error
    if is_single:
        report.show_run(run, console)


def _train(run_plan: "Plan", run: Run) -> None:
    """Trains a run in this process, or in one for each of its devices; not if it is finished."""
    from lora_lab.tracking import tracking
    from lora_lab.training import devices
    from lora_lab.training.source_code import other_versions

    try:
        command = ("-m", "lora_lab.train", *HydraConfig.get().overrides.task)
        devices.train(run_plan, command, console)
    except RunFinishedError:
        versions = other_versions(run)
        hint = f"trained with {versions}; " * bool(versions) + "overwrite=true repeats it"
        console.print(f"Finished before, not repeated ({hint}): {run.path}", soft_wrap=True)
        if "WANDB_SWEEP_ID" in os.environ:  # W&B's agent waits for a run of this process
            tracking.copy_to_wandb(run_plan.cfg, run)


def _write_report(run: Run, draw: bool) -> None:
    """Writes a finished run's report. Raises RunFailedError where that fails."""
    from lora_lab import report

    try:
        report.write_run(run, draw=draw)
    except Exception as error:
        log_file = run.path / "log.txt"
        with log_file.open("a") as file:
            file.write(traceback.format_exc())
        raise RunFailedError(
            f"the run is finished, its report failed: {type(error).__name__}: {error}\n"
            f"the same command writes it again; the traceback is in {log_file}"
        ) from error


def _run_pack(pack: "Sequence[list[str] | Plan]") -> None:
    """Trains the runs of a pack together. Raises RunFailedError if any of them failed."""
    from lora_lab.packing.runs import run_pack
    from lora_lab.training import plan, run_record

    silence_lightning()
    plans = [plan.plan(compose.compose_config(o)) if isinstance(o, list) else o for o in pack]
    plans = [_with_published(run_plan) for run_plan in plans]
    try:
        errors = run_pack(plans, console)
        for i, error in enumerate(errors):
            if isinstance(error, RunBusyError):  # waited for here, where the pack holds no lock
                console.print(f"waiting: {error}", soft_wrap=True)
                run = run_record.wait_until_free(Run(plans[i].path))
                errors[i] = RunFinishedError(str(run.path)) if run.finished else error
    except (KeyboardInterrupt, SystemExit) as stop:
        if "SUBMITIT_EXECUTOR" in os.environ:
            raise  # its exit code tells submitit whether the job was queued again
        sys.exit(interruption_code(stop))
    messages = []
    for run_plan, error in zip(plans, errors, strict=True):
        error, run = None if isinstance(error, RunFinishedError) else error, Run(run_plan.path)
        if error is None and not run.has_report:
            try:
                _write_report(run, run_plan.cfg.figures is True)
            except RunFailedError as failure:
                error = failure
        if error is not None:
            messages.append(f"{type(error).__name__}: {error}")
            print_error("failed", messages[-1], f" ({run_plan.path / 'log.txt'})", to=console)
    if messages:
        raise RunFailedError(f"{len(messages)} of {len(plans)} runs of the pack; {messages[0]}")


def _with_published(run_plan: "Plan") -> "Plan":
    """The plan with those of a paper's rows that can be compared, where its experiment has some."""
    if run_plan.cfg.published is None:
        return run_plan
    from lora_lab.training.published import with_published

    return with_published(run_plan, HydraConfig.get().runtime.choices["experiment"])


if __name__ == "__main__":
    # Imported by its name, so that a launcher pickles run_job as lora_lab.train's, not __main__'s.
    from lora_lab import train

    train.main()
