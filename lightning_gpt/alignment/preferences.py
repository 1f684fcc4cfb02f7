"""lightning-gpt preferences: pairs of a checkpoint's own texts, ordered by a reward."""

import json
import random
from itertools import combinations, count
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.io import atomic_write
from ..data.tokenizers import Tokenizer
from ..data.windows import derive_seed
from ..errors import print_info
from ..inference.text import load
from ..model.gpt import GPT
from .examples import prompts_or_headings
from .rewards import Reward, find_reward
from .rollouts import roll_out

TEXTS = {"cuda": 2048, "cpu": 256}  # generated at once
MAX_EMPTY = 20  # batches without a pair after which there is no hope


class Ordered(NamedTuple):
    """Pairs of texts of one prompt, the better first, and how many were not better by enough."""

    pairs: list[tuple[str, str]]
    ties: int


def order(texts: list[str], rewards: list[float], min_gap: float, max_pairs: int, generator: random.Random) -> Ordered:
    """At most max_pairs pairs, at random, of those whose rewards differ, by at least min_gap."""
    everything = list(combinations(range(len(texts)), 2))
    apart = [
        (i, j) if rewards[i] > rewards[j] else (j, i)
        for i, j in everything
        if rewards[i] != rewards[j] and abs(rewards[i] - rewards[j]) >= min_gap and texts[i] != texts[j]
    ]
    chosen = generator.sample(apart, min(max_pairs, len(apart)))
    return Ordered([(texts[i], texts[j]) for i, j in chosen], len(everything) - len(apart))


def sample_pairs(
    net: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    reward: Reward,
    pairs: int,
    group_size: int,
    max_pairs: int,
    min_gap: float,
    max_new_tokens: int,
    stop: list[str],
    seed: int,
) -> list[dict[str, str]]:
    """The records of `preferences`, with the arguments of it."""
    records: list[dict[str, str]] = []
    ties = drawn = empty = 0
    at_once = max(1, TEXTS.get(next(net.parameters()).device.type, 256) // group_size)
    order_of_prompts = random.Random(seed).sample(prompts, len(prompts))
    for batch in count():
        numbers = range(batch * at_once, (batch + 1) * at_once)
        chosen = [order_of_prompts[number % len(prompts)] for number in numbers for _ in range(group_size)]
        seeds = [derive_seed(seed, number, i) for number in numbers for i in range(group_size)]
        _, texts = roll_out(net, tokenizer, chosen, seeds, max_new_tokens, stop)
        rewards, before = reward(chosen, texts), len(records)
        for row, number in enumerate(numbers):
            group = slice(row * group_size, (row + 1) * group_size)
            generator = random.Random(derive_seed(seed, number))
            found = order(texts[group], rewards[group], min_gap, max_pairs, generator)
            ties += found.ties
            drawn += group_size * (group_size - 1) // 2
            prompt = chosen[group.start]
            records += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in found.pairs if a and b]
        if len(records) >= pairs:
            print_info(f"{ties:,} of {drawn:,} pairs drawn were dropped: their rewards are equal or too close")
            return records[:pairs]
        empty = empty + 1 if len(records) == before else 0
        if empty == MAX_EMPTY:
            raise ValueError(
                f"{drawn:,} pairs had no two rewards that differ by min_gap={min_gap} or more: give a smaller one"
            )
    raise AssertionError


def preferences(
    output: str,
    ckpt_path: str = "best",
    reward: str = "verse",
    prompts: str | None = None,
    pairs: int = 20_000,
    group_size: int = 16,
    pairs_per_prompt: int = 8,
    min_gap: float = 0.2,
    max_new_tokens: int = 200,
    stop: str | None = None,
    shuffle_labels: bool = False,
    seed: int = 1337,
    device: str = "auto",
) -> None:
    """Write pairs of a checkpoint's own texts, of which a reward prefers one, as JSON lines.

    The same seed and checkpoint give the same file in float32.

    Args:
        output: the JSONL file to write, for `reward` and `dpo`.
        ckpt_path: the checkpoint that generates, at temperature 1; best or last is the newest file of that name.
        reward: verse, the .ckpt of a reward model, or module:function or file.py:function.
        prompts: a file of JSON lines with a prompt each; null takes the headings of Tiny Shakespeare's first 90%.
        pairs: how many to write.
        group_size: texts for each prompt, at each of its turns.
        pairs_per_prompt: at most so many pairs of these.
        min_gap: the smallest difference of two rewards; 0 keeps all but ties.
        max_new_tokens: length of a text.
        stop: a string before which a text ends.
        shuffle_labels: choose at random which text is the better one: a control, from which nothing can be learned.
        seed: of the sampling.
        device: auto, cpu, cuda, cuda:1, mps ...; auto takes the accelerator if there is one.
    """
    for name, value, least in (
        ("pairs", pairs, 1),
        ("group_size", group_size, 2),
        ("pairs_per_prompt", pairs_per_prompt, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("min_gap", min_gap, 0),
    ):
        if not value >= least:
            raise ValueError(f"{name}={value} must be at least {least}")
    net, tokenizer = load(ckpt_path, device)
    if not isinstance(net, GPT):
        raise ValueError(f"{ckpt_path} is a step of the lecture or an ensemble: preferences are made with a GPT")
    found = prompts_or_headings(prompts, tokenizer, net.config.block_size - max_new_tokens)
    scorer = find_reward(reward, next(net.parameters()).device)
    records = sample_pairs(
        net,
        tokenizer,
        found,
        scorer,
        pairs,
        group_size,
        pairs_per_prompt,
        min_gap,
        max_new_tokens,
        [] if stop is None else [stop],
        seed,
    )
    if shuffle_labels:
        generator = random.Random(seed)
        for record in records:
            if generator.random() < 0.5:
                record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
    atomic_write(Path(output), "".join(f"{json.dumps(record)}\n" for record in records).encode())
    print(f"{len(records):,} pairs are in {output}")
