"""Training speed of a config on this machine: the Trainer and a bare PyTorch loop of the same step, in one process.

    python -m lightning_gpt.benchmarks.training --config shakespeare

It takes the flags of `lightning-gpt fit`, and `--bench.steps`, `--bench.vocab_size` and `--bench.json`. MFU is the
share of the peak FLOP/s in the GPU's data sheet, "of matmul" that of the FLOP/s measured in a large matrix product.
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
from ..training.module import LanguageModel
from ..training.monitoring import flops_per_token, peak_flops
from ..training.optim import Muon

WARMUP_STEPS = 60  # for compilation, CUDA graph capture and, after 50 steps, the first log, which loads kernels


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepTimer(L.Callback):
    """Measures the seconds from the end of step WARMUP_STEPS to the end of the last step."""

    since = seconds = math.nan

    def on_train_batch_end(self, trainer: L.Trainer, lm: L.LightningModule, *_) -> None:
        if trainer.global_step in (WARMUP_STEPS, trainer.max_steps):
            synchronize(lm.device)
            now = time.perf_counter()
            self.seconds, self.since = now - self.since, now


def bare_loop(lm: LanguageModel, windows: RandomWindows, device: torch.device, precision: str, clip: float, steps: int):
    """Returns the seconds that the same steps take in a plain loop, without Lightning."""
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
    if hp.compile:
        for block in net.h:
            block.compile(dynamic=False)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with autocast:
            loss = lm.head_loss(net, net.features(x), y)
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
    """Measures the FLOP/s of a large matrix product on `device`: in bfloat16 for a bf16 precision, else in float32."""
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
    """The command line of `fit`, which measures speed instead of training a model."""

    def add_arguments_to_parser(self, parser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--bench.steps", type=int, default=100, help="Number of steps to time, after the warm-up.")
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
            self.config.fit.data.vocab_size = None  # gpt2.yaml sets it for its token files

    def before_fit(self) -> None:
        self.datamodule.check_batch_size(self.trainer.world_size)

    def after_fit(self) -> None: ...

    def fit(self, model: LanguageModel, datamodule: TextDataModule, **_) -> None:
        options, trainer = self.config.fit.bench, self.trainer
        if model.hparams.lecture_step:
            raise ValueError(
                f"model.lecture_step={model.hparams.lecture_step}: this benchmark measures the GPT; leave it out"
            )
        if (n := trainer.accumulate_grad_batches) > 1:
            raise ValueError(f"trainer.accumulate_grad_batches={n} must be 1: this benchmark times steps of one batch")
        if options.vocab_size:
            datamodule.tokenizer = TokenIds(options.vocab_size)
            datamodule.train_tokens = torch.randint(options.vocab_size, (10_000_000,), dtype=torch.int32)
            datamodule.save_hyperparameters({**datamodule.hparams, "vocab_size": options.vocab_size})
            model = LanguageModel(**{**model.hparams, "vocab_size": options.vocab_size})
        timer = StepTimer()
        trainer.callbacks.append(timer)
        trainer.fit_loop.epoch_loop.max_steps = WARMUP_STEPS + options.steps
        trainer.fit(model, datamodule)
        reserved, allocated = math.nan, math.nan
        if torch.cuda.is_available():  # peaks of this GPU, before the bare loop allocates
            reserved, allocated = torch.cuda.max_memory_reserved() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        del model.captured, model.batch  # free their memory for the bare loop
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not trainer.is_global_zero:
            return
        device, precision, hp = trainer.strategy.root_device, trainer.precision, datamodule.hparams
        lm, seconds_of = LanguageModel(**model.hparams), {"Trainer": timer.seconds}
        if trainer.world_size == 1:
            lm.head_loss = model.head_loss  # compiled, if the model is
            windows = RandomWindows(datamodule.train_tokens, hp.block_size, hp.batch_size, hp.seed)
            clip = trainer.gradient_clip_val or math.inf
            seconds_of["bare loop"] = bare_loop(lm, windows, device, precision, clip, options.steps)
        tokens, matmul, peak = hp.batch_size * hp.block_size, matmul_rate(device, precision), peak_flops(device)
        rows = {}
        for name, seconds in seconds_of.items():
            speed = tokens * options.steps / seconds
            flops = speed * flops_per_token(cast(GPT, lm.net)) / trainer.world_size
            rows[name] = {
                "ms_per_step": 1e3 * seconds / options.steps,
                "tokens_per_second": speed,
                "mfu": flops / peak if peak else None,
                "of_matmul": flops / matmul,
            }
        result: dict[str, Any] = {
            "parameters": sum(p.numel() for p in lm.net.parameters()),
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads",
            "matmul_tflops": matmul / 1e12,
            "memory_gib": reserved,
            "tensors_gib": allocated,
            "trainer_over_bare": timer.seconds / seconds_of.get("bare loop", math.nan),
            "devices": trainer.world_size,
            **rows,
        }
        if options.json:
            print(json.dumps(result))
            return
        size = f"{result['parameters'] / 1e6:.2f}M parameters"
        memory = f", {reserved:.1f} GiB per GPU, {allocated:.1f} of it tensors" if device.type == "cuda" else ""
        print(f"{result['devices']} x {result['device']}, {matmul / 1e12:,.1f} TFLOP/s in a matmul; {size}{memory}")
        print(f"{'':12}{'ms/step':>10}{'tokens/s':>14}{'MFU':>8}{'of matmul':>11}")
        for name, row in rows.items():
            mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
            cells = f"{row['ms_per_step']:10.2f}{row['tokens_per_second']:14,.0f}"
            print(f"{name:12}{cells}{mfu:>8}{row['of_matmul']:11.1%}")
        if trainer.world_size == 1:
            print(f"Trainer / bare loop {result['trainer_over_bare']:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # logging is part of the step; the logs are not kept
        run(lambda args: train(args, Bench), ["fit", *sys.argv[1:], f"--trainer.default_root_dir={folder}"])
