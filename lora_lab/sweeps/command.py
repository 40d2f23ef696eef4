"""What a training command prints and checks of a multirun: before its first run, and at its end."""

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_lab.config import compose, project
from lora_lab.config.command_line import MULTIRUN, check_single
from lora_lab.config.schema import ConfigError
from lora_lab.console import console, print_error, print_labelled, silence_lightning
from lora_lab.exit_codes import CONFIG_ERROR
from lora_lab.runs import Run
from lora_lab.sweeps.launchers import fork_server

if TYPE_CHECKING:
    from lora_lab.sweeps.multirun import Job


def plan_command(jobs: "list[Job] | None") -> "list[Job]":
    """Checks the command line, and all jobs of a multirun, which it announces.

    [] for a single run, whose config is checked once Hydra has composed it. `jobs` that are given
    are checked. Exits where the command line is wrong.
    """
    try:
        sys.argv[1:] = arguments = compose.hydra_arguments(project.enter(sys.argv[1:]))
        fork_server.start(arguments)
        if any(argument.lstrip("+~").startswith("hydra") for argument in arguments):
            check_launcher(arguments)
        if not set(MULTIRUN) & set(arguments):
            check_single(arguments)
        points = compose.sweep_points(arguments) if jobs is None else []
    except ConfigError as error:
        print_error("config error", str(error))
        sys.exit(CONFIG_ERROR)
    if jobs is not None or not set(MULTIRUN) & set(arguments):
        return jobs or []
    with frozen_imports():
        from lora_lab.sweeps import multirun, sweeper

    silence_lightning()
    jobs = multirun.plan_jobs(points)
    if jobs:
        announce(jobs)
        sweeper.use_search(sweeper.JobList(jobs))
        sys.argv.append("hydra/sweeper=points")
    return jobs


def check_launcher(arguments: Sequence[str]) -> None:
    """Makes our launchers known to Hydra. Raises ConfigError for a wrong one, or its settings."""
    from lora_lab.sweeps.launchers.register import register
    from lora_lab.sweeps.launchers.settings import check_hydra_settings

    register()
    check_hydra_settings(arguments)


def announce(jobs: "list[Job]", total: int = 0) -> None:
    """Prints in one line how many runs the multirun has, in which states, and each config error.

    So it says with which other versions of libraries finished runs were trained. `total` is the
    number of its runs, where `jobs` are not all of them yet.
    """
    from lora_lab.sweeps import multirun
    from lora_lab.training.source_code import other_versions

    multirun.set_jobs(jobs, total)
    states = [(job.path, job.state) for job in jobs]
    finished = [Run(path) for path, state in states if path and state == "finished"]
    counts = Counter(state for _, state in states if state != "none")
    versions = Counter(text for run in finished if (text := other_versions(run)))
    texts = [f"{n} {state}" for state, n in counts.items()]
    texts += [f"{n} trained with {text}" for text, n in versions.items()]
    suffix = f" ({', '.join(texts)})" if texts else ""
    print_labelled("multirun", f"{max(total, len(jobs))} runs{suffix}")
    for cause, n in Counter(job.error for job in jobs if job.error).items():
        print_error("config error", cause, f" ({n} of the runs)" if n > 1 else "")


def finish(jobs: "list[Job]") -> None:
    """Prints the table of all jobs, with the cause of each failure, and where output is left."""
    from lora_lab import report
    from lora_lab.sweeps import multirun

    rows = [(job.overrides, job.path, job.state, job.cause) for job in jobs]
    console.print(report.job_table(rows))
    if lacking := sum(job.rows_lost for job in jobs):
        hint = "each log.txt says what; metrics.jsonl has all"
        print_error("W&B", f"lacks rows of {lacking} of the {len(jobs)} runs: {hint}", to=console)
    if folder := multirun.close():
        console.print("output of jobs that were lost:", folder, soft_wrap=True, highlight=False)


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Within it modules are imported fast, and the garbage collector never looks at them again.

    An import makes very many objects that all stay. Collecting in between finds nothing, and each
    later collection, the last one at exit, would go through all of them.
    """
    module_count = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    # Only after a real import. In a later job of this process nothing new is imported, and freezing
    # again would keep what the jobs before it left to be collected.
    if len(sys.modules) > module_count:
        gc.freeze()
