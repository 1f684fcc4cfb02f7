"""Reads a corpus: finds its files and decodes them as one UTF-8 text, piece by piece."""

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
READ_BYTES = 2**22  # bytes per read


def find_files(corpus: str) -> list[Path]:
    """Returns the files of a path, a folder, a pattern such as `plays/*.txt`, or a comma-separated list of these.

    Hidden files and folders inside a folder are skipped, because editors and notebooks keep copies there. In a pattern
    `*`, `?` and `**` are wildcards; brackets stand for themselves.

    Raises:
        ValueError: a folder has no text, or an item of the list is empty. FileNotFoundError: nothing matches.
    """
    files: list[Path] = []
    for name in [corpus] if os.path.exists(corpus) else [part.strip() for part in corpus.split(",")]:
        if not name:
            raise ValueError(f"data.corpus={corpus!r} has an empty item in its list of files: remove it")
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(text_files(path))
            if not found:
                raise ValueError(
                    f"the folder {name} has no .txt file that isn't hidden: add one, or give a pattern such as "
                    f"'{name}/*.md'"
                )
        elif path.exists():
            found = [path]
        else:
            found = match_files(str(path))
            if not found:
                raise FileNotFoundError(
                    f"the corpus {name} does not exist: give a UTF-8 text file, a folder of .txt files or a pattern"
                )
        files += found
    return list({file.resolve(): file for file in files}.values())


def match_files(pattern: str) -> list[Path]:
    """Returns the files that match a pattern, sorted; `*`, `?` and `**` are wildcards."""
    found = glob.glob(pattern.replace("[", "[[]"), recursive=True)
    return sorted(Path(file) for file in found if Path(file).is_file())


def text_files(folder: Path) -> Iterator[Path]:
    """Yields the .txt files of a folder and its subfolders, except hidden ones.

    Raises:
        OSError: a folder can't be read.
    """

    def raise_error(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(root, name)
            if not name.startswith(".") and file.suffix.lower() == ".txt" and file.is_file():
                yield file


def decode_pieces(file: BinaryIO, name: str, keep_returns: bool, notes: Counter[str]) -> Iterator[str]:
    """Decodes UTF-8 in pieces, drops a byte order mark and converts \\r\\n and \\r to \\n.

    Args:
        name: the file's name in error messages.
        keep_returns: leaves \\r\\n and \\r as they are.
        notes: counts what was changed, for `report_changes`.
    Raises:
        ValueError: the file is not text; the message has the offset and the likely format or encoding.
        OSError: the file can't be read.
    """
    decoder, offset, held_return, head, previous = codecs.getincrementaldecoder("utf-8")(), 0, "", b"", b""
    while True:
        data = file.read(READ_BYTES)
        head = head or data
        if head.startswith(MARKUP_MAGIC):
            raise ValueError(f"{name} is {identify_format(head)}")
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            pos, byte = offset + len(data) - len(error.object) + error.start, error.object[error.start]
            context = error.object if data else previous  # at the end error.object is only an incomplete character
            index = len(context) - (offset + len(data) - pos)
            raise ValueError(
                describe_non_text(name, f"byte 0x{byte:02x} at offset {pos}", head, context, max(0, index))
            ) from None
        previous = data
        if "\0" in text:
            index = data.index(0)
            raise ValueError(describe_non_text(name, f"a zero byte at offset {offset + index}", head, data, index))
        if offset == 0 and text.startswith("\ufeff"):
            text = text[1:]
            notes["byte order mark"] += 1
        offset += len(data)
        if not keep_returns:
            text = held_return + text
            held_return = "\r" if text.endswith("\r") and data else ""  # the next piece may begin with its \n
            text = text[: len(text) - len(held_return)]
            if "\r" in text:
                notes["CRLF line ending"] += (pairs := text.count("\r\n"))
                notes["CR line ending"] += text.count("\r") - pairs
                text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text:
            yield text
        if not data:
            return


def read_pieces(path: Path, keep_returns: bool, notes: Counter[str]) -> Iterator[str]:
    """Yields the text of a corpus file in pieces; see `decode_pieces`."""
    with open(path, "rb") as file:
        yield from decode_pieces(file, f"the corpus {path}", keep_returns, notes)


def read_text(path: str, keep_returns: bool) -> str:
    """Returns the text of a file, or of stdin for `-`, decoded as a corpus is; changes to the text are reported.

    Raises:
        ValueError: the file is not text. OSError: the file can't be read.
    """
    notes, name = Counter[str](), "stdin" if path == "-" else path
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        text = "".join(decode_pieces(file, name, keep_returns, notes))
    report_changes(notes, name)
    return text


def read_files(files: list[Path], keep_returns: bool, notes: Counter[str]) -> Iterator[str]:
    """Yields the concatenated text of files in pieces; a newline is added where a file before another lacks one.

    Raises:
        ValueError: all files are empty, or one is not text. OSError: a file can't be read.
    """
    last = ""
    for file in files:
        if last and last != "\n":
            yield "\n"
        for piece in read_pieces(file, keep_returns, notes):
            yield piece
            last = piece[-1]
    if not last:
        message = (
            f"the corpus {files[0]} is empty" if len(files) == 1 else f"all {len(files)} files of the corpus are empty"
        )
        raise ValueError(message)


def report_changes(notes: Counter[str], name: str = "the corpus") -> None:
    """Prints which changes `decode_pieces` made to a text."""
    if marks := notes["byte order mark"]:
        print_info(f"{name} begins with a byte order mark{f' in {marks} files' if marks > 1 else ''}; it is removed")
    for note, line_endings in ("CRLF line ending", "Windows"), ("CR line ending", "old Mac"):
        if count := notes[note]:
            print_info(f"{name} has {count:,} {line_endings} line endings ({note.split()[0]}); they are read as \\n")


def slice_text(pieces: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """Yields the characters from `start` to `stop` of a text in pieces."""
    pos = 0
    for piece in pieces:
        if pos >= stop:
            return
        if part := piece[max(0, start - pos) : stop - pos]:
            yield part
        pos += len(piece)
