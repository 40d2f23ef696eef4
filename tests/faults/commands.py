"""`lora-lab` commands that can be hit: forked from this process, or as processes of their own.

A forked command is what the same command line would do in a process of its own, less the seconds
of its imports. Its figures are of one pixel: to draw them takes most of a small run's time.
"""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from tests.conftest import SMALL

LIMIT = 300.0
"""Seconds after which a command is killed, and counts as one that does not end."""

ROOT = Path(__file__).parents[2]
"""The folder of the package that is tried: another one may be installed."""

MARK = "LORA_LAB_FAULTS"
"""The variable of the environment by which a command's processes are known."""

SHIFT = (
    *SMALL["shift"],
    "experiment=shift",
    "tracking=off",
    "figures=false",
    "adapter.dropout=0.3",
)
"""Settings of a small training."""


PIXEL = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\0\0\0\0:~\x9bU"
"""The head of a picture of one pixel, which a report reads the size from."""


@dataclass(frozen=True)
class Result:
    """How a command ended: its exit code, -N after the signal N, and all that it printed."""

    command: str
    code: int
    output: str
    timed_out: bool = False


@dataclass
class Command:
    """A command that runs."""

    arguments: tuple[str, ...]
    pid: int
    log: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)

    def wait(self, limit: float = LIMIT) -> Result:
        """Waits for its end; kills it and all its processes after `limit` seconds."""
        end, timed_out = time.monotonic() + limit, False
        while not (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end and not timed_out:
                timed_out = True
                self.kill_all()
            time.sleep(0.005)
        output = self.log.read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status[1])
        return Result(" ".join(("lora-lab", *self.arguments)), code, output, timed_out)

    def send(self, signum: signal.Signals) -> None:
        """Sends a signal to the command alone."""
        os.kill(self.pid, signum)

    def kill_all(self) -> None:
        """Kills the command and all processes that it started."""
        for pid in {self.pid, *processes_of(self.mark)}:
            _kill(pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def processes_of(mark: str, name: str = "") -> list[int]:
    """The processes whose environment has the mark, of those whose command line has `name`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if is_marked and name.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def parent_of(pid: int) -> int:
    """The parent of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def fork(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    logs: Path | None = None,
) -> Command:
    """Starts `lora-lab ARGUMENTS` in `folder`, in a fork of this process.

    It leads a session of its own. Its output goes to a file in `logs`, by default in `folder`. This
    process must have one thread.
    """
    log = (logs or folder) / f".output-{uuid.uuid4().hex}"
    log.touch()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Command(arguments, pid, log)
    code = 1
    try:
        code = _run_here(arguments, folder, log, environment or {})
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_here(
    arguments: tuple[str, ...], folder: Path, log: Path, environment: Mapping[str, str]
) -> int:
    """Runs a command in this process, which is to end then, and gives its exit code."""
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler if signum == 2 else signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Those of a pool's worker are pipes or closed files: the command has a terminal's streams.
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.chdir(folder)
    os.environ.update(environment)
    from lora_lab.cli import main as cli

    setattr(Figure, "savefig", lambda _, path: path.write_bytes(PIXEL))  # noqa: B010
    sys.argv = ["lora-lab", *arguments]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore
    atexit._run_exitfuncs()
    return code


def run(*arguments: str, folder: Path, environment: Mapping[str, str] | None = None) -> Result:
    """Runs a forked command to its end."""
    return fork(*arguments, folder=folder, environment=environment).wait()


def spawn(*arguments: str, folder: Path, environment: Mapping[str, str] | None = None) -> Command:
    """Starts `lora-lab ARGUMENTS` as a process of its own, in a session of its own."""
    log = folder / f".output-{uuid.uuid4().hex}"
    mark = uuid.uuid4().hex
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_lab.cli", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {}), MARK: mark},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    process.returncode = 0  # it is waited for by its id
    return Command(arguments, process.pid, log, mark)


def copy(tree: Path, name: str) -> Path:
    """A copy of a folder beside it, without the outputs of commands."""
    new = tree.with_name(f"{name}-{uuid.uuid4().hex[:8]}")
    ignored = shutil.ignore_patterns(".output-*")
    shutil.copytree(tree, new, symlinks=True, ignore=ignored)
    return new
