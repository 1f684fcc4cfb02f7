"""Logs update ratios, the generalization gap, throughput and the hardware, and sets TensorBoard's layout."""

import math
import os
import platform
import time
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard.summary import hparams

from ..model.gpt import GPT, parameter_role
from .module import LanguageModel
from .strategies import FSDP2Strategy

HPARAM_METRICS = (
    "val/best",
    "val/loss",
    "val/bpc",
    "val/generalization_gap",
    "train/loss",
    "perf/tokens_per_second",
    "perf/mfu",
)
LAYOUT = {
    "loss": {
        "nats per token": ["Multiline", ["train/loss", "val/loss", "val/best"]],
        "bits per character": ["Multiline", ["train/bpc", "val/bpc"]],
        "generalization gap: val minus train, rises with overfitting": ["Multiline", ["val/generalization_gap"]],
    },
    "optimizer": {
        "learning rates": ["Multiline", ["train/lr", "train/muon_lr"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "update / weights, per layer (AdamW: about 1e-3)": ["Multiline", ["update_ratio/.*"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["perf/tokens_per_second"]],
        "ms per step": ["Multiline", ["perf/ms_per_step"]],
    },
    "samples": {
        "longest run copied from the training text, in tokens": ["Multiline", ["samples/longest_copy"]],
        "share of n-grams that occur in the training text": ["Multiline", ["samples/copied_share"]],
    },
}

GPU_CHARTS = {
    "MFU, fraction of the GPU's peak FLOP/s": ["Multiline", ["perf/mfu"]],
    "GPU memory, GiB": ["Multiline", ["perf/gpu_memory"]],
}


def describe_hardware(lm: LanguageModel) -> str:
    """Number and name of the devices, precision, CPU cores, threads and software versions, in one sentence."""
    trainer, device = lm.trainer, lm.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return (
        f"{trainer.world_size} x {name}, {trainer.precision}, {os.cpu_count()} CPU cores, torch with "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {L.__version__}"
    )


class UpdateRatios(L.Callback):
    """Logs `update_ratio/...` of each layer, and after a validation `val/best` and `val/generalization_gap`.

    The gap is the validation loss minus the last logged train loss. An update ratio is |new - old| / |new| over all
    weights of a layer in one step. It is computed from a copy made before each logged step, because a captured CUDA
    graph calls no hooks; other steps cost nothing. Runs with and without this callback are bit-identical.
    """

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.best, self.train_loss = float("inf"), float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "train_loss": self.train_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.train_loss = state_dict["best"], state_dict["train_loss"]

    @staticmethod
    def weights(lm: LanguageModel) -> dict[str, Tensor]:
        """The part of each parameter that this device holds."""
        return {name: (p.to_local() if isinstance(p, DTensor) else p).detach() for name, p in lm.net.named_parameters()}

    def on_train_batch_start(self, trainer: L.Trainer, lm: L.LightningModule, batch, batch_idx: int) -> None:
        model = cast(LanguageModel, lm)
        if trainer.loggers and model.ends_step(batch_idx) and model.logs(trainer.global_step + 1):
            self.before = [w.clone() for w in self.weights(model).values()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, lm: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        if not self.before or not cast(LanguageModel, lm).logs_after(batch_idx):
            return
        after, before, self.before = self.weights(cast(LanguageModel, lm)), self.before, []
        norms = [
            *torch._foreach_norm(torch._foreach_sub(list(after.values()), before)),
            *torch._foreach_norm(list(after.values())),
        ]
        squares = torch.stack(norms).float().square()  # (2 x parameters)
        if isinstance(trainer.strategy, FSDP2Strategy):
            squares = cast(Tensor, trainer.strategy.reduce(squares, reduce_op="sum"))
        if not trainer.is_global_zero:
            return
        sums: dict[str, list[float]] = {}
        for name, update, size in zip(after, *squares.view(2, -1).tolist(), strict=True):
            layer = sums.setdefault(parameter_role(name), [0.0, 0.0])
            layer[0] += update
            layer[1] += size
        ratios = {f"update_ratio/{layer}": (update / (size or 1.0)) ** 0.5 for layer, (update, size) in sums.items()}
        for logger in trainer.loggers:  # directly, because self.log takes 0.4 ms for each value
            logger.log_metrics(ratios, trainer.global_step - 1)  # Lightning counts the steps it logs from 0

    def remember_train_loss(self, trainer: L.Trainer) -> None:
        if (loss := cast(LanguageModel, trainer.lightning_module).logged_loss) is not None:
            self.train_loss = float(trainer.strategy.reduce(loss))

    def on_step_done(self, trainer: L.Trainer) -> None:
        if cast(LanguageModel, trainer.lightning_module).logs(trainer.global_step):
            self.remember_train_loss(trainer)  # before this step's checkpoint: a resumed run's gap needs it

    def on_exception(self, trainer: L.Trainer, *_) -> None:
        if trainer.world_size == 1 and hasattr(trainer.lightning_module, "logged_loss"):
            self.remember_train_loss(trainer)  # because CheckpointSaver saves then

    def on_validation_epoch_end(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        loss = float(cast(LanguageModel, lm).val_metrics["loss"].compute())  # over all ranks
        self.best = min(self.best, loss)
        self.remember_train_loss(trainer)
        several = trainer.world_size > 1  # all ranks log equal values, but Lightning warns without sync_dist
        lm.log("val/best", self.best, sync_dist=several)
        if not math.isnan(self.train_loss):
            lm.log("val/generalization_gap", loss - self.train_loss, sync_dist=several)

    def on_train_start(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            on_gpu = GPU_CHARTS if lm.device.type == "cuda" else {}  # empty charts elsewhere
            logger.experiment.add_custom_scalars(LAYOUT | {"speed": LAYOUT["speed"] | on_gpu})
            # the TEXT tab shows the groups in alphabetical order: samples first
            hardware = describe_hardware(cast(LanguageModel, lm))
            logger.experiment.add_text("settings/hardware", hardware, trainer.global_step)
            settings = {**lm.hparams, **getattr(trainer.datamodule, "hparams", {}), "max_steps": trainer.max_steps}
            settings |= {"precision": str(trainer.precision), "devices": trainer.world_size}
            plain = {
                key: value if isinstance(value, (bool, int, float, str)) else str(value)
                for key, value in settings.items()
                if key != "vocabulary"
            }
            # the HPARAMS tab reads the latest values of the curves with these names
            for summary in hparams(plain, dict.fromkeys(HPARAM_METRICS))[:2]:
                logger.experiment._get_file_writer().add_summary(summary)


# FLOP/s of dense bfloat16 matrix products, from NVIDIA's data sheets; the first name contained in the GPU's name counts
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None if it is not in PEAK_FLOPS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(net: GPT) -> float:
    """FLOPs of the forward and backward pass per token, as in PaLM (Chowdhery et al. 2022), appendix B."""
    matrices = sum(
        p.numel() for name, p in net.named_parameters() if p.dim() == 2 and parameter_role(name) != "embeddings"
    )
    if net.config.tie_embeddings:
        matrices += net.wte.weight.numel()
    return 6 * matrices + 12 * net.config.n_layer * net.config.n_embd * net.config.block_size


class Throughput(L.Callback):
    """Logs `perf/tokens_per_second` and `perf/ms_per_step`; on a GPU also `perf/gpu_memory`, the GiB that PyTorch
    reserves at most, and `perf/mfu`, model FLOP/s (`flops_per_token`) over PEAK_FLOPS.

    Speed counts all devices, and neither compilation nor validation nor samples. `seconds` is the total training time,
    measured the same way.
    """

    start: float | None = None  # of the running measurement
    WARMUP_BATCHES = 5  # not measured: they compile, capture and autotune

    def on_train_start(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        self.batches, self.seconds, self.start = 0, 0.0, None

    def stop(self) -> float:
        """Stops the measurement and returns its seconds."""
        assert self.start is not None
        seconds, self.start = time.perf_counter() - self.start, None
        self.seconds += seconds
        return seconds

    def on_train_batch_start(self, trainer: L.Trainer, lm: L.LightningModule, batch, batch_idx: int) -> None:
        if self.start is None and self.batches >= self.WARMUP_BATCHES:
            self.wait(lm)
            self.tokens, self.start = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, lm: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        self.batches += 1
        if self.start is not None:
            model = cast(LanguageModel, lm)
            batch_tokens = model.batch_tokens(batch) * trainer.world_size
            self.tokens += batch_tokens
            if model.logs_after(batch_idx):
                seconds, tokens = self.stop(), self.tokens
                self.tokens, self.start = 0, time.perf_counter()
                self.log_speed(trainer, model, tokens / seconds, batch_tokens)

    def log_speed(self, trainer: L.Trainer, lm: LanguageModel, speed: float, batch_tokens: int) -> None:
        lm.log("perf/tokens_per_second", speed)  # may wait for the GPU, which counts too
        lm.log("perf/ms_per_step", 1e3 * batch_tokens * trainer.accumulate_grad_batches / speed)
        if lm.device.type == "cuda":
            lm.log("perf/gpu_memory", torch.cuda.max_memory_reserved(lm.device) / 2**30)
        if isinstance(lm.net, GPT) and (peak := peak_flops(lm.device)):
            lm.log("perf/mfu", speed * flops_per_token(lm.net) / peak / trainer.world_size)

    def on_validation_start(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        if self.start is not None:
            self.wait(lm)
            self.stop()

    @staticmethod
    def wait(lm: L.LightningModule) -> None:
        if lm.device.type != "cpu":
            torch.accelerator.synchronize()  # steps are launched asynchronously
