"""Output that may fail: files that are replaced as a whole, and streams on a disk that may be full. Plain Python."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO


def write_whole(path: str | Path, data: bytes) -> None:
    """Save so that under `path` there is a whole file at any moment, the one before or this one.

    A link stays a link. What is no regular file, a device or a pipe, is written to and not replaced.

    Raises:
        OSError: it can't be written; a regular file that was there before still is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    draft = path.with_name(f".draft.{os.getpid()}")  # beside it: only inside a file system a move is atomic
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class Lossy:
    """A text stream that loses what its disk or terminal does not take, where `stream` would raise OSError.

    A reader that has gone, as of `| head`, still raises BrokenPipeError.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            raise
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lossy_output() -> Iterator[None]:
    """What is printed meanwhile may be lost, but ends nothing: stdout and stderr may be a log on a full disk."""
    streams = sys.stdout, sys.stderr
    try:
        with redirect_stdout(Lossy(sys.stdout)), redirect_stderr(Lossy(sys.stderr)):
            yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except BrokenPipeError:
                raise
            except OSError:  # else Python tries again when it ends, and changes the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def escape_what_cannot_be_printed(stream: TextIO) -> None:
    """Make a stream print a backslash and a number for characters that its encoding lacks, where it would raise."""
    with suppress(AttributeError):  # a notebook's stream takes all characters
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
