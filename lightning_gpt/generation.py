"""Sampling text from a GPT. Torch only: no Trainer, no tokenizer, no files.

Shapes   B batch · T time (tokens) · H heads · D channels of a head · V vocabulary
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .model import GPT


class KVCache:
    """Keys and values of the tokens seen so far, one (B, H, T, D) pair for each attention layer."""

    tail: Tensor  # the last token ids (B, n - 1), for a net with n-grams

    def __init__(self) -> None:
        self.length = 0
        self._pairs: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def append(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values so far, these included, each (B, H, past + T, D)."""
        if layer in self._pairs:
            if k.size(2) > 1:
                raise ValueError(f"{k.size(2)} tokens at once on top of a cache: only the first piece may be longer")
            past_k, past_v = self._pairs[layer]
            k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        self._pairs[layer] = k, v
        return k, v


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Next token ids (B, 1) drawn from softmax(logits / temperature), logits (B, V).

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest only; where several tie for the last place, exactly k stay.
    Raises:
        ValueError: temperature is negative, or top_k is less than 1.
    """
    check(temperature, top_k)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    if top_k is not None:
        values, ids = logits.topk(min(top_k, logits.size(-1)))
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, values)
    logits = logits - logits.max(-1, keepdim=True).values  # so nothing overflows, however small the temperature
    return torch.multinomial((logits / max(temperature, 1e-30)).softmax(-1), 1, generator=generator)


def check(temperature: float, top_k: int | None) -> None:
    """Raises ValueError for what `sample` can't draw with."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be 1 or more; leave it out to draw from every token")


@torch.inference_mode()
def stream(
    net: "GPT",
    idx: Tensor,
    max_new_tokens: int,
    *,
    use_cache: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token ids (B, 1) after idx (B, T), max_new_tokens times.

    Positions are absolute, so once the text outgrows block_size the window slides, every
    position changes and the cache is of no use: from there each token costs a full forward.
    """
    was_training, block_size = net.training, net.config.block_size
    net.eval()
    cache = KVCache()
    try:
        for _ in range(max_new_tokens):
            if use_cache and idx.size(1) <= block_size:
                logits = net(idx[:, cache.length :], cache)  # the prompt first, then one token at a time
            else:
                logits = net(idx[:, -block_size:])
            new = sample(logits[:, -1], temperature, top_k, generator)
            idx = torch.cat((idx, new), 1)
            yield new
    finally:
        net.train(was_training)


def generate(net: "GPT", idx: Tensor, max_new_tokens: int, **how) -> Tensor:
    """idx (B, T) continued to (B, T + max_new_tokens); `how` goes to `stream`."""
    return torch.cat((idx, *stream(net, idx, max_new_tokens, **how)), 1)
