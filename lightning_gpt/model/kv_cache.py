"""Keys and values of the tokens that a net has read. Torch only.

Shapes   B batch · T time (tokens) · H heads · S places in the cache · D channels of a head
"""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, each (B, H, S, D); new ones are written in place."""

    def __init__(self, cache: "KVCache"):
        self.cache = cache
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def make(self, like: Tensor, B: int, H: int, D: int) -> None:
        """Room for as many tokens as the cache may get."""
        self.k, self.v = (like.new_zeros(B, H, self.cache.size, D) for _ in "kv")

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys and values that these T may look at, these (B, H, T, D) included, and the mask if one is needed."""
        cache, (B, H, T, D) = self.cache, k.shape
        if self.k is None:
            self.make(k, B, H, D)
        assert self.k is not None and self.v is not None
        if isinstance(past := cache.length, int):
            self.k[:, :, past : past + T] = k
            self.v[:, :, past : past + T] = v
            return self.k[:, :, : past + T], self.v[:, :, : past + T], cache.mask
        if cache.even:
            self.k.index_copy_(2, cache.at[0], k)
            self.v.index_copy_(2, cache.at[0], v)
        else:
            self.k[cache.rows, :, cache.at] = k.transpose(1, 2)
            self.v[cache.rows, :, cache.at] = v.transpose(1, 2)
        assert cache.mask is not None
        if cache.mask.dtype == torch.bool:  # else each layer would turn it into numbers again
            cache.mask = torch.zeros_like(cache.mask, dtype=k.dtype).masked_fill(~cache.mask, -torch.inf)
        return self.k, self.v, cache.mask


class KVCache:
    """Keys and values of the tokens that a net has read, so that each is computed once; an argument of `GPT.forward`.

    Its tensors have room for `size` tokens from the start and stay where they are, so that a CUDA graph may use them.
    `length` says how many tokens are in: one number where all rows are equally long, and a tensor (B,) where they are
    not; then a row sees its own past only, whatever stands behind it. `even` promises that a tensor's are all the same.
    """

    tail: Tensor  # the last token ids (B, n - 1), for a net with n-grams
    mask: Tensor | None  # which places the tokens being read may look at, (T, S) or (B, 1, T, S)
    rows: Tensor
    at: Tensor

    def __init__(self, size: int) -> None:
        self.size, self.even, self.layers = size, False, list[LayerCache]()
        self.length: int | Tensor = 0

    def open(self, idx: Tensor, n_layer: int) -> list[LayerCache]:
        """The layers, ready for the tokens idx (B, T)."""
        if not self.layers:
            self.layers = [LayerCache(self) for _ in range(n_layer)]
        T, device, self.mask = idx.size(1), idx.device, None
        if isinstance(self.length, Tensor):
            self.rows = torch.arange(len(idx), device=device)[:, None]
            self.at = self.length[:, None] + torch.arange(T, device=device)  # (B, T)
            self.mask = (torch.arange(self.size, device=device) <= self.at[..., None])[:, None]
        elif self.length and T > 1:
            places = torch.arange(self.length + T, device=device)
            self.mask = places <= places[self.length :, None]
        return self.layers

    def tail_before(self, idx: Tensor, n: int) -> Tensor:
        """The n - 1 tokens before idx (B, T), -1 where nothing is."""
        if not hasattr(self, "tail"):
            self.tail = idx.new_empty(len(idx), n - 1)
        if isinstance(self.length, int) and not self.length:
            self.tail.fill_(-1)
        return self.tail

    def take(self, rows: Tensor, other: "KVCache") -> None:
        """Replace these rows by those of another cache."""
        for mine, new in zip(self.layers, other.layers, strict=True):
            assert mine.k is not None and mine.v is not None and new.k is not None and new.v is not None
            mine.k[rows], mine.v[rows] = new.k, new.v
