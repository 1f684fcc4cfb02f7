"""Sampling: the right odds, the same text with a cache and without, only what the vocabulary has."""

import math

import pytest
import torch
from conftest import T, V

from lightning_gpt.generation import KVCache, generate, sample
from lightning_gpt.model import GPT, GPTConfig
from lightning_gpt.tokenizer import CharTokenizer


@pytest.mark.parametrize("n", [1, T - 3, 4 * T])
def test_cached_and_full_decoding_agree(any_net, idx, n):
    net = any_net
    full = generate(net, idx[:, :3], n, temperature=0, use_cache=False)
    assert torch.equal(generate(net, idx[:, :3], n, temperature=0), full)
    assert full.shape == (2, 3 + n) and full.max() < V


def test_cached_logits_equal_full_logits(any_net, idx):
    net = any_net
    cache = KVCache()
    pieces = [net(idx[:, :5], cache)] + [net(idx[:, t : t + 1], cache) for t in range(5, T)]
    torch.testing.assert_close(torch.cat(pieces, 1), net(idx), rtol=0, atol=1e-12)


def test_a_long_piece_on_top_of_a_cache_is_refused(net, idx):
    cache = KVCache()
    net(idx[:, :3], cache)
    with pytest.raises(ValueError, match="only the first piece"):
        net(idx[:, 3:6], cache)


def test_a_prompt_longer_than_block_size_goes_on_from_its_end(net, idx):
    prompt = torch.cat((idx, idx.flip(1)), 1)
    assert torch.equal(
        generate(net, prompt, 5, temperature=0)[:, -5:], generate(net, idx.flip(1), 5, temperature=0)[:, -5:]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_has_the_right_odds(temperature):
    n, dice = 4000, torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    odds = (logits / temperature).softmax(-1)[0]
    drawn = (
        torch.cat([sample(logits, temperature, generator=dice) for _ in range(n)]).flatten().bincount(minlength=3) / n
    )
    assert ((drawn - odds).abs() < 4 * (odds * (1 - odds) / n).sqrt()).all()


def test_top_k_with_ties_keeps_exactly_k():
    dice = torch.Generator().manual_seed(0)
    assert len({sample(torch.zeros(1, 5), top_k=2, generator=dice).item() for _ in range(200)}) == 2


def test_temperature_zero_takes_the_likeliest(net, idx):
    logits = net(idx)[:, -1]
    assert torch.equal(sample(logits, temperature=0)[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("how", [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": 0}])
def test_senseless_settings_are_refused_by_name(how):
    with pytest.raises(ValueError, match=next(iter(how))):
        sample(torch.zeros(1, 5), **how)


def test_generation_leaves_the_net_as_it_was(net, idx):
    net.train()
    weights = {name: w.clone() for name, w in net.state_dict().items()}
    generate(net, idx[:, :3], 4)
    assert net.training and all(torch.equal(w, weights[name]) for name, w in net.state_dict().items())


def test_text_survives_encoding_and_unknown_characters_are_named():
    tokenizer = CharTokenizer("héllo wörld\n🎭")
    assert tokenizer.vocabulary == "\n dhlorwéö🎭"
    assert tokenizer.decode(tokenizer.encode("whöld\n🎭 é")) == "whöld\n🎭 é"
    with pytest.raises(ValueError, match="'XZ'"):
        tokenizer.encode("hZXXo")


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_token_is_drawn_from_what_the_newest_block_size_tokens_say(any_net, idx, use_cache):
    net, used = any_net, []
    with net.register_forward_hook(lambda net, args, logits: used.append(logits[:, -1])):
        text = generate(net, idx[:, :3], 2 * T, use_cache=use_cache, generator=torch.Generator().manual_seed(0))
    for at, logits in enumerate(used, start=3):
        torch.testing.assert_close(logits, net(text[:, max(0, at - T) : at])[:, -1], rtol=0, atol=1e-12)
    assert len(used) == 2 * T


def test_generation_has_no_dropout(idx):
    torch.manual_seed(0)
    net = GPT(GPTConfig(V, T, n_layer=2, n_head=2, n_embd=16, dropout=0.9)).train()
    torch.nn.init.normal_(net.lm_head.weight)
    texts = [generate(net, idx[:, :3], 8, temperature=0) for _ in range(5)]
    assert all(torch.equal(text, texts[0]) for text in texts)
