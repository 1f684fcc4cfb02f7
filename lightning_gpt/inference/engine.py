"""Sampling token ids from a GPT, fast. Torch only: no Trainer, no tokenizer, no files.

Shapes   B batch · T time (tokens) · V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cuda_graph import CapturedStep
from ..errors import warn_once
from ..model.gpt import GPT
from ..model.kv_cache import KVCache
from ..model.lecture import LectureModel
from .cpu_step import CPUStep
from .sampling import check_sampling, exponential_noise, sample_next

if TYPE_CHECKING:
    from .triton_step import TritonStep


def is_sharded(net: torch.nn.Module) -> bool:
    """Whether this device has a part of each weight only."""
    return hasattr(next(net.parameters()), "device_mesh")


class StepOutput(NamedTuple):
    """One step of `stream_ids`: token ids (B, 1) and, if asked for, the net's log-probabilities of them (B, 1)."""

    ids: Tensor
    logprobs: Tensor | None


class DecodeSession:
    """A batch of texts being written: its tokens, its cache, its dice. A step leaves all it does on the device."""

    def __init__(
        self,
        net: GPT | LectureModel,
        idx: Tensor,
        lengths: Sequence[int],
        steps: int,
        context_shift: int,
        use_cache: bool,
        penalty: float,
        logprobs: bool,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        how: dict,
    ):
        (B, device), self.V = (len(idx), idx.device), net.config.vocab_size
        self.net, self.idx, self.lengths = net, idx[:, : max(lengths)], list(lengths)
        self.context_shift, self.use_cache = context_shift, use_cache
        self.penalty, self.generator, self.how = penalty, generator, how
        self.block_size = net.config.block_size
        self.starts = [max(0, n - self.block_size) for n in lengths]  # where each row's context begins
        self.cache = KVCache(min(self.block_size, max(lengths) + steps))
        self.even = len(set(lengths)) == 1
        # a sharded net fetches its weights when it is called, and autocast looks at modules
        plain = use_cache and not is_sharded(net) and not torch.is_autocast_enabled(device.type)
        self.lean = CPUStep(cast(GPT, net), self.cache) if plain else None
        self.steps = steps
        self.out = torch.zeros(B, steps, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B, steps, device=device) if logprobs else None
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)  # tokens drawn so far, the same for each row
        self.throws = max(16, 4096 // self.V)  # steps that dice are thrown ahead for
        self.dice = torch.ones(self.throws, B, self.V, device=device)
        self.seen = torch.zeros(B, self.V, dtype=torch.bool, device=device)
        for row, n in enumerate(self.lengths if penalty != 1 else ()):
            self.seen[row, idx[row, :n]] = True

    def throw_dice(self) -> None:
        """For the next steps: rows with generators of their own get what they would get alone."""
        if isinstance(self.generator, Sequence):
            shape, device = (self.throws, self.V), self.dice.device
            self.dice.copy_(torch.stack([exponential_noise(shape, device, one) for one in self.generator], 1))
        else:
            self.dice.copy_(exponential_noise(self.dice.shape, self.dice.device, self.generator))

    def choose(self, logits: Tensor) -> None:
        """Draw the next token of every row from its logits (B, V) and write it down."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        odds = logits
        if self.penalty != 1:
            odds = torch.where(self.seen, torch.where(odds > 0, odds / self.penalty, odds * self.penalty), odds)
        dice = self.dice.index_select(0, self.count[:1] % self.throws)[0] if self.how["temperature"] else None
        new = sample_next(odds, **self.how, dice=dice)
        if self.penalty != 1:
            self.seen.scatter_(1, new, True)
        if self.logprobs is not None:
            self.logprobs.index_copy_(1, self.count[:1], logits.log_softmax(-1).gather(1, new).type_as(self.logprobs))
        self.out.index_copy_(1, self.count[:1], new)
        self.token.copy_(new)
        self.count += 1

    def step(self) -> None:
        """Read the newest token of every row with the cache, and draw the next."""
        if self.lean is not None and isinstance(self.cache.length, int):
            self.choose(self.lean(self.token))
        else:
            self.choose(self.net(self.token, self.cache)[:, -1])

    def windows(self, rows: list[int], t: int) -> list[Tensor]:
        """The context of each row after t steps."""
        texts = (torch.cat((self.idx[b, : self.lengths[b]], self.out[b, :t])) for b in rows)
        return [text[self.starts[b] :] for b, text in zip(rows, texts, strict=True)]

    def context(self, rows: list[int], t: int) -> tuple[Tensor, Tensor]:
        """The contexts of these rows after t steps, (len(rows), T), and the last place in each (len(rows),)."""
        if len(rows) == len(self.idx) and self.even:
            piece = torch.cat((self.idx, self.out[:, :t]), 1)[:, self.starts[0] :]
            lengths = [piece.size(1)] * len(rows)
        else:
            windows = self.windows(rows, t)
            piece, lengths = pad_sequence(windows, batch_first=True), [len(window) for window in windows]
        return piece, torch.tensor(lengths, device=self.idx.device) - 1

    def read(self, rows: list[int], piece: Tensor, last: Tensor) -> Tensor:
        """Logits (len(rows), V) of the next token from the whole `context` of these rows; their cache begins anew."""
        device, every = self.idx.device, len(rows) == len(self.idx)
        if not isinstance(self.net, GPT):
            return self.net(piece)[torch.arange(len(rows), device=device), last]
        if not self.use_cache:
            return self.net(piece, only=last)[:, 0]
        cache, where = (self.cache if every else KVCache(self.cache.size)), self.cache.length
        cache.length = 0
        logits = self.net(piece, cache, only=last)[:, 0]
        if (n := self.net.config.ngram_max) > 1 and not (every and self.even):
            back = last[:, None] - torch.arange(n - 2, -1, -1, device=device)
            cache.tail.copy_(piece.gather(1, back.clamp(min=0)).masked_fill(back < 0, -1))
        if every and self.even and isinstance(where, int):
            return logits
        if not every:
            at = torch.tensor(rows, device=device)
            self.cache.take(at, cache)
            if n > 1:
                self.cache.tail[at] = cache.tail
            assert isinstance(where, Tensor)
            where[at] = last + 1
        elif isinstance(where, Tensor):
            where.copy_(last + 1)
        else:
            where = last + 1
        self.cache.length = where
        return logits

    def begin(self, piece: Tensor, last: Tensor) -> None:
        """Read the whole contexts of all rows, and draw."""
        self.choose(self.read(list(range(len(self.idx))), piece, last))

    def take(self, decoder: "TritonStep | None") -> Callable[[], None]:
        """Take a step, in the decoder's kernels if they can be built here, and say by which function."""
        if decoder is not None:
            try:
                decoder.step()
                return decoder.step
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no C compiler, none of Python's headers, too old a GPU, another Triton ...
                reason = str(error).strip().split("\n")[0][:150]
                warn_once(f"Triton can't build kernels here ({reason}): PyTorch's write the text, more slowly")
        self.step()
        return self.step

    def record(self) -> "torch.cuda.CUDAGraph":
        """A step as a CUDA graph, whose replay costs no Python; in kernels of our own where Triton is there."""
        length, seen = torch.zeros(len(self.idx), dtype=torch.long, device=self.idx.device), self.seen.clone()
        self.cache.length, self.cache.even = length, self.even
        decoder = None
        if next(self.net.parameters()).dtype != torch.float64:
            with suppress(ImportError):
                from .triton_step import TritonStep

                decoder = TritonStep(self)
        apart, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        apart.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(apart):  # what is lazy comes first
            step = self.take(decoder)
        torch.cuda.current_stream().wait_stream(apart)
        with torch.cuda.graph(graph, stream=apart, capture_error_mode="thread_local"):
            step()
        self.count.zero_()
        self.seen.copy_(seen)
        return graph

    def write(self, record: bool) -> Iterator[StepOutput]:
        replay = self.record().replay if record else self.step
        # contexts that move on together are read again and again in one shape
        reread = CapturedStep(warm_up=1) if record and self.even else None
        B, every = len(self.idx), list(range(len(self.idx)))
        for t in range(self.steps):
            if t % self.throws == 0 and self.how["temperature"]:
                self.throw_dice()
            full = [b for b in every if self.lengths[b] + t - self.starts[b] > self.block_size]
            for b in full if t else ():
                self.starts[b] += self.context_shift
            if t == 0 or not self.use_cache or len(full) == B:
                contexts = self.context(every, t)
                begin = partial(self.begin, *contexts)
                if t and reread is not None:
                    reread(begin, contexts)
                else:
                    begin()
            elif full:
                assert isinstance(self.cache.length, Tensor)
                self.cache.length[torch.tensor(full, device=self.idx.device)] = 0  # no place is left to write to
                logits = self.net(self.token, self.cache)[:, -1]
                logits[full] = self.read(full, *self.context(full, t))
                self.choose(logits)
            else:
                replay()
            yield StepOutput(self.out[:, t : t + 1], None if self.logprobs is None else self.logprobs[:, t : t + 1])


@torch.inference_mode()
def stream_ids(
    net: GPT | LectureModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    use_cache: bool = True,
    context_shift: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    logprobs: bool = False,
    record: bool | None = None,
) -> Iterator[StepOutput]:
    """Yields the next tokens after idx (B, T), max_new_tokens times, and never waits for the device.

    What a token is drawn from: from all text before it as long as that fits into block_size; once it does not, the
    context's beginning moves on by `context_shift` tokens, as often as the text outgrows it again. With context_shift 1
    that is the lecture's and nanoGPT's window, always the newest block_size tokens. With block_size / 2 a context has
    between half a block and a block.

    When the context moves, every token in it gets another place, so with learned positions nothing in the cache is
    true any more. With rope positions only distances count, and yet the cache is as void: from the second layer on a
    token's key and value were made of tokens that have left the window (they would stay true for one layer without
    n-grams, a case not worth a path of its own). So the context is read again whenever it moves. Hence text with the
    cache is the text without, for any context_shift, to the token in float32 and float64; in 16 bits both round
    differently, which may change a draw. But beyond block_size context_shift 1 costs a full forward a token, and
    block_size / 2 one per block_size / 2 tokens. The logits of the latter are exact: it is the same net with a shorter
    past, and it was trained on short pasts too.

    Args:
        lengths: of the prompts, where they differ; row b is idx[b, :lengths[b]], what stands behind is not looked at.
        use_cache: without it each token costs a forward of its context, nanoGPT's way.
        context_shift: tokens by which a context that is full moves on, 1 to block_size.
        temperature: see `sample_next`, also for top_k, top_p and min_p.
        repetition_penalty: above 1 divides the logits of tokens in the text by it, multiplies them if they are
            negative (CTRL, Keskar et al. 2019, section 4.1).
        generator: the dice; one for each row makes a row's text independent of the other rows (up to rounding, as for
            the cache).
        logprobs: whether to say how likely the net found each token, before temperature and restrictions.
        record: replay each step as a CUDA graph; None does so on CUDA where it pays.
    Raises:
        ValueError: a setting is out of its range.
    """
    block_size = net.config.block_size
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if not 1 <= context_shift <= block_size:
        raise ValueError(f"context_shift={context_shift} must be between 1 and block_size={block_size}")
    if min(lengths := [idx.size(1)] * len(idx) if lengths is None else lengths) < 1:
        raise ValueError("a prompt is empty: every text needs one token to go on from")
    use_cache = use_cache and isinstance(net, GPT)  # a lecture_step of the lecture looks at the whole text each time
    gpu = idx.device.type == "cuda" and use_cache
    if record is None:  # a sharded net fetches its weights at every step, which can't be recorded
        record = gpu and max_new_tokens >= 32 and not is_sharded(net)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    was_training = net.training
    net.eval()
    try:
        writer = DecodeSession(
            net, idx, lengths, max_new_tokens, context_shift, use_cache, repetition_penalty, logprobs, generator, how
        )
        yield from writer.write(record)
    finally:
        net.train(was_training)


def generate_ids(net: GPT | LectureModel, idx: Tensor, max_new_tokens: int, **how) -> Tensor:
    """idx (B, T) continued to (B, T + max_new_tokens); `how` goes to `stream_ids`.

    Prompts of unequal `lengths` are continued where each ends, so that rows end before the last column, with zeros.
    """
    new = torch.cat([drawn.ids for drawn in stream_ids(net, idx, max_new_tokens, **how)] or [idx[:, :0]], 1)
    if (lengths := how.get("lengths")) is None:
        return torch.cat((idx, new), 1)
    texts = [torch.cat((row[:n], more)) for row, n, more in zip(idx, lengths, new, strict=True)]
    return pad_sequence(texts, batch_first=True)
