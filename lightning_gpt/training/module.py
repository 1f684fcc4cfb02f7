"""The LightningModule: loss, optimizer, learning rate, metrics and what is logged."""

import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import MeanMetric, Metric, MetricCollection

from ..checkpoint.io import dequantize
from ..checkpoint.transfer import transfer_weights
from ..cuda_graph import CapturedStep
from ..data.tokenizers import Tokenizer, build_from_state
from ..data.windows import derive_seed
from ..inference.text import generate
from ..model.ensemble import Ensemble, Net
from ..model.gpt import GPT, Block, GPTConfig, parameter_role
from ..model.lecture import LectureModel, build_net
from .lightning_compat import (
    closure_result,
    correct_progress,
    is_from_tuner,
    set_closure_result,
    set_logged_steps,
    trainer_or_none,
    validation_is_due,
)
from .losses import features_loss, next_token_loss
from .metrics import BitsPerCharacter, Perplexity
from .optim import Muon, adamw_groups, lr_factor, muon_groups
from .strategies import DDPFlatStrategy, FSDP2Strategy, apply_fsdp, full_tensor
from .teachers import load_teacher


def freeze_lowest(net: GPT, n: int) -> None:
    """Exclude the embeddings and the lowest `n` blocks from training; 0 excludes nothing.

    Raises:
        ValueError: there are fewer blocks.
    """
    if not 0 <= n <= len(net.h):
        raise ValueError(f"freeze_layers={n} must be 0 or more, and {len(net.h)} at most, which is n_layer")
    frozen = {"embeddings", *(f"h.{i}" for i in range(n))} if n else set()
    for name, p in net.named_parameters():
        if parameter_role(name) in frozen:
            p.requires_grad_(False)


class DivergenceError(Exception):
    """The loss is NaN or infinite; no further step can repair it."""


class LanguageModel(L.LightningModule):
    """A GPT and its training; every argument is a plain value, so a checkpoint describes itself.

    Args:
        lecture_step: a step of the lecture instead of the GPT, see model/lecture.py; null is the GPT.
        optimizer: adamw; or muon for the blocks' matrices with adamw for the rest.
        learning_rate: of AdamW, at its peak.
        muon_lr: of Muon, at its peak.
        betas: AdamW's decay rates of the gradient's mean and square.
        weight_decay: on matrices and embeddings; with muon, on the blocks' matrices only.
        warmup_steps: optimizer steps over which the learning rate rises to its peak.
        schedule: how the learning rate falls until the last step; wsd keeps the peak first.
        min_lr_ratio: the last learning rate as a fraction of the peak; 1 keeps it constant.
        decay_fraction: fraction of all steps over which wsd falls.
        ema_decay: decay of an exponential moving average of the weights, which is validated, kept as best and sampled;
            0 keeps none.
        init_from: a checkpoint whose weights to start from, with a new optimizer; best or last is the newest file of
            that name below checkpoints/. It brings sizes and vocabulary. null starts from random weights.
        freeze_layers: number of lowest blocks to freeze, together with the embeddings; with tied embeddings the head
            too.
        teachers: checkpoints to learn from, a comma-separated list or a pattern: the targets are then not only the next
            tokens but also the mean of the teachers' probabilities. null learns from the text alone.
        soft_weight: weight of the teachers' probabilities in the loss; that of the next tokens is 1 - soft_weight.
        seed: of the dropout; the masks of step k depend on (seed, rank, k).
        compile: compile the blocks (torch.compile) and, on one GPU, replay the whole step as a CUDA graph: a slow
            start for fast steps. Callbacks' hooks inside a step are then called in its first few only.
        net: the fields of GPTConfig.
    """

    stage = "fit"  # the command that trains it, kept in checkpoints

    def __init__(
        self,
        *,
        lecture_step: Literal["bigram", "head", "heads", "feedforward", "residual", "layernorm", "gpt"] | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        learning_rate: float = 1e-3,
        muon_lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        schedule: Literal["cosine", "linear", "wsd"] = "cosine",
        min_lr_ratio: float = 0.1,
        decay_fraction: float = 0.6,
        ema_decay: float = 0.0,
        init_from: str | None = None,
        freeze_layers: int = 0,
        teachers: str | None = None,
        soft_weight: float = 0.9,
        seed: int = 1337,
        compile: bool = False,
        **net,
    ):
        super().__init__()
        for name, value in {
            "ema_decay": ema_decay,
            "min_lr_ratio": min_lr_ratio,
            "decay_fraction": decay_fraction,
            "soft_weight": soft_weight,
        }.items():
            if not 0 <= value <= 1 or value == 1 and name == "ema_decay":
                raise ValueError(f"{name}={value} is a share: 0 or more, and at most 1 (ema_decay: less than 1)")
        for name, rate in {"learning_rate": learning_rate, "muon_lr": muon_lr}.items():
            if not 0 <= rate <= 1e30:
                raise ValueError(f"{name}={rate} must be between 0 and 1e30; 1e-4 to 1e-1 are usual")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be 0 or more and less than 1 each; (0.9, 0.99) is usual")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must be 0 or more")
        if teachers and self.stage not in ("fit", "sft"):
            raise ValueError(f"teachers={teachers} is for fit and sft; {self.stage} has another loss: leave it out")
        if lecture_step and compile:
            raise ValueError(f"lecture_step={lecture_step} runs as it is written: leave compile=true out")
        self.save_hyperparameters()
        self.save_hyperparameters(asdict(GPTConfig(**net)))  # with the defaults of what was not given
        self.tokenizer: Tokenizer | None = None
        self.net = self.build_net()
        self.ema_net = deepcopy(self.net).requires_grad_(False) if ema_decay else None
        if isinstance(self.net, GPT):
            freeze_lowest(self.net, freeze_layers)
        elif freeze_layers:
            raise ValueError(
                f"freeze_layers={freeze_layers} is for the GPT, and lecture_step={lecture_step} is too "
                "small for that: leave it out"
            )
        self.other_nets: Sequence[GPT | LectureModel] = ()  # averaged with this one in validate and test, if any
        self.teachers: Sequence[Net] = ()  # none or one, an Ensemble if there are several checkpoints
        self.init_from = init_from  # the command line sets it to None on resume: the checkpoint has all weights
        self.head_loss, self.compiles = features_loss, False
        self.captured: CapturedStep | None = None
        self.grad_norm: Tensor | None = None
        self.step_loss: Tensor = torch.zeros(())
        self.last_step_done = 0
        self.logged_loss: Tensor | None = None
        self.step_metrics: dict[str, Tensor] = {}  # of the newest batch, to log beside its loss

    def build_net(self) -> Any:
        return build_net(self.hparams)

    @property
    def eval_net(self) -> Net:
        """The net that is validated, kept as best and sampled: the moving average if there is one.

        With `other_nets` it is their `Ensemble`.
        """
        net = self.net if self.ema_net is None else self.ema_net
        return Ensemble([net, *self.other_nets]) if self.other_nets else net

    def forward(self, idx: Tensor) -> Tensor:
        """The logits (B, T, V) after token ids (B, T), of the net that is validated."""
        return self.eval_net(idx)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """The logits of a batch of token ids, or of the inputs in a batch of inputs and targets."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def generate(self, prompt: str = "", max_new_tokens: int = 500, **settings) -> str:
        """The text after the prompt; `settings`, such as temperature and top_k, are those of `lightning_gpt.generate`.

        Raises:
            ValueError: there is no tokenizer: fit with a TextDataModule, or load a checkpoint of such a run.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this LanguageModel has no tokenizer, since it was not trained with a TextDataModule: set "
                "model.tokenizer = data.tokenizer"
            )
        return generate(self.eval_net, self.tokenizer, prompt, max_new_tokens, **settings)

    # --- a training step ---------------------------------------------------------------------------------------------

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.train_loss(*batch)
        self.bad_losses += ~loss.detach().isfinite()  # on the device: reading it in every step would stall the GPU
        return loss

    def train_loss(self, x: Tensor, y: Tensor, count: Tensor | None = None) -> Tensor:
        """The loss of a batch x, y (B, T).

        Args:
            count: number of targets in the global batch, int64. Ranks may have different numbers of them; with it the
                mean of the ranks' losses is the mean over all targets.
        """
        loss = self.mean_loss(x, y)
        if count is None:
            return loss
        trainer = trainer_or_none(self)
        ranks = 1 if trainer is None else trainer.world_size
        return loss * ((y >= 0).sum().to(loss.dtype) * ranks / count)

    def mean_loss(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.compiles:
            return next_token_loss(self.net, x, y, *self.teach(x))
        try:
            net = cast(GPT, self.net)
            return self.head_loss(net, net.features(x), y, *self.teach(x))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error.__cause__ or error).strip().split("\n")[0][:150]
            print(f"compile: true, but compiling failed ({reason}); training continues without it", file=sys.stderr)
            self.compiles = False
            torch.compiler.set_stance("force_eager")
            return next_token_loss(self.net, x, y, *self.teach(x))

    @torch.no_grad()
    def teach(self, x: Tensor) -> tuple[Tensor, float] | tuple[()]:
        """The teachers' logits (B, T, V) after x (B, T) and their weight in the loss; nothing without teachers."""
        return (self.teachers[0](x), self.hparams.soft_weight) if self.teachers else ()

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        """Calls `on_step_done(trainer)` of the callbacks that have it, after step k is logged and validated and before
        step k + 1 is counted.

        Only a checkpoint of that moment resumes exactly, and Lightning has no hook there.
        """
        trainer = trainer_or_none(self)  # None in to_onnx
        if trainer is not None and trainer.training and trainer.global_step != self.last_step_done:
            self.last_step_done = trainer.global_step
            # already set for the next batch; a checkpoint must not contain it
            progress = trainer.fit_loop.epoch_loop.batch_progress
            is_last_batch, progress.is_last_batch = progress.is_last_batch, False
            for callback in trainer.callbacks:
                if hasattr(callback, "on_step_done"):
                    callback.on_step_done(trainer)
            progress.is_last_batch = is_last_batch
        return batch

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # a function of the step alone, as is the learning rate, so that a resumed run needs neither from a checkpoint
        torch.manual_seed(derive_seed(self.hparams.seed, self.global_rank, self.trainer.fit_loop.total_batch_idx))
        self.batch = batch

    def set_learning_rates(self) -> None:
        """Sets the rates of the next step before it starts, when callbacks such as LearningRateMonitor read them."""
        if groups := self.scheduled_groups():
            factor = self.lr_factor(self.trainer.global_step)
            for group in groups:
                rate = group["peak_lr"] * factor
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def scheduled_groups(self) -> list[dict]:
        """The parameter groups whose learning rate follows `schedule`.

        Empty for a subclass whose `configure_optimizers` returns other groups or a scheduler.
        """
        own = self.trainer.lr_scheduler_configs
        return [] if own else [group for group in self.trainer.optimizers[0].param_groups if "peak_lr" in group]

    @property
    def total_steps(self) -> float:
        """Optimizer steps of the run, by max_steps or max_epochs, whichever is less; infinite without either."""
        steps = self.trainer.estimated_stepping_batches
        return math.inf if steps == -1 else steps

    def lr_factor(self, step: int) -> float:
        hp = self.hparams
        return lr_factor(step, self.total_steps, hp.warmup_steps, hp.schedule, hp.min_lr_ratio, hp.decay_fraction)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        step = partial(self.take_step, optimizer, optimizer_closure)
        result = step() if self.captured is None else self.captured(step, self.batch)
        set_closure_result(optimizer_closure, result)  # a replayed graph does not call the closure

    def take_step(self, optimizer, closure) -> Any:
        """Forward, backward and update, then the exponential average of the weights; returns the closure's result."""
        optimizer.step(closure=closure)
        if self.ema_net is not None:
            update = get_ema_multi_avg_fn(self.hparams.ema_decay)
            update(list(self.ema_net.parameters()), list(self.net.parameters()), None)
        return closure_result(closure)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Lightning 2.6 refuses to clip for a fused optimizer under bf16-mixed
        params = list(self.net.parameters())
        if isinstance(self.trainer.strategy, DDPFlatStrategy):
            self.trainer.strategy.all_reduce_mean([p.grad for p in params if p.grad is not None])
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(params, gradient_clip_val)
        self.grad_norm = full_tensor(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
        if gradient_clip_val and gradient_clip_algorithm != "value":
            nn.utils.clip_grads_with_norm_(params, gradient_clip_val, self.grad_norm)

    def ends_step(self, batch_idx: int) -> bool:
        """Whether an optimizer step ends with this batch of an epoch; one always ends with the last batch."""
        n = batch_idx + 1
        return n % self.trainer.accumulate_grad_batches == 0 or n == self.trainer.num_training_batches

    def logs_after(self, batch_idx: int) -> bool:
        """Whether a logged step ends with this batch; self.log takes 0.4 ms even where nothing is written."""
        return self.ends_step(batch_idx) and self.logs(self.trainer.global_step)

    def logs(self, step: int) -> bool:
        """Whether the values of a step are logged; Lightning always logs the last one."""
        every = self.trainer.log_every_n_steps
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def check_divergence(self, check_weights: bool = True) -> None:
        """Raises DivergenceError if a loss has been NaN or infinite, or a weight is now."""
        if bad := int(self.trainer.strategy.reduce(self.bad_losses, reduce_op="max")):  # all ranks stop, or none
            step = max(1, self.trainer.global_step - (bad - 1) // self.trainer.accumulate_grad_batches)
            what = "the loss became NaN or infinite"
        elif check_weights and not full_tensor(nn.utils.get_total_norm(self.net.parameters())).isfinite():
            step, what = self.trainer.global_step, "the weights became NaN or infinite"
        else:
            return
        hp, factor = self.hparams, self.lr_factor(step - 1)
        rates = {"learning_rate": hp.learning_rate} | ({"muon_lr": hp.muon_lr} if hp.optimizer == "muon" else {})
        at = " and ".join(f"{name} {factor * rate:.2g} (peak {rate:g})" for name, rate in rates.items())
        if not self.scheduled_groups():  # a subclass has its own
            rates_now = [float(group["lr"]) for group in self.trainer.optimizers[0].param_groups]
            at = f"learning rate {max(rates_now, default=0):.2g}"
        raise DivergenceError(f"{what} at step {step:,}, with {at}: take a lower rate")

    def on_train_batch_end(self, outputs, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.trainer.val_check_batch == math.inf and self.trainer.global_step == self.total_steps:
            self.trainer.should_stop = True  # endless windows are one epoch: by default, Lightning validates at its end
        if (self.device.type == "cpu" and self.trainer.world_size == 1) or self.logs_after(batch_idx):
            self.check_divergence(check_weights=False)
        accumulate = self.trainer.accumulate_grad_batches
        batches = batch_idx % accumulate + 1  # of this step so far; each loss is divided by `accumulate`
        self.step_loss = outputs["loss"] if batches == 1 else self.step_loss + outputs["loss"]
        if self.logs_after(batch_idx):
            loss = self.step_loss.clone()  # a replayed step overwrites it
            loss = self.logged_loss = loss if batches == accumulate else loss * (accumulate / batches)
            self.log("train/loss", loss, sync_dist=self.trainer.world_size > 1)
            for name, value in self.metrics_of_step(loss, batch).items():
                self.log(f"train/{name}", value, sync_dist=self.trainer.world_size > 1)
            rates = {bool(group.get("muon")): group["lr"] for group in self.trainer.optimizers[0].param_groups}
            for of_muon, rate in rates.items():
                self.log("train/muon_lr" if of_muon else "train/lr", float(rate))
            self.log("train/grad_norm", self.grad_norm.clone())
        if self.trainer.global_step < self.total_steps:
            self.set_learning_rates()

    def metrics_of_step(self, loss: Tensor, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What is logged beside the loss of a step, by name; bpc is that of the last batch's targets."""
        if self.chars_per_token is None or self.teachers:  # the loss with teachers is not that of the text
            return self.step_metrics
        targets = batch[1][batch[1] >= 0]
        return {"bpc": loss / self.chars_per_token[targets].float().mean() / math.log(2)}

    def batch_tokens(self, batch: tuple[Tensor, ...]) -> int:
        """Tokens in a batch, for the throughput."""
        return batch[1].numel()

    # --- validation: a weighted mean over all tokens, exact whatever the windows' lengths and the ranks' shares -------

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.check_divergence()
        if self.compiles:
            torch.compiler.set_stance("force_eager")  # shapes vary in validation and sampling: don't compile for each
        self.val_metrics.to(torch.float32)  # Lightning casts them with the weights, and a sum in bfloat16 stops growing
        self.move_nets(self.other_nets)

    def move_nets(self, nets: Iterable[nn.Module]) -> None:
        """Moves nets that are not submodules, and so not in checkpoints, where the trained one is."""
        for net in nets:
            net.to(self.device, next(self.net.parameters()).dtype)

    def on_validation_end(self) -> None:
        if self.compiles:
            torch.compiler.set_stance("default")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.measure(self.val_metrics, *batch)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics)  # in each step, it takes longer than the net of a lecture step

    def on_test_start(self) -> None:
        self.test_metrics.to(torch.float32)  # as in on_validation_start
        self.move_nets(self.other_nets)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.measure(self.test_metrics, *batch)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics)

    def measure(self, metrics: MetricCollection, x: Tensor, y: Tensor, *_) -> None:
        if y.numel():
            targets = y[y >= 0]
            counts = {} if self.chars_per_token is None else {"characters": self.chars_per_token[targets].sum()}
            metrics.update(next_token_loss(self.eval_net, x, y), weight=targets.numel(), **counts)
        elif isinstance(self.trainer.strategy, FSDP2Strategy):
            dummy = x.new_zeros(1, x.size(1))  # other ranks have a window and gather this rank's weights for it
            next_token_loss(self.eval_net, dummy, dummy)

    # --- set up, save and resume -------------------------------------------------------------------------------------

    chars_per_token: Tensor | None  # None if the tokenizer does not know

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.ema_net is not None and self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"model.ema_decay={self.hparams.ema_decay} with trainer.precision={self.trainer.precision}: an average "
                "rounded to 16 bits stops following the weights; take bf16-mixed, or --model.ema_decay 0"
            )
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer`")  # on purpose
        self.check_tuners()
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if isinstance(tokenizer, Tokenizer):
            self.check_sizes(tokenizer, self.trainer.datamodule.hparams.block_size)
            self.tokenizer, table = tokenizer, tokenizer.chars_per_token
        else:  # plain DataLoaders have no tokenizer
            tokenizer = table = None
        self.register_buffer("chars_per_token", table, persistent=False)
        self.val_metrics = MetricCollection(self.validation_metrics(), prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        if stage == "fit" and self.hparams.teachers:
            # as a list of paths, so that a resumed run has the same ones
            teacher, self.hparams.teachers = load_teacher(self.hparams.teachers, tokenizer, self.hparams.block_size)
            self.teachers = [teacher]
        if stage == "fit" and self.init_from:
            weights = transfer_weights(self.init_from, self.net.state_dict(), tokenizer, self.hparams.freeze_layers > 0)
            for net in self.net, self.ema_net:
                if net is not None:
                    net.load_state_dict(weights)

    def check_tuners(self) -> None:
        """Raises ValueError if a callback would change settings that are fixed for a run."""
        for callback in self.trainer.callbacks:
            by_tuner = isinstance(callback, LearningRateFinder) and is_from_tuner(callback)
            if by_tuner and self.hparams.optimizer == "muon":
                raise ValueError("lr_find sweeps one learning rate, and model.optimizer=muon has two: take adamw")
            if isinstance(callback, (LearningRateFinder, BatchSizeFinder)) and not by_tuner:
                raise ValueError(
                    f"{type(callback).__name__} would change the learning rate or the batch size, which the "
                    "settings fix for a run: leave it out, and call Tuner(trainer).lr_find before fit, or compare "
                    "short runs"
                )

    def check_sizes(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Raises ValueError if the data's token ids or windows do not fit the net."""
        hp, size = self.hparams, len(tokenizer)
        if size != hp.vocab_size:  # with more ids than the tokenizer has, the net could generate ids without a text
            raise ValueError(
                f"the model's vocab_size={hp.vocab_size} and the data's vocab_size={size} differ: give "
                f"LanguageModel(vocab_size={size}), or the vocabulary that the model was trained with to the data"
            )
        if block_size > hp.block_size:
            raise ValueError(
                f"the data's block_size={block_size} exceeds the model's block_size={hp.block_size}: give both the same"
            )

    def validation_metrics(self) -> dict[str, Metric | MetricCollection]:
        """The metrics of a validation by name; `loss` decides which checkpoint is the best."""
        metrics: dict[str, Metric | MetricCollection] = {"loss": MeanMetric(), "perplexity": Perplexity()}
        if self.chars_per_token is not None:
            metrics["bpc"] = BitsPerCharacter()
        return metrics

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["stage"] = self.stage

    def on_load_checkpoint(self, saved: dict) -> None:
        dequantize(saved)
        self.init_from = None  # the checkpoint has all weights
        data = saved.get("datamodule_hyper_parameters", {})
        if self.tokenizer is None and {"tokenizer", "vocabulary"} <= data.keys():  # those of a TextDataModule
            self.tokenizer = build_from_state(data, self.hparams.vocab_size)
        saved["state_dict"] = self.with_ema(saved["state_dict"])
        if (trainer := trainer_or_none(self)) and trainer.precision == "64-true":
            self.double()  # Lightning does so after loading the weights, which would round them
        if loops := saved.get("loops", {}).get("fit_loop"):
            correct_progress(loops)

    def with_ema(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights for this module: a new moving average starts from the weights, one that is not kept is dropped."""
        has = any(name.startswith("ema_net.") for name in weights)
        if has and self.ema_net is None:
            return {name: w for name, w in weights.items() if not name.startswith("ema_net.")}
        if self.ema_net is None or has:
            return weights
        return weights | {name.replace("net.", "ema_net.", 1): w for name, w in weights.items()}

    def configure_model(self) -> None:
        if (trainer := trainer_or_none(self)) and isinstance(trainer.strategy, FSDP2Strategy):
            if self.hparams.lecture_step:
                raise ValueError(
                    f"model.lecture_step={self.hparams.lecture_step} is too small to shard: take another strategy"
                )
            for net in self.net, self.ema_net:
                if net is not None:
                    apply_fsdp(cast(GPT, net), cast(DeviceMesh, self.device_mesh)["data_parallel"])

    def parameter_groups(self) -> list[dict]:
        hp = self.hparams
        if hp.optimizer == "muon":
            groups = muon_groups(self.net, hp.muon_lr, hp.weight_decay, hp.learning_rate, hp.betas)
        else:
            groups = adamw_groups(self.net, hp.learning_rate, hp.betas, hp.weight_decay)
        trained = [group | {"params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        return [group for group in trained if group["params"]] if hp.freeze_layers else groups

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.trainer.precision == "16-true":
            raise ValueError(
                "trainer.precision=16-true can't train: in float16 AdamW's mean of squared gradients is rounded to 0, "
                "and weights become NaN; take bf16-mixed, or 16-mixed on a GPU"
            )
        if self.hparams.optimizer == "muon":
            if isinstance(self.trainer.strategy, FSDP2Strategy):
                raise ValueError("model.optimizer=muon needs whole matrices, and this strategy shards them: take adamw")
            return Muon(self.parameter_groups(), shared=isinstance(self.trainer.strategy, DDPFlatStrategy))
        # one kernel for all parameters; 16-mixed must see the gradients unscaled before they are clipped
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        return torch.optim.AdamW(self.parameter_groups(), fused=fused, capturable=fused)

    def can_capture_steps(self) -> bool:
        """Whether a whole optimizer step fits into one CUDA graph here."""
        t = self.trainer
        one_message = t.world_size == 1 or isinstance(t.strategy, DDPFlatStrategy)
        one_batch = t.accumulate_grad_batches == 1 and t.precision != "16-mixed"
        our_optimizer = type(self).configure_optimizers is LanguageModel.configure_optimizers
        one_shape = getattr(t.datamodule, "fixed_shape", False)
        return self.device.type == "cuda" and one_message and one_batch and one_shape and our_optimizer

    def can_fuse_loss(self) -> bool:
        """Whether Triton can compute head and loss together, which pays for a large vocabulary on a GPU."""
        hp, t = self.hparams, self.trainer
        plain = not self.teachers and not hp.logit_softcap and hp.vocab_size >= 8192
        sharded = isinstance(t.strategy, FSDP2Strategy)
        return plain and self.device.type == "cuda" and t.precision != "16-mixed" and not sharded

    def on_train_start(self) -> None:
        if self.trainer.fit_loop.epoch_loop.restarting:
            # where a validation is due, Lightning's first iteration has no batch but counts a step for the loggers
            set_logged_steps(self.trainer, self.trainer.global_step - validation_is_due(self.trainer))
        self.last_step_done = 0  # this net may have been trained before ...
        self.init_from = None  # ... and a second fit continues from its weights
        self.bad_losses = torch.zeros((), dtype=torch.int64, device=self.device)
        self.move_nets(self.teachers)
        self.compiles = self.hparams.compile
        if self.compiles:
            blocks = [m for net in (self.net, *self.teachers) for m in net.modules() if isinstance(m, Block)]
            for block in blocks:
                block.compile(dynamic=False)  # in place and one graph for all: the checkpoint's keys do not change
            self.head_loss = features_loss
            if self.can_fuse_loss():
                from .triton_cross_entropy import fused_features_loss

                self.head_loss = fused_features_loss
            self.head_loss = torch.compile(self.head_loss, dynamic=False)
            if self.can_capture_steps():
                self.captured = CapturedStep()
        if self.total_steps == math.inf and self.hparams.min_lr_ratio < 1 and self.scheduled_groups():
            raise ValueError(
                f"the learning rate falls until the last step (model.schedule={self.hparams.schedule}), and the run "
                "has none: give trainer.max_steps, or model.min_lr_ratio=1 for a constant learning rate"
            )
        # a resumed optimizer keeps its moments, but takes its rates from the current settings
        groups = {tuple(map(id, group["params"])): group for group in self.parameter_groups()}
        for group in self.scheduled_groups():
            lr = torch.zeros((), device=self.device) if self.captured else 0.0
            fresh = groups.get(tuple(map(id, group["params"])), {})
            group.update({key: fresh[key] for key in fresh if key != "params"}, lr=lr)
        self.set_learning_rates()
