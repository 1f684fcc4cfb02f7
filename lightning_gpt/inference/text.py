"""Text in, text out: what a net goes on with after a prompt, and how likely it finds a text. Torch only.

from lightning_gpt import generate, load

net, tokenizer = load()
print(generate(net, tokenizer, "ROMEO:"))
"""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..checkpoint.io import find_checkpoint, load_net
from ..data.tokenizers import TokenIds, Tokenizer
from ..data.windows import derive_seed
from ..model.gpt import GPT
from ..model.lecture import LectureModel
from .engine import stream_ids

PACKAGED_CHECKPOINT = Path(__file__).parent / "shakespeare.ckpt"  # what speaks where nothing was trained yet
MAX_GROUP = 32  # tokens that a GPU writes before the host looks at them


def find_or_packaged(ckpt_path: str | Path = "best") -> Path:
    """As `find_checkpoint`, but `best` is the shipped checkpoint where no run has left one."""
    try:
        return find_checkpoint(ckpt_path)
    except FileNotFoundError:
        if str(ckpt_path) != "best" or not PACKAGED_CHECKPOINT.exists():
            raise
        return PACKAGED_CHECKPOINT


def load(
    ckpt_path: str | Path = "best",
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> tuple[GPT | LectureModel, Tokenizer]:
    """The net and the tokenizer of a checkpoint: of the newest run, or of the one that comes with the package.

    Args:
        ckpt_path: a file; best or last is the newest of that name below checkpoints/.
        device: auto takes the accelerator if there is one.
        precision: of weights and sums; auto is bfloat16 on CUDA and float32 elsewhere. On a CPU a token costs the
            reading of all weights, so float16 is twice as fast where they outgrow its cache.
    Raises:
        ValueError: the device can't be used, or the file is no good checkpoint. FileNotFoundError: there is none.
    """
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.zeros(1, device=device).tolist()  # meta has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} can't be used here: {str(error).splitlines()[0][:100]}") from None
    net, tokenizer = load_net(find_or_packaged(ckpt_path), device)
    if precision == "auto":
        precision = "bfloat16" if next(net.parameters()).device.type == "cuda" else "float32"
    if precision != "float32":
        angles = getattr(net, "rope", None)
        net.to(getattr(torch, precision))
        if angles is not None:
            net.rope = angles  # three digits are too few for an angle
    return net, tokenizer


@dataclass
class Completion:
    """A prompt and what was written after it so far."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # ln of how likely the net found each token, if asked for
    finish_reason: Literal["", "length", "stop"] = ""  # by what; a stop string is no part of `text`
    stop: Sequence[str] = ()
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), repr=False, compare=False
    )

    def add(self, tokens: list[int], logprobs: list[float], tokenizer: Tokenizer, last: bool) -> None:
        """Go on by some tokens; what is written does not depend on how many come at a time.

        A character whose bytes are not all there waits for them, and is U+FFFD if `last` comes first.
        """
        if self.finish_reason:
            return
        state, kept = self.decoder.getstate(), len(tokens)
        text = self.text + self.decoder.decode(tokenizer.decode_bytes(tokens), last)
        starts = ((text.find(stop, max(0, len(self.text) + 1 - len(stop))), stop) for stop in self.stop)
        if found := [(at + len(stop), at) for at, stop in starts if at >= 0]:
            end, at = min(found)  # the first one to be whole
            self.decoder.setstate(state)
            length = len(self.text)
            for kept, token in enumerate(tokens, start=1):  # its last token is the text's: a group may go on behind it
                length += len(self.decoder.decode(tokenizer.decode_bytes([token]), last and kept == len(tokens)))
                if length >= end:
                    break
            self.text, self.finish_reason = text[:at], "stop"
        else:
            self.text, self.finish_reason = text, "length" if last else ""
        self.tokens += tokens[:kept]
        self.logprobs += logprobs[:kept]

    def stable_text(self) -> str:
        """The text without an end that may turn out to begin a stop string."""
        if self.finish_reason:
            return self.text
        starts = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        return self.text[: len(self.text) - max((len(s) for s in starts if self.text.endswith(s)), default=0)]


def encode_text(tokenizer: Tokenizer, text: str, what: str) -> Tensor:
    """Token ids (T,) of a text that is read, not trained on.

    Raises:
        ValueError: the net doesn't know some of its characters; names them, and what to do here.
    """
    try:
        return torch.as_tensor(tokenizer.encode(text))
    except ValueError:
        if not (unknown := tokenizer.unknown(text)):
            raise
        raise ValueError(
            f"the {what} has what this net's vocabulary of {len(tokenizer)} lacks: {unknown[:40]!r}; leave it out, or "
            "give --on_unknown drop"
        ) from None


def prepare_prompt(tokenizer: Tokenizer, prompt: str, on_unknown: Literal["error", "drop"] = "error") -> str:
    """The prompt as the net can read it; an empty one is a new line, as in the lecture.

    Raises:
        ValueError: it has unknown characters, and on_unknown is error.
    """
    unknown = tokenizer.unknown(prompt) if prompt else ""
    if unknown and on_unknown == "drop":
        ids = isinstance(tokenizer, TokenIds)
        parts = prompt.split() if ids else list(prompt)
        prompt = (" " if ids else "").join(part for part in parts if not tokenizer.unknown(part))
    if not prompt:
        prompt = tokenizer.vocabulary[0] if tokenizer.unknown("\n") else "\n"
    return tokenizer.decode(encode_text(tokenizer, prompt, "prompt"))  # ids written as numbers get their last space


def complete(
    net: GPT | LectureModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 500,
    *,
    temperature: float = 0.8,
    stop: Sequence[str] = (),
    seed: int = 1337,
    context_shift: int | None = None,
    on_unknown: Literal["error", "drop"] = "error",
    logprobs: bool = False,
    **how,
) -> Iterator[list[Completion]]:
    """Continue all prompts at once; yields the same texts again and again, each time some tokens longer.

    Args:
        prompts: of any lengths; of one longer than block_size the net reads the end. In float32 and float64 each text
            is what it would be alone, as it has dice of its own: of `seed` and its place in the batch.
        stop: a text ends where one of these would begin.
        seed: another seed gives other texts, the same one the same.
        context_shift: tokens by which a full context moves on, see `stream_ids`; null is half of block_size, which is
            fast; 1 is the lecture's window, a whole forward for each token.
        on_unknown: what to do with characters that the net doesn't know.
        logprobs: whether to fill in `Text.logprobs`.
        how: top_k, top_p, min_p, repetition_penalty ... of `stream_ids`.
    Raises:
        ValueError: a setting is out of its range, or a prompt can't be spelled.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if "" in stop:
        raise ValueError("stop has an empty string, which would end every text at once")
    device = next(net.parameters()).device
    texts = [Completion(prepare_prompt(tokenizer, prompt, on_unknown), stop=stop) for prompt in prompts]
    rows = [torch.as_tensor(tokenizer.encode(text.prompt)) for text in texts]
    dice = [torch.Generator(device).manual_seed(derive_seed(seed, i)) for i in range(len(texts))]
    drawn = stream_ids(
        net,
        pad_sequence(rows, batch_first=True).to(device),
        max_new_tokens,
        lengths=[len(row) for row in rows],
        context_shift=max(1, net.config.block_size // 2) if context_shift is None else context_shift,
        temperature=temperature,
        generator=dice,
        logprobs=logprobs,
        **how,
    )
    group, size = list[tuple[Tensor, Tensor | None]](), 1
    for n, new in enumerate(drawn, start=1):
        group.append(new)
        if len(group) < size and n < max_new_tokens:
            continue
        ids = torch.cat([ids for ids, _ in group], 1).tolist()  # the one place where the host waits for the device
        odds = torch.cat([odds for _, odds in group if odds is not None], 1).tolist() if logprobs else [[]] * len(texts)
        for text, tokens, found in zip(texts, ids, odds, strict=True):
            text.add(tokens, found, tokenizer, last=n == max_new_tokens)
        yield texts
        if all(text.finish_reason for text in texts):
            break
        group.clear()
        size = 1 if device.type == "cpu" else min(2 * size, MAX_GROUP)


def stream(
    net: GPT | LectureModel, tokenizer: Tokenizer, prompt: str = "", max_new_tokens: int = 500, **how
) -> Iterator[str]:
    """Yields the text after the prompt piece by piece as it comes; `how` goes to `complete`."""
    shown = 0
    for (text,) in complete(net, tokenizer, [prompt], max_new_tokens, **how):
        if piece := text.stable_text()[shown:]:
            shown += len(piece)
            yield piece


def generate(net: GPT | LectureModel, tokenizer: Tokenizer, prompt: str = "", max_new_tokens: int = 500, **how) -> str:
    """The text after the prompt; `how` goes to `complete`."""
    return "".join(stream(net, tokenizer, prompt, max_new_tokens, **how))


class Score(NamedTuple):
    """How a net finds a text, in the mean: a token is a character unless the tokenizer says otherwise."""

    nats_per_character: float
    bits_per_character: float
    nats_per_token: float
    perplexity: float  # exp(nats per token)
    characters: int  # all but the first token's
    tokens: int  # that were predicted, all but the first


@torch.inference_mode()
def score(net: GPT | LectureModel, tokenizer: Tokenizer, text: str, stride: int | None = None) -> Score:
    """How likely the net finds a text; the same number as `lightning-gpt validate` says of its validation split.

    Args:
        stride: the window of block_size tokens moves on by so many, and only those are counted that it has not seen
            before. null is block_size: windows side by side, as validate has them. A smaller one gives each token a
            longer past, so a lower loss, and takes longer.
    Raises:
        ValueError: stride is out of its range, the text has unknown characters or less than two tokens.
    """
    ids, S, device = encode_text(tokenizer, text, "text"), net.config.block_size, next(net.parameters()).device
    stride = S if stride is None else stride
    if not 1 <= stride <= S:
        raise ValueError(f"stride={stride} must be between 1 and block_size={S}")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: a score takes two or more, as nothing predicts the first")
    windows = ids.unfold(0, S + 1, stride) if len(ids) > S else ids.new_empty(0, S + 1)
    parts = [(windows[:1], S), *((piece, stride) for piece in windows[1:].split(max(1, 2**14 // S)))]
    if rest := len(ids) - 1 - (S + (len(windows) - 1) * stride if len(windows) else 0):
        parts.append((ids[None, len(windows) * stride :], rest))
    nats = 0.0
    for piece, fresh in parts:
        if len(piece):
            piece = piece.to(device)
            logits = net(piece[:, :-1])[:, -fresh:].flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats += F.cross_entropy(logits, piece[:, -fresh:].flatten(), reduction="sum").item()
    tokens, characters = len(ids) - 1, len(text) - len(tokenizer.decode(ids[:1]))
    each, mean = nats / max(1, characters), nats / tokens
    return Score(each, each / math.log(2), mean, math.exp(min(mean, 700)), characters, tokens)
