"""Examples to train on: JSON lines with demonstrations, with pairs of completions, or with prompts alone."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.corpus import TINY_SHAKESPEARE
from ..data.tokenizers import Tokenizer
from ..data.windows import derive_seed

IGNORED = -100  # the target of positions without a loss: the default ignore_index of F.cross_entropy
HEADING = re.compile(r"\n\n([A-Z][A-Za-z' ]*:\n)")  # follows a blank line
BUCKET = 8  # batches whose examples are sorted by length together


class Example(NamedTuple):
    """A text as token ids, and which of them are trained on."""

    ids: Tensor  # (n,), int64
    trained: Tensor  # (n,), bool: the tokens of completions

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Number of targets."""
        return int(self.trained[1:].sum())


class Pair(NamedTuple):
    """Two completions of a prompt."""

    chosen: Example
    rejected: Example
    number: int  # in the file, from 0

    @property
    def length(self) -> int:
        return max(self.chosen.length, self.rejected.length)

    @property
    def targets(self) -> int:
        return 1


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


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a file of JSON lines, with its file and line for errors; blank lines are skipped.

    Raises:
        ValueError: a line is not JSON; names file and line. OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {path}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON in UTF-8: {' '.join(str(error).split())[:100]}") from None


def encode_parts(parts: list[tuple[str, bool]], tokenizer: Tokenizer, max_length: int, limit: str, where: str):
    """The example whose text has these parts, each with whether it is trained on.

    Args:
        max_length: of the text, in tokens; `limit` says what sets it.
    Raises:
        ValueError: the text is too long, has unknown characters, or nothing in it is predicted; begins with `where`.
    """
    parts = [(text, trained) for text, trained in parts if text]
    try:
        ids = [tokenizer.encode(text) for text, _ in parts]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    trained = [torch.full((len(part),), mask) for part, (_, mask) in zip(ids, parts, strict=True)]
    example = Example(torch.cat(ids), torch.cat(trained))
    if example.length > max_length:
        raise ValueError(
            f"{where} has {example.length:,} tokens, more than {limit} = {max_length}: shorten it, or start from a "
            "net with a larger block_size"
        )
    if not example.targets:
        raise ValueError(f"{where} has no prompt before its only token: give a prompt")
    return example


def read_examples(path: Path, tokenizer: Tokenizer, block_size: int, template: str) -> list[Example]:
    """The demonstrations of a file of JSON lines, see `parts_of`.

    Raises:
        ValueError: a line is not such an example, is longer than block_size + 1 tokens or has unknown characters;
            names file and line. OSError: the file can't be read.
    """
    examples = [
        encode_parts(parts_of(record, template, where), tokenizer, block_size + 1, "block_size + 1", where)
        for where, record in read_records(path)
    ]
    if not examples:
        raise ValueError(f"{path} has no examples: give one JSON object per line, with prompt and completion")
    return examples


def read_pairs(path: Path, tokenizer: Tokenizer, block_size: int) -> list[Pair]:
    """The pairs of a file of JSON lines, each an object with prompt, chosen and rejected, as in TRL.

    Raises:
        ValueError: a line is not such a pair, its completions are equal, one of its texts is longer than block_size
            tokens or has unknown characters; names file and line. OSError: the file can't be read.
    """
    pairs: list[Pair] = []
    for where, record in read_records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a {type(record).__name__}, not an object with prompt, chosen and rejected")
        prompt, chosen, rejected = (text_field(record, key, where) for key in ("prompt", "chosen", "rejected"))
        if chosen == rejected:
            raise ValueError(f"{where}: chosen and rejected are the same text, which says nothing about preferences")
        if not chosen or not rejected:
            raise ValueError(f"{where} has an empty {'rejected' if chosen else 'chosen'}: there is nothing to compare")
        better, worse = (
            encode_parts([(prompt, False), (text, True)], tokenizer, block_size, "block_size", where)
            for text in (chosen, rejected)
        )
        pairs.append(Pair(better, worse, len(pairs)))
    if not pairs:
        raise ValueError(f"{path} has no pairs: give one JSON object per line, with prompt, chosen and rejected")
    return pairs


def read_prompts(path: Path, tokenizer: Tokenizer, max_length: int) -> list[str]:
    """The distinct prompts of a file of JSON lines, in its order; other keys than prompt are ignored.

    Raises:
        ValueError: a line has no prompt, an empty one, one of more than max_length tokens or with unknown characters;
            names file and line. OSError: the file can't be read.
    """
    prompts: dict[str, None] = {}
    for where, record in read_records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a {type(record).__name__}, not an object with a prompt")
        prompt = text_field(record, "prompt", where)
        if not prompt:
            raise ValueError(f"{where} has an empty prompt: give at least one token to continue")
        if prompt not in prompts:
            encode_parts([(prompt[:1], False), (prompt, True)], tokenizer, max_length + 1, "the room for it", where)
            prompts[prompt] = None
    if not prompts:
        raise ValueError(f"{path} has no prompts: give one JSON object per line, with a prompt")
    return list(prompts)


def read_completions(path: Path) -> list[tuple[str, ...]]:
    """The lines of a file of JSON lines as (prompt, completion), or all as (prompt, chosen, rejected).

    Raises:
        ValueError: a line has other keys or is like neither; names file and line. OSError: the file can't be read.
    """
    found: list[tuple[str, ...]] = []
    for where, record in read_records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a {type(record).__name__}, not an object with prompt and completion")
        keys = ("chosen", "rejected") if "chosen" in record else ("completion",)
        found.append(tuple(text_field(record, key, where) for key in ("prompt", *keys)))
        if len(found[-1]) != len(found[0]):
            raise ValueError(f"{where} is a {'pair' if len(keys) == 2 else 'single text'}, unlike the first line")
    if not found:
        raise ValueError(f"{path} has no texts: give one JSON object per line, with prompt and completion")
    return found


def headings(text: str) -> list[str]:
    """The distinct lines of a play that name who speaks, each with its newline: prompts to continue."""
    return list(dict.fromkeys(HEADING.findall(f"\n\n{text}")))


def prompts_or_headings(path: str | None, tokenizer: Tokenizer, max_length: int) -> list[str]:
    """The prompts of a file, see `read_prompts`; without one, the headings of Tiny Shakespeare's first 90%."""
    if path is not None:
        return read_prompts(Path(path), tokenizer, max_length)
    text = TINY_SHAKESPEARE.read_text(encoding="utf-8")
    return headings(text[: int(0.9 * len(text))])


def pad(rows: Sequence[Tensor], T: int, value: int | bool = 0) -> Tensor:
    """The rows as one tensor (len(rows), T), padded at the end; padding after a text is never seen by its tokens."""
    padded = torch.full((len(rows), T), value, dtype=rows[0].dtype if rows else torch.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded


def collate(examples: list[Example], total: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets (B, T), padded at the end, and the number of targets in the global batch, int64.

    Targets outside completions are IGNORED.
    """
    T = max((example.length for example in examples), default=2)
    ids = pad([example.ids for example in examples], T)
    targets = pad([torch.where(example.trained, example.ids, IGNORED) for example in examples], T, IGNORED)
    count = sum(example.targets for example in examples) if total is None else total
    return ids[:, :-1], targets[:, 1:], torch.tensor(count)


class PairBatch(NamedTuple):
    """Pairs as texts (2 B, T), the chosen ones first."""

    ids: Tensor  # (2 B, T), int64, padded at the end
    completion: Tensor  # (2 B, T), bool: the tokens after the prompt
    numbers: Tensor  # (B,), of the pairs
    total: Tensor  # pairs in the global batch, int64


def collate_pairs(pairs: list[Pair], total: int | None = None) -> PairBatch:
    examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    T = max((example.length for example in examples), default=2)
    return PairBatch(
        pad([example.ids for example in examples], T),
        pad([example.trained for example in examples], T, False).bool(),
        torch.tensor([pair.number for pair in pairs], dtype=torch.int64),
        torch.tensor(len(pairs) if total is None else total),
    )


class ShuffledExamples:
    """Endless training batches; batch k is a pure function of (seed, k), and an epoch has each example once.

    The examples of a batch have similar lengths, so that little is padding: after shuffling, runs of BUCKET batches
    are sorted by length. The examples beyond the last full batch of an epoch are left out of it.

    Args:
        examples: `Example`s or `Pair`s; at least one.
        collate: makes a batch of some examples; the second argument is the count of the global batch.
        numbers: yields the numbers of the batches to make.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        batch_size: int,
        seed: int,
        collate: Callable[[list, int], Any],
        numbers: Callable[[], Iterable[int]],
        rank: int = 0,
        world_size: int = 1,
    ):
        self.examples, self.batch_size, self.seed = examples, min(batch_size, len(examples)), seed
        self.collate, self.numbers, self.rank, self.world_size = collate, numbers, rank, world_size
        self.lengths = torch.tensor([example.length for example in examples])
        self.epoch = lru_cache(2)(self._epoch)

    def _epoch(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch, as indices of examples."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        full = len(self.examples) // self.batch_size * self.batch_size
        runs = torch.randperm(len(self.examples), generator=generator)[:full].split(BUCKET * self.batch_size)
        batches = [one for run in runs for one in run[self.lengths[run].argsort(stable=True)].split(self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def batch(self, k: int):
        """This rank's share of batch k."""
        epoch, i = divmod(k, len(self.examples) // self.batch_size)
        chosen = [self.examples[j] for j in self.epoch(epoch)[i].tolist()]
        return self.collate(chosen[self.rank :: self.world_size], sum(example.targets for example in chosen))

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, self.numbers())


class Batches:
    """Batches made beforehand; Lightning takes a list for several loaders."""

    def __init__(self, batches: list):
        self.batches = batches

    def __add__(self, other: "Batches") -> "Batches":
        return Batches(self.batches + other.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def sequential_batches(
    examples: Sequence[Any], batch_size: int, collate: Callable[[list], Any], rank: int = 0, world_size: int = 1
) -> Batches:
    """One pass over all examples, in the order of their length; all ranks have the same number of batches."""
    ordered = sorted(examples, key=lambda example: example.length)[rank::world_size]
    longest_share = math.ceil(len(examples) / world_size)
    return Batches([collate(ordered[start : start + batch_size]) for start in range(0, longest_share, batch_size)])
