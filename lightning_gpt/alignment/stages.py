"""The LightningModules of the stages: SFT and the reward model here, DPO and GRPO on top of policy.py."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryCalibrationError

from ..model.gpt import GPT
from ..model.reward import RewardModel
from ..training.lightning_compat import trainer_or_none
from ..training.module import LanguageModel
from ..training.strategies import FSDP2Strategy
from .examples import PairBatch
from .losses import accuracy, bradley_terry_loss


class SupervisedFineTuning(LanguageModel):
    """Learns the completions of demonstrations: cross-entropy of their tokens, Ouyang et al. 2022, section 3.5."""

    stage = "sft"


def check_gpt(lm: LanguageModel) -> GPT:
    """The net, if it is the GPT.

    Raises:
        ValueError: it is a step of the lecture.
    """
    if not isinstance(lm.net, GPT):
        raise ValueError(f"{lm.stage} is for the GPT, not for lecture_step={lm.hparams.lecture_step}: start from a GPT")
    return lm.net


def check_not_sharded(lm: LanguageModel) -> None:
    if isinstance(lm.trainer.strategy, FSDP2Strategy):
        raise ValueError(f"{lm.stage} needs whole weights, and this strategy shards them: take ddp or ddp_flat")


def mean_over_devices(lm: LanguageModel, losses: Tensor, total: Tensor | int) -> Tensor:
    """This rank's part of the mean of `losses` over all ranks, of which there are `total`; DDP averages the parts."""
    trainer = trainer_or_none(lm)
    return losses.sum() * (1 if trainer is None else trainer.world_size) / total


class RewardModeling(LanguageModel):
    """Learns which of two completions is better: the reward model of InstructGPT.

    Ouyang et al. 2022, section 3.5: the loss of a pair is -log sigmoid(r_chosen - r_rejected). A validation logs it,
    the accuracy and the calibration error, the mean distance between sigmoid(r_chosen - r_rejected) and the share of
    pairs for which it is right.
    """

    stage = "reward"

    def forward(self, ids: Tensor, completion: Tensor) -> Tensor:  # type: ignore[override]
        """The rewards (B,) of texts (B, T) with their completions marked (B, T), bool."""
        return self.eval_net(ids, completion)

    def generate(self, *_: Any, **__: Any) -> str:
        raise ValueError("a reward model gives rewards, not text: generate with the policy")

    def build_net(self) -> RewardModel:
        if self.hparams.lecture_step:
            raise ValueError(f"reward is for the GPT, not for lecture_step={self.hparams.lecture_step}")
        return RewardModel(super().build_net().config)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_not_sharded(self)

    def rewards(self, net: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The rewards of the chosen and of the rejected completions, (B,) each, float32 or float64."""
        rewards = net(batch.ids, batch.completion)
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32)).chunk(2)  # type: ignore[return-value]

    def train_loss(self, *batch: Any) -> Tensor:
        pairs = PairBatch(*batch)
        chosen, rejected = self.rewards(self.net, pairs)
        self.step_metrics = {"accuracy": accuracy((chosen - rejected).detach())}
        return mean_over_devices(self, bradley_terry_loss(chosen, rejected), pairs.total)

    def metrics_of_step(self, loss: Tensor, batch: Any) -> dict[str, Tensor]:
        return self.step_metrics

    def validation_metrics(self) -> dict[str, Metric | MetricCollection]:
        return {"loss": MeanMetric(), "accuracy": MeanMetric(), "calibration_error": BinaryCalibrationError(n_bins=10)}

    def measure(self, metrics: MetricCollection, *batch: Any) -> None:
        pairs = PairBatch(*batch)
        if not len(pairs.numbers):
            return
        chosen, rejected = self.rewards(self.eval_net, pairs)
        loss = bradley_terry_loss(chosen, rejected)
        metrics["loss"].update(loss.mean(), len(loss))
        metrics["accuracy"].update(accuracy(chosen - rejected), len(loss))
        # a pair in both orders: the second event is that the other completion was chosen
        p = (chosen - rejected).sigmoid()
        metrics["calibration_error"].update(torch.cat((p, 1 - p)), torch.cat((torch.ones_like(p), torch.zeros_like(p))))
