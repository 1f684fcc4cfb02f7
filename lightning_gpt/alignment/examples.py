"""Demonstrations for fine-tuning: JSON lines with prompts and completions, or with the messages of a chat."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.tokenizers import Tokenizer
from ..data.windows import derive_seed

IGNORED = -100  # the target of positions without a loss: the default ignore_index of F.cross_entropy
BUCKET = 8  # batches of examples of similar length that a batch is drawn from


class Example(NamedTuple):
    """A text as token ids, and which of them are trained on."""

    ids: Tensor  # (n,), int64
    trained: Tensor  # (n,), bool: the tokens of completions


def text_field(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise ValueError(f"{where} has no {key!r}, only {', '.join(map(repr, record))[:100]}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} is a {type(record[key]).__name__}, not a text")
    return record[key]


def parts_of(record: Any, template: str, where: str) -> list[tuple[str, bool]]:
    """The pieces of an example's text, and whether each is trained on.

    Args:
        record: {"prompt", "completion"}, or {"messages": [{"role", "content"} ...]} as in TRL; the messages of the
            role assistant are trained on.
        template: the text of one message, with {role} and {content}.
        where: file and line, for errors.
    Raises:
        ValueError: a key is missing, a value is not a text, or there is nothing to train on.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, not an object with prompt and completion")
    if "messages" not in record:
        parts = [(text_field(record, "prompt", where), False), (text_field(record, "completion", where), True)]
    else:
        if not isinstance(record["messages"], list) or not all(isinstance(one, dict) for one in record["messages"]):
            raise ValueError(f"{where}: messages is not a list of objects with role and content")
        before, _, after = template.partition("{content}")
        parts = []
        for message in record["messages"]:
            role, content = (text_field(message, key, where) for key in ("role", "content"))
            parts += [(before.replace("{role}", role), False), (content + after, role == "assistant" and bool(content))]
    if not any(trained and text for text, trained in parts):
        raise ValueError(f"{where} has an empty completion: there is nothing to train on")
    return parts


def read_examples(path: Path, tokenizer: Tokenizer, block_size: int, template: str) -> list[Example]:
    """The examples of a file of JSON lines; blank lines are skipped.

    Raises:
        ValueError: a line is not such an example, is longer than block_size + 1 tokens or has unknown characters;
            names file and line. OSError: the file can't be read.
    """
    examples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {path}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON in UTF-8: {' '.join(str(error).split())[:100]}") from None
            parts = [(text, trained) for text, trained in parts_of(record, template, where) if text]
            try:
                ids = [tokenizer.encode(text) for text, _ in parts]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            trained = [torch.full((len(part),), mask) for part, (_, mask) in zip(ids, parts, strict=True)]
            example = Example(torch.cat(ids), torch.cat(trained))
            if len(example.ids) > block_size + 1:
                raise ValueError(
                    f"{where} has {len(example.ids):,} tokens, more than block_size + 1 = {block_size + 1}: shorten "
                    "it, or start from a net with a larger block_size"
                )
            if not example.trained[1:].any():
                raise ValueError(f"{where} has no prompt before its only token: give a prompt")
            examples.append(example)
    if not examples:
        raise ValueError(f"{path} has no examples: give one JSON object per line, with prompt and completion")
    return examples


def collate(examples: list[Example], total: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets (B, T), padded at the end, and the number of targets in the global batch, int64.

    Targets outside completions are IGNORED. The padding comes after all that is trained on, so causal attention never
    sees it.
    """
    T = max((len(example.ids) for example in examples), default=2)
    ids, targets = torch.zeros(len(examples), T, dtype=torch.int64), torch.full((len(examples), T), IGNORED)
    for row, (tokens, trained) in enumerate(examples):
        ids[row, : len(tokens)] = tokens
        targets[row, : len(tokens)] = torch.where(trained, tokens, IGNORED)
    count = int((targets[:, 1:] != IGNORED).sum()) if total is None else total
    return ids[:, :-1], targets[:, 1:], torch.tensor(count)


class RandomExamples:
    """Endless training batches; batch k is a pure function of (seed, k).

    The examples of a batch have similar lengths, so that little is padding: a batch is drawn from one bucket of
    BUCKET * batch_size neighbours in the order of length, and each example is equally likely.
    """

    def __init__(
        self, examples: list[Example], batch_size: int, seed: int, numbers, rank: int = 0, world_size: int = 1
    ):
        self.examples = sorted(examples, key=lambda example: len(example.ids))
        self.batch_size, self.seed, self.numbers = batch_size, seed, numbers
        self.rank, self.world_size = rank, world_size

    def batch(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's share of batch k, see `collate`."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, k))
        size = BUCKET * self.batch_size
        start = int(torch.randint(len(self.examples), (), generator=generator)) // size * size
        bucket = self.examples[start : start + size]
        chosen = torch.randint(len(bucket), (self.batch_size,), generator=generator).tolist()
        total = sum(int(bucket[i].trained[1:].sum()) for i in chosen)
        return collate([bucket[i] for i in chosen[self.rank :: self.world_size]], total)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return map(self.batch, self.numbers())


class SequentialExamples:
    """One pass over all examples, in the order of their length; all ranks have the same number of batches."""

    def __init__(self, examples: list[Example], batch_size: int, rank: int = 0, world_size: int = 1):
        ordered = sorted(examples, key=lambda example: len(example.ids))[rank::world_size]
        longest_share = math.ceil(len(examples) / world_size)
        starts = range(0, longest_share, batch_size)
        self.batches = [collate(ordered[start : start + batch_size]) for start in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return iter(self.batches)
