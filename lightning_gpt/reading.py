"""Text files as one text: which they are, whether they are text; and large ones as a file of tokens, made once.

A text is read in pieces, so however long it is, a few MB of it are in memory at a time.
"""

import codecs
import errno
import glob
import hashlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import encoding
from .tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    cut_at_spaces,
    rebuild,
)

PIECE = 2**22  # bytes that are read at a time
LARGE = 2**24  # bytes of text from which on its tokens go through a file
SAMPLE = 2**25  # characters that are enough to find merges in; a longer training split gives a part of its pieces
BPE_SIZE = 512  # ids, where nobody says how many
Pieces = Callable[[], Iterable[str]]  # a text, in pieces, as often as one wants to read it


def say(what: str) -> None:
    """Say something on stderr, once, however many processes there are; Lightning's own check would import it."""
    ranks = "RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"  # as Lightning looks for them
    if next((os.environ[name] for name in ranks if name in os.environ), "0") == "0":
        print(f"lightning-gpt: {what}", file=sys.stderr, flush=True)


def find_files(corpus: str) -> list[Path]:
    """The files meant by a path, a folder, a pattern such as `plays/*.txt`, or several of these between commas.

    Hidden files and folders are no part of a folder: editors and notebooks keep copies there. In a pattern `*`, `?` and
    `**` are wild; brackets are brackets.

    Raises:
        ValueError: a folder without text. FileNotFoundError: nothing is there.
    """
    files: list[Path] = []
    for name in [corpus] if os.path.exists(corpus) else [part.strip() for part in corpus.split(",")]:
        if not name:
            raise ValueError(f"data.corpus={corpus!r} has no file where one should be: leave out what is empty")
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(text_files(path))
            if not found:
                raise ValueError(
                    f"the folder {name} has no .txt file that isn't hidden: put some there, or give a pattern: "
                    f"'{name}/*.md'"
                )
        elif path.exists():
            found = [path]
        else:
            wild = str(path).replace("[", "[[]")
            found = sorted(Path(file) for file in glob.glob(wild, recursive=True) if Path(file).is_file())
            if not found:
                raise FileNotFoundError(
                    f"the corpus {name} does not exist: give a UTF-8 text file, a folder of .txt files or a pattern"
                )
        files += found
    return list({file.resolve(): file for file in files}.values())


def text_files(folder: Path) -> Iterator[Path]:
    """The .txt files of a folder and those below it, but hidden ones.

    Raises:
        OSError: a folder can't be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(root, name)
            if not name.startswith(".") and file.suffix.lower() == ".txt" and file.is_file():
                yield file


def decode_pieces(file: BinaryIO, name: str, keep_returns: bool, notes: Counter[str]) -> Iterator[str]:
    """The text of UTF-8 bytes, without a byte order mark, and with \\n for \\r\\n and \\r, unless they are kept.

    What was changed is counted in `notes`.

    Args:
        name: what an error calls the file.
    Raises:
        ValueError: the file is not text; names the offset, and what it may be. OSError: it can't be read.
    """
    decoder, offset, held, head, before = codecs.getincrementaldecoder("utf-8")(), 0, "", b"", b""
    while True:
        data = file.read(PIECE)
        head = head or data
        if head.startswith(encoding.MARKUP):
            raise ValueError(f"{name} is {encoding.known_format(head)}")
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at, byte = offset + len(data) - len(error.object) + error.start, error.object[error.start]
            near = error.object if data else before  # at the end that is only what was held back of the piece before
            here = len(near) - (offset + len(data) - at)
            raise ValueError(
                encoding.not_text(name, f"byte 0x{byte:02x} at offset {at}", head, near, max(0, here))
            ) from None
        before = data
        if "\0" in text:
            at = data.index(0)
            raise ValueError(encoding.not_text(name, f"a zero byte at offset {offset + at}", head, data, at))
        if offset == 0 and text.startswith("\ufeff"):
            text = text[1:]
            notes["byte order mark"] += 1
        offset += len(data)
        if not keep_returns:
            text = held + text
            held = "\r" if text.endswith("\r") and data else ""
            text = text[: len(text) - len(held)]
            if "\r" in text:
                notes["CRLF line end"] += (pairs := text.count("\r\n"))
                notes["CR line end"] += text.count("\r") - pairs
                text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text:
            yield text
        if not data:
            return


def read_pieces(path: Path, keep_returns: bool, notes: Counter[str]) -> Iterator[str]:
    """The text of a file of a corpus, as `decode_pieces` gives it."""
    with open(path, "rb") as file:
        yield from decode_pieces(file, f"the corpus {path}", keep_returns, notes)


def read_text(path: str, keep_returns: bool) -> str:
    """The text of a file, or of stdin for `-`, as a corpus is read; what was changed is said.

    Raises:
        ValueError: it is not text. OSError: it can't be read.
    """
    notes, name = Counter[str](), "stdin" if path == "-" else path
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        text = "".join(decode_pieces(file, name, keep_returns, notes))
    tell(notes, name)
    return text


def read_all(files: list[Path], keep_returns: bool, notes: Counter[str]) -> Iterator[str]:
    """The texts of files one after the other, each but the last ending with a new line.

    Raises:
        ValueError: all are empty, or one is not text. OSError: one can't be read.
    """
    last = ""
    for file in files:
        if last and last != "\n":
            yield "\n"
        for piece in read_pieces(file, keep_returns, notes):
            yield piece
            last = piece[-1]
    if not last:
        what = (
            f"the corpus {files[0]} is empty" if len(files) == 1 else f"all {len(files)} files of the corpus are empty"
        )
        raise ValueError(what)


def tell(notes: Counter[str], name: str = "the corpus") -> None:
    """Say what of a text is not read as it stands."""
    if marks := notes["byte order mark"]:
        say(f"{name} begins with a byte order mark{f' in {marks} files' if marks > 1 else ''}; it is left out")
    for ends, kind in ("CRLF line end", "Windows line ends (CRLF)"), ("CR line end", "line ends of an old Mac (CR)"):
        if count := notes[ends]:
            say(f"{name} has {count:,} {kind}; they are read as plain new lines")


def part(pieces: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters from `start` to `stop` of a text."""
    at = 0
    for piece in pieces:
        if at >= stop:
            return
        if wanted := piece[max(0, start - at) : stop - at]:
            yield wanted
        at += len(piece)


def characters_in(pieces: Iterable[str], at_least: int = 1) -> str:
    """The different characters of a text, sorted; those that stand in it so often at least."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for piece in pieces:
        counts += np.bincount(np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32), minlength=len(counts))
    return "".join(map(chr, np.flatnonzero(counts >= at_least)))


def tokenizer_for(
    kind: str, text: Pieces, training_text: Pieces, vocabulary: str | None, unknown: str, size: int | None
) -> Tokenizer:
    """A new tokenizer for a text, or that of a vocabulary that is there.

    Args:
        kind: char, byte, bpe or gpt2.
        text: all of it; its characters are the vocabulary.
        training_text: merges, and which characters are too rare to have a token, come from this part alone.
        vocabulary: characters, or merges; null makes new ones.
        unknown: what becomes of characters without an id, or extend to give them one.
        size: ids that there are to be, where that can be chosen.
    """
    if kind == "byte":
        return ByteTokenizer(size)
    if kind == "gpt2":
        return GPT2Tokenizer(size)
    if kind == "bpe":
        if vocabulary is None:
            long = len(next(iter(training_text()), "")) > 2**20
            vocabulary = BPETokenizer.merges_of(training_text(), BPE_SIZE if size is None else size, long)
            if (found := len(BPETokenizer(vocabulary))) < (size or 0):
                say(f"the training text has pairs for {found:,} ids; the others of token_kinds={size:,} mean nothing")
        return BPETokenizer(vocabulary, size)
    if size:
        raise ValueError(
            f"data.token_kinds={size} is for token files, bpe and padding: characters are as many as they are"
        )
    if vocabulary is None:
        # a token for the unknown is learnt only if something in the training text is unknown
        vocabulary = characters_in(training_text(), 2) if unknown == "replace" else characters_in(text())
    elif unknown == "extend":
        vocabulary += characters_in(text())
    return CharTokenizer(vocabulary, "error" if unknown == "extend" else unknown)


def smallest_type(kinds: int) -> torch.dtype:
    return torch.uint8 if kinds <= 2**8 else torch.int16 if kinds <= 2**15 else torch.int32


# --- large texts ------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-gpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"tokens of large texts are kept in {folder}, and {error}: set XDG_CACHE_HOME") from None
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system can say so; others would do the same work again."""
    with open(folder / "lock", "wb") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(
    files: list[Path],
    bounds: Callable[[int], tuple[int, int]],
    kind: str,
    vocabulary: str | None,
    unknown: str,
    size: int | None,
    keep_returns: bool,
) -> tuple[Tokenizer, Tensor, Tensor, int]:
    """The tokenizer of a large text, its tokens to train and to validate on, mapped into memory, and its characters.

    Tokens are written to the cache folder the first time, under a name made of the files' paths, sizes and times, the
    split and the tokenizer.

    Args:
        bounds: where the training part ends and where the validation part does, in a text of so many characters.
    """
    folder = cache_folder()
    facts = [(file, file.stat()) for file in files]
    # the time of modification may be set back, as cp -p and rsync do; that of the change of it may not
    stat = [(str(file.resolve()), now.st_size, now.st_mtime_ns, now.st_ctime_ns) for file, now in facts]

    def named(vocabulary: str | None, unknown: str) -> Path:
        asked = json.dumps([2, stat, bounds(10**12), kind, vocabulary, unknown, size, keep_returns])
        return folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"

    with alone(folder):
        with suppress(OSError, ValueError, KeyError):
            told = json.loads(named(vocabulary, unknown).read_text(encoding="utf-8"))
            if (folder / told["file"]).stat().st_size == told["bytes"]:
                return open_cached(folder, told)
        megabytes = sum(now.st_size for _, now in facts) / 1e6
        say(f"{megabytes:,.0f} MB of text are read, and become tokens, once, in {folder}")
        notes: Counter[str] = Counter()

        def text() -> Iterator[str]:
            return read_all(files, keep_returns, notes)

        length = sum(map(len, text()))
        tell(notes)
        n, stop = bounds(length)
        every = math.ceil(n / SAMPLE) if kind == "bpe" else 1

        def training_text() -> Iterator[str]:
            return islice(part(text(), 0, n), 0, None, every)

        tokenizer = tokenizer_for(kind, text, training_text, vocabulary, unknown, size)
        resolved, policy = "".join(tokenizer.vocabulary), getattr(tokenizer, "on_unknown", unknown)
        target = named(resolved, policy).with_suffix(".tokens")
        dtype = np.dtype(np.uint8 if len(tokenizer) <= 2**8 else np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        draft, counts = target.with_suffix(f".{os.getpid()}"), []
        try:
            with open(draft, "wb") as out, tqdm(total=stop, unit="char", unit_scale=True, disable=None) as bar:
                for start, end in (0, n), (n, stop):
                    before = out.tell()
                    for piece in cut_at_spaces(part(text(), start, end), PIECE // 2):
                        out.write(tokenizer.encode(piece).numpy().astype(dtype).data)
                        bar.update(len(piece))
                    counts.append((out.tell() - before) // dtype.itemsize)
            os.replace(draft, target)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                f"the tokens do not go to {folder} ({error.strerror}): make room, or set XDG_CACHE_HOME to a folder "
                "that has it"
            ) from None
        finally:
            draft.unlink(missing_ok=True)
        told = {"file": target.name, "bytes": target.stat().st_size, "type": dtype.name, "parts": counts}
        told |= {"characters": length, "size": len(tokenizer)}
        told |= {"tokenizer": kind, "vocabulary": resolved, "unknown": policy}
        for path in {named(vocabulary, unknown), named(resolved, policy)}:  # a checkpoint will ask with the vocabulary
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(told), encoding="utf-8")
            os.replace(draft, path)
        return open_cached(folder, told)


def mapped(path: str | Path, token_type: str) -> Tensor:
    """A file of numbers, mapped into memory and not read: it may be larger than that."""
    with warnings.catch_warnings():  # torch's, as nobody may write there; a map to write to would have to fit in memory
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.memmap(path, dtype=token_type, mode="r"))


def open_cached(folder: Path, told: dict) -> tuple[Tokenizer, Tensor, Tensor, int]:
    ids = mapped(folder / told["file"], told["type"])
    n, m = told["parts"]
    return rebuild(told, told["size"]), ids[:n], ids[n : n + m], told["characters"]
