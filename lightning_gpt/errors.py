"""Messages to the user: errors and notes in one line on stderr, and output that tolerates a full disk."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from importlib import import_module
from typing import Any, TextIO

import torch


class LossyStream:
    """Wraps a text stream and discards output whose write raises OSError.

    BrokenPipeError, from a reader such as `| head` that has exited, is still raised.
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
    """Within this context, printing never fails on a full disk, where stdout or stderr may be a log; output is lost."""
    streams = sys.stdout, sys.stderr
    try:
        with redirect_stdout(LossyStream(sys.stdout)), redirect_stderr(LossyStream(sys.stderr)):
            yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except BrokenPipeError:
                raise
            except OSError:  # else Python flushes again at exit, which changes the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def escape_unprintable(stream: TextIO) -> None:
    """Make a stream print characters that its encoding lacks as backslash escapes instead of raising."""
    with suppress(AttributeError):  # a notebook's stream has no reconfigure and takes all characters
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def print_error(message: str) -> None:
    """Print an error to stderr, with the rank if it is not 0."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    with suppress(OSError):  # stderr may be a log on a full disk; the exit code remains
        print(f"lightning-gpt: error: {message}" if rank == "0" else f"rank {rank}: error: {message}", file=sys.stderr)


def program_name() -> str:
    """The command that starts this program, for messages that suggest commands."""
    if sys.argv[0].endswith("__main__.py"):
        return "python -m lightning_gpt"
    return "lightning-gpt" if shutil.which("lightning-gpt") else os.path.relpath(sys.argv[0])


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python or PyTorch means that memory has run out, judged by its type and message."""
    reasons = ["can't allocate memory", "can't start new thread", "size calculation overflowed"]
    reasons += ["unexpected pos"]  # raised by torch.save to memory
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)


def message_with_notes(error: BaseException) -> str:
    """The message of an error followed by its notes, such as the path of the last good checkpoint."""
    return ". ".join([str(error), *getattr(error, "__notes__", [])])


def print_info(message: str) -> None:
    """Print a message to stderr on rank 0 only. `rank_zero_only` would import Lightning."""
    ranks = "RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"  # the order in which Lightning reads them
    if next((os.environ[name] for name in ranks if name in os.environ), "0") == "0":
        print(f"lightning-gpt: {message}", file=sys.stderr, flush=True)


@cache
def warn_once(message: str) -> None:
    """Print a message to stderr, once per process."""
    print(f"lightning-gpt: {message}", file=sys.stderr)


def import_optional(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        ValueError: it is not installed; the message gives the pip command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"this needs the package {(error.name or module).split('.')[0]}, which is not installed: "
            f"pip install 'tiny-lightning-gpt[{extra}]'"
        ) from None
