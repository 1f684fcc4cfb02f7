"""`TextDataModule`: Tiny Shakespeare or any other text, as windows of token ids."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor

from ..errors import print_info
from .augment import NameAugmenter
from .corpus import TINY_SHAKESPEARE, find_files, read_files, report_changes
from .token_cache import CACHE_FROM_BYTES, cached_tokens
from .tokenizers import Tokenizer, TokenizerSettings, build_from_state, build_tokenizer, smallest_dtype
from .windows import Pairs, RandomWindows, SequentialWindows, derive_seed, inputs_and_targets, open_token_file


class Corpus(NamedTuple):
    """A text as token ids (N,), split for training and validation."""

    tokenizer: Tokenizer
    train_tokens: Tensor  # with name augmentation
    val_tokens: Tensor
    text_tokens: Tensor  # the training split without name augmentation
    length: int | None  # characters of the text; None for token files


def load_token_files(token_files: str, token_dtype: str, settings: TokenizerSettings) -> Corpus:
    """Memory-maps a training and a validation file of token ids; see `TextDataModule` for the arguments.

    Raises:
        ValueError: the files do not match the vocabulary. OSError: a file can't be read.
    """
    name, files = settings.tokenizer, [file.strip() for file in token_files.split(",")]
    if name in ("char", "bpe") and settings.vocabulary is None:
        raise ValueError(f"data.tokenizer={name} for token files needs data.vocabulary, with which they were made")
    size = 50257 if settings.vocab_size is None and name == "gpt2" else settings.vocab_size
    if len(files) != 2 or not size:
        raise ValueError(
            f"data.token_files={','.join(files)} with data.vocab_size={size}: give a training and a "
            "validation file (train.bin,val.bin), and their vocabulary size (50257 for GPT-2's)"
        )
    train_tokens, val_tokens = (open_token_file(file, token_dtype, size) for file in files)
    built = build_from_state(settings._asdict(), size)
    if len(built) != size:
        raise ValueError(f"data.vocab_size={size} must be {len(built)}, the number of tokens in data.vocabulary")
    return Corpus(built, train_tokens, val_tokens, train_tokens, None)


def load_corpus(
    corpus: str | None, split: tuple[float, float], name_augmentation: int, seed: int, settings: TokenizerSettings
) -> Corpus:
    """Reads, splits and encodes text files; see `TextDataModule` for the arguments (`split` is a pair here).

    Raises:
        ValueError: the text is empty, not UTF-8 or has unknown characters. OSError: a file can't be read.
    """
    if settings.tokenizer == "ids":
        raise ValueError("data.tokenizer=ids needs token files: add data.token_files=train.bin,val.bin")

    def bounds(length: int) -> tuple[int, int]:
        return int(split[0] * length), int(split[1] * length)

    files = [TINY_SHAKESPEARE] if corpus is None else find_files(corpus)
    keep_returns = "\r" in (settings.vocabulary or "")  # only a vocabulary of characters can have one
    large = sum(file.stat().st_size for file in files) >= CACHE_FROM_BYTES
    if large:
        built, train_tokens, val_tokens, length = cached_tokens(files, bounds, settings, keep_returns)
        if name_augmentation:
            print_info(f"data.name_augmentation={name_augmentation} is for small texts; this one is not augmented")
    else:
        notes: Counter[str] = Counter()
        text = "".join(read_files(files, keep_returns, notes))
        report_changes(notes)
        length, (n, stop) = len(text), bounds(len(text))
        built = build_tokenizer(settings, lambda: [text], lambda: [text[:n]])
        dtype = smallest_dtype(len(built))
        train_tokens, val_tokens = (
            built.encode(part).to(dtype) if part else torch.empty(0, dtype=dtype) for part in (text[:n], text[n:stop])
        )
    if corpus is not None and not Path(corpus).expanduser().is_file():  # several files: say how many
        print_info(f"the corpus {corpus[:100]} is {len(files):,} files with {length:,} characters")
    text_tokens = train_tokens
    if name_augmentation and not large:
        augmenter = NameAugmenter(text[:n])
        copies = "".join(augmenter.copy(derive_seed(seed, k)) for k in range(name_augmentation))
        copies = copies.translate(dict.fromkeys(map(ord, built.unknown(copies))))  # letters of invented names
        if copies:
            train_tokens = torch.cat((train_tokens, built.encode(copies).to(dtype)))
    return Corpus(built, train_tokens, val_tokens, text_tokens, length)


class TextDataModule(L.LightningDataModule):
    """Tiny Shakespeare or any other text, as windows of token ids.

    The first part of the text is the training split, the rest the validation split, which is also the test split.
    Without a Trainer, the loaders yield pairs of inputs and targets (B, T), int64; training batches never end.

    Args:
        corpus: a UTF-8 text file, a folder of .txt files, a pattern such as plays/*.md, or a comma-separated list of
            these; hidden files in a folder are skipped. null is Tiny Shakespeare, which comes with the package. For
            texts of 16 MB or more, token ids are written to ~/.cache (or XDG_CACHE_HOME) and memory-mapped.
        block_size: length of a window, in tokens.
        batch_size: windows in a training batch, over all devices together: the number of devices does not change what
            a step learns from.
        split: fraction of the text to train on, between 0 and 1; the rest is the validation split. Two fractions, such
            as [0.81, 0.9], train on the text up to the first and validate between the two, to tune settings without
            using the real validation split.
        name_augmentation: number of copies of the training text with invented names to add, see augment.py.
        seed: determines which windows make up batch k.
        vocabulary: the characters that have a token id, or the merges of bpe; null builds it from the corpus. A
            checkpoint stores its vocabulary.
        tokenizer: char, byte, bpe (trained on this corpus) or gpt2; null is char, or ids for token files.
        on_unknown: what to do with characters that have no id. error: stop; drop: remove them; replace: encode all as
            one token, which a new vocabulary trains on the characters that occur once in the training text; extend: add
            each to the vocabulary, to fine-tune on a text with new characters.
        token_files: a training and a validation file of token ids instead of a corpus, "train.bin,val.bin", in
            nanoGPT's format; they may be larger than memory.
        vocab_size: number of token ids. Token files need it unless tokenizer is gpt2; bpe is trained to it (default
            512); byte and gpt2 are padded to it.
        token_dtype: integer type of the ids in token files.
    Raises:
        ValueError: the text is empty, not UTF-8, too short for one window or has unknown characters.
    """

    vocab_size: int  # linked to model.vocab_size by the command line
    fixed_shape = True  # of all training batches, so that a step can be captured

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
                f"data.split={split} must be a fraction greater than 0 and less than 1, or two increasing fractions"
            )
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        if token_files and corpus is not None:
            raise ValueError(
                f"data.token_files={token_files} and data.corpus={corpus} are two texts: set one of them to null"
            )
        tokenizer = tokenizer or ("ids" if token_files else "char")
        settings = TokenizerSettings(tokenizer, vocabulary, on_unknown, vocab_size)
        if token_files:
            loaded = load_token_files(token_files, token_dtype, settings)
        else:
            loaded = load_corpus(corpus, (start, end), name_augmentation, seed, settings)
        self.tokenizer, self.train_tokens, self.val_tokens, self.text_tokens, length = loaded
        vocab_size = self.vocab_size = len(self.tokenizer)
        # the hyper-parameters go into every checkpoint and have to describe the tokenizer
        if vocabulary is not None or not token_files:
            vocabulary = "".join(self.tokenizer.vocabulary)
        self.save_hyperparameters()
        self.check_length(block_size, length, (start, end))

    def check_length(self, block_size: int, length: int | None, split: tuple[float, float]) -> None:
        """Raises ValueError if a split has less than one window.

        Args:
            length: characters of the text; None for token files.
            split: where the training and the validation split end, as fractions of the text.
        """
        parts = {"training": len(self.text_tokens), "validation": len(self.val_tokens)}
        for name, tokens in parts.items():
            if tokens > block_size:
                continue
            unit, remedy = "tokens", "use a longer text"
            if length is not None:
                unit = f"of the text's {length:,} characters" if tokens <= length else "tokens"
                chars_per_token = length * split[1] / max(1, sum(parts.values()))  # approximately
                fraction = min(split[0], split[1] - split[0])
                needed = math.ceil((block_size + 1) * max(1.0, chars_per_token) / fraction) + 1
                remedy = f"use a text of about {needed:,} characters at data.split={split[0]}"
            max_block_size = min(parts.values()) - 1
            raise ValueError(
                f"the {name} split has {tokens:,} {unit}, too few for one window of block_size={block_size} "
                f"and its last target: {remedy}"
                + (f", or --model.block_size {max_block_size} or less" if max_block_size > 0 else "")
            )

    def check_batch_size(self, devices: int) -> None:
        """Raises ValueError if the global batch can't be divided equally among the devices."""
        batch_size = self.hparams.batch_size
        if batch_size % devices:
            low = batch_size // devices * devices
            nearest = f"{low} or {low + devices}" if low else f"{devices}"
            raise ValueError(f"data.batch_size={batch_size} is not divisible by the {devices} devices: use {nearest}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"trainer": None}  # a Trainer's running loops can't be pickled

    def running_trainer(self) -> L.Trainer | None:
        """The Trainer while it runs; None before, after and without one."""
        return self.trainer if self.trainer is not None and self.trainer.state.status == "running" else None

    def train_dataloader(self) -> RandomWindows | Pairs:
        t, hp = self.running_trainer(), self.hparams
        if t is None:
            return Pairs(RandomWindows(self.train_tokens, hp.block_size, hp.batch_size, hp.seed))
        self.check_batch_size(t.world_size)
        if not isinstance(t.limit_train_batches, int) and (t.max_epochs or 0) > 0:
            raise ValueError(
                f"trainer.max_epochs={t.max_epochs}: random windows never run out, so no epoch ends: give max_steps, "
                "or the number of batches in an epoch as limit_train_batches"
            )

        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it resumes by batch number

        def numbers() -> Iterator[int]:
            """Yields the numbers of the remaining batches, consecutive across epochs; overfit_batches repeats some."""
            start, n = t.fit_loop.total_batch_idx + 1, t.overfit_batches  # `start` is restored from a checkpoint
            return (k % n for k in count(start)) if isinstance(n, int) and n else count(start)

        return RandomWindows(
            self.train_tokens, hp.block_size, hp.batch_size, hp.seed, numbers, t.global_rank, t.world_size
        )

    def val_dataloader(self) -> SequentialWindows | Pairs:
        t, hp = self.running_trainer(), self.hparams
        if t is None:
            return Pairs(SequentialWindows(self.val_tokens, hp.block_size, hp.batch_size))
        per_rank = max(1, hp.batch_size // t.world_size)
        return SequentialWindows(self.val_tokens, hp.block_size, per_rank, t.global_rank, t.world_size)

    def test_dataloader(self) -> SequentialWindows | Pairs:
        return self.val_dataloader()

    def predict_dataloader(self) -> SequentialWindows | Pairs:
        return self.val_dataloader()

    def on_after_batch_transfer(self, window: Tensor, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets (B, T): windows are copied to the device in their small dtype."""
        return inputs_and_targets(window)
