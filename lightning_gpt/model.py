"""The decoder-only Transformer, in the order of the lecture: attention, MLP, block, GPT.

Shapes   B batch · T time (tokens) · C channels = n_embd · H heads · D = C / H · V vocabulary
Maths    GPT-2 (Radford et al. 2019): each branch normalises its input, positions are learned
Names    GPT-2's own (wte, c_attn, c_fc, ...; the c was for Conv1D), so that its weights load by name
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .generation import KVCache


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; n_layer = 0 is the lecture's bigram, where nothing looks further back than one token.

    Raises:
        ValueError: sizes that do not fit together, named with the remedy.
    """

    vocab_size: int = 65
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.2  # probability; on embeddings, attention weights and residual branches
    bias: bool = True  # in linear layers and norms; the head never has one
    tie_embeddings: bool = False  # one matrix for wte and lm_head, as in GPT-2
    activation: Literal["gelu", "relu"] = "gelu"

    def __post_init__(self):
        for name, least in dict(vocab_size=1, block_size=1, n_layer=0, n_head=1, n_embd=1).items():
            if (size := getattr(self, name)) < least:
                raise ValueError(f"{name}={size} must be at least {least}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head takes an equal share"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is a probability: 0 or more, and less than 1")


class CausalSelfAttention(nn.Module):
    """Every token asks itself and the tokens before it: softmax(Q K^T / sqrt(D)) V, in H heads at once.

    Attention Is All You Need (Vaswani et al. 2017), section 3.2, with the mask of its decoder.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self, k, v)  # (B, H, past + T, D)
        # one new token may see every cached one, so only a longer piece needs the mask
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0
        )  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Every token thinks for itself: W2 act(W1 x), four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.activation: Callable[[Tensor], Tensor] = F.gelu if config.activation == "gelu" else F.relu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """Communicate (attention), then compute (MLP); each branch adds to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits of the next token out, at every position at once."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Matrices normal(0, 0.02), thinner where a branch joins the residual stream; biases 0 (GPT-2, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            idx: token ids (B, T), 1 <= past + T <= block_size.
            cache: keys and values of `past` earlier tokens; it is extended by these T. Once it
                holds some, tokens come one at a time.
        Returns:
            logits (B, T, V).
        Raises:
            ValueError: past + T exceeds block_size.
        """
        past, T = (0 if cache is None else cache.length), idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit into block_size={self.config.block_size}")
        x = self.wte(idx) + self.wpe(torch.arange(past, past + T, device=idx.device))  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.lm_head(self.ln_f(x))
