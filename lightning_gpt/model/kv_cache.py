"""The cache of keys and values, with which each token is computed once.

Shapes   B batch · T time (tokens) · H heads · S positions in the cache · D channels of a head
"""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, each (B, H, S, D); new ones are written in place."""

    def __init__(self, cache: "KVCache"):
        self.cache = cache
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def allocate(self, like: Tensor, B: int, H: int, D: int) -> None:
        """Allocates zeros (B, H, S, D) with the dtype and device of `like`."""
        self.k, self.v = (like.new_zeros(B, H, self.cache.size, D) for _ in "kv")

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Appends keys and values (B, H, T, D); returns all keys and values, and the mask if needed."""
        cache, (B, H, T, D) = self.cache, k.shape
        if self.k is None:
            self.allocate(k, B, H, D)
        assert self.k is not None and self.v is not None
        if isinstance(past := cache.length, int):
            self.k[:, :, past : past + T] = k
            self.v[:, :, past : past + T] = v
            return self.k[:, :, : past + T], self.v[:, :, : past + T], cache.mask
        if cache.uniform_length:
            self.k.index_copy_(2, cache.pos[0], k)
            self.v.index_copy_(2, cache.pos[0], v)
        else:
            self.k[cache.rows, :, cache.pos] = k.transpose(1, 2)
            self.v[cache.rows, :, cache.pos] = v.transpose(1, 2)
        assert cache.mask is not None
        if cache.mask.dtype == torch.bool:  # converted once, for all layers
            cache.mask = torch.zeros_like(cache.mask, dtype=k.dtype).masked_fill(~cache.mask, -torch.inf)
        return self.k, self.v, cache.mask


class KVCache:
    """Keys and values of all layers for the tokens seen so far; an argument of `GPT.forward`.

    The tensors are allocated for `size` tokens and keep their addresses, so a CUDA graph can use them. `length` is the
    number of tokens in the cache: an int if it is the same in all rows, or a tensor (B,). With a tensor, attention
    reads all `size` positions under a mask; with an int, only the positions in use. If `uniform_length` is set, the
    entries of a tensor must be equal.
    """

    last_tokens: Tensor  # token ids (B, n - 1), for a net with n-gram embeddings
    mask: Tensor | None  # which positions the new tokens attend to, (T, S) or (B, 1, T, S)
    rows: Tensor
    pos: Tensor  # of the new tokens, (B, T)

    def __init__(self, size: int) -> None:
        self.size, self.uniform_length, self.layers = size, False, list[LayerCache]()
        self.length: int | Tensor = 0

    def layers_for(self, n_layer: int) -> list[LayerCache]:
        """Returns the caches of all layers, created on the first call."""
        if not self.layers:
            self.layers = [LayerCache(self) for _ in range(n_layer)]
        return self.layers

    def prepare(self, idx: Tensor, n_layer: int) -> list[LayerCache]:
        """Sets positions and mask for the new tokens idx (B, T), and returns the caches of all layers."""
        T, device, self.mask = idx.size(1), idx.device, None
        if isinstance(self.length, Tensor):
            self.rows = torch.arange(len(idx), device=device)[:, None]
            self.pos = self.length[:, None] + torch.arange(T, device=device)  # (B, T)
            self.mask = (torch.arange(self.size, device=device) <= self.pos[..., None])[:, None]
        elif self.length and T > 1:
            pos = torch.arange(self.length + T, device=device)
            self.mask = pos <= pos[self.length :, None]
        return self.layers_for(n_layer)

    def tokens_before(self, idx: Tensor, n: int) -> Tensor:
        """Returns the n - 1 tokens before idx (B, T), with -1 before the start of the text."""
        if not hasattr(self, "last_tokens"):
            self.last_tokens = idx.new_empty(len(idx), n - 1)
        if isinstance(self.length, int) and not self.length:
            self.last_tokens.fill_(-1)
        return self.last_tokens

    def copy_rows(self, rows: Tensor, other: "KVCache") -> None:
        """Overwrites these rows with the rows of another cache."""
        for mine, new in zip(self.layers, other.layers, strict=True):
            assert mine.k is not None and mine.v is not None and new.k is not None and new.v is not None
            mine.k[rows], mine.v[rows] = new.k, new.v
