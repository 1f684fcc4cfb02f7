"""What configs, flags and a checkpoint say of a run, before anything is built. Plain Python."""

import dataclasses
import os
import re
from pathlib import Path

import yaml

from .checkpoint import ROOT
from .model import GPTConfig

CONFIGS = Path(__file__).parent / "configs"
# what may differ from the checkpoint: in fit all but what the weights were shaped by, else only what changes no figure
SIZES = {field.name for field in dataclasses.fields(GPTConfig)} | {"rung"}
FIXED_IN_FIT = SIZES - {"dropout", "ngram_dropout"} | {"vocabulary", "tokenizer", "init_from", "freeze"}
FREE_IN_VALIDATE = {"corpus", "tokens", "batch_size", "compile", "renamed_copies", "seed", "unknown"}


def refuse_nonsense(config) -> None:
    """Raises ValueError for settings of `fit` that no type forbids."""
    if isinstance(config.seed_everything, bool) or config.seed_everything < 0:
        raise ValueError(f"seed_everything={config.seed_everything}: give a number, 0 or more; it repeats the run")
    if config.trainer.max_steps < 1:
        raise ValueError(
            f"trainer.max_steps={config.trainer.max_steps}: give a number of steps, which the rate falls along"
        )
    for name, unit in {"val_check_interval": "batches", "accumulate_grad_batches": "batches for one step"}.items():
        value = config.trainer[name]
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"trainer.{name}={value}: give a number of {unit}, 1 or more")
    if (epochs := config.trainer.check_val_every_n_epoch) is not None and epochs < 1:
        raise ValueError(
            f"trainer.check_val_every_n_epoch={epochs}: give a number of epochs, 1 or more, or null to count batches"
        )
    if config.save_every_n_steps < 0:
        raise ValueError(f"save_every_n_steps={config.save_every_n_steps} must be 0 (never) or more")
    if config.name in ("", ".", "..") or Path(config.name).name != config.name:
        raise ValueError(
            f"name={config.name!r} is to name a folder below {config.trainer.default_root_dir}/, without a slash"
        )
    for name in "name", "trainer.default_root_dir":
        value = str(config[name])
        if os.path.expandvars(value) != value or "://" in value or "\0" in value:
            raise ValueError(
                f"{name}={value!r} is to name a folder on a disk of this machine, and TensorBoard would read it as a "
                "variable or a network's address: write the folder out"
            )


def settings_of_run(saved: dict, command: str) -> dict:
    """What a checkpoint says of its run, as a config: plain values only, and no class for anybody to import."""
    run = yaml.safe_load(saved.get("config", "")) or {}
    trainer = {
        key: value
        for key, value in run.get("trainer", {}).items()
        if key not in ("callbacks", "logger", "plugins", "profiler", "default_root_dir") and not isinstance(value, dict)
    }
    # what older checkpoints say by silence
    model = {"rung": None, "init_from": None, "freeze": 0} | saved["hyper_parameters"]
    data = {"tokenizer": None} | saved["datamodule_hyper_parameters"]
    if command == "fit":
        settings = {key: run[key] for key in ("name", "save_every_n_steps", "sample") if key in run}
    else:  # the precision it was trained in gives the very val/loss of that run, and copies are there to train on
        settings, trainer = {}, {key: trainer[key] for key in ("precision",) if key in trainer}
        data = data | {"renamed_copies": 0}
    if data.get("unknown") == "extend":
        data = data | {"unknown": "error"}  # the vocabulary has been extended
    return settings | {"trainer": trainer, "model": model, "data": data, "seed_everything": model["seed"]}


def settings_of_weights(saved: dict) -> dict:
    """What a checkpoint says of its net and its tokenizer alone, as a config: for a new run that starts from it."""
    model, data = saved["hyper_parameters"], saved["datamodule_hyper_parameters"]
    words = {key: data[key] for key in ("tokenizer", "vocabulary", "token_kinds") if key in data}
    words["tokenizer"] = words.get("tokenizer") or ("ids" if data.get("tokens") else "char")
    return {"model": {key: value for key, value in model.items() if key in SIZES}, "data": words}


def plain(value):
    """Tuples as lists, as YAML has no other."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def refuse_contradictions(command: str, config, settings: dict, path: Path) -> None:
    """Raises ValueError if a flag or config says otherwise than the checkpoint where the checkpoint must be right."""
    if config.data.unknown == "extend" and (command != "fit" or config.ckpt_path):
        raise ValueError(
            f"data.unknown=extend would change the vocabulary of {path}: start from it by --model.init_from"
        )
    for group in "model", "data":
        for key, value in config[group].items():
            fixed = key in FIXED_IN_FIT if command == "fit" else key not in FREE_IN_VALIDATE
            saved = settings[group].get(key, value)  # a setting younger than the checkpoint has no say
            if fixed and plain(value) != plain(saved):
                given, had = (" ".join(str(one).split())[:80] for one in (value, saved))  # merges are many lines
                raise ValueError(
                    f"{group}.{key}={given} contradicts the checkpoint {path}, which has {had}: leave it out"
                )


def goes_on_in_its_folder(config, settings: dict, path: Path) -> bool:
    """Whether a resumed fit is still that run: from its own last.ckpt, under its name, on its data, in its place."""
    folder = path.absolute().parents[1]
    root = Path(config.trainer.default_root_dir).absolute()
    return (
        path.name == "last.ckpt"
        and path.absolute().parent.name == "checkpoints"
        and re.fullmatch(r"version_\d+", folder.name) is not None
        and config.name == folder.parent.name
        and all(plain(value) == plain(settings["data"].get(key, value)) for key, value in config.data.items())
        and root in (folder.parents[1], ROOT.absolute())
    )


def named_configs(args: list[str]) -> list[str]:
    """`--config laptop` means the packaged file where no such path exists; a fit without any config takes laptop, or
    that of the rung it names."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(("--config=", "-c=")) else [arg])]
    for i, arg in enumerate(args[1:], start=1):
        if args[i - 1] in ("--config", "-c") and not Path(arg).exists():
            packaged = CONFIGS / f"{arg}.yaml"
            if not packaged.exists():
                files = sorted(file.relative_to(CONFIGS).with_suffix("") for file in CONFIGS.glob("**/*.yaml"))
                names = ", ".join(file.as_posix() for file in files)
                raise FileNotFoundError(f"--config {arg} is neither a file nor one of the packaged {names}")
            args[i] = str(packaged)
    if args[:1] == ["fit"] and not {"--config", "-c", "--ckpt_path"} & {arg.split("=")[0] for arg in args}:
        rung = re.search(r"--model\.rung[= ](\w+)", " ".join(args))
        of_rung = CONFIGS / "lecture" / f"{rung[1] if rung else None}.yaml"
        args[1:1] = ["--config", str(of_rung if of_rung.exists() else CONFIGS / "laptop.yaml")]
    return args
