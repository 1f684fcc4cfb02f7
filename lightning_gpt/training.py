"""What happens in a step: loss, optimizer, schedule, log. No text, no files, no sampling."""

import math
from typing import Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection

from .data import mix
from .model import GPT, GPTConfig
from .optim import lr_factor, parameter_groups


def next_token_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the targets y (B, T) after the inputs x (B, T), in nats per token."""
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())


class BitsPerCharacter(MeanMetric):
    """The mean loss over ln 2; a token is a character."""

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)


class Perplexity(MeanMetric):
    """exp(mean loss): as unsure as a choice among so many equally likely tokens."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class LanguageModel(L.LightningModule):
    """A GPT and how it is trained; every argument is a plain value, so a checkpoint describes itself.

    Args:
        vocab_size: number of tokens; comes from the data.
        block_size: longest context, in tokens.
        n_layer: number of blocks; 0 is the lecture's bigram.
        n_head: attention heads of a block.
        n_embd: width of the residual stream, in channels; divisible by n_head.
        dropout: probability; on embeddings, attention weights and residual branches.
        bias: whether linear layers and norms have one.
        tie_embeddings: whether the head shares the token embedding's matrix, as in GPT-2.
        activation: of the MLP.
        learning_rate: AdamW's, at its peak.
        betas: AdamW's decay rates of the gradient's mean and square.
        weight_decay: AdamW's, on matrices and embeddings only.
        warmup_steps: optimizer steps over which the learning rate rises to its peak.
        schedule: how it falls from there until trainer.max_steps.
        min_lr_ratio: the last learning rate as a share of the peak; 1 keeps it constant.
        seed: decides the dropout of step k.
        compile: compile the training step (torch.compile): a minute's start for faster steps.
    """

    def __init__(
        self,
        vocab_size: int = GPTConfig.vocab_size,
        block_size: int = GPTConfig.block_size,
        n_layer: int = GPTConfig.n_layer,
        n_head: int = GPTConfig.n_head,
        n_embd: int = GPTConfig.n_embd,
        dropout: float = GPTConfig.dropout,
        bias: bool = GPTConfig.bias,
        tie_embeddings: bool = GPTConfig.tie_embeddings,
        activation: Literal["gelu", "relu"] = GPTConfig.activation,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        schedule: Literal["cosine", "linear"] = "cosine",
        min_lr_ratio: float = 0.1,
        seed: int = 1337,
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.net = GPT(
            GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, dropout, bias, tie_embeddings, activation)
        )
        self.training_loss = next_token_loss
        metrics: dict[str, Metric | MetricCollection] = {
            "loss": MeanMetric(),
            "bpc": BitsPerCharacter(),
            "perplexity": Perplexity(),
        }
        self.val_metrics = MetricCollection(metrics, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    def setup(self, stage: str) -> None:
        if self.hparams.compile and stage == "fit":
            # the loss and not the net: its fused end is in, the checkpoint's keys and sampling stay as they are
            self.training_loss = torch.compile(next_token_loss)

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        # dropout's dice are a function of the step too, as a checkpoint holds no random state
        torch.manual_seed(mix(self.hparams.seed, self.global_rank, self.trainer.fit_loop.total_batch_idx))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.training_loss(self.net, *batch)
        if self.logs_this_step:
            self.log("train/loss", loss.detach())
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # by hand, as Lightning 2.6 refuses to clip for a fused optimizer under bf16-mixed
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val or self.logs_this_step:
            norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or math.inf)
            if self.logs_this_step:
                self.log("train/grad_norm", norm)

    @property
    def logs_this_step(self) -> bool:
        """Whether the Trainer writes this step's values; self.log takes 0.4 ms even when they go nowhere."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # a weighted mean over all tokens: exact whatever the windows' lengths and the ranks' shares
        self.val_metrics.update(next_token_loss(self.net, *batch), weight=batch[1].numel())
        self.log_dict(self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.test_metrics.update(next_token_loss(self.net, *batch), weight=batch[1].numel())
        self.log_dict(self.test_metrics)

    def configure_optimizers(self):
        hp, total = self.hparams, self.trainer.max_steps
        if total < 1:
            raise ValueError(f"trainer.max_steps={total}: give a number of steps, as the learning rate falls until it")
        # one kernel for all parameters; 16-mixed must see the gradients unscaled before they are clipped
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(
            parameter_groups(self.net, hp.weight_decay), lr=hp.learning_rate, betas=tuple(hp.betas), fused=fused
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, total, hp.warmup_steps, hp.min_lr_ratio, hp.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        # saved after a validation, Lightning's count for the loggers is one behind, and a resumed curve would be too
        epoch_loop = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
        epoch_loop["_batches_that_stepped"] = self.trainer.global_step

    def on_train_start(self) -> None:
        """A resumed optimizer keeps its moments, but takes its rates from today's settings."""
        optimizer, scheduler = self.trainer.optimizers[0], self.lr_schedulers()
        scheduler.base_lrs = [self.hparams.learning_rate] * len(optimizer.param_groups)
        rate = self.hparams.learning_rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, fresh in zip(
            optimizer.param_groups, parameter_groups(self.net, self.hparams.weight_decay), strict=True
        ):
            group.update(lr=rate, betas=tuple(self.hparams.betas), weight_decay=fresh["weight_decay"])
