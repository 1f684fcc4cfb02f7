"""What the lecture says on its way from a table to the GPT, lecture_step by lecture_step."""

import inspect
import math
import typing

import pytest
import torch
import yaml
from conftest import T, V, loud
from torch.nn import functional as F

from lightning_gpt.checkpoint.io import load_net, read_checkpoint, write_checkpoint
from lightning_gpt.cli.config import CONFIGS
from lightning_gpt.cli.main import main
from lightning_gpt.data.datamodule import TextDataModule
from lightning_gpt.data.windows import RandomWindows, SequentialWindows
from lightning_gpt.inference.engine import generate_ids
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.model.lecture import (
    LECTURE_STEPS,
    Head,
    average_with_loop,
    average_with_matrix,
    average_with_softmax,
    build_net,
    from_gpt,
    future_mask,
    softmax,
)
from lightning_gpt.training.module import LanguageModel, next_token_loss

SIZES = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=16, dropout=0.0)


def lecture_step(name, **settings):
    """A lecture_step with the test's sizes, as far as it has a choice of them."""
    return build_net(
        {k: v for k, v in SIZES.items() if k not in LECTURE_STEPS[name].fixed} | {"lecture_step": name} | settings
    )


# --- averages and attention -------------------------------------------------------------------------------------------


def test_three_ways_to_average_the_past_are_one():
    x = torch.randn(2, T, 5, dtype=torch.float64)
    for average in average_with_matrix, average_with_softmax:
        torch.testing.assert_close(average(x), average_with_loop(x), rtol=0, atol=1e-12)
    assert torch.equal(average_with_loop(x)[:, 0], x[:, 0])
    torch.testing.assert_close(average_with_loop(x)[:, -1], x.mean(1), rtol=0, atol=1e-12)


def test_a_head_without_scores_is_the_average():
    head, x = loud(Head(GPTConfig(V, T, 1, 2, 16), 8)), torch.randn(2, T, 16, dtype=torch.float64)
    torch.nn.init.zeros_(head.query.weight)
    torch.nn.init.zeros_(head.query.bias)
    torch.testing.assert_close(head(x), average_with_loop(head.value(x)), rtol=0, atol=1e-12)


def test_softmax_and_mask_are_torchs():
    scores = 100 * torch.randn(3, T, T, dtype=torch.float64).masked_fill(future_mask(T), -math.inf)
    torch.testing.assert_close(softmax(scores), F.softmax(scores, -1), rtol=0, atol=1e-12)
    assert torch.equal(~future_mask(T), torch.ones(T, T).tril().bool())


# --- the rungs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_last_rung_is_the_gpt(idx, activation, bias):
    net = loud(GPT(GPTConfig(**SIZES, activation=activation, bias=bias)))
    torch.testing.assert_close(from_gpt(net)(idx), net(idx), rtol=0, atol=1e-12)


def test_the_last_rung_starts_with_the_gpts_sizes_of_weights():
    torch.manual_seed(0)
    sizes = dict(vocab_size=65, block_size=32, n_layer=8, n_head=2, n_embd=128, dropout=0.3)
    gpt, last = GPT(GPTConfig(**sizes)), build_net(sizes | {"lecture_step": "gpt"})
    started = dict(last.named_parameters())
    for name, p in from_gpt(gpt).named_parameters():
        assert started[name].square().mean().item() == pytest.approx(p.square().mean().item(), rel=0.1), name


def test_the_last_rung_drops_where_the_gpt_does(idx, monkeypatch):
    net, asked = build_net(SIZES | {"lecture_step": "gpt", "dropout": 0.3}), []
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, training, *_: asked.append(p * training) or dropout(x, p, training))
    for training, p in (True, 0.3), (False, 0.0):
        asked.clear()
        net.train(training)(idx)
        assert asked == [p] * (1 + 3 * (2 + 2))  # embedding; in each block two heads and two branches


@pytest.mark.parametrize("name", LECTURE_STEPS)
def test_no_rung_sees_the_future_and_only_the_bigram_no_past(name, idx):
    net = loud(lecture_step(name))
    before = net(idx)
    for t in range(T):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = net(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])
        assert torch.equal(after[:, t + 1 :], before[:, t + 1 :]) == (name == "bigram" or t == T - 1)


@pytest.mark.parametrize("name", LECTURE_STEPS)
def test_every_rung_writes_text_past_its_block_size(name, idx):
    net, by_hand = loud(lecture_step(name)), idx[:, :3]
    for _ in range(T + 4):
        by_hand = torch.cat((by_hand, net(by_hand[:, -T:])[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate_ids(net, idx[:, :3], T + 4, temperature=0), by_hand)


def test_a_text_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        lecture_step("head")(torch.zeros(1, T + 1, dtype=torch.long))


# --- the ladder: each step is better than the one before --------------------------------------------------------------


# size is what the last lecture_step is about, and a larger net wants smaller steps
LARGER = dict(block_size=32, n_embd=64)


def climb(name, data, steps=300):
    """The loss over all validation windows after a short training."""
    torch.manual_seed(1337)
    sizes = dict(vocab_size=data.vocab_size, block_size=8, n_layer=3, n_head=4, n_embd=32, dropout=0.0)
    sizes |= dict(activation="relu") | (LARGER if name == "gpt" else {})
    net = build_net({k: v for k, v in sizes.items() if k not in LECTURE_STEPS[name].fixed} | {"lecture_step": name})
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3 if name == "gpt" else 1e-2)
    windows = RandomWindows(data.train_tokens, sizes["block_size"], 64, 1337)
    for _, window in zip(range(steps), windows, strict=False):
        loss = next_token_loss(net, window[:, :-1].long(), window[:, 1:].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    total = 0.0
    with torch.no_grad():
        for window in SequentialWindows(data.val_tokens, sizes["block_size"], 500):
            x, y = window[:, :-1].long(), window[:, 1:].long()
            total += next_token_loss(net, x, y).item() * y.numel()
    return total / (len(data.val_tokens) - 1)


@pytest.mark.slow
def test_each_rung_is_better_than_the_one_before():
    data = TextDataModule(block_size=8)
    losses = {name: climb(name, data) for name in LECTURE_STEPS}
    assert list(losses.values()) == sorted(losses.values(), reverse=True), losses


# --- on the command line ----------------------------------------------------------------------------------------------


def test_the_ladder_of_the_settings_is_that_of_the_lecture():
    names, null = typing.get_args(inspect.signature(LanguageModel).parameters["lecture_step"].annotation)
    assert typing.get_args(names) == tuple(LECTURE_STEPS)
    assert {path.stem for path in CONFIGS.glob("lecture/*.yaml")} == set(LECTURE_STEPS)


@pytest.mark.parametrize("name", ["bigram", "gpt"])
def test_a_rung_is_trained_saved_resumed_and_heard_as_any_net(name, tmp_path, text_file, capsys):
    small = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.devices=1", "--model.ema_decay=0.5"]
    small += [] if name == "bigram" else ["--model.n_embd=12", "--model.n_layer=1"]
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", "--sample.length=5"]
    main(["fit", f"--config=lecture/{name}", *small, *where, "--model.block_size=16", "--data.batch_size=8"])
    (best,) = tmp_path.rglob("best.ckpt")
    net, _ = load_net(best)
    assert type(net) is LECTURE_STEPS[name]
    main(["fit", f"--ckpt_path={best.with_name('last.ckpt')}", "--trainer.max_steps=5"])
    saved = read_checkpoint(best.with_name("last.ckpt"))
    assert saved["global_step"] == 5 and saved["hyper_parameters"]["lecture_step"] == name
    capsys.readouterr()
    main(["validate", f"--ckpt_path={best}"])
    assert f"{read_checkpoint(best)['val_loss']:.4f}"[:-1] in capsys.readouterr().out
    main(["generate", f"--ckpt_path={best}", "--prompt=the", "--max_new_tokens=30"])
    assert len(capsys.readouterr().out) == len("the") + 30 + 1


def test_a_rung_alone_is_that_rungs_config(tmp_path, text_file):
    small = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1", "--sample.length=0"]
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", "--model.lecture_step=layernorm", *small, *where])
    saved = read_checkpoint(tmp_path / "lecture_layernorm" / "version_0" / "checkpoints" / "last.ckpt")
    assert saved["hyper_parameters"]["lecture_step"] == "layernorm" and saved["hyper_parameters"]["dropout"] == 0.0
    config = yaml.safe_load((tmp_path / "lecture_layernorm" / "version_0" / "config.yaml").read_text())
    assert config["model"]["block_size"] == 8 and config["model"]["dropout"] == 0.0


def test_a_checkpoint_from_before_the_ladder_is_a_gpt(ckpt, tmp_path, fails):
    saved = read_checkpoint(ckpt)
    del saved["hyper_parameters"]["lecture_step"]
    write_checkpoint(saved, tmp_path / "old.ckpt")
    assert type(load_net(tmp_path / "old.ckpt")[0]) is GPT
    main(["validate", f"--ckpt_path={tmp_path}/old.ckpt"])
    for command in "fit", "validate":
        assert "model.lecture_step=head contradicts" in fails(
            command, f"--ckpt_path={tmp_path}/old.ckpt", "--model.lecture_step=head"
        )


@pytest.mark.parametrize(
    "config, flag, message",
    [
        (
            "bigram",
            "--model.n_head=4",
            "lecture_step=bigram has a fixed n_head: leave n_head=4 out, or use lecture_step=heads",
        ),
        ("bigram", "--model.n_embd=64", "leave n_embd=64 out, or use lecture_step=head, which lets"),
        ("bigram", "--model.dropout=0.1", "leave dropout=0.1 out, or use lecture_step=gpt, which lets"),
        ("bigram", "--model.n_head=6", "leave n_head=6 out"),  # the GPT's default, and yet it was given
        (
            "gpt",
            "--model.lecture_step=layernorm",
            "lecture_step=layernorm has a fixed dropout: leave dropout=0.2 out",
        ),
        ("head", "--model.n_head=4", "lecture_step=head has a fixed n_head"),
        ("head", "--model.n_layer=2", "leave n_layer=2 out, or use lecture_step=residual, which lets"),
        ("head", "--model.activation=relu", "leave activation=relu out, or use lecture_step=feedforward"),
        ("feedforward", "--model.activation=swiglu", "activation=relu or gelu, not swiglu"),
        ("layernorm", "--model.position=rope", "lecture_step=layernorm has no position: leave position=rope out"),
        ("gpt", "--model.ngram_max=3", "lecture_step=gpt has no ngram_max: leave ngram_max=3 out"),
        ("heads", "--model.n_head=5", "n_embd=32 is not divisible by n_head=5"),
        ("gpt", "--model.compile=true", "lecture_step=gpt runs as it is written"),
        ("gpt", "--model.lecture_step=blocks", "model.lecture_step"),
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
    with pytest.raises(ValueError, match="lecture_step=gpt has no position"):
        from_gpt(modern)
