"""Text generation and scoring with a net and its tokenizer; does not import Lightning.

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

from ..checkpoint.io import find_checkpoint, find_checkpoints, load_net
from ..data.tokenizers import TokenIds, Tokenizer
from ..data.windows import derive_seed
from ..model.ensemble import Ensemble, Net
from ..model.gpt import GPT
from ..model.int8 import to_int8
from ..model.lecture import LectureModel
from .engine import stream_ids

PACKAGED_CHECKPOINT = Path(__file__).parent / "shakespeare.ckpt"  # used until a run has saved one
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]
MAX_GROUP = 32  # tokens that a GPU generates between two reads by the host


def find_or_packaged(ckpt_path: str | Path = "best") -> Path:
    """`find_checkpoint`, except that `best` falls back to the packaged checkpoint if no run has saved one."""
    try:
        return find_checkpoint(ckpt_path)
    except FileNotFoundError:
        if str(ckpt_path) != "best" or not PACKAGED_CHECKPOINT.exists():
            raise
        return PACKAGED_CHECKPOINT


def choose_device(device: str) -> str:
    """The device of this name; auto is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: it can't be used here.
    """
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.zeros(1, device=device).tolist()  # fails on the meta device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} can't be used here: {str(error).splitlines()[0][:100]}") from None
    return device


def load(
    ckpt_path: str | Path = "best",
    device: str = "auto",
    precision: Precision = "auto",
) -> tuple[Net, Tokenizer]:
    """Load the net and the tokenizer of a checkpoint, by default of the newest run or else of the packaged one.

    Of several checkpoints, the net is their `Ensemble`.

    Args:
        ckpt_path: a file; best or last takes the newest file of that name below checkpoints/; or several, as a pattern
            or separated by commas.
        device: auto takes the accelerator if there is one.
        precision: dtype of the weights; auto is bfloat16 on CUDA and float32 elsewhere. On a CPU each token reads all
            weights, so float16 and int8 are faster for larger nets. int8 holds the linear layers' weights with one
            scale a row and computes in float32; it is for one text on a CPU.
    Raises:
        ValueError: the device can't be used or has no int8, a file is not a valid checkpoint, or their tokenizers
            differ.
        FileNotFoundError: there is no such checkpoint.
    """
    return load_files(find_checkpoints(ckpt_path, find_or_packaged), device, precision)


def load_files(paths: Sequence[Path], device: str, precision: Precision) -> tuple[Net, Tokenizer]:
    """`load` of these files."""
    device = choose_device(device)
    nets, tokenizers = zip(*(load_net(path, device) for path in paths), strict=True)
    tokenizer = tokenizers[0]
    for path, other in zip(paths, tokenizers, strict=True):
        if not other.has_ids_of(tokenizer):
            raise ValueError(
                f"{paths[0]} and {path} have different vocabularies, {len(tokenizer)} tokens of {tokenizer.name} "
                f"and {len(other)} of {other.name}: an ensemble needs nets with one vocabulary"
            )
    if precision == "auto":
        precision = "bfloat16" if next(nets[0].parameters()).device.type == "cuda" else "float32"
    nets = tuple(in_precision(each, precision) for each in nets)
    return Ensemble(nets) if len(nets) > 1 else nets[0], tokenizer


def in_precision(net: GPT | LectureModel, precision: str) -> GPT | LectureModel:
    """The net with its weights in another dtype, in place; rotary angles stay as they are, to keep their digits.

    Raises:
        ValueError: precision is int8, and the net is not on a CPU.
    """
    if precision == "int8":
        if (device := next(net.parameters()).device).type != "cpu":
            raise ValueError(f"precision=int8 is for a CPU, not {device}: add device=cpu, or set precision=bfloat16")
        to_int8(net)
    elif precision != "float32":
        rope = getattr(net, "rope", None)
        net.to(getattr(torch, precision))
        if rope is not None:
            net.rope = rope
    return net


@dataclass
class Completion:
    """A prompt and the text generated after it so far."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, in nats, if requested
    finish_reason: Literal["", "length", "stop"] = ""  # empty while running; `text` excludes the stop string
    stop: Sequence[str] = ()
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), repr=False, compare=False
    )

    def add(self, tokens: list[int], logprobs: list[float], tokenizer: Tokenizer, last: bool) -> None:
        """Append tokens; the text does not depend on how they are grouped into calls.

        An incomplete character is held back until its remaining bytes arrive, or becomes U+FFFD if `last`.
        """
        if self.finish_reason:
            return
        state, kept = self.decoder.getstate(), len(tokens)
        text = self.text + self.decoder.decode(tokenizer.decode_bytes(tokens), last)
        starts = ((text.find(stop, max(0, len(self.text) + 1 - len(stop))), stop) for stop in self.stop)
        if found := [(at + len(stop), at) for at, stop in starts if at >= 0]:
            end, at = min(found)  # the stop string that is completed first
            self.decoder.setstate(state)
            length = len(self.text)
            for kept, token in enumerate(tokens, start=1):  # keep the tokens up to the end of the stop string
                length += len(self.decoder.decode(tokenizer.decode_bytes([token]), last and kept == len(tokens)))
                if length >= end:
                    break
            self.text, self.finish_reason = text[:at], "stop"
        else:
            self.text, self.finish_reason = text, "length" if last else ""
        self.tokens += tokens[:kept]
        self.logprobs += logprobs[:kept]

    def stable_text(self) -> str:
        """The text without a suffix that may be the beginning of a stop string."""
        if self.finish_reason:
            return self.text
        prefixes = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        return self.text[: len(self.text) - max((len(s) for s in prefixes if self.text.endswith(s)), default=0)]


def encode_text(tokenizer: Tokenizer, text: str, what: str) -> Tensor:
    """Token ids (T,) of a prompt or a text to score; `what` names it in the error message.

    Raises:
        ValueError: the vocabulary lacks some of its characters; the message names them and the remedy.
    """
    try:
        return torch.as_tensor(tokenizer.encode(text))
    except ValueError:
        if not (unknown := tokenizer.unknown(text)):
            raise
        raise ValueError(
            f"the {what} contains {unknown[:40]!r}, which this net's vocabulary of {len(tokenizer)} lacks: remove it, "
            "or set --on_unknown drop"
        ) from None


def prepare_prompt(tokenizer: Tokenizer, prompt: str, on_unknown: Literal["error", "drop"] = "error") -> str:
    """The prompt as the net reads it; an empty prompt becomes a newline, as in the lecture.

    Raises:
        ValueError: the prompt has unknown characters and on_unknown is error.
    """
    unknown = tokenizer.unknown(prompt) if prompt else ""
    if unknown and on_unknown == "drop":
        ids = isinstance(tokenizer, TokenIds)
        parts = prompt.split() if ids else list(prompt)
        prompt = (" " if ids else "").join(part for part in parts if not tokenizer.unknown(part))
    if not prompt:
        prompt = tokenizer.vocabulary[0] if tokenizer.unknown("\n") else "\n"
    return tokenizer.decode(encode_text(tokenizer, prompt, "prompt"))  # appends a space to ids written as numbers


def complete(
    net: Net,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 500,
    *,
    temperature: float = 0.8,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] = 1337,
    context_shift: int | None = None,
    on_unknown: Literal["error", "drop"] = "error",
    logprobs: bool = False,
    **sampling,
) -> Iterator[list[Completion]]:
    """Continue a batch of prompts; yields the same list of completions each time it has grown by some tokens.

    Args:
        prompts: of any lengths; the net reads the last block_size tokens of each. Each text has a generator, seeded
            with `seed` and its index, so in float32 and float64 it does not depend on the other prompts.
        stop: a text ends before the first occurrence of any of these strings.
        seed: seeds the generators; the same seed gives the same texts. A sequence has one for each text.
        context_shift: tokens by which a full context is shifted, see `stream_ids`. None is half of block_size, which is
            fast; 1 is the lecture's sliding window, with a full forward pass per token.
        on_unknown: whether characters outside the vocabulary raise an error or are dropped.
        logprobs: whether to fill in `Completion.logprobs`.
        sampling: top_k, top_p, min_p, repetition_penalty ... of `stream_ids`.
    Raises:
        ValueError: a setting is out of range, or a prompt can't be encoded.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if "" in stop:
        raise ValueError("stop has an empty string, which would end every text immediately")
    device = next(net.parameters()).device
    texts = [Completion(prepare_prompt(tokenizer, prompt, on_unknown), stop=stop) for prompt in prompts]
    rows = [torch.as_tensor(tokenizer.encode(text.prompt)) for text in texts]
    seeds = [derive_seed(seed, i) for i in range(len(texts))] if isinstance(seed, int) else seed
    generators = [torch.Generator(device).manual_seed(one) for one in seeds]
    steps = stream_ids(
        net,
        pad_sequence(rows, batch_first=True).to(device),
        max_new_tokens,
        lengths=[len(row) for row in rows],
        context_shift=max(1, net.config.block_size // 2) if context_shift is None else context_shift,
        temperature=temperature,
        generator=generators,
        logprobs=logprobs,
        **sampling,
    )
    group, size = list[tuple[Tensor, Tensor | None]](), 1
    for n, step in enumerate(steps, start=1):
        group.append(step)
        if len(group) < size and n < max_new_tokens:
            continue
        ids = torch.cat([ids for ids, _ in group], 1).tolist()  # the only synchronization with the device
        scores = torch.cat([lp for _, lp in group if lp is not None], 1).tolist() if logprobs else [[]] * len(texts)
        for text, tokens, token_logprobs in zip(texts, ids, scores, strict=True):
            text.add(tokens, token_logprobs, tokenizer, last=n == max_new_tokens)
        yield texts
        if all(text.finish_reason for text in texts):
            break
        group.clear()
        size = 1 if device.type == "cpu" else min(2 * size, MAX_GROUP)


def stream(net: Net, tokenizer: Tokenizer, prompt: str = "", max_new_tokens: int = 500, **settings) -> Iterator[str]:
    """Yield the text after the prompt piece by piece; `settings` are passed to `complete`."""
    shown = 0
    for (text,) in complete(net, tokenizer, [prompt], max_new_tokens, **settings):
        if piece := text.stable_text()[shown:]:
            shown += len(piece)
            yield piece


def generate(net: Net, tokenizer: Tokenizer, prompt: str = "", max_new_tokens: int = 500, **settings) -> str:
    """The text after the prompt; `settings` are passed to `complete`."""
    return "".join(stream(net, tokenizer, prompt, max_new_tokens, **settings))


class Score(NamedTuple):
    """Mean negative log-likelihood of a text under a net, per character and per token."""

    nats_per_character: float
    bits_per_character: float
    nats_per_token: float
    perplexity: float  # exp(nats per token)
    characters: int  # without those of the first token
    tokens: int  # predicted ones: all but the first


@torch.inference_mode()
def score(net: Net, tokenizer: Tokenizer, text: str, stride: int | None = None) -> Score:
    """The negative log-likelihood of a text; without a stride, nats_per_token is the val/loss of `validate` on it.

    Args:
        stride: tokens by which the window of block_size tokens moves; each token is scored once, in the first window
            that predicts it. None is block_size: adjacent windows, as in validate. A smaller stride gives tokens a
            longer context, which lowers the loss and takes longer.
    Raises:
        ValueError: stride is out of range, or the text has unknown characters or fewer than two tokens.
    """
    ids, S, device = encode_text(tokenizer, text, "text"), net.config.block_size, next(net.parameters()).device
    stride = S if stride is None else stride
    if not 1 <= stride <= S:
        raise ValueError(f"stride={stride} must be between 1 and block_size={S}")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: a score needs at least two, as the first is not predicted")
    windows = ids.unfold(0, S + 1, stride) if len(ids) > S else ids.new_empty(0, S + 1)
    parts = [(windows[:1], S), *((piece, stride) for piece in windows[1:].split(max(1, 2**14 // S)))]
    if rest := len(ids) - 1 - (S + (len(windows) - 1) * stride if len(windows) else 0):
        parts.append((ids[None, len(windows) * stride :], rest))
    nats = 0.0
    for piece, new in parts:
        if len(piece):
            piece = piece.to(device)
            logits = net(piece[:, :-1])[:, -new:].flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats += F.cross_entropy(logits, piece[:, -new:].flatten(), reduction="sum").item()
    tokens, characters = len(ids) - 1, len(text) - len(tokenizer.decode(ids[:1]))
    per_character, per_token = nats / max(1, characters), nats / tokens
    perplexity = math.exp(min(per_token, 700))
    return Score(per_character, per_character / math.log(2), per_token, perplexity, characters, tokens)
