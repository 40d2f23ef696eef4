"""A run in W&B: its start, what it is sent, its end, and how much of it W&B has then."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.errors import CommError
from wandb.errors import Error as WandbError
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

from lora_lab.config.schema import Config
from lora_lab.tracking import record_log, wandb_service
from lora_lab.tracking.names import shortened, tags_of
from lora_lab.tracking.wandb_service import one_line

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30
"""Seconds that W&B's server has to answer; after them the run is tracked offline."""

LAST_ROW_TIMEOUT = 10
"""Seconds without a new row after which W&B's file, or its server, is taken to have all it gets."""

ANSWER_TIMEOUT = 5
"""Seconds that W&B's server has to say how many rows it took."""

GRACE = 2
"""Seconds that W&B's client has to write a run's end to its file, where its server is given up."""


class Server:
    """What is known of W&B's server. One that has failed a run is not waited for again."""

    waited = 0.0
    """Seconds that this process has waited for a server that did not answer."""
    answers = True
    """Whether the server answered when it was last asked for the rows that it took."""
    failure_file: Path | None = None
    """A file that tells the other processes of a multirun that the server has failed."""

    @classmethod
    def has_failed(cls) -> bool:
        """Whether the server has failed a run of this process or of its multirun."""
        return cls.waited > 0 or (cls.failure_file is not None and cls.failure_file.exists())

    @classmethod
    def fail(cls, seconds: float) -> None:
        """Notes that the server was waited for in vain."""
        cls.waited += seconds
        if cls.failure_file is not None:
            with suppress(OSError):
                cls.failure_file.parent.mkdir(parents=True, exist_ok=True)
                cls.failure_file.touch()


class WandbRun(WandbLogger):
    """A run in W&B, as a logger for Lightning's Trainer.

    Nothing that W&B raises gets out of it: training goes on, `rows` counts what was to be logged,
    `errors` keeps the first error of each kind, and `finish` says what W&B lacks.
    """

    def __init__(self, run: wandb.Run, finish_timeout: float):
        super().__init__(experiment=run)
        self.run = run
        self.folder = Path(run.settings.sync_dir)
        self.online = not run.offline
        self.finish_timeout = finish_timeout
        self.rows = 0
        self.errors: dict[str, str] = {}
        self._timed_out = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs a row."""
        self.rows += 1
        with self.guarded("rows"):
            super().log_metrics(dict(metrics), step)

    def log_media(self, media: Callable[[], dict[str, Any]]) -> None:
        """Logs the row of pictures, tables and charts that `media` makes."""
        if self._gives_up("media"):
            self.rows += 1
            return
        with self.guarded("media"):
            self.log_metrics(media())

    def log_artifact(self, directory: Path, kind: str) -> None:
        """Stores the files of a directory of the run as an artifact of type `kind`."""
        if self._gives_up(kind):
            return
        with self.guarded(kind):
            artifact = wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
            for file in sorted(directory.iterdir()):
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)

    def _gives_up(self, what: str) -> bool:
        """Whether the server has failed, so that it is not asked about `what`; that is noted."""
        if given_up := self.online and Server.has_failed():
            self.errors.setdefault(what, "not sent, as the server had failed")
        return given_up

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Within it an error of W&B is kept in `errors`, and W&B copies files to its run's folder.

        It keeps copies of an artifact's files until `wandb sync`, by default in the home directory.
        """
        began, chosen = time.monotonic(), os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = chosen or str(self.folder)
        try:
            yield
        except Exception as error:  # W&B's own, and OSError, ValueError, pydantic's, …
            self.errors.setdefault(what, one_line(error))
            if self.online and isinstance(error, CommError):
                Server.fail(time.monotonic() - began)
        finally:
            if chosen is None:
                del os.environ["WANDB_DATA_DIR"]

    def finish(self, exit_code: int) -> dict[str, Any]:
        """Ends the run in W&B, and logs in one line what W&B lacks of it.

        Gives that as fields of status.json: none where W&B has all. The server is waited for as
        long as `finish_timeout` says, once in a process: what was waited in vain is taken off.
        """
        wait = self.finish_timeout
        if self.online and Server.has_failed():
            # Nothing waited here: the server has failed another process of the multirun.
            wait = max(0, wait - Server.waited) if Server.waited else 0
        # In a thread, because W&B's finish has no limit that can be set later than its init.
        ending = Thread(target=self._finish, args=(exit_code,), daemon=True)
        began = time.monotonic()
        ending.start()
        ending.join(wait + GRACE)
        if ending.is_alive() or self._timed_out:
            seconds = time.monotonic() - began
            self.errors["end"] = f"given up after {seconds:.0f} s"
            if self.online:
                Server.fail(seconds)
        taken = self._rows_on_server() if self.online else self._rows_in_file()
        if taken in (None, self.rows) and not self.errors:
            return {}
        line = self._loss(taken)
        log.error(line)
        lost = {} if taken is None else {"wandb_rows_lost": max(0, self.rows - taken)}
        return {**lost, "wandb_error": line}

    def _finish(self, exit_code: int) -> None:
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            self._timed_out = True
        except Exception as error:
            self.errors["end"] = one_line(error)

    def _loss(self, taken: int | None) -> str:
        """One line: how many rows W&B has, why not all, and what to do."""
        count = "AN UNKNOWN NUMBER" if taken is None else taken
        causes = "; ".join(f"{what}: {error}" for what, error in self.errors.items())
        if self.online:
            line = f"W&B'S SERVER TOOK {count} OF {self.rows} ROWS of this run"
            hint = f"`wandb sync {self.folder}` sends the rest; "
        else:
            line = f"W&B HOLDS {count} OF {self.rows} ROWS of this run ({self.folder})"
            hint, causes = "", causes or "is the disk full?"
        causes = f" ({causes})" if causes else ""
        return f"{line}{causes}. {hint}metrics.jsonl in the run directory has them all"

    def _rows_on_server(self) -> int | None:
        """How many rows the server says it has, once it has all or gets no more; None: no answer.

        Where something failed it is asked once.
        """
        if not Server.answers:
            return None
        try:
            path = f"{self.run.entity}/{self.run.project}/{self.run.id}"
            run = wandb.Api(timeout=ANSWER_TIMEOUT).run(path)
            deadline = time.monotonic() + (0 if self.errors else LAST_ROW_TIMEOUT)
            while run.historyLineCount < self.rows and time.monotonic() < deadline:
                time.sleep(0.5)
                run.load(force=True)
            return run.historyLineCount
        except Exception:
            Server.answers = False
            return None

    def _rows_in_file(self) -> int:
        with suppress(FileNotFoundError):  # the disk was full when it was to be made
            return count_rows(Path(self.run.settings.sync_file), self.rows)
        return 0


def start(cfg: Config, directory: Path, run_id: str | None) -> WandbRun | None:
    """Starts a W&B run: on the server where that is asked for and works, else offline, else none.

    With the `run_id` of an existing W&B run, that run is written anew from its first row.
    """
    if problem := wandb_service.start():
        log.error("W&B HOLDS NOTHING of this run (%s). metrics.jsonl has all", problem)
        return None
    if "WANDB_SWEEP_ID" not in os.environ:
        os.environ.pop("WANDB_RUN_ID", None)  # left over, it would be the id of all runs
    elif "WANDB_RUN_ID" in os.environ:
        run_id = None  # a W&B agent chose the id
    if cfg.tracking.mode == "online" and not Server.has_failed():
        began = time.monotonic()
        try:
            # Beside a run of the same pack, `login` always gives False.
            if wandb.run is None and not wandb.login(prompt=False, verify=False):
                raise WandbError("there is no login: `wandb login` makes one")
            return _init(cfg, directory, "online", run_id)
        except Exception as error:
            Server.fail(time.monotonic() - began)
            log.warning("W&B cannot be used online (%s): tracking offline", error)
    try:
        return _init(cfg, directory, "offline", run_id)
    except Exception as error:
        log.error("W&B HOLDS NOTHING of this run (%s). metrics.jsonl has all", one_line(error))
        return None


def _init(cfg: Config, directory: Path, mode: Any, run_id: str | None) -> WandbRun:
    run = wandb.init(
        mode=mode,
        reinit="create_new" if wandb.run else None,  # several runs at once in a pack
        id=run_id,
        project=cfg.tracking.project,
        entity=cfg.tracking.entity,
        dir=directory.parent.absolute(),  # one wandb/ for each experiment, for `wandb leet`
        name=shortened(directory.name),
        group=shortened(cfg.cell()),
        job_type=cfg.adapter.method,
        tags=tags_of((cfg.name, *cfg.target, *cfg.tracking.tags)),
        config=cfg.to_dict(),
        settings=wandb.Settings(
            silent=True,
            console="off",
            x_save_requirements=False,  # slow, as it reads all installed packages; see env.json
            init_timeout=INIT_TIMEOUT,
            finish_timeout=cfg.tracking.finish_timeout,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=2,  # seconds of rows that a kill can lose
        ),
    )
    return WandbRun(run, cfg.tracking.finish_timeout)


def count_rows(file: Path, expected: int) -> int:
    """How many rows a .wandb file has, once it has those expected or gets no more.

    Offline, `finish` returns before W&B's service process has written the last of them, so the file
    is read until they are complete, or until LAST_ROW_TIMEOUT seconds without a new row.
    """
    rows, deadline = -1, time.monotonic() + LAST_ROW_TIMEOUT
    while rows < expected and time.monotonic() < deadline:
        previous = rows
        rows = sum(record.HasField("history") for record in read_records(file))
        if rows > previous:
            deadline = time.monotonic() + LAST_ROW_TIMEOUT
        if rows < expected:
            time.sleep(0.05)
    return rows


def read_records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file. Ends where a crash or a full disk cut the file."""
    return map(Record.FromString, record_log.records(path))
