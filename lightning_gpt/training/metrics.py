"""Validation metrics that are exact for any split into batches and devices."""

import math

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class BitsPerCharacter(Metric):
    """All nats over ln 2, shared out among the characters that the targets stand for: comparable over vocabularies."""

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
    """exp(mean loss): as unsure as a choice among so many equally likely tokens."""

    def compute(self) -> Tensor:
        return super().compute().exp()
