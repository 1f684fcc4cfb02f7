"""Help that fits a screen: the options that people use, each with its value; `--help all` lists the rest."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jsonargparse

from .suggestions import CONFIGS, POSITIONAL, expected

COLUMN = 36  # width of an option with its value
TEXTS = {  # for options whose own text is Lightning's, or too long for a line
    "config": "packaged or a YAML file; several compose",
    "ckpt_path": "a file, or the newest best or last one",
    "name": "the run is checkpoints/NAME/version_N",
    "seed_everything": "of weights, batches, dropout, samples",
    "save_every_n_steps": "steps between two saves of last.ckpt",
    "model.n_embd": "width of the residual stream",
    "model.warmup_steps": "steps until the peak learning rate",
    "model.init_from": "start from this checkpoint's weights",
    "model.compile": "a slow start for fast steps",
    "data.corpus": "a text file, a folder or a pattern",
    "data.batch_size": "windows a step, over all devices",
    "data.split": "fraction of the text to train on",
    "sample.length": "tokens to generate for each prompt",
    "trainer.max_steps": "optimizer steps",
    "trainer.max_time": "stop after DAYS:HOURS:MINUTES:SECONDS",
    "trainer.val_check_interval": "batches between validations",
    "trainer.log_every_n_steps": "steps between logged values",
    "trainer.accelerator": "auto, cpu, gpu or mps",
    "trainer.devices": "number of devices",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed ...",
    "trainer.accumulate_grad_batches": "batches for each step",
    "trainer.gradient_clip_val": "largest norm of the gradient",
    "trainer.limit_val_batches": "validate on some batches only",
    "trainer.default_root_dir": "folder of the runs",
}
FIT = {
    "": "config ckpt_path name seed_everything save_every_n_steps",
    "model": "n_layer n_head n_embd block_size dropout optimizer learning_rate weight_decay warmup_steps schedule "
    "init_from compile",
    "data": "corpus batch_size tokenizer split",
    "sample": "prompts length",
    "trainer": "max_steps max_time val_check_interval log_every_n_steps accelerator devices precision "
    "accumulate_grad_batches gradient_clip_val default_root_dir",
}
VALIDATE = {
    "": "config ckpt_path",
    "model": "block_size compile",
    "data": "corpus token_files on_unknown batch_size",
    "trainer": "accelerator devices precision limit_val_batches",
}


def usage(command: str) -> str:
    """The command as it begins a usage line."""
    word = f" [{POSITIONAL[command].removeprefix('--').upper()}]" if command in POSITIONAL else ""
    return f"lightning-gpt {command}{word}"


def requested_help(args: list[str]) -> Literal["", "short", "all"]:
    """Which help a command line asks for."""
    if not {"-h", "--help"} & {*args}:
        return ""
    follows = args[1 + next(i for i, arg in enumerate(args) if arg in ("-h", "--help")) :]
    return "all" if follows[:1] == ["all"] else "short"


def option_text(action: Any) -> str:
    """What an option is, in a clause; or its values, if there are only a few."""
    hint = getattr(action, "_typehint", None)
    if Literal in (get_origin(part) for part in (hint, *get_args(hint))):
        *most, last = expected(hint)
        return f"{', '.join(most)} or {last}"
    text = " ".join((action.help or "").split())
    ends = [text.find(mark) for mark in ("; ", ": ", ". ") if mark in text]
    return text[: min(ends, default=len(text))].rstrip(".")


def option_value(action: Any, value: Any) -> str:
    """The value of an option as it is typed; what it takes, in capitals, where it is unset."""
    if action.dest == "config":
        files = [Path(str(file)) for file in value or []]
        packaged = [file.with_suffix("").relative_to(CONFIGS) if CONFIGS in file.parents else file for file in files]
        return ", ".join(map(str, packaged)) or "NAME"
    if value is None:
        words = {"text": "TEXT", "several texts in brackets": "TEXT", "an integer": "N", "a number": "X"}
        return next((words[word] for word in expected(action._typehint) if word in words), "null")
    return str(value).lower() if isinstance(value, bool) else str(value)


def option_lines(action: Any, value: Any, max_lines: int) -> list[str]:
    width = max(80, min(shutil.get_terminal_size().columns, 120)) - COLUMN - 4
    option = f"--{action.dest} {option_value(action, value)}" if action.option_strings else action.dest.upper()
    option = textwrap.shorten(option, COLUMN, placeholder=" ...")
    text = TEXTS.get(action.dest) or option_text(action)
    first, *more = textwrap.wrap(text, width, max_lines=max_lines, placeholder=" ...") or [""]
    return [f"  {option:{COLUMN}}  {first}".rstrip(), *(" " * (COLUMN + 4) + line for line in more)]


def short_help(
    parser: jsonargparse.ArgumentParser, values: Mapping[str, Any], groups: Mapping[str, Iterable[str]]
) -> str:
    """The help of a command.

    Args:
        values: what each option is if nothing more is given; by the option's name.
        groups: the names of the options to show, without the group that is their key.
    """
    actions = {action.dest: action for action in parser._actions}
    lines = [f"usage: {parser.prog} [options]", "", *textwrap.wrap(str(parser.description), 78)]
    for group, names in groups.items():
        full = [f"{group}.{name}" if group else name for name in names]
        lines += [""]
        for name in (name for name in full if name in actions):
            lines += option_lines(actions[name], values.get(name), max_lines=1 if len(groups) > 1 else 2)
    command = parser.prog.split("[")[0].strip()
    return "\n".join([*lines, "", f"{command} --help all explains every option in full."])
