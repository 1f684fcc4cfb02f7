"""Saves the config, best.ckpt and last.ckpt of a run, also when a signal or an exception stops it."""

import math
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ..checkpoint.io import TMP_PREFIX, atomic_write, read_checkpoint, read_verified, write_checkpoint
from ..errors import is_out_of_memory
from .lightning_compat import checkpoint_dict, validation_is_due
from .logger import RunLogger
from .module import DivergenceError, LanguageModel
from .strategies import FSDP2Strategy, is_peer_lost


class AsyncCheckpointIO(CheckpointIO):
    """Writes checkpoints with `write_checkpoint` in a background thread and reads them with `read_checkpoint`.

    Training waits only for a copy in memory. A full disk or a lack of memory prints a warning and does not stop
    training: the earlier file is untouched, and the next save tries again.
    """

    def __init__(self) -> None:
        self.failed: dict[Path, Exception] = {}  # files whose last save failed, with the error
        self.written: dict[Path, int] = {}  # the step that each file holds
        self.pool: ThreadPoolExecutor | None = None
        self.pending: deque[Future] = deque()

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any | None = None) -> None:
        while len(self.pending) > 1:  # the disk is slower than the saves: do not accumulate copies
            self.pending.popleft().result()
        try:
            copy = apply_to_collection(checkpoint, Tensor, lambda t: t.detach().clone())
            ready = torch.cuda.Event() if torch.cuda.is_initialized() else None
            if ready is not None:
                ready.record()
            self.pool = self.pool or ThreadPoolExecutor(1, "save")
            self.pending.append(self.pool.submit(self.write, copy, Path(path), ready))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.record_failure(Path(path), checkpoint["global_step"], error)

    def write(self, checkpoint: dict[str, Any], path: Path, ready: torch.cuda.Event | None) -> None:
        try:
            if ready is not None:  # a separate stream, so that the copy to the host does not delay training
                with torch.cuda.stream(torch.cuda.Stream()):
                    torch.cuda.current_stream().wait_event(ready)
                    checkpoint = apply_to_collection(checkpoint, Tensor, Tensor.cpu)
            write_checkpoint(checkpoint, path)
        except (OSError, MemoryError, RuntimeError) as error:  # torch raises RuntimeError for some disk errors
            self.record_failure(path, checkpoint.get("global_step", 0), error)
        else:
            self.failed.pop(path, None)
            self.written[path] = checkpoint.get("global_step", 0)

    def record_failure(self, path: Path, step: int, error: Exception) -> None:
        self.failed[path] = error
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        reason = "out of memory" if is_out_of_memory(error) else reason
        print(
            f"warning: {os.path.relpath(path)} could not be saved at step {step}: {reason}. "
            "The earlier file is untouched, and the next save tries again",
            file=sys.stderr,
        )

    def load_checkpoint(self, path, map_location: Any | None = None, weights_only: bool | None = None) -> dict:
        return read_checkpoint(path)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)

    def wait(self) -> None:
        """Waits until all requested saves are written."""
        while self.pending:
            self.pending.popleft().result()

    def teardown(self) -> None:
        self.wait()
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


def set_loop_counters(loops: dict[str, dict], steps: int, batches: int | None, due: bool, begun: bool) -> None:
    """Sets Lightning's counters in place to their values after `steps` steps, wherever an exception has left them.

    Args:
        loops: the state of the fit loop.
        steps: number of completed optimizer steps.
        batches: number of batches in these steps; None leaves the batch counters unchanged.
        due: whether a validation is due after these steps; a resumed run then starts with it, from its first batch.
        begun: whether that validation had begun.
    """

    def set_count(progress: dict[str, Any], total: int) -> None:
        earlier = progress["total"]["completed"] - progress["current"]["completed"]  # in earlier epochs
        for part, n in {"total": total, "current": total - earlier}.items():
            progress[part] = dict.fromkeys(progress[part], n)

    if batches is not None:
        set_count(loops["epoch_loop.batch_progress"], batches)
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    for progress in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        set_count(progress, steps)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    if due:  # Lightning resumes a validation that is one batch short, from batch 0; CheckpointSaver corrects the total
        validation = loops["epoch_loop.val_loop.batch_progress"]
        done = validation["total"]["completed"] - (validation["current"]["completed"] if begun else 0)
        validation["current"] = dict.fromkeys(validation["current"], 0)
        validation["total"] = {"ready": done, "started": done, "processed": done - 1, "completed": done - 1}


class CheckpointSaver(Checkpoint):
    """Writes last.ckpt after each validation, every N steps and at the end; best.ckpt after the best validation so far.

    best.ckpt always holds the weights that its `val_loss` was measured on. Weights that are NaN or infinite are never
    saved. After an exception, the last completed step is saved before the exception propagates, see `rescue`.

    Args:
        folder: the output folder; all ranks use that of rank 0. A best.ckpt there is only replaced by a better one.
        every_n_steps: optimizer steps between two saves; 0 saves after validations and at the end only.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 500):
        self.folder, self.every_n_steps, self.saved_step, self.val_step = Path(folder), every_n_steps, -1, -1
        self.best_loss = self.val_loss = self.start_step = float("inf")
        self.updating = -1  # the global step at which the latest optimizer update began

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"

    def setup(self, trainer: L.Trainer, lm: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        self.start_step = trainer.global_step
        for temporary in self.folder.glob(f"{TMP_PREFIX}*"):
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)  # left by a process that was killed
        self.read_best_loss(trainer)

    def read_best_loss(self, trainer: L.Trainer) -> None:
        """Sets the loss to beat to that of the best.ckpt on disk, whichever run wrote it; infinite without one."""
        best_loss = float("inf")
        if trainer.is_global_zero:
            with suppress(OSError, ValueError):  # missing or damaged
                best_loss = read_verified(self.best).get("val_loss", best_loss)
        self.best_loss = trainer.strategy.broadcast(best_loss)

    def on_save_checkpoint(self, trainer: L.Trainer, lm: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["val_loss"] = self.val_loss if self.val_step == trainer.global_step else math.nan

    def save(self, trainer: L.Trainer, path: Path) -> None:
        cast(LanguageModel, trainer.lightning_module).check_divergence()
        if not trainer.fast_dev_run:
            for logger in trainer.loggers:
                logger.save()  # flush: a run resumed from this checkpoint does not log earlier steps again
            trainer.save_checkpoint(path)
            self.saved_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, *_) -> None:
        self.updating = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, *_) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            total = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            total.started = total.processed = total.completed = total.ready  # see set_loop_counters

    def on_validation_end(self, trainer: L.Trainer, *_) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.val_loss, self.val_step = trainer.callback_metrics["val/loss"].item(), trainer.global_step
            if not math.isfinite(self.val_loss):
                step = f"{trainer.global_step:,}"
                raise DivergenceError(f"val/loss became {self.val_loss} at step {step}: lower the learning rate")

    def on_step_done(self, trainer: L.Trainer) -> None:
        n, step = self.every_n_steps, trainer.global_step
        if step == self.saved_step:
            return
        if step == self.val_step:
            if trainer.strategy.broadcast(self.best in getattr(trainer.strategy.checkpoint_io, "failed", ())):
                self.read_best_loss(trainer)
            if self.val_loss < self.best_loss:
                self.best_loss = self.val_loss
                self.save(trainer, self.best)
        if step == self.val_step or n and step % n == 0:
            self.save(trainer, self.last)

    def on_train_end(self, trainer: L.Trainer, *_) -> None:
        self.on_step_done(trainer)
        if trainer.global_step != self.saved_step:
            self.save(trainer, self.last)

    def on_exception(self, trainer: L.Trainer, lm: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, TrainingInterrupted):  # StopOnSignal has saved
            return
        io = trainer.strategy.checkpoint_io
        if not isinstance(exception, DivergenceError) and trainer.global_step > max(self.start_step, self.saved_step):
            try:
                self.rescue(trainer, cast(LanguageModel, lm), exception)
            except Exception as error:  # the first exception is the one to report
                exception.add_note(f"Step {trainer.global_step:,} could not be saved: {error}")
        if isinstance(io, AsyncCheckpointIO):
            io.wait()
            if self.last in io.written:
                path = os.path.relpath(self.last)
                exception.add_note(f"The last good checkpoint is {path}, of step {io.written[self.last]:,}")

    def rescue(self, trainer: L.Trainer, lm: LanguageModel, exception: BaseException) -> None:
        """Saves the last completed step from rank 0 alone, because other ranks may be gone; not under fsdp2."""
        loop, step = trainer.fit_loop.epoch_loop, trainer.global_step
        progress = loop.automatic_optimization.optim_progress.optimizer.step.total
        mid_update = self.updating == step and progress.ready > progress.completed
        alone = trainer.is_global_zero and not isinstance(trainer.strategy, FSDP2Strategy) and not trainer.fast_dev_run
        if mid_update or not alone or isinstance(exception, Exception) and is_peer_lost(exception):
            return
        if lm.bad_losses or not torch.nn.utils.get_total_norm(lm.net.parameters()).isfinite():
            return
        endless = trainer.num_training_batches == float("inf")
        batches = step * trainer.accumulate_grad_batches if endless else None
        at_end = loop.batch_progress.total.ready == batches  # no batch of the next step has begun
        soon = at_end and validation_is_due(trainer)
        due = (trainer.validating or soon) and self.val_step != step
        checkpoint = checkpoint_dict(trainer)
        set_loop_counters(checkpoint["loops"]["fit_loop"], step, batches, due, trainer.validating)
        for logger in trainer.loggers:
            logger.save()
        if self.val_step == step and self.val_loss < self.best_loss:
            trainer.strategy.save_checkpoint(checkpoint, self.best)
        trainer.strategy.save_checkpoint(checkpoint, self.last)


class ConfigSaver(SaveConfigCallback):
    """Writes the run's settings to config.yaml in its folder and, as text, into every checkpoint.

    A run that resumes in its folder keeps that file and writes config_from_step_N.yaml.
    """

    def __init__(self, parser, config, board: RunLogger):
        super().__init__(parser, config)
        self.board = board

    def text(self) -> str:
        return self.parser.dump(self.config, skip_none=False, format="yaml")

    def setup(self, trainer: L.Trainer, lm: L.LightningModule, stage: str) -> None: ...

    def on_train_start(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        from_step = f"config_from_step_{trainer.global_step}"
        names = chain(["config", from_step], (f"{from_step}_{n}" for n in count(2)))
        files = (Path(self.board.log_dir, f"{name}.yaml") for name in names)
        file = next(file for file in files if not file.exists())
        try:
            atomic_write(file, self.text().encode())
        except OSError as error:
            print(
                f"warning: {os.path.relpath(file)} could not be written: {error.strerror or error}. "
                "Every checkpoint contains these settings too",
                file=sys.stderr,
            )
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("settings/config", f"```yaml\n{self.text()}\n```", trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, lm: L.LightningModule, checkpoint: dict) -> None:
        checkpoint["config"] = self.text()


class TrainingInterrupted(Exception):
    """A signal ended the training after the current step was completed and saved."""

    def __init__(self, signum: int, step: int, path: Path):
        self.signum, self.path = signum, path
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step:,}, saved as {path}")


class StopOnSignal(L.Callback):
    """Ends a run on SIGTERM, Ctrl-C or SLURM's SIGUSR1 after the current step, a validation if due, and a save.

    A second signal ends it at once, without a save.
    """

    EVERY = 20  # steps between two checks whether any rank got a signal, on several devices

    def __init__(self, saver: CheckpointSaver):
        self.saver, self.received, self.handlers = saver, 0, dict[int, Any]()

    def on_train_start(self, trainer: L.Trainer, *_) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python can set signal handlers in the main thread only
        signals = [signal.SIGTERM, signal.SIGINT]
        if "SLURM_JOB_ID" in os.environ:
            signals.append(signal.SIGUSR1)
        self.handlers = {signum: signal.signal(signum, self.receive) for signum in signals}

    def receive(self, signum: int, frame) -> None:
        self.received = signum
        for number in self.handlers:
            signal.signal(number, signal.SIG_DFL)
        with suppress(OSError):  # a full disk or a closed terminal
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: finishing this step and saving; send it again to stop at once\n".encode())

    def on_validation_end(self, trainer: L.Trainer, *_) -> None:
        self.saver.on_validation_end(trainer)  # Lightning calls the saver last, after callbacks that may raise

    def on_step_done(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1:
            if trainer.global_step % self.EVERY:
                return
            received = torch.tensor(self.received, device=trainer.strategy.root_device)
            self.received = int(trainer.strategy.reduce(received, reduce_op="max"))
        if self.received:
            if self.saver.saved_step != trainer.global_step:
                self.saver.save(trainer, self.saver.last)
            if isinstance(io := trainer.strategy.checkpoint_io, AsyncCheckpointIO):
                io.wait()
            trainer.strategy.barrier()  # no rank leaves before everything is on disk
            raise TrainingInterrupted(self.received, trainer.global_step, Path(os.path.relpath(self.saver.last)))

    def teardown(self, trainer: L.Trainer, lm: L.LightningModule, stage: str) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.handlers = {}
