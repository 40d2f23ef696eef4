"""`make faults`: brings about all kinds of faults, and prints what came of them as one table.

- tried: faults that were brought about
- survived: afterwards the same command, or a reader, ends right. A training that is repeated ends
  with the numbers of one that nothing happened to, bit for bit. A reader gives the right numbers,
  or names the damaged file and goes on with the rest.
- lost: finished training, or a person's file, is gone
- unsaid: a wrong number is given without a word, or a command exits with 0 and a wrong output
- tracebacks: a traceback of Python in what a command prints

Exits with 1 unless all are survived and nothing is lost or unsaid, after the details of each that
is not: the fault, the command, and the end of what it printed. Kills come at random moments, drawn
from --seed.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.trial import Trial

names = sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))
modules = {name: import_module(f"tests.faults.{name}") for name in names}
KINDS = {name: module for name, module in modules.items() if hasattr(module, "faults")}
"""The modules of this folder that have `faults(folder, draws)`, by name.

Each has `prepare(folder)` too, which makes what its faults share.
"""


def trials_of(kind: str, seed: int, count: int | None) -> list[Trial]:
    """Brings about the faults of a kind, or `count` of them; prints what was bad as it comes."""
    module = KINDS[kind]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))  # TemporaryDirectory: forks would remove it
    try:
        module.prepare(folder)
        faults = list(module.faults(folder, random.Random(f"{kind} {seed}")))
        if count is not None:
            faults = faults[:count]
        with multiprocessing.get_context("fork").Pool(getattr(module, "WORKERS", 2)) as pool:
            trials = []
            for trial in pool.imap_unordered(_call, faults):
                trials.append(trial)
                if not trial.survived:
                    print(trial.description(), flush=True)
            return trials
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(fault: Callable[[], Trial]) -> Trial:
    try:
        return fault()
    except Exception:
        trial = Trial("the suite itself failed", repr(fault))
        trial.note("wrong end", traceback.format_exc())
        return trial


def table_of(trials: list[Trial], seconds: dict[str, float]) -> Table:
    """The table: a line for each fault."""
    times = ", ".join(f"{kind} {s:.0f} s" for kind, s in seconds.items())
    table = Table(caption=times, caption_justify="left")
    table.add_column("fault")
    for name in ("tried", "survived", "lost", "unsaid", "tracebacks"):
        table.add_column(name, justify="right")
    for fault in [*sorted({trial.fault for trial in trials}), ""]:
        of_fault = [trial for trial in trials if fault in ("", trial.fault)]
        tried = [trial for trial in of_fault if not trial.skipped]
        counts = [sum(t.tried for t in tried), sum(t.tried for t in tried if t.survived)]
        counts += [sum(kind in t.bad for t in tried) for kind in ("lost", "unsaid", "traceback")]
        why = {trial.skipped for trial in of_fault if trial.skipped and fault}
        name = f"{fault or 'all'}{''.join(f' (skipped: {reason})' for reason in why)}"
        table.add_row(name, *map(str, counts), style=None if fault else "bold")
    return table


def main() -> None:
    """Tries the kinds that are asked for, or all."""
    parser = argparse.ArgumentParser("make faults ARGS=…")
    parser.add_argument("--only", action="append", choices=KINDS, help="a kind of fault (all)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the kills")
    parser.add_argument("--count", type=int, help="so many faults of each kind (all)")
    given = parser.parse_args()
    print(f"--seed {given.seed}", flush=True)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    trials: list[Trial] = []
    seconds: dict[str, float] = {}
    for kind in given.only or KINDS:
        began = time.monotonic()
        of_kind = trials_of(kind, given.seed, given.count)
        seconds[kind] = time.monotonic() - began
        print(f"{kind}: {len(of_kind)} tried in {seconds[kind]:.0f} s", flush=True)
        trials += of_kind
    Console(width=100).print(table_of(trials, seconds))
    sys.exit(not all(trial.survived for trial in trials))


if __name__ == "__main__":
    main()
