"""The losses of training: cross-entropy of the next tokens, and of the probabilities of teachers.

Shapes   B batch · T time (tokens) · V vocabulary
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.gpt import GPT


def cross_entropy(logits: Tensor, y: Tensor, teacher_logits: Tensor | None = None, soft_weight: float = 0.0) -> Tensor:
    """Mean cross-entropy of the targets y (B, T), in nats per token; computed in float32 or float64.

    Targets of -100, the default ignore_index of F.cross_entropy, do not count. With `teacher_logits` (B, T, V) it is
    (1 - soft_weight) of that and soft_weight of the cross-entropy of the teacher's probabilities: Hinton et al. 2015,
    section 2, at temperature 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast would do the same
    hard = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    if teacher_logits is None:
        return hard
    teacher_probs = teacher_logits.to(logits.dtype).softmax(-1)
    soft = F.cross_entropy(logits.flatten(0, 1), teacher_probs.flatten(0, 1), reduction="none")
    counts = y.flatten() >= 0
    return (1 - soft_weight) * hard + soft_weight * (soft * counts).sum() / counts.sum()


def next_token_loss(net: nn.Module, x: Tensor, y: Tensor, *teacher) -> Tensor:
    """`cross_entropy` of the targets y (B, T) after the inputs x (B, T)."""
    return cross_entropy(net(x), y, *teacher)


def features_loss(net: GPT, features: Tensor, y: Tensor) -> Tensor:
    """`next_token_loss` of a GPT from its `features`, so that the head compiles together with the loss."""
    return cross_entropy(net.logits(features), y)
