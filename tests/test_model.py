"""What a GPT must be, whoever wrote it."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import T, V, loud
from torch.nn import functional as F

from lightning_gpt.model import GPT, GPTConfig
from lightning_gpt.training import next_token_loss


def test_the_past_never_sees_the_future(net, idx):
    before = net(idx)
    for t in range(T):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = net(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def test_attention_is_the_formula_on_the_blackboard(net):
    layer, x = net.h[0].attn, torch.randn(2, T, 16, dtype=torch.float64)
    q, k, v = (part.view(2, T, 2, 8).transpose(1, 2) for part in layer.c_attn(x).chunk(3, -1))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
    by_hand = layer.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_loss_equal_hugging_faces_gpt2(idx, tied):
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=V, n_positions=T, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    theirs = loud(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, activation_function="gelu", tie_word_embeddings=tied)))
    ours = GPT(GPTConfig(V, T, 3, 2, 16, 0.0, tie_embeddings=tied)).double().eval()
    ours.load_state_dict(
        {
            name.removeprefix("transformer."): w.T if "c_" in name and w.dim() == 2 else w
            for name, w in theirs.state_dict().items()  # GPT-2's Conv1D stores its weights transposed
        }
    )
    theirs = theirs(idx, labels=idx)
    torch.testing.assert_close(ours(idx), theirs.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        next_token_loss(ours, idx[:, :-1], idx[:, 1:]), theirs.loss.double(), rtol=0, atol=1e-6
    )  # float32


def test_relu_and_no_biases_are_what_they_say(idx):
    net = loud(GPT(GPTConfig(V, T, 1, 2, 16, 0.0, bias=False, activation="relu")))
    assert not [name for name, _ in net.named_parameters() if name.endswith("bias")]
    mlp, x = net.h[0].mlp, torch.randn(2, T, 16, dtype=torch.float64)
    by_hand = (x @ mlp.c_fc.weight.T).clamp(min=0) @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), by_hand, rtol=0, atol=1e-12)


def test_without_layers_it_sees_one_token_only(idx):
    net = loud(GPT(GPTConfig(V, T, n_layer=0, n_head=1, n_embd=16, dropout=0.0)))
    other = idx.clone()
    other[:, :-1] = 0
    assert torch.equal(net(idx)[:, -1], net(other)[:, -1])


def test_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    net, x = GPT(GPTConfig(65, 32, 2, 2, 32, 0.0)), torch.randint(65, (8, 32))
    assert next_token_loss(net, x, x.roll(1)).item() == pytest.approx(math.log(65), abs=0.05)


def test_weights_start_as_gpt2s():
    torch.manual_seed(0)
    net = GPT(GPTConfig(65, 32, 8, 4, 256, 0.0))
    std = {name: p.std().item() for name, p in net.named_parameters() if p.dim() == 2}
    thin = 0.02 / math.sqrt(2 * 8)
    assert all(s == pytest.approx(thin if "c_proj" in name else 0.02, rel=0.05) for name, s in std.items())
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def learn(net, batches):
    optimizer, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
    for x, y in batches:
        loss = next_token_loss(net, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_one_batch_can_be_learnt_by_heart():
    torch.manual_seed(0)
    batch = torch.randint(65, (4, 32)), torch.randint(65, (4, 32))
    assert learn(GPT(GPTConfig(65, 32, 2, 2, 64, 0.0)), [batch] * 150)[-1] < 0.05


def test_noise_cannot_be_predicted():
    torch.manual_seed(0)
    windows = [torch.randint(16, (32, 17)) for _ in range(300)]
    losses = learn(GPT(GPTConfig(16, 16, 1, 2, 32, 0.0)), [(w[:, :-1], w[:, 1:]) for w in windows])
    assert sum(losses[200:]) / 100 > math.log(16) - 0.01


@pytest.mark.parametrize("place", ["embedding", "attention", "branches"])
def test_dropout_is_on_embeddings_attention_and_branches(net, idx, place, monkeypatch):
    real, calls = F.dropout, []

    def only_here(x, p, training):
        calls.append(x.shape)
        here = (len(calls) == 1) if place == "embedding" else (len(calls) > 1 and place == "branches")
        return real(x, 0.5, training) if here else x

    monkeypatch.setattr(F, "dropout", only_here)
    for block in net.h:
        block.attn.dropout = 0.5 if place == "attention" else 0.0
    quiet = net(idx)
    calls.clear()
    assert not torch.allclose(net.train()(idx), quiet)
    assert len(calls) == 1 + 2 * len(net.h)


def test_a_text_longer_than_block_size_is_refused(net):
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        net(torch.zeros(1, T + 1, dtype=torch.long))


@pytest.mark.parametrize("module", ["model", "generation", "optim", "tokenizer", "checkpoint"])
def test_the_core_needs_torch_alone(module):
    code = f"import sys, lightning_gpt.{module}; sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
