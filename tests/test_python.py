"""The package from Python: a script with its own Trainer, LightningCLI, and what a Lightning user tries."""

import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import lightning_gpt
from lightning_gpt import (
    LanguageModel,
    ModelInspector,
    SampleText,
    TextDataModule,
    UpdateRatios,
    generate,
    load,
)
from lightning_gpt.alignment.stages import RewardModeling
from lightning_gpt.data.windows import RandomWindows

V, T = 32, 16  # of text_file, and of the windows

SCRIPT = """
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_gpt import LanguageModel, SampleText, TextDataModule, generate, load

L.seed_everything(1337)
data = TextDataModule(block_size=64, batch_size=12)
model = LanguageModel(vocab_size=data.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=64)
best = ModelCheckpoint(monitor="val/loss", filename="best")
trainer = L.Trainer(
    max_steps=500, val_check_interval=250, callbacks=[SampleText(), best], default_root_dir="checkpoints"
)
trainer.fit(model, data)
print(model.generate("ROMEO:", max_new_tokens=200, temperature=0.8, top_k=40))
trainer.validate(LanguageModel.load_from_checkpoint(best.best_model_path), data)
net, tokenizer = load(best.best_model_path)
print(generate(net, tokenizer, "JULIET:", max_new_tokens=200))
"""
SMALLER = {"500": "8", "250": "4", "block_size=64": "block_size=16", "n_embd=64": "n_embd=8", "=200": "=20"}
SMALLER |= {"TextDataModule(": "TextDataModule(corpus, ", "ROMEO:": "the", "JULIET:": "who"}
SMALLER |= {"max_steps": 'accelerator="cpu", max_steps'}


@pytest.fixture
def data(text_file):
    return TextDataModule(str(text_file), block_size=T, batch_size=8)


def lm(cls=LanguageModel, **settings):
    sizes = dict(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=8, dropout=0.2, warmup_steps=3)
    return cls(**sizes | settings)


def trainer(folder=None, **settings):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return L.Trainer(**dict(max_steps=6, accelerator="cpu", default_root_dir=folder) | quiet | settings)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_loader():
    ids = torch.randint(V, (20, T + 1), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=8)


def plain_checkpoint(folder, **settings):
    """ModelCheckpoint as a script has it: the file with the lowest val/loss, named by its step."""
    return ModelCheckpoint(folder, filename="{step}", monitor="val/loss", auto_insert_metric_name=False, **settings)


# --- a script ---------------------------------------------------------------------------------------------------------


def test_a_script_trains_logs_samples_and_reloads(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = SCRIPT
    for large, small in SMALLER.items():
        script = script.replace(large, small)
    names = {"corpus": str(text_file)}
    exec(script, names)
    model, best = names["model"], names["best"]
    again = generate(names["net"], names["tokenizer"], "who", max_new_tokens=20)
    assert again == generate(*load(), "who", max_new_tokens=20) and again in capsys.readouterr().out
    assert LanguageModel.load_from_checkpoint(best.best_model_path).generate("who", max_new_tokens=20) == again
    assert names["trainer"].callback_metrics["val/loss"] == best.best_model_score
    assert model.generate("the", 5) == generate(model.net, names["data"].tokenizer, "the", 5)
    board = EventAccumulator(names["trainer"].logger.log_dir).Reload()
    assert sorted(event.step for event in board.Scalars("val/loss")) == [3, 7, 8]  # 8: of validate, in another file
    assert any(tag.startswith("samples/") for tag in board.Tags()["tensors"])


def test_the_public_names_can_be_listed_and_imported():
    names = {}
    exec("from lightning_gpt import *", names)
    assert set(lightning_gpt.__all__) <= set(names) and set(lightning_gpt.__all__) <= set(dir(lightning_gpt))


@pytest.mark.parametrize("interval", [{}, {"val_check_interval": 4}])
def test_a_trainer_validates_endless_windows_at_the_end_by_default(data, interval):
    run = trainer(**interval)
    run.fit(model := lm(), data)
    at_step = run.callback_metrics["val/loss"]
    run.validate(model, data, verbose=False)
    assert run.global_step == 6 and (run.callback_metrics["val/loss"] == at_step) == (not interval)


def test_lightnings_cli_trains_resumes_and_validates(tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_trainer = {"accelerator": "cpu", "logger": "false", "enable_progress_bar": "false", "max_steps": "4"}
    of_data = {"corpus": text_file, "block_size": T, "batch_size": 8}
    of_model = {"vocab_size": V, "block_size": T, "n_layer": 1, "n_head": 2, "n_embd": 8}
    flags = [f"--trainer.{k}={v}" for k, v in of_trainer.items()] + [f"--data.{k}={v}" for k, v in of_data.items()]

    def cli(command, *args):
        args = [command, *flags, *args]
        return LightningCLI(LanguageModel, TextDataModule, args=args, save_config_kwargs={"overwrite": True}).trainer

    trained = cli("fit", *(f"--model.{k}={v}" for k, v in of_model.items()))
    path = f"--ckpt_path={trained.checkpoint_callback.best_model_path}"
    assert cli("validate", path).callback_metrics["val/loss"] == trained.callback_metrics["val/loss"]
    assert cli("fit", path, "--trainer.max_steps=6").global_step == 6


# --- data without a Trainer, and plain data in a Trainer --------------------------------------------------------------


def test_the_loaders_yield_inputs_and_targets_without_a_trainer(data):
    first = RandomWindows(data.train_tokens, T, 8, 1337).batch(0).long()
    for _ in range(2):
        x, y = next(iter(data.train_dataloader()))
        assert x.dtype == torch.int64 and torch.equal(x, first[:, :-1]) and torch.equal(y, first[:, 1:])
        assert torch.equal(torch.cat([y.flatten() for _, y in data.val_dataloader()]), data.val_tokens[1:].long())
        trainer().fit(lm(), data)  # a Trainer that has ended changes nothing


def test_a_model_trains_on_the_loaders_as_on_the_data_module(data):
    L.seed_everything(0, verbose=False)
    models = [lm().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    trainer().fit(models[0], data)
    trainer().fit(models[1], data.train_dataloader(), data.val_dataloader())
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_a_data_module_can_be_pickled_after_a_fit(data):
    trainer().fit(lm(), data)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(next(iter(copy.train_dataloader()))[0], next(iter(data.train_dataloader()))[0])


def test_plain_data_loaders_train_and_what_needs_a_tokenizer_says_so(tmp_path):
    best = plain_checkpoint(tmp_path)
    run = trainer(max_steps=-1, max_epochs=2, enable_checkpointing=True, callbacks=[best])
    run.fit(lm(), plain_loader(), plain_loader())
    assert run.global_step == 6 and "val/bpc" not in run.callback_metrics
    model = LanguageModel.load_from_checkpoint(best.best_model_path)
    assert run.validate(model, plain_loader(), verbose=False)[0]["val/loss"] == best.best_model_score
    with pytest.raises(ValueError, match="has no tokenizer"):
        model.generate("the")
    with pytest.raises(ValueError, match="comes from training with a TextDataModule"):
        load(best.best_model_path)
    for callback in SampleText, ModelInspector:
        with pytest.raises(ValueError, match=f"{callback.__name__} needs the tokenizer of a TextDataModule"):
            trainer(callbacks=[callback()]).fit(lm(), plain_loader())
    logger = TensorBoardLogger(tmp_path)
    trainer(max_epochs=1, max_steps=-1, logger=logger, callbacks=[UpdateRatios()]).fit(lm(), plain_loader())


def test_a_reward_model_gives_rewards_and_no_text():
    model = RewardModeling(vocab_size=32, block_size=16, n_layer=1, n_head=1, n_embd=8)
    assert model(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)).shape == (2,)
    with pytest.raises(ValueError, match="gives rewards, not text"):
        model.generate("the")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"vocab_size": 29}, "the model's vocab_size=29 and the data's vocab_size=32 differ"),
        ({"vocab_size": 35}, "the model's vocab_size=35 and the data's vocab_size=32 differ"),
        ({"block_size": 9}, "the data's block_size=16 exceeds the model's block_size=9"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "validate"])
def test_data_that_do_not_fit_the_net_are_refused_with_both_sizes(data, method, sizes, message):
    with pytest.raises(ValueError, match=message):
        getattr(trainer(), method)(lm(**sizes), data)


# --- the module -------------------------------------------------------------------------------------------------------


def test_forward_and_predict_give_the_logits_of_the_net_that_is_validated(data):
    trainer().fit(model := lm(ema_decay=0.5, dropout=0.0).double(), data)
    batches = [x for x, _ in data.val_dataloader()]
    for logits, x in zip(trainer().predict(model, data), batches, strict=True):
        assert torch.equal(logits, model(x)) and torch.equal(logits, model.ema_net(x))
    assert not torch.equal(model.ema_net(batches[0]), model.net(batches[0]))
    for ids_only in DataLoader(batches[0], batch_size=8), DataLoader(TensorDataset(batches[0]), batch_size=8):
        assert torch.equal(trainer().predict(model, ids_only)[0], model(batches[0]))


def test_a_second_fit_continues_from_the_trained_weights(tmp_path, data):
    best = plain_checkpoint(tmp_path)
    trainer(enable_checkpointing=True, callbacks=[best]).fit(lm(), data)
    tuned = lm(init_from=best.best_model_path, learning_rate=0.0, weight_decay=0.0)
    trainer().fit(tuned, data)
    before = weights(LanguageModel.load_from_checkpoint(best.best_model_path))
    assert torch.equal(weights(tuned), before)  # it did start from there
    with torch.no_grad():
        tuned.net.wte.weight += 1.0
    changed = weights(tuned)
    again = plain_checkpoint(tmp_path / "again")
    trainer(enable_checkpointing=True, callbacks=[again]).fit(tuned, data)
    assert torch.equal(weights(tuned), changed)
    reloaded = LanguageModel.load_from_checkpoint(again.best_model_path)
    trainer().fit(reloaded, data)
    assert torch.equal(weights(reloaded), changed)


# --- Lightning's callbacks and the Tuner ------------------------------------------------------------------------------


def test_a_run_resumes_bitwise_from_a_checkpoint_of_the_best_validation(tmp_path, data):
    L.seed_everything(0, verbose=False)
    settings = dict(max_steps=12, val_check_interval=3, enable_checkpointing=True)
    best = plain_checkpoint(tmp_path, save_top_k=-1)
    trainer(callbacks=[best, EarlyStopping("val/loss")], **settings).fit(unbroken := lm().double(), data)
    run = trainer(callbacks=[EarlyStopping("val/loss")], **settings)
    run.fit(resumed := lm().double(), data, ckpt_path=tmp_path / "6.ckpt")
    assert run.global_step == 12 and torch.equal(weights(resumed), weights(unbroken))


class Stepped(LanguageModel):
    """Keeps the learning rate of each step."""

    def on_train_start(self):
        super().on_train_start()
        self.rates = []

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_a_run_after_lr_find_is_one_with_the_learning_rate_it_found(tmp_path, data):
    L.seed_everything(0, verbose=False)
    tuned = lm(Stepped).double()
    start = {name: w.clone() for name, w in tuned.state_dict().items()}
    run = trainer(tmp_path)
    finder = Tuner(run).lr_find(tuned, datamodule=data, min_lr=1e-5, max_lr=1.0, num_training=25)
    assert len(tuned.rates) == 25 and max(tuned.rates) > 0.5  # it swept, without our schedule
    run.fit(tuned, data)
    given = lm(learning_rate=finder.suggestion()).double()
    given.load_state_dict(start)
    trainer().fit(given, data)
    assert finder.suggestion() != 1e-3 and torch.equal(weights(tuned), weights(given))


def test_searches_that_do_not_fit_are_refused(data):
    with pytest.raises(ValueError, match="muon has two: take adamw"):
        Tuner(trainer()).lr_find(lm(optimizer="muon"), datamodule=data)
    with pytest.raises(ValueError, match=r"call Tuner\(trainer\).lr_find before fit"):
        trainer(callbacks=[LearningRateFinder()]).fit(lm(), data)


def test_the_schedule_gives_way_to_stochastic_weight_averaging(data):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    swa = StochasticWeightAveraging(swa_lrs=0.03, swa_epoch_start=2, annealing_epochs=1)
    trainer(max_steps=-1, max_epochs=4, limit_train_batches=3, callbacks=[swa, Rates()]).fit(lm(), data)
    assert len(rates) == 12 and rates[-3:] == [0.03] * 3 and 0.03 not in rates[:3]


class Curves(Logger):
    name = version = "curves"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *_, **__): ...

    def log_metrics(self, metrics, step):
        self.rows.append(metrics)


def test_the_learning_rate_monitor_logs_the_rate_of_each_step(data):
    curves = Curves()
    trainer(logger=curves, log_every_n_steps=1, callbacks=[LearningRateMonitor()]).fit(lm(), data)
    ours = [row["train/lr"] for row in curves.rows if "train/lr" in row]
    theirs = [row["lr-AdamW/pg1"] for row in curves.rows if "lr-AdamW/pg1" in row]
    assert len(set(ours)) == 6 and theirs == pytest.approx(ours[:1] + ours)  # the epoch's, then the steps'
