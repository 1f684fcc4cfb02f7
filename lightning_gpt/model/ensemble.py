"""Several nets with one vocabulary as one: the mean of their probabilities.

Shapes   B batch · T time (tokens) · V vocabulary
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .gpt import GPT
from .lecture import LectureModel


def log_mean_softmax(logits: Sequence[Tensor]) -> Tensor:
    """log(mean_i softmax(logits_i)) over the last dimension, in float32, or in float64 where the logits are."""
    logprobs = [z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1) for z in logits]
    return torch.stack(logprobs).logsumexp(0) - math.log(len(logprobs))


class Ensemble(nn.Module):
    """p(next) = mean_i p_i(next); its logits are the logarithms of these probabilities.

    Args:
        nets: of any sizes; the ensemble's context is the shortest of theirs.
    Raises:
        ValueError: their vocabulary sizes differ.
    """

    def __init__(self, nets: Sequence[GPT | LectureModel]):
        super().__init__()
        if len(sizes := sorted({net.config.vocab_size for net in nets})) > 1:
            raise ValueError(f"the nets have different vocabulary sizes, {sizes}: their probabilities have no mean")
        self.nets = nn.ModuleList(nets)
        self.train(nets[0].training)
        self.config = replace(nets[0].config, block_size=min(net.config.block_size for net in nets))

    def forward(self, idx: Tensor) -> Tensor:
        """Logits (B, T, V) after token ids (B, T)."""
        return log_mean_softmax([net(idx) for net in self.nets])


Net = GPT | LectureModel | Ensemble
