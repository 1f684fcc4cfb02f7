"""The lecture's steps from the bigram table to the GPT, each as the lecture describes it."""

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
from lightning_gpt.training.losses import next_token_loss
from lightning_gpt.training.module import LanguageModel

SIZES = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=16, dropout=0.0)


def lecture_step(name, **settings):
    """The net of a lecture step, with those of the test's sizes that the step leaves open."""
    return build_net(
        {k: v for k, v in SIZES.items() if k not in LECTURE_STEPS[name].fixed} | {"lecture_step": name} | settings
    )


# --- averages and attention -------------------------------------------------------------------------------------------


def test_three_ways_to_average_the_past_agree():
    x = torch.randn(2, T, 5, dtype=torch.float64)
    for average in average_with_matrix, average_with_softmax:
        torch.testing.assert_close(average(x), average_with_loop(x), rtol=0, atol=1e-12)
    assert torch.equal(average_with_loop(x)[:, 0], x[:, 0])
    torch.testing.assert_close(average_with_loop(x)[:, -1], x.mean(1), rtol=0, atol=1e-12)


def test_a_head_with_equal_scores_averages_the_values():
    head, x = loud(Head(GPTConfig(V, T, 1, 2, 16), 8)), torch.randn(2, T, 16, dtype=torch.float64)
    torch.nn.init.zeros_(head.query.weight)
    torch.nn.init.zeros_(head.query.bias)
    torch.testing.assert_close(head(x), average_with_loop(head.value(x)), rtol=0, atol=1e-12)


def test_softmax_and_mask_equal_torchs():
    scores = 100 * torch.randn(3, T, T, dtype=torch.float64).masked_fill(future_mask(T), -math.inf)
    torch.testing.assert_close(softmax(scores), F.softmax(scores, -1), rtol=0, atol=1e-12)
    assert torch.equal(~future_mask(T), torch.ones(T, T).tril().bool())


# --- the steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_last_step_equals_the_gpt(idx, activation, bias):
    net = loud(GPT(GPTConfig(**SIZES, activation=activation, bias=bias)))
    torch.testing.assert_close(from_gpt(net)(idx), net(idx), rtol=0, atol=1e-12)


def test_the_last_step_is_initialized_at_the_gpts_scale():
    torch.manual_seed(0)
    sizes = dict(vocab_size=65, block_size=32, n_layer=8, n_head=2, n_embd=128, dropout=0.3)
    gpt, last = GPT(GPTConfig(**sizes)), build_net(sizes | {"lecture_step": "gpt"})
    started = dict(last.named_parameters())
    for name, p in from_gpt(gpt).named_parameters():
        assert started[name].square().mean().item() == pytest.approx(p.square().mean().item(), rel=0.1), name


def test_the_last_step_has_dropout_where_the_gpt_has(idx, monkeypatch):
    net, rates = build_net(SIZES | {"lecture_step": "gpt", "dropout": 0.3}), []
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, training, *_: rates.append(p * training) or dropout(x, p, training))
    for training, p in (True, 0.3), (False, 0.0):
        rates.clear()
        net.train(training)(idx)
        assert rates == [p] * (1 + 3 * (2 + 2))  # the embedding; in each block, two heads and two branches


@pytest.mark.parametrize("name", LECTURE_STEPS)
def test_no_step_sees_the_future_and_all_but_the_bigram_see_the_past(name, idx):
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
def test_every_step_generates_text_beyond_its_block_size(name, idx):
    net, by_hand = loud(lecture_step(name)), idx[:, :3]
    for _ in range(T + 4):
        by_hand = torch.cat((by_hand, net(by_hand[:, -T:])[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate_ids(net, idx[:, :3], T + 4, temperature=0), by_hand)


def test_a_text_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        lecture_step("head")(torch.zeros(1, T + 1, dtype=torch.long))


# --- each step has a lower loss than the one before -------------------------------------------------------------------


# the last lecture step is about size, and a larger net needs a smaller learning rate
LARGER = dict(block_size=32, n_embd=64)


def trained_loss(name, data, steps=300):
    """The loss over the complete validation split after a short training."""
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
def test_each_step_has_a_lower_loss_than_the_one_before():
    data = TextDataModule(block_size=8)
    losses = {name: trained_loss(name, data) for name in LECTURE_STEPS}
    assert list(losses.values()) == sorted(losses.values(), reverse=True), losses


# --- on the command line ----------------------------------------------------------------------------------------------


def test_settings_and_configs_name_the_steps_of_the_lecture():
    names, null = typing.get_args(inspect.signature(LanguageModel).parameters["lecture_step"].annotation)
    assert typing.get_args(names) == tuple(LECTURE_STEPS)
    assert {path.stem for path in CONFIGS.glob("lecture/*.yaml")} == set(LECTURE_STEPS)


@pytest.mark.parametrize("name", ["bigram", "gpt"])
def test_a_step_can_be_trained_resumed_validated_and_sampled(name, tmp_path, text_file, capsys):
    small = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.devices=1", "--model.ema_decay=0.5"]
    small += [] if name == "bigram" else ["--model.n_embd=12", "--model.n_layer=1"]
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", "--sample.length=5"]
    main(["fit", f"--config=lecture/{name}", *small, *paths, "--model.block_size=16", "--data.batch_size=8"])
    (best,) = tmp_path.rglob("best.ckpt")
    net, _ = load_net(best)
    assert type(net) is LECTURE_STEPS[name]
    main(["fit", f"--ckpt_path={best.with_name('last.ckpt')}", "--trainer.max_steps=5"])
    checkpoint = read_checkpoint(best.with_name("last.ckpt"))
    assert checkpoint["global_step"] == 5 and checkpoint["hyper_parameters"]["lecture_step"] == name
    capsys.readouterr()
    main(["validate", f"--ckpt_path={best}"])
    assert f"{read_checkpoint(best)['val_loss']:.4f}"[:-1] in capsys.readouterr().out
    main(["generate", f"--ckpt_path={best}", "--prompt=the", "--max_new_tokens=30"])
    assert len(capsys.readouterr().out) == len("the") + 30 + 1


def test_model_lecture_step_alone_selects_the_config_of_that_step(tmp_path, text_file):
    small = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1", "--sample.length=0"]
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", "--model.lecture_step=layernorm", *small, *paths])
    checkpoint = read_checkpoint(tmp_path / "lecture_layernorm" / "version_0" / "checkpoints" / "last.ckpt")
    assert (
        checkpoint["hyper_parameters"]["lecture_step"] == "layernorm"
        and checkpoint["hyper_parameters"]["dropout"] == 0.0
    )
    config = yaml.safe_load((tmp_path / "lecture_layernorm" / "version_0" / "config.yaml").read_text())
    assert config["model"]["block_size"] == 8 and config["model"]["dropout"] == 0.0


def test_a_checkpoint_without_lecture_step_is_a_gpt(ckpt, tmp_path, fails):
    checkpoint = read_checkpoint(ckpt)
    del checkpoint["hyper_parameters"]["lecture_step"]
    write_checkpoint(checkpoint, tmp_path / "old.ckpt")
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
        ("bigram", "--model.n_head=6", "leave n_head=6 out"),  # given explicitly, though it is the GPT's default
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
            "lecture/attic is neither a file nor one of the packaged configs",
        ),
    ],
)
def test_settings_that_a_step_does_not_have_are_refused_by_name(config, flag, message, fails, tmp_path):
    assert message in fails("fit", f"--config=lecture/{config}", flag, f"--trainer.default_root_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_gpt_with_modern_settings_has_no_equal_step(modern):
    with pytest.raises(ValueError, match="lecture_step=gpt has no position"):
        from_gpt(modern)
