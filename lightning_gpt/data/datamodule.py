"""Tiny Shakespeare, or another text, as windows of tokens. Knows nothing of the model."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor

from ..errors import print_info
from .augment import NameAugmenter
from .corpus import TINY_SHAKESPEARE, find_files, read_files, report_changes
from .token_cache import CACHE_FROM_BYTES, cached_tokens
from .tokenizers import Tokenizer, build_from_state, build_tokenizer, smallest_dtype
from .windows import RandomWindows, SequentialWindows, derive_seed, open_token_file


class Corpus(NamedTuple):
    """A text as token ids, split for training and validation."""

    tokenizer: Tokenizer
    train_tokens: Tensor  # (N,), with name augmentation
    val_tokens: Tensor
    text_tokens: Tensor  # the training split without name augmentation
    length: int | None  # of the text in characters; None for token files


def load_token_files(
    token_files: str,
    tokenizer: str | None,
    vocabulary: str | None,
    on_unknown: str,
    vocab_size: int | None,
    token_dtype: str,
) -> Corpus:
    """Two files of token ids, memory-mapped; the arguments are those of `TextDataModule`.

    Raises:
        ValueError: the files and the vocabulary do not fit together. OSError: a file can't be read.
    """
    if tokenizer in ("char", "bpe") and vocabulary is None:
        raise ValueError(f"data.tokenizer={tokenizer} for token files needs the vocabulary that made them")
    files, size = [file.strip() for file in token_files.split(",")], vocab_size
    if size is None and tokenizer == "gpt2":
        size = 50257
    if len(files) != 2 or not size:
        raise ValueError(
            f"data.token_files={','.join(files)} with data.vocab_size={size}: give two files, to train and to "
            "validate on (train.bin,val.bin), and their vocabulary size (50257 for GPT-2's)"
        )
    train_tokens, val_tokens = (open_token_file(file, token_dtype, size) for file in files)
    state = {"tokenizer": tokenizer or "ids", "vocabulary": vocabulary, "on_unknown": on_unknown}
    known = build_from_state(state, size)
    if len(known) != size:
        raise ValueError(f"data.vocab_size={size}, and data.vocabulary has {len(known)} tokens")
    return Corpus(known, train_tokens, val_tokens, train_tokens, None)


def load_corpus(
    corpus: str | None,
    split: tuple[float, float],
    name_augmentation: int,
    seed: int,
    vocabulary: str | None,
    tokenizer: str | None,
    on_unknown: str,
    vocab_size: int | None,
) -> Corpus:
    """Text files, split and encoded; the arguments are those of `TextDataModule`, `split` being two shares.

    Raises:
        ValueError: the text is empty, binary or has unknown characters. OSError: a file can't be read.
    """
    if tokenizer == "ids":
        raise ValueError("data.tokenizer=ids is for token files: give data.token_files=train.bin,val.bin too")

    def bounds(length: int) -> tuple[int, int]:
        return int(split[0] * length), int(split[1] * length)

    kind, files = tokenizer or "char", [TINY_SHAKESPEARE] if corpus is None else find_files(corpus)
    keep_returns = "\r" in (vocabulary or "")  # of characters: no other vocabulary has one
    large = sum(file.stat().st_size for file in files) >= CACHE_FROM_BYTES
    if large:
        known, train_tokens, val_tokens, length = cached_tokens(
            files, bounds, kind, vocabulary, on_unknown, vocab_size, keep_returns
        )
        if name_augmentation:
            print_info(f"data.name_augmentation={name_augmentation} is for small texts; this one goes without")
    else:
        notes: Counter[str] = Counter()
        text = "".join(read_files(files, keep_returns, notes))
        report_changes(notes)
        length, (n, stop) = len(text), bounds(len(text))
        known = build_tokenizer(kind, lambda: [text], lambda: [text[:n]], vocabulary, on_unknown, vocab_size)
        dtype = smallest_dtype(len(known))
        train_tokens, val_tokens = (
            known.encode(part).to(dtype) if part else torch.empty(0, dtype=dtype) for part in (text[:n], text[n:stop])
        )
    if corpus is not None and not Path(corpus).expanduser().is_file():  # a folder or a pattern: say which files it is
        print_info(f"the corpus {corpus[:100]} is {len(files):,} files with {length:,} characters")
    text_tokens = train_tokens
    if name_augmentation and not large:
        augmenter = NameAugmenter(text[:n])
        copies = "".join(augmenter.copy(derive_seed(seed, k)) for k in range(name_augmentation))
        copies = copies.translate(dict.fromkeys(map(ord, known.unknown(copies))))  # of invented names
        if copies:
            train_tokens = torch.cat((train_tokens, known.encode(copies).to(dtype)))
    return Corpus(known, train_tokens, val_tokens, text_tokens, length)


class TextDataModule(L.LightningDataModule):
    """A text as windows of tokens: its first part to train on, the rest to validate and test on.

    Args:
        corpus: a UTF-8 text file, a folder of .txt files, a pattern such as plays/*.md, or several of these between
            commas; hidden files of a folder are left out. null is Tiny Shakespeare, which comes with the package. From
            16 MB on its tokens are kept in a file below ~/.cache (XDG_CACHE_HOME) and mapped into memory.
        block_size: length of a window, in tokens.
        batch_size: windows of one training batch over all devices together: more devices make a step
            faster, never different.
        split: share of the text to train on, between 0 and 1; the rest is the validation split. Two shares, such
            as [0.81, 0.9], train up to the first and validate from there to the second: to tune settings without
            a look at the real validation split.
        name_augmentation: how often the training text is repeated with other speakers' names, see renaming.py.
        seed: decides which windows make up batch k.
        vocabulary: the characters that have a token id, or the merges of bpe; null takes those of the corpus. A
            checkpoint brings its own.
        tokenizer: char, byte, bpe (byte pairs of this corpus) or gpt2 (GPT-2's); null is char, or for token files none.
        on_unknown: what to do with characters without an id: error; drop; replace, by one token for all of them, which
            a new vocabulary learns from characters that occur once in the training text; extend, which gives each an
            id of its own, for a text to fine-tune on.
        token_files: two files of token ids in place of a corpus, "train.bin,val.bin", as nanoGPT makes them; they
            may be larger than memory.
        vocab_size: how many ids there are, the largest one and one more: of token files; for bpe to make (512);
            for byte and gpt2 to round their number up.
        token_dtype: the numbers in token files.
    Raises:
        ValueError: a text that is empty, binary, too short for one window or has unknown characters.
    """

    vocab_size: int  # read by the link from data to model

    def __init__(
        self,
        corpus: str | None = None,
        block_size: int = 256,
        batch_size: int = 64,
        split: float | tuple[float, float] = 0.9,
        name_augmentation: int = 0,
        seed: int = 1337,
        vocabulary: str | None = None,
        tokenizer: Literal["char", "byte", "bpe", "gpt2", "ids"] | None = None,
        on_unknown: Literal["error", "drop", "replace", "extend"] = "error",
        token_files: str | None = None,
        vocab_size: int | None = None,
        token_dtype: Literal["uint16", "uint32"] = "uint16",
    ):
        super().__init__()
        start, end = (split, 1.0) if isinstance(split, float) else split
        if not 0 < start < end <= 1:
            raise ValueError(
                f"data.split={split} must be the share to train on, more than 0 and less than 1, or two such shares"
            )
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        if token_files and corpus is not None:
            raise ValueError(
                f"data.token_files={token_files} and data.corpus={corpus} are two texts: give null for one"
            )
        if token_files:
            loaded = load_token_files(token_files, tokenizer, vocabulary, on_unknown, vocab_size, token_dtype)
        else:
            loaded = load_corpus(
                corpus, (start, end), name_augmentation, seed, vocabulary, tokenizer, on_unknown, vocab_size
            )
        self.tokenizer, self.train_tokens, self.val_tokens, self.text_tokens, length = loaded
        vocab_size = self.vocab_size = len(self.tokenizer)
        # plain values that describe the tokenizer: the hyper-parameters go into every checkpoint
        if vocabulary is not None or not token_files:
            vocabulary = "".join(self.tokenizer.vocabulary)
        self.save_hyperparameters()
        self.refuse_short(block_size, length, (start, end))

    def refuse_short(self, block_size: int, length: int | None, shares: tuple[float, float]) -> None:
        """Raises ValueError if a split has no window; `length` is the text's in characters, if there is a text."""
        parts = {"training": len(self.text_tokens), "validation": len(self.val_tokens)}
        for name, tokens in parts.items():
            if tokens > block_size:
                continue
            of, remedy = "tokens", "take a longer text"
            if length is not None:
                of = f"of the text's {length:,} characters" if tokens <= length else "tokens"
                per_token = length * shares[1] / max(1, sum(parts.values()))  # characters, about
                share = min(shares[0], shares[1] - shares[0])
                needed = math.ceil((block_size + 1) * max(1.0, per_token) / share) + 1
                remedy = f"that takes a text of some {needed:,} characters at data.split={shares[0]}"
            smaller = min(parts.values()) - 1
            raise ValueError(
                f"the {name} split has {tokens:,} {of}, too few for one window of block_size={block_size} "
                f"and the one after it: {remedy}"
                + (f", or --model.block_size {smaller} at most" if smaller > 0 else "")
            )

    def refuse_unequal_shares(self, devices: int) -> None:
        batch_size = self.hparams.batch_size
        if batch_size % devices:
            low = batch_size // devices * devices
            nearest = f"{low} or {low + devices}" if low else f"{devices}"
            raise ValueError(
                f"data.batch_size={batch_size} can't be shared equally by {devices} devices: take {nearest}"
            )

    def train_dataloader(self) -> RandomWindows:
        t, hp = self.trainer, self.hparams
        self.refuse_unequal_shares(t.world_size)
        if not isinstance(t.limit_train_batches, int) and (t.max_epochs or 0) > 0:
            raise ValueError(
                f"trainer.max_epochs={t.max_epochs}: windows are drawn without end, so no epoch ends; give max_steps, "
                "or say by limit_train_batches how many batches an epoch has"
            )

        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # by its numbers it is

        def numbers() -> Iterator[int]:
            """Of the batches from here on: epochs go on in one endless row, except that overfit_batches repeats."""
            seen, n = t.fit_loop.total_batch_idx + 1, t.overfit_batches  # `seen` as the Trainer has restored it
            return (k % n for k in count(seen)) if isinstance(n, int) and n else count(seen)

        return RandomWindows(
            self.train_tokens, hp.block_size, hp.batch_size, hp.seed, numbers, t.global_rank, t.world_size
        )

    def val_dataloader(self) -> SequentialWindows:
        t, hp = self.trainer, self.hparams
        share = max(1, hp.batch_size // t.world_size)
        return SequentialWindows(self.val_tokens, hp.block_size, share, t.global_rank, t.world_size)

    def test_dataloader(self) -> SequentialWindows:
        return self.val_dataloader()

    def on_after_batch_transfer(self, window: Tensor, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T), int64: tokens travel to the device in their smallest type."""
        window = window.long()
        return window[:, :-1], window[:, 1:]
