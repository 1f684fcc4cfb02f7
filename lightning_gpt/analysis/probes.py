"""Measurements of a GPT's activations: residual stream, attention weights, loss per token.

Shapes   T time (tokens) · C channels · H heads · D = C / H · L layers
"""

from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.tokenizers import Tokenizer
from ..model.gpt import GPT, CausalSelfAttention


def token_label(tokenizer: Tokenizer, i: int) -> str:
    """The text of token i with visible signs for white space, which is stripped from the ends of longer tokens."""
    text = tokenizer.decode(torch.tensor([i]))
    signs = {" ": "␣", "\n": "↵", "\t": "→"}
    return "".join(
        signs.get(c, c if c.isprintable() else "�") for c in (text if len(text) == 1 else text.strip() or text)
    )


@torch.no_grad()
def residual_streams(net: GPT, idx: Tensor) -> Tensor:
    """Returns the input of each block and the output of `net.features` for idx (1, T), as (L + 1, T, C)."""
    inputs: list[Tensor] = []
    with ExitStack() as hooks:
        for block in net.h:
            hooks.enter_context(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
        last = net.features(idx)
    return torch.cat([*inputs, last])


@torch.no_grad()
def attention_weights(layer: CausalSelfAttention, x: Tensor, rope: Tensor | None) -> Tensor:
    """Attention weights (H, queries T, keys T) of the layer's forward pass on x (1, T, C).

    A head's output is its weights times the values. With rows of the identity matrix as values, the output is the
    weights of D keys, so ceil(T / D) forward passes return all of them.
    """
    T, C, H = x.size(1), x.size(2), layer.n_head
    D, maps = C // H, []
    for start in range(0, T, D):
        ones = torch.eye(T, dtype=x.dtype, device=x.device)[:, start : start + D]
        values, outputs = F.pad(ones, (0, D - ones.size(1))).repeat(1, H)[None], list[Tensor]()

        def replace_values(_, args, qkv: Tensor, values: Tensor = values) -> Tensor:
            return torch.cat((qkv[..., : 2 * C], values), -1)

        def record_output(_, args, outputs: list[Tensor] = outputs) -> None:
            outputs.append(args[0])

        with (
            layer.c_attn.register_forward_hook(replace_values),
            layer.c_proj.register_forward_pre_hook(record_output),
        ):
            layer(x, rope)
        maps.append(outputs[0].view(T, H, D).transpose(0, 1)[..., : ones.size(1)])
    return torch.cat(maps, -1)


@torch.no_grad()
def attention_maps(net: GPT, idx: Tensor) -> list[Tensor]:
    """Attention weights (H, T, T) of each layer for idx (1, T)."""
    inputs: list[tuple] = []
    layers = [cast(CausalSelfAttention, block.attn) for block in net.h]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, args: inputs.append(args)))
        net.features(idx)
    return [attention_weights(layer, x, rope) for layer, (x, rope, _) in zip(layers, inputs, strict=True)]


@torch.no_grad()
def token_losses(net: GPT, ids: Tensor) -> Tensor:
    """Cross-entropy (T,) in nats of every token of ids (T + 1,) except the first."""
    return F.cross_entropy(net(ids[None, :-1])[0].float(), ids[1:], reduction="none")


@torch.no_grad()
def position_similarity(net: GPT) -> Tensor:
    """Cosine similarity (T, T) of all learned position embeddings."""
    vectors = F.normalize(net.wpe.weight.float(), dim=-1)
    return vectors @ vectors.T
