"""The GPT against its formulas, against Hugging Face's GPT-2 and against what can be learned."""

import math

import pytest
import torch
from conftest import T, V, loud
from torch.nn import functional as F

from lightning_gpt.model.gpt import GPT, GPTConfig, apply_rope, rope_table
from lightning_gpt.training.losses import next_token_loss


def test_the_past_never_sees_the_future(any_net, idx):
    net = any_net
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
    )  # Hugging Face computes the loss in float32


def test_the_mlp_with_relu_and_without_biases_is_its_formula(idx):
    net = loud(GPT(GPTConfig(V, T, 1, 2, 16, 0.0, bias=False, activation="relu")))
    assert not [name for name, _ in net.named_parameters() if name.endswith("bias")]
    mlp, x = net.h[0].mlp, torch.randn(2, T, 16, dtype=torch.float64)
    by_hand = (x @ mlp.c_fc.weight.T).clamp(min=0) @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), by_hand, rtol=0, atol=1e-12)


def test_without_layers_logits_depend_on_the_last_token_alone(idx):
    net = loud(GPT(GPTConfig(V, T, n_layer=0, n_head=1, n_embd=16, dropout=0.0)))
    other = idx.clone()
    other[:, :-1] = 0
    assert torch.equal(net(idx)[:, -1], net(other)[:, -1])


def test_the_first_loss_is_that_of_uniform_predictions():
    torch.manual_seed(0)
    net, x = GPT(GPTConfig(65, 32, 2, 2, 32, 0.0)), torch.randint(65, (8, 32))
    assert next_token_loss(net, x, x.roll(1)).item() == pytest.approx(math.log(65), abs=0.05)


def test_weights_are_initialized_as_in_gpt2():
    torch.manual_seed(0)
    net = GPT(GPTConfig(65, 32, 8, 4, 256, 0.0))
    std = {name: p.std().item() for name, p in net.named_parameters() if p.dim() == 2}
    residual = 0.02 / math.sqrt(2 * 8)
    assert all(s == pytest.approx(residual if "c_proj" in name else 0.02, rel=0.05) for name, s in std.items())
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


def test_one_batch_can_be_memorized():
    torch.manual_seed(0)
    batch = torch.randint(65, (4, 32)), torch.randint(65, (4, 32))
    assert learn(GPT(GPTConfig(65, 32, 2, 2, 64, 0.0)), [batch] * 150)[-1] < 0.05


def test_noise_cannot_be_predicted():
    torch.manual_seed(0)
    windows = [torch.randint(16, (32, 17)) for _ in range(300)]
    losses = learn(GPT(GPTConfig(16, 16, 1, 2, 32, 0.0)), [(w[:, :-1], w[:, 1:]) for w in windows])
    assert sum(losses[200:]) / 100 > math.log(16) - 0.01


def test_dropout_has_the_given_probability_in_training_and_none_in_evaluation(idx, monkeypatch):
    net, rates = GPT(GPTConfig(V, T, n_layer=3, n_head=2, n_embd=16, dropout=0.3)), []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def recording_dropout(x, p, training):
        rates.append(p if training else 0.0)
        return dropout(x, p, training)

    def recording_attention(*qkv, dropout_p, **kwargs):
        rates.append(dropout_p)
        return attention(*qkv, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "dropout", recording_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recording_attention)
    for training, p in (True, 0.3), (False, 0.0):
        rates.clear()
        net.train(training)(idx)
        assert rates == [p] * (1 + 3 * len(net.h))  # the embedding; in each block, attention and two branches


# --- settings that GPT-2 does not have, each against its formula ------------------------------------------------------


def test_rmsnorm_divides_by_the_root_mean_square(modern):
    x = torch.randn(2, T, 16, dtype=torch.float64)
    by_hand = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modern.h[0].ln_1(x), by_hand, rtol=0, atol=1e-12)
    assert len(list(modern.ln_f.parameters())) == 0


def test_rope_rotates_complex_numbers_by_their_position():
    x, D = torch.randn(2, T, 3, 8, dtype=torch.float64), 8
    z = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(T)[:, None] * 10_000.0 ** (-2 * torch.arange(4, dtype=torch.float64) / D)
    turned = z * torch.polar(torch.ones_like(angle), -angle)[:, None]
    by_hand = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(apply_rope(x, rope_table(T, D).double()), by_hand, rtol=0, atol=1e-5)  # a float32 table


def test_rope_scores_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    q, k = (apply_rope(z.expand(1, T, 1, 8), rope_table(T, 8).double())[0, :, 0] for z in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=1e-5)
    assert not torch.allclose(scores[3], scores[3, 0])


def test_qk_norm_and_rope_are_applied_before_the_scores(modern):
    layer, x = modern.h[0].attn, torch.randn(2, T, 16, dtype=torch.float64)
    q, k, v = (part.view(2, T, 2, 8) for part in layer.c_attn(x).chunk(3, -1))
    q, k = (apply_rope(z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt(), modern.rope) for z in (q, k))
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
    by_hand = layer.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, modern.rope), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_the_mlp_is_its_formula(activation):
    mlp = loud(GPT(GPTConfig(V, T, 1, 2, 18, 0.0, bias=False, activation=activation))).h[0].mlp
    x = torch.randn(2, T, 18, dtype=torch.float64)
    inner = x @ mlp.c_fc.weight.T
    if activation == "relu2":
        assert inner.size(-1) == 4 * 18
        inner = inner.clamp(min=0) ** 2
    else:
        a, b = inner[..., :48], inner[..., 48:]
        assert b.size(-1) == 48
        inner = a / (1 + (-a).exp()) * b
    torch.testing.assert_close(mlp(x), inner @ mlp.c_proj.weight.T, rtol=0, atol=1e-12)


def test_logits_are_soft_capped(modern, idx):
    x = modern.features(idx)
    raw = modern.lm_head(modern.ln_f(x)) * 3
    modern.lm_head.weight.data *= 3
    torch.testing.assert_close(modern(idx), 5 * torch.tanh(raw / 5), rtol=0, atol=1e-12)
    assert modern(idx).abs().max() < 5 < raw.abs().max()


def test_zero_init_starts_with_uniform_predictions_and_weights_of_the_right_scale(idx):
    torch.manual_seed(0)
    net = GPT(GPTConfig(V, T, n_layer=2, n_head=4, n_embd=256, dropout=0.0, init="zero", ngram_max=2, ngram_buckets=50))
    assert next_token_loss(net, idx, idx).item() == pytest.approx(math.log(V), abs=1e-6)
    for name, p in net.named_parameters():
        zero = name.endswith(("c_proj.weight", "lm_head.weight", "wng.weight", "bias"))
        size = 0 if zero else 1 if p.dim() == 1 or name.startswith("w") else 0.5 / math.sqrt(256)
        assert p.square().mean().sqrt().item() == pytest.approx(size, rel=0.05), name


def test_ngram_embeddings_sum_hashed_pairs_and_triples(modern, idx):
    def row(*tokens):  # newest first
        key = tokens[0]
        for token in tokens[1:]:
            key = (key * 1_000_003 + token + 1) % (2**31 - 1)
        return modern.wng.weight[key % 50]

    for b, line in enumerate(idx.tolist()):
        padded = [-1, -1, *line]
        for t in range(len(line)):
            a, b2, c = padded[t : t + 3]
            by_hand = row(c, b2) + row(c, b2, a)
            torch.testing.assert_close(modern.ngram_embeddings(idx)[b, t], by_hand, rtol=0, atol=1e-12)


def test_rope_with_an_odd_head_size_is_refused():
    with pytest.raises(ValueError, match="every head an odd number, 3"):
        GPTConfig(V, T, 1, n_head=4, n_embd=12, position="rope")


def test_a_text_longer_than_block_size_is_refused(net):
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        net(torch.zeros(1, T + 1, dtype=torch.long))
