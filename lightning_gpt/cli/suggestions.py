"""Spells out shortened command lines, and suggests corrections for wrong ones."""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin

CONFIGS = Path(__file__).parents[1] / "configs"
# what a word without an option means right after the command
POSITIONAL = {
    "validate": "--ckpt_path",
    "test": "--ckpt_path",
    "generate": "--prompt",
    "score": "--text_file",
    "quantize": "--ckpt_path",
    "export": "--ckpt_path",
    "import": "--source",
}
FREE_TEXT = "--prompt", "--stop"  # the words that follow belong to the text
COMMAND_SYNONYMS = {
    "train": "fit",
    "pretrain": "fit",
    "resume": "fit --ckpt_path last",
    "eval": "validate",
    "evaluate": "validate",
    "sample": "generate",
    "predict": "generate",
    "complete": "generate",
    "chat": "generate --interactive",
    "perplexity": "score",
    "plot": "report",
    "convert": "export",
}
# other words for the last part of an option, from nanoGPT, transformers, older versions of Lightning and haste; a|b is
# a, or b where a command has no a
OPTION_SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "warmup_iters": "warmup_steps",
    "layers": "n_layer",
    "n_layers": "n_layer",
    "num_layers": "n_layer",
    "heads": "n_head",
    "n_heads": "n_head",
    "num_heads": "n_head",
    "embd": "n_embd",
    "n_embed": "n_embd",
    "d_model": "n_embd",
    "hidden_size": "n_embd",
    "context_length": "block_size",
    "seq_len": "block_size",
    "iters": "max_steps",
    "max_iters": "max_steps",
    "steps": "max_steps",
    "epochs": "max_epochs",
    "eval_interval": "val_check_interval",
    "log_interval": "log_every_n_steps",
    "min_lr": "min_lr_ratio",
    "gpus": "devices",
    "num_gpus": "devices",
    "dtype": "precision",
    "fp16": "trainer.precision 16-mixed|precision float16",
    "bf16": "trainer.precision bf16-mixed|precision bfloat16",
    "grad_clip": "gradient_clip_val",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "out_dir": "default_root_dir",
    "output_dir": "default_root_dir",
    "bs": "batch_size",
    "dataset": "corpus",
    "text": "corpus",
    "file": "corpus",
    "seed": "seed_everything",
    "resume": "ckpt_path last",
    "checkpoint": "ckpt_path",
    "ckpt": "ckpt_path",
    "model_path": "ckpt_path",
    "max_tokens": "max_new_tokens",
    "num_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "length": "max_new_tokens",
    "temp": "temperature",
    "n": "num_samples",
    "gpu": "device cuda|accelerator gpu",
    "cuda": "device cuda|accelerator gpu",
    "cpu": "device cpu|accelerator cpu",
}


def packaged_configs() -> list[str]:
    """The names that --config takes beside files."""
    return sorted(file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.rglob("*.yaml"))


def spell_out(args: list[str]) -> list[str]:
    """The arguments after a command's name with what people leave out: underscores, the option of the first word.

    `args` begins with the command. The words after `--prompt` and `--stop` become one text.
    """
    command, *rest = args
    spelled, text = [command], False  # text: further words belong to the last argument
    for i, arg in enumerate(rest):
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            prefix = "--no-" if name.startswith("--no-") else "--"
            spelled.append(prefix + name.removeprefix(prefix).replace("-", "_") + equals + value)
            text = bool(equals) and name in FREE_TEXT
        elif arg.startswith("-") and arg != "-":
            spelled.append(arg)
            text = False
        elif i == 0 and command in POSITIONAL:
            option = POSITIONAL[command]
            if command == "generate" and (arg == "-" or arg.endswith(".ckpt")):
                option = "--prompt_file" if arg == "-" else "--ckpt_path"
            spelled.append(f"{option}={arg}")
            text = option in FREE_TEXT
        elif text:
            spelled[-1] += f" {arg}"
        else:
            spelled.append(arg)
            text = spelled[-2] in FREE_TEXT
    return spelled


def nearest(word: str, known: Collection[str]) -> str | None:
    """The known word that is most like `word`, if one is like it."""
    return next(iter(get_close_matches(word, known, 1, 0.7)), None)


def nearest_command(word: str, commands: Collection[str]) -> str | None:
    """The command line that someone means who types `word` as a command."""
    if (CONFIGS / f"{word}.yaml").exists():
        return f"fit --config {word}"
    if word.endswith(".ckpt"):
        return f"generate --ckpt_path {word}"
    near = nearest(word, [*commands, *COMMAND_SYNONYMS])
    return COMMAND_SYNONYMS.get(near or "", near)


def nearest_option(option: str, options: Collection[str]) -> str | None:
    """The option that someone means who types `option`: one of `options`, perhaps with its value."""
    known = [name[2:] for name in options if name.startswith("--") and not name.endswith(("+", ".help"))]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}  # max_steps: trainer.max_steps
    negated = option.startswith("--no-") or option.startswith("--no_")
    typed = option[5:] if negated else option.lstrip("-")
    leaf = typed.rsplit(".", 1)[-1]
    synonyms = OPTION_SYNONYMS.get(leaf, "").split("|")
    for candidate in synonyms if typed == leaf else []:  # --seed is --seed_everything before --sample.seed
        if candidate in known:
            return f"--{candidate}"
    for candidate in [leaf, *synonyms]:
        name, _, value = candidate.partition(" ")
        if found := name if name in known else by_leaf.get(name):
            return f"--{'no-' if negated else ''}{found} {value}".rstrip()
    if leaf in OPTION_SYNONYMS:
        return None
    near = nearest(typed, known) or nearest(leaf, by_leaf)
    return f"--{by_leaf.get(near, near)}" if near else None


def nearest_argument(word: str, options: Collection[str]) -> str | None:
    """The option that someone means who types the word `word` where no word is expected."""
    option = None
    if (CONFIGS / f"{word}.yaml").exists() or word.endswith(".yaml") and Path(word).exists():
        option = "--config"
    elif word.endswith(".ckpt") or word in ("best", "last"):
        option = "--ckpt_path"
    elif Path(word).exists():
        option = "--data.corpus"
    elif name := nearest(word.removesuffix(".yaml"), packaged_configs()):
        option, word = "--config", name
    elif "--prompt" in options:
        return "the prompt first, right after generate"
    return f"{option} {word}" if option in options else None


def expected(hint: Any) -> list[str]:
    """What an option of this type takes, in words; empty if it takes a class."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return ["a path"]
    if hint in words:
        return [words[hint]]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [str(value) for value in args]
    if origin in (list, tuple) and expected(args[0]):
        several = {"an integer": "integers", "a number": "numbers", "text": "texts"}.get(*expected(args[0]) * 2)
        return [f"{len(args) if origin is tuple else 'several'} {several} in brackets"]
    parts = [expected(arg) for arg in args]
    return list(dict.fromkeys(word for part in parts for word in part)) if parts and all(parts) else []


def subclasses(hint: Any) -> set[str]:
    """The names of the classes that an option of this type takes."""
    found, pending = set(), [cls for cls in (hint, *get_args(hint)) if isinstance(cls, type) and cls is not type(None)]
    pending += [cls for part in get_args(hint) for cls in get_args(part) if isinstance(cls, type)]
    while pending:
        cls = pending.pop()
        if cls.__module__ != "builtins":
            found.add(cls.__name__)
            pending += cls.__subclasses__()
    return found


def wrong_value(key: str, value: Any, hint: Any) -> str | None:
    """One sentence about a value that does not have an option's type; None if there is none."""
    if words := expected(hint):
        *most, last = words
        near = nearest(str(value), words)
        takes = f"{', '.join(most)} or {last}" if most else last
        return f"{key}={value}: give {takes}" + (f"; did you mean {near}?" if near else "")
    if isinstance(value, str) and (names := subclasses(hint)) and "{" not in value:
        near = nearest(value.rsplit(".", 1)[-1], names)
        return f"{key}={value}: there is no such class" + (
            f"; did you mean {near}?" if near else ", or it can't be imported"
        )
    return None
