"""How fast a config trains here: the Trainer beside a bare PyTorch loop of the same step, in one process.

    python -m lightning_gpt.benchmarks.training --config shakespeare

takes the flags of `lightning-gpt fit`, and `--bench.steps`, `--bench.vocab_size` and `--bench.json`.
"""

import json
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..cli.main import run
from ..cli.train import CLI, train
from ..cuda_graph import CapturedStep
from ..data.datamodule import TextDataModule
from ..data.tokenizers import TokenIds
from ..data.windows import RandomWindows
from ..model.gpt import GPT
from ..training.module import LanguageModel, features_loss
from ..training.monitoring import flops_per_token
from ..training.optim import Muon

WARMUP_STEPS = 20  # steps for compiling, recording and the first log


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepTimer(L.Callback):
    """Seconds from the end of step WARM_UP to the end of the last one."""

    since = seconds = math.nan

    def on_train_batch_end(self, trainer: L.Trainer, lm: L.LightningModule, *_) -> None:
        if trainer.global_step in (WARMUP_STEPS, trainer.max_steps):
            synchronize(lm.device)
            now = time.perf_counter()
            self.seconds, self.since = now - self.since, now


def bare_loop(lm: LanguageModel, windows: RandomWindows, device: torch.device, precision: str, clip: float, steps: int):
    """Seconds that the same steps take without Lightning: net, optimizer and a `for`."""
    hp = lm.hparams
    with torch.device(device):
        net, average = GPT(lm.net.config), GPT(lm.net.config) if hp.ema_decay else None
    lm.net = net  # for the parameter groups
    gpu = device.type == "cuda"
    groups = lm.parameter_groups()
    if hp.compile and gpu:
        groups = [group | {"lr": torch.tensor(group["lr"], device=device)} for group in groups]
    optimizer = Muon(groups) if hp.optimizer == "muon" else torch.optim.AdamW(groups, fused=gpu, capturable=gpu)
    update_average = get_ema_multi_avg_fn(hp.ema_decay)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    head_loss = features_loss
    if hp.compile:
        for block in net.h:
            block.compile(dynamic=False)
        head_loss = torch.compile(head_loss, dynamic=False)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with autocast:
            loss = head_loss(net, net.features(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if average is not None:
            update_average(list(average.parameters()), list(net.parameters()), None)

    captured = CapturedStep() if hp.compile and gpu else None
    since = math.nan
    for k, window in zip(range(WARMUP_STEPS + steps), windows, strict=False):
        if k == WARMUP_STEPS:
            synchronize(device)
            since = time.perf_counter()
        window = torch.as_tensor(window, device=device).long()
        x, y = window[:, :-1], window[:, 1:]
        if captured:
            captured(partial(step, x, y), (x, y))
        else:
            step(x, y)
    synchronize(device)
    return time.perf_counter() - since


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product here, in the precision that the config trains in."""
    n, dtype = (8192 if device.type == "cuda" else 2048), (torch.bfloat16 if "bf16" in precision else torch.float32)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(8):
        synchronize(device)
        since = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - since)
    return 2 * n**3 / best


class Bench(CLI):
    """The command line of `fit`, which measures instead."""

    def add_arguments_to_parser(self, parser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--bench.steps", type=int, default=100, help="Steps to time, after the warm-up.")
        parser.add_argument(
            "--bench.vocab_size",
            type=int,
            default=0,
            help="Train on random token ids below this number instead of a text.",
        )
        parser.add_argument("--bench.json", type=bool, default=False, help="Print JSON instead of a table.")
        parser.set_defaults({"trainer.limit_val_batches": 0, "trainer.enable_checkpointing": False})

    def before_instantiate_classes(self) -> None:
        if self.config.fit.bench.vocab_size:
            self.config.fit.data.vocab_size = None  # gpt2.yaml has it for its files of tokens

    def before_fit(self) -> None:
        self.datamodule.check_batch_size(self.trainer.world_size)

    def after_fit(self) -> None: ...

    def fit(self, model: LanguageModel, datamodule: TextDataModule, **_) -> None:
        ask, trainer = self.config.fit.bench, self.trainer
        if model.hparams.lecture_step:
            raise ValueError(
                f"model.lecture_step={model.hparams.lecture_step} is there to be read: the bench is the GPT's"
            )
        if (n := trainer.accumulate_grad_batches) > 1:
            raise ValueError(f"trainer.accumulate_grad_batches={n}: the bench times steps of one batch, so give 1")
        if ask.vocab_size:
            datamodule.tokenizer = TokenIds(ask.vocab_size)
            datamodule.train_tokens = torch.randint(ask.vocab_size, (10_000_000,), dtype=torch.int32)
            datamodule.save_hyperparameters({**datamodule.hparams, "vocab_size": ask.vocab_size})
            model = LanguageModel(**{**model.hparams, "vocab_size": ask.vocab_size})
        clock = StepTimer()
        trainer.callbacks.append(clock)
        trainer.fit_loop.epoch_loop.max_steps = WARMUP_STEPS + ask.steps
        trainer.fit(model, datamodule)
        taken, filled = math.nan, math.nan
        if torch.cuda.is_available():  # at most, of this GPU; before the bare loop takes its own
            taken, filled = torch.cuda.max_memory_reserved() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        del model.captured, model.batch  # their memory is for the bare loop now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not trainer.is_global_zero:
            return
        device, precision, hp = trainer.strategy.root_device, trainer.precision, datamodule.hparams
        lm, seconds_of = LanguageModel(**model.hparams), {"Trainer": clock.seconds}
        if trainer.world_size == 1:
            windows = RandomWindows(datamodule.train_tokens, hp.block_size, hp.batch_size, hp.seed)
            clip = trainer.gradient_clip_val or math.inf
            seconds_of["bare loop"] = bare_loop(lm, windows, device, precision, clip, ask.steps)
        tokens, rate = hp.batch_size * hp.block_size, matmul_rate(device, precision)
        rows = {}
        for name, seconds in seconds_of.items():
            speed = tokens * ask.steps / seconds
            mfu = speed * flops_per_token(cast(GPT, lm.net)) / rate / trainer.world_size
            rows[name] = {"ms_per_step": 1e3 * seconds / ask.steps, "tokens_per_second": speed, "mfu": mfu}
        result: dict[str, Any] = {
            "parameters": sum(p.numel() for p in lm.net.parameters()),
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads",
            "matmul_tflops": rate / 1e12,
            "memory_gib": taken,
            "tensors_gib": filled,
            "trainer_over_bare": clock.seconds / seconds_of.get("bare loop", math.nan),
            "devices": trainer.world_size,
            **rows,
        }
        if ask.json:
            print(json.dumps(result))
            return
        size = f"{result['parameters'] / 1e6:.2f}M parameters"
        memory = f", {taken:.1f} GiB of each GPU, {filled:.1f} of them tensors" if device.type == "cuda" else ""
        print(
            f"{result['devices']} x {result['device']}, {rate / 1e12:,.1f} TFLOP/s in a matrix product; {size}{memory}"
        )
        print(f"{'':12}{'ms/step':>10}{'tokens/s':>14}{'MFU':>8}")
        for name, row in rows.items():
            print(f"{name:12}{row['ms_per_step']:10.2f}{row['tokens_per_second']:14,.0f}{row['mfu']:8.1%}")
        if trainer.world_size == 1:
            print(f"Trainer / bare loop {result['trainer_over_bare']:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # logs are a part of the step, and nobody wants to keep them
        run(lambda args: train(args, Bench), ["fit", *sys.argv[1:], f"--trainer.default_root_dir={folder}"])
