"""Creates and locks the folder of a run; loggers for TensorBoard and CSV whose failed writes do not stop training."""

import csv
import errno
import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

from ..checkpoint.io import atomic_write


def create_run_folder(runs: Path) -> Path:
    """Creates the folder version_N of a new run in `runs`; concurrent callers get different folders."""
    runs.mkdir(parents=True, exist_ok=True)
    taken = [int(found[1]) for path in runs.iterdir() if (found := re.fullmatch(r"version_(\d+)", path.name))]
    for n in count(max(taken, default=-1) + 1):
        with suppress(FileExistsError):
            (runs / f"version_{n}").mkdir()
            break
    return runs / f"version_{n}"


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def lock_run_folder(folder: Path) -> int | None:
    """Locks a run's folder against training in another process.

    Returns:
        a file descriptor; closing it, or the end of the process, releases the lock. None if locks are not supported.

    Raises:
        ValueError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"another process trains in {os.path.relpath(folder)}: wait until it ends, or start a separate run "
            "from a copy of its last.ckpt"
        ) from None
    except OSError:  # some network file systems have no locks
        os.close(lock)
        return None
    return lock


def append_bytes(path: str | Path, data: bytes) -> None:
    """Appends all of `data` to an existing file, or nothing.

    Raises:
        OSError: the data can't be written.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def warn(path: str | Path, message: str) -> None:
    print(f"warning: {os.path.relpath(path)}: {message}", file=sys.stderr, flush=True)


class BufferedEventFile:
    """TensorBoard's event file; buffers records in memory while the disk is full.

    It replaces tensorboard's file object, whose first OSError ends the writer thread. It writes complete records only,
    because readers stop at a truncated one.

    Args:
        path: an existing file, which is appended to.
        most: maximum number of buffered bytes; once a write has failed, further records are lost.
    """

    SECONDS = 1.0  # between two attempts to write

    def __init__(self, path: str, most: int = 2**26):
        self.path, self.most, self.pending, self.pending_bytes, self.lost = path, most, list[bytes](), 0, 0
        self.lock, self.failed, self.next_attempt = threading.Lock(), False, 0.0

    def write(self, record: bytes) -> None:
        with self.lock:
            if self.failed and self.pending_bytes + len(record) > self.most:
                self.lost += 1
            else:
                self.pending.append(record)
                self.pending_bytes += len(record)
        self.flush()

    def flush(self) -> None:
        with self.lock:
            if self.pending and time.monotonic() >= self.next_attempt:
                self.try_write()

    def try_write(self) -> None:
        try:
            append_bytes(self.path, b"".join(self.pending))
        except OSError as error:
            if not self.failed:
                warn(self.path, f"{error.strerror}. Training continues; the curves are written when there is room")
            self.failed, self.next_attempt = True, time.monotonic() + self.SECONDS
            return
        self.pending, self.pending_bytes = [], 0
        if self.failed:
            lost = f"but {self.lost:,} records are lost" if self.lost else "and no record is lost"
            warn(self.path, f"writing works again, {lost}")
        self.failed, self.lost, self.next_attempt = False, 0, 0.0

    def close(self) -> None:
        with self.lock:
            if self.pending:
                self.try_write()
            if self.pending:
                warn(self.path, f"{len(self.pending) + self.lost:,} records of the curves are lost")


class RunLogger(TensorBoardLogger):
    """TensorBoardLogger whose failed writes do not stop training."""

    folder: Path | None = None  # of the run; log_dir once it is set
    opened = False

    @property
    def log_dir(self) -> str:
        return super().log_dir if self.folder is None else str(self.folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # Lightning adds the epoch, which would be a chart of its own above the losses
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @property
    def experiment(self) -> SummaryWriter:
        first, writer = not self.opened, super().experiment
        self.opened = True
        if first and isinstance(writer, SummaryWriter):
            events = writer._get_file_writer().event_writer
            events._async_writer._writer._writer = BufferedEventFile(events._file_name)
        return writer

    def save(self) -> None:
        try:
            super().save()
        except OSError:  # remove the truncated hparams.yaml; config.yaml and the checkpoints hold the same values
            with suppress(OSError):
                Path(self.log_dir, self.NAME_HPARAMS_FILE).unlink(missing_ok=True)


class RunCSVLogger(Logger):
    """Writes metrics to metrics.csv in the run's folder: a row for each call of log_metrics, as Lightning's CSVLogger.

    A resumed run continues the file, which CSVLogger would delete. Rows that were logged after the checkpoint are
    logged again, so they leave metrics.csv; metrics_before_step_N.csv is then a copy with them. A full disk is reported
    but does not stop training.
    """

    folder: Path | None = None  # of the run; nothing is written without it
    start_step = 0  # of a resumed run
    experiment = name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.columns, self.rows, self.failed = list[str](), list[dict[str, Any]](), False

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: config.yaml in the same folder has all settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})

    @rank_zero_only
    def save(self) -> None:
        if self.folder is None or not self.rows:
            return
        try:
            self.write(self.folder / "metrics.csv")
        except OSError as error:
            if not self.failed:
                warn(self.folder / "metrics.csv", f"{error.strerror}. Training continues; the next save tries again")
            self.failed = True
        else:
            self.rows, self.failed = [], False

    def write(self, path: Path) -> None:
        rows = self.rows
        if not path.is_file():
            self.columns = []  # somebody has removed the file: begin another one
        elif not self.columns:
            rows = self.read_earlier(path) + rows
        columns = ["step", *sorted({*self.columns, *chain.from_iterable(rows)} - {"step"})]
        if columns == self.columns:
            append_bytes(path, csv_bytes(columns, rows))
            return
        if self.columns:  # a new column
            with open(path, encoding="utf-8", newline="") as file:
                rows = [*csv.DictReader(file), *rows]
        atomic_write(path, (",".join(columns) + "\n").encode() + csv_bytes(columns, rows))
        self.columns = columns

    def read_earlier(self, path: Path) -> list[dict[str, Any]]:
        """Rows of the steps before the checkpoint. If there are others, the file is copied first."""
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, restkey="rest"))
        for row in rows:
            row.pop("rest", None)
        kept = [row for row in rows if (row.get("step") or "").isdecimal() and int(row["step"]) < self.start_step]
        if len(kept) < len(rows):
            stem = f"metrics_before_step_{self.start_step}"
            names = chain([stem], (f"{stem}_{n}" for n in count(2)))
            copies = (path.with_name(f"{name}.csv") for name in names)
            atomic_write(next(copy for copy in copies if not copy.exists()), path.read_bytes())
        return kept


def csv_bytes(columns: list[str], rows: Iterable[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


@contextmanager
def wandb_run_in(folder: Path, logger: WandbLogger) -> Iterator[None]:
    """Starts W&B's run in the folder, with its name, or resumes the one that is there; ends it at exit.

    Environment variables that are set, and arguments of WandbLogger, have priority.

    Raises:
        ValueError: W&B can't start, for example because nobody is logged in.
    """
    runs = (re.fullmatch(r"(?:offline-)?run-(\d+_\d+)-(.+)", path.name) for path in folder.glob("wandb/*run-*"))
    ids = [run[2] for run in sorted(filter(None, runs), key=lambda run: run[1])]
    variables = {"WANDB_DIR": str(folder), "WANDB_NAME": "/".join(folder.parts[-2:])}
    variables |= {"WANDB_RUN_ID": ids[-1]} if ids else {}
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        run = logger.experiment
    except Exception as error:  # of W&B
        raise ValueError(
            f"W&B can't start: {' '.join(str(error).split())} WANDB_MODE=offline needs neither an account nor a network"
        ) from None
    finally:
        for name in added:
            os.environ.pop(name, None)
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        run.finish(exit_code)
        sys.modules["wandb"].teardown()  # the next run of this process reads the variables again
