"""Windows of token ids: random ones to train on, where batch k = f(seed, k), and sequential ones to validate."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .token_cache import memory_map


def derive_seed(*parts: int) -> int:
    """One 64-bit seed from several numbers; a hash and no sum, for (1, 2) and (2, 1) must differ."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def open_token_file(path: str, token_dtype: str, vocab_size: int) -> Tensor:
    """The token ids of a file, one number after the other (nanoGPT's train.bin), mapped into memory and not read.

    Raises:
        ValueError: the file is empty, is no row of such numbers, or has ids beyond the vocabulary. OSError: it can't
            be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the token file {path} does not exist")
    size, width = Path(path).stat().st_size, np.dtype(token_dtype).itemsize
    if not size or size % width:
        raise ValueError(
            f"the token file {path} has {size:,} bytes, which are no {token_dtype} numbers of {width} bytes"
        )
    with open(path, "rb") as file:  # a look at each, a part at a time and not through the map, whose pages would stay
        for at in range(0, size // width, 2**22):
            ids = np.fromfile(file, dtype=token_dtype, count=2**22)
            if ids.max() >= vocab_size:
                first = int(np.argmax(ids >= vocab_size))
                raise ValueError(
                    f"the token file {path} has the id {ids[first]} at token {at + first:,}, beyond the vocabulary "
                    f"size {vocab_size}: give a larger data.vocab_size, or data.token_dtype if not {token_dtype}"
                )
            if width == 2 and len(ids) > 1 and ids[::2].any() and not ids[1::2].any():
                raise ValueError(
                    f"each second number of the token file {path} is 0, as if they were uint32: give data.token_dtype"
                )
    return memory_map(path, token_dtype)


class RandomWindows:
    """Endless training batches; batch k is a pure function of (seed, k), so resuming needs no state.

    A batch is (batch_size / world_size, block_size + 1) token ids, this rank's share of the global batch.
    `numbers` is asked at the start of each iteration which k to go through.
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
        self.windows = tokens.unfold(0, block_size + 1, 1).numpy()  # a view of all of them
        self.batch_size, self.seed, self.numbers = batch_size, seed, numbers
        self.rank, self.world_size = rank, world_size

    def batch(self, k: int) -> Tensor:
        dice = torch.Generator().manual_seed(derive_seed(self.seed, k))
        at = torch.randint(len(self.windows), (self.batch_size,), generator=dice)
        # NumPy copies row by row in one thread, where torch spreads 16 KB over all cores and takes milliseconds
        return torch.from_numpy(self.windows[at[self.rank :: self.world_size].numpy()])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.batch, self.numbers())


class SequentialWindows:
    """A split once, in windows side by side: each token but the first is predicted exactly once.

    A batch is (windows, block_size + 1) token ids, the last of a window being the first of the next;
    what is left over at the end is a shorter window of its own. Ranks take turns, nothing is padded; all have as many
    batches, if need be of no windows.
    """

    def __init__(self, tokens: Tensor, block_size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        windows = tokens.unfold(0, block_size + 1, block_size)
        rest = tokens[len(windows) * block_size :]
        shares = [list(windows[r::world_size].split(batch_size)) for r in range(world_size)]
        if len(rest) > 1:
            shares[len(windows) % world_size].append(rest[None])
        self.batches = shares[rank]
        # a sharded net needs all ranks for every forward: as many batches for each, some of them without a window
        self.batches += [windows[:0]] * (max(map(len, shares)) - len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)
