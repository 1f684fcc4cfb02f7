"""The losses of training: cross-entropy of the next tokens, and of the probabilities of teachers.

Shapes   B batch · T time (tokens) · V vocabulary
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.gpt import GPT


def cross_entropy(logits: Tensor, y: Tensor, teacher_logits: Tensor | None = None, soft_weight: float = 0.0) -> Tensor:
    """Mean cross-entropy of the targets y (B, T), in nats per token; computed in float32 or float64.

    Targets of -100, the default ignore_index of F.cross_entropy, do not count. With `teacher_logits` (B, T, V) the
    target is a distribution, 1 - soft_weight of the next token's and soft_weight of the teacher's probabilities:
    Hinton et al. 2015, section 2, at temperature 1.
    """
    logits, y = logits.flatten(0, 1), y.flatten()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast would do the same
    if teacher_logits is None:
        return F.cross_entropy(logits, y)
    counts = y >= 0
    next_token = F.one_hot(y * counts, logits.size(1)).to(logits.dtype)
    target = next_token.lerp(teacher_logits.flatten(0, 1).to(logits.dtype).softmax(-1), soft_weight)
    # logsumexp, as torch 2.11 compiles the gradient of F.cross_entropy with probabilities to a kernel with a race
    losses = logits.logsumexp(-1) - (target * logits).sum(-1)
    return (losses * counts).sum() / counts.sum()


def next_token_loss(net: nn.Module, x: Tensor, y: Tensor, *teacher) -> Tensor:
    """`cross_entropy` of the targets y (B, T) after the inputs x (B, T)."""
    return cross_entropy(net(x), y, *teacher)


def features_loss(net: GPT, features: Tensor, y: Tensor, *teacher) -> Tensor:
    """`next_token_loss` of a GPT from its `features`, so that the head compiles together with the loss."""
    return cross_entropy(net.logits(features), y, *teacher)
