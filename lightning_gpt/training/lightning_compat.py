"""Every private name of Lightning and jsonargparse that this package uses, each with its reason.

Written for Lightning 2.6.6 and jsonargparse 4.53. A test calls `missing_names`: a newer version without one of these
names fails with a sentence that says which. Where a newer version has a public equivalent, it replaces the use here.
Overridden methods (OVERRIDES) stand in their subclasses; TensorBoard's file writer is in logger.py.
"""

from typing import Any, cast

import jsonargparse
import lightning as L
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core.imports import RequirementCache

OVERRIDES = [
    (LightningCLI, "_parse_ckpt_path", "cli/train.py puts a checkpoint's settings before the flags, not over them"),
    (LightningCLI, "_run_subcommand", "cli/train.py checks a checkpoint's state before a run and cleans up after it"),
    (jsonargparse.ArgumentParser, "_parse_optional", "cli/parser.py reads flags, and text for a class's own options"),
    (jsonargparse.ArgumentParser, "_get_values", "cli/parser.py takes text on the command line literally"),
    (jsonargparse.ArgumentParser, "_check_value_key", "cli/parser.py takes text in configs literally"),
    (RequirementCache, "_check_available", "cli/main.py keeps torchmetrics from importing packages for seconds"),
]


def trainer_or_none(module: L.LightningModule) -> L.Trainer | None:
    """The Trainer of a module; the public property `trainer` raises where there is none."""
    return module._trainer


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether the fit loop validates before its next batch; no public method says so."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher))


def set_logged_steps(trainer: L.Trainer, steps: int) -> None:
    """Set the step count that loggers get; a resumed run would be one off where a validation is due."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def correct_progress(fit_loop: dict[str, Any]) -> None:
    """Correct the loop counters of a checkpoint from the end of a run, with which Lightning would not go on exactly."""
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if epochs["current"]["ready"] != epochs["current"]["processed"]:
        return
    if batches["is_last_batch"]:  # also the end of an epoch: Lightning would count the next batch to that epoch
        batches["is_last_batch"] = False
        steps = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values()
        for progress in batches, fit_loop["epoch_loop.scheduler_progress"], *steps:
            progress["current"] = dict.fromkeys(progress["current"], 0)
    else:  # within an epoch: Lightning would resume in another epoch
        for progress in epochs.values():
            progress["processed"] = progress["completed"] = progress["ready"] - 1


def closure_result(closure: Any) -> Any:
    """What the closure of an optimizer step has computed; a replayed CUDA graph does not call it."""
    return closure._result


def set_closure_result(closure: Any, result: Any) -> None:
    """Give Lightning the result it asks the closure for after a replayed step."""
    closure._result = result


def checkpoint_dict(trainer: L.Trainer) -> dict[str, Any]:
    """What `save_checkpoint` would save; that method waits for other ranks, which may be gone."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Stop Lightning from asking all ranks in every step whether one got a SIGTERM, for which the GPU would wait."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def set_data_parallel_size(strategy: Any, size: int) -> None:
    """ModelParallelStrategy takes "auto" or a number in its constructor, before it knows the number of devices."""
    strategy._data_parallel_size = size


def start_method(strategy: Any) -> str | None:
    """How a strategy forks or spawns processes from this one: fork, spawn or forkserver; None if it does not."""
    return getattr(strategy.launcher, "_start_method", None)


def is_from_tuner(finder: LearningRateFinder) -> bool:
    """Whether Tuner.lr_find runs this callback, once; a Trainer's own would sweep in every fit."""
    return finder._early_exit


def missing_names() -> list[str]:
    """Sentences about the private names that the installed versions lack."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    forked = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False)
    parser = jsonargparse.ArgumentParser()
    action = parser.add_argument("--flag", type=int | None)
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    closure = L.pytorch.loops.optimization.automatic.Closure(cast(Any, None), cast(Any, None))
    attributes: list[tuple[Any, str]] = [
        (L.LightningModule(), "_trainer"),
        (epoch_loop, "_should_check_val_fx"),
        (fit_loop, "_data_fetcher"),
        (epoch_loop, "_batches_that_stepped"),
        (epoch_loop, "_broadcast_sigterm_tensor"),
        (closure, "_result"),
        (trainer, "_checkpoint_connector"),
        (trainer._checkpoint_connector, "dump_checkpoint"),
        (L.pytorch.strategies.ModelParallelStrategy(), "_data_parallel_size"),
        (forked.strategy.launcher, "_start_method"),
        (LearningRateFinder(), "_early_exit"),
        (action, "_typehint"),
        (parser, "_option_string_actions"),
    ]
    needed = attributes + [(owner, name) for owner, name, _ in OVERRIDES]
    return [
        f"{owner.__name__ if isinstance(owner, type) else type(owner).__name__} has no {name} any more, which "
        "lightning_gpt/training/lightning_compat.py names: find its replacement, or pin the older version"
        for owner, name in needed
        if not hasattr(owner, name)
    ]
