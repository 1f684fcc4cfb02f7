"""Training through the Trainer: bitwise resumable, exactly validated, the same on any number of devices."""

import math
import os
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import MODERN
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.nn import functional as F

from lightning_gpt.checkpoint.io import load_net
from lightning_gpt.data.datamodule import TextDataModule
from lightning_gpt.data.windows import SequentialWindows
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.training.callbacks import SampleText, ValidateAtEnd
from lightning_gpt.training.checkpointing import CheckpointSaver
from lightning_gpt.training.losses import next_token_loss
from lightning_gpt.training.module import LanguageModel
from lightning_gpt.training.monitoring import UpdateRatios
from lightning_gpt.training.optim import Muon, adamw_groups, lr_factor, muon_groups
from lightning_gpt.training.strategies import DDPFlatStrategy

RECIPE = MODERN | dict(optimizer="muon", ema_decay=0.9, schedule="wsd")


class Recorded(LanguageModel):
    def on_fit_start(self):
        self.losses = []

    def on_train_batch_end(self, out, batch, batch_idx):
        super().on_train_batch_end(out, batch, batch_idx)
        self.losses.append(out["loss"].item())


def fit(folder, steps, *, devices=1, ckpt_path=None, save_at=10**9, callbacks=(), model=None, module=Recorded, **args):
    """Train a tiny model, in float64 unless a precision is given. Returns its weights, its losses and the Trainer."""
    L.seed_everything(0, verbose=False)
    data = TextDataModule(block_size=16, batch_size=8)
    sizes = dict(block_size=16, n_layer=2, n_head=2, n_embd=16, warmup_steps=3)
    lm = module(**sizes | (model or {}))
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save_at, save_top_k=-1)
    settings = dict(gradient_clip_val=1.0, limit_val_batches=2, val_check_interval=7, check_val_every_n_epoch=None)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy=DDPFlatStrategy(start_method="spawn") if devices > 1 else "auto",
        callbacks=[saver, *callbacks],
        use_distributed_sampler=False,
        **settings | quiet | args,
    )
    trainer.fit(lm if "precision" in args else lm.double(), data, ckpt_path=ckpt_path)
    return {name: w.clone() for name, w in lm.state_dict().items()}, getattr(lm, "losses", None), trainer


# --- resuming, callbacks, devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("model", [{}, RECIPE], ids=["adamw", "muon and weight average"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, accumulate, model):
    unbroken, losses, _ = fit(tmp_path, 20, save_at=10, accumulate_grad_batches=accumulate, model=model)
    at_10 = tmp_path / "step=10.ckpt"
    resumed, tail, _ = fit(tmp_path, 20, ckpt_path=at_10, accumulate_grad_batches=accumulate, model=model)
    assert len(tail) == 10 * accumulate and tail == losses[10 * accumulate :]  # it resumed in the middle
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


class Curves(Logger):
    name = version = "curves"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *_, **__): ...

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class SaveEveryStep(L.Callback):
    """Saves a checkpoint after every step and one at the end."""

    def __init__(self, folder):
        self.folder, self.steps = folder, []

    def on_step_done(self, trainer):
        self.steps.append(trainer.global_step)
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_end(self, trainer, lm):
        trainer.save_checkpoint(self.folder / "end.ckpt")


def full_run(folder, steps, **kwargs):
    """A complete run with all callbacks: losses, curves, weights, loop counters and the steps of its checkpoints."""
    curves, saver = Curves(), SaveEveryStep(folder)
    watchers = [UpdateRatios(), ValidateAtEnd(), saver]
    weights, losses, _ = fit(folder, steps, callbacks=watchers, logger=curves, log_every_n_steps=1, **kwargs)
    loops = torch.load(folder / "end.ckpt", weights_only=True)["loops"]
    return losses, curves.rows, weights, loops, saver.steps


def assert_continues(unbroken, resumed):
    for all_of_them, tail in zip(unbroken[:2], resumed[:2], strict=True):  # losses, then curves
        assert tail and tail == all_of_them[-len(tail) :]
    assert all(torch.equal(resumed[2][name], unbroken[2][name]) for name in unbroken[2])


@pytest.mark.parametrize(
    "steps, kwargs, cuts",
    [
        (6, dict(overfit_batches=2, val_check_interval=3), [2, 3]),
        (100, dict(limit_train_batches=3, max_epochs=2, accumulate_grad_batches=2, val_check_interval=5), [2, 3]),
        (-1, dict(limit_train_batches=3, max_epochs=2, val_check_interval=2, check_val_every_n_epoch=2), [2, 5]),
    ],
    ids=["overfitting", "a last step of one batch", "validation by epoch"],
)
def test_a_run_with_epochs_resumes_bitwise_after_any_step(tmp_path, steps, kwargs, cuts):
    unbroken = full_run(tmp_path, steps, **kwargs)
    (tmp_path / "resumed").mkdir()
    assert unbroken[4] == list(range(1, {6: 6, 100: 4, -1: 6}[steps]))
    for step in cuts:
        resumed = full_run(tmp_path / "resumed", steps, ckpt_path=tmp_path / f"{step}.ckpt", **kwargs)
        assert_continues(unbroken, resumed)
        assert resumed[3] == unbroken[3], step


@pytest.mark.parametrize("epochs, first", [(1, 100), (2, 4)], ids=["after an epoch", "in an epoch"])
def test_a_finished_run_continues_in_the_epoch_where_it_ended(tmp_path, epochs, first):
    kwargs = dict(limit_train_batches=3, model={"min_lr_ratio": 1.0})
    full_run(tmp_path, first, max_epochs=epochs, **kwargs)
    checkpoint = (tmp_path / "end.ckpt").rename(tmp_path / "first.ckpt")
    resumed = full_run(tmp_path, 100, max_epochs=3, ckpt_path=checkpoint, **kwargs)
    unbroken = full_run(tmp_path, 100, max_epochs=3, **kwargs)
    assert len(unbroken[0]) == 9
    assert_continues(unbroken, resumed)


@pytest.mark.parametrize("every", [1, 50])
def test_the_logged_loss_is_the_mean_over_all_batches_of_the_last_step(tmp_path, every):
    losses = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, lm, batch, batch_idx):
            losses.append(next_token_loss(lm.net, *batch).item())

    kwargs = dict(accumulate_grad_batches=3, log_every_n_steps=every, model=dict(dropout=0.0))
    *_, trainer = fit(tmp_path, 2, callbacks=[Watch()], **kwargs)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(sum(losses[3:]) / 3, rel=1e-6)


def test_the_logged_loss_of_an_incomplete_step_is_the_mean_over_its_batches(tmp_path):
    kwargs = dict(limit_train_batches=3, accumulate_grad_batches=2, model=dict(dropout=0.0), log_every_n_steps=1)
    _, losses, trainer = fit(tmp_path, 2, **kwargs)  # each loss is divided by 2
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(2 * losses[-1], rel=1e-6)


def test_max_epochs_is_refused_if_epochs_never_end(tmp_path):
    with pytest.raises(ValueError, match="max_epochs=3: random windows never run out, so no epoch ends: give max_st"):
        fit(tmp_path, 100, max_epochs=3)


def test_a_run_ended_by_max_epochs_is_validated_and_has_a_best_checkpoint(tmp_path):
    fit(tmp_path, 100, max_epochs=2, limit_train_batches=2, callbacks=[ValidateAtEnd(), CheckpointSaver(tmp_path, 0)])
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 4


def test_a_resumed_run_takes_its_learning_rate_from_the_new_settings(tmp_path):
    fit(tmp_path, 20, save_at=10)
    *_, trainer = fit(tmp_path, 11, ckpt_path=tmp_path / "step=10.ckpt", model={"learning_rate": 5e-3})
    factor = lr_factor(10, 11, 3, "cosine", 0.1, 0.6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-3 * factor)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_dropout_seed_differs_between_batches(tmp_path, accumulate):
    class RecordSeeds(L.Callback):
        seeds = []

        def on_before_backward(self, *_):
            self.seeds.append(torch.initial_seed())

    watch = RecordSeeds()
    fit(tmp_path, 3, callbacks=[watch], accumulate_grad_batches=accumulate)
    assert len(set(watch.seeds[-3 * accumulate :])) == 3 * accumulate


def test_the_dropout_seed_depends_on_seed_and_rank():
    def dropout_seed(seed, rank):
        lm = LanguageModel(block_size=8, n_layer=0, n_head=1, n_embd=4, seed=seed)
        no_optimizer, fifth = [SimpleNamespace(param_groups=[])], SimpleNamespace(total_batch_idx=5)
        state = dict(global_rank=rank, fit_loop=fifth, global_step=5, max_steps=9, optimizers=no_optimizer)
        state |= dict(lr_scheduler_configs=[])
        lm._trainer = SimpleNamespace(**state)  # all that on_train_batch_start reads
        lm.on_train_batch_start(None, 0)
        return torch.initial_seed()

    assert len({dropout_seed(seed, rank) for seed in (1, 2) for rank in (0, 1)}) == 4


def test_sampling_does_not_change_training(tmp_path):
    without, losses, _ = fit(tmp_path, 15)
    watched, same, _ = fit(tmp_path, 15, callbacks=[SampleText(length=5, console_length=0)])
    assert same == losses and all(torch.equal(watched[name], without[name]) for name in without)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("model", [{}, RECIPE], ids=["adamw", "muon and weight average"])
def test_several_devices_take_the_same_steps_as_one(tmp_path, devices, model):
    still = dict(dropout=0.0, ngram_dropout=0.0)  # dropout masks depend on the rank
    one, *_ = fit(tmp_path, 10, model=model | still)
    many, *_ = fit(tmp_path, 10, model=model | still, devices=devices)
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-12)


# --- validation -------------------------------------------------------------------------------------------------------


def validate(lm, data, devices=1, **args):
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, use_distributed_sampler=False)
    strategy = "ddp_spawn" if devices > 1 else "auto"
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, **quiet | args)
    return trainer.validate(lm, data, verbose=False)[0]


@pytest.fixture
def half_trained(text_file):
    torch.manual_seed(0)
    data = TextDataModule(str(text_file), block_size=16, batch_size=6, split=0.8)
    lm = LanguageModel(vocab_size=data.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16)
    torch.nn.init.normal_(lm.net.lm_head.weight, std=0.5)
    return lm, data


def test_val_loss_equals_a_plain_loop_over_the_split(half_trained):
    lm, data = half_trained
    got, tokens = validate(lm, data), data.val_tokens.long()
    total, net = 0.0, lm.net.double().eval()
    for at in range(0, len(tokens) - 1, 16):
        window = tokens[at : at + 17][None]
        total += F.cross_entropy(net(window[:, :-1])[0], window[0, 1:], reduction="sum").item()
    loss = total / (len(tokens) - 1)
    assert len(tokens) % 16 != 1  # the last window is a partial one
    assert got["val/loss"] == pytest.approx(loss, rel=1e-6)
    assert got["val/bpc"] == pytest.approx(loss / math.log(2), rel=1e-6)
    assert got["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_val_loss_is_the_same_on_any_number_of_devices(half_trained, devices):
    one, many = validate(*half_trained), validate(*half_trained, devices)
    assert many == pytest.approx(one, rel=3e-6)  # float32


# relative rounding error; without a GPU, Lightning replaces 16-mixed by bf16-mixed
ROUNDING = {"bf16-mixed": 2**-8, "16-mixed": 2**-8, "bf16-true": 2**-8, "16-true": 2**-11, "64-true": 1e-6}


@pytest.mark.filterwarnings("ignore:You passed:UserWarning")
def test_val_loss_in_any_precision_equals_float32_within_rounding(text_file):
    data = TextDataModule(str(text_file), block_size=17, batch_size=3, split=0.5)  # bfloat16 rounds 1,024 + 51

    def measured(precision):
        torch.manual_seed(0)
        lm = LanguageModel(vocab_size=data.vocab_size, block_size=17, n_layer=1, n_head=2, n_embd=16)
        torch.nn.init.normal_(lm.net.lm_head.weight, std=0.5)
        return validate(lm, data, precision=precision)

    exact = measured("32-true")
    for precision, rounding in ROUNDING.items():
        got = measured(precision)
        assert (got["val/loss"], got["val/bpc"]) == pytest.approx(
            (exact["val/loss"], exact["val/bpc"]), rel=rounding / 2
        ), precision


@pytest.mark.filterwarnings("ignore:You passed:UserWarning")
def test_training_in_any_precision_equals_float32_within_rounding(tmp_path):
    def trained(precision):
        _, losses, trainer = fit(tmp_path, 8, precision=precision, model={"dropout": 0.0})
        return [*losses, trainer.callback_metrics["train/loss"].item(), trainer.callback_metrics["val/loss"].item()]

    exact = trained("32-true")
    for precision, rounding in ROUNDING.items():
        if precision == "16-true":
            with pytest.raises(ValueError, match="precision=16-true can't train: in float16 AdamW's"):
                trained(precision)
        else:
            assert trained(precision) == pytest.approx(exact, rel=rounding / 2), precision


def test_a_weight_average_in_16_bits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ema_decay=0.9 with trainer.precision=bf16-true: an average rounded"):
        fit(tmp_path, 1, precision="bf16-true", model={"ema_decay": 0.9})


# --- the weight average -----------------------------------------------------------------------------------------------


def test_the_weight_average_is_its_recursion(tmp_path):
    weights = []

    class Watch(L.Callback):
        def on_train_start(self, trainer, lm):
            weights.append(lm.net.h[0].attn.c_attn.weight.detach().clone())

        def on_train_batch_end(self, trainer, lm, *_):
            self.on_train_start(trainer, lm)

    after, *_ = fit(tmp_path, 6, callbacks=[Watch()], model=RECIPE)
    average = weights[0]
    for new in weights[1:]:
        average = 0.9 * average + 0.1 * new
    torch.testing.assert_close(after["ema_net.h.0.attn.c_attn.weight"], average, rtol=0, atol=1e-12)
    assert not torch.allclose(average, weights[-1])


def test_the_weight_average_is_validated_and_loaded(tmp_path):
    after, _, trainer = fit(tmp_path, 7, save_at=7, model=RECIPE, limit_val_batches=None)
    lm, data = trainer.lightning_module.eval(), trainer.datamodule
    loaded, _ = load_net(tmp_path / "step=7.ckpt")
    assert torch.equal(loaded.wte.weight, after["ema_net.wte.weight"].float())
    windows = [window.long() for window in SequentialWindows(data.val_tokens, 16, 64).batches]
    nats = [next_token_loss(lm.ema_net, w[:, :-1], w[:, 1:]).item() * w[:, 1:].numel() for w in windows]
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(sum(nats) / 111_539, rel=1e-6)


# --- optimizer, schedule, clipping ------------------------------------------------------------------------------------


def grad(p, i):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


def take_three_steps(optimizer, params, grads):
    """Take a step with `grads`, one with them flipped and one with three times them."""
    for change in (lambda g: g, lambda g: g.flip(-1), lambda g: 3 * g):
        for p, g in zip(params, grads, strict=True):
            p.grad = change(g)
        optimizer.step()
    return [p.detach() for p in params]


def uses_muon(name, p):
    return p.dim() == 2 and name.startswith("h.")


def test_muon_equals_torchs_muon_on_separate_q_k_and_v(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # only torch's Muon uses bfloat16 on the CPU
    net = GPT(GPTConfig(17, 12, n_layer=2, n_head=2, n_embd=16))
    params = {name: p for name, p in net.named_parameters() if uses_muon(name, p)}
    before = {name: p.detach().clone() for name, p in params.items()}
    grads = [grad(p, i) for i, p in enumerate(params.values())]
    got = take_three_steps(Muon(muon_groups(net, 0.02, 0.1, 1e-3, (0.9, 0.95))), params.values(), grads)
    for name, ours, g in zip(params, got, grads, strict=True):
        pieces = 3 if "c_attn" in name else 1
        parts = [torch.nn.Parameter(piece.clone()) for piece in before[name].chunk(pieces)]
        muon = torch.optim.Muon(parts, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
        theirs = torch.cat(take_three_steps(muon, parts, g.chunk(pieces)))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_other_parameters_of_muon_equal_torchs_adamw():
    net = GPT(GPTConfig(17, 12, n_layer=2, n_head=2, n_embd=16))
    ours, theirs = ([p for name, p in n.named_parameters() if not uses_muon(name, p)] for n in (net, deepcopy(net)))
    grads = [grad(p, i) for i, p in enumerate(ours)]
    got = take_three_steps(Muon(muon_groups(net, 0.02, 0.1, 1e-3, (0.9, 0.95))), ours, grads)
    adamw = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for a, b in zip(got, take_three_steps(adamw, theirs, grads), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_muon_trains_a_model_without_hidden_matrices(tmp_path):
    _, losses, _ = fit(tmp_path, 60, model=RECIPE | dict(n_layer=0, learning_rate=3e-2))
    assert sum(losses[-10:]) / 10 < 3.5 < losses[0]


def test_weight_decay_applies_to_matrices_only(net):
    decayed, spared = adamw_groups(net, 1e-3, (0.9, 0.99), 0.1)
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.dim() for p in spared["params"]} == {1} and spared["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))


def test_schedules_have_the_right_values_at_first_peak_and_last_step():
    for schedule in "cosine", "linear":
        f = [lr_factor(k, 110, 10, schedule, 0.1, 0.6) for k in range(120)]
        assert f[0] == pytest.approx(1 / 11) and f[10] == 1.0 and f[60] == pytest.approx(0.55)
        assert f[110:] == pytest.approx([0.1] * 10)
        assert all(a >= b for a, b in zip(f[10:], f[11:], strict=False))
        assert lr_factor(35, 110, 10, schedule, 0.0, 0.6) == pytest.approx(
            {"linear": 0.75, "cosine": 0.5 + math.sqrt(0.125)}[schedule]
        )
    assert lr_factor(7, 10, 0, "cosine", 1.0, 0.6) == 1.0


class Plain(Recorded):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class OwnScheduler(Recorded):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1), "interval": "step"}]


class OwnOptimizer(Recorded):
    def configure_optimizers(self):
        return torch.optim.NAdam(self.parameter_groups())


class Rates(L.Callback):
    def on_train_start(self, *_):
        self.seen = []

    def on_before_zero_grad(self, trainer, lm, optimizer):  # called at the start of a step, with its learning rate
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("module, rates", [(Plain, [0.5] * 8), (OwnScheduler, [1e-3] * 4 + [1e-4] * 4)])
def test_a_subclass_trains_with_its_own_optimizer_and_scheduler_and_resumes(tmp_path, module, rates):
    watch = Rates()
    unbroken, losses, _ = fit(tmp_path, 8, save_at=6, callbacks=[watch], module=module)
    assert watch.seen == pytest.approx(rates) and losses[0] > losses[-1]
    resumed, tail, _ = fit(tmp_path, 8, ckpt_path=tmp_path / "step=6.ckpt", callbacks=[watch], module=module)
    assert watch.seen == pytest.approx(rates[6:]) and tail == losses[6:]
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_a_subclass_optimizer_with_our_parameter_groups_follows_our_schedule(tmp_path):
    watch = Rates()
    fit(tmp_path, 8, callbacks=[watch], module=OwnOptimizer)
    assert watch.seen == pytest.approx([1e-3 * lr_factor(k, 8, 3, "cosine", 0.1, 0.6) for k in range(8)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_decays_until_the_last_step_of_the_last_epoch(tmp_path, accumulate):
    watch, steps = Rates(), -(-5 // accumulate) * 2
    kwargs = dict(max_epochs=2, limit_train_batches=5, accumulate_grad_batches=accumulate)
    fit(tmp_path, -1, callbacks=[watch], **kwargs)
    assert watch.seen == pytest.approx([1e-3 * lr_factor(k, steps, 3, "cosine", 0.1, 0.6) for k in range(steps)])


@pytest.mark.parametrize("ends", [dict(max_time="00:00:01:00"), dict(max_epochs=-1)])
def test_a_schedule_without_a_known_last_step_is_refused(tmp_path, ends):
    with pytest.raises(ValueError, match="has none: give trainer.max_steps"):
        fit(tmp_path, -1, **ends)


def test_wsd_is_constant_before_it_decays():
    f = [lr_factor(k, 110, 10, "wsd", 0.0, 0.4) for k in range(111)]
    assert f[0] == pytest.approx(1 / 11) and set(f[10:67]) == {1.0}
    assert f[66] == 1.0 > f[67] and f[88] == pytest.approx(0.5) and f[110] == pytest.approx(0.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_to_the_given_norm(tmp_path, precision):
    norms = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, lm, optimizer):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in lm.parameters() if p.grad is not None]).item())

    fit(tmp_path, 5, callbacks=[Watch()], gradient_clip_val=0.01, precision=precision)
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_gradients_are_clipped_to_the_given_value(tmp_path):
    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, lm, optimizer):
            self.largest = max((p.grad.abs().max().item() for p in lm.parameters() if p.grad is not None), default=0.0)

    watch = Watch()
    fit(tmp_path, 3, callbacks=[watch], gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    assert watch.largest == pytest.approx(1e-4)


@pytest.mark.parametrize("every, saved_at", [(0, [3, 6, 7]), (2, [2, 3, 4, 6, 7]), (7, [3, 6, 7])])
def test_last_is_saved_after_validations_every_n_steps_and_at_the_end(tmp_path, every, saved_at):
    class Watch(L.Callback):
        def on_save_checkpoint(self, trainer, lm, checkpoint):
            self.steps.append(trainer.global_step)

    watch = Watch()
    watch.steps = []
    fit(tmp_path, 7, callbacks=[CheckpointSaver(tmp_path, every), watch], val_check_interval=3)
    assert sorted(set(watch.steps)) == saved_at
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


def test_samples_use_a_separate_generator(tmp_path):
    sampler = SampleText(length=20, console_length=0)
    *_, trainer = fit(tmp_path, 2, callbacks=[sampler])
    before = torch.get_rng_state()
    (one,), (two,) = (sampler.sample(trainer, trainer.lightning_module, ["To be "]) for _ in range(2))
    assert torch.equal(one[1], two[1]) and torch.equal(torch.get_rng_state(), before)


# --- next to other programs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="sets libgomp, which Linux has")
@pytest.mark.parametrize(
    "given, rounds",
    [({}, {"10000"}), ({"GOMP_SPINCOUNT": "7"}, {"7"}), ({"OMP_WAIT_POLICY": "active"}, {"None"})],
)
def test_waiting_threads_yield_the_core_when_other_programs_run(given, rounds):
    code = "import os, sys, lightning_gpt; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    unset = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
    env = {name: value for name, value in os.environ.items() if name not in unset} | given
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    spin, torch_is_there = done.stdout.split()
    assert spin in rounds and torch_is_there == "False"  # libgomp reads it when torch is imported


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps(tmp_path):
    _, losses, _ = fit(tmp_path, 10, model=RECIPE | dict(dropout=0.0))
    _, compiled, trainer = fit(tmp_path, 10, model=RECIPE | dict(dropout=0.0, compile=True))
    assert trainer.lightning_module.compiles
    assert compiled == pytest.approx(losses, abs=1e-9)


@pytest.mark.slow
def test_without_a_compiler_training_continues_uncompiled_with_a_warning(tmp_path):
    command = "fit --trainer.max_steps=3 --trainer.limit_val_batches=1 --trainer.accelerator=cpu --sample.length=0"
    done = subprocess.run(
        [sys.executable, "-m", "lightning_gpt", *command.split(), "--model.compile=true"],
        env=os.environ | dict(CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "best.ckpt" in done.stdout
    assert "training continues without it" in done.stderr and done.stderr.count("\n") == 1
