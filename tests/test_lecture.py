"""What the lecture says on its way from a table to the GPT, rung by rung."""

import inspect
import math
import typing

import pytest
import torch
import yaml
from conftest import T, V, loud
from torch.nn import functional as F

from lightning_gpt import checkpoint, lecture
from lightning_gpt.data import EveryWindow, RandomWindows, TinyShakespeare
from lightning_gpt.generation import generate
from lightning_gpt.lecture import RUNGS, Head, average_by_a_matrix, average_by_softmax, average_in_a_loop, build
from lightning_gpt.main import main
from lightning_gpt.model import GPT, GPTConfig
from lightning_gpt.settings import CONFIGS
from lightning_gpt.training import LanguageModel, next_token_loss

SIZES = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=16, dropout=0.0)


def rung(name, **settings):
    """A rung with the test's sizes, as far as it has a choice of them."""
    return build({k: v for k, v in SIZES.items() if k not in RUNGS[name].fixed} | {"rung": name} | settings)


# --- averages and attention -------------------------------------------------------------------------------------------


def test_three_ways_to_average_the_past_are_one():
    x = torch.randn(2, T, 5, dtype=torch.float64)
    for average in average_by_a_matrix, average_by_softmax:
        torch.testing.assert_close(average(x), average_in_a_loop(x), rtol=0, atol=1e-12)
    assert torch.equal(average_in_a_loop(x)[:, 0], x[:, 0])
    torch.testing.assert_close(average_in_a_loop(x)[:, -1], x.mean(1), rtol=0, atol=1e-12)


def test_a_head_without_scores_is_the_average():
    head, x = loud(Head(GPTConfig(V, T, 1, 2, 16), 8)), torch.randn(2, T, 16, dtype=torch.float64)
    torch.nn.init.zeros_(head.query.weight)
    torch.nn.init.zeros_(head.query.bias)
    torch.testing.assert_close(head(x), average_in_a_loop(head.value(x)), rtol=0, atol=1e-12)


def test_softmax_and_mask_are_torchs():
    scores = 100 * torch.randn(3, T, T, dtype=torch.float64).masked_fill(lecture.future(T), -math.inf)
    torch.testing.assert_close(lecture.softmax(scores), F.softmax(scores, -1), rtol=0, atol=1e-12)
    assert torch.equal(~lecture.future(T), torch.ones(T, T).tril().bool())


# --- the rungs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_last_rung_is_the_gpt(idx, activation, bias):
    net = loud(GPT(GPTConfig(**SIZES, activation=activation, bias=bias)))
    torch.testing.assert_close(lecture.same_as(net)(idx), net(idx), rtol=0, atol=1e-12)


def test_the_last_rung_starts_with_the_gpts_sizes_of_weights():
    torch.manual_seed(0)
    sizes = dict(vocab_size=65, block_size=32, n_layer=8, n_head=2, n_embd=128, dropout=0.3)
    gpt, last = GPT(GPTConfig(**sizes)), build(sizes | {"rung": "gpt"})
    started = dict(last.named_parameters())
    for name, p in lecture.same_as(gpt).named_parameters():
        assert started[name].square().mean().item() == pytest.approx(p.square().mean().item(), rel=0.1), name


def test_the_last_rung_drops_where_the_gpt_does(idx, monkeypatch):
    net, asked = build(SIZES | {"rung": "gpt", "dropout": 0.3}), []
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, training, *_: asked.append(p * training) or dropout(x, p, training))
    for training, p in (True, 0.3), (False, 0.0):
        asked.clear()
        net.train(training)(idx)
        assert asked == [p] * (1 + 3 * (2 + 2))  # embedding; in each block two heads and two branches


@pytest.mark.parametrize("name", RUNGS)
def test_no_rung_sees_the_future_and_only_the_bigram_no_past(name, idx):
    net = loud(rung(name))
    before = net(idx)
    for t in range(T):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = net(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])
        assert torch.equal(after[:, t + 1 :], before[:, t + 1 :]) == (name == "bigram" or t == T - 1)


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_writes_text_past_its_block_size(name, idx):
    net, by_hand = loud(rung(name)), idx[:, :3]
    for _ in range(T + 4):
        by_hand = torch.cat((by_hand, net(by_hand[:, -T:])[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(net, idx[:, :3], T + 4, temperature=0), by_hand)


def test_a_text_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        rung("head")(torch.zeros(1, T + 1, dtype=torch.long))


# --- the ladder: each rung is better than the one before --------------------------------------------------------------


# size is what the last rung is about, and a larger net wants smaller steps
LARGER = dict(block_size=32, n_embd=64)


def climb(name, data, steps=300):
    """The loss over all validation windows after a short training."""
    torch.manual_seed(1337)
    sizes = dict(vocab_size=data.vocab_size, block_size=8, n_layer=3, n_head=4, n_embd=32, dropout=0.0)
    sizes |= dict(activation="relu") | (LARGER if name == "gpt" else {})
    net = build({k: v for k, v in sizes.items() if k not in RUNGS[name].fixed} | {"rung": name})
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3 if name == "gpt" else 1e-2)
    windows = RandomWindows(data.train_tokens, sizes["block_size"], 64, 1337)
    for _, window in zip(range(steps), windows, strict=False):
        loss = next_token_loss(net, window[:, :-1].long(), window[:, 1:].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    total = 0.0
    with torch.no_grad():
        for window in EveryWindow(data.val_tokens, sizes["block_size"], 500):
            x, y = window[:, :-1].long(), window[:, 1:].long()
            total += next_token_loss(net, x, y).item() * y.numel()
    return total / (len(data.val_tokens) - 1)


@pytest.mark.slow
def test_each_rung_is_better_than_the_one_before():
    data = TinyShakespeare(block_size=8)
    losses = {name: climb(name, data) for name in RUNGS}
    assert list(losses.values()) == sorted(losses.values(), reverse=True), losses


# --- on the command line ----------------------------------------------------------------------------------------------


def test_the_ladder_of_the_settings_is_that_of_the_lecture():
    names, null = typing.get_args(inspect.signature(LanguageModel).parameters["rung"].annotation)
    assert typing.get_args(names) == tuple(RUNGS)
    assert {path.stem for path in CONFIGS.glob("lecture/*.yaml")} == set(RUNGS)


@pytest.mark.parametrize("name", ["bigram", "gpt"])
def test_a_rung_is_trained_saved_resumed_and_heard_as_any_net(name, tmp_path, text_file, capsys):
    small = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.devices=1", "--model.ema_decay=0.5"]
    small += [] if name == "bigram" else ["--model.n_embd=12", "--model.n_layer=1"]
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", "--sample.length=5"]
    main(["fit", f"--config=lecture/{name}", *small, *where, "--model.block_size=16", "--data.batch_size=8"])
    (best,) = tmp_path.rglob("best.ckpt")
    net, _ = checkpoint.load(best)
    assert type(net) is RUNGS[name]
    main(["fit", f"--ckpt_path={best.with_name('last.ckpt')}", "--trainer.max_steps=5"])
    saved = checkpoint.read(best.with_name("last.ckpt"))
    assert saved["global_step"] == 5 and saved["hyper_parameters"]["rung"] == name
    capsys.readouterr()
    main(["validate", f"--ckpt_path={best}"])
    assert f"{checkpoint.read(best)['val_loss']:.4f}"[:-1] in capsys.readouterr().out
    main(["generate", f"--ckpt_path={best}", "--prompt=the", "--max_new_tokens=30"])
    assert len(capsys.readouterr().out) == len("the") + 30 + 1


def test_a_rung_alone_is_that_rungs_config(tmp_path, text_file):
    small = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1", "--sample.length=0"]
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", "--model.rung=layernorm", *small, *where])
    saved = checkpoint.read(tmp_path / "lecture_layernorm" / "version_0" / "checkpoints" / "last.ckpt")
    assert saved["hyper_parameters"]["rung"] == "layernorm" and saved["hyper_parameters"]["dropout"] == 0.0
    config = yaml.safe_load((tmp_path / "lecture_layernorm" / "version_0" / "config.yaml").read_text())
    assert config["model"]["block_size"] == 8 and config["model"]["dropout"] == 0.0


def test_a_checkpoint_from_before_the_ladder_is_a_gpt(ckpt, tmp_path, fails):
    saved = checkpoint.read(ckpt)
    del saved["hyper_parameters"]["rung"]
    checkpoint.write(saved, tmp_path / "old.ckpt")
    assert type(checkpoint.load(tmp_path / "old.ckpt")[0]) is GPT
    main(["validate", f"--ckpt_path={tmp_path}/old.ckpt"])
    for command in "fit", "validate":
        assert "model.rung=head contradicts" in fails(command, f"--ckpt_path={tmp_path}/old.ckpt", "--model.rung=head")


@pytest.mark.parametrize(
    "config, flag, message",
    [
        ("bigram", "--model.n_head=4", "rung=bigram has no choice of n_head: leave n_head=4 out, or take rung=heads"),
        ("bigram", "--model.n_embd=64", "leave n_embd=64 out, or take rung=head, which has"),
        ("bigram", "--model.dropout=0.1", "leave dropout=0.1 out, or take rung=gpt, which has"),
        ("bigram", "--model.n_head=6", "leave n_head=6 out"),  # the GPT's default, and yet it was given
        ("gpt", "--model.rung=layernorm", "rung=layernorm has no choice of dropout: leave dropout=0.2 out"),
        ("head", "--model.n_head=4", "rung=head has no choice of n_head"),
        ("head", "--model.n_layer=2", "leave n_layer=2 out, or take rung=residual, which has"),
        ("head", "--model.activation=relu", "leave activation=relu out, or take rung=feedforward"),
        ("feedforward", "--model.activation=swiglu", "activation=relu or gelu, and not swiglu"),
        ("layernorm", "--model.position=rotary", "rung=layernorm has no position: leave position=rotary out"),
        ("gpt", "--model.ngram=3", "rung=gpt has no ngram: leave ngram=3 out"),
        ("heads", "--model.n_head=5", "n_embd=32 is not divisible by n_head=5"),
        ("gpt", "--model.compile=true", "rung=gpt runs as it is written"),
        ("gpt", "--model.rung=blocks", "model.rung"),
        (
            "attic",
            "--model.n_layer=1",
            "lecture/attic is neither a file nor one of the packaged ",
        ),
    ],
)
def test_settings_that_a_rung_does_not_have_are_refused_by_name(config, flag, message, fails, tmp_path):
    assert message in fails("fit", f"--config=lecture/{config}", flag, f"--trainer.default_root_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_gpt_beyond_the_lecture_has_no_rung_like_it(modern):
    with pytest.raises(ValueError, match="rung=gpt has no position"):
        lecture.same_as(modern)
