"""Checks and merges the settings from configs, flags and a checkpoint, before anything is built."""

import dataclasses
import itertools
import math
import os
import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..checkpoint.io import RUNS_DIR
from ..checkpoint.validation import MAX_INT, is_number, short_repr
from ..data.tokenizers import REPLACEMENT
from ..model.gpt import GPTConfig
from .suggestions import CONFIGS, nearest, packaged_configs

# fit may change all settings of a checkpoint but FIXED_IN_FIT, which its weights and its optimizer state depend on;
# validate and test may change only FREE_IN_VALIDATE
NET_SETTINGS = {field.name for field in dataclasses.fields(GPTConfig)} | {"lecture_step"}
FIXED_IN_FIT = NET_SETTINGS - {"dropout", "ngram_dropout"} | {
    "vocabulary",
    "tokenizer",
    "init_from",
    "freeze_layers",
    "optimizer",
}
FREE_IN_VALIDATE = {"corpus", "token_files", "batch_size", "compile", "name_augmentation", "seed", "on_unknown"}
# Trainer settings that a run may take from a checkpoint: with plain values they import no class and write no file
FROM_TRAINER = set(
    "accelerator strategy devices num_nodes precision max_steps min_steps max_epochs min_epochs max_time "
    "limit_train_batches limit_val_batches limit_test_batches overfit_batches val_check_interval "
    "check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing enable_progress_bar "
    "enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm deterministic benchmark "
    "inference_mode use_distributed_sampler detect_anomaly sync_batchnorm reload_dataloaders_every_n_epochs".split()
)
WITH_CLASSES = "callbacks", "logger", "plugins", "profiler", "strategy", "accelerator"  # these may name classes
FROM_SAMPLE = {"prompts", "length", "console_length", "temperature", "top_k", "seed"}
MAX_YAML_EVENTS, MAX_YAML_ALIASES, MAX_YAML_DEPTH = 20_000, 20, 20  # limits for a config's YAML
LONG_NUMBER = r"[-+0-9_:.]{1000,}"  # YAML reads 1:1:1 as a base-60 number, in time quadratic in its length


def check_fit_settings(config) -> None:
    """Raises ValueError for settings of `fit` that have the right type and an invalid value."""
    if isinstance(config.seed_everything, bool) or config.seed_everything < 0:
        raise ValueError(f"seed_everything={config.seed_everything}: give a seed, an integer of at least 0")
    if config.trainer.max_steps < 1:
        raise ValueError(
            f"trainer.max_steps={config.trainer.max_steps} must be at least 1: the learning rate decays over max_steps"
        )
    for name, unit in {"val_check_interval": "batches", "accumulate_grad_batches": "batches per step"}.items():
        value = config.trainer[name]
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"trainer.{name}={value}: give an integer of at least 1, in {unit}")
    if (epochs := config.trainer.check_val_every_n_epoch) is not None and epochs < 1:
        raise ValueError(
            f"trainer.check_val_every_n_epoch={epochs} must be at least 1, or null to count batches across epochs"
        )
    if config.save_every_n_steps < 0:
        raise ValueError(f"save_every_n_steps={config.save_every_n_steps} must be at least 0 (0: never)")
    if config.name in ("", ".", "..") or Path(config.name).name != config.name:
        raise ValueError(
            f"name={config.name!r} must be the name of a folder in {config.trainer.default_root_dir}/, without a slash"
        )
    for name in "name", "trainer.default_root_dir":
        value = str(config[name])
        if os.path.expandvars(value) != value or "://" in value or "\0" in value:
            raise ValueError(
                f"{name}={value!r} must be a local folder, without variables, URLs or null characters: write its path "
                "in full"
            )


def read_config(text: str) -> dict:
    """Parses a config's YAML into a dict, in time linear in its length.

    Raises:
        ValueError: the text is invalid YAML or no mapping, it has merge keys, or it exceeds the limits above.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth, aliases, more = 0, 0, False
    try:
        for n, event in enumerate(yaml.parse(text, loader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)  # each may double the size
            bare = event.value if isinstance(event, yaml.ScalarEvent) and not event.style else ""
            more = n > MAX_YAML_EVENTS or depth > MAX_YAML_DEPTH or aliases > MAX_YAML_ALIASES
            more = more or bare == "<<" or re.fullmatch(LONG_NUMBER, bare) is not None  # << copies a mapping
            if more:
                break
        config = None if more else yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date or number
        raise ValueError(f"its YAML can't be read: {' '.join(str(error).split())[:150]}") from None
    if more:
        raise ValueError("its YAML has merge keys, or too many aliases, values, levels or digits for a config")
    if not isinstance(config or {}, dict):
        raise ValueError(f"it is a {type(config).__name__}, not a mapping of settings")
    return config or {}


def config_section(config: dict, name: str) -> dict:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"its {name} is a {type(section).__name__}, not a mapping of settings")
    return section


def is_plain(value: Any) -> bool:
    """Whether the value of a Trainer setting is plain: null, a boolean, a number, a lower-case word, or numbers."""
    if isinstance(value, (list, dict)):  # device numbers, or hours and minutes
        numbers = value.values() if isinstance(value, dict) else value
        return len(value) <= 64 and all(map(is_number, numbers))
    word = isinstance(value, str) and re.fullmatch(r"[a-z0-9_:, -]{1,200}", value) is not None
    return value is None or isinstance(value, bool) or is_number(value) or value in (math.inf, -math.inf) or word


def names_classes(key: str, value: Any) -> bool:
    """Whether this Trainer setting may name a class to import."""
    is_restorable = key in FROM_TRAINER and is_plain(value) and not isinstance(value, (list, dict))
    return key in WITH_CLASSES and value is not None and not is_restorable


def setting_names(module_class: type) -> set[str]:
    """The settings of a LanguageModel or a LightningDataModule, with those of the classes that it extends."""
    return {name for base in module_class.__mro__ if "__init__" in vars(base) for name in signature(base).parameters}


def run_settings(checkpoint: dict, command: str, model_class: type, data_class: type) -> dict:
    """Returns the settings of a checkpoint's run as a config: plain values only, which import no class.

    Raises:
        ValueError: the checkpoint's config is invalid, a plain setting has another kind of value, or a setting of its
            model or data is unknown.
    """
    run = read_config(checkpoint.get("config", ""))
    trainer = {}
    for key, value in config_section(run, "trainer").items():
        if key not in FROM_TRAINER or names_classes(key, value):
            continue
        if not is_plain(value):
            raise ValueError(f"its trainer.{key} is {short_repr(value)}")
        trainer[key] = value
    if type(trainer.get("devices")) is int and trainer["devices"] > (os.cpu_count() or 1):
        del trainer["devices"]  # from a machine with more devices; here it would start too many processes
    if not {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "NODE_RANK"} & os.environ.keys():
        trainer.pop("num_nodes", None)  # this node would wait for the others
    # checkpoints without a training run (import, quantize) lack these
    model = {"lecture_step": None, "init_from": None, "freeze_layers": 0} | checkpoint["hyper_parameters"]
    data = checkpoint["datamodule_hyper_parameters"]
    for section, names in (model, NET_SETTINGS | setting_names(model_class)), (data, setting_names(data_class)):
        if unknown := [name for name in section if name not in names]:
            raise ValueError(f"it has settings that are unknown here: {', '.join(unknown)[:100]}")
    settings: dict[str, Any] = {}
    if command == "fit":
        types = {"name": str, "save_every_n_steps": int}
        settings = {key: run[key] for key, type_ in types.items() if type(run.get(key)) is type_}
        sample = {key: value for key, value in config_section(run, "sample").items() if key in FROM_SAMPLE}
        for key, value in sample.items():
            texts = value if key == "prompts" and isinstance(value, list) else []
            if not (value is None or is_number(value) or texts and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"its sample.{key} is {short_repr(value)}")
        settings |= {"sample": sample} if sample else {}
    else:  # the precision of the training gives the same val/loss; augmentation is for training
        trainer = {key: trainer[key] for key in ("precision",) if key in trainer}
        data = {key: 0 if key == "name_augmentation" else value for key, value in data.items()}
    if data.get("on_unknown") == "extend":
        data = data | {"on_unknown": "error"}  # the vocabulary has been extended
    return settings | {"trainer": trainer, "model": model, "data": data, "seed_everything": model["seed"]}


def class_settings(path: Path, checkpoint: dict, root: str) -> tuple[dict, list[str]]:
    """Returns the Trainer settings of the run to resume that name classes.

    They come from the config file in the run's folder, if that lies in `root` or checkpoints/: whoever can write there
    can run code anyway. No class is taken from the checkpoint itself.

    Returns:
        These settings, and the names of those that the checkpoint's config has and the file lacks.
    """
    trainer = config_section(read_config(checkpoint.get("config", "")), "trainer")
    named = {name for key in trainer if names_classes(name := re.split(r"[.+]", str(key))[0], trainer[key])}
    folder, found = path.absolute().parents[1], dict[str, Any]()
    if path.absolute().parent.name == "checkpoints" and folder.parents[1] in (
        Path(root).absolute(),
        RUNS_DIR.absolute(),
    ):
        steps = {config: [int(n) for n in re.findall(r"\d+", config.stem)] for config in folder.glob("config*.yaml")}
        for config in sorted(steps, key=steps.__getitem__)[-1:]:  # the newest: resuming writes another one
            try:
                section = config_section(read_config(config.read_text(encoding="utf-8")), "trainer")
            except ValueError as error:
                raise ValueError(f"{config}: {error}") from None
            found = {key: value for key, value in section.items() if names_classes(key, value)}
    return found, sorted(named - found.keys())


def to_quoted_yaml(settings: dict) -> str:
    """Writes settings as YAML with every string quoted, so that text such as 1e3, ~ and # is read back as text."""
    return yaml.dump(as_lists(settings), Dumper=QuotedDumper)


class QuotedDumper(yaml.SafeDumper):
    """Writes strings in double quotes, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


QuotedDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def net_settings(checkpoint: dict) -> dict:
    """Returns the net and tokenizer settings of a checkpoint as a config for a new run from its weights."""
    model, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    tokenizer = {key: data[key] for key in ("tokenizer", "vocabulary", "vocab_size") if key in data}
    tokenizer["tokenizer"] = tokenizer.get("tokenizer") or ("ids" if data.get("token_files") else "char")
    if tokenizer["tokenizer"] == "char":
        tokenizer.pop("vocab_size", None)  # on_unknown=extend adds characters
    return {"model": {key: value for key, value in model.items() if key in NET_SETTINGS}, "data": tokenizer}


def as_lists(value):
    """Converts tuples to lists, recursively: YAML has no tuples."""
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def fill_from_checkpoint(config, settings: dict) -> None:
    """Replaces settings that are null by the values that the checkpoint's run resolved them to."""
    for group, key in ("data", "vocabulary"), ("data", "tokenizer"), ("data", "vocab_size"), ("model", "init_from"):
        if config[group][key] is None:
            config[group][key] = settings[group].get(key)


def check_paths(data, settings: dict) -> None:
    """Raises ValueError if a path that comes from the checkpoint is neither a file nor a folder."""
    for key in "corpus", "token_files":
        names = data.get(key) if data.get(key) == settings["data"].get(key) else None
        for path in [Path(name.strip()) for name in (names or "").split(",")]:
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ValueError(f"data.{key} of the checkpoint is {path}, a device or a pipe: give --data.{key}")


def check_overrides(command: str, config, settings: dict, path: Path) -> None:
    """Raises ValueError if a flag or config overrides a setting of the checkpoint that this command can't change."""
    if config.data.on_unknown == "extend" and (command != "fit" or config.ckpt_path):
        raise ValueError(
            f"data.on_unknown=extend would change the vocabulary of {path}: start from it with --model.init_from"
        )
    characters = (settings["data"].get("tokenizer") or "char") == "char" and settings["data"].get("vocabulary") or ""
    if config.ckpt_path and config.data.on_unknown == "replace" and characters and REPLACEMENT not in characters:
        raise ValueError(
            f"data.on_unknown=replace needs {REPLACEMENT!r}, which the vocabulary of {path} lacks: use drop"
        )
    for group in "model", "data":
        for key, value in config[group].items():
            fixed = key in FIXED_IN_FIT if command == "fit" else key not in FREE_IN_VALIDATE
            saved = settings[group].get(key, value)  # a setting that the checkpoint lacks contradicts nothing
            if fixed and as_lists(value) != as_lists(saved):
                given, had = (" ".join(str(item).split())[:80] for item in (value, saved))  # BPE merges are many lines
                raise ValueError(
                    f"{group}.{key}={given} contradicts the checkpoint {path}, which has {had}: leave it out"
                )


def check_counters(saved: Any, fresh: Any, name: str) -> None:
    """Raises ValueError unless `saved` has every counter of a fresh run's state, each with a valid number."""
    if fresh == {} and saved != {}:
        raise ValueError(f"{name} is not empty")
    if isinstance(fresh, dict):
        for key, value in fresh.items():
            if not isinstance(saved, dict) or key not in saved:
                raise ValueError(f"{name}.{key} is missing")
            check_counters(saved[key], value, f"{name}.{key}")
    elif isinstance(fresh, float) and type(saved) in (int, float):
        return
    elif isinstance(fresh, (bool, int, float)) and (type(saved) is not type(fresh) or not 0 <= saved <= MAX_INT):
        raise ValueError(f"{name} is {short_repr(saved)}")


def check_optimizer_state(states: Any, groups: list[dict]) -> None:
    """Raises ValueError unless the saved optimizer state fits these parameter groups in structure and shapes."""
    saved = states[0] if isinstance(states, list) and len(states) == 1 else None
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("it has no state of exactly one optimizer")
    saved_groups = saved.get("param_groups")
    if not isinstance(saved_groups, list) or len(saved_groups) != len(groups):
        raise ValueError(f"its optimizer does not have the {len(groups)} parameter groups of this run")
    indices: list[int] = []
    for group, fresh in zip(saved_groups, groups, strict=True):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, list) or len(params) != len(fresh["params"]):
            raise ValueError(f"a parameter group does not have the {len(fresh['params'])} parameters of this run")
        flags = {
            key: group.get(key) for key in ("amsgrad", "maximize", "differentiable", "foreach", "capturable", "fused")
        }
        plain_flags = all(value is None or isinstance(value, bool) for value in flags.values())
        if not plain_flags or flags["amsgrad"] or flags["maximize"] or flags["differentiable"]:
            raise ValueError("its optimizer has flags that this package does not set")
        if flags["fused"] and flags["foreach"] or flags["capturable"] and not flags["fused"]:
            raise ValueError("its optimizer has flags that this package does not set")
        for key in "eps", "momentum":
            if not (is_number(value := group.get(key, 0.0)) and 0 <= value < 1):
                raise ValueError(f"its optimizer has {key}={short_repr(value)}")
        if any(type(index) is not int for index in params) or {*params} & {*indices} or len({*params}) < len(params):
            raise ValueError("its optimizer's parameter indices are not unique integers")
        indices += params
        names = {"momentum_buffer"} if fresh.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
        for index, p in zip(params, fresh["params"], strict=True):
            moments = saved["state"].get(index, {})
            if not isinstance(moments, dict) or moments and moments.keys() != names:
                raise ValueError(f"its optimizer does not have {', '.join(sorted(names))} for each parameter")
            for name, moment in moments.items():
                shape = torch.Size() if name == "step" else p.shape
                if not isinstance(moment, Tensor) or not moment.is_floating_point() or moment.shape != shape:
                    raise ValueError(f"its optimizer's {name} does not have the parameter's shape {tuple(shape)}")
    if not saved["state"].keys() <= set(indices):
        raise ValueError("its optimizer has state for parameters that do not exist")


def resumes_in_place(config, settings: dict, path: Path) -> bool:
    """Whether a resumed fit continues in the run's folder: from its last.ckpt, with the same name, data and root."""
    folder = path.absolute().parents[1]
    root = Path(config.trainer.default_root_dir).absolute()
    return (
        path.name == "last.ckpt"
        and path.absolute().parent.name == "checkpoints"
        and re.fullmatch(r"version_\d+", folder.name) is not None
        and config.name == folder.parent.name
        and all(as_lists(value) == as_lists(settings["data"].get(key, value)) for key, value in config.data.items())
        and root in (folder.parents[1], RUNS_DIR.absolute())
    )


def last_flag_value(args: list[str], flag: str) -> str | None:
    """Returns the last value other than null that a command line gives for a flag, or None."""
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith(f"{flag}=") else [arg])]
    given = [value for word, value in itertools.pairwise(words) if word == flag and value != "null"]
    return given[-1] if given else None


def resolve_configs(args: list[str]) -> list[str]:
    """Replaces the names of packaged configs by their paths, unless a file of that name exists.

    A fit without a config or checkpoint gets laptop, or the config of its --model.lecture_step.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(("--config=", "-c=")) else [arg])]
    for i, arg in enumerate(args[1:], start=1):
        if args[i - 1] in ("--config", "-c") and not Path(arg).exists():
            packaged = CONFIGS / f"{arg}.yaml"
            if not packaged.exists():
                names = packaged_configs()
                near = f": did you mean {name}?" if (name := nearest(arg, names)) else f" {', '.join(names)}"
                raise FileNotFoundError(f"--config {arg} is neither a file nor one of the packaged configs{near}")
            args[i] = str(packaged)
    if args[:1] == ["fit"] and not {"--config", "-c", "--ckpt_path"} & {arg.split("=")[0] for arg in args}:
        lecture_step = re.search(r"--model\.lecture_step[= ](\w+)", " ".join(args))
        lecture = CONFIGS / "lecture" / f"{lecture_step[1] if lecture_step else None}.yaml"
        args[1:1] = ["--config", str(lecture if lecture.exists() else CONFIGS / "laptop.yaml")]
    return args
