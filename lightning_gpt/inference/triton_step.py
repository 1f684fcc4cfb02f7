"""One decode step of a GPT in few Triton kernels: embedding, five per block, one for the head.

At one token per row a kernel's work takes less time than its launch, so the number of kernels is what counts. The maths
is gpt.py's; sums, norms and the residual stream are in float32 for weights of any precision.

On an H100 a kernel that waits for the previous one, normalizes and stores takes 1.3 us at least, and 2 to 3 us with its
weights. One persistent kernel is no faster: a barrier between its programs takes 1.05 us, more than the wait.

Shapes   B rows · N outputs · K inputs · H heads · D channels of a head · S positions in the cache · V vocabulary
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..model.gpt import GPT, CausalSelfAttention

if TYPE_CHECKING:
    from ..model.kv_cache import KVCache


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr):
    """Programmatic dependent launch: wait for the results of the previous kernel, and let the next one start early."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def embed_kernel(token, length, wte, wpe, ngrams, x, C, RMS: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """x[b] = wte[token[b]] + wpe[length[b]] + ngrams[b], with or without RMSNorm; increments length[b]."""
    b, c = tl.program_id(0), tl.arange(0, BLOCK)
    pdl_wait(USE_PDL)
    pos = tl.load(length + b)
    z = tl.load(wte + tl.load(token + b) * C + c, mask=c < C, other=0.0).to(tl.float32)
    if wpe is not None:
        z += tl.load(wpe + pos * C + c, mask=c < C, other=0.0).to(tl.float32)
    if ngrams is not None:
        z += tl.load(ngrams + b * C + c, mask=c < C, other=0.0).to(tl.float32)
    if RMS:
        z *= tl.rsqrt(tl.sum(z * z) / C + 1e-6)
    tl.store(x + b * C + c, z, mask=c < C)
    tl.store(length + b, pos + 1)


@triton.jit
def combine_splits(x, lse, row, k, mask, K: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """Columns k of x (B, K), or of the attention's splits x (B, SPLITS, K), averaged with the weights exp(lse)."""
    if lse is None:
        z = tl.load(x + row * K + k, mask=mask, other=0.0)
    else:
        H: tl.constexpr = K // D
        highest = tl.load(lse + row * SPLITS * H + k // D, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            highest = tl.maximum(highest, tl.load(lse + (row * SPLITS + split) * H + k // D, mask=mask, other=0.0))
        z, total = tl.zeros(highest.shape, tl.float32), tl.zeros(highest.shape, tl.float32)
        for split in tl.static_range(SPLITS):
            weight = tl.exp(tl.load(lse + (row * SPLITS + split) * H + k // D, mask=mask, other=0.0) - highest)
            z += weight * tl.load(x + (row * SPLITS + split) * K + k, mask=mask, other=0.0)
            total += weight
        z /= total
    return z


@triton.jit
def load_vector(p, i, mask, default: tl.constexpr):
    """p[i] in float32, or `default` where there is no p."""
    if p is None:
        return tl.full(i.shape, default, tl.float32)
    else:
        return tl.load(p + i, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def matmul(z, w):
    """z (ROWS, K) times the weights w (N, K), in float32: (ROWS, N)."""
    if z.shape[0] == 1:
        return tl.sum(w.to(tl.float32) * z, 1)[None]
    else:
        return tl.dot(z.to(w.dtype), w.T, input_precision="ieee")


@triton.jit
def fused_linear(
    x,  # (B, K), or with `lse` (B, SPLITS, K)
    lse,  # log-sum-exp of each split's attention scores (B, SPLITS, H)
    w,  # (N, K); for swiglu (2 N, K)
    bias,
    norm_w,
    norm_b,
    residual,
    out,  # (B, N)
    B,
    softcap,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,  # of x: "layernorm", "rmsnorm" or ""
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of the result: an activation, "softcap" or ""
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FULL_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """out = residual + activation(norm(x) w^T + bias), each part optional."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    row_mask, i = row < B, tl.arange(0, BLOCK_K)[None]
    index, mask = n[:, None] * K + i, (n < N)[:, None] & (i < K)
    # all that does not depend on the previous kernel is loaded while it still runs
    weights = tl.load(w + index, mask=mask, other=0.0)
    if ACTIVATION == "swiglu":
        gates = tl.load(w + N * K + index, mask=mask, other=0.0)
    gain, shift = load_vector(norm_w, i, i < K, 1.0), load_vector(norm_b, i, i < K, 0.0)
    y_bias = load_vector(bias, n, n < N, 0.0)[None]
    pdl_wait(USE_PDL)
    k = tl.arange(0, FULL_K)[None] if NORM != "" else i
    z = combine_splits(x, lse, row, k, row_mask & (k < K), K, D, SPLITS)
    out_index, out_mask = row * N + n[None], row_mask & (n < N)[None]
    shortcut = load_vector(residual, out_index, out_mask, 0.0)
    mean = tl.sum(z, 1, keep_dims=True) / K if NORM == "layernorm" else tl.zeros((ROWS, 1), tl.float32)
    scale = mean
    if NORM != "":
        centred = tl.where(k < K, z - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / K + EPS)
        if BLOCK_K < FULL_K:
            z = combine_splits(x, lse, row, i, row_mask & (i < K), K, D, SPLITS)
        z = tl.where(i < K, (z - mean) * scale, 0.0) * gain + shift
    y = matmul(z, weights) + y_bias
    if ACTIVATION == "swiglu":
        gate = matmul(z, gates)
        if bias is not None:
            gate += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None]
    for start in range(BLOCK_K, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)[None]
        index, mask = n[:, None] * K + i, (n < N)[:, None] & (i < K)
        weights = tl.load(w + index, mask=mask, other=0.0)
        z = combine_splits(x, lse, row, i, row_mask & (i < K), K, D, SPLITS)
        if NORM != "":
            gain, shift = load_vector(norm_w, i, i < K, 1.0), load_vector(norm_b, i, i < K, 0.0)
            z = tl.where(i < K, (z - mean) * scale, 0.0) * gain + shift
        y += matmul(z, weights)
        if ACTIVATION == "swiglu":
            gate += matmul(z, tl.load(w + N * K + index, mask=mask, other=0.0))
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "relu2":
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    elif ACTIVATION == "swiglu":
        y *= tl.sigmoid(y) * gate
    elif ACTIVATION == "softcap":
        y = softcap * (2 * tl.sigmoid(2 * y / softcap) - 1)  # softcap tanh(y / softcap)
    tl.store(out + out_index, shortcut + y, mask=out_mask)


@triton.jit
def load_kv(keys, values, base, pos, last, D: tl.constexpr, FULL_D: tl.constexpr):
    """Keys, in halves, and values at the positions `pos` before `last`, from the cache of one row and head."""
    i, d, HALF = tl.arange(0, FULL_D // 2)[None], tl.arange(0, FULL_D)[None], D // 2
    pos, past = (base + pos)[:, None] * D, (pos < last)[:, None]
    k1 = tl.load(keys + pos + i, mask=past & (i < HALF), other=0.0)
    k2 = tl.load(keys + pos + HALF + i, mask=past & (i < D - HALF), other=0.0)
    return k1, k2, tl.load(values + pos + d, mask=past & (d < D), other=0.0)


@triton.jit
def online_softmax_update(k1, k2, v, pos, last, q1, q2, new_k1, new_k2, new_v, highest, total, y, D: tl.constexpr):
    """Add the attention to these keys and values, or to the new ones at position `last`, to the running softmax."""
    here = (pos == last)[:, None]
    k1, k2 = tl.where(here, new_k1[None], k1.to(tl.float32)), tl.where(here, new_k2[None], k2.to(tl.float32))
    score = (tl.sum(k1 * q1[None], 1) + tl.sum(k2 * q2[None], 1)) / tl.sqrt(D * 1.0)
    score = tl.where(pos <= last, score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score))
    weight, rescale = tl.exp(score - new_highest), tl.exp(highest - new_highest)
    y = y * rescale + tl.sum(weight[:, None] * tl.where(here, new_v[None], v.to(tl.float32)), 0)
    return new_highest, total * rescale + tl.sum(weight), y


@triton.jit
def attention_kernel(
    qkv,  # (B, 3, H, D)
    length,  # of each row, including the new token
    rope,  # cos and sin (2, block_size, D / 2)
    keys,  # the cache, (B, H, S, D); the new ones are written into it
    values,
    out,  # (B, SPLITS, H, D)
    lse,  # log-sum-exp of the scores (B, SPLITS, H)
    block_size,
    H,
    S,
    SPLITS,
    D: tl.constexpr,
    QK_NORM: tl.constexpr,
    SLICE: tl.constexpr,  # positions per program, CHUNK at once
    CHUNK: tl.constexpr,
    FULL_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The attention of one query to a slice of the cache."""
    b, h, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    last = tl.load(length + b).to(tl.int32) - 1
    HALF: tl.constexpr = D // 2
    i, d = tl.arange(0, FULL_D // 2), tl.arange(0, FULL_D)  # pairs (i, i + D / 2) rotate together, so we hold halves
    base, pos = (b * H + h) * S, split * SLICE + tl.arange(0, CHUNK)
    k1, k2, v = load_kv(keys, values, base, pos, last, D, FULL_D)  # loaded while the previous kernel still runs
    pdl_wait(USE_PDL)
    head = qkv + (b * 3 * H + h) * D
    q1, q2 = tl.load(head + i, mask=i < HALF, other=0.0), tl.load(head + HALF + i, mask=i < D - HALF, other=0.0)
    head += H * D
    new_k1, new_k2 = tl.load(head + i, mask=i < HALF, other=0.0), tl.load(head + HALF + i, mask=i < D - HALF, other=0.0)
    new_v = tl.load(head + H * D + d, mask=d < D, other=0.0)
    if QK_NORM:
        scale = tl.rsqrt((tl.sum(q1 * q1) + tl.sum(q2 * q2)) / D + 1e-6)
        q1, q2 = q1 * scale, q2 * scale
        scale = tl.rsqrt((tl.sum(new_k1 * new_k1) + tl.sum(new_k2 * new_k2)) / D + 1e-6)
        new_k1, new_k2 = new_k1 * scale, new_k2 * scale
    if rope is not None:
        angle = rope + last * HALF + i
        cos = tl.load(angle, mask=i < HALF, other=0.0).to(tl.float32)
        sin = tl.load(angle + block_size * HALF, mask=i < HALF, other=0.0).to(tl.float32)
        q1, q2 = q1 * cos + q2 * sin, q2 * cos - q1 * sin
        new_k1, new_k2 = new_k1 * cos + new_k2 * sin, new_k2 * cos - new_k1 * sin
    highest, total, y = -1e30, 0.0, tl.zeros((FULL_D,), tl.float32)  # not -inf: a slice may be empty
    highest, total, y = online_softmax_update(k1, k2, v, pos, last, q1, q2, new_k1, new_k2, new_v, highest, total, y, D)
    for start in range(CHUNK, tl.minimum(SLICE, last + 1 - split * SLICE), CHUNK):
        pos = split * SLICE + start + tl.arange(0, CHUNK)
        k1, k2, v = load_kv(keys, values, base, pos, last, D, FULL_D)
        highest, total, y = online_softmax_update(
            k1, k2, v, pos, last, q1, q2, new_k1, new_k2, new_v, highest, total, y, D
        )
    index = (b * SPLITS + split) * H + h
    tl.store(out + index * D + d, y / tl.maximum(total, 1e-30), mask=d < D)
    tl.store(lse + index, tl.log(tl.maximum(total, 1e-30)) + highest)
    if last // SLICE == split:
        to = (base + last) * D
        tl.store(keys + to + i, new_k1.to(keys.dtype.element_ty), mask=i < HALF)
        tl.store(keys + to + HALF + i, new_k2.to(keys.dtype.element_ty), mask=i < D - HALF)
        tl.store(values + to + d, new_v.to(values.dtype.element_ty), mask=d < D)


def next_power_of_2(n: int, minimum: int = 1) -> int:
    return max(minimum, triton.next_power_of_2(n))


def linear_tile(B: int, N: int, K: int, splits: int) -> tuple[int, int, int, int]:
    """Rows, outputs and inputs of a program of `fused_linear`, and its warps; measured on an H100."""
    if B == 1:
        block_k = min(next_power_of_2(K), 4096)
        if N > K:
            return 1, 8, block_k, max(1, block_k // 512)
        return 1, min(next_power_of_2(N // 200), max(1, 16384 // block_k), 16), block_k, 4
    # tensor cores take at least 16 rows; with splits to combine, more inputs would not fit into the registers
    return 16, 32, next_power_of_2(min(K, 512 if splits == 1 else 64), 16), 4


def attention_tile(B: int, S: int, rope: bool) -> tuple[int, int, int]:
    """Positions of the cache per program of `attention_kernel`, how many of them at once, and its warps."""
    part, chunk, warps = (256, 64, 4) if B > 1 else (128, 128, 4) if rope or S <= 512 else (256, 256, 8)
    return min(part, next_power_of_2(S)), min(chunk, next_power_of_2(S)), warps


def launch_options(device: torch.device) -> dict[str, Any]:
    """Programmatic dependent launch, which takes a Hopper GPU."""
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"USE_PDL": pdl} | ({"launch_pdl": True} if pdl else {})


class TritonStep:
    """The logits after the newest token of each row, in Triton.

    The weights are used where they are, so a net that trains on or is loaded anew takes part with its current weights.

    Args:
        cache: its length is a tensor (B,).
        rows: number of texts, B.
    """

    def __init__(self, net: GPT, cache: "KVCache", rows: int):
        c, device = net.config, net.wte.weight.device
        self.net, self.cache, self.rows, self.D = cast(Any, net), cache, rows, c.n_embd // c.n_head
        self.slice, self.chunk, self.warps = attention_tile(rows, cache.size, c.position == "rope")
        self.splits, self.launch = triton.cdiv(cache.size, self.slice), launch_options(device)
        for layer in cache.layers_for(c.n_layer):
            layer.allocate(net.wte.weight, rows, c.n_head, self.D)
        make: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.x = torch.empty(rows, c.n_embd, **make)
        self.qkv = torch.empty(rows, 3 * c.n_embd, **make)
        self.y = torch.empty(rows, self.splits, c.n_embd, **make)
        self.lse = torch.empty(rows, self.splits, c.n_head, **make)
        self.inner = torch.empty(rows, self.net.h[0].mlp.c_proj.in_features if c.n_layer else 0, **make)
        self.logits = torch.empty(rows, c.vocab_size, **make)

    def step(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) after the newest token of every row, token_ids (B, 1); they join the cache."""
        net, c = self.net, self.net.config
        ngrams = net.ngram_embeddings(token_ids, self.cache) if c.ngram_max > 1 else None
        embed_kernel[self.rows,](
            token_ids,
            self.cache.length,
            net.wte.weight,
            net.wpe.weight if c.position == "learned" else None,
            ngrams,
            self.x,
            c.n_embd,
            RMS=c.norm == "rmsnorm",
            BLOCK=next_power_of_2(c.n_embd),
            **self.launch,
        )
        for block, layer in zip(net.h, self.cache.layers, strict=True):
            self.linear(self.x, block.attn.c_attn, self.qkv, norm=block.ln_1)
            self.attention(block.attn, layer.k, layer.v)
            self.linear(self.y, block.attn.c_proj, self.x, residual=self.x, lse=self.lse)
            self.linear(self.x, block.mlp.c_fc, self.inner, norm=block.ln_2, activation=c.activation)
            self.linear(self.inner, block.mlp.c_proj, self.x, residual=self.x)
        softcap = "softcap" if c.logit_softcap else ""
        self.linear(self.x, net.lm_head, self.logits, norm=net.ln_f, activation=softcap)
        return self.logits

    def attention(self, attn: CausalSelfAttention, k: Tensor | None, v: Tensor | None) -> None:
        attention_kernel[self.rows, attn.n_head, self.splits](
            self.qkv,
            self.cache.length,
            self.net.rope if self.net.config.position == "rope" else None,
            k,
            v,
            self.y,
            self.lse,
            self.net.config.block_size,
            attn.n_head,
            self.cache.size,
            self.splits,
            D=self.D,
            QK_NORM=attn.qk_norm,
            SLICE=self.slice,
            CHUNK=self.chunk,
            FULL_D=next_power_of_2(self.D, 2),
            num_warps=self.warps,
            **self.launch,
        )

    def linear(
        self,
        x: Tensor,
        linear: nn.Linear,
        out: Tensor,
        norm: nn.Module | None = None,
        activation: str = "",
        residual: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        N, K = out.size(1), linear.in_features
        splits = 1 if lse is None else self.splits
        rows, block_n, block_k, warps = linear_tile(self.rows, N, K, splits)
        fused_linear[triton.cdiv(N, block_n), triton.cdiv(self.rows, rows)](
            x,
            lse if splits > 1 else None,
            linear.weight,
            linear.bias,
            getattr(norm, "weight", None),
            getattr(norm, "bias", None),
            residual,
            out,
            self.rows,
            self.net.config.logit_softcap,
            N=N,
            K=K,
            D=self.D,
            SPLITS=splits,
            NORM="" if norm is None else "layernorm" if isinstance(norm, nn.LayerNorm) else "rmsnorm",
            EPS=getattr(norm, "eps", 0.0),
            ACTIVATION=activation,
            ROWS=rows,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            FULL_K=next_power_of_2(K),
            num_warps=warps,
            num_stages=1,
            **self.launch,
        )
