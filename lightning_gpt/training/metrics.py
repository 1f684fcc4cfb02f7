"""Validation metrics that do not depend on how the tokens are split into batches and over devices."""

import math

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class BitsPerCharacter(Metric):
    """Total loss in bits over the number of characters in the targets; comparable between vocabularies."""

    nats: Tensor
    characters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("characters", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: int, characters: Tensor) -> None:
        self.nats += value * weight
        self.characters += characters

    def compute(self) -> Tensor:
        return self.nats / self.characters / math.log(2)


class Perplexity(MeanMetric):
    """exp(mean loss), for a mean loss in nats per token."""

    def compute(self) -> Tensor:
        return super().compute().exp()
