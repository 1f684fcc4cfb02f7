"""How the package talks to its user: one line on stderr, and output that survives a full disk. No Lightning."""

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
        with redirect_stdout(LossyStream(sys.stdout)), redirect_stderr(LossyStream(sys.stderr)):
            yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except BrokenPipeError:
                raise
            except OSError:  # else Python tries again when it ends, and changes the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def escape_unprintable(stream: TextIO) -> None:
    """Make a stream print a backslash and a number for characters that its encoding lacks, where it would raise."""
    with suppress(AttributeError):  # a notebook's stream takes all characters
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def print_error(message: str) -> None:
    """Say on stderr what is wrong, and in which process if it isn't the first of several."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    with suppress(OSError):  # stderr may be a log on a full disk; the exit code tells as well
        print(f"lightning-gpt: error: {message}" if rank == "0" else f"rank {rank}: error: {message}", file=sys.stderr)


def program_name() -> str:
    """How this program is called here, for commands to copy."""
    if sys.argv[0].endswith("__main__.py"):
        return "python -m lightning_gpt"
    return "lightning-gpt" if shutil.which("lightning-gpt") else os.path.relpath(sys.argv[0])


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory has run out, in one of the ways that Python and torch have to say so."""
    reasons = ["can't allocate memory", "can't start new thread", "size calculation overflowed"]
    reasons += ["unexpected pos"]  # of an archive in memory
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)


def message_with_notes(error: BaseException) -> str:
    """What an error says, and what was noted on its way: the last good checkpoint, for example."""
    return ". ".join([str(error), *getattr(error, "__notes__", [])])


def print_info(what: str) -> None:
    """Say something on stderr, once, however many processes there are; Lightning's own check would import it."""
    ranks = "RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"  # as Lightning looks for them
    if next((os.environ[name] for name in ranks if name in os.environ), "0") == "0":
        print(f"lightning-gpt: {what}", file=sys.stderr, flush=True)


@cache
def warn_once(line: str) -> None:
    print(f"lightning-gpt: {line}", file=sys.stderr)


def import_optional(module: str, extra: str) -> Any:
    """An optional module.

    Raises:
        ValueError: it is not installed; says how to.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"this needs the package {(error.name or module).split('.')[0]}, which is not installed: "
            f"pip install 'tiny-lightning-gpt[{extra}]'"
        ) from None
