"""The lecture's ladder: seven models, from a table to the GPT, each with one idea more than the one before.

Written to be read: mask, softmax and every single head stand here in plain sight, where model.py leaves them to fast
kernels. The last lecture_step with a GPT's weights gives that GPT's logits, see `from_gpt`.

Shapes   B batch · T time (tokens) · C channels = n_embd · H heads · D channels of a head · V vocabulary
Source   Karpathy, "Let's build GPT: from scratch, in code, spelled out" (2023); names are model.py's
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .gpt import GPT, GPTConfig

# --- the mathematical trick: three ways to average the past, and the third one can learn ------------------------------


def average_with_loop(x: Tensor) -> Tensor:
    """The mean of each token and all before it, x (B, T, C) to (B, T, C): the definition, and slow."""
    B, T, C = x.shape
    means = torch.zeros_like(x)  # (B, T, C)
    for b in range(B):
        for t in range(T):
            past = x[b, : t + 1]  # (t + 1, C)
            means[b, t] = past.mean(0)  # (C)
    return means


def average_with_matrix(x: Tensor) -> Tensor:
    """The same means in one product: row t of the matrix has 1 / (t + 1) for each token up to t, and then zeros."""
    T = x.size(1)
    weights = torch.ones(T, T, dtype=x.dtype, device=x.device).tril()  # (T, T), ones in a triangle
    weights = weights / weights.sum(1, keepdim=True)  # (T, T), each row sums to 1
    return weights @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def average_with_softmax(x: Tensor) -> Tensor:
    """The same means from scores: 0 for all, minus infinity for the future. A head learns better scores than 0."""
    T = x.size(1)
    scores = torch.zeros(T, T, dtype=x.dtype, device=x.device)  # (T, T)
    scores = scores.masked_fill(future_mask(T, x.device), -math.inf)  # (T, T)
    return softmax(scores) @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def future_mask(T: int, device: torch.device | None = None) -> Tensor:
    """The mask (T, T): true in row t at each place after t, which token t must not see."""
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


def softmax(scores: Tensor) -> Tensor:
    """exp(score) as shares of its row's sum, any shape; minus infinity gets no share."""
    odds = (scores - scores.max(-1, keepdim=True).values).exp()  # less the largest, so that none overflows
    return odds / odds.sum(-1, keepdim=True)


# --- the parts --------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """One head of self-attention: softmax(Q K^T / sqrt(D)) V, and no look at the future.

    Each token asks (query), says what it has (key), and is listened to (value) by those whose question it answers.
    """

    def __init__(self, config: GPTConfig, D: int):
        super().__init__()
        self.query = nn.Linear(config.n_embd, D, bias=config.bias)
        self.key = nn.Linear(config.n_embd, D, bias=config.bias)
        self.value = nn.Linear(config.n_embd, D, bias=config.bias)
        self.drop: nn.Module = nn.Identity()  # the last lecture_step puts dropout here

    def weights(self, x: Tensor) -> Tensor:
        """How much token t listens to each other one, (B, T, T): row t sums to 1, and is 0 after t."""
        q, k = self.query(x), self.key(x)  # each (B, T, D)
        scores = q @ k.transpose(1, 2)  # (B, T, D) @ (B, D, T) -> (B, T, T)
        scores = scores / math.sqrt(q.size(-1))  # (B, T, T), or the softmax of large ones picks one token only
        scores = scores.masked_fill(future_mask(x.size(1), x.device), -math.inf)  # (B, T, T)
        return softmax(scores)  # (B, T, T)

    def forward(self, x: Tensor) -> Tensor:
        v = self.value(x)  # (B, T, D)
        return self.drop(self.weights(x)) @ v  # (B, T, T) @ (B, T, D) -> (B, T, D)


class Heads(nn.Module):
    """Several small heads side by side, each with a question of its own; D = C / H, so together they are as wide."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        D = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, D) for _ in range(config.n_head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], -1)  # H x (B, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """Having listened, each token thinks for itself: act(W x)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.act = nn.GELU() if config.activation == "gelu" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.c_fc(x))  # (B, T, C)


class ProjectedHeads(Heads):
    """Heads whose findings are mixed before they join the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(super().forward(x))  # (B, T, C)


class MLP(nn.Module):
    """FeedForward, four times as wide inside, and a projection back to the residual stream: W2 act(W1 x)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU() if config.activation == "gelu" else nn.ReLU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c_fc(x))  # (B, T, 4 C)
        return self.c_proj(x)  # (B, T, C)


class ResidualBlock(nn.Module):
    """Communicate, then compute; each adds to what is there, so the gradient has a way through that nothing bends."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn = ProjectedHeads(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)  # (B, T, C)
        return x + self.mlp(x)  # (B, T, C)


class NormedBlock(ResidualBlock):
    """Each branch sees its input with mean 0 and variance 1 in every token: (x - mean) / sqrt(var + eps), times a
    learnt scale, plus a learnt bias.

    Layer Normalization (Ba et al. 2016), before the branches as in GPT-2, and not after them as in 2017.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class DropoutBlock(NormedBlock):
    """In training, chance leaves out who listens to whom and what a branch says, so that nothing is leaned on.

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


# --- the rungs: token ids (B, T) in, logits of the next token (B, T, V) out -------------------------------------------


class Bigram(nn.Module):
    """Rung 1. A table: a token's row holds the logits of what comes after it. Nothing earlier counts."""

    # what there is no choice of on this lecture_step
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
    """Rung 2. A token is a vector, its place is another, and a head lets it look at those before it."""

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
        """What the tokens are and where they stand, idx (B, T) to (B, T, C).

        Raises:
            ValueError: T exceeds block_size.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        what = self.wte(idx)  # (B, T, C)
        where = self.wpe(torch.arange(T, device=idx.device))  # (T, C)
        return what + where  # (B, T, C)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)  # (B, T, C)
        x = self.h(x)  # (B, T, C)
        return self.lm_head(x)  # (B, T, V)


class SeveralHeads(OneHead):
    """Rung 3. Several heads, so that a token can ask several things at once."""

    fixed = {"n_layer": 1, "activation": GPTConfig.activation, "dropout": 0.0}

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(Heads(config))


class FeedForwardNet(SeveralHeads):
    """Rung 4. A layer in which each token works on what it has heard."""

    fixed = {"n_layer": 1, "dropout": 0.0}

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(Heads(config), FeedForward(config))


class Residual(FeedForwardNet):
    """Rung 5. Both again and again, in blocks that each add to a residual stream."""

    fixed = {"dropout": 0.0}

    def blocks(self, config: GPTConfig) -> nn.Sequential:
        return nn.Sequential(*(ResidualBlock(config) for _ in range(config.n_layer)))


class Normed(Residual):
    """Rung 6. Layer norm before each branch, and before the logits."""

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
    """Rung 7. The GPT: dropout and GPT-2's first weights let it grow; the rest is size."""

    fixed = {}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.drop = nn.Dropout(config.dropout)
        for name, p in self.named_parameters():  # normal(0, 0.02), thinner where a branch ends: GPT-2, section 2.3
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
# what model.py can do and the lecture does not
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
    """Raises ValueError if one of GPTConfig's settings is given, by name, that the lecture_step has no choice of."""
    fixed = LECTURE_STEPS[lecture_step].fixed
    for name, value in given.items():
        if name in NOT_IN_LECTURE and value != getattr(GPTConfig, name):
            raise ValueError(
                f"lecture_step={lecture_step} has no {name}: leave {name}={value} out, or take lecture_step=null, "
                "the GPT itself"
            )
        if value != fixed.get(name, value):
            first = next(other for other, net in LECTURE_STEPS.items() if name not in net.fixed)
            raise ValueError(
                f"lecture_step={lecture_step} has no choice of {name}: leave {name}={value} out, or take "
                f"lecture_step={first}, which has"
            )


def build_net(settings: Mapping[str, Any]) -> GPT | LectureModel:
    """The net that hyper-parameters describe: a step of the lecture where `lecture_step` names one, else the GPT.

    Args:
        settings: GPTConfig's by name, those that lack are at their default, and others are left alone.
    Raises:
        ValueError: there is no such step, or it lacks what a setting is for. A setting at GPTConfig's default counts as
            not given, since a LanguageModel has them all; see `check_lecture_settings` for the command line.
    """
    sizes = {field.name: settings[field.name] for field in fields(GPTConfig) if field.name in settings}
    lecture_step = settings.get("lecture_step")
    if lecture_step is None:
        return GPT(GPTConfig(**sizes))
    if lecture_step not in LECTURE_STEPS:
        raise ValueError(
            f"lecture_step={lecture_step} is none of {', '.join(LECTURE_STEPS)}: take one of these, or null for the GPT"
        )
    check_lecture_settings(
        lecture_step, {name: value for name, value in sizes.items() if value != getattr(GPTConfig, name)}
    )
    if sizes.get("activation") not in ("relu", "gelu", None):
        raise ValueError(
            f"lecture_step={lecture_step} has activation=relu or gelu, and not {sizes['activation']}: take one of these"
        )
    return LECTURE_STEPS[lecture_step](GPTConfig(**sizes | LECTURE_STEPS[lecture_step].fixed))


def from_gpt(net: GPT) -> LectureGPT:
    """The last lecture_step with a GPT's own weights: other code, same logits.

    Raises:
        ValueError: the GPT has something that is not in the lecture.
    """
    lecture_step = build_net(asdict(net.config) | {"lecture_step": "gpt"})
    assert isinstance(lecture_step, LectureGPT)
    weights = {}
    for name, w in net.state_dict().items():
        if "c_attn" not in name:
            weights[name] = w
            continue
        for part, of_all_heads in zip(("query", "key", "value"), w.chunk(3), strict=True):  # (3 C, ..) -> 3 x (C, ..)
            for i, of_one in enumerate(of_all_heads.chunk(net.config.n_head)):  # (C, ..) -> H x (D, ..)
                weights[name.replace("c_attn", f"heads.{i}.{part}")] = of_one
    lecture_step.to(net.lm_head.weight).load_state_dict(weights)
    return lecture_step.train(net.training)
