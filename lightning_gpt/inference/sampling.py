"""From logits to a token id: temperature, top-k, top-p, min-p.

Shapes   B batch · V vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_sampling(
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raises ValueError for what `sample_next` and `stream_ids` can't draw with."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be 1 or more; leave it out to draw from every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is a share of the odds: more than 0, and 1 (all of them) at most")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} is a share of the likeliest token's odds: 0 (all tokens) to 1")
    if not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty={repetition_penalty} must be more than 0; 1 leaves the odds alone")


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    dice: Tensor | None = None,
) -> Tensor:
    """Next token ids (B, 1) drawn from softmax(logits / temperature), logits (B, V).

    Each restriction looks at what those above it left, and the likeliest token always stays.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest only; where several tie for the last place, exactly k stay.
        top_p: draw among the likeliest whose odds together reach this share, as few as do (Holtzman et al. 2020).
        min_p: draw among tokens at least this share as likely as the likeliest (Nguyen et al. 2024).
        dice: exponential variates (B, V), if they were thrown before: the token with the largest odds / dice is drawn.
    Raises:
        ValueError: a setting is out of its range.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if dice is None:
        dice = exponential_noise(logits.shape, logits.device, generator)
    ids, most = None, logits.amax(-1, keepdim=True)
    if top_k is not None and top_k < logits.size(-1):  # from here on there are only k
        logits, ids = logits.topk(top_k, sorted=top_p is not None)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # the likeliest has 1, so nothing overflows, however small the temperature
    odds = ((logits - most) / max(temperature, 1e-30)).exp()
    if top_p is not None and top_p < 1:
        odds = odds * (odds.cumsum(-1) - odds < top_p * odds.sum(-1, keepdim=True))
    if min_p is not None:
        odds = odds * (odds >= min_p)
    # the largest of odds / dice is drawn with these odds, as in torch.multinomial, but without its look at the values
    new = (odds / (dice if ids is None else dice.gather(-1, ids))).argmax(-1, keepdim=True)
    return new if ids is None else ids.gather(-1, new)


def exponential_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Exponential variates; never 0, for 0 / 0 would be drawn."""
    return torch.empty(shape, device=device).exponential_(generator=generator).clamp_(min=1e-30)
