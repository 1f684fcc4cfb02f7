"""The decoder-only Transformer, in the order of the lecture: attention, MLP, block, GPT.

Shapes   B batch · T time (tokens) · C channels = n_embd · H heads · D = C / H · V vocabulary
Maths    GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions. The settings of GPTConfig turn the same
         block, one by one, into the modern one of configs/shakespeare.yaml
Names    GPT-2's (wte, c_attn, c_fc, ...; c stood for Conv1D), so that its weights load by name
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .kv_cache import KVCache, LayerCache


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; with n_layer=0 it is the lecture's bigram model.

    Args:
        vocab_size: number of token ids; comes from the data.
        block_size: longest context, in tokens.
        n_layer: number of blocks; 0 is the lecture's bigram.
        n_head: attention heads of a block.
        n_embd: width of the residual stream, in channels; divisible by n_head.
        dropout: probability; on embeddings, attention weights and residual branches.
        bias: whether linear layers and norms have one; the head never does.
        tie_embeddings: whether the head shares the token embedding's matrix, as in GPT-2.
        activation: of the MLP; gelu_tanh is GPT-2's approximation of gelu.
        position: learned embeddings; or rope, rotations of queries and keys.
        norm: layernorm, with learned weights; or rmsnorm, without weights, and after the embedding too.
        qk_norm: whether each head normalizes its queries and keys.
        logit_softcap: squash logits softly into (-softcap, softcap); 0 leaves them as they are.
        init: gpt2; or zero, where residual branches and head start at 0, so that the first loss is ln(vocab_size).
        ngram_max: add hashed embeddings of the last 2 ... ngram_max tokens to the token's; 1 adds none.
        ngram_buckets: rows of the table of these embeddings; n-grams whose hashes collide share a row.
        ngram_dropout: probability that a token gets no n-gram embeddings in training.
    Raises:
        ValueError: sizes that do not fit together; names the remedy.
    """

    vocab_size: int = 65
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.2
    bias: bool = True
    tie_embeddings: bool = False
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = "gelu"
    position: Literal["learned", "rope"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    qk_norm: bool = False
    logit_softcap: float = 0.0
    init: Literal["gpt2", "zero"] = "gpt2"
    ngram_max: int = 1
    ngram_buckets: int = 65536
    ngram_dropout: float = 0.2

    def __post_init__(self):
        for name, least in dict(
            vocab_size=1, block_size=1, n_layer=0, n_head=1, n_embd=1, ngram_max=1, ngram_buckets=1
        ).items():
            if (size := getattr(self, name)) < least:
                raise ValueError(f"{name}={size} must be at least {least}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: all heads have the same width"
            )
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"position=rope rotates pairs of channels, and n_embd={self.n_embd} / n_head={self.n_head} gives every "
                f"head an odd number, {self.n_embd // self.n_head}: take another n_head"
            )
        if self.logit_softcap < 0:
            raise ValueError(f"logit_softcap={self.logit_softcap} must be 0 (no softcap) or more")
        for name in "dropout", "ngram_dropout":
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is a probability: 0 or more, and less than 1")


def parameter_role(name: str) -> str:
    """Which part of a net a parameter belongs to, by its name: embeddings, h.0, h.1 ... or head."""
    part, *rest = name.split(".")
    return f"h.{rest[0]}" if part == "h" else "embeddings" if part.startswith("w") or part == "ln_e" else "head"


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016), or x / sqrt(mean(x^2)): RMSNorm (Zhang & Sennrich 2019) without weights."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rope_table(block_size: int, D: int) -> Tensor:
    """cos and sin of position * 10000^(-2i/D), each (block_size, D/2): RoFormer (Su et al. 2021), section 3.4.2."""
    angle = torch.arange(block_size)[:, None] * 10_000 ** (-torch.arange(0, D, 2) / D)
    return torch.stack((angle.cos(), angle.sin()))


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """x (B, T, H, D) with channel pairs (i, i + D/2) rotated by their position's angle, table (2, [B,] T, D/2)."""
    cos, sin = table[..., None, :]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1).type_as(x)


class CausalSelfAttention(nn.Module):
    """Every token attends to itself and the tokens before it: softmax(Q K^T / sqrt(D)) V, in H heads at once.

    Attention Is All You Need (Vaswani et al. 2017), section 3.2, with the mask of its decoder.
    qk_norm: Query-Key Normalization (Henry et al. 2020), here without a learned scale.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout, self.qk_norm = config.n_head, config.dropout, config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rope: Tensor | None = None, cache: "LayerCache | None" = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # 3 x (B, T, H, D)
        if self.qk_norm:
            q, k = (F.rms_norm(z, z.shape[-1:], eps=1e-6) for z in (q, k))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # 3 x (B, H, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(k, v)  # (B, H, past + T, D)
        # a single new token attends to every cached one, so only several need the causal mask
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=mask is None and (cache is None or T > 1),
            dropout_p=self.dropout if self.training else 0.0,
        )  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


def activate(x: Tensor, activation: str) -> Tensor:
    """The MLP's nonlinearity; relu2 is relu(x)^2 (Primer, So et al. 2021). swiglu halves the channels: silu(a) * b
    (Shazeer 2020)."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "swiglu":
        a, b = x.chunk(2, -1)
        return F.silu(a) * b
    x = F.relu(x)
    return x.square() if activation == "relu2" else x


class MLP(nn.Module):
    """Works on each token alone: W2 act(W1 x), four times as wide inside; with swiglu, a and b are 8/3 as wide each."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.activation = config.dropout, config.activation
        gated = config.activation == "swiglu"
        inner = 8 * config.n_embd // 3 if gated else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, (1 + gated) * inner, bias=config.bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(activate(self.c_fc(x), self.activation))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Communicate (attention), then compute (MLP); each branch adds to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor | None = None, cache: "LayerCache | None" = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits of the next token out, at every position at once."""

    rope: Tensor  # the table of angles, if position is rope

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.ngram_max > 1:
            self.wng = nn.Embedding(config.ngram_buckets, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            table = rope_table(config.block_size, config.n_embd // config.n_head)
            self.register_buffer("rope", table, persistent=False)
        self.ln_e = make_norm(config) if config.norm == "rmsnorm" else nn.Identity()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """gpt2: matrices normal(0, 0.02), smaller where a branch joins the residual stream; biases 0 (section 2.3).

        zero: branches, head and n-grams 0, embeddings normal(0, 1), other matrices uniform with std 0.5/sqrt(n_embd).
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif self.config.init == "zero":
                if name.endswith("c_proj.weight") or name in ("lm_head.weight", "wng.weight"):
                    nn.init.zeros_(p)
                elif name in ("wte.weight", "wpe.weight"):
                    nn.init.normal_(p)
                elif p.dim() == 2:
                    bound = 0.5 * math.sqrt(3 / self.config.n_embd)
                    nn.init.uniform_(p, -bound, bound)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def ngram_embeddings(self, idx: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """The sum (B, T, C) of the embeddings of the last two, the last three ... the last `ngram_max` tokens.

        Hash n-gram embeddings of the Byte Latent Transformer (Pagnoni et al. 2024), section 3.2.1: a hash assigns the
        n-grams to the rows of the table, so some share a row.
        """
        n = self.config.ngram_max
        ids = F.pad(idx, (n - 1, 0), value=-1)  # -1: before the text
        if cache is not None:
            ids = torch.cat((cache.tokens_before(idx, n), idx), 1)
            cache.last_tokens.copy_(ids[:, ids.size(1) - n + 1 :])
        key, keys = idx, []
        for k in range(1, n):
            earlier = ids[:, n - 1 - k : ids.size(1) - k]  # the token k positions before
            key = (key * 1_000_003 + earlier + 1) % 2_147_483_647
            keys.append(key % self.config.ngram_buckets)
        return self.wng(torch.stack(keys)).sum(0)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of the last block's output, x (B, T, C); softcapped as in Gemma 2 (2024), section 2."""
        z = self.lm_head(self.ln_f(x))
        if softcap := self.config.logit_softcap:
            z = z.to(torch.promote_types(z.dtype, torch.float32))  # bfloat16 has three digits
            z = softcap * torch.tanh(z / softcap)
        return z

    def forward(self, idx: Tensor, cache: "KVCache | None" = None, only: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            idx: token ids (B, T), 1 <= past + T <= block_size.
            cache: keys and values of `past` earlier tokens; these T are appended.
            only: return the logits at one position of each row, (B,).
        Returns:
            logits (B, T, V), or (B, 1, V) with `only`.
        Raises:
            ValueError: past + T exceeds block_size.
        """
        x = self.features(idx, cache)
        if only is not None:
            x = x[torch.arange(len(x), device=x.device), only][:, None]
        return self.logits(x)

    def features(self, idx: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """The last block's output (B, T, C); `forward` without the head."""
        past, T = (0 if cache is None else cache.length), idx.size(1)
        if isinstance(past, int) and past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit into block_size={self.config.block_size}")
        x, rope = self.wte(idx), None  # (B, T, C)
        if isinstance(past, Tensor):  # every row has its own position
            pos = past[:, None] + torch.arange(T, device=idx.device)  # (B, T)
        else:
            pos = torch.arange(past, past + T, device=idx.device)  # (T,)
        if self.config.position == "learned":
            x = x + self.wpe(pos)
        else:
            rope = self.rope[:, pos] if isinstance(past, Tensor) else self.rope[:, past : past + T]
        if self.config.ngram_max > 1:
            keep = F.dropout(torch.ones_like(x[..., :1]), self.config.ngram_dropout, self.training)  # (B, T, 1)
            x = x + keep * self.ngram_embeddings(idx, cache)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too, or every addition would be in float32
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = F.dropout(self.ln_e(x), self.config.dropout, self.training)
        layers = [None] * len(self.h) if cache is None else cache.prepare(idx, len(self.h))
        for block, layer in zip(self.h, layers, strict=True):
            x = block(x, rope, layer)
        if cache is not None:
            cache.length += T  # in place where it is a tensor, as a captured step requires
        return x
