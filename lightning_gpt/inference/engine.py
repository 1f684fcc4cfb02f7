"""Generating token ids: prefill a batch of prompts, then decode token by token with a cache.

A backend computes the logits of the next tokens from the newest ones, `step(token_ids) -> logits`:
    EagerStep   the net itself, for every device, precision and batch
    CPUStep     cpu_step.py, where all rows are equally long
    TritonStep  triton_step.py, in a CUDA graph
An ensemble has a backend and a cache for each net.

Shapes   B batch · T time (tokens) · V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cuda_graph import CapturedStep
from ..errors import warn_once
from ..model.ensemble import Ensemble, Net, log_mean_softmax
from ..model.gpt import GPT
from ..model.kv_cache import KVCache
from .cpu_step import CPUStep
from .sampling import Sampler, SamplingConfig


def is_sharded(net: torch.nn.Module) -> bool:
    """Whether this device holds only a part of each weight (FSDP)."""
    return hasattr(next(net.parameters()), "device_mesh")


class StepOutput(NamedTuple):
    """One step of `stream_ids`: token ids (B, 1) and, if asked for, the net's log-probabilities of them (B, 1)."""

    ids: Tensor
    logprobs: Tensor | None


class EagerStep:
    """The net itself, module by module."""

    def __init__(self, net: Net, cache: KVCache):
        self.net, self.cache = net, cache

    def step(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) after the newest token of every row, token_ids (B, 1); they join the cache."""
        return self.net(token_ids, self.cache)[:, -1]


class DecodeSession:
    """A batch of texts being generated: their tokens and the cache of what the net has read of them.

    Args:
        idx: the prompts (B, T); row b is idx[b, :lengths[b]].
        steps: tokens to generate for each.
        context_shift: see `stream_ids`.
        sampler: has drawn the tokens behind the prompts.
    """

    def __init__(
        self,
        net: Net,
        idx: Tensor,
        lengths: Sequence[int],
        context_shift: int,
        use_cache: bool,
        sampler: Sampler,
    ):
        self.net, self.idx, self.lengths, self.sampler = net, idx[:, : max(lengths)], list(lengths), sampler
        self.context_shift, self.use_cache, self.block_size = context_shift, use_cache, net.config.block_size
        self.rows, self.steps = list(range(len(idx))), sampler.ids.size(1)
        self.starts = [max(0, n - self.block_size) for n in lengths]  # where each row's context begins
        self.uniform_length = len(set(lengths)) == 1
        self.cache = KVCache(min(self.block_size, max(lengths) + self.steps))
        self.eager = EagerStep(net, self.cache)
        # a sharded net gathers its weights when it is called, and autocast acts on modules
        direct = use_cache and not is_sharded(net) and not torch.is_autocast_enabled(idx.device.type)
        self.cpu_step = CPUStep(net, self.cache) if direct and isinstance(net, GPT) else None
        self.members = list[DecodeSession]()  # of an ensemble; they prefill and step, and this one draws
        if isinstance(net, Ensemble):
            self.members = [
                DecodeSession(cast(Net, each), idx, lengths, context_shift, use_cache, sampler) for each in net.nets
            ]

    # --- prefill ------------------------------------------------------------------------------------------------------

    def contexts(self, rows: list[int], t: int) -> tuple[Tensor, Tensor]:
        """The contexts of these rows after t steps, padded (rows, T), and the last position in each (rows,)."""
        new = self.sampler.ids[:, :t]
        if len(rows) == len(self.idx) and self.uniform_length:
            padded = torch.cat((self.idx, new), 1)[:, self.starts[0] :]
            lengths = [padded.size(1)] * len(rows)
        else:
            texts = [torch.cat((self.idx[b, : self.lengths[b]], new[b]))[self.starts[b] :] for b in rows]
            padded, lengths = pad_sequence(texts, batch_first=True), [len(text) for text in texts]
        return padded, torch.tensor(lengths, device=self.idx.device) - 1

    def prefill(self, rows: list[int], padded: Tensor, last: Tensor) -> Tensor:
        """Logits (len(rows), V) of the next token from the whole `contexts` of these rows; their cache starts anew."""
        if self.members:
            return log_mean_softmax([member.prefill(rows, padded, last) for member in self.members])
        device, every = self.idx.device, len(rows) == len(self.idx)
        if not isinstance(self.net, GPT):
            return self.net(padded)[torch.arange(len(rows), device=device), last]
        if not self.use_cache:
            return self.net(padded, only=last)[:, 0]
        cache, length = (self.cache if every else KVCache(self.cache.size)), self.cache.length
        cache.length = 0
        logits = self.net(padded, cache, only=last)[:, 0]
        if (n := self.net.config.ngram_max) > 1 and not (every and self.uniform_length):
            back = last[:, None] - torch.arange(n - 2, -1, -1, device=device)
            cache.last_tokens.copy_(padded.gather(1, back.clamp(min=0)).masked_fill(back < 0, -1))
        if every and self.uniform_length and isinstance(length, int):
            return logits
        if not every:
            at = torch.tensor(rows, device=device)
            self.cache.copy_rows(at, cache)
            if n > 1:
                self.cache.last_tokens[at] = cache.last_tokens
            assert isinstance(length, Tensor)
            length[at] = last + 1
        elif isinstance(length, Tensor):
            length.copy_(last + 1)
        else:
            length = last + 1
        self.cache.length = length
        return logits

    def prefill_and_draw(self, padded: Tensor, last: Tensor) -> None:
        self.sampler(self.prefill(self.rows, padded, last))

    # --- decode -------------------------------------------------------------------------------------------------------

    def decode(self) -> None:
        """Read the newest token of every row with the cache, and draw the next."""
        self.sampler(self.step(self.sampler.token))

    def step(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) after the newest token of every row, token_ids (B, 1); they join the cache."""
        if self.members:
            return log_mean_softmax([member.step(token_ids) for member in self.members])
        backend = self.cpu_step if self.cpu_step is not None and isinstance(self.cache.length, int) else self.eager
        return backend.step(token_ids)

    def triton_decode(self) -> Callable[[], None] | None:
        """`decode` in Triton kernels, or None where Triton is not installed or does not compute in this precision."""
        if next(self.net.parameters()).dtype == torch.float64:
            return None
        try:
            from .triton_sampler import can_draw, draw
            from .triton_step import TritonStep
        except ImportError:
            return None
        sampler, sessions = self.sampler, self.members or [self]
        first, *others = [TritonStep(cast(GPT, each.net), each.cache, len(self.idx)) for each in sessions]
        # PyTorch's sampler takes 10 to 20 % of a small net's step on an H100, 30 % with GPT-2's vocabulary
        draw_next = partial(draw, sampler) if can_draw(sampler) else sampler
        if not others:
            return lambda: draw_next(first.step(sampler.token))
        return lambda: draw_next(log_mean_softmax([each.step(sampler.token) for each in (first, *others)]))

    def warm_up(self, decode: Callable[[], None] | None) -> Callable[[], None]:
        """Run `decode` once and return it, or the eager `decode` where its kernels can't be compiled."""
        if decode is not None:
            try:
                decode()
                return decode
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no C compiler, no Python headers, too old a GPU, another Triton ...
                reason = str(error).strip().split("\n")[0][:150]
                warn_once(f"Triton can't build kernels here ({reason}): PyTorch's kernels decode, more slowly")
        self.decode()
        return self.decode

    def capture(self) -> Callable[[], None]:
        """`decode` as a CUDA graph, whose replay costs no Python."""
        seen, sampler = self.sampler.seen.clone(), self.sampler
        for each in self.members or [self]:
            each.cache.length = torch.zeros(len(self.idx), dtype=torch.long, device=self.idx.device)
            each.cache.uniform_length = self.uniform_length
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy initialization comes first
            decode = self.warm_up(self.triton_decode())
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            decode()
        sampler.count.zero_()
        sampler.seen.copy_(seen)
        return graph.replay

    def run(self, use_graph: bool) -> Iterator[StepOutput]:
        """Generate; yields each step's tokens."""
        sampler, decode = self.sampler, self.capture() if use_graph else self.decode
        # contexts that shift together are prefilled again and again in one shape
        captured_prefill = CapturedStep(warm_up=1) if use_graph and self.uniform_length else None
        for t in range(self.steps):
            sampler.refill_noise(t)
            full = [b for b in self.rows if self.lengths[b] + t - self.starts[b] > self.block_size]
            for b in full if t else ():
                self.starts[b] += self.context_shift
            if t == 0 or not self.use_cache or len(full) == len(self.rows):
                contexts = self.contexts(self.rows, t)
                prefill = partial(self.prefill_and_draw, *contexts)
                if t and captured_prefill is not None:
                    captured_prefill(prefill, contexts)
                else:
                    prefill()
            elif full:
                for each in self.members or [self]:
                    assert isinstance(each.cache.length, Tensor)
                    each.cache.length[torch.tensor(full, device=self.idx.device)] = 0  # they have no free position
                logits = self.step(sampler.token)
                logits[full] = self.prefill(full, *self.contexts(full, t))
                sampler(logits)
            else:
                decode()
            yield StepOutput(
                sampler.ids[:, t : t + 1], None if sampler.logprobs is None else sampler.logprobs[:, t : t + 1]
            )


@torch.inference_mode()
def stream_ids(
    net: Net,
    idx: Tensor,
    max_new_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    use_cache: bool = True,
    context_shift: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    logprobs: bool = False,
    use_graph: bool | None = None,
    **sampling,
) -> Iterator[StepOutput]:
    """Yields the next tokens after idx (B, T), max_new_tokens times, without waiting for the device.

    Each token is drawn given all text before it as long as that fits into block_size. Once it does not, the start of
    the context shifts by `context_shift` tokens, every time the text outgrows it. With context_shift 1 that is the
    window of the lecture and of nanoGPT, always the newest block_size tokens. With block_size / 2 a context has
    between half a block and a block.

    A shift gives every token another position, so with learned positions the cache is void. With RoPE only distances
    count, but the cache is void all the same: from the second layer on, keys and values depend on tokens that have
    left the window. So the context is prefilled again after each shift, and the text with the cache equals the text
    without it for any context_shift, token by token, in float32 and float64; in 16 bits the two round differently,
    which may change a draw. Beyond block_size, context_shift 1 costs a full forward per token, and block_size / 2 one
    per block_size / 2 tokens. The logits of the latter are exact: it is the same net with a shorter past, as in
    training.

    Args:
        lengths: of the prompts, where they differ; row b is idx[b, :lengths[b]], the rest is padding.
        use_cache: without it each token costs a forward of its context, as in nanoGPT.
        context_shift: tokens by which a full context shifts, 1 to block_size.
        generator: of the noise; one for each row makes a row's text independent of the other rows (up to rounding, as
            for the cache).
        logprobs: whether to return the net's log-probability of each token, before temperature and restrictions.
        use_graph: replay each step as a CUDA graph; None does so on CUDA where it pays.
        sampling: temperature, top_k, top_p, min_p and repetition_penalty of `SamplingConfig`.
    Raises:
        ValueError: a setting is out of its range.
    """
    block_size, device = net.config.block_size, idx.device
    how = SamplingConfig(**sampling)
    if not 1 <= context_shift <= block_size:
        raise ValueError(f"context_shift={context_shift} must be between 1 and block_size={block_size}")
    if min(lengths := [idx.size(1)] * len(idx) if lengths is None else lengths) < 1:
        raise ValueError("a prompt is empty: every text needs at least one token to continue")
    nets = net.nets if isinstance(net, Ensemble) else [net]
    use_cache = use_cache and all(isinstance(each, GPT) for each in nets)  # the lecture's models have no cache
    if use_graph is None:  # a sharded net gathers its weights at every step, which can't be captured
        use_graph = device.type == "cuda" and use_cache and max_new_tokens >= 32 and not is_sharded(net)
    was_training = net.training
    net.eval()
    try:
        sampler = Sampler(how, len(idx), net.config.vocab_size, max_new_tokens, generator, logprobs, device)
        for row, n in enumerate(lengths):
            sampler.mark_prompt(row, idx[row, :n])
        yield from DecodeSession(net, idx, lengths, context_shift, use_cache, sampler).run(use_graph)
    finally:
        net.train(was_training)


def generate_ids(net: Net, idx: Tensor, max_new_tokens: int, **settings) -> Tensor:
    """idx (B, T) continued to (B, T + max_new_tokens); `settings` are those of `stream_ids`.

    Prompts of unequal `lengths` are continued where each ends; shorter rows are padded with zeros at their end.
    """
    new = torch.cat([out.ids for out in stream_ids(net, idx, max_new_tokens, **settings)] or [idx[:, :0]], 1)
    if (lengths := settings.get("lengths")) is None:
        return torch.cat((idx, new), 1)
    texts = [torch.cat((row[:n], more)) for row, n, more in zip(idx, lengths, new, strict=True)]
    return pad_sequence(texts, batch_first=True)
