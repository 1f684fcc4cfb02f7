"""The lecture's seven models, from a bigram table to the GPT; each adds one idea to the one before.

This code is written to be read: the mask, the softmax and each head are explicit, where gpt.py uses fast kernels. The
last step with a GPT's weights computes the same logits as that GPT, see `from_gpt`.

Shapes   B batch · T time (tokens) · C channels = n_embd · H heads · D channels of a head · V vocabulary
Source   Karpathy, "Let's build GPT: from scratch, in code, spelled out" (2023); names are those of gpt.py
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .gpt import GPT, GPTConfig

# --- the mathematical trick: three ways to average the past; the third can learn --------------------------------------


def average_with_loop(x: Tensor) -> Tensor:
    """Averages each token and all tokens before it, x (B, T, C) to (B, T, C): the definition, but slow."""
    B, T, C = x.shape
    means = torch.zeros_like(x)  # (B, T, C)
    for b in range(B):
        for t in range(T):
            past = x[b, : t + 1]  # (t + 1, C)
            means[b, t] = past.mean(0)  # (C)
    return means


def average_with_matrix(x: Tensor) -> Tensor:
    """Computes the same means as one matrix product: row t has 1 / (t + 1) for each token up to t, then zeros."""
    T = x.size(1)
    weights = torch.ones(T, T, dtype=x.dtype, device=x.device).tril()  # (T, T), lower triangle of ones
    weights = weights / weights.sum(1, keepdim=True)  # (T, T), each row sums to 1
    return weights @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def average_with_softmax(x: Tensor) -> Tensor:
    """Computes the same means from scores: 0, or minus infinity for the future. A head learns its scores."""
    T = x.size(1)
    scores = torch.zeros(T, T, dtype=x.dtype, device=x.device)  # (T, T)
    scores = scores.masked_fill(future_mask(T, x.device), -math.inf)  # (T, T)
    return softmax(scores) @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def future_mask(T: int, device: torch.device | None = None) -> Tensor:
    """Returns the mask (T, T), which is true in row t for each position after t: token t must not see them."""
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


def softmax(scores: Tensor) -> Tensor:
    """Divides exp(score) by the sum over the last dimension, any shape; minus infinity becomes 0."""
    weights = (scores - scores.max(-1, keepdim=True).values).exp()  # subtracting the maximum prevents overflow
    return weights / weights.sum(-1, keepdim=True)


# --- the parts --------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """One head of causal self-attention: softmax(Q K^T / sqrt(D)) V, with future tokens masked.

    A token's query is what it looks for, its key is what it contains, and its value is what it passes to the tokens
    whose query matches its key.
    """

    def __init__(self, config: GPTConfig, D: int):
        super().__init__()
        self.query = nn.Linear(config.n_embd, D, bias=config.bias)
        self.key = nn.Linear(config.n_embd, D, bias=config.bias)
        self.value = nn.Linear(config.n_embd, D, bias=config.bias)
        self.drop: nn.Module = nn.Identity()  # the last step replaces it with dropout

    def weights(self, x: Tensor) -> Tensor:
        """Returns the attention weights (B, T, T); row t has the weights of token t, sums to 1 and is 0 after t."""
        q, k = self.query(x), self.key(x)  # each (B, T, D)
        scores = q @ k.transpose(1, 2)  # (B, T, D) @ (B, D, T) -> (B, T, T)
        scores = scores / math.sqrt(q.size(-1))  # (B, T, T), else large scores make softmax pick one token
        scores = scores.masked_fill(future_mask(x.size(1), x.device), -math.inf)  # (B, T, T)
        return softmax(scores)  # (B, T, T)

    def forward(self, x: Tensor) -> Tensor:
        v = self.value(x)  # (B, T, D)
        return self.drop(self.weights(x)) @ v  # (B, T, T) @ (B, T, D) -> (B, T, D)


class Heads(nn.Module):
    """Several small heads in parallel, each with its own queries; D = C / H, so their concatenation has C channels."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        D = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, D) for _ in range(config.n_head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], -1)  # H x (B, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """A layer applied to each token separately: act(W x)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.act = nn.GELU() if config.activation == "gelu" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.c_fc(x))  # (B, T, C)


class ProjectedHeads(Heads):
    """Heads followed by a linear layer, which mixes their outputs before they are added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(super().forward(x))  # (B, T, C)


class MLP(nn.Module):
    """FeedForward with 4 C hidden channels and a projection back to the residual stream: W2 act(W1 x)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU() if config.activation == "gelu" else nn.ReLU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c_fc(x))  # (B, T, 4 C)
        return self.c_proj(x)  # (B, T, C)


class ResidualBlock(nn.Module):
    """Attention, then MLP; each adds its output to its input, so gradients flow back unchanged through the sums."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn = ProjectedHeads(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)  # (B, T, C)
        return x + self.mlp(x)  # (B, T, C)


class NormedBlock(ResidualBlock):
    """Layer norm before each branch: every token is normalized, (x - mean) / sqrt(var + eps), then scaled and shifted.

    Layer Normalization (Ba et al. 2016); before the branches as in GPT-2, not after them as in the 2017 Transformer.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class DropoutBlock(NormedBlock):
    """Dropout of attention weights and branch outputs: random ones are zeroed in training, against overfitting.

    Dropout (Srivastava et al. 2014).
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.drop = nn.Dropout(config.dropout)
        for head in self.attn.heads:
            head.drop = self.drop

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x)))  # (B, T, C)
        return x + self.drop(self.mlp(self.ln_2(x)))  # (B, T, C)


# --- the seven steps: token ids (B, T) in, logits of the next token (B, T, V) out -------------------------------------


class Bigram(nn.Module):
    """Step 1. A table: a token's row has the logits of the next token. Earlier tokens have no effect."""

    # settings that this step does not let you choose
    fixed: ClassVar[dict[str, Any]] = {
        "n_embd": GPTConfig.n_embd,
        "n_layer": 0,
        "n_head": 1,
        "bias": GPTConfig.bias,
        "activation": GPTConfig.activation,
        "dropout": 0.0,
    }

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)  # (B, T, V)


class OneHead(nn.Module):
    """Step 2. Embeddings of tokens and positions, and one head of attention to earlier tokens."""

    fixed: ClassVar[dict[str, Any]] = {
        "n_layer": 1,
        "n_head": 1,
        "activation": GPTConfig.activation,
        "dropout": 0.0,
    }

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = self.blocks(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(Head(config, config.n_embd))

    def embed(self, idx: Tensor) -> Tensor:
        """Adds token and position embeddings, idx (B, T) to (B, T, C).

        Raises:
            ValueError: T exceeds block_size.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        tokens = self.wte(idx)  # (B, T, C)
        positions = self.wpe(torch.arange(T, device=idx.device))  # (T, C)
        return tokens + positions  # (B, T, C)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)  # (B, T, C)
        x = self.h(x)  # (B, T, C)
        return self.lm_head(x)  # (B, T, V)


class SeveralHeads(OneHead):
    """Step 3. Several heads, so that a token can attend to several things at once."""

    fixed = {"n_layer": 1, "activation": GPTConfig.activation, "dropout": 0.0}

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(Heads(config))


class FeedForwardNet(SeveralHeads):
    """Step 4. A feed-forward layer, in which each token processes what attention has gathered."""

    fixed = {"n_layer": 1, "dropout": 0.0}

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(Heads(config), FeedForward(config))


class Residual(FeedForwardNet):
    """Step 5. Several blocks of attention and feed-forward, each with residual connections."""

    fixed = {"dropout": 0.0}

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(*(ResidualBlock(config) for _ in range(config.n_layer)))


class Normed(Residual):
    """Step 6. Layer norm before each branch and before the output layer."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(*(NormedBlock(config) for _ in range(config.n_layer)))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)  # (B, T, C)
        x = self.h(x)  # (B, T, C)
        x = self.ln_f(x)  # (B, T, C)
        return self.lm_head(x)  # (B, T, V)


class LectureGPT(Normed):
    """Step 7. The GPT: dropout and GPT-2's initialization. The lecture also makes this one larger."""

    fixed = {}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.drop = nn.Dropout(config.dropout)
        for name, p in self.named_parameters():  # normal(0, 0.02), scaled down in c_proj: GPT-2, section 2.3
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * config.n_layer) if "c_proj" in name else 1))

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(*(DropoutBlock(config) for _ in range(config.n_layer)))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.embed(idx))  # (B, T, C)
        x = self.h(x)  # (B, T, C)
        x = self.ln_f(x)  # (B, T, C)
        return self.lm_head(x)  # (B, T, V)


LectureModel = Bigram | OneHead
LECTURE_STEPS: dict[str, type[LectureModel]] = {
    "bigram": Bigram,
    "head": OneHead,
    "heads": SeveralHeads,
    "feedforward": FeedForwardNet,
    "residual": Residual,
    "layernorm": Normed,
    "gpt": LectureGPT,
}
# settings of gpt.py that the lecture does not have
NOT_IN_LECTURE = {
    "tie_embeddings",
    "position",
    "norm",
    "qk_norm",
    "logit_softcap",
    "init",
    "ngram_max",
    "ngram_buckets",
    "ngram_dropout",
}


def check_lecture_settings(lecture_step: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError if `given`, some of GPTConfig's settings by name, has one that the step fixes or lacks."""
    fixed = LECTURE_STEPS[lecture_step].fixed
    for name, value in given.items():
        if name in NOT_IN_LECTURE and value != getattr(GPTConfig, name):
            raise ValueError(
                f"lecture_step={lecture_step} has no {name}: leave {name}={value} out, or use lecture_step=null, "
                "the full GPT"
            )
        if value != fixed.get(name, value):
            first = next(other for other, net in LECTURE_STEPS.items() if name not in net.fixed)
            raise ValueError(
                f"lecture_step={lecture_step} has a fixed {name}: leave {name}={value} out, or use "
                f"lecture_step={first}, which lets you choose it"
            )


def build_net(settings: Mapping[str, Any]) -> GPT | LectureModel:
    """Builds the net that hyper-parameters describe: a step of the lecture if `lecture_step` is set, else the GPT.

    Args:
        settings: GPTConfig's settings by name; missing ones have their defaults, other names are ignored.
    Raises:
        ValueError: there is no such step, or it fixes or lacks a setting. A setting with GPTConfig's default counts as
            not given, since a LanguageModel has all settings; the command line uses `check_lecture_settings`.
    """
    sizes = {field.name: settings[field.name] for field in fields(GPTConfig) if field.name in settings}
    lecture_step = settings.get("lecture_step")
    if lecture_step is None:
        return GPT(GPTConfig(**sizes))
    if lecture_step not in LECTURE_STEPS:
        raise ValueError(
            f"lecture_step={lecture_step} is none of {', '.join(LECTURE_STEPS)}: use one of these, or null for the GPT"
        )
    check_lecture_settings(
        lecture_step, {name: value for name, value in sizes.items() if value != getattr(GPTConfig, name)}
    )
    if sizes.get("activation") not in ("relu", "gelu", None):
        raise ValueError(
            f"lecture_step={lecture_step} has activation=relu or gelu, not {sizes['activation']}: use one of these"
        )
    return LECTURE_STEPS[lecture_step](GPTConfig(**sizes | LECTURE_STEPS[lecture_step].fixed))


def from_gpt(net: GPT) -> LectureGPT:
    """Returns the last step of the lecture with a GPT's weights: different code, same logits.

    Raises:
        ValueError: the GPT has a setting that is not in the lecture.
    """
    lecture_gpt = build_net(asdict(net.config) | {"lecture_step": "gpt"})
    assert isinstance(lecture_gpt, LectureGPT)
    weights = {}
    for name, w in net.state_dict().items():
        if "c_attn" not in name:
            weights[name] = w
            continue
        for part, all_heads in zip(("query", "key", "value"), w.chunk(3), strict=True):  # (3 C, ..) -> 3 x (C, ..)
            for i, head in enumerate(all_heads.chunk(net.config.n_head)):  # (C, ..) -> H x (D, ..)
                weights[name.replace("c_attn", f"heads.{i}.{part}")] = head
    lecture_gpt.to(net.lm_head.weight).load_state_dict(weights)
    return lecture_gpt.train(net.training)
