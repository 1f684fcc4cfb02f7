"""How much of a text stands word for word in the training text. NumPy only."""

import numpy as np
from torch import Tensor


class NgramIndex:
    """Looks up runs of tokens in a training text; exact, as n-grams are compared whole and not by a hash.

    Args:
        tokens: ids of the training text, (N,); of a longer one, the first LIMIT.
        vocab_size: decides n: as many ids as fit into 64 bits, 8 at most, and no more than the text has.
    """

    LIMIT = 10_000_000

    def __init__(self, tokens: Tensor, vocab_size: int):
        self.bits = max(1, (vocab_size - 1).bit_length())
        self.text = tokens[: self.LIMIT].numpy().astype(np.int64)
        self.n = min(8, 64 // self.bits, len(self.text))
        grams = self.grams(self.text)
        self.places = np.argsort(grams, kind="stable")  # of each n-gram in the text, equal ones side by side
        self.sorted = grams[self.places]

    def grams(self, ids: np.ndarray) -> np.ndarray:
        """Every n ids in a row as one number, (T - n + 1,)."""
        ids, last = ids.astype(np.uint64), len(ids) - self.n + 1
        numbers = ids[:last].copy()
        for k in range(1, self.n):
            numbers |= ids[k : last + k] << np.uint64(self.bits * k)
        return numbers

    def find(self, tokens: Tensor) -> tuple[int, int, float]:
        """The longest run of `tokens` (T,) that stands in the text, as start and length, and the share of its n-grams
        that do; runs shorter than n count as none, 0."""
        ids = tokens.cpu().numpy().astype(np.int64)
        if len(ids) < self.n:
            return 0, 0, 0.0
        grams = self.grams(ids)
        low, high = (np.searchsorted(self.sorted, grams, side) for side in ("left", "right"))
        there = low < high
        ends = np.flatnonzero(np.append(~there, True))  # of rows of n-grams that all are in the text
        start = length = 0
        for i in np.flatnonzero(there):
            end = int(ends[np.searchsorted(ends, i)]) + self.n - 1  # no run from i reaches further
            if end - i <= length:
                continue
            places, k = self.places[low[i] : high[i]], self.n
            while i + k < end:
                places = places[places + k < len(self.text)]
                places = places[self.text[places + k] == ids[i + k]]
                if not len(places):
                    break
                k += 1
            if k > length:
                start, length = int(i), k
        return start, length, float(there.mean())
