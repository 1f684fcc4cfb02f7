"""Finds passages that a text copies verbatim from the training text."""

import numpy as np
from torch import Tensor


class NgramIndex:
    """A sorted index of the n-grams of a training text; exact, because all n ids are compared and not a hash of them.

    Args:
        tokens: ids of the training text, (N,); only the first LIMIT are indexed.
        vocab_size: determines n, the number of ids that fit into 64 bits, limited to 8 and to the text's length.
    """

    LIMIT = 10_000_000

    def __init__(self, tokens: Tensor, vocab_size: int):
        self.bits = max(1, (vocab_size - 1).bit_length())
        self.text = tokens[: self.LIMIT].numpy().astype(np.int64)
        self.n = min(8, 64 // self.bits, len(self.text))
        grams = self.grams(self.text)
        self.positions = np.argsort(grams, kind="stable")  # of the n-grams in sorted order
        self.sorted = grams[self.positions]

    def grams(self, ids: np.ndarray) -> np.ndarray:
        """Packs each n consecutive ids into one uint64, (T - n + 1,)."""
        ids, last = ids.astype(np.uint64), len(ids) - self.n + 1
        packed = ids[:last].copy()
        for k in range(1, self.n):
            packed |= ids[k : last + k] << np.uint64(self.bits * k)
        return packed

    def find(self, tokens: Tensor) -> tuple[int, int, float]:
        """Finds the longest run of `tokens` (T,) that occurs in the training text.

        Returns:
            start and length of the run (0, 0 if it is shorter than n), and the fraction of n-grams that occur.
        """
        ids = tokens.cpu().numpy().astype(np.int64)
        if len(ids) < self.n:
            return 0, 0, 0.0
        grams = self.grams(ids)
        low, high = (np.searchsorted(self.sorted, grams, side) for side in ("left", "right"))
        found = low < high
        ends = np.flatnonzero(np.append(~found, True))  # of runs of n-grams that occur
        start = length = 0
        for i in np.flatnonzero(found):
            end = int(ends[np.searchsorted(ends, i)]) + self.n - 1  # upper bound for a run from i
            if end - i <= length:
                continue
            positions, k = self.positions[low[i] : high[i]], self.n
            while i + k < end:
                positions = positions[positions + k < len(self.text)]
                positions = positions[self.text[positions + k] == ids[i + k]]
                if not len(positions):
                    break
                k += 1
            if k > length:
                start, length = int(i), k
        return start, length, float(found.mean())
