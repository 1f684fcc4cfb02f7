"""From logits to a token id: temperature, top-k, top-p, min-p and the repetition penalty.

Shapes   B batch · V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn from its logits; each restriction applies to what those above it left.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens; where several tie for the last place, exactly k stay.
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum (Holtzman et al. 2020).
        min_p: draw among tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024).
        repetition_penalty: above 1 divides the logits of tokens in the text by it, or multiplies negative ones (CTRL,
            Keskar et al. 2019, section 4.1).
    Raises:
        ValueError: a setting is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (the most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be 1 or more; leave it out to draw from every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is a sum of probabilities: more than 0, and 1 (all tokens) at most")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is a fraction of the highest probability: 0 (all tokens) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be more than 0; 1 changes nothing")


def exponential_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Exponential variates; never 0, as 0 / 0 would be drawn."""
    return torch.empty(shape, device=device).exponential_(generator=generator).clamp_(min=1e-30)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of the tokens in the text, `seen` (B, V), made smaller."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_p(weights: Tensor, top_p: float) -> Tensor:
    """Unnormalized probabilities (B, V), sorted from the largest, with those beyond the sum `top_p` set to 0."""
    before = weights.cumsum(-1) - weights
    return weights * (before < top_p * weights.sum(-1, keepdim=True))


def sample_next(logits: Tensor, sampling: SamplingConfig, noise: Tensor | None = None) -> Tensor:
    """Next token ids (B, 1) drawn from softmax(logits / temperature), restricted by top-k, top-p and min-p.

    The token with the largest probability / noise is drawn. With exponential noise that is a draw from these
    probabilities, as in torch.multinomial, but the host need not wait for the device.

    Args:
        logits: (B, V), with the repetition penalty applied.
        noise: `exponential_noise` (B, V), drawn beforehand or here.
    """
    temperature, top_k, top_p, ids = sampling.temperature, sampling.top_k, sampling.top_p, None
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    noise = exponential_noise(logits.shape, logits.device) if noise is None else noise
    highest = logits.amax(-1, keepdim=True)
    if top_k is not None and top_k < logits.size(-1):  # from here on there are only k columns
        logits, ids = logits.topk(top_k, sorted=top_p is not None)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # the most likely token has weight 1, so nothing overflows, however small the temperature
    weights = ((logits - highest) / max(temperature, 1e-30)).exp()
    if top_p is not None and top_p < 1:
        weights = keep_top_p(weights, top_p)
    if sampling.min_p is not None:
        weights = weights * (weights >= sampling.min_p)
    drawn = (weights / (noise if ids is None else noise.gather(-1, ids))).argmax(-1, keepdim=True)
    return drawn if ids is None else ids.gather(-1, drawn)


class Sampler:
    """Draws the next token of every row and records it; its state stays on the device, so a CUDA graph can hold it.

    Args:
        rows: number of texts, B.
        vocab_size: V.
        steps: number of tokens that will be drawn for each text.
        generator: of the noise; one for each row makes a row's text independent of the other rows.
        with_logprobs: whether to record the log-probability of each token, before penalty and temperature.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        rows: int,
        vocab_size: int,
        steps: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        with_logprobs: bool,
        device: torch.device,
    ):
        self.sampling, self.generator = sampling, generator
        self.ids = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, steps, device=device) if with_logprobs else None
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)  # the newest of each row
        self.count = torch.zeros(rows, dtype=torch.long, device=device)  # tokens drawn so far, the same for each row
        self.noise_steps = max(16, 4096 // vocab_size)  # steps that noise is drawn for at once
        self.noise = torch.ones(self.noise_steps, rows, vocab_size, device=device)
        self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)  # tokens in the text

    def mark_prompt(self, row: int, ids: Tensor) -> None:
        """Count the tokens of a row's prompt (T,) as seen."""
        if self.sampling.repetition_penalty != 1:
            self.seen[row, ids] = True

    def refill_noise(self, step: int) -> None:
        """Draw the noise of the next `noise_steps` steps, when `step` is the first of them."""
        if step % self.noise_steps or not self.sampling.temperature:
            return
        if isinstance(self.generator, Sequence):
            shape, device = (self.noise_steps, self.noise.size(2)), self.noise.device
            self.noise.copy_(torch.stack([exponential_noise(shape, device, one) for one in self.generator], 1))
        else:
            self.noise.copy_(exponential_noise(self.noise.shape, self.noise.device, self.generator))

    def __call__(self, logits: Tensor) -> None:
        """Draw the next token of every row from its logits (B, V)."""
        logits, penalty = logits.to(torch.promote_types(logits.dtype, torch.float32)), self.sampling.repetition_penalty
        penalized = logits if penalty == 1 else penalize_repetition(logits, self.seen, penalty)
        at = self.count[:1]
        noise = self.noise.index_select(0, at % self.noise_steps)[0] if self.sampling.temperature else None
        new = sample_next(penalized, self.sampling, noise)
        if penalty != 1:
            self.seen.scatter_(1, new, True)
        if self.logprobs is not None:
            self.logprobs.index_copy_(1, at, logits.log_softmax(-1).gather(1, new).type_as(self.logprobs))
        self.ids.index_copy_(1, at, new)
        self.token.copy_(new)
        self.count += 1
