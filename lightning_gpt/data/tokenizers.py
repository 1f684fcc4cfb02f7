"""Text to token ids and back: characters, bytes, byte pairs, GPT-2's. What it takes to rebuild one is plain data.

A tokenizer has `encode` (text to int64 ids), `decode`, `decode_bytes` (ids to UTF-8, which may end within a character),
`unknown` (what of a text has no id), `len`, and `characters`: how many characters of the text each id stands for, so
that losses over different vocabularies compare. An id of several bytes counts those bytes that begin a character, so
the counts of a text's tokens add up to its length.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import import_optional, print_info

REPLACEMENT = "\ufffd"  # what stands for a character without an id of its own
SPACE_BOUNDARY = re.compile(r"\S(?=[ \n])")
MAX_WORD = 2**10  # characters of a word, before it is cut: finding pairs takes a time of the square of a word's length
MAX_CACHED_WORD = 2**6  # characters of a word whose ids are kept, as it may come again


def run_in_thread(work: Callable[[], None]) -> None:
    """Do a long work of a library that lets Python go on meanwhile, so that Ctrl-C is heard at once."""
    failed, done = list[BaseException](), Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        done.set()

    Thread(target=run, daemon=True).start()
    while not done.wait(0.2):  # Windows hears nothing during a wait without an end
        pass
    if failed:
        raise failed[0]


def _code_points(text: str) -> Tensor:
    """Unicode code points of a text, int32 (T,); in one go, as a loop over a million characters is slow."""
    data = bytearray(text.encode("utf-32-le", "surrogatepass"))
    return torch.frombuffer(data, dtype=torch.int32) if text else torch.empty(0).int()


class CharTokenizer:
    """One token per character; a character's id is its place in `vocabulary`.

    Args:
        vocabulary: the characters; a longer vocabulary that begins with this one leaves all ids as they are.
        on_unknown: other characters are an error, or drop out, or become one token, written as U+FFFD (replace).
    """

    def __init__(self, vocabulary: str, on_unknown: str = "error"):
        self.on_unknown = on_unknown
        self.vocabulary = "".join(dict.fromkeys(vocabulary + (REPLACEMENT if on_unknown == "replace" else "")))
        codes = _code_points(self.vocabulary).long()
        self._id_of = torch.full((max(codes.tolist(), default=0) + 2,), -1)  # the last one: all codes beyond
        self._id_of[codes] = torch.arange(len(codes))

    def __len__(self) -> int:
        return len(self.vocabulary)

    @property
    def chars_per_token(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.int64)

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no id, sorted."""
        return "".join(sorted(set(text) - set(self.vocabulary)))

    def encode(self, text: str) -> Tensor:
        """Token ids (T,), int64.

        Raises:
            ValueError: a character is not in the vocabulary and that is an error; all such characters are named. Or
                all have dropped out.
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
            "leave them out, or train with --data.on_unknown drop, replace or extend. "
            f"It knows {self.vocabulary[:100]!r}"
        )

    def decode(self, ids: Tensor) -> str:
        return "".join(self.vocabulary[i] for i in ids.flatten().tolist())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.vocabulary[i] for i in ids).encode(errors="replace")


def _join_bytes(pieces: list[bytes], ids: Sequence[int]) -> bytes:
    """The bytes of ids whose bytes are `pieces`; an id without a meaning is no UTF-8, and shows as U+FFFD."""
    return b"".join(pieces[i] if i < len(pieces) else b"\xff" for i in ids)


def _chars_per_token(pieces: list[bytes], size: int) -> Tensor:
    """How many characters begin in each id's bytes, (size,)."""
    begun = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces]
    return torch.tensor(begun + [0] * (size - len(begun)))


def _resolve_size(size: int | None, needed: int, name: str) -> int:
    if size is not None and size < needed:
        raise ValueError(f"vocab_size={size} is less than the {needed:,} ids of {name}")
    return size or needed


class ByteTokenizer:
    """One token per byte of the text's UTF-8.

    Args:
        size: ids that there are; null has no more than needed, a larger number leaves some without a meaning.
    """

    PIECES = [bytes([byte]) for byte in range(256)]
    vocabulary = ""  # nothing that a checkpoint would have to hold

    def __init__(self, size: int | None = None):
        self.size = _resolve_size(size, 256, "bytes")

    def __len__(self) -> int:
        return self.size

    @property
    def chars_per_token(self) -> Tensor:
        return _chars_per_token(self.PIECES, self.size)

    def unknown(self, text: str) -> str:
        return ""

    def encode(self, text: str) -> Tensor:
        """Token ids, int64, as many as the text has bytes."""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))

    def decode(self, ids: Tensor) -> str:
        return self.decode_bytes(ids.flatten().tolist()).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return _join_bytes(self.PIECES, ids)


def long_word_pattern() -> re.Pattern[str]:
    """Matches the parts of a word that is too long, one after the other."""
    return re.compile(rf"(?s).{{1,{MAX_WORD}}}\Z|.{{1,{MAX_WORD}}}(?<=[^\W_])(?=\W)|.{{{MAX_WORD}}}")


def split_words(text: str) -> list[str]:
    """The text in words, each with the space before it, cut where GPT-2's pattern always cuts: before a space.

    A word of more than WORD characters, as in a text without spaces, is cut behind a letter or digit and before what
    is neither, where the pattern always cuts too; and if it has no such place, after WORD characters.
    """
    words = re.split(r"(?<=\S)(?=[ \n])", text)
    if max(map(len, words)) <= MAX_WORD:
        return words
    return [part for word in words for part in (long_word_pattern().findall(word) if len(word) > MAX_WORD else [word])]


def cut_at_spaces(pieces: Iterable[str], length: int) -> Iterator[str]:
    """The same text in pieces of about `length` characters, and WORD at least, cut between words of `split_words`.

    So byte pairs of the pieces are those of the whole.
    """
    rest, length = "", max(length, MAX_WORD)
    for piece in pieces:
        rest += piece
        at = 0
        while len(rest) - at > 2 * length:
            stop = at + length
            for start in max(at, stop - 2 * MAX_WORD), at:  # a space is near as a rule
                if places := [match.end() for match in SPACE_BOUNDARY.finditer(rest, start, stop + 1)]:
                    break
            else:  # one long word
                places = [
                    end
                    for match in long_word_pattern().finditer(rest, at, stop + MAX_WORD)
                    if (end := match.end()) <= stop
                ]
            yield rest[at : places[-1]]
            at = places[-1]
        rest = rest[at:]
    if rest:
        yield rest


def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in tables of byte pairs, in the order of GPT-2's first ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class BPETokenizer:
    """Byte-level byte pair encoding (GPT-2, section 2.2): frequent neighbours are merged into one token, in turn.

    Ids are GPT-2's: a byte each for the first 256, then one for each merge. The work is the `tokenizers` library's,
    which only `encode` needs.

    Args:
        merges: two tokens a line, their bytes written as `byte_symbols`; the form of GPT-2's merges.txt.
        size: ids that there are; null has no more than needed.
    Raises:
        ValueError: a line is no such pair.
    """

    def __init__(self, merges: str, size: int | None = None):
        self.vocabulary, self.pairs = merges, [tuple(line.split(" ")) for line in merges.split("\n") if line]
        symbols = byte_symbols()
        ids = {symbol: i for i, symbol in enumerate(symbols.values())}
        for pair in self.pairs:
            if len(pair) != 2 or not ids.keys() >= set(pair):
                raise ValueError(
                    f"{' '.join(pair)[:60]!r} is no merge of two tokens that earlier lines make: give merges"
                )
            ids.setdefault("".join(pair), len(ids))
        self.tokens = list(ids)
        byte_of = {symbol: byte for byte, symbol in symbols.items()}
        self.pieces = [bytes(byte_of[symbol] for symbol in token) for token in self.tokens]
        self.size = _resolve_size(size, len(self.pieces), "these merges")
        self.ids_of: dict[str, list[int]] = {}  # of words that were encoded before

    @classmethod
    def merges_of(cls, text: Iterable[str], size: int, show_progress: bool = False) -> str:
        """The merges that a text's most frequent pairs ask for, until there are `size` ids; the same every time."""
        if size < 256:
            raise ValueError(f"vocab_size={size} must be at least 256, as every byte has an id")
        lib = import_optional("tokenizers", "tokenizers")
        engine = lib.Tokenizer(lib.models.BPE())
        engine.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        how = lib.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=show_progress,  # on a terminal alone
        )

        def sequences() -> Iterator[str | list[str]]:
            for piece in cut_at_spaces(text, 2**20):
                words = split_words(piece)
                yield (
                    words if len(words) > 1 + len(SPACE_BOUNDARY.findall(piece)) else piece
                )  # which is faster, if none is long

        run_in_thread(lambda: engine.train_from_iterator(sequences(), how))
        return "\n".join(" ".join(pair) for pair in json.loads(engine.to_str())["model"]["merges"])

    def __len__(self) -> int:
        return self.size

    @property
    def chars_per_token(self) -> Tensor:
        return _chars_per_token(self.pieces, self.size)

    @cached_property
    def engine(self):
        """The library's tokenizer.

        Raises:
            ValueError: the library is not installed.
        """
        lib = import_optional("tokenizers", "tokenizers")
        engine = lib.Tokenizer(lib.models.BPE({token: i for i, token in enumerate(self.tokens)}, self.pairs))
        engine.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = lib.decoders.ByteLevel()
        return engine

    def unknown(self, text: str) -> str:
        return ""

    def encode(self, text: str) -> Tensor:
        """Token ids (T,), int64."""
        words = split_words(text)
        if len(self.ids_of) > 2**20:
            self.ids_of.clear()
        new = [word for word in dict.fromkeys(words) if word not in self.ids_of]  # most come again and again
        for batch in (new[at : at + 2**12] for at in range(0, len(new), 2**12)):  # Ctrl-C is heard after each
            for word, encoded in zip(
                batch, self.engine.encode_batch_fast(batch, add_special_tokens=False), strict=True
            ):
                self.ids_of[word] = encoded.ids
        ids = np.fromiter(chain.from_iterable(map(self.ids_of.__getitem__, words)), np.int64)
        for word in new:
            if len(word) > MAX_CACHED_WORD:
                del self.ids_of[word]
        return torch.from_numpy(ids)

    def decode(self, ids: Tensor) -> str:
        return self.decode_bytes(ids.flatten().tolist()).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return _join_bytes(self.pieces, ids)


class GPT2Tokenizer:
    """GPT-2's own 50,257 byte pairs, by the `tiktoken` library, which fetches their table when it first needs them.

    Args:
        size: ids that there are; null has GPT-2's and no more.
    """

    vocabulary = ""  # a checkpoint needs no more than the name

    def __init__(self, size: int | None = None):
        self.size = _resolve_size(size, 50257, "GPT-2's tokens")

    def __len__(self) -> int:
        return self.size

    @cached_property
    def engine(self):
        """The library's tokenizer.

        Raises:
            ValueError: the library is not installed, or its table is neither here nor to be had.
        """
        tiktoken = import_optional("tiktoken", "tokenizers")
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network says
            raise ValueError(
                f"GPT-2's table of tokens is not on this machine and can't be fetched ({type(error).__name__}): "
                "connect once, or point TIKTOKEN_CACHE_DIR to a copy of a connected machine's folder; "
                "the tokenizers byte and bpe need no network"
            ) from None

    @cached_property
    def pieces(self) -> list[bytes]:
        return [self.engine.decode_single_token_bytes(i) for i in range(self.engine.n_vocab)]

    @property
    def chars_per_token(self) -> Tensor:
        return _chars_per_token(self.pieces[:-1], self.size)  # the last one ends a text and is no part of it

    def unknown(self, text: str) -> str:
        return ""

    def encode(self, text: str) -> Tensor:
        """Token ids (T,), int64."""
        pieces = list(cut_at_spaces([text], 2**16))
        ids = self.engine.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)
        return torch.tensor([i for piece in ids for i in piece], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        return self.decode_bytes(ids.flatten().tolist()).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return _join_bytes(self.pieces, ids)


class TokenIds:
    """Ids written as numbers, "464 3290 ", for files of tokens whose tokenizer is elsewhere."""

    vocabulary = ("0",)  # what to begin with where nothing else is said
    chars_per_token = None  # unknown

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def unknown(self, text: str) -> str:
        """The words of `text` that are no id, or all of it if it has none."""
        words = text.split()
        return " ".join(word for word in words if not (word.isdecimal() and int(word) < self.size)) if words else text

    def encode(self, text: str) -> Tensor:
        """Token ids (T,), int64.

        Raises:
            ValueError: a word is no id; all such words are named.
        """
        if (unknown := self.unknown(text)) or not text:
            raise ValueError(
                f"this model knows token ids from 0 to {self.size - 1}, written as numbers, and no {unknown[:40]!r}"
            )
        return torch.tensor([int(word) for word in text.split()])

    def decode(self, ids: Tensor) -> str:
        return self.decode_bytes(ids.flatten().tolist()).decode()

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(f"{i} " for i in ids).encode()


Tokenizer = CharTokenizer | ByteTokenizer | BPETokenizer | GPT2Tokenizer | TokenIds


def build_from_state(data: dict, size: int | None) -> Tokenizer:
    """The tokenizer that data settings speak of, such as a checkpoint's: plain values, of which old ones have fewer.

    Args:
        data: tokenizer, vocabulary, unknown and tokens, as the data module has them.
        size: ids that the net has; those beyond the tokenizer's own mean nothing.
    """
    kind = data.get("tokenizer") or ("ids" if data.get("token_files") else "char")
    if kind == "char":
        return CharTokenizer(data["vocabulary"], data.get("on_unknown") or "error")
    if kind == "bpe":
        return BPETokenizer(data["vocabulary"], size)
    if kind == "ids":
        return TokenIds(size or 1)
    if kind not in ("byte", "gpt2"):
        raise ValueError(f"there is no tokenizer {kind!r}: take char, byte, bpe or gpt2")
    return ByteTokenizer(size) if kind == "byte" else GPT2Tokenizer(size)


DEFAULT_BPE_SIZE = 512  # ids, where nobody says how many
TextPieces = Callable[[], Iterable[str]]  # a text, in pieces, as often as one wants to read it


def distinct_characters(pieces: Iterable[str], at_least: int = 1) -> str:
    """The different characters of a text, sorted; those that stand in it so often at least."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for piece in pieces:
        counts += np.bincount(np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32), minlength=len(counts))
    return "".join(map(chr, np.flatnonzero(counts >= at_least)))


def build_tokenizer(
    kind: str, text: TextPieces, training_text: TextPieces, vocabulary: str | None, on_unknown: str, size: int | None
) -> Tokenizer:
    """A new tokenizer for a text, or that of a vocabulary that is there.

    Args:
        kind: char, byte, bpe or gpt2.
        text: all of it; its characters are the vocabulary.
        training_text: merges, and which characters are too rare to have a token, come from this part alone.
        vocabulary: characters, or merges; null makes new ones.
        on_unknown: what becomes of characters without an id, or extend to give them one.
        size: ids that there are to be, where that can be chosen.
    """
    if kind == "byte":
        return ByteTokenizer(size)
    if kind == "gpt2":
        return GPT2Tokenizer(size)
    if kind == "bpe":
        if vocabulary is None:
            long = len(next(iter(training_text()), "")) > 2**20
            vocabulary = BPETokenizer.merges_of(training_text(), DEFAULT_BPE_SIZE if size is None else size, long)
            if (found := len(BPETokenizer(vocabulary))) < (size or 0):
                print_info(
                    f"the training text has pairs for {found:,} ids; the others of vocab_size={size:,} mean nothing"
                )
        return BPETokenizer(vocabulary, size)
    if vocabulary is None:
        # a token for the unknown is learnt only if something in the training text is unknown
        vocabulary = distinct_characters(training_text(), 2) if on_unknown == "replace" else distinct_characters(text())
    elif on_unknown == "extend":
        vocabulary += distinct_characters(text())
    known = CharTokenizer(vocabulary, "error" if on_unknown == "extend" else on_unknown)
    if size not in (None, len(known)):
        raise ValueError(
            f"data.vocab_size={size} is for token files, bpe and padding: this text's characters are {len(known)}, so "
            "leave it out"
        )
    return known


def smallest_dtype(vocab_size: int) -> torch.dtype:
    return torch.uint8 if vocab_size <= 2**8 else torch.int16 if vocab_size <= 2**15 else torch.int32


TOKENIZER_TYPES = {
    CharTokenizer: "char",
    ByteTokenizer: "byte",
    BPETokenizer: "bpe",
    GPT2Tokenizer: "gpt2",
    TokenIds: "ids",
}


def tokenizer_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that `build_from_state` makes the same tokenizer of."""
    kind = TOKENIZER_TYPES[type(tokenizer)]
    return {
        "tokenizer": kind,
        "vocabulary": "".join(tokenizer.vocabulary) if kind in ("char", "bpe") else None,
        "on_unknown": getattr(tokenizer, "on_unknown", "error"),
        "vocab_size": None if kind == "char" else len(tokenizer),
    }
