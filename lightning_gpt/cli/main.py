"""The command lightning-gpt: dispatches to its subcommands and reports errors in one line."""

import atexit
import ctypes
import errno
import gc
import os
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any, cast

from .. import __version__
from ..errors import escape_unprintable, is_out_of_memory, message_with_notes, print_error
from .help import requested_help, short_help, usage
from .parser import Parser
from .suggestions import nearest_command, spell_out

# commands without a Trainer, as module:function; they start quickly because importing Lightning takes seconds
COMMANDS = {
    "generate": "cli.generate:generate_command",
    "score": "cli.generate:score_command",
    "report": "analysis.report",
    "quantize": "checkpoint.quantize",
    "import": "checkpoint.convert:import_weights",
    "export": "checkpoint.convert",
    "demonstrations": "alignment.verse",
    "preferences": "alignment.preferences",
    "frontier": "alignment.frontier",
}
TRAINING = "fit", "sft", "reward", "dpo", "grpo", "validate", "test"
HELP = """lightning-gpt COMMAND [options]; each COMMAND has its own --help.

  fit        train a model, or resume training
  sft        fine-tune a model on prompts and completions (JSON lines)
  reward     train a reward model on pairs of completions (JSON lines)
  dpo        train a policy on pairs of completions
  grpo       train a policy to get more of a reward
  validate   compute the loss of a checkpoint on its full validation split
  test       compute the same metrics as validate, logged under test/
  generate   generate text from a checkpoint
  score      compute the log-likelihood of a text under a checkpoint
  report     write a page about a run, or about several side by side
  quantize   write a checkpoint's net with int8 weights
  import     make a checkpoint from weights of GPT-2, nanoGPT or safetensors
  export     write a checkpoint's net as safetensors, for transformers, or as ONNX
  demonstrations
             write example prompts and completions for sft: verse or prose
  preferences
             write pairs of a checkpoint's own texts, ordered by a reward
  frontier   draw reward against KL of runs, beside best-of-n and the optimum"""


def dispatch(args: list[str]) -> None:
    """Run the subcommand that `args` begins with, or print the help."""
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if args in ([], ["-h"], ["--help"]):
        print(HELP)
        return
    if args in (["--version"], ["-V"], ["version"]):
        print(f"lightning-gpt {__version__}")
        return
    check_command(args)
    args = spell_out(args)
    if args[0] in COMMANDS:
        module, _, name = COMMANDS[args[0]].partition(":")
        function = getattr(import_module(f"lightning_gpt.{module}"), name or args[0])
        parser = Parser(prog=usage(args[0]), description=function.__doc__.split("\n")[0])
        parser.add_argument("--config", action="config", help="A YAML file with any of these options.")
        positional = [name for name in signature(function).parameters if name == "runs"]
        for name in positional:
            parser.add_argument(name, nargs="*", default=[], help="Run folders; default: the newest run.")
        parser.add_function_arguments(function, skip=set(positional))
        if wanted := requested_help(args):
            if wanted == "all":
                parser.print_help()
            else:
                names = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
                print(short_help(parser, dict(parser.get_defaults().items()), {"": names}))
            return
        options = parser.parse_args(args[1:])
        function(**{key: value for key, value in options.items() if key != "config"})
    else:
        gc.disable()  # it takes half a second of the imports, and finds nothing
        import_torchmetrics()
        from .train import train

        gc.enable()
        train(args)


def import_torchmetrics() -> None:
    """Imports torchmetrics without optional packages that we don't use, which would take seconds."""
    from lightning_utilities.core import imports

    unused = "matplotlib", "scipy", "torchvision", "transformers"

    def check_available(cache: Any) -> None:
        if str(cache.requirement).startswith(unused):
            cache.available, cache.message = False, f"{cache.requirement} is not imported"
        else:
            original_check(cache)

    cache_class, module = cast(Any, imports.RequirementCache), cast(Any, imports)
    original_check, package_available = cache_class._check_available, imports.package_available
    try:
        cache_class._check_available = check_available
        module.package_available = lambda name: name not in unused and package_available(name)
        import torchmetrics  # noqa: F401
    finally:
        cache_class._check_available = original_check
        module.package_available = package_available


def check_command(args: list[str]) -> None:
    """Raises ValueError unless `args` begins with a command; the message names the one that is meant."""
    commands = [*TRAINING, *COMMANDS]
    if args[0] in commands:
        return
    later = [arg for arg in args if arg in commands]
    if args[0].startswith("-") and later:
        args.remove(later[0])
        raise ValueError(f"the command comes first: lightning-gpt {shlex.join([later[0], *args])}")
    if args[0].startswith("-"):
        raise ValueError(
            f"the command comes first, as in lightning-gpt fit {args[0]}; commands are {', '.join(commands)}"
        )
    meant = nearest_command(args[0], commands)
    remedy = f"did you mean {meant}?" if meant else f"use {', '.join(commands)}"
    raise ValueError(f"there is no command {args[0]!r}: {remedy}")


def tune_allocator() -> None:
    """Make glibc keep freed large blocks instead of mapping fresh pages, which shortens a CPU step by a fifth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never return the top of the heap
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: allocate blocks up to this size on the heap


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`, by default that of the process, which then ends."""
    run(dispatch, list(sys.argv[1:] if args is None else args))
    if args is None:
        exit_process()


def exit_process() -> None:
    """End the process as Python does, but without searching PyTorch and Lightning for cycles, which takes a second."""
    inductor = sys.modules.get("torch._inductor.async_compile")
    if shutdown := getattr(inductor, "shutdown_compile_workers", None):
        atexit.unregister(shutdown)  # the workers end with this process, and waiting for them takes seconds
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush(), sys.stderr.flush()
    except OSError:
        return  # a full disk, or a reader that has gone: Python reports it
    os._exit(0)


def run(function: Callable[[list[str]], None], args: list[str]) -> None:
    """Call `function(args)`; on bad input, print one line to stderr and exit with code 2."""
    tune_allocator()
    escape_unprintable(sys.stdout)
    try:
        function(args)
    except BrokenPipeError:  # the reader of our output has closed the pipe, as `head` does
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
        print_error(". ".join(["out of memory: use a smaller batch or model", *reason, *notes]))
        sys.exit(1)
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = ". Files saved earlier are intact; free some space, then resume with --ckpt_path last" if full else ""
        print_error(f"{message_with_notes(error)}{hint}")
        sys.exit(1 if full else 2)
