"""Drawing the next token as `sampling.Sampler` does, in one Triton kernel, or in two for a large vocabulary.

PyTorch's sampler takes 74 us with GPT-2's 50,304 tokens and top_k on an H100, these kernels 13 us.

Shapes   B rows · V vocabulary
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_step import launch_options, next_power_of_2, pdl_wait

if TYPE_CHECKING:
    from .sampling import Sampler, SamplingConfig

MAX_TOKENS = 2**13  # that one program of `sample_kernel` can hold
GROUPS = 2**12  # of tokens, in a larger vocabulary


@triton.jit
def mask_top(probs, weight, target, limit):
    """The largest probs, as many as it takes for the sum of their weights to reach `target`; the others become 0.

    A sum of up to `limit` will do, which takes fewer steps. Non-negative floats are ordered as their bits are, so the
    threshold is found by bisection: those from `high` on weigh less than `target`, those from `low` on enough.
    """
    bits = probs.to(tl.int32, bitcast=True)
    high, reached = tl.max(bits) + 1, tl.sum(weight)
    low = tl.min(tl.where(weight > 0, bits, high))
    while (high - low > 1) & (reached > limit):
        middle = low + (high - low) // 2
        total = tl.sum(tl.where(bits >= middle, weight, 0.0))
        enough = total >= target
        reached = tl.where(enough, total, reached)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    above, equal = bits >= high, tl.where((bits >= low) & (bits < high), weight, 0.0)
    before = tl.sum(tl.where(above, weight, 0.0)) + tl.cumsum(equal) - equal
    return tl.where(above | (bits >= low) & (before < limit), probs, 0.0)


@triton.jit
def load_penalized(logits, seen, index, mask, penalty):
    """Logits with those of the tokens in the text made smaller."""
    z = tl.load(logits + index, mask=mask, other=float("-inf"))
    if seen is not None:
        old = tl.load(seen + index, mask=mask, other=0) != 0
        z = tl.where(old, tl.where(z > 0, z / penalty, z * penalty), z)
    return z


@triton.jit
def token_ids(group, i, GROUPS: tl.constexpr):
    """The token i of a group: eight neighbours, the eight that follow 8 GROUPS tokens later, ..."""
    return (i // 8 * GROUPS + group) * 8 + i % 8


@triton.jit
def shortlist_kernel(
    logits,
    seen,
    groups,  # (B, TOP)
    temperature,
    top_k,
    penalty,
    V,
    SIZE: tl.constexpr,  # tokens of a group
    GROUPS: tl.constexpr,
    TOP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The `top_k` to TOP groups of tokens with the largest maxima, which hold the `top_k` largest logits of the row."""
    b, group, i, slot = tl.program_id(0), tl.arange(0, GROUPS), tl.arange(0, 8)[None], tl.arange(0, TOP)
    pdl_wait(USE_PDL)
    highest = tl.full((GROUPS,), float("-inf"), tl.float32)
    for start in tl.static_range(0, SIZE, 8):
        v = token_ids(group[:, None], start + i, GROUPS)
        highest = tl.maximum(highest, tl.max(load_penalized(logits, seen, b * V + v, v < V, penalty), 1))
    z = tl.exp((highest - tl.max(highest)) / temperature)
    kept = mask_top(z, tl.where(highest > float("-inf"), 1.0, 0.0), top_k, TOP) > 0
    place = tl.cumsum(kept.to(tl.int32))
    tl.store(groups + b * TOP + slot, V, mask=slot >= tl.max(place))
    tl.store(groups + b * TOP + place - 1, group, mask=kept)


@triton.jit
def sample_kernel(
    logits,
    groups,  # of tokens to draw from, as `shortlist_kernel` leaves them
    noise,  # (noise_steps, B, V)
    token,
    ids,  # (B, steps)
    count,  # of tokens drawn so far, the same for each row
    seen,  # which tokens are in the text (B, V), with a repetition penalty
    logprobs,  # (B, steps), if wanted
    temperature,
    top_k,
    top_p,
    min_p,
    penalty,
    steps,
    noise_steps,
    V,
    ARGMAX: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The next token of each row, as `sampling.Sampler` draws it with the same noise."""
    b, v = tl.program_id(0), tl.arange(0, BLOCK)
    n = tl.load(count + b)
    if groups is not None:
        pdl_wait(USE_PDL)
        v = token_ids(tl.load(groups + b * (BLOCK // SIZE) + v // SIZE), v % SIZE, GROUPS)
    if not ARGMAX:
        draw_noise = tl.load(noise + ((n % noise_steps) * tl.num_programs(0) + b) * V + v, mask=v < V, other=1.0)
    if groups is None:
        pdl_wait(USE_PDL)
    z, i = load_penalized(logits, seen, b * V + v, v < V, penalty), tl.arange(0, BLOCK)
    if ARGMAX:
        new = tl.argmax(z, 0)
    else:
        z = tl.exp((z - tl.max(z)) / temperature)
        if TOP_P:
            if TOP_K:
                z = mask_top(z, tl.where(v < V, 1.0, 0.0), top_k, top_k)
            target = top_p * tl.sum(z)
            z = mask_top(z, z, target, target)
        elif groups is not None:  # top_k groups or more have a token of at least this weight
            highest = tl.max(tl.reshape(z, BLOCK // SIZE, SIZE), 1)
            z = tl.where(z >= tl.min(tl.where(highest > 0, highest, 1.0)), z, 0.0)
        z = tl.where(v < V, tl.where(z >= min_p, z, 0.0), -1.0)
        new = tl.argmax(z / draw_noise, 0)
        if TOP_K and not TOP_P:  # while top_k tokens or more are ahead of the drawn one, draw again among them
            weight = tl.max(tl.where(i == new, z, 0.0))
            ahead = (z > weight) | (z == weight) & (i < new)
            while tl.sum(ahead.to(tl.int32)) >= top_k:
                new = tl.argmax(tl.where(ahead, z / draw_noise, -1.0), 0)
                weight = tl.max(tl.where(i == new, z, 0.0))
                ahead = (z > weight) | (z == weight) & (i < new)
    if groups is not None:
        new = tl.max(tl.where(i == new, v, 0))
    tl.store(token + b, new)
    tl.store(ids + b * steps + n, new)
    tl.store(count + b, n + 1)
    if seen is not None:
        tl.store(seen + b * V + new, 1)
    if logprobs is not None:
        unpenalized = tl.load(logits + b * V + v, mask=v < V, other=float("-inf"))
        highest = tl.max(unpenalized)
        chosen = tl.sum(tl.where(v == new, unpenalized, 0.0))
        tl.store(logprobs + b * steps + n, chosen - highest - tl.log(tl.sum(tl.exp(unpenalized - highest))))


def shortlist_shape(sampling: "SamplingConfig", V: int) -> tuple[int, int]:
    """Groups of the shortlist, a power of 2, and tokens of each group."""
    top_k = 1 if sampling.temperature == 0 else sampling.top_k or V
    return next_power_of_2(top_k), next_power_of_2(triton.cdiv(V, GROUPS), 8)


def can_draw(sampler: "Sampler") -> bool:
    """Whether `draw` takes this vocabulary, or finds few enough tokens in it to draw from."""
    V = sampler.noise.size(2)
    top, size = shortlist_shape(sampler.sampling, V)
    return V <= MAX_TOKENS or sampler.logprobs is None and top * size <= MAX_TOKENS


def draw(sampler: "Sampler", logits: Tensor) -> None:
    """What `sampler(logits)` does, in one kernel or two; logits (B, V) in float32."""
    how, (B, V), launch = sampler.sampling, logits.shape, launch_options(logits.device)
    seen = sampler.seen.view(torch.uint8) if how.repetition_penalty != 1 else None
    top, size = shortlist_shape(how, V)
    temperature, groups, block = max(how.temperature, 1e-30), None, next_power_of_2(V)
    if V > MAX_TOKENS:
        groups, block = torch.empty(B, top, dtype=torch.int32, device=logits.device), top * size
        shortlist_kernel[B,](
            logits,
            seen,
            groups,
            temperature,
            float(min(how.top_k or 1, top)),
            how.repetition_penalty,
            V,
            SIZE=size,
            GROUPS=GROUPS,
            TOP=top,
            num_warps=8,
            **launch,
        )
    sample_kernel[B,](
        logits,
        groups,
        sampler.noise,
        sampler.token,
        sampler.ids,
        sampler.count,
        seen,
        sampler.logprobs,
        temperature,
        float(how.top_k or 0),
        how.top_p or 1.0,
        how.min_p or 0.0,
        how.repetition_penalty,
        sampler.ids.size(1),
        sampler.noise_steps,
        V,
        ARGMAX=how.temperature == 0,
        TOP_K=how.top_k is not None and how.top_k < V,
        TOP_P=how.top_p is not None and how.top_p < 1,
        BLOCK=block,
        SIZE=size,
        GROUPS=GROUPS,
        num_warps=min(16, max(1, block // 256)),
        **launch,
    )
