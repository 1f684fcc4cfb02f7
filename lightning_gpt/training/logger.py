"""Creates and locks the folder of a run, and writes TensorBoard's files so that a full disk does not stop training."""

import errno
import os
import re
import sys
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter


def create_run_folder(runs: Path) -> Path:
    """Creates the folder version_N of a new run in `runs`; concurrent callers get different folders."""
    runs.mkdir(parents=True, exist_ok=True)
    taken = [int(found[1]) for path in runs.iterdir() if (found := re.fullmatch(r"version_(\d+)", path.name))]
    for n in count(max(taken, default=-1) + 1):
        with suppress(FileExistsError):
            (runs / f"version_{n}").mkdir()
            break
    return runs / f"version_{n}"


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
        size = 0
        try:
            size = os.path.getsize(self.path)
            with open(self.path, "ab", buffering=0) as file:
                data = b"".join(self.pending)
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            if not self.failed:
                self.warn(f"{error.strerror}. Training continues; the curves are written when there is room")
            self.failed, self.next_attempt = True, time.monotonic() + self.SECONDS
            return
        self.pending, self.pending_bytes = [], 0
        if self.failed:
            lost = f"but {self.lost:,} records are lost" if self.lost else "and no record is lost"
            self.warn(f"writing works again, {lost}")
        self.failed, self.lost, self.next_attempt = False, 0, 0.0

    def warn(self, message: str) -> None:
        print(f"warning: {os.path.relpath(self.path)}: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with self.lock:
            if self.pending:
                self.try_write()
            if self.pending:
                self.warn(f"{len(self.pending) + self.lost:,} records of the curves are lost")


class RunLogger(TensorBoardLogger):
    """TensorBoardLogger whose failed writes do not stop training."""

    folder: Path | None = None  # of the run; log_dir once it is set
    opened = False

    @property
    def log_dir(self) -> str:
        return super().log_dir if self.folder is None else str(self.folder)

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
