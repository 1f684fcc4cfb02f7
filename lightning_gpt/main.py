"""The command lightning-gpt: finds what was asked for, and makes one sentence of what goes wrong."""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from inspect import signature
from typing import NoReturn

import jsonargparse
import torch

from .files import escape_what_cannot_be_printed

# what needs no Trainer: a module and a function of it. Lightning takes seconds to import, and these are to be quick
COMMANDS = {
    "generate": "speak",
    "score": "speak",
    "report": "report",
    "shrink": "checkpoint",
    "import": "formats:import_weights",
    "export": "formats",
}
TRAINING = "fit", "validate", "test"
HELP = """lightning-gpt COMMAND [options]; each COMMAND has its own --help.

  fit        train a model, or go on training one
  validate   the loss of a checkpoint over its whole validation split
  test       the same figures as validate, under test/
  generate   write text from a checkpoint
  score      how likely a checkpoint finds a text
  report     a page about a run, or about several side by side
  shrink     a checkpoint's net in a small file, one byte a weight
  import     make a checkpoint of weights from GPT-2, nanoGPT or safetensors
  export     write a checkpoint's net as safetensors, for transformers, or as ONNX"""


def complain(message: str) -> None:
    """Say on stderr what is wrong, and in which process if it isn't the first of several."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    with suppress(OSError):  # stderr may be a log on a full disk; the exit code tells as well
        print(f"lightning-gpt: error: {message}" if rank == "0" else f"rank {rank}: error: {message}", file=sys.stderr)


class Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in one line; --help has the rest."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        complain(" ".join(message.split()))
        sys.exit(2)


def do(args: list[str]) -> None:
    """Do what the command line `args` says."""
    if args in ([], ["-h"], ["--help"]):
        print(HELP)
    elif args[0] in COMMANDS:
        module, _, name = COMMANDS[args[0]].partition(":")
        function = getattr(import_module(f".{module}", __package__), name or args[0])
        parser = Parser(prog=f"lightning-gpt {args[0]}", description=function.__doc__.split("\n")[0])
        parser.add_argument("--config", action="config", help="A YAML file with any of these options.")
        given = [name for name in signature(function).parameters if name == "runs"]  # without a flag
        for name in given:
            parser.add_argument(name, nargs="*", default=[], help="Folders of runs; none is the newest.")
        parser.add_function_arguments(function, skip=set(given))
        for action in parser._actions:  # a flag may have a name that Python keeps for itself: from_ is --from
            for flag in [flag for flag in action.option_strings if flag.endswith("_")]:
                action.option_strings = [flag.rstrip("_")]
                parser._option_string_actions[flag.rstrip("_")] = action
        options = parser.parse_args(args[1:])
        function(**{key: value for key, value in options.items() if key != "config"})
    elif args[0] not in TRAINING and not args[0].startswith("-"):
        raise ValueError(f"there is no command {args[0]!r}: take {', '.join(TRAINING)} or {', '.join(COMMANDS)}")
    else:
        from .cli import train

        train(args)


def program() -> str:
    """How this program is called here, for commands to copy."""
    if sys.argv[0].endswith("__main__.py"):
        return "python -m lightning_gpt"
    return "lightning-gpt" if shutil.which("lightning-gpt") else os.path.relpath(sys.argv[0])


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that torch frees, and not fetch fresh pages: a CPU step is a fifth shorter."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's free top stays
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: up to here blocks come from the heap


def main(args: list[str] | None = None) -> None:
    """Run a command line, sys.argv's if none is given."""
    run(do, list(sys.argv[1:] if args is None else args))


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory has run out, in one of the ways that Python and torch have to say so."""
    reasons = "can't allocate memory", "can't start new thread", "unexpected pos"  # of an archive in memory
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)


def with_notes(error: BaseException) -> str:
    """What an error says, and what was noted on its way: the last good checkpoint, for example."""
    return ". ".join([str(error), *getattr(error, "__notes__", [])])


def run(what: Callable[[list[str]], None], args: list[str]) -> None:
    """Do `what` with `args`; bad input ends with one sentence on stderr and exit code 2."""
    keep_freed_memory()
    escape_what_cannot_be_printed(sys.stdout)
    try:
        what(args)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = [str(error).split("\n")[0][:200]] if str(error) else []
        notes = getattr(error, "__notes__", [])
        complain(". ".join(["out of memory: take a smaller batch or model", *reason, *notes]))
        sys.exit(1)
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = ". What was saved before is untouched; make room, then go on with --ckpt_path last" if full else ""
        complain(f"{with_notes(error)}{hint}")
        sys.exit(1 if full else 2)
