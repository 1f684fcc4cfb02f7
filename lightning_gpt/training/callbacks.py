"""Callbacks for samples, progress and a validation of the final weights; those that save are in checkpointing.py."""

import math
import shutil
import sys
import time
from contextlib import suppress
from itertools import groupby
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from ..data.ngram_index import NgramIndex
from ..data.tokenizers import CharTokenizer, Tokenizer
from ..inference.engine import generate_ids
from ..inference.sampling import SamplingConfig
from .module import LanguageModel
from .strategies import FSDP2Strategy


class SampleText(L.Callback):
    """Continues each prompt after each validation; logs all samples and prints the first one.

    Each prompt gets the text `samples/PROMPT` in TensorBoard and a row of the table `samples` in W&B.
    `samples/longest_copy` and `samples/copied_share` measure how much of the samples is copied verbatim from the
    training text, see data/ngram_index.py. Samples do not change training: they use a separate random generator, so
    runs with and without them are bit-identical.

    Args:
        prompts: texts to continue; null takes a few that the vocabulary can encode. Prompts with the same number of
            tokens are sampled in one batch.
        length: number of tokens to generate for each prompt; 0 switches samples off.
        console_length: number of characters of the first sample to print; 0 prints none.
        temperature: divides the logits: less random below 1, more random above 1; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only; null samples from all.
        seed: of the random generator, set again after every validation.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        length: int = 200,
        console_length: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
    ):
        if length < 0 or console_length < 0:
            raise ValueError(f"sample.length={length} and sample.console_length={console_length} must be 0 or more")
        SamplingConfig(temperature, top_k)  # raises ValueError
        self.prompts, self.length, self.console_length, self.seed = prompts, length, console_length, seed
        self.sampling = {"temperature": temperature, "top_k": top_k}
        self.ngram_index: NgramIndex | None = None

    def setup(self, trainer: L.Trainer, lm: L.LightningModule, stage: str) -> None:
        if trainer.datamodule is None:
            raise ValueError("SampleText needs the tokenizer of a TextDataModule: give one to the Trainer's method")
        tokenizer = trainer.datamodule.tokenizer
        for prompt in self.prompts or []:
            if not prompt:
                raise ValueError("sample.prompts has an empty prompt: give it at least one character")
            tokenizer.encode(prompt)  # an unknown character raises here, not at the first validation
        candidates = self.prompts or ["ROMEO:", "To be ", "What, "]
        self.encodable = [p for p in candidates if not tokenizer.unknown(p)] or [tokenizer.vocabulary[0]]

    def on_validation_end(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        sharded = isinstance(trainer.strategy, FSDP2Strategy)  # then every rank has to run the forward pass
        if trainer.sanity_checking or not self.length or trainer.state.fn != "fit":
            return
        if cast(LanguageModel, lm).stage == "reward":
            return  # it gives no logits
        if not (trainer.is_global_zero or sharded):
            return
        if not trainer.callback_metrics["val/loss"].isfinite():
            return  # the net has diverged
        n_tokens = {prompt: len(trainer.datamodule.tokenizer.encode(prompt)) for prompt in self.encodable}
        same_length = groupby(sorted(n_tokens, key=n_tokens.__getitem__), key=n_tokens.__getitem__)  # one batch each
        samples = [pair for _, prompts in same_length for pair in self.sample(trainer, lm, list(prompts))]
        if not trainer.is_global_zero:
            return
        texts = [trainer.datamodule.tokenizer.decode(ids) for _, ids in samples]
        self.log_samples(trainer, samples, texts)
        if self.console_length:
            lm.print("    " + texts[0].strip()[: self.console_length].replace("\n", "\n    "))

    def sample(self, trainer: L.Trainer, lm: L.LightningModule, prompts: list[str]) -> list[tuple[str, Tensor]]:
        encoded = [trainer.datamodule.tokenizer.encode(prompt) for prompt in prompts]
        idx = torch.as_tensor(torch.stack(encoded), device=lm.device)
        generator = torch.Generator(lm.device).manual_seed(self.seed)
        ids = generate_ids(cast(LanguageModel, lm).eval_net, idx, self.length, generator=generator, **self.sampling)
        return list(zip(prompts, ids.cpu(), strict=True))

    def log_samples(self, trainer: L.Trainer, samples: list[tuple[str, Tensor]], texts: list[str]) -> None:
        """Logs the samples to all loggers, with the share of the generated text (without the prompt) that is copied."""
        data, step = trainer.datamodule, trainer.global_step - 1  # Lightning counts the steps it logs from 0
        if not trainer.loggers:
            return
        if self.ngram_index is None:
            self.ngram_index = NgramIndex(data.text_tokens, data.vocab_size)
            *_, self.val_copied_share = self.ngram_index.find(data.val_tokens[:10_000])
        n, unit = self.ngram_index.n, "characters" if isinstance(data.tokenizer, CharTokenizer) else "tokens"
        generated = [ids[-self.length :] for _, ids in samples]
        found = [self.ngram_index.find(ids) for ids in generated]
        rows = []
        for (prompt, _), ids, text, (start, length, share) in zip(samples, generated, texts, found, strict=True):
            copied = data.tokenizer.decode(ids[start : start + length])
            code = repr(copied).replace("`", "'")  # without backticks, as it is set as Markdown code
            run = f"{length} {unit}, `{code}`" if length else f"fewer than {n} {unit}"
            summary = (
                f"Longest run copied from the training text: {run}. {share:.0%} of all runs of {n} {unit} occur there "
                f"(validation text: {self.val_copied_share:.0%})."
            )
            rows.append([prompt, text, summary])
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):  # WandbLogger
                logger.log_text("samples", ["prompt", "text", "copied"], rows, step=step)
            elif hasattr(logger.experiment, "add_text"):
                for prompt, text, summary in rows:
                    tag = "samples/" + prompt.replace("\n", "↵")
                    fenced = text.replace("`", "'")  # three backticks would end the block
                    logger.experiment.add_text(tag, f"```\n{fenced}\n```\n\n{summary}", step)
        _, lengths, shares = zip(*found, strict=True)
        for logger in trainer.loggers:
            metrics = {"samples/longest_copy": max(lengths), "samples/copied_share": sum(shares) / len(shares)}
            logger.log_metrics(metrics, step)


def monitorable_metrics(lm: LanguageModel, tokenizer: Tokenizer, after_training: bool = True) -> list[str]:
    """Names of the metrics that callbacks can monitor; includes training metrics only if `after_training`."""
    bpc = ["bpc"] if tokenizer.chars_per_token is not None else []
    muon = ["muon_lr"] if lm.hparams.optimizer == "muon" else []
    names = [f"val/{name}" for name in ("loss", "perplexity", *bpc, "best")]
    train_names = ["val/generalization_gap", *(f"train/{name}" for name in ("loss", *bpc, "lr", *muon, "grad_norm"))]
    return names + train_names * after_training


def check_monitors(trainer: L.Trainer, lm: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raises ValueError if early stopping or a checkpoint callback monitors a metric that is not logged in time."""
    known = "lightning_gpt", "lightning"
    if any(type(callback).__module__.split(".")[0] not in known for callback in trainer.callbacks):
        return  # a user's callback may log other metrics
    every, interval = trainer.log_every_n_steps * trainer.accumulate_grad_batches, trainer.val_check_interval
    names = monitorable_metrics(lm, tokenizer, after_training=0 < every <= cast(int, interval))
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(callback, EarlyStopping | ModelCheckpoint) and monitor and monitor not in names:
            late = monitor in monitorable_metrics(lm, tokenizer)
            problem = "is first logged after the first validation" if late else "is not logged"
            raise ValueError(
                f"{type(callback).__name__}'s monitor={monitor} {problem}: give one of {', '.join(names)}"
                + (", or trainer.log_every_n_steps at most trainer.val_check_interval" if late else "")
            )


class ValidateAtEnd(L.Callback):
    """Validates the final weights at the end of a run, whether max_steps or max_epochs ends it."""

    def on_train_batch_end(self, trainer: L.Trainer, lm: L.LightningModule, *_) -> None:
        if trainer.global_step == cast(LanguageModel, lm).total_steps:
            trainer.should_stop = True  # Lightning validates before it stops


class TrainingProgress(TQDMProgressBar):
    """Shows the step, time left, losses and the best so far in one bar, and prints a line for each validation.

    Without a terminal it prints lines only. A terminal shows the speed from 100 columns on.
    """

    SECONDS = 10  # of training between two lines without a terminal
    TRAINING_FORMAT = "step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"

    def __init__(self):
        in_notebook = type(sys.stdout).__module__.startswith("ipykernel")  # not a terminal, but it can draw bars
        super().__init__(refresh_rate=50 if in_notebook else 10)  # an exported notebook gets a line per refresh
        self.has_bar = sys.stdout.isatty() or in_notebook
        self.last_line = time.monotonic()

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and self.has_bar

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)  # one bar is enough

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = self.TRAINING_FORMAT
        return bar

    def on_train_start(self, trainer: L.Trainer, *_) -> None:
        super().on_train_start(trainer, *_)
        self.start, self.start_step = time.monotonic(), trainer.global_step
        bar = self.train_progress_bar
        steps = cast(LanguageModel, trainer.lightning_module).total_steps
        self.total = bar.total = None if math.isinf(steps) else int(steps)
        bar.initial = bar.n = trainer.global_step  # initial: the speed counts new steps only
        bar.refresh()

    def on_train_epoch_start(self, trainer: L.Trainer, *_) -> None:
        """Does nothing: the bar counts the steps of all epochs."""

    def get_metrics(self, trainer: L.Trainer, lm: L.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        logged = trainer.callback_metrics
        shown = {"loss": "train/loss", "val": "val/loss", "best": "val/best"}
        metrics: dict[str, int | str | float | dict[str, float]] = {
            name: f"{logged[key]:.3f}" for name, key in shown.items() if key in logged
        }
        is_wide = not sys.stdout.isatty() or shutil.get_terminal_size().columns >= 100
        if is_wide and (speed := logged.get("perf/tokens_per_second")) is not None:
            metrics["tokens/s"] = f"{speed:,.0f}"
        return metrics

    def plain_line(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        values = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, lm).items())
        left = (time.monotonic() - self.start) / max(1, trainer.global_step - self.start_step)
        left *= (self.total or trainer.global_step) - trainer.global_step
        values += f"  left {Tqdm.format_interval(left)}" if left else ""
        print(f"step {trainer.global_step}/{self.total or '?'}  {values}", flush=True)
        self.last_line = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, lm: L.LightningModule, *_) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if self.is_enabled:
            if step > bar.n and (step % self.refresh_rate == 0 or step == bar.total):
                bar.n = step
                bar.set_postfix(self.get_metrics(trainer, lm))
        elif trainer.is_global_zero and time.monotonic() - self.last_line > self.SECONDS:
            self.plain_line(trainer, lm)

    def on_validation_end(self, trainer: L.Trainer, lm: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero:
            if self.has_bar:
                losses = {name: trainer.callback_metrics.get(f"val/{name}") for name in ("loss", "best")}
                shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
                self.train_progress_bar.n = trainer.global_step
                self.print(f"step {trainer.global_step}/{self.total or '?'}  val/{shown}")
            else:
                self.plain_line(trainer, lm)
        super().on_validation_end(trainer, lm)

    def on_exception(self, trainer: L.Trainer, *_) -> None:
        with suppress(TypeError):  # there is no bar yet
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.close()  # what is printed next starts a new line
