"""A GPT reading one token a row on a GPU, in few kernels: embed, five for each block, one for the head, one to draw.

At one token a kernel's work takes less time than its start, so what counts is how few there are. The maths is
model.py's; sums, norms and the residual stream are in float32, whatever the weights are. Written in Triton.

Shapes   B rows · N outputs · K inputs · H heads · D channels of a head · S places in the cache · V vocabulary
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..model.gpt import CausalSelfAttention

if TYPE_CHECKING:
    from .engine import DecodeSession

MAX_VOCAB = 2**13  # tokens among which one program can draw


@triton.jit
def pdl_wait(CHAIN: tl.constexpr):
    """Wait for the kernel before, whose end this one may have overtaken, and let the next one begin likewise."""
    if CHAIN:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def embed_kernel(token, length, wte, wpe, more, x, C, RMS: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    """x[b] = wte[token[b]] + wpe[length[b]] + more[b], rms-normalised or not; the row is one token longer then."""
    b, c = tl.program_id(0), tl.arange(0, BLOCK)
    pdl_wait(CHAIN)
    place = tl.load(length + b)
    z = tl.load(wte + tl.load(token + b) * C + c, mask=c < C, other=0.0).to(tl.float32)
    if wpe is not None:
        z += tl.load(wpe + place * C + c, mask=c < C, other=0.0).to(tl.float32)
    if more is not None:
        z += tl.load(more + b * C + c, mask=c < C, other=0.0).to(tl.float32)
    if RMS:
        z *= tl.rsqrt(tl.sum(z * z) / C + 1e-6)
    tl.store(x + b * C + c, z, mask=c < C)
    tl.store(length + b, place + 1)


@triton.jit
def combine_splits(x, parts, row, k, inside, K: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """Columns k of x (B, K), or the mean of the attention's parts (B, PARTS, K) by their odds."""
    if parts is None:
        z = tl.load(x + row * K + k, mask=inside, other=0.0)
    else:
        H: tl.constexpr = K // D
        most = tl.load(parts + row * PARTS * H + k // D, mask=inside, other=0.0)
        for part in tl.static_range(1, PARTS):
            most = tl.maximum(most, tl.load(parts + (row * PARTS + part) * H + k // D, mask=inside, other=0.0))
        z, total = tl.zeros(most.shape, tl.float32), tl.zeros(most.shape, tl.float32)
        for part in tl.static_range(PARTS):
            odds = tl.exp(tl.load(parts + (row * PARTS + part) * H + k // D, mask=inside, other=0.0) - most)
            z += odds * tl.load(x + (row * PARTS + part) * K + k, mask=inside, other=0.0)
            total += odds
        z /= total
    return z


@triton.jit
def normalize(z, mean, scale, norm_w, norm_b, k, K: tl.constexpr, NORM: tl.constexpr):
    """z, columns k of a row of K, normalised and where that is learnt scaled and moved."""
    if NORM != "":
        z = tl.where(k < K, (z - mean) * scale, 0.0)
        if norm_w is not None:
            z *= tl.load(norm_w + k, mask=k < K, other=0.0).to(tl.float32)
        if norm_b is not None:
            z += tl.load(norm_b + k, mask=k < K, other=0.0).to(tl.float32)
    return z


@triton.jit
def matmul(z, w):
    """z (ROWS, K) times the weights w (N, K), in float32: (ROWS, N)."""
    if z.shape[0] == 1:
        return tl.sum(w.to(tl.float32) * z, 1)[None]
    else:
        return tl.dot(z.to(w.dtype), w.T, input_precision="ieee")


@triton.jit
def fused_linear(
    x,  # (B, K), or with `parts` (B, PARTS, K)
    parts,  # how much of the odds each part of the attention has, ln (B, PARTS, H)
    w,  # (N, K); for swiglu (2 N, K)
    bias,
    norm_w,
    norm_b,
    residual,
    out,  # (B, N)
    B,
    cap,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,  # of x: "layernorm", "rmsnorm" or ""
    EPS: tl.constexpr,
    THEN: tl.constexpr,  # of the result: an activation, "cap" or ""
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FULL_K: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """out = residual + act(norm(x) w^T + bias), each piece where it is wanted."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    there, i = row < B, tl.arange(0, BLOCK_K)[None]
    at, inside = n[:, None] * K + i, (n < N)[:, None] & (i < K)
    weights = tl.load(w + at, mask=inside, other=0.0)  # these come while the kernel before still works
    if THEN == "swiglu":
        gates = tl.load(w + N * K + at, mask=inside, other=0.0)
    pdl_wait(CHAIN)
    k = tl.arange(0, FULL_K)[None] if NORM != "" else i
    z = combine_splits(x, parts, row, k, there & (k < K), K, D, PARTS)
    mean = tl.sum(z, 1, keep_dims=True) / K if NORM == "layernorm" else tl.zeros((ROWS, 1), tl.float32)
    scale = mean
    if NORM != "":
        centred = tl.where(k < K, z - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / K + EPS)
        if BLOCK_K < FULL_K:
            z = combine_splits(x, parts, row, i, there & (i < K), K, D, PARTS)
    z = normalize(z, mean, scale, norm_w, norm_b, i, K, NORM)
    y = matmul(z, weights)
    if THEN == "swiglu":
        gate = matmul(z, gates)
    for start in range(BLOCK_K, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)[None]
        at, inside = n[:, None] * K + i, (n < N)[:, None] & (i < K)
        weights = tl.load(w + at, mask=inside, other=0.0)
        z = combine_splits(x, parts, row, i, there & (i < K), K, D, PARTS)
        z = normalize(z, mean, scale, norm_w, norm_b, i, K, NORM)
        y += matmul(z, weights)
        if THEN == "swiglu":
            gate += matmul(z, tl.load(w + N * K + at, mask=inside, other=0.0))
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None]
        if THEN == "swiglu":
            gate += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None]
    if THEN == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif THEN == "gelu_tanh":
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif THEN == "relu":
        y = tl.maximum(y, 0.0)
    elif THEN == "relu2":
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    elif THEN == "swiglu":
        y *= tl.sigmoid(y) * gate
    elif THEN == "cap":
        y = cap * (2 * tl.sigmoid(2 * y / cap) - 1)  # cap tanh(y / cap)
    where, inside = row * N + n[None], there & (n < N)[None]
    if residual is not None:
        y += tl.load(residual + where, mask=inside, other=0.0)
    tl.store(out + where, y, mask=inside)


@triton.jit
def load_kv(keys, values, cell, at, place, D: tl.constexpr, FULL_D: tl.constexpr):
    """Keys, in halves, and values of the places `at` before the newest one, from the cache of a row and head."""
    i, d, HALF = tl.arange(0, FULL_D // 2)[None], tl.arange(0, FULL_D)[None], D // 2
    at, past = (cell + at)[:, None] * D, (at < place)[:, None]
    k1 = tl.load(keys + at + i, mask=past & (i < HALF), other=0.0)
    k2 = tl.load(keys + at + HALF + i, mask=past & (i < D - HALF), other=0.0)
    return k1, k2, tl.load(values + at + d, mask=past & (d < D), other=0.0)


@triton.jit
def online_softmax_update(k1, k2, v, at, place, q1, q2, new1, new2, new, most, total, y, D: tl.constexpr):
    """Attention to these keys and values, and to the new ones if their place is here, added to that to others."""
    here = (at == place)[:, None]
    k1, k2 = tl.where(here, new1[None], k1.to(tl.float32)), tl.where(here, new2[None], k2.to(tl.float32))
    score = (tl.sum(k1 * q1[None], 1) + tl.sum(k2 * q2[None], 1)) / tl.sqrt(D * 1.0)
    score = tl.where(at <= place, score, float("-inf"))
    higher = tl.maximum(most, tl.max(score))
    odds, less = tl.exp(score - higher), tl.exp(most - higher)
    y = y * less + tl.sum(odds[:, None] * tl.where(here, new[None], v.to(tl.float32)), 0)
    return higher, total * less + tl.sum(odds), y


@triton.jit
def attention_kernel(
    qkv,  # (B, 3, H, D)
    length,  # of each row, the new token included
    rope,  # cos and sin (2, block_size, D / 2)
    keys,  # the cache, (B, H, S, D); the new ones are written into it
    values,
    out,  # (B, PARTS, H, D)
    parts,  # ln of the sum of the odds (B, PARTS, H)
    block_size,
    H,
    S,
    PARTS,
    D: tl.constexpr,
    QK_NORM: tl.constexpr,
    SLICE: tl.constexpr,  # places that one program looks at, CHUNK at once
    CHUNK: tl.constexpr,
    FULL_D: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One query's attention to a slice of the cache."""
    b, h, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place = tl.load(length + b).to(tl.int32) - 1
    HALF: tl.constexpr = D // 2
    i, d = tl.arange(0, FULL_D // 2), tl.arange(0, FULL_D)  # pairs (i, i + D / 2) turn together, so we hold halves
    cell, at = (b * H + h) * S, part * SLICE + tl.arange(0, CHUNK)
    k1, k2, v = load_kv(keys, values, cell, at, place, D, FULL_D)  # these come while the kernel before still works
    pdl_wait(CHAIN)
    mine = qkv + (b * 3 * H + h) * D
    q1, q2 = tl.load(mine + i, mask=i < HALF, other=0.0), tl.load(mine + HALF + i, mask=i < D - HALF, other=0.0)
    mine += H * D
    new1, new2 = tl.load(mine + i, mask=i < HALF, other=0.0), tl.load(mine + HALF + i, mask=i < D - HALF, other=0.0)
    new = tl.load(mine + H * D + d, mask=d < D, other=0.0)
    if QK_NORM:
        scale = tl.rsqrt((tl.sum(q1 * q1) + tl.sum(q2 * q2)) / D + 1e-6)
        q1, q2 = q1 * scale, q2 * scale
        scale = tl.rsqrt((tl.sum(new1 * new1) + tl.sum(new2 * new2)) / D + 1e-6)
        new1, new2 = new1 * scale, new2 * scale
    if rope is not None:
        angle = rope + place * HALF + i
        cos = tl.load(angle, mask=i < HALF, other=0.0).to(tl.float32)
        sin = tl.load(angle + block_size * HALF, mask=i < HALF, other=0.0).to(tl.float32)
        q1, q2 = q1 * cos + q2 * sin, q2 * cos - q1 * sin
        new1, new2 = new1 * cos + new2 * sin, new2 * cos - new1 * sin
    most, total, y = -1e30, 0.0, tl.zeros((FULL_D,), tl.float32)  # not -inf: a slice may have nothing in it yet
    most, total, y = online_softmax_update(k1, k2, v, at, place, q1, q2, new1, new2, new, most, total, y, D)
    for start in range(CHUNK, tl.minimum(SLICE, place + 1 - part * SLICE), CHUNK):
        at = part * SLICE + start + tl.arange(0, CHUNK)
        k1, k2, v = load_kv(keys, values, cell, at, place, D, FULL_D)
        most, total, y = online_softmax_update(k1, k2, v, at, place, q1, q2, new1, new2, new, most, total, y, D)
    where = (b * PARTS + part) * H + h
    tl.store(out + where * D + d, y / tl.maximum(total, 1e-30), mask=d < D)
    tl.store(parts + where, tl.log(tl.maximum(total, 1e-30)) + most)
    if place // SLICE == part:
        to = (cell + place) * D
        tl.store(keys + to + i, new1.to(keys.dtype.element_ty), mask=i < HALF)
        tl.store(keys + to + HALF + i, new2.to(keys.dtype.element_ty), mask=i < D - HALF)
        tl.store(values + to + d, new.to(values.dtype.element_ty), mask=d < D)


@triton.jit
def mask_top(odds, weight, target):
    """The largest odds, as many as it takes for their weights to reach target; the others become 0.

    Floats that are not negative lie in the order of their bits, so the least one that stays is found bit by bit.
    """
    bits = odds.to(tl.int32, bitcast=True)
    least = tl.zeros((), tl.int32)
    for i in range(30):
        more = least | (1 << (29 - i))
        least = tl.where(tl.sum(tl.where(bits >= more, weight, 0.0)) >= target, more, least)
    above, equal = bits > least, tl.where(bits == least, weight, 0.0)
    before = tl.sum(tl.where(above, weight, 0.0)) + tl.cumsum(equal) - equal
    return tl.where(above | (bits == least) & (before < target), odds, 0.0)


@triton.jit
def sample_kernel(
    logits,
    dice,  # (throws, B, V)
    token,
    out,  # (B, columns)
    count,  # of tokens drawn so far, the same for each row
    seen,  # which tokens are in the text (B, V), if that counts
    logprobs,  # (B, columns), if wanted
    temperature,
    top_k,
    top_p,
    min_p,
    penalty,
    columns,
    throws,
    V,
    ARGMAX: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """`Writer.choose`: the next token of each row, as `sample_next` would draw it with the same dice."""
    b, v = tl.program_id(0), tl.arange(0, BLOCK)
    n = tl.load(count + b)
    if not ARGMAX:
        throw = tl.load(dice + ((n % throws) * tl.num_programs(0) + b) * V + v, mask=v < V, other=1.0)
    pdl_wait(CHAIN)
    z = tl.load(logits + b * V + v, mask=v < V, other=float("-inf"))
    said = z
    if seen is not None:
        old = tl.load(seen + b * V + v, mask=v < V, other=0) != 0
        z = tl.where(old, tl.where(z > 0, z / penalty, z * penalty), z)
    if not ARGMAX:
        z = tl.exp((z - tl.max(z)) / temperature)
        if TOP_K:
            z = mask_top(z, tl.where(v < V, 1.0, 0.0), top_k)
        if TOP_P:
            z = mask_top(z, z, top_p * tl.sum(z))
        z = tl.where(z >= min_p, z, 0.0) / throw
        z = tl.where(v < V, z, -1.0)
    new = tl.argmax(z, 0)
    tl.store(token + b, new)
    tl.store(out + b * columns + n, new)
    tl.store(count + b, n + 1)
    if seen is not None:
        tl.store(seen + b * V + new, 1)
    if logprobs is not None:
        most = tl.max(said)
        mine = tl.sum(tl.where(v == new, said, 0.0))
        tl.store(logprobs + b * columns + n, mine - most - tl.log(tl.sum(tl.exp(said - most))))


def next_power_of_2(n: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(n))


def linear_tile(B: int, N: int, K: int, parts: int) -> tuple[int, int, int, int]:
    """Rows, outputs and inputs of a program of `fused_linear`, and its warps; measured on an H100."""
    if B == 1:
        block_k = min(next_power_of_2(K), 4096)
        return 1, min(next_power_of_2(N // 200), max(1, 16384 // block_k), 16), block_k, 4
    # tensor cores take 16 rows at least; with parts to merge, more inputs would not fit into the registers
    return 16, 32, next_power_of_2(min(K, 512 if parts == 1 else 64), 16), 4


def attention_tile(B: int, S: int, rope: bool) -> tuple[int, int, int]:
    """Places of the cache for a program of `attention_kernel`, how many of them at once, and its warps."""
    part, chunk, warps = (256, 64, 4) if B > 1 else (128, 128, 4) if rope else (256, 256, 8)
    return min(part, next_power_of_2(S)), min(chunk, next_power_of_2(S)), warps


class TritonStep:
    """A step of a `Writer` in Triton: what its net says after the newest token of each row, and the next one drawn.

    The weights are used where they are, so a net that learns on or is loaded anew is read as it is at the call.
    """

    def __init__(self, writer: "DecodeSession"):
        self.writer, self.cache, c = writer, writer.cache, writer.net.config
        self.net = cast(Any, writer.net)
        self.B, self.D, device = len(writer.token), c.n_embd // c.n_head, writer.token.device
        self.slice, self.chunk, self.warps = attention_tile(self.B, self.cache.size, c.position == "rope")
        self.parts = triton.cdiv(self.cache.size, self.slice)
        self.chain = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self.launch: dict[str, Any] = {"CHAIN": self.chain} | ({"launch_pdl": True} if self.chain else {})
        for layer in self.cache.open(writer.token, c.n_layer):
            layer.make(self.net.wte.weight, self.B, c.n_head, self.D)
        make: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.x = torch.empty(self.B, c.n_embd, **make)
        self.qkv = torch.empty(self.B, 3 * c.n_embd, **make)
        self.y = torch.empty(self.B, self.parts, c.n_embd, **make)
        self.odds = torch.empty(self.B, self.parts, c.n_head, **make)
        self.inner = torch.empty(self.B, self.net.h[0].mlp.c_proj.in_features if c.n_layer else 0, **make)
        self.logits = torch.empty(self.B, c.vocab_size, **make)

    def step(self) -> None:
        """Read the newest token of every row with the cache, and draw the next."""
        self.read()
        if self.net.config.vocab_size <= MAX_VOCAB:
            self.draw()
        else:
            self.writer.choose(self.logits)

    def read(self) -> None:
        net, c = self.net, self.net.config
        more = net.ngram_embeddings(self.writer.token, self.cache) if c.ngram_max > 1 else None
        embed_kernel[self.B,](
            self.writer.token,
            self.cache.length,
            net.wte.weight,
            net.wpe.weight if c.position == "learned" else None,
            more,
            self.x,
            c.n_embd,
            RMS=c.norm == "rmsnorm",
            BLOCK=next_power_of_2(c.n_embd),
            **self.launch,
        )
        for block, layer in zip(net.h, self.cache.layers, strict=True):
            self.project(self.x, block.attn.c_attn, self.qkv, norm=block.ln_1)
            self.attend(block.attn, layer.k, layer.v)
            self.project(self.y, block.attn.c_proj, self.x, residual=self.x, parts=self.odds)
            self.project(self.x, block.mlp.c_fc, self.inner, norm=block.ln_2, then=c.activation)
            self.project(self.inner, block.mlp.c_proj, self.x, residual=self.x)
        self.project(self.x, net.lm_head, self.logits, norm=net.ln_f, then="cap" if c.logit_softcap else "")

    def attend(self, attn: CausalSelfAttention, k: Tensor | None, v: Tensor | None) -> None:
        attention_kernel[self.B, attn.n_head, self.parts](
            self.qkv,
            self.cache.length,
            self.net.rope if self.net.config.position == "rope" else None,
            k,
            v,
            self.y,
            self.odds,
            self.net.config.block_size,
            attn.n_head,
            self.cache.size,
            self.parts,
            D=self.D,
            QK_NORM=attn.qk_norm,
            SLICE=self.slice,
            CHUNK=self.chunk,
            FULL_D=next_power_of_2(self.D, 2),
            num_warps=self.warps,
            **self.launch,
        )

    def project(
        self,
        x: Tensor,
        linear: nn.Linear,
        out: Tensor,
        norm: nn.Module | None = None,
        then: str = "",
        residual: Tensor | None = None,
        parts: Tensor | None = None,
    ) -> None:
        N, K = out.size(1), linear.in_features
        parts_of_x = 1 if parts is None else self.parts
        rows, block_n, block_k, warps = linear_tile(self.B, N, K, parts_of_x)
        fused_linear[triton.cdiv(N, block_n), triton.cdiv(self.B, rows)](
            x,
            parts if parts_of_x > 1 else None,
            linear.weight,
            linear.bias,
            getattr(norm, "weight", None),
            getattr(norm, "bias", None),
            residual,
            out,
            self.B,
            self.net.config.logit_softcap,
            N=N,
            K=K,
            D=self.D,
            PARTS=parts_of_x,
            NORM="" if norm is None else "layernorm" if isinstance(norm, nn.LayerNorm) else "rmsnorm",
            EPS=getattr(norm, "eps", 0.0),
            THEN=then,
            ROWS=rows,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            FULL_K=next_power_of_2(K),
            num_warps=warps,
            num_stages=1,
            **self.launch,
        )

    def draw(self) -> None:
        w, V = self.writer, self.net.config.vocab_size
        temperature, top_k, top_p, min_p = (w.how[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        sample_kernel[self.B,](
            self.logits,
            w.dice,
            w.token,
            w.out,
            w.count,
            w.seen.view(torch.uint8) if w.penalty != 1 else None,
            w.logprobs,
            max(temperature, 1e-30),
            float(top_k or 0),
            top_p or 1.0,
            min_p or 0.0,
            w.penalty,
            w.out.size(1),
            w.throws,
            V,
            ARGMAX=temperature == 0,
            TOP_K=top_k is not None and top_k < V,
            TOP_P=top_p is not None and top_p < 1,
            BLOCK=next_power_of_2(V),
            num_warps=min(32, max(1, next_power_of_2(V) // 256)),
            **self.launch,
        )
