"""Encodes large texts once, to a file of token ids in a cache folder, which is then memory-mapped."""

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
from .tokenizers import Tokenizer, TokenizerSettings, build_from_state, build_tokenizer, cut_at_spaces

CACHE_FROM_BYTES = 2**24  # size of the smallest text whose tokens are cached
BPE_SAMPLE_CHARS = 2**25  # characters to train BPE on; of a longer training split every k-th piece is used


def cache_dir() -> Path:
    """Returns the cache folder; creates it if necessary."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-gpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the token cache {folder} can't be created ({error}): set XDG_CACHE_HOME") from None
    return folder


def write_tokens(
    tokenizer: Tokenizer, parts: list[Iterator[str]], dtype: np.dtype, length: int, path: Path
) -> list[int]:
    """Encodes texts one after the other into one file, which appears when it is complete.

    Args:
        length: characters of all parts, for the progress bar.
    Returns:
        the number of tokens of each part.
    Raises:
        OSError: the disk is full; the message names a remedy.
    """
    tmp, counts = path.with_suffix(f".{os.getpid()}"), []
    try:
        with open(tmp, "wb") as out, tqdm(total=length, unit="char", unit_scale=True, disable=None) as bar:
            for part in parts:
                before = out.tell()
                for piece in cut_at_spaces(part, READ_BYTES // 2):
                    out.write(tokenizer.encode(piece).numpy().astype(dtype).data)
                    bar.update(len(piece))
                counts.append((out.tell() - before) // dtype.itemsize)
        os.replace(tmp, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"the tokens can't be written to {path.parent} ({error.strerror}): make room, or set XDG_CACHE_HOME to a "
            "folder with enough space"
        ) from None
    finally:
        tmp.unlink(missing_ok=True)
    return counts


def cached_tokens(
    files: list[Path], bounds: Callable[[int], tuple[int, int]], settings: TokenizerSettings, keep_returns: bool
) -> tuple[Tokenizer, Tensor, Tensor, int]:
    """Returns the tokenizer of a large text, its memory-mapped training and validation tokens, and its length.

    The first call writes the tokens to the cache folder, in a file named by a hash of the text files' paths, sizes and
    times, the split and the tokenizer settings.

    Args:
        bounds: maps the text's length in characters to the ends of its training and validation split.
    """
    folder = cache_dir()
    stats = [(file, file.stat()) for file in files]
    # cp -p and rsync set the modification time (mtime) to that of the source; ctime can't be set
    identity = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in stats]

    def meta_path(request: TokenizerSettings) -> Path:
        key = json.dumps([3, identity, bounds(10**12), *request, keep_returns])
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    with FileLock(folder / "lock"):  # so that other processes wait and do not repeat the work
        with suppress(OSError, ValueError, KeyError):
            meta = json.loads(meta_path(settings).read_text(encoding="utf-8"))
            if (folder / meta["file"]).stat().st_size == meta["bytes"]:
                return open_cache(folder, meta)
        megabytes = sum(stat.st_size for _, stat in stats) / 1e6
        print_info(f"encoding {megabytes:,.0f} MB of text once; the tokens are kept in {folder}")
        notes: Counter[str] = Counter()

        def text() -> Iterator[str]:
            return read_files(files, keep_returns, notes)

        length = sum(map(len, text()))
        report_changes(notes)
        n, stop = bounds(length)
        step = math.ceil(n / BPE_SAMPLE_CHARS) if settings.tokenizer == "bpe" else 1
        tokenizer = build_tokenizer(settings, text, lambda: islice(slice_text(text(), 0, n), 0, None, step))
        on_unknown = tokenizer.on_unknown if settings.tokenizer == "char" else settings.on_unknown
        built = settings._replace(vocabulary="".join(tokenizer.vocabulary), on_unknown=on_unknown)
        from_checkpoint = built._replace(vocab_size=len(tokenizer))
        target = meta_path(from_checkpoint).with_suffix(".tokens")
        dtype = np.dtype(np.uint8 if len(tokenizer) <= 2**8 else np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        parts = [slice_text(text(), 0, n), slice_text(text(), n, stop)]
        counts = write_tokens(tokenizer, parts, dtype, stop, target)
        meta = {"file": target.name, "bytes": target.stat().st_size, "type": dtype.name, "parts": counts}
        meta |= {"characters": length, **from_checkpoint._asdict()}
        for path in map(meta_path, {settings, built, from_checkpoint}):
            tmp = path.with_suffix(f".{os.getpid()}")
            tmp.write_text(json.dumps(meta), encoding="utf-8")
            os.replace(tmp, path)
        return open_cache(folder, meta)


def memory_map(path: str | Path, token_dtype: str) -> Tensor:
    """Memory-maps a file of integers, read-only; the file may be larger than memory."""
    with warnings.catch_warnings():  # torch warns of read-only arrays; a writable map would have to fit in memory
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.memmap(path, dtype=token_dtype, mode="r"))


def open_cache(folder: Path, meta: dict) -> tuple[Tokenizer, Tensor, Tensor, int]:
    """Returns what `cached_tokens` does, from the metadata of a file that is in the cache."""
    ids = memory_map(folder / meta["file"], meta["type"])
    n, m = meta["parts"]
    return build_from_state(meta, meta["vocab_size"]), ids[:n], ids[n : n + m], meta["characters"]
