"""Direct preference optimization: learns from pairs of completions without a reward model."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from ..model.gpt import GPT
from .examples import Pair, PairBatch, collate_pairs
from .losses import accuracy, dpo_loss, next_token_logprobs, of_tokens
from .policy import Policy
from .stages import mean_over_devices

PAIRS = 64  # whose reference log-probabilities are computed at once


def log_ratio(net: GPT, pairs: PairBatch) -> Tensor:
    """log p(chosen) - log p(rejected) of each pair (B,), in nats: sums over the tokens of the completions."""
    logprobs = of_tokens(next_token_logprobs(net, pairs.ids), pairs.ids) * pairs.completion[:, 1:]
    chosen, rejected = logprobs.sum(1).chunk(2)
    return chosen - rejected


class DPO(Policy):
    """Direct preference optimization (Rafailov et al. 2023), or IPO (Azar et al. 2023).

    The margin of a pair is log(policy / reference) of the chosen completion minus that of the rejected one. The
    reference's part is computed once, before the first step.

    Args:
        loss: dpo, -log sigmoid(beta * margin); or ipo, (margin - 1 / (2 beta))^2.
    """

    stage = "dpo"

    def __init__(self, *, loss: Literal["dpo", "ipo"] = "dpo", **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters("loss")
        if not self.hparams.beta:
            raise ValueError("beta=0 leaves dpo without a loss: give more than 0, 0.1 is usual")
        self.reference_ratios = torch.zeros(0)  # by the pairs' numbers

    @torch.inference_mode()
    def ratios_of_reference(self, pairs: list[Pair]) -> Tensor:
        parts = [collate_pairs(pairs[start : start + PAIRS]) for start in range(0, len(pairs), PAIRS)]
        with self.trainer.precision_plugin.forward_context():
            ratios = [log_ratio(self.reference, PairBatch(*(x.to(self.device) for x in part))) for part in parts]
        return torch.cat(ratios)

    def compute_reference(self) -> None:
        if not len(self.reference_ratios):
            self.reference_ratios = self.ratios_of_reference(self.data.train_examples + self.data.val_examples)

    on_fit_start = compute_reference

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.compute_reference()

    def on_test_start(self) -> None:
        super().on_test_start()
        self.compute_reference()

    def margins(self, net: Any, pairs: PairBatch) -> tuple[Tensor, Tensor]:
        """The margin and the loss of each pair, (B,)."""
        margin = log_ratio(net, pairs) - self.reference_ratios[pairs.numbers]
        return margin, dpo_loss(margin, self.hparams.beta, self.hparams.loss == "ipo")

    def train_loss(self, *batch: Any) -> Tensor:
        pairs = PairBatch(*batch)
        margin, losses = self.margins(self.net, pairs)
        self.step_metrics = {"margin": margin.detach().mean(), "accuracy": accuracy(margin.detach())}
        loss = mean_over_devices(self, losses, pairs.total)
        return loss + self.pretraining_loss(self.trainer.fit_loop.total_batch_idx)

    def validation_metrics(self) -> dict[str, Metric | MetricCollection]:
        return super().validation_metrics() | {"margin": MeanMetric(), "accuracy": MeanMetric()}

    def measure(self, metrics: MetricCollection, *batches: Any) -> None:
        (batch,) = batches
        if not isinstance(batch, PairBatch):
            super().measure(metrics, batch)
        elif n := len(batch.numbers):
            margin, losses = self.margins(self.eval_net, batch)
            metrics["loss"].update(losses.mean(), n)
            metrics["margin"].update(margin.mean(), n)
            metrics["accuracy"].update(accuracy(margin), n)
