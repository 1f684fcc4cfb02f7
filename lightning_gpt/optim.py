"""How weights change: parameter groups and learning-rate schedules. Torch only."""

import math

from torch import nn


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices and embeddings; none on biases and norms."""
    params = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line from 1 to 0 as progress goes from 0 to 1."""
    return 1 - progress


SCHEDULES = {"cosine": cosine, "linear": linear}


def lr_factor(step: int, total: int, warmup: int, floor: float, schedule: str) -> float:
    """What to multiply the peak learning rate with at `step` (from 0).

    Up in a straight line over `warmup` steps, down to `floor` along the schedule, reached at `total`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)  # nanoGPT's: the first step already moves
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * SCHEDULES[schedule](progress)
