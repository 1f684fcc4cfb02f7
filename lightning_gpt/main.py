"""The command lightning-gpt: finds what was asked for, and makes one sentence of what goes wrong."""

import argparse
import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import PurePath
from typing import Any, NoReturn, get_args

import jsonargparse
import torch
import yaml

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


class Dumper(yaml.SafeDumper):
    """Puts quotes around 1e3, which is a number to jsonargparse and text to PyYAML."""


exponent = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+")
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
as_yaml = partial(yaml.dump, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
jsonargparse.set_dumper("yaml", as_yaml)


class Text(str):
    """Text to be taken to the letter: jsonargparse looks for YAML in plain strings only."""


def types_of(action: argparse.Action) -> set[Any]:
    """The types that an option's value may have, None left out."""
    hint = getattr(action, "_typehint", str)
    return set(get_args(hint) if type(None) in get_args(hint) or str in get_args(hint) else [hint]) - {type(None)}


def is_text(action: argparse.Action) -> bool:
    """Whether an option takes a text or a path and nothing else, but for null."""
    types = types_of(action)
    return str in types and all(isinstance(t, type) and issubclass(t, (str, PurePath)) for t in types)


class Parser(jsonargparse.ArgumentParser):
    """Takes text to the letter and options by their full names, and says what is wrong in one line.

    jsonargparse reads every value as YAML, where `# 1`, `~` and nothing at all are null. Here only the word `null` is.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        if message.endswith("expected one argument"):
            message += "; where it begins with a dash, it follows an equals sign, as in --prompt=-x"
        complain(message)
        sys.exit(2)

    def parse_args(self, args=None, *rest, **kwargs):  # type: ignore[override]
        """As jsonargparse does; a class's own option, --trainer.callbacks.passage TEXT, may follow as its own word."""
        joined: list[str] = []
        for arg in sys.argv[1:] if args is None else args:
            option = joined[-1] if joined else ""
            nested = option.startswith("--") and "." in option and "=" not in option
            if nested and not arg.startswith("-") and option not in self._option_string_actions:
                joined[-1] += f"={arg}"
            else:
                joined.append(arg)
        options = super().parse_args(joined, *rest, **kwargs)
        for key, value in options.items():
            if isinstance(value, Text):
                options[key] = str(value)
            counts = isinstance(value, int) or isinstance(value, float) and "batches" in key
            if counts and abs(value) >= 2**63:
                self.error(f"{key}={value} is beyond the numbers of 64 bits that PyTorch counts with")
        return options

    def _parse_optional(self, arg_string):
        found = super()._parse_optional(arg_string)
        one = found[0] if isinstance(found, list) and found else found  # a list of one since Python 3.12
        if one and hasattr(one[0], "_typehint") and one[-1] is not None and one[1] not in one[0].option_strings:
            one = *one[:-1], Text(one[-1])  # for an option of a class, whose own parser reads it
            return [one] if isinstance(found, list) else one
        return found

    def _get_values(self, action, arg_strings):
        value = super()._get_values(action, arg_strings)
        return meant(action, value) if type(value) is str and hasattr(action, "_typehint") else value

    def _check_value_key(self, action, value, key, cfg, append=False):
        if hasattr(action, "_typehint"):
            if type(value) is Text:
                value = meant(action, str(value))
            elif type(value) is str and types_of(action) == {list[str]}:
                value = [value]
            if isinstance(value, str) and (is_text(action) or str in types_of(action) and reads_as_nothing(value)):
                return str(value)  # as it is in a config file, too: its strings are strings already
        return super()._check_value_key(action, value, key, cfg, append)


def meant(action: argparse.Action, value: str) -> str | list[str] | None:
    """What a value on the command line stands for; jsonargparse is to read the rest, but no Text."""
    if value == "null" and type(None) in get_args(action._typehint):  # type: ignore[attr-defined]
        return None
    if is_text(action):
        return Text(value)
    if types_of(action) == {list[str]}:
        return as_list(action, value)
    if value != "null" and reads_as_nothing(value):
        if str in types_of(action):
            return Text(value)
        raise argparse.ArgumentError(action, f"{value!r} is no value; the word null, where it may be, stands for none")
    return value


def as_list(action: argparse.Action, value: str) -> list[str]:
    """One text, or several in brackets: YAML's list, without its types."""
    try:
        node = yaml.compose(value, yaml.BaseLoader) if value.startswith("[") and value.endswith("]") else None
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(text, yaml.ScalarNode) for text in node.value):
        return [value]
    texts = [text.value for text in node.value]
    if len(texts) == 1 and node.value[0].style is None:
        raise argparse.ArgumentError(
            action, f"{value} may be a text or a list of one: write ['{value}'] or ['{texts[0]}']"
        )
    return texts


def reads_as_nothing(value: str) -> bool:
    try:
        return yaml.safe_load(value) is None
    except (yaml.YAMLError, ValueError):
        return False


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
    reasons = ["can't allocate memory", "can't start new thread", "size calculation overflowed"]
    reasons += ["unexpected pos"]  # of an archive in memory
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
