"""Tokenizers: characters, bytes, byte pairs (BPE) and GPT-2's. Each is rebuilt from a dict of plain values.

A tokenizer has `encode` (text to int64 ids), `decode`, `decode_bytes` (ids to UTF-8, which may end inside a character),
`unknown` (the parts of a text that have no id), `len`, and `chars_per_token`, with which losses over different
vocabularies can be compared. It counts the bytes of each id that begin a character, so that the counts of a text's
tokens sum to its length.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from threading import Event, Thread
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import import_optional, print_info

REPLACEMENT = "\ufffd"  # represents characters without an id
SPACE_BOUNDARY = re.compile(r"\S(?=[ \n])")
MAX_WORD = 2**10  # characters; longer words are split, because the time to train BPE is quadratic in a word's length
MAX_CACHED_WORD = 2**6  # characters; the ids of longer words are not cached, as they rarely recur


def run_in_thread(work: Callable[[], None]) -> None:
    """Runs a library call that releases the GIL in a thread, so that Ctrl-C interrupts it at once."""
    failed, done = list[BaseException](), Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        done.set()

    Thread(target=run, daemon=True).start()
    while not done.wait(0.2):  # Windows ignores Ctrl-C during a wait without a timeout
        pass
    if failed:
        raise failed[0]


def _code_points(text: str) -> Tensor:
    """Returns the Unicode code points of a text, int32 (T,), without a loop over its characters."""
    data = bytearray(text.encode("utf-32-le", "surrogatepass"))
    return torch.frombuffer(data, dtype=torch.int32) if text else torch.empty(0).int()


class Tokenizer:
    """The base of all tokenizers, whose ids stand for bytes.

    Attributes:
        name: the value of `data.tokenizer`.
        vocabulary: what a checkpoint needs to rebuild it: characters or merges.
        size: vocabulary size.
    """

    name: str
    vocabulary: str | tuple[str, ...] = ""
    on_unknown = "error"
    size: int

    def __len__(self) -> int:
        return self.size

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Whether each id stands for the same text in both."""
        return (self.name, self.vocabulary, len(self)) == (other.name, other.vocabulary, len(other))

    @classmethod
    def from_state(cls, state: dict, size: int | None) -> "Tokenizer":
        """Rebuilds a tokenizer from `state()`, with `size` ids."""
        return cls(size)  # type: ignore[call-arg]

    def state(self) -> dict[str, Any]:
        """Returns the settings of `TextDataModule` that describe it, as plain values."""
        vocabulary = "".join(self.vocabulary) if self.name in ("char", "bpe") else None
        size = None if self.name == "char" else len(self)
        return {"tokenizer": self.name, "vocabulary": vocabulary, "on_unknown": self.on_unknown, "vocab_size": size}

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each id in use."""
        raise NotImplementedError

    @property
    def chars_per_token(self) -> Tensor | None:
        """How many characters begin in each id's bytes, (size,), int64; None if unknown."""
        counts = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in self.pieces]
        return torch.tensor(counts + [0] * (self.size - len(counts)))

    def unknown(self, text: str) -> str:
        """Returns the parts of `text` that have no id."""
        return ""

    def encode(self, text: str) -> Tensor:
        """Returns token ids (T,), int64."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> str:
        return self.decode_bytes(ids.flatten().tolist()).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the text's UTF-8; an unused id becomes an invalid byte, which decodes to U+FFFD."""
        return b"".join(self.pieces[i] if i < len(self.pieces) else b"\xff" for i in ids)


class CharTokenizer(Tokenizer):
    """One token per character; a character's id is its index in `vocabulary`.

    Args:
        vocabulary: the characters; characters added at the end do not change the other ids.
        on_unknown: error raises an error for other characters, drop removes them, replace encodes them as U+FFFD.
    """

    name = "char"
    vocabulary: str

    def __init__(self, vocabulary: str, on_unknown: str = "error"):
        self.on_unknown = on_unknown
        self.vocabulary = "".join(dict.fromkeys(vocabulary + (REPLACEMENT if on_unknown == "replace" else "")))
        codes = _code_points(self.vocabulary).long()
        self._id_of = torch.full((max(codes.tolist(), default=0) + 2,), -1)  # the last entry: larger code points
        self._id_of[codes] = torch.arange(len(codes))
        self.size = len(self.vocabulary)

    @classmethod
    def from_state(cls, state: dict, size: int | None) -> Tokenizer:
        return cls(state["vocabulary"], state.get("on_unknown") or "error")

    @property
    def chars_per_token(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.int64)

    def unknown(self, text: str) -> str:
        """Returns the characters of `text` that have no id, sorted."""
        return "".join(sorted(set(text) - set(self.vocabulary)))

    def encode(self, text: str) -> Tensor:
        """Returns token ids (T,), int64.

        Raises:
            ValueError: on_unknown is error and some characters are unknown, or it is drop and all are; names them.
        """
        ids = self._id_of[_code_points(text).clamp(max=len(self._id_of) - 1)]
        known = ids >= 0
        if known.all():
            return ids
        if self.on_unknown == "replace":
            return torch.where(known, ids, self._id_of[ord(REPLACEMENT)])
        if self.on_unknown == "drop" and known.any():
            return ids[known]
        raise ValueError(
            f"the text has characters that this vocabulary of {len(self)} lacks: {self.unknown(text)[:40]!r}; "
            "remove them, or train with --data.on_unknown drop, replace or extend. "
            f"The vocabulary is {self.vocabulary[:100]!r}"
        )

    def decode(self, ids: Tensor) -> str:
        return "".join(self.vocabulary[i] for i in ids.flatten().tolist())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.vocabulary[i] for i in ids).encode(errors="replace")


def _resolve_size(size: int | None, needed: int, name: str) -> int:
    if size is not None and size < needed:
        raise ValueError(f"vocab_size={size} is less than the {needed:,} ids of {name}")
    return size or needed


class ByteTokenizer(Tokenizer):
    """One token per byte of the text in UTF-8.

    Args:
        size: vocabulary size; None is 256, a larger number adds unused ids.
    """

    name = "byte"
    pieces = [bytes([byte]) for byte in range(256)]  # type: ignore[assignment]

    def __init__(self, size: int | None = None):
        self.size = _resolve_size(size, 256, "bytes")

    def encode(self, text: str) -> Tensor:
        """Returns token ids, int64, one per byte of the text."""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))


def long_word_pattern() -> re.Pattern[str]:
    """Returns the pattern that splits a word longer than MAX_WORD, see `split_words`."""
    return re.compile(rf"(?s).{{1,{MAX_WORD}}}\Z|.{{1,{MAX_WORD}}}(?<=[^\W_])(?=\W)|.{{{MAX_WORD}}}")


def split_words(text: str) -> list[str]:
    """Splits a text into words with the space before them; GPT-2's pattern always splits at these positions too.

    A word longer than MAX_WORD characters, as in a text without spaces, is split between a letter or digit and a
    character that is neither, where GPT-2's pattern also splits; without such a position, after MAX_WORD characters.
    """
    words = re.split(r"(?<=\S)(?=[ \n])", text)
    if max(map(len, words)) <= MAX_WORD:
        return words
    return [part for word in words for part in (long_word_pattern().findall(word) if len(word) > MAX_WORD else [word])]


def cut_at_spaces(pieces: Iterable[str], length: int) -> Iterator[str]:
    """Yields the text in pieces of about `length` characters, MAX_WORD at least, cut between words of `split_words`.

    BPE therefore gives the same ids for the pieces as for the complete text.
    """
    rest, length = "", max(length, MAX_WORD)
    for piece in pieces:
        rest += piece
        pos = 0
        while len(rest) - pos > 2 * length:
            stop = pos + length
            for start in max(pos, stop - 2 * MAX_WORD), pos:  # usually there is a space near `stop`
                if cuts := [match.end() for match in SPACE_BOUNDARY.finditer(rest, start, stop + 1)]:
                    break
            else:  # one long word
                cuts = [
                    end
                    for match in long_word_pattern().finditer(rest, pos, stop + MAX_WORD)
                    if (end := match.end()) <= stop
                ]
            yield rest[pos : cuts[-1]]
            pos = cuts[-1]
        rest = rest[pos:]
    if rest:
        yield rest


def byte_symbols() -> dict[int, str]:
    """Maps each byte to the printable character that represents it in GPT-2's merges, in the order of GPT-2's ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class BPETokenizer(Tokenizer):
    """Byte-level byte pair encoding (GPT-2, section 2.2): frequent pairs of tokens are merged into one token.

    Ids are numbered as in GPT-2: 256 bytes, then one id per merge. `encode` and `merges_of` need the `tokenizers`
    library.

    Args:
        merges: a pair of tokens per line, in the format of GPT-2's merges.txt, see `byte_symbols`.
        size: vocabulary size; None is as many as the merges need, a larger number adds unused ids.
    Raises:
        ValueError: a line is not a pair of tokens that are bytes or made by earlier lines.
    """

    name = "bpe"
    vocabulary: str

    def __init__(self, merges: str, size: int | None = None):
        self.vocabulary, self.pairs = merges, [tuple(line.split(" ")) for line in merges.split("\n") if line]
        symbols = byte_symbols()
        ids = {symbol: i for i, symbol in enumerate(symbols.values())}
        for pair in self.pairs:
            if len(pair) != 2 or not ids.keys() >= set(pair):
                raise ValueError(
                    f"{' '.join(pair)[:60]!r} is not a merge of two tokens from earlier lines: give BPE merges"
                )
            ids.setdefault("".join(pair), len(ids))
        self.tokens = list(ids)
        byte_of = {symbol: byte for byte, symbol in symbols.items()}
        self.pieces = [bytes(byte_of[symbol] for symbol in token) for token in self.tokens]
        self.size = _resolve_size(size, len(self.pieces), "these merges")
        self.ids_of: dict[str, list[int]] = {}  # cache: word -> ids

    @classmethod
    def merges_of(cls, text: Iterable[str], size: int, show_progress: bool = False) -> str:
        """Trains BPE: returns the merges of a text's most frequent pairs, up to `size` ids; deterministic."""
        if size < 256:
            raise ValueError(f"vocab_size={size} must be at least 256: every byte has an id")
        lib = import_optional("tokenizers", "tokenizers")
        engine = lib.Tokenizer(lib.models.BPE())
        engine.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = lib.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=show_progress,  # only shown on a terminal
        )

        def sequences() -> Iterator[str | list[str]]:
            for piece in cut_at_spaces(text, 2**20):
                words = split_words(piece)
                has_long_word = len(words) > 1 + len(SPACE_BOUNDARY.findall(piece))
                yield words if has_long_word else piece  # a str is faster

        run_in_thread(lambda: engine.train_from_iterator(sequences(), trainer))
        return "\n".join(" ".join(pair) for pair in json.loads(engine.to_str())["model"]["merges"])

    @classmethod
    def from_state(cls, state: dict, size: int | None) -> Tokenizer:
        return cls(state["vocabulary"], size)

    @cached_property
    def engine(self):
        """The tokenizer of the `tokenizers` library.

        Raises:
            ValueError: the library is not installed.
        """
        lib = import_optional("tokenizers", "tokenizers")
        engine = lib.Tokenizer(lib.models.BPE({token: i for i, token in enumerate(self.tokens)}, self.pairs))
        engine.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = lib.decoders.ByteLevel()
        return engine

    def encode(self, text: str) -> Tensor:
        words = split_words(text)
        if len(self.ids_of) > 2**20:
            self.ids_of.clear()
        new = [word for word in dict.fromkeys(words) if word not in self.ids_of]
        for batch in (new[i : i + 2**12] for i in range(0, len(new), 2**12)):  # Ctrl-C interrupts between batches
            for word, encoded in zip(
                batch, self.engine.encode_batch_fast(batch, add_special_tokens=False), strict=True
            ):
                self.ids_of[word] = encoded.ids
        ids = np.fromiter(chain.from_iterable(map(self.ids_of.__getitem__, words)), np.int64)
        for word in new:
            if len(word) > MAX_CACHED_WORD:
                del self.ids_of[word]
        return torch.from_numpy(ids)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE with 50,257 tokens, from the `tiktoken` library, which downloads the vocabulary on first use.

    Args:
        size: vocabulary size; None is 50,257, a larger number adds unused ids.
    """

    name = "gpt2"

    def __init__(self, size: int | None = None):
        self.size = _resolve_size(size, 50257, "GPT-2's tokens")

    @cached_property
    def engine(self):
        """The tokenizer of the `tiktoken` library.

        Raises:
            ValueError: the library is not installed, or the vocabulary is not cached and can't be downloaded.
        """
        tiktoken = import_optional("tiktoken", "tokenizers")
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # any network error
            raise ValueError(
                f"GPT-2's vocabulary is not on this machine and can't be downloaded ({type(error).__name__}): "
                "connect to the network once, or set TIKTOKEN_CACHE_DIR to a copy of another machine's cache; "
                "the tokenizers byte and bpe need no network"
            ) from None

    @cached_property
    def pieces(self) -> list[bytes]:
        return [self.engine.decode_single_token_bytes(i) for i in range(self.engine.n_vocab)]

    @property
    def chars_per_token(self) -> Tensor:
        counts = cast(Tensor, super().chars_per_token)
        counts[self.engine.eot_token] = 0  # <|endoftext|> is not part of a text
        return counts

    def encode(self, text: str) -> Tensor:
        pieces = list(cut_at_spaces([text], 2**16))
        ids = self.engine.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)
        return torch.tensor([i for piece in ids for i in piece], dtype=torch.int64)


class TokenIds(Tokenizer):
    """Text is ids written as numbers, "464 3290 "; for token files whose tokenizer is not known."""

    name = "ids"
    vocabulary = ("0",)  # the default prompt
    chars_per_token = None

    def __init__(self, size: int | None):
        self.size = size or 1

    def unknown(self, text: str) -> str:
        """Returns the words of `text` that are not ids, or `text` if it has no words."""
        words = text.split()
        return " ".join(word for word in words if not (word.isdecimal() and int(word) < self.size)) if words else text

    def encode(self, text: str) -> Tensor:
        """Returns token ids (T,), int64.

        Raises:
            ValueError: a word is not an id, or the text is empty; names such words.
        """
        if (unknown := self.unknown(text)) or not text:
            raise ValueError(
                f"this model needs token ids from 0 to {self.size - 1}, written as numbers, not {unknown[:40]!r}"
            )
        return torch.tensor([int(word) for word in text.split()])

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(f"{i} " for i in ids).encode()


TOKENIZER_TYPES: dict[str, type[Tokenizer]] = {
    cls.name: cls for cls in (CharTokenizer, ByteTokenizer, BPETokenizer, GPT2Tokenizer, TokenIds)
}


def build_from_state(state: dict, size: int | None) -> Tokenizer:
    """Rebuilds a tokenizer from the data module's hyper-parameters, for example those in a checkpoint.

    Args:
        state: a dict with tokenizer, vocabulary, on_unknown and token_files, as in `TextDataModule`.
        size: vocabulary size of the net; ids beyond the tokenizer's are unused.
    Raises:
        ValueError: there is no such tokenizer, or its vocabulary is invalid or larger than `size`.
    """
    name = state.get("tokenizer") or ("ids" if state.get("token_files") else "char")
    if name not in TOKENIZER_TYPES:
        raise ValueError(f"there is no tokenizer {name!r}: use char, byte, bpe or gpt2")
    return TOKENIZER_TYPES[name].from_state(state, size)


DEFAULT_BPE_SIZE = 512  # vocabulary size
TextPieces = Callable[[], Iterable[str]]  # each call reads a text again, in pieces


def distinct_characters(pieces: Iterable[str], at_least: int = 1) -> str:
    """Returns the distinct characters that occur at least `at_least` times in a text, sorted."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for piece in pieces:
        counts += np.bincount(np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32), minlength=len(counts))
    return "".join(map(chr, np.flatnonzero(counts >= at_least)))


class TokenizerSettings(NamedTuple):
    """The settings of `TextDataModule` from which a tokenizer is built."""

    tokenizer: str
    vocabulary: str | None = None
    on_unknown: str = "error"
    vocab_size: int | None = None


def build_tokenizer(settings: TokenizerSettings, text: TextPieces, training_text: TextPieces) -> Tokenizer:
    """Builds a tokenizer for a text, from a given vocabulary if there is one.

    Args:
        text: the complete text; its characters are the vocabulary of char.
        training_text: the training split; BPE is trained on it, and `replace` counts characters in it.
    Raises:
        ValueError: `vocab_size` or `vocabulary` does not suit the tokenizer.
    """
    kind, vocabulary, on_unknown, size = settings
    if kind in ("byte", "gpt2"):
        return TOKENIZER_TYPES[kind].from_state({}, size)
    if kind == "bpe":
        if vocabulary is None:
            is_long = len(next(iter(training_text()), "")) > 2**20
            vocabulary = BPETokenizer.merges_of(training_text(), DEFAULT_BPE_SIZE if size is None else size, is_long)
            if (found := len(BPETokenizer(vocabulary))) < (size or 0):
                print_info(
                    f"the training text has pairs for {found:,} ids; the other ids of vocab_size={size:,} are unused"
                )
        return BPETokenizer(vocabulary, size)
    if vocabulary is None:
        # the token for unknown characters is trained only if the training text has unknown characters
        vocabulary = distinct_characters(training_text(), 2) if on_unknown == "replace" else distinct_characters(text())
    elif on_unknown == "extend":
        vocabulary += distinct_characters(text())
    tokenizer = CharTokenizer(vocabulary, "error" if on_unknown == "extend" else on_unknown)
    if size not in (None, len(tokenizer)):
        raise ValueError(
            f"data.vocab_size={size} is for token files, bpe and padding: this text has {len(tokenizer)} characters: "
            "leave data.vocab_size out"
        )
    return tokenizer


def smallest_dtype(vocab_size: int) -> torch.dtype:
    """Returns the smallest integer type that holds all token ids."""
    return torch.uint8 if vocab_size <= 2**8 else torch.int16 if vocab_size <= 2**15 else torch.int32
