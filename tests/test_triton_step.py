"""The Triton step computes the net's logits and draws the same tokens; without a GPU, Triton interprets it."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import MODERN, T, V, loud

from lightning_gpt.inference.engine import DecodeSession
from lightning_gpt.inference.sampling import Sampler, SamplingConfig
from lightning_gpt.inference.triton_sampler import can_draw, draw
from lightning_gpt.inference.triton_step import TritonStep
from lightning_gpt.model.gpt import GPT, GPTConfig

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {
    "gpt2": dict(),
    "modern": MODERN,
    "swiglu": dict(activation="swiglu", bias=False, n_layer=1),
    "odd sizes": dict(n_layer=1, activation="gelu_tanh", n_embd=30, n_head=3, tie_embeddings=True),
    "bigram": dict(n_layer=0),
}
SAMPLING = {
    "greedy": dict(temperature=0, top_k=5),
    "temperature": dict(temperature=2.0, repetition_penalty=1.5),
    "top_k": dict(temperature=2.0, top_k=5),
    "top_p": dict(temperature=2.0, top_p=0.8),
    "min_p": dict(temperature=2.0, min_p=0.6),
    "all": dict(temperature=3.0, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.5),
}


def make(block_size=T, **overrides):
    sizes = dict(n_layer=2, n_head=2, n_embd=16, dropout=0.0) | overrides
    return loud(GPT(GPTConfig(V, block_size, **sizes))).float().to(DEVICE)


def session(net, rows, length, steps, **sampling):
    """A session after its prefill, and its Triton backend."""
    idx = torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(2)
    sampler = Sampler(SamplingConfig(**sampling), rows, V, steps, generator, True, idx.device)
    for row in range(rows):
        sampler.mark_prompt(row, idx[row])
    s = DecodeSession(net, idx, [length] * rows, 1, True, sampler)
    s.cache.length, s.cache.uniform_length = torch.zeros(rows, dtype=torch.long, device=DEVICE), True
    backend = TritonStep(net, s.cache, rows)
    sampler.refill_noise(0)
    s.prefill_and_draw(*s.contexts(s.rows, 0))
    return s, backend


@torch.inference_mode()
def assert_same_text(net, rows, length, steps, **sampling):
    (expected, _), (actual, backend) = (session(net, rows, length, steps + 1, **sampling) for _ in "12")
    for n in range(1, steps + 1):
        expected.decode()
        logits = backend.step(actual.sampler.token)
        text = torch.cat((actual.idx, actual.sampler.ids[:, :n]), 1)
        torch.testing.assert_close(logits, net(text)[:, -1], rtol=1e-4, atol=1e-4)
        draw(actual.sampler, logits)
    for name in "ids", "seen", "token", "count":
        assert torch.equal(getattr(actual.sampler, name), getattr(expected.sampler, name)), name
    torch.testing.assert_close(actual.sampler.logprobs, expected.sampler.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_generates_the_same_text(name, rows):
    assert_same_text(make(**CONFIGS[name]), rows, 4, 2, temperature=1.0)


@pytest.mark.parametrize("name", SAMPLING)
def test_every_sampling_setting_draws_the_same_tokens(name):
    assert_same_text(make(n_layer=1), 3, 4, 4, **SAMPLING[name])


@pytest.mark.parametrize("rows", [1, 18])
def test_a_long_cache_in_splits_and_many_rows_generate_the_same_text(rows):
    assert_same_text(make(300, n_layer=1, position="rope"), rows, 270 + rows, 2, temperature=1.0)


@torch.inference_mode()
def test_top_k_with_ties_keeps_exactly_k():
    net = make(n_layer=0)
    net.lm_head.weight.zero_()
    s, backend = session(net, 18, 1, 7, temperature=1.0, top_k=3)
    for _ in range(6):
        draw(s.sampler, backend.step(s.sampler.token))
    assert s.sampler.ids[:, 1:].unique().numel() == 3


@pytest.mark.parametrize("how", [SAMPLING["greedy"], dict(temperature=1e3, top_k=5), SAMPLING["all"]])
def test_a_large_vocabulary_draws_the_same_tokens(how):
    """Of the eight highest tokens, neighbours in one group of the shortlist, three are not among the top_k."""
    B, V, steps = 2, 20_000, 4
    logits = 3 * torch.randn(steps, B, V, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    logits[..., 104:112] += 20
    expected, actual = (
        Sampler(SamplingConfig(**how), B, V, steps, torch.Generator(DEVICE).manual_seed(4), False, logits.device)
        for _ in "12"
    )
    assert can_draw(actual)
    for sampler, sample in (expected, expected), (actual, partial(draw, actual)):
        sampler.refill_noise(0)
        sampler.mark_prompt(0, logits[0, 0].topk(50).indices)
        for each in logits:
            sample(each)
    for field in "ids", "seen", "token", "count":
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels can be built on this machine")
def test_if_kernels_cannot_be_built_the_net_generates_and_one_warning_is_printed():
    tests = os.path.dirname(__file__)
    code = """
import conftest, os, torch
os.environ["TRITON_INTERPRET"] = "0"
from test_triton_step import make, session
with torch.inference_mode():
    s, backend = session(make(n_layer=1), 1, 4, 4, temperature=0)
    assert [s.warm_up(s.triton_decode()) == s.decode for _ in range(2)] == [True, True]
    print(s.sampler.count.item())
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "3\n", done.stderr
    assert "Triton can't build kernels here" in done.stderr and done.stderr.count("\n") == 1
