"""Rollouts: texts that a policy continues at temperature 1, with the log-probabilities of their tokens."""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.tokenizers import Tokenizer
from ..inference.text import complete, in_precision
from ..model.gpt import GPT


class Rollouts(NamedTuple):
    """Generated texts; of each tensor, row b is text b."""

    ids: Tensor  # (B, T), int64: prompt and completion, padded at the end
    completion: Tensor  # (B, T), bool: the tokens after the prompt
    logprobs: Tensor  # (B, T), of each token of the completion when it was drawn; 0 elsewhere


def roll_out(
    net: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> tuple[Rollouts, list[str]]:
    """Continue each prompt once, with our engine, at temperature 1.

    In float32 and float64 a text depends on the weights, its prompt and its seed alone. On a GPU the engine runs in
    bfloat16 unless the weights are float64.

    Args:
        seeds: one for each prompt.
        stop: a text ends before the first occurrence of any of these strings.
    Returns:
        the rollouts, T = longest prompt + max_new_tokens, and the texts of the completions, without stop strings.
    Raises:
        ValueError: a prompt and max_new_tokens do not fit into the context together.
    """
    device, block_size = next(net.parameters()).device, net.config.block_size
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, encoded))
    if longest + max_new_tokens > block_size:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit into block_size="
            f"{block_size}: take at most {block_size - longest} new tokens"
        )
    if device.type == "cuda" and next(net.parameters()).dtype == torch.float32:
        net = in_precision(deepcopy(net), "bfloat16")  # type: ignore[assignment]
    with torch.autocast(device.type, enabled=False):
        *_, texts = complete(
            net, tokenizer, prompts, max_new_tokens, temperature=1.0, seed=seeds, stop=stop, logprobs=True
        )
    T, starts = longest + max_new_tokens, torch.tensor([len(ids) for ids in encoded])
    ends = starts + torch.tensor([len(text.tokens) for text in texts])
    rows = [
        (ids.tolist() + text.tokens, [0.0] * len(ids) + text.logprobs) for ids, text in zip(encoded, texts, strict=True)
    ]  # as lists, because a tensor for each row takes as long as generating it
    dtype = torch.float64 if next(net.parameters()).dtype == torch.float64 else torch.float32
    ids = torch.tensor([row + [0] * (T - len(row)) for row, _ in rows])
    logprobs = torch.tensor([row + [0.0] * (T - len(row)) for _, row in rows], dtype=dtype)
    position = torch.arange(T)
    completion = (starts[:, None] <= position) & (position < ends[:, None])
    rollouts = Rollouts(ids, completion, logprobs)
    return Rollouts(*(part.to(device) for part in rollouts)), [text.text for text in texts]
