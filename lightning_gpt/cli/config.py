"""What configs, flags and a checkpoint say of a run, before anything is built."""

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
from ..data.datamodule import TextDataModule
from ..data.tokenizers import REPLACEMENT
from ..model.gpt import GPTConfig
from ..training.module import LanguageModel

CONFIGS = Path(__file__).parents[1] / "configs"
# what may differ from the checkpoint: in fit all but what the weights were shaped by, else only what changes no figure
NET_SETTINGS = {field.name for field in dataclasses.fields(GPTConfig)} | {"lecture_step"}
FIXED_IN_FIT = NET_SETTINGS - {"dropout", "ngram_dropout"} | {
    "vocabulary",
    "tokenizer",
    "init_from",
    "freeze_layers",
    "optimizer",
}
FREE_IN_VALIDATE = {"corpus", "token_files", "batch_size", "compile", "name_augmentation", "seed", "on_unknown"}
# what a run may take from a checkpoint: settings that no class is imported for and no file is written by
FROM_TRAINER = set(
    "accelerator strategy devices num_nodes precision max_steps min_steps max_epochs min_epochs max_time "
    "limit_train_batches limit_val_batches limit_test_batches overfit_batches val_check_interval "
    "check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing enable_progress_bar "
    "enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm deterministic benchmark "
    "inference_mode use_distributed_sampler detect_anomaly sync_batchnorm reload_dataloaders_every_n_epochs".split()
)
WITH_CLASSES = "callbacks", "logger", "plugins", "profiler", "strategy", "accelerator"  # these may name some
FROM_SAMPLE = {"prompts", "length", "console_length", "temperature", "top_k", "seed"}
MAX_YAML_EVENTS, MAX_YAML_ALIASES, MAX_YAML_DEPTH = 20_000, 20, 20  # in a config's YAML
LONG_NUMBER = r"[-+0-9_:.]{1000,}"  # 1:1:1 is a number to YAML, and takes the square of its length


def check_fit_settings(config) -> None:
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


def read_config(text: str) -> dict:
    """A config's YAML, as a mapping, in time that its length bounds.

    Raises:
        ValueError: it is another thing, or it nests or repeats what no config does.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth, aliases, more = 0, 0, False
    try:
        for n, event in enumerate(yaml.parse(text, loader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)  # each may double what is there
            bare = event.value if isinstance(event, yaml.ScalarEvent) and not event.style else ""
            more = n > MAX_YAML_EVENTS or depth > MAX_YAML_DEPTH or aliases > MAX_YAML_ALIASES
            more = more or bare == "<<" or re.fullmatch(LONG_NUMBER, bare) is not None  # << copies what an alias means
            if more:
                break
        config = None if more else yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise ValueError(f"its YAML can't be read: {' '.join(str(error).split())[:150]}") from None
    if more:
        raise ValueError("its YAML has aliases, or more in it than a config has")
    if not isinstance(config or {}, dict):
        raise ValueError(f"it is a {type(config).__name__}, not settings by name")
    return config or {}


def config_section(config: dict, name: str) -> dict:
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"its {name} is a {type(part).__name__}, not settings by name")
    return part


def is_plain(value: Any) -> bool:
    """Whether a setting of the Trainer's can have this value without that a class is meant: words and numbers."""
    if isinstance(value, (list, dict)):  # device numbers, or hours and minutes
        numbers = value.values() if isinstance(value, dict) else value
        return len(value) <= 64 and all(map(is_number, numbers))
    word = isinstance(value, str) and re.fullmatch(r"[a-z0-9_:, -]{1,200}", value) is not None
    return value is None or isinstance(value, bool) or is_number(value) or value in (math.inf, -math.inf) or word


def names_classes(key: str, value: Any) -> bool:
    """Whether this setting of the Trainer's may name a class to import, or a way to write files."""
    plain_here = key in FROM_TRAINER and is_plain(value) and not isinstance(value, (list, dict))
    return key in WITH_CLASSES and value is not None and not plain_here


def run_settings(saved: dict, command: str) -> dict:
    """What a checkpoint says of its run, as a config: plain values only, and no class for anybody to import.

    Raises:
        ValueError: its config text is none, or has a plain setting with a value that it can't have.
    """
    run = read_config(saved.get("config", ""))
    trainer = {}
    for key, value in config_section(run, "trainer").items():
        if key not in FROM_TRAINER or names_classes(key, value):
            continue
        if not is_plain(value):
            raise ValueError(f"its trainer.{key} is {short_repr(value)}")
        trainer[key] = value
    if type(trainer.get("devices")) is int and trainer["devices"] > (os.cpu_count() or 1):
        del trainer["devices"]  # of a larger machine; here it would start as many processes
    if not {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "NODE_RANK"} & os.environ.keys():
        trainer.pop("num_nodes", None)  # it would wait for the others
    # what checkpoints without a training run (import, quantize) do not say
    model = {"lecture_step": None, "init_from": None, "freeze_layers": 0} | saved["hyper_parameters"]
    data = saved["datamodule_hyper_parameters"]
    known = {
        "model": NET_SETTINGS | {*signature(LanguageModel).parameters},
        "data": {*signature(TextDataModule).parameters},
    }
    for part, names in (model, known["model"]), (data, known["data"]):
        if unknown := [name for name in part if name not in names]:
            raise ValueError(f"it has settings that are unknown here: {', '.join(unknown)[:100]}")
    settings: dict[str, Any] = {}
    if command == "fit":
        kinds = {"name": str, "save_every_n_steps": int}
        settings = {key: run[key] for key, kind in kinds.items() if type(run.get(key)) is kind}
        sample = {key: value for key, value in config_section(run, "sample").items() if key in FROM_SAMPLE}
        for key, value in sample.items():
            texts = value if key == "prompts" and isinstance(value, list) else []
            if not (value is None or is_number(value) or texts and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"its sample.{key} is {short_repr(value)}")
        settings |= {"sample": sample} if sample else {}
    else:  # the precision it was trained in gives the very val/loss of that run, and copies are there to train on
        trainer = {key: trainer[key] for key in ("precision",) if key in trainer}
        data = data | {"name_augmentation": 0}
    if data.get("on_unknown") == "extend":
        data = data | {"on_unknown": "error"}  # the vocabulary has been extended
    return settings | {"trainer": trainer, "model": model, "data": data, "seed_everything": model["seed"]}


def class_settings(path: Path, saved: dict, root: str) -> tuple[dict, list[str]]:
    """The Trainer's settings with classes in them that a run to be resumed had.

    They are taken from the config file in the run's folder, if that lies below `root` or checkpoints/: whoever could
    write there can run code anyway. From a checkpoint itself no class is taken.

    Returns:
        these settings, and the names of those that the checkpoint speaks of and no such file has.
    """
    told = config_section(read_config(saved.get("config", "")), "trainer")
    named = {name for key in told if names_classes(name := re.split(r"[.+]", str(key))[0], told[key])}
    folder, found = path.absolute().parents[1], dict[str, Any]()
    if path.absolute().parent.name == "checkpoints" and folder.parents[1] in (
        Path(root).absolute(),
        RUNS_DIR.absolute(),
    ):
        steps = {config: [int(n) for n in re.findall(r"\d+", config.stem)] for config in folder.glob("config*.yaml")}
        for config in sorted(steps, key=steps.__getitem__)[-1:]:  # of the last time that it was resumed
            try:
                own = config_section(read_config(config.read_text(encoding="utf-8")), "trainer")
            except ValueError as error:
                raise ValueError(f"{config}: {error}") from None
            found = {key: value for key, value in own.items() if names_classes(key, value)}
    return found, sorted(named - found.keys())


def to_quoted_yaml(settings: dict) -> str:
    """Settings as a config that each reader of YAML takes to the letter: 1e3, ~ and # are text where they were."""
    return yaml.dump(as_lists(settings), Dumper=QuotedDumper)


class QuotedDumper(yaml.SafeDumper):
    """Writes each text between quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


QuotedDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def net_settings(saved: dict) -> dict:
    """What a checkpoint says of its net and its tokenizer alone, as a config: for a new run that starts from it."""
    model, data = saved["hyper_parameters"], saved["datamodule_hyper_parameters"]
    words = {key: data[key] for key in ("tokenizer", "vocabulary", "vocab_size") if key in data}
    words["tokenizer"] = words.get("tokenizer") or ("ids" if data.get("token_files") else "char")
    if words["tokenizer"] == "char":
        words.pop("vocab_size", None)  # on_unknown=extend adds characters
    return {"model": {key: value for key, value in model.items() if key in NET_SETTINGS}, "data": words}


def as_lists(value):
    """Tuples as lists, as YAML has no other."""
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def fill_from_checkpoint(config, settings: dict) -> None:
    """Put what the run made of a null in place of it: its config says null, and the checkpoint what came of that."""
    for group, key in ("data", "vocabulary"), ("data", "tokenizer"), ("data", "vocab_size"), ("model", "init_from"):
        if config[group][key] is None:
            config[group][key] = settings[group].get(key)


def check_paths(data, settings: dict) -> None:
    """Raises ValueError if a checkpoint, and nobody else, says to read what is neither a file nor a folder."""
    for key in "corpus", "token_files":
        names = data[key] if data[key] == settings["data"].get(key) else None
        for path in [Path(name.strip()) for name in (names or "").split(",")]:
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ValueError(f"data.{key} of the checkpoint is {path}, a device or a pipe: give --data.{key}")


def check_overrides(command: str, config, settings: dict, path: Path) -> None:
    """Raises ValueError if a flag or config says otherwise than the checkpoint where the checkpoint must be right."""
    if config.data.on_unknown == "extend" and (command != "fit" or config.ckpt_path):
        raise ValueError(
            f"data.on_unknown=extend would change the vocabulary of {path}: start from it by --model.init_from"
        )
    characters = (settings["data"].get("tokenizer") or "char") == "char" and settings["data"].get("vocabulary") or ""
    if config.ckpt_path and config.data.on_unknown == "replace" and characters and REPLACEMENT not in characters:
        raise ValueError(
            f"data.on_unknown=replace needs a token for the unknown, and the vocabulary of {path} has none: take drop"
        )
    for group in "model", "data":
        for key, value in config[group].items():
            fixed = key in FIXED_IN_FIT if command == "fit" else key not in FREE_IN_VALIDATE
            saved = settings[group].get(key, value)  # a setting younger than the checkpoint has no say
            if fixed and as_lists(value) != as_lists(saved):
                given, had = (" ".join(str(one).split())[:80] for one in (value, saved))  # merges are many lines
                raise ValueError(
                    f"{group}.{key}={given} contradicts the checkpoint {path}, which has {had}: leave it out"
                )


def check_counters(saved: Any, fresh: Any, name: str) -> None:
    """Raises ValueError unless the counters of a run are all there, and numbers where a fresh run has numbers."""
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
    """Raises ValueError unless an optimizer's state is one for these parameter groups, tensor by tensor."""
    saved = states[0] if isinstance(states, list) and len(states) == 1 else None
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("it has no state of one optimizer")
    of_groups = saved.get("param_groups")
    if not isinstance(of_groups, list) or len(of_groups) != len(groups):
        raise ValueError(f"its optimizer has not the {len(groups)} groups of parameters that there are now")
    numbers: list[int] = []
    for group, fresh in zip(of_groups, groups, strict=True):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, list) or len(params) != len(fresh["params"]):
            raise ValueError(f"a group of its optimizer has not the {len(fresh['params'])} parameters that it has now")
        how = {
            key: group.get(key) for key in ("amsgrad", "maximize", "differentiable", "foreach", "capturable", "fused")
        }
        plain_flags = all(value is None or isinstance(value, bool) for value in how.values())
        if not plain_flags or how["amsgrad"] or how["maximize"] or how["differentiable"]:
            raise ValueError("its optimizer is none that this package makes")
        if how["fused"] and how["foreach"] or how["capturable"] and not how["fused"]:
            raise ValueError("its optimizer is none that this package makes")
        for key in "eps", "momentum":
            if not (is_number(value := group.get(key, 0.0)) and 0 <= value < 1):
                raise ValueError(f"its optimizer has {key}={short_repr(value)}")
        if any(type(number) is not int for number in params) or {*params} & {*numbers} or len({*params}) < len(params):
            raise ValueError("its optimizer's parameters are not numbered each by its own")
        numbers += params
        names = {"momentum_buffer"} if fresh.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
        for number, p in zip(params, fresh["params"], strict=True):
            moments = saved["state"].get(number, {})
            if not isinstance(moments, dict) or moments and moments.keys() != names:
                raise ValueError(f"its optimizer has not {', '.join(sorted(names))} of each parameter")
            for name, moment in moments.items():
                shape = torch.Size() if name == "step" else p.shape
                if not isinstance(moment, Tensor) or not moment.is_floating_point() or moment.shape != shape:
                    raise ValueError(f"its optimizer's {name} has not the shape {tuple(shape)} of the parameter")
    if not saved["state"].keys() <= set(numbers):
        raise ValueError("its optimizer has a state of parameters that are not there")


def resumes_in_place(config, settings: dict, path: Path) -> bool:
    """Whether a resumed fit is still that run: from its own last.ckpt, under its name, on its data, in its place."""
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
    """What a command line gives for a flag, the last time that it does."""
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith(f"{flag}=") else [arg])]
    given = [value for word, value in itertools.pairwise(words) if word == flag and value != "null"]
    return given[-1] if given else None


def resolve_configs(args: list[str]) -> list[str]:
    """`--config laptop` means the packaged file where no such path exists; a fit without any config takes laptop, or
    that of the lecture_step it names."""
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
        lecture_step = re.search(r"--model\.lecture_step[= ](\w+)", " ".join(args))
        of_rung = CONFIGS / "lecture" / f"{lecture_step[1] if lecture_step else None}.yaml"
        args[1:1] = ["--config", str(of_rung if of_rung.exists() else CONFIGS / "laptop.yaml")]
    return args
