"""Generation: the right probabilities, and the same text with and without a cache, alone and in a batch."""

import itertools
import math

import pytest
import torch
from conftest import MODERN, T, V, loud

from lightning_gpt.data.tokenizers import CharTokenizer
from lightning_gpt.inference.cpu_step import CPUStep
from lightning_gpt.inference.engine import generate_ids, stream_ids
from lightning_gpt.inference.sampling import SamplingConfig, exponential_noise, sample_next
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.model.kv_cache import KVCache


@pytest.mark.parametrize("n", [1, T - 3, 4 * T])
def test_cached_and_full_decoding_agree(any_net, idx, n):
    net = any_net
    full = generate_ids(net, idx[:, :3], n, temperature=0, use_cache=False)
    assert torch.equal(generate_ids(net, idx[:, :3], n, temperature=0), full)
    assert full.shape == (2, 3 + n) and full.max() < V


def test_cached_logits_equal_full_logits(any_net, idx):
    net = any_net
    cache, cuts = KVCache(T), [0, 5, 8, 9, 10, 11, T]
    pieces = [net(idx[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, 1), net(idx), rtol=0, atol=1e-12)


@pytest.mark.parametrize("context_shift", [1, 5, T])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 2 * T, T], [T, 7, T + 1]])
def test_a_prompt_in_a_batch_is_continued_as_it_is_alone_and_without_a_cache(any_net, lengths, context_shift):
    prompts = torch.randint(V, (3, max(lengths) + 2), generator=torch.Generator().manual_seed(2))
    sampling = {"temperature": 0, "context_shift": context_shift, "repetition_penalty": 1.3}
    together = generate_ids(any_net, prompts, 2 * T, lengths=lengths, **sampling)
    for row, prompt, n in zip(together, prompts, lengths, strict=True):
        alone = generate_ids(any_net, prompt[None, :n], 2 * T, use_cache=False, **sampling)
        assert torch.equal(row[: n + 2 * T], alone[0]) and not row[n + 2 * T :].any()


def test_the_context_is_cut_as_context_shift_says(net, idx):
    used = []
    with net.register_forward_hook(lambda net, args, logits: used.append(args[0].size(1))):
        generate_ids(net, idx[:, :3], 2 * T, context_shift=4, use_cache=False)
    assert used == [*range(3, T + 1), *[n for _ in range(4) for n in range(T - 3, T + 1)]][: 2 * T]


def test_rows_with_separate_generators_do_not_depend_on_the_batch(any_net, idx):
    texts = [generate_ids(any_net, idx[:n, :3], 20, generator=generators_for(range(n))) for n in (1, 2)]
    assert torch.equal(texts[0][0], texts[1][0]) and not torch.equal(texts[1][0], texts[1][1])
    again = generate_ids(any_net, idx[1:2, :3], 20, generator=generators_for([1]))
    assert torch.equal(again[0], texts[1][1])


def generators_for(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # in bfloat16, rounding changes the text of row 2
def test_sampling_in_a_batch_draws_the_same_tokens_as_alone_and_without_a_cache(dtype):
    net = loud(GPT(GPTConfig(65, 64, n_layer=3, n_head=2, n_embd=16, dropout=0.0, **MODERN))).to(dtype)
    prompts, lengths = torch.arange(21).view(3, 7), [3, 7, 3]
    together = generate_ids(net, prompts, 40, lengths=lengths, generator=generators_for(range(3)))
    for seed, (row, prompt, n) in enumerate(zip(together, prompts, lengths, strict=True)):
        alone = generate_ids(net, prompt[None, :n], 40, generator=generators_for([seed]), use_cache=False)
        assert torch.equal(row[: n + 40], alone[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # float32 uses the Triton step
@pytest.mark.parametrize("lengths", [[3, 3], [T, 4]])
def test_captured_steps_generate_the_same_text_as_eager_ones(any_net, idx, lengths, dtype):
    net, idx = any_net.to("cuda", dtype), idx.cuda()
    sampling = {"temperature": 0, "lengths": lengths, "repetition_penalty": 1.2, "context_shift": 5}
    assert torch.equal(
        generate_ids(net, idx, 3 * T, use_graph=True, **sampling),
        generate_ids(net, idx, 3 * T, use_graph=False, **sampling),
    )


def test_logprobs_are_those_of_the_net_before_sampling_settings(any_net, idx):
    drawn = list(stream_ids(any_net, idx[:, :3], 6, temperature=2.0, top_k=5, logprobs=True))
    text = torch.cat((idx[:, :3], *(new.ids for new in drawn)), 1)
    probs = any_net(text)[:, 2:-1].log_softmax(-1).gather(2, text[:, 3:, None])[..., 0]
    torch.testing.assert_close(torch.cat([new.logprobs for new in drawn], 1), probs.float(), rtol=0, atol=1e-6)


def test_a_prompt_longer_than_block_size_is_continued_from_its_last_tokens(net, idx):
    prompt = torch.cat((idx, idx.flip(1)), 1)
    assert torch.equal(
        generate_ids(net, prompt, 5, temperature=0)[:, -5:], generate_ids(net, idx.flip(1), 5, temperature=0)[:, -5:]
    )


def draw(logits, generator, **sampling):
    return sample_next(logits, SamplingConfig(**sampling), exponential_noise(logits.shape, logits.device, generator))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_has_the_right_probabilities(temperature):
    n, generator = 4000, torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    probs = (logits / temperature).softmax(-1)[0]
    drawn = (
        torch.cat([draw(logits, generator, temperature=temperature) for _ in range(n)]).flatten().bincount(minlength=3)
        / n
    )
    assert ((drawn - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt()).all()


@pytest.mark.parametrize(
    "sampling, probs",
    [
        ({}, [0.5, 0.2, 0.2, 0.1]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0]),
        ({"top_p": 0.49}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [5 / 7, 2 / 7, 0, 0]),
        ({"top_p": 0.95, "top_k": 3}, [5 / 9, 2 / 9, 2 / 9, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"min_p": 0.39}, [5 / 9, 2 / 9, 2 / 9, 0]),
        ({"min_p": 0.41}, [1, 0, 0, 0]),
        ({"min_p": 0.3, "temperature": 2.0}, None),
    ],
)
def test_restrictions_leave_the_right_probabilities(sampling, probs):
    n, p = 4000, torch.tensor([0.5, 0.2, 0.2, 0.1])
    probs = torch.tensor(probs) if probs else p.sqrt() / p.sqrt().sum()  # temperature 2
    generator = torch.Generator().manual_seed(0)
    drawn = draw(p.log().expand(n, 4), generator, **sampling).flatten().bincount(minlength=4) / n
    assert ((drawn - probs).abs() <= 4 * (probs * (1 - probs) / n).sqrt()).all()


def test_a_repetition_penalty_lowers_the_logits_of_earlier_tokens(net, idx):
    prompt = idx[:, :4]
    seen = torch.zeros(2, V, dtype=torch.bool).scatter(1, prompt, True)
    logits = net(prompt)[:, -1]
    changed = torch.where(seen, torch.where(logits > 0, logits / 3, logits * 3), logits)
    (new,) = stream_ids(net, prompt, 1, temperature=0, repetition_penalty=3.0)
    assert torch.equal(new.ids[:, 0], changed.argmax(-1))
    text = generate_ids(net, prompt[:1], 8, temperature=0, repetition_penalty=1e9)[0].tolist()
    assert len(set(text)) == len(set(prompt[0].tolist())) + 8  # no token is repeated while unused tokens are left


def test_top_k_with_ties_keeps_exactly_k():
    generator = torch.Generator().manual_seed(0)
    assert len({draw(torch.zeros(1, 5), generator, top_k=2).item() for _ in range(200)}) == 2


def test_temperature_zero_takes_the_most_likely_token(net, idx):
    logits = net(idx)[:, -1]
    assert torch.equal(sample_next(logits, SamplingConfig(temperature=0))[:, 0], logits.argmax(-1))


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}],
)
def test_invalid_sampling_settings_are_refused_by_name(sampling):
    with pytest.raises(ValueError, match=next(iter(sampling))):
        SamplingConfig(**sampling)


@pytest.mark.parametrize("sampling", [{"context_shift": 0}, {"context_shift": T + 1}, {"repetition_penalty": 0.0}])
def test_invalid_generation_settings_are_refused_by_name(net, idx, sampling):
    with pytest.raises(ValueError, match=next(iter(sampling))):
        generate_ids(net, idx, 2, **sampling)


def test_generation_does_not_change_the_net(net, idx):
    net.train()
    weights = {name: w.clone() for name, w in net.state_dict().items()}
    generate_ids(net, idx[:, :3], 4)
    assert net.training and all(torch.equal(w, weights[name]) for name, w in net.state_dict().items())


def test_decoding_inverts_encoding_and_unknown_characters_are_named():
    tokenizer = CharTokenizer("héllo wörld\n🎭")
    assert tokenizer.vocabulary == "hélo wörd\n🎭"  # each character once, in the given order
    assert tokenizer.decode(tokenizer.encode("whöld\n🎭 é")) == "whöld\n🎭 é"
    with pytest.raises(ValueError, match="'XZ'"):
        tokenizer.encode("hZXXo")


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_each_token_depends_on_the_last_block_size_tokens(any_net, idx, use_cache):
    generator = torch.Generator().manual_seed(0)
    drawn = list(stream_ids(any_net, idx[:, :3], 2 * T, use_cache=use_cache, generator=generator, logprobs=True))
    text = torch.cat((idx[:, :3], *(new.ids for new in drawn)), 1)
    for pos, new in enumerate(drawn, start=3):
        probs = any_net(text[:, max(0, pos - T) : pos])[:, -1].log_softmax(-1)
        torch.testing.assert_close(new.logprobs, probs.gather(1, new.ids).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("overrides", [{}, MODERN, {"activation": "swiglu", "n_embd": 18, "n_head": 3}, {"n_layer": 0}])
def test_the_cpu_step_computes_the_nets_logits(idx, overrides):
    net = loud(GPT(GPTConfig(V, T, **{"n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0} | overrides)))
    cache, full = KVCache(T), net(idx)
    net(idx[:, :4], cache)
    step = CPUStep(net, cache)
    for t in range(4, T):
        torch.testing.assert_close(step.step(idx[:, t : t + 1]), full[:, t], rtol=0, atol=1e-12)


def test_generation_uses_no_dropout(idx):
    torch.manual_seed(0)
    net = GPT(GPTConfig(V, T, n_layer=2, n_head=2, n_embd=16, dropout=0.9)).train()
    torch.nn.init.normal_(net.lm_head.weight)
    texts = [generate_ids(net, idx[:, :3], 8, temperature=0) for _ in range(5)]
    assert all(torch.equal(text, texts[0]) for text in texts)
