"""Training through the Trainer: resumable to the bit, validated exactly, the same on any number of devices."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lightning_gpt.callbacks import SampleText
from lightning_gpt.data import TinyShakespeare
from lightning_gpt.optim import lr_factor, parameter_groups
from lightning_gpt.training import LanguageModel


class Recorded(LanguageModel):
    def on_fit_start(self):
        self.losses = []

    def on_train_batch_end(self, out, batch, batch_idx):
        self.losses.append(out["loss"].item())


def fit(
    folder, steps, *, devices=1, ckpt_path=None, save_at=10**9, callbacks=(), learning_rate=1e-3, dropout=0.2, **how
):
    L.seed_everything(0, verbose=False)
    data = TinyShakespeare(block_size=16, batch_size=8)
    lm = Recorded(
        block_size=16, n_layer=2, n_head=2, n_embd=16, warmup_steps=3, dropout=dropout, learning_rate=learning_rate
    )
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save_at, save_top_k=-1)
    settings = dict(
        accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, limit_val_batches=2, val_check_interval=7
    )
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    trainer = L.Trainer(
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        callbacks=[saver, *callbacks],
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        **settings | quiet | how,
    )
    trainer.fit(lm.double(), data, ckpt_path=ckpt_path)
    return {name: w.clone() for name, w in lm.state_dict().items()}, getattr(lm, "losses", None), trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_is_bitwise_the_unbroken_run(tmp_path, accumulate):
    unbroken, losses, _ = fit(tmp_path, 20, save_at=10, accumulate_grad_batches=accumulate)
    saved = tmp_path / "step=10.ckpt"
    resumed, tail, _ = fit(tmp_path, 20, ckpt_path=saved, accumulate_grad_batches=accumulate)
    assert len(tail) == 10 * accumulate and tail == losses[10 * accumulate :]  # it did resume in the middle
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_a_resumed_run_takes_its_rates_from_todays_settings(tmp_path):
    fit(tmp_path, 20, save_at=10)
    *_, trainer = fit(tmp_path, 11, ckpt_path=tmp_path / "step=10.ckpt", learning_rate=5e-3)
    factor = lr_factor(11, total=11, warmup=3, floor=0.1, schedule="cosine")
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-3 * factor)


def test_sampling_does_not_change_training(tmp_path):
    without, losses, _ = fit(tmp_path, 15)
    watched, same, _ = fit(tmp_path, 15, callbacks=[SampleText(length=5, console_length=0)])
    assert same == losses and all(torch.equal(watched[name], without[name]) for name in without)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_take_the_steps_of_one(tmp_path, devices):
    one, *_ = fit(tmp_path, 10, dropout=0.0)
    many, *_ = fit(tmp_path, 10, dropout=0.0, devices=devices)
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-12)


def validate(lm, data, devices=1):
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    strategy = "ddp_spawn" if devices > 1 else "auto"
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, use_distributed_sampler=False, **quiet)
    return trainer.validate(lm, data, verbose=False)[0]


@pytest.fixture
def half_trained(text_file):
    torch.manual_seed(0)
    data = TinyShakespeare(str(text_file), block_size=16, batch_size=6, split=0.8)
    lm = LanguageModel(data.vocab_size, 16, n_layer=1, n_head=2, n_embd=16)
    torch.nn.init.normal_(lm.net.lm_head.weight, std=1.0)
    return lm, data


def test_val_loss_is_that_of_a_plain_loop_over_the_split(half_trained):
    lm, data = half_trained
    got, tokens = validate(lm, data), data.val_tokens.long()
    total, net = 0.0, lm.net.double().eval()
    for at in range(0, len(tokens) - 1, 16):
        window = tokens[at : at + 17][None]
        total += F.cross_entropy(net(window[:, :-1])[0], window[0, 1:], reduction="sum").item()
    loss = torch.tensor(total / (len(tokens) - 1))
    assert len(tokens) % 16 != 1  # the last window is a partial one
    assert got["val/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert got["val/bpc"] == pytest.approx(loss.item() / math.log(2), abs=1e-6)
    assert got["val/perplexity"] == pytest.approx(loss.exp().item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_val_loss_is_the_same_on_any_number_of_devices(half_trained, devices):
    one, many = validate(*half_trained), validate(*half_trained, devices)
    assert many == pytest.approx(one, abs=1e-6)


def test_the_schedules_hit_their_marks():
    for schedule in "cosine", "linear":
        f = [lr_factor(k, total=110, warmup=10, floor=0.1, schedule=schedule) for k in range(120)]
        assert f[0] == pytest.approx(1 / 11) and f[10] == 1.0 and f[60] == pytest.approx(0.55)
        assert f[110:] == pytest.approx([0.1] * 10)
        assert all(a >= b for a, b in zip(f[10:], f[11:], strict=False))
    assert lr_factor(7, total=10, warmup=0, floor=1.0, schedule="cosine") == 1.0


def test_weight_decay_is_on_matrices_only(net):
    decayed, spared = (group["params"] for group in parameter_groups(net, 0.1))
    assert {p.dim() for p in decayed} == {2} and {p.dim() for p in spared} == {1}
    assert len(decayed) + len(spared) == len(list(net.parameters()))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_to_the_norm_that_was_asked(tmp_path, precision):
    norms = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, lm, optimizer):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in lm.parameters() if p.grad is not None]).item())

    fit(tmp_path, 5, callbacks=[Watch()], gradient_clip_val=0.01, precision=precision)
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
