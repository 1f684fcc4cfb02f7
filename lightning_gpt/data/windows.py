"""Windows of token ids: random for training, where batch k is a function of (seed, k); sequential for validation."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .token_cache import memory_map


def derive_seed(*parts: int) -> int:
    """Hashes several integers to one 64-bit seed; a sum would give (1, 2) and (2, 1) the same seed."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def open_token_file(path: str, token_dtype: str, vocab_size: int) -> Tensor:
    """Memory-maps a file of consecutive token ids without a header (nanoGPT's train.bin), and checks the ids.

    Raises:
        ValueError: the file is empty, does not consist of such integers, or has ids beyond the vocabulary.
        OSError: the file can't be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the token file {path} does not exist")
    size, width = Path(path).stat().st_size, np.dtype(token_dtype).itemsize
    if not size or size % width:
        raise ValueError(
            f"the token file {path} has {size:,} bytes, but must hold one or more {token_dtype} ids of {width} bytes"
        )
    with open(path, "rb") as file:  # the ids are checked in parts; pages of the memory map would stay in memory
        for start in range(0, size // width, 2**22):
            ids = np.fromfile(file, dtype=token_dtype, count=2**22)
            if ids.max() >= vocab_size:
                first = int(np.argmax(ids >= vocab_size))
                raise ValueError(
                    f"the token file {path} has the id {ids[first]} at token {start + first:,}, beyond the vocabulary "
                    f"size {vocab_size}: give a larger data.vocab_size, or the data.token_dtype if not {token_dtype}"
                )
            if width == 2 and len(ids) > 1 and ids[::2].any() and not ids[1::2].any():
                raise ValueError(
                    f"every second number in the token file {path} is 0, as if it were uint32: set data.token_dtype"
                )
    return memory_map(path, token_dtype)


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the inputs and the targets (B, T), int64, of windows (B, T + 1) of any dtype."""
    windows = windows.long()
    return windows[:, :-1], windows[:, 1:]


class Pairs:
    """The batches of a loader of windows as pairs of inputs and targets, for loops without a Trainer."""

    def __init__(self, windows: Iterable[Tensor]):
        self.windows = windows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(inputs_and_targets, self.windows)


class RandomWindows:
    """Endless training batches; batch k is a pure function of (seed, k), so resuming needs no state.

    A batch is (batch_size / world_size, block_size + 1) token ids, this rank's share of the global batch.
    Each iteration calls `numbers` and yields the batches with these k.
    """

    def __init__(
        self,
        tokens: Tensor,
        block_size: int,
        batch_size: int,
        seed: int,
        numbers: Callable[[], Iterable[int]] = count,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.windows = tokens.unfold(0, block_size + 1, 1).numpy()  # a view (N - block_size, block_size + 1)
        self.batch_size, self.seed, self.numbers = batch_size, seed, numbers
        self.rank, self.world_size = rank, world_size

    def batch(self, k: int) -> Tensor:
        """Returns this rank's share of batch k."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, k))
        starts = torch.randint(len(self.windows), (self.batch_size,), generator=generator)
        # NumPy indexes in one thread; torch distributes 16 KB over all cores, which takes milliseconds
        return torch.from_numpy(self.windows[starts[self.rank :: self.world_size].numpy()])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.batch, self.numbers())


class SequentialWindows:
    """One pass over a split in adjacent windows: each token but the first is predicted exactly once.

    A batch is (windows, block_size + 1) token ids. The last token of a window is the first of the next, and the tokens
    left over at the end make one shorter window. Windows go to ranks in turn, without padding. All ranks have the same
    number of batches; some may be empty.
    """

    def __init__(self, tokens: Tensor, block_size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        windows = tokens.unfold(0, block_size + 1, block_size)
        rest = tokens[len(windows) * block_size :]
        shares = [list(windows[r::world_size].split(batch_size)) for r in range(world_size)]
        if len(rest) > 1:
            shares[len(windows) % world_size].append(rest[None])
        self.batches = shares[rank]
        # every forward of a sharded net needs all ranks, so ranks with fewer batches get empty ones
        self.batches += [windows[:0]] * (max(map(len, shares)) - len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)
