"""Token ids of large texts, written to disk once and memory-mapped from then on."""

import errno
import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ..errors import print_info
from .corpus import READ_BYTES, read_files, report_changes, slice_text
from .tokenizers import Tokenizer, build_from_state, build_tokenizer, cut_at_spaces

CACHE_FROM_BYTES = 2**24  # bytes of text from which on its tokens go through a file
BPE_SAMPLE_CHARS = (
    2**25
)  # characters that are enough to find merges in; a longer training split gives a part of its pieces


# --- large texts ------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-gpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"tokens of large texts are kept in {folder}, and {error}: set XDG_CACHE_HOME") from None
    return folder


def cached_tokens(
    files: list[Path],
    bounds: Callable[[int], tuple[int, int]],
    kind: str,
    vocabulary: str | None,
    on_unknown: str,
    size: int | None,
    keep_returns: bool,
) -> tuple[Tokenizer, Tensor, Tensor, int]:
    """The tokenizer of a large text, its tokens to train and to validate on, mapped into memory, and its characters.

    Tokens are written to the cache folder the first time, under a name made of the files' paths, sizes and times, the
    split and the tokenizer.

    Args:
        bounds: where the training part ends and where the validation part does, in a text of so many characters.
    """
    folder = cache_dir()
    facts = [(file, file.stat()) for file in files]
    # the time of modification may be set back, as cp -p and rsync do; that of the change of it may not
    stat = [(str(file.resolve()), now.st_size, now.st_mtime_ns, now.st_ctime_ns) for file, now in facts]

    def named(vocabulary: str | None, on_unknown: str, size: int | None) -> Path:
        asked = json.dumps([2, stat, bounds(10**12), kind, vocabulary, on_unknown, size, keep_returns])
        return folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"

    with FileLock(folder / "lock"):  # other processes would do the same work again
        with suppress(OSError, ValueError, KeyError):
            told = json.loads(named(vocabulary, on_unknown, size).read_text(encoding="utf-8"))
            if (folder / told["file"]).stat().st_size == told["bytes"]:
                return open_cache(folder, told)
        megabytes = sum(now.st_size for _, now in facts) / 1e6
        print_info(f"{megabytes:,.0f} MB of text are read, and become tokens, once, in {folder}")
        notes: Counter[str] = Counter()

        def text() -> Iterator[str]:
            return read_files(files, keep_returns, notes)

        length = sum(map(len, text()))
        report_changes(notes)
        n, stop = bounds(length)
        every = math.ceil(n / BPE_SAMPLE_CHARS) if kind == "bpe" else 1

        def training_text() -> Iterator[str]:
            return islice(slice_text(text(), 0, n), 0, None, every)

        tokenizer = build_tokenizer(kind, text, training_text, vocabulary, on_unknown, size)
        resolved, policy = "".join(tokenizer.vocabulary), getattr(tokenizer, "on_unknown", on_unknown)
        target = named(resolved, policy, len(tokenizer)).with_suffix(".tokens")
        dtype = np.dtype(np.uint8 if len(tokenizer) <= 2**8 else np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        draft, counts = target.with_suffix(f".{os.getpid()}"), []
        try:
            with open(draft, "wb") as out, tqdm(total=stop, unit="char", unit_scale=True, disable=None) as bar:
                for start, end in (0, n), (n, stop):
                    before = out.tell()
                    for piece in cut_at_spaces(slice_text(text(), start, end), READ_BYTES // 2):
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
        told |= {"tokenizer": kind, "vocabulary": resolved, "on_unknown": policy}
        asked = {(vocabulary, on_unknown, size), (resolved, policy, size)}
        asked.add((resolved, policy, len(tokenizer)))  # as a checkpoint asks
        for path in {named(*names) for names in asked}:
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(told), encoding="utf-8")
            os.replace(draft, path)
        return open_cache(folder, told)


def memory_map(path: str | Path, token_dtype: str) -> Tensor:
    """A file of numbers, mapped into memory and not read: it may be larger than that."""
    with warnings.catch_warnings():  # torch's, as nobody may write there; a map to write to would have to fit in memory
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.memmap(path, dtype=token_dtype, mode="r"))


def open_cache(folder: Path, told: dict) -> tuple[Tokenizer, Tensor, Tensor, int]:
    ids = memory_map(folder / told["file"], told["type"])
    n, m = told["parts"]
    return build_from_state(told, told["size"]), ids[:n], ids[n : n + m], told["characters"]
