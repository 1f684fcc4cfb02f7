"""Tiny Shakespeare, or another text, as windows of tokens. Knows nothing of the model."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from ..errors import print_info
from .augment import NameAugmenter
from .corpus import TINY_SHAKESPEARE, find_files, read_files, report_changes
from .token_cache import CACHE_FROM_BYTES, cached_tokens
from .tokenizers import Tokenizer, build_from_state, build_tokenizer, smallest_dtype
from .windows import RandomWindows, SequentialWindows, derive_seed, open_token_file


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

    vocab_size: int
    tokenizer: Tokenizer

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
        if token_files:
            if tokenizer in ("char", "bpe") and vocabulary is None:
                raise ValueError(f"data.tokenizer={tokenizer} for token files needs the vocabulary that made them")
            kinds = vocab_size or (50257 if tokenizer == "gpt2" else None)
            if corpus is not None:
                raise ValueError(
                    f"data.token_files={token_files} and data.corpus={corpus} are two texts: give null for one"
                )
            self.take_tokens([file.strip() for file in token_files.split(",")], kinds, token_dtype)
            plain = {"tokenizer": tokenizer or "ids", "vocabulary": vocabulary, "on_unknown": on_unknown}
            self.tokenizer = build_from_state(plain, kinds)
            if len(self.tokenizer) != kinds:
                raise ValueError(f"data.vocab_size={kinds}, and data.vocabulary has {len(self.tokenizer)} tokens")
            if vocabulary is not None:
                vocabulary = "".join(self.tokenizer.vocabulary)  # each of them once
            self.save_hyperparameters()
            self.refuse_short(block_size, None, (start, end))
            return
        if tokenizer == "ids":
            raise ValueError("data.tokenizer=ids is for token files: give data.token_files=train.bin,val.bin too")

        def bounds(length: int) -> tuple[int, int]:
            return int(start * length), int(end * length)

        kind, files = tokenizer or "char", [TINY_SHAKESPEARE] if corpus is None else find_files(corpus)
        keep_returns = "\r" in (vocabulary or "")  # of characters: no other vocabulary has one
        large = sum(file.stat().st_size for file in files) >= CACHE_FROM_BYTES
        if large:
            self.tokenizer, self.train_tokens, self.val_tokens, length = cached_tokens(
                files, bounds, kind, vocabulary, on_unknown, vocab_size, keep_returns
            )
            if name_augmentation:
                print_info(f"data.name_augmentation={name_augmentation} is for small texts; this one goes without")
        else:
            notes: Counter[str] = Counter()
            text = "".join(read_files(files, keep_returns, notes))
            report_changes(notes)
            length, (n, stop) = len(text), bounds(len(text))
            self.tokenizer = build_tokenizer(
                kind, lambda: [text], lambda: [text[:n]], vocabulary, on_unknown, vocab_size
            )
            smallest = smallest_dtype(len(self.tokenizer))
            self.train_tokens, self.val_tokens = (
                self.tokenizer.encode(piece).to(smallest) if piece else torch.empty(0, dtype=smallest)
                for piece in (text[:n], text[n:stop])
            )
        if corpus is not None and not Path(corpus).expanduser().is_file():  # else which files these are is no question
            print_info(f"the corpus {corpus[:100]} is {len(files):,} files with {length:,} characters")
        # plain values: they make the checkpoint's tokenizer and data settings
        vocabulary = "".join(self.tokenizer.vocabulary)
        self.vocab_size = len(self.tokenizer)
        self.save_hyperparameters()
        self.text_tokens = self.train_tokens  # without the copies below
        self.refuse_short(block_size, length, (start, end))
        if name_augmentation and not large:
            play = NameAugmenter(text[:n])
            copies = "".join(play.copy(derive_seed(seed, k)) for k in range(name_augmentation))
            copies = copies.translate(dict.fromkeys(map(ord, self.tokenizer.unknown(copies))))  # of invented names
            self.train_tokens = torch.cat((self.train_tokens, self.tokenizer.encode(copies).to(smallest)))

    def take_tokens(self, files: list[str], kinds: int | None, token_dtype: str) -> None:
        if len(files) != 2 or not kinds:
            raise ValueError(
                f"data.token_files={','.join(files)} with data.vocab_size={kinds}: give two files, to train and to "
                "validate on (train.bin,val.bin), and how many kinds of tokens they have (50257 for GPT-2's)"
            )
        self.vocab_size = kinds
        self.train_tokens, self.val_tokens = (open_token_file(file, token_dtype, kinds) for file in files)
        self.text_tokens = self.train_tokens

    def refuse_short(self, block_size: int, length: int | None, shares: tuple[float, float]) -> None:
        """Raises ValueError if a split has no window; `length` is the text's in characters, if there is a text."""
        parts = {"training": len(self.train_tokens), "validation": len(self.val_tokens)}
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
