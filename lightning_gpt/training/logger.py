"""The folder of a run, which no other run shares, and TensorBoard's files in it, which no full disk breaks."""

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
    """Make the folder of a new run, version_N below `runs`; of several that ask at once each gets another one."""
    runs.mkdir(parents=True, exist_ok=True)
    taken = [int(found[1]) for path in runs.iterdir() if (found := re.fullmatch(r"version_(\d+)", path.name))]
    for n in count(max(taken, default=-1) + 1):
        with suppress(FileExistsError):
            (runs / f"version_{n}").mkdir()
            break
    return runs / f"version_{n}"


def lock_run_folder(folder: Path) -> int | None:
    """Keep other processes from training in a run's folder until the descriptor that this returns is closed.

    A process that is killed holds nothing any more. None where the file system has no locks.

    Raises:
        ValueError: another process holds it.
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
            f"another process trains in {os.path.relpath(folder)}: wait until it has ended, or start a run of its own "
            "from a copy of its last.ckpt"
        ) from None
    except OSError:  # as some network file systems say
        os.close(lock)
        return None
    return lock


class BufferedEventFile:
    """TensorBoard's event file on a disk that may be full: records wait in memory until there is room for them.

    It takes the place of tensorboard's own file object, whose first OSError ends the thread that writes. In the file
    there are whole records only, as readers stop at half a one.

    Args:
        path: the file, which is there already.
        most: bytes that may wait; records beyond them are lost.
    """

    SECONDS = 1.0  # between two attempts

    def __init__(self, path: str, most: int = 2**26):
        self.path, self.most, self.waiting, self.bytes, self.lost = path, most, list[bytes](), 0, 0
        self.lock, self.failed, self.next_attempt = threading.Lock(), False, 0.0

    def write(self, record: bytes) -> None:
        with self.lock:
            if self.failed and self.bytes + len(record) > self.most:
                self.lost += 1
            else:
                self.waiting.append(record)
                self.bytes += len(record)
        self.flush()

    def flush(self) -> None:
        with self.lock:
            if self.waiting and time.monotonic() >= self.next_attempt:
                self.attempt()

    def attempt(self) -> None:
        size = 0
        try:
            size = os.path.getsize(self.path)
            with open(self.path, "ab", buffering=0) as file:
                data = b"".join(self.waiting)
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            if not self.failed:
                self.say(f"{error.strerror}. Training goes on, and the curves wait until there is room")
            self.failed, self.next_attempt = True, time.monotonic() + self.SECONDS
            return
        self.waiting, self.bytes = [], 0
        if self.failed:
            self.say(
                "written again, " + (f"but {self.lost:,} records are lost" if self.lost else "and nothing is lost")
            )
        self.failed, self.lost, self.next_attempt = False, 0, 0.0

    def say(self, what: str) -> None:
        print(f"warning: {os.path.relpath(self.path)}: {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with self.lock:
            if self.waiting:
                self.attempt()
            if self.waiting:
                self.say(f"{len(self.waiting) + self.lost:,} records of the curves are lost")


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger for a run; what it can't write ends no training.

    `folder` is the run's, or is set when it has been claimed.
    """

    folder: Path | None = None
    opened = False

    @property
    def log_dir(self) -> str:
        return super().log_dir if self.folder is None else str(self.folder)

    @property
    def experiment(self) -> SummaryWriter:
        fresh, writer = not self.opened, super().experiment
        self.opened = True
        if fresh and isinstance(writer, SummaryWriter):
            events = writer._get_file_writer().event_writer
            events._async_writer._writer._writer = BufferedEventFile(events._file_name)
        return writer

    def save(self) -> None:
        try:
            super().save()
        except OSError:  # hparams.yaml, which config.yaml and the checkpoints hold as well; half a one would stay
            with suppress(OSError):
                Path(self.log_dir, self.NAME_HPARAMS_FILE).unlink(missing_ok=True)
