"""lightning-gpt fit | validate | test: a LightningCLI that restores settings from checkpoints."""

import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch import distributed as dist

from ..checkpoint.io import (
    RUNS_DIR,
    TEXT_SETTINGS,
    checkpoint_summary,
    find_checkpoint,
    find_checkpoints,
    load_net,
    read_checkpoint,
)
from ..checkpoint.validation import STAGES, stage_of
from ..data.datamodule import TextDataModule
from ..data.tokenizers import CharTokenizer
from ..errors import import_optional, lossy_output, message_with_notes, print_error, print_info, program_name
from ..inference.text import find_or_packaged, load, stream
from ..model.gpt import GPT
from ..model.lecture import LECTURE_STEPS, LectureModel, check_lecture_settings
from ..training.callbacks import SampleText, TrainingProgress, ValidateAtEnd, check_monitors
from ..training.checkpointing import AsyncCheckpointIO, CheckpointSaver, ConfigSaver, StopOnSignal, TrainingInterrupted
from ..training.logger import RunCSVLogger, RunLogger, create_run_folder, lock_run_folder, remove_if_empty, wandb_run_in
from ..training.module import DivergenceError, LanguageModel
from ..training.monitoring import Throughput, UpdateRatios
from ..training.strategies import (
    PeerLostError,
    check_launcher,
    check_world_size,
    export_launcher_pid,
    is_peer_lost,
    uses_several_devices,
)
from .config import (
    check_counters,
    check_fit_settings,
    check_optimizer_state,
    check_overrides,
    check_paths,
    class_settings,
    fill_from_checkpoint,
    last_flag_value,
    net_settings,
    resolve_configs,
    resumes_in_place,
    run_settings,
    setting_names,
    to_quoted_yaml,
)
from .generate import describe_checkpoint, describe_checkpoints
from .help import FIT, TEXTS, VALIDATE, requested_help, short_help, usage
from .parser import Parser

TRAINER_DEFAULTS = {
    "default_root_dir": str(RUNS_DIR),
    "max_steps": 5000,
    "val_check_interval": 250,
    "check_val_every_n_epoch": None,  # an epoch has no end: windows are sampled
    "log_every_n_steps": 50,
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # the datamodule shards the data by rank
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class TrainingParser(Parser, LightningArgumentParser):
    """Parser of this package with Lightning's class arguments."""


class CLI(LightningCLI):
    """LightningCLI whose runs have a name and take their defaults from the checkpoint that they start from."""

    model_class: type[LanguageModel] = LanguageModel
    data_class: type[L.LightningDataModule] = TextDataModule
    fit_description = "Train a model, or resume a run with --ckpt_path. The values are those without a checkpoint."
    run_folder: Path | None = None  # of the run that resumes in place
    start_step = 0
    saver: CheckpointSaver | None = None
    cleanup: ExitStack  # left when the subcommand ends
    requested_checkpoint: str | None = None  # as given: a path, best or last
    other_paths: Sequence[Path] = ()  # checkpoints whose nets are averaged with that of config.ckpt_path
    other_nets: tuple[GPT | LectureModel, ...] = ()
    resume_state: dict[str, Any] | None = None  # loops, callbacks and, as meta tensors, the optimizer's state

    def __init__(self, parser_kwargs: dict[str, Any], **kwargs):
        parser_kwargs = parser_kwargs | {"fit": {"description": self.fit_description}}
        super().__init__(self.model_class, self.data_class, parser_kwargs=parser_kwargs, **kwargs)

    @property
    def stage(self) -> str:
        return self.model_class.stage

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skip = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {"fit": skip, "validate": skip, "test": skip}

    def add_arguments_to_parser(self, parser) -> None:
        parser.add_argument("--name", default="gpt", help="The run's folder is checkpoints/NAME/version_N.")
        parser.add_argument(
            "--save_every_n_steps", type=int, default=500, help="Optimizer steps between two saves of last.ckpt."
        )
        parser.add_lightning_class_args(SampleText, "sample")
        # links go from model to data, as load_from_checkpoint restores the model's block_size
        parser.link_arguments("model.block_size", "data.block_size")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser, args) -> None:
        if wanted := requested_help(args):
            self.print_help(parser, args, wanted)
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        if self.config[command].ckpt_path is None:  # a run's config.yaml sets null, even after the flag
            self.config[command].ckpt_path = last_flag_value(args, "--ckpt_path")
        default = self.config.fit.model.init_from if command == "fit" else "best"
        self.requested_checkpoint = self.config[command].ckpt_path or default
        if command in ("validate", "test") or (command == "fit" and self.config.fit.ckpt_path):
            self.start_from_checkpoint(parser, args, command)
        elif command == "fit" and self.config.fit.model.init_from:
            self.start_from_weights(parser, args)
        elif command == "fit" and self.config.fit.model.lecture_step:
            self.start_from_lecture_step(parser, args, self.config.fit.model.lecture_step)
        if command == "fit":
            check_fit_settings(self.config.fit)
            check_remaining(self.config.fit.trainer, {})

    def print_help(self, parser, args: list[str], wanted: str) -> NoReturn:
        """Prints the help, with the values that the configs and flags in `args` give, and ends the process."""
        command = args[0]
        of_command = parser._subcommands_action.choices[command]
        for action in of_command._actions:
            if action.dest == "ckpt_path":  # Lightning's text speaks of its own registry and keywords
                action.help = TEXTS["ckpt_path"]
        name = self.stage if command == "fit" else command
        of_command.prog = usage(name)
        if wanted == "all":
            of_command.print_help()
        else:
            groups = {group: names.split() for group, names in (FIT if command == "fit" else VALIDATE).items()}
            if command == "fit":
                groups["model"] += sorted(setting_names(self.model_class) - setting_names(LanguageModel))
                groups["data"] += sorted(setting_names(self.data_class) - setting_names(TextDataModule))
            values = parser.parse_args([arg for arg in args if arg not in ("-h", "--help")])[command]
            print(short_help(of_command, dict(values.items()), groups))
        sys.exit(0)

    def start_from_checkpoint(self, parser, args: list[str], command: str) -> None:
        find, name = partial(find_checkpoint, stages=[self.stage]), self.config[command].ckpt_path or "best"
        path, *self.other_paths = [find(name)] if command == "fit" else find_checkpoints(name, find)
        checkpoint = read_checkpoint(path)
        if (stage := stage_of(checkpoint)) != self.stage:
            raise ValueError(f"the checkpoint {path} is of {stage}, not of {self.stage}: resume it with {stage}")
        if command == "fit" and "optimizer_states" not in checkpoint:
            raise ValueError(f"{path} has weights but no training state: start from it with --model.init_from")
        try:
            settings = run_settings(checkpoint, command, self.model_class, self.data_class)
        except ValueError as error:
            raise ValueError(f"the settings in the checkpoint {path} are invalid: {error}") from None
        config = self.override_settings(parser, args, command, path, checkpoint, settings)
        for other in self.other_paths:
            check_same_text((path, other), (checkpoint, read_checkpoint(other)))
            self.other_nets += (load_net(other)[0],)
            config.data.block_size = min(config.data.block_size, self.other_nets[-1].config.block_size)
        self.resume_state = {"loops": checkpoint.get("loops"), "callbacks": checkpoint.get("callbacks")}
        if command == "fit":
            self.start_step = checkpoint["global_step"]
            shapes = apply_to_collection(checkpoint["optimizer_states"], Tensor, lambda t: t.to("meta"))
            self.resume_state |= {"optimizer_states": shapes, "lr_schedulers": checkpoint.get("lr_schedulers")}
            if resumes_in_place(self.config.fit, settings, path):
                self.run_folder = path.absolute().parents[1]
        if command == "fit" and checkpoint["global_step"] >= (steps := self.config.fit.trainer.max_steps):
            raise ValueError(
                f"the checkpoint {path} is at step {checkpoint['global_step']}, so trainer.max_steps={steps} leaves "
                "nothing to do: give a larger number"
            )

    def override_settings(
        self, parser, args: list[str], command: str, path: Path, checkpoint: dict[str, Any], settings: dict[str, Any]
    ) -> Any:
        """Parses again with the checkpoint's settings first, so that configs and flags override them; returns both.

        Raises:
            ValueError: one overrides what must not differ.
        """
        with_classes: dict[str, Any] = {}
        missing: list[str] = []
        given = {key: self.config[command].trainer[key] for key in ("callbacks", "logger")}
        if command == "fit":
            with_classes, missing = class_settings(path, checkpoint, self.config.fit.trainer.default_root_dir)
        i, base = args.index(command) + 1, settings | {"trainer": settings["trainer"] | with_classes}
        self.config = parser.parse_args(
            [*args[:i], f"--config={to_quoted_yaml(base)}", *args[i:], f"--ckpt_path={path}"]
        )
        config = self.config[command]
        fill_from_checkpoint(config, settings)
        for key, entries in given.items():  # appended to the run's: drop those given again
            if isinstance(entries, list) and 0 < len(entries) < len(config.trainer[key]):
                classes = {entry.class_path for entry in entries}
                restored = config.trainer[key][: -len(entries)]
                config.trainer[key] = [entry for entry in restored if entry.class_path not in classes] + entries
        if config.data.on_unknown == "extend" == checkpoint["datamodule_hyper_parameters"].get("on_unknown"):
            config.data.on_unknown = "error"  # the vocabulary has been extended
        # validation may use shorter windows
        window = config.model.block_size
        if shorter := command != "fit" and 0 < window < settings["model"]["block_size"]:
            config.model.block_size, config.data.block_size = (settings[k]["block_size"] for k in ("model", "data"))
        check_overrides(command, config, settings, path)
        if shorter:
            config.data.block_size = window
        check_paths(config.data, settings)
        if command == "fit" and (missing := [name for name in missing if config.trainer[name] in (None, "auto")]):
            print_info(
                f"the run had trainer.{' and trainer.'.join(missing)}, which name classes and are not restored from "
                "checkpoints: give --config with the config.yaml of the run's folder to restore them"
            )
        if command == "fit" and settings["model"].get("ema_decay") and not config.model.ema_decay:
            print_info("model.ema_decay=0: training resumes from the raw weights, and their average is dropped")
        return config

    def start_from_weights(self, parser, args: list[str]) -> None:
        path = find_or_packaged(self.config.fit.model.init_from)
        settings = net_settings(read_checkpoint(path))
        self.config = parser.parse_args(
            ["fit", f"--config={to_quoted_yaml(settings)}", *args[1:], f"--model.init_from={path}"]
        )
        fill_from_checkpoint(self.config.fit, settings)
        settings["model"]["block_size"] = min(settings["model"]["block_size"], self.config.fit.model.block_size)
        check_overrides("fit", self.config.fit, settings, path)

    def start_from_lecture_step(self, parser, args: list[str], lecture_step: str) -> None:
        """Parses again with the fixed settings of the lecture step first: a config or flag that differs is an error."""
        fixed = LECTURE_STEPS[lecture_step].fixed
        self.config = parser.parse_args(["fit", f"--config={to_quoted_yaml({'model': fixed})}", *args[1:]])
        check_lecture_settings(lecture_step, {name: self.config.fit.model[name] for name in fixed})

    def _parse_ckpt_path(self) -> None:
        """Does nothing: LightningCLI's would silently override flags with the checkpoint's settings."""

    def instantiate_trainer(self, **kwargs) -> L.Trainer:
        fit, config = self.config.subcommand == "fit", self.config[self.config.subcommand]
        given = config.trainer
        if self.run_folder:  # purge what was logged after the checkpoint: it will be logged again
            root, version = self.run_folder.parents[1], int(self.run_folder.name.removeprefix("version_"))
            board = RunLogger(root, config.name, version, default_hp_metric=False, purge_step=self.start_step)
        else:
            root = Path(os.path.expandvars(given.default_root_dir)).expanduser()
            board = RunLogger(root, config.name, default_hp_metric=False)
        self.board, self.runs = board, root / config.name
        self.save_config_kwargs = {"board": board}
        kwargs["logger"] = self.loggers(self.config_init[self.config.subcommand].trainer.logger, fit)
        given_callbacks = self.config_init[self.config.subcommand].trainer.callbacks or []
        given_callbacks = list(given_callbacks) if isinstance(given_callbacks, (list, tuple)) else [given_callbacks]
        no_bar = given.enable_progress_bar is False or any(isinstance(each, ProgressBar) for each in given_callbacks)
        callbacks: list[L.Callback] = [] if no_bar else [TrainingProgress()]
        if fit:
            self.throughput = Throughput()
            callbacks += [self.throughput, UpdateRatios(), ValidateAtEnd()]
            if given.enable_checkpointing in (None, True):
                self.io, self.saver = AsyncCheckpointIO(), CheckpointSaver(self.runs, config.save_every_n_steps)
                kwargs["plugins"] = [self.io, *(self.config_init.fit.trainer.plugins or [])]
                callbacks += [self.saver, StopOnSignal(self.saver)]
        else:
            kwargs["plugins"] = [AsyncCheckpointIO(), *(self.config_init[self.config.subcommand].trainer.plugins or [])]
        if uses_several_devices(given):
            export_launcher_pid()
            if torch.cuda.is_available() and given.accelerator != "cpu" and not dist.is_nccl_available():
                raise ValueError(
                    "training on several GPUs needs NCCL, which this build of torch lacks: install PyPI's for Linux, "
                    "or give --trainer.devices 1"
                )
            if given.strategy == "auto":
                kwargs["strategy"] = "ddp_flat"
        kwargs["callbacks"] = callbacks + given_callbacks
        trainer = self.build_trainer(given, **kwargs)
        check_launcher(trainer)
        check_world_size(trainer)
        return trainer

    def build_trainer(self, given: Any, **kwargs) -> L.Trainer:
        """Builds the Trainer.

        Raises:
            ValueError: the settings `given` don't fit together or this machine; the message is one sentence.
        """
        if given.profiler == "xla" and find_spec("torch_xla") is None:
            raise ValueError("trainer.profiler=xla needs the package torch_xla, which is not installed")
        try:
            return super().instantiate_trainer(**kwargs)
        except ModuleNotFoundError as error:  # a precision, strategy or logger needs a package
            raise ValueError(
                f"trainer.precision={given.precision} with trainer.strategy={given.strategy}: "
                f"{' '.join(str(error).split())}"
            ) from None
        except MisconfigurationException as error:
            if not any(word in str(error).lower() for word in ("accelerator", "backend", "machine only has")):
                raise
            raise ValueError(
                f"trainer.accelerator={given.accelerator} with trainer.devices={given.devices}: "
                f"{' '.join(str(error).split())} Use auto for both; the accelerator cpu always exists"
            ) from None
        except Exception as error:  # Lightning's parts raise a dozen types
            raise ValueError(
                f"no Trainer can be built from trainer.accelerator={given.accelerator}, trainer.devices="
                f"{given.devices}, trainer.strategy={given.strategy} and the other settings: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None

    def before_instantiate_classes(self) -> None:
        if "WandbLogger" in str(self.config[self.config.subcommand].trainer.logger):
            import_optional("wandb", "wandb")

    def loggers(self, given: Any, fit: bool) -> list[Logger] | bool:
        """TensorBoard's logger and those that the config names."""
        if given is None or isinstance(given, bool):
            return [self.board] if fit and given is not False else False
        return [self.board] * fit + (list(given) if isinstance(given, Iterable) else [given])

    def check_resume_state(self, state: dict[str, Any], subcommand: str) -> None:
        """Raises ValueError if Lightning can't resume from this state of a checkpoint."""
        loop = f"{subcommand}_loop"
        try:
            loops, callbacks = state["loops"], {} if state["callbacks"] is None else state["callbacks"]
            if not isinstance(callbacks, dict) or not all(isinstance(key, str) for key in callbacks):
                raise ValueError("its callbacks have no names")
            for callback in self.trainer.callbacks:
                if callback.state_key in callbacks and type(callback).__module__.startswith("lightning_gpt."):
                    check_counters(callbacks[callback.state_key], callback.state_dict(), callback.state_key)
            if subcommand == "fit" or loops is not None:
                fresh = {loop: getattr(self.trainer, loop).state_dict()}
                check_counters({loop: loops[loop]} if isinstance(loops, dict) and loop in loops else {}, fresh, "loops")
            if subcommand == "fit":
                if not isinstance(state["lr_schedulers"], list):
                    raise ValueError("it has no lr_schedulers")
                progress = loops[loop]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
                if (steps := progress["total"]["completed"]) != self.start_step:
                    raise ValueError(f"its optimizer has taken {steps} steps, but its global_step is {self.start_step}")
                check_optimizer_state(state["optimizer_states"], self.model.parameter_groups())
        except ValueError as error:
            path = self.config[subcommand].ckpt_path
            raise ValueError(
                f"training can't resume from the checkpoint {path}: {error}. Start from its weights with "
                "--model.init_from"
            ) from None

    def before_fit(self) -> None:
        self.datamodule.check_batch_size(self.trainer.world_size)  # before Lightning starts other processes
        check_monitors(self.trainer, self.model, self.datamodule.tokenizer)
        if self.trainer.is_global_zero and self.requested_checkpoint:
            path = self.config.fit.ckpt_path or self.config.fit.model.init_from
            print(f"starts from {describe_checkpoint(path, str(self.requested_checkpoint))}", flush=True)
        if self.config.fit.ckpt_path:
            self.model.init_from = None
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self.board.folder = self.run_folder or create_run_folder(self.runs)
            self.cleanup.callback(remove_if_empty, self.board.folder)
            if (lock := lock_run_folder(self.board.folder)) is not None:
                self.cleanup.callback(os.close, lock)
            for logger in self.trainer.loggers:
                if isinstance(logger, RunCSVLogger):
                    logger.folder, logger.start_step = self.board.folder, self.start_step
                elif isinstance(logger, WandbLogger):
                    self.cleanup.enter_context(wandb_run_in(self.board.folder, logger))
            if self.saver is not None:
                self.saver.folder = self.board.folder / "checkpoints"
        if self.trainer.is_global_zero:
            data, t = self.datamodule, self.trainer
            size = sum(p.numel() for p in self.model.net.parameters())
            parameters = f"{size / 1e6:.2f}M" if size >= 1e5 else f"{size:,}"
            print(
                f"{parameters} parameters on {t.num_devices * t.num_nodes} x {t.strategy.root_device.type} "
                f"({t.precision}), {len(data.train_tokens):,} tokens to train on, {len(data.val_tokens):,} to "
                f"validate, {t.max_steps:,} steps",
                flush=True,
            )

    def before_validate(self) -> None:
        self.model.other_nets = self.other_nets
        if self.trainer.is_global_zero:
            paths = [self.config[self.config.subcommand].ckpt_path, *self.other_paths]
            print_info(describe_checkpoints(paths, str(self.requested_checkpoint)))

    before_test = before_validate

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        print(f"\nended after step {self.trainer.global_step:,}: {stop_reason(self.trainer)}")
        if self.saver is None:
            return
        if self.io.failed:
            files = " and ".join(map(os.path.relpath, self.io.failed))
            print_error(f"training finished, but its last state could not be saved to {files}")
            sys.exit(1)
        if not math.isfinite(self.saver.best_loss):
            print(f"nothing was validated; the newest state is {os.path.relpath(self.saver.last)}")
            return
        path, program = os.path.relpath(self.saver.best), program_name()
        loss = self.trainer.callback_metrics["val/loss"]
        print(
            f"val/loss {loss:.4f}{self.loss_unit()} at the end, {self.saver.best_loss:.4f} at best, after "
            f"{self.throughput.seconds:.1f} s of training\n{path}\n"
        )
        use = self.show_result(path)
        print(f"\nNext:\n  {program} {use}\n  {program} validate {path}")

    def loss_unit(self) -> str:
        return f" nats per {'character' if isinstance(self.datamodule.tokenizer, CharTokenizer) else 'token'}"

    def show_result(self, path: str) -> str:
        """Prints a text that the checkpoint writes; returns the command that makes use of it."""
        for piece in stream(*load(path), max_new_tokens=300):
            print(piece, end="", flush=True)
        print()
        return "generate" if self.datamodule.tokenizer.unknown("ROMEO:") else 'generate "ROMEO:"'

    def _run_subcommand(self, subcommand: str) -> None:
        if self.resume_state:
            self.check_resume_state(self.resume_state, subcommand)
            if subcommand == "fit":
                check_remaining(self.config.fit.trainer, self.resume_state)
        try:
            with ExitStack() as self.cleanup, lossy_output() if subcommand == "fit" else nullcontext():
                super()._run_subcommand(subcommand)
        except SystemExit:
            if self.trainer.interrupted and self.trainer.is_global_zero:  # by Ctrl-C without StopOnSignal
                print_error(f"interrupted at step {self.trainer.global_step:,}")
            raise
        except Exception as error:
            launcher = self.trainer.strategy.launcher
            if not isinstance(error, TrainingInterrupted) and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGKILL)  # the other ranks would wait for this one
            if self.trainer.world_size > 1 and is_peer_lost(error):
                raise PeerLostError from None
            raise


def cli_for(args: list[str]) -> type[CLI]:
    """The command line of a stage, or to validate a checkpoint that it has written."""
    stage = args[0] if args else ""
    if stage in ("validate", "test"):
        with suppress(OSError):
            find = partial(find_checkpoint, stages=STAGES)
            summary = checkpoint_summary(find_checkpoints(last_flag_value(args, "--ckpt_path") or "best", find)[0])
            stage = "fit" if summary is None else summary[2]["stage"]
    if stage not in STAGES or stage == "fit":
        return CLI
    from .stages import STAGE_CLIS  # imports what fit does not need

    return STAGE_CLIS[stage]


def check_same_text(paths: Sequence[Path], checkpoints: Sequence[dict]) -> None:
    """Raises ValueError if the two checkpoints can't be validated as an ensemble, on the text of both."""
    if (stage := stage_of(checkpoints[0])) not in ("fit", "sft"):
        raise ValueError(f"the checkpoint {paths[0]} is of {stage}: only those of fit and sft can be averaged")
    first, other = [
        {"stage": stage_of(one)}
        | {f"data.{name}": one["datamodule_hyper_parameters"].get(name) for name in TEXT_SETTINGS}
        for one in checkpoints
    ]
    if different := [name for name in first if first[name] != other[name]]:
        raise ValueError(
            f"{paths[0]} and {paths[1]} differ in {' and '.join(different)}: an ensemble is validated on the one text "
            "that all its checkpoints come from"
        )


def check_remaining(given, state: dict) -> None:
    """Raises ValueError if trainer.max_time or max_epochs leaves nothing to do after `state` ({}: a new run)."""
    timer = Timer(given.max_time)
    with suppress(TypeError, ValueError, AttributeError, OverflowError):  # the Timer's saved state is not checked
        timer.load_state_dict((state.get("callbacks") or {}).get(timer.state_key, {}))
    if (left := timer.time_remaining()) is not None and left <= 0:
        raise ValueError(
            f"trainer.max_time={given.max_time} leaves nothing to do after {timer.time_elapsed():.0f} s of training: "
            "give more time, or null"
        )
    fit_loop = state.get("loops", {}).get("fit_loop", {})
    epochs = fit_loop.get("epoch_progress", {}).get("current", {}).get("processed", 0)
    if given.max_epochs is not None and 0 <= given.max_epochs <= epochs:
        raise ValueError(
            f"trainer.max_epochs={given.max_epochs} leaves nothing to do after {epochs} epochs: give a larger number, "
            "or null"
        )


def stop_reason(trainer: L.Trainer) -> str:
    if trainer.global_step >= trainer.max_steps:
        return f"trainer.max_steps={trainer.max_steps} is reached"
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            reason = callback.stopping_reason_message.replace(" Signaling Trainer to stop.", "").replace(
                " records", " validations"
            )
            return f"EarlyStopping with patience={callback.patience}: {reason}"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return f"trainer.max_time is reached ({callback.time_elapsed():.0f} s of training)"
    if 0 <= (trainer.max_epochs or -1) <= trainer.current_epoch:
        return f"trainer.max_epochs={trainer.max_epochs} is reached"
    return "a callback requested it (trainer.should_stop)"


def keep_record(record: logging.LogRecord) -> bool:
    """Whether a record of Lightning's rank_zero logger is a warning, or comes from a callback or the tuner."""
    return record.levelno > logging.INFO or bool({"callbacks", "tuner"} & set(Path(record.pathname).parts))


def configure_logging() -> None:
    """Silences Lightning's general messages; warnings and the output of requested callbacks and profilers stay."""
    threading.excepthook = lambda args: None  # TensorBoard's writer and AsyncCheckpointIO reraise in the main thread
    for name in "lightning.pytorch", "lightning.fabric":
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in "callbacks", "profilers", "tuner", "utilities.rank_zero":
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(keep_record)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    # logs that a process has died before it kills the others
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*LeafSpec.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # validate saves nothing
        ".*overridden `on_before_batch_transfer` in `LightningModule`.*",  # on purpose
    ):
        warnings.filterwarnings("ignore", message)


def train(args: list[str], cli: type[CLI] | None = None) -> None:
    """Runs the command line `args`: fit, a stage of alignment, validate or test."""
    cli = cli or cli_for(args)
    command = args[0] if args and args[0] in STAGES else "fit"
    if args[:1] and args[0] in STAGES and args[0] != "fit":
        given = {"--config", "-c", "--ckpt_path"} & {arg.split("=")[0] for arg in args}
        args = ["fit", *([] if given else [f"--config={args[0]}"]), *args[1:]]
    configure_logging()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32: far faster, and precise enough
    try:
        cli(
            parser_class=TrainingParser,
            save_config_callback=ConfigSaver,
            seed_everything_default=1337,
            parser_kwargs={
                "prog": "lightning-gpt",
                "description": "Train and validate a GPT on Tiny Shakespeare or your own text.",
                "validate": {"description": "Compute the loss of a checkpoint over its full validation split."},
                "test": {"description": "Log the same metrics as validate, under test/."},
            },
            trainer_defaults=dict(TRAINER_DEFAULTS),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=resolve_configs(args),
        )
    except TrainingInterrupted as stop:
        with suppress(OSError):  # stderr may be a log on a full disk
            print(
                f"lightning-gpt: {stop}. Resume:\n  {program_name()} {command} --ckpt_path {stop.path}", file=sys.stderr
            )
        sys.exit(128 + stop.signum)
    except PeerLostError:
        print_error(
            "another process of this run has ended or hangs; see its output. Saved checkpoints are intact; resume:\n"
            f"  {program_name()} {command} --ckpt_path last"
        )
        sys.exit(1)
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR', 'this machine')}, port {os.environ.get('MASTER_PORT', 'unknown')}"
        problem = "is in use by another program" if "EADDRINUSE" in str(error) else "can't be reached"
        remedy = "set MASTER_PORT (torchrun: --master_port) to a free one, the same on every machine"
        raise ValueError(f"the rendezvous address of the processes, {address}, {problem}: {remedy}") from None
    except DivergenceError as error:
        print_error(message_with_notes(error))
        sys.exit(1)
    except (MisconfigurationException, ImportError) as error:  # ImportError: a setting needs a module
        raise ValueError(" ".join(message_with_notes(error).split())) from None
    except RuntimeError as error:
        if "Early stopping conditioned on metric" in str(error):
            raise ValueError(" ".join(message_with_notes(error).split())) from None
        if "returned nan values" not in str(error):  # from trainer.detect_anomaly, which has printed where
            raise
        print_error(f"trainer.detect_anomaly stopped training: {error} Use a lower learning rate")
        sys.exit(1)
