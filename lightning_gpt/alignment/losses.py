"""The losses of the stages after SFT, as functions of log-probabilities and rewards.

Shapes   B texts or pairs · T time (tokens) · V vocabulary
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def next_token_logprobs(net: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities (B, T - 1, V) of every next token after the texts ids (B, T); float32 or float64."""
    logits = net(ids[:, :-1])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def of_tokens(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities (B, T - 1) of the tokens that follow in ids (B, T), from `next_token_logprobs`."""
    return logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected) of each pair (B,): Bradley & Terry 1952; Ouyang et al. 2022, equation 1."""
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(margin: Tensor, beta: float, ipo: bool = False) -> Tensor:
    """-log sigmoid(beta * margin) of each pair (B,): Rafailov et al. 2023, equation 7.

    With `ipo`, (margin - 1 / (2 beta))^2: Azar et al. 2023, equation 17. It does not push a margin to infinity.

    Args:
        margin: (B,), log(policy / reference) of the chosen completion minus that of the rejected one.
    """
    return (margin - 1 / (2 * beta)).square() if ipo else -F.logsigmoid(beta * margin)


def accuracy(margin: Tensor) -> Tensor:
    """The share of margins above 0; those of 0 count half."""
    return ((margin > 0).float() + 0.5 * (margin == 0)).mean()


def kl_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of the next token, (B, T), from the log-probabilities (B, T, V) of both, in nats.

    Its sum over the positions of texts drawn from the policy is an unbiased estimate of the KL of whole texts, usually
    with less variance than that from the drawn tokens alone.
    """
    return (policy.exp() * (policy - reference)).sum(-1)


def group_advantages(rewards: Tensor) -> Tensor:
    """How many standard deviations each reward (groups, size) is above its group's mean; 0 where all are equal.

    GRPO: Shao et al. 2024 (DeepSeekMath), section 4.1.2.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    deviation = rewards.std(1, correction=0, keepdim=True)
    return torch.where(deviation > 1e-6, advantages / deviation.clamp(min=1e-6), torch.zeros_like(advantages))


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) of each token: PPO, Schulman et al. 2017, equation 7.

    Args:
        logprobs: of the drawn tokens under the policy, (B, T).
        old_logprobs: the same when they were drawn.
        advantages: A, (B,).
    """
    ratio, A = (logprobs - old_logprobs).exp(), advantages[:, None]
    return -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
