"""The command lightning-gpt: finds what was asked for, and makes one sentence of what goes wrong."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature

from ..errors import escape_unprintable, is_out_of_memory, message_with_notes, print_error
from .parser import Parser

# what needs no Trainer: a module and a function of it. Lightning takes seconds to import, and these are to be quick
COMMANDS = {
    "generate": "cli.generate:generate_command",
    "score": "cli.generate:score_command",
    "report": "analysis.report",
    "quantize": "checkpoint.quantize",
    "import": "checkpoint.convert:import_weights",
    "export": "checkpoint.convert",
}
TRAINING = "fit", "validate", "test"
HELP = """lightning-gpt COMMAND [options]; each COMMAND has its own --help.

  fit        train a model, or go on training one
  validate   the loss of a checkpoint over its whole validation split
  test       the same figures as validate, under test/
  generate   write text from a checkpoint
  score      how likely a checkpoint finds a text
  report     a page about a run, or about several side by side
  quantize   a checkpoint's net in a small file, in int8
  import     make a checkpoint of weights from GPT-2, nanoGPT or safetensors
  export     write a checkpoint's net as safetensors, for transformers, or as ONNX"""


def dispatch(args: list[str]) -> None:
    """Do what the command line `args` says."""
    if args in ([], ["-h"], ["--help"]):
        print(HELP)
    elif args[0] in COMMANDS:
        module, _, name = COMMANDS[args[0]].partition(":")
        function = getattr(import_module(f"lightning_gpt.{module}"), name or args[0])
        parser = Parser(prog=f"lightning-gpt {args[0]}", description=function.__doc__.split("\n")[0])
        parser.add_argument("--config", action="config", help="A YAML file with any of these options.")
        given = [name for name in signature(function).parameters if name == "runs"]  # without a flag
        for name in given:
            parser.add_argument(name, nargs="*", default=[], help="Folders of runs; none is the newest.")
        parser.add_function_arguments(function, skip=set(given))
        options = parser.parse_args(args[1:])
        function(**{key: value for key, value in options.items() if key != "config"})
    elif args[0] not in TRAINING and not args[0].startswith("-"):
        raise ValueError(f"there is no command {args[0]!r}: take {', '.join(TRAINING)} or {', '.join(COMMANDS)}")
    else:
        from .train import train

        train(args)


def tune_allocator() -> None:
    """Let glibc keep large blocks that torch frees, and not fetch fresh pages: a CPU step is a fifth shorter."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's free top stays
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: up to here blocks come from the heap


def main(args: list[str] | None = None) -> None:
    """Run a command line, sys.argv's if none is given."""
    run(dispatch, list(sys.argv[1:] if args is None else args))


def run(what: Callable[[list[str]], None], args: list[str]) -> None:
    """Do `what` with `args`; bad input ends with one sentence on stderr and exit code 2."""
    tune_allocator()
    escape_unprintable(sys.stdout)
    try:
        what(args)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = [str(error).split("\n")[0][:200]] if str(error) else []
        notes = getattr(error, "__notes__", [])
        print_error(". ".join(["out of memory: take a smaller batch or model", *reason, *notes]))
        sys.exit(1)
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = ". What was saved before is untouched; make room, then go on with --ckpt_path last" if full else ""
        print_error(f"{message_with_notes(error)}{hint}")
        sys.exit(1 if full else 2)
