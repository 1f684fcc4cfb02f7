"""One decode step of a GPT on a CPU, in few calls.

At one token per row a small net's arithmetic takes less time than Python and PyTorch need to dispatch it: module calls,
views, dropout that does nothing. The maths is gpt.py's.

Shapes   B rows · C channels · H heads · D channels of a head · S positions in the cache
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.gpt import GPT, activate
from ..model.int8 import Int8Linear

if TYPE_CHECKING:
    from ..model.kv_cache import KVCache


def functional(module: Any) -> Callable[[Tensor], Tensor]:
    """What a norm or a linear layer computes of x (B, C), without the calls of modules and the look-up of weights."""
    if isinstance(module, nn.Linear):
        w, b = module.weight, module.bias
        return lambda x: F.linear(x, w, b)
    if isinstance(module, Int8Linear):
        return module.forward
    if isinstance(module, nn.LayerNorm):
        shape, weight, bias, eps = list(module.normalized_shape), module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if isinstance(module, nn.RMSNorm):
        size, epsilon = list(module.normalized_shape), module.eps
        return lambda x: F.rms_norm(x, size, None, epsilon)
    return module


class CPUStep:
    """What EagerStep computes, for rows of one length, in half the time for a small net."""

    def __init__(self, net: GPT, cache: "KVCache"):
        c = net.config
        self.net, self.cache, self.D = net, cache, c.n_embd // c.n_head
        self.shape = -1, 3, c.n_head, self.D
        self.ln_e = functional(net.ln_e)
        self.blocks = []
        for block in cast(Any, net.h):
            layers = block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj
            self.blocks.append([functional(layer) for layer in layers])
        if c.position == "rope":  # (a, b) cos + (b, -a) sin is rotate(), in one piece
            cos, sin = net.rope
            self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)

    def step(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) after the newest token of every row, token_ids (B, 1); they join the cache."""
        net, c, cache, pos, D = self.net, self.net.config, self.cache, self.cache.length, self.D
        assert isinstance(pos, int)
        x = F.embedding(token_ids[:, 0], net.wte.weight)  # (B, C)
        if c.position == "learned":
            x = x + net.wpe.weight[pos]
        if c.ngram_max > 1:
            x = x + net.ngram_embeddings(token_ids, cache)[:, 0]
        x = self.ln_e(x)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            assert layer.k is not None and layer.v is not None
            ln_1, qkv_linear, out_linear, ln_2, fc_linear, proj_linear = block
            qkv = qkv_linear(ln_1(x)).view(self.shape)  # (B, 3, H, D)
            q, k, v = qkv.unbind(1)
            if c.qk_norm or c.position == "rope":
                qk = qkv[:, :2]
                if c.qk_norm:
                    qk = F.rms_norm(qk, (D,), None, 1e-6)
                if c.position == "rope":
                    qk = torch.addcmul(qk * self.cos[pos], qk.roll(D // 2, -1), self.sin[pos]).type_as(x)
                q, k = qk.unbind(1)
            layer.k.select(2, pos).copy_(k)
            layer.v.select(2, pos).copy_(v)
            keys, values = layer.k.narrow(2, 0, pos + 1), layer.v.narrow(2, 0, pos + 1)
            y = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values)  # (B, H, 1, D)
            x = x + out_linear(y.flatten(1))
            x = x + proj_linear(activate(fc_linear(ln_2(x)), c.activation))
        cache.length = pos + 1
        return net.logits(x)
