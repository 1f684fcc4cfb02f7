"""Measurements of a GPT's activations: residual stream, attention weights, loss per token.

Shapes   T time (tokens) · C channels · H heads · D = C / H · V vocabulary · L layers
"""

from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.tokenizers import Tokenizer
from ..model.gpt import GPT, CausalSelfAttention, apply_rope

# --- looking ----------------------------------------------------------------------------------------------------------


def token_label(tokenizer: Tokenizer, i: int) -> str:
    """A token as one can see it: white space has signs."""
    text = tokenizer.decode(torch.tensor([i]))
    signs = {" ": "␣", "\n": "↵", "\t": "→"}
    return "".join(
        signs.get(c, c if c.isprintable() else "�") for c in (text if len(text) == 1 else text.strip() or text)
    )


@torch.no_grad()
def residual_streams(net: GPT, idx: Tensor) -> Tensor:
    """The residual stream of idx (1, T): into the first block, between blocks, out of the last; (L + 1, T, C)."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for block in net.h:
            hooks.enter_context(block.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        last = net.features(idx)
    return torch.cat([*seen, last])


@torch.no_grad()
def attention_weights(layer: CausalSelfAttention, x: Tensor, rope: Tensor | None) -> Tensor:
    """How much each place looks at each other, (H, T, T), by the layer's own forward on x (1, T, C).

    A head's output is its weights times the values. So values that are 1 at one place and channel and 0 elsewhere make
    it tell its weights, D places at a time.
    """
    T, C, H = x.size(1), x.size(2), layer.n_head
    D, maps = C // H, []
    for first in range(0, T, D):
        ones = torch.eye(T, dtype=x.dtype, device=x.device)[:, first : first + D]
        values, told = F.pad(ones, (0, D - ones.size(1))).repeat(1, H)[None], list[Tensor]()

        def replace(_, args, qkv: Tensor, values: Tensor = values) -> Tensor:
            return torch.cat((qkv[..., : 2 * C], values), -1)

        def listen(_, args, told: list[Tensor] = told) -> None:
            told.append(args[0])

        with layer.c_attn.register_forward_hook(replace), layer.c_proj.register_forward_pre_hook(listen):
            layer(x, rope)
        maps.append(told[0].view(T, H, D).transpose(0, 1)[..., : ones.size(1)])
    return torch.cat(maps, -1)


@torch.no_grad()
def attention_maps(net: GPT, idx: Tensor) -> list[Tensor]:
    """The attention weights of each layer over idx (1, T), each (H, T, T)."""
    seen: list[tuple] = []
    layers = [cast(CausalSelfAttention, block.attn) for block in net.h]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, args: seen.append(args)))
        net.features(idx)
    return [attention_weights(layer, x, rope) for layer, (x, rope, _) in zip(layers, seen, strict=True)]


@torch.no_grad()
def token_losses(net: GPT, ids: Tensor) -> Tensor:
    """The loss at each token of ids (T + 1,) but the first, in nats, (T,)."""
    return F.cross_entropy(net(ids[None, :-1])[0].float(), ids[1:], reduction="none")


@torch.no_grad()
def position_similarity(net: GPT) -> Tensor:
    """Cosine of each pair of positions, (T, T): of their learned vectors, or of one vector turned by their angles."""
    if net.config.position == "learned":
        vectors = net.wpe.weight.float()
    else:
        ones = torch.ones(1, net.config.block_size, 1, net.config.n_embd // net.config.n_head, device=net.rope.device)
        vectors = apply_rope(ones, net.rope)[0, :, 0].float()
    vectors = F.normalize(vectors, dim=-1)
    return vectors @ vectors.T
