"""Tiny Shakespeare, or another text, as windows of tokens. Knows nothing of the model."""

import codecs
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from ..errors import print_info
from .encoding import MARKUP_MAGIC, describe_non_text, identify_format

TINY_SHAKESPEARE = Path(__file__).parent / "tiny_shakespeare.txt"


READ_BYTES = 2**22  # bytes that are read at a time


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
        data = file.read(READ_BYTES)
        head = head or data
        if head.startswith(MARKUP_MAGIC):
            raise ValueError(f"{name} is {identify_format(head)}")
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at, byte = offset + len(data) - len(error.object) + error.start, error.object[error.start]
            near = error.object if data else before  # at the end that is only what was held back of the piece before
            here = len(near) - (offset + len(data) - at)
            raise ValueError(
                describe_non_text(name, f"byte 0x{byte:02x} at offset {at}", head, near, max(0, here))
            ) from None
        before = data
        if "\0" in text:
            at = data.index(0)
            raise ValueError(describe_non_text(name, f"a zero byte at offset {offset + at}", head, data, at))
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
    report_changes(notes, name)
    return text


def read_files(files: list[Path], keep_returns: bool, notes: Counter[str]) -> Iterator[str]:
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


def report_changes(notes: Counter[str], name: str = "the corpus") -> None:
    """Say what of a text is not read as it stands."""
    if marks := notes["byte order mark"]:
        print_info(f"{name} begins with a byte order mark{f' in {marks} files' if marks > 1 else ''}; it is left out")
    for ends, kind in ("CRLF line end", "Windows line ends (CRLF)"), ("CR line end", "line ends of an old Mac (CR)"):
        if count := notes[ends]:
            print_info(f"{name} has {count:,} {kind}; they are read as plain new lines")


def slice_text(pieces: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters from `start` to `stop` of a text."""
    at = 0
    for piece in pieces:
        if at >= stop:
            return
        if wanted := piece[max(0, start - at) : stop - at]:
            yield wanted
        at += len(piece)
