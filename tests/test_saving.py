"""The small print of saving, stopping and going on, one promise each."""

import math
import os
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import TINY, T, V
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gpt import checkpoint, cli
from lightning_gpt import main as main_module
from lightning_gpt.main import main
from lightning_gpt.model import GPT, GPTConfig
from lightning_gpt.saving import SafeIO, Save
from lightning_gpt.settings import goes_on_in_its_folder
from lightning_gpt.training import Diverged, LanguageModel

PARTS = {"state_dict": {}, "hyper_parameters": {}, "datamodule_hyper_parameters": {}, "global_step": 1}


def fit(*flags, corpus=None, root=None):
    where = [f"--data.corpus={corpus}"] * bool(corpus) + [f"--trainer.default_root_dir={root}"] * bool(root)
    main(["fit", *(TINY if corpus else []), *where, *map(str, flags)])


@pytest.fixture
def resumable(run, tmp_path):
    """A copy of a run's folder, which a fit from its last.ckpt goes on in."""
    return Path(shutil.copytree(run, tmp_path / "tiny" / "version_0"))


def resume(run, *flags):
    main(["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--trainer.default_root_dir={run.parents[1]}", *flags])


def test_a_killed_runs_draft_is_cleared_away(resumable):
    (resumable / "checkpoints" / ".draft.last.ckpt.123").write_bytes(b"half")
    resume(resumable, "--trainer.max_steps=6")
    assert {file.name for file in (resumable / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize("loss, replaced", [(0.5, False), (9.0, True), (None, True)])
def test_a_resumed_run_replaces_best_by_a_better_one_only(resumable, loss, replaced):
    best = resumable / "checkpoints" / "best.ckpt"
    checkpoint.write(checkpoint.read(best) | {"val_loss": loss}, best)
    if loss is None:  # damaged
        best.write_bytes(best.read_bytes()[:-1000])
    before = best.read_bytes()
    resume(resumable, "--trainer.max_steps=6")
    assert (best.read_bytes() != before) == replaced


def test_a_checkpoint_between_two_validations_has_no_val_loss(tmp_path, text_file):
    flags = ["--trainer.val_check_interval=2", "--save_every_n_steps=3", "--trainer.max_steps=4"]
    seen = {}

    class Spy(SafeIO):
        def write(self, saved, path, ready):
            seen[path.name, saved["global_step"]] = saved["val_loss"]
            super().write(saved, path, ready)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "SafeIO", Spy)
        fit(*flags, corpus=text_file, root=tmp_path)
    assert {at: math.isnan(loss) for at, loss in seen.items() if at[0] == "last.ckpt"} == {
        ("last.ckpt", 2): False,
        ("last.ckpt", 3): True,
        ("last.ckpt", 4): False,
    }


class Spoil(L.Callback):
    """Weights become nan after step 3, which no loss has told yet."""

    def on_train_batch_end(self, trainer, lm, *_):
        if trainer.global_step == 3:
            lm.net.wte.weight.data.fill_(math.nan)


@pytest.mark.parametrize("flags", [["--save_every_n_steps=1"], ["--trainer.val_check_interval=3"]])
def test_weights_that_are_no_numbers_are_never_saved_and_the_last_good_file_is_named(
    tmp_path, text_file, capsys, flags
):
    how = [f"--trainer.callbacks=[{{class_path: {__name__}.Spoil}}]", "--trainer.max_steps=9", *flags]
    with pytest.raises(SystemExit) as stop:
        fit(*how, corpus=text_file, root=tmp_path)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "the weights became no numbers (nan or infinite) at step 3" in said
    if "--save_every_n_steps=1" in flags:
        assert "The last good checkpoint is" in said and "last.ckpt, of step 2" in said
        assert checkpoint.read(next(tmp_path.rglob("last.ckpt")))["global_step"] == 2
    else:
        assert not list(tmp_path.rglob("*.ckpt")) and "last good" not in said


class SpoilAverage(L.Callback):
    def on_train_batch_end(self, trainer, lm, *_):
        if trainer.global_step == 3:
            lm.average.wte.weight.data.fill_(math.nan)


def test_a_val_loss_that_is_no_number_stops_the_run(tmp_path, text_file, capsys):
    how = [f"--trainer.callbacks=[{{class_path: {__name__}.SpoilAverage}}]", "--model.ema_decay=0.5"]
    with pytest.raises(SystemExit) as stop:
        fit(*how, "--trainer.val_check_interval=3", "--trainer.max_steps=9", corpus=text_file, root=tmp_path)
    assert stop.value.code == 1 and "val/loss became nan at step 3" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


class Snap(L.Callback):
    def on_save_checkpoint(self, trainer, lm, saved):
        board = EventAccumulator(trainer.loggers[0].log_dir, size_guidance={"scalars": 0}).Reload()
        assert len(board.Scalars("val/loss")) == trainer.global_step // 2


def test_a_best_that_could_not_be_saved_is_tried_again(tmp_path, monkeypatch):
    class Trainer(SimpleNamespace):
        def save_checkpoint(self, path):
            asked.append(path.name)

    asked, saver = [], Save(tmp_path, 0)
    lm, io = SimpleNamespace(stop_if_diverged=lambda: None), SimpleNamespace(failed={})
    strategy = SimpleNamespace(broadcast=lambda x: x, checkpoint_io=io)
    trainer = Trainer(lightning_module=lm, strategy=strategy, fast_dev_run=False, loggers=[], is_global_zero=True)
    for step, loss, failed in (1, 2.0, {}), (2, 3.0, {saver.best: OSError()}):
        trainer.global_step, saver.val_loss, io.failed = step, loss, failed
        saver.val_step = trainer.global_step
        saver.on_step_done(trainer)
    assert asked == ["best.ckpt", "last.ckpt"] * 2  # 3.0 beats what is on the disk: nothing
    saver.on_step_done(trainer)
    assert len(asked) == 4  # once a step


class Interrupt(L.Callback):
    handlers: list = []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and not self.handlers:
            if "SLURM_JOB_ID" in os.environ:
                assert callable(signal.getsignal(signal.SIGUSR1))
            os.kill(os.getpid(), signal.SIGUSR1 if "SLURM_JOB_ID" in os.environ else signal.SIGTERM)
            self.handlers += [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("slurm", [False, True])
def test_a_signal_is_heard_once_and_leaves_no_handler(tmp_path, text_file, monkeypatch, slurm):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    monkeypatch.setattr(Interrupt, "handlers", [])
    (monkeypatch.setenv("SLURM_JOB_ID", "1") if slurm else monkeypatch.delenv("SLURM_JOB_ID", raising=False))
    with pytest.raises(SystemExit) as stop:
        fit(f"--trainer.callbacks=[{{class_path: {__name__}.Interrupt}}]", corpus=text_file, root=tmp_path)
    assert stop.value.code == 128 + (signal.SIGUSR1 if slurm else signal.SIGTERM)
    assert checkpoint.read(next(tmp_path.rglob("last.ckpt")))["global_step"] == 4
    assert Interrupt.handlers == [signal.SIG_DFL] * 2  # a second one ends it at once
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_run_may_be_in_another_thread(tmp_path, text_file):
    done = []
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    thread = threading.Thread(target=lambda: done.append(main(["fit", *TINY, *where])))
    thread.start(), thread.join()
    assert done == [None] and list(tmp_path.rglob("best.ckpt"))


# checkpoint.py


def test_bytes_are_on_the_disk_and_checked_before_they_get_their_name(tmp_path, monkeypatch):
    did, path, fsync, replace = [], tmp_path / "x.ckpt", os.fsync, os.replace
    sizes = []

    def watched_fsync(fd):
        name = Path(os.readlink(f"/proc/self/fd/{fd}"))
        did.append("folder" if name == tmp_path else name.name)
        sizes.append(os.fstat(fd).st_size)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (did.append("replace"), replace(a, b)))
    checkpoint.write(PARTS, path)
    assert did == [f".draft.x.ckpt.{os.getpid()}", "replace", "folder"]
    assert sizes[0] == path.stat().st_size


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"?" + data[1:], lambda data: data[:-71]])
def test_what_does_not_read_back_gets_no_name(tmp_path, monkeypatch, spoil):
    path, read = tmp_path / "x.ckpt", Path.read_bytes
    checkpoint.write(PARTS, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda file: spoil(read(file)))
        with pytest.raises(OSError, match="does not read back"):
            checkpoint.write(PARTS | {"global_step": 2}, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_flipped_bit_in_a_checkpoint_of_the_first_format_is_seen(ckpt, tmp_path):
    path, saved = tmp_path / "x.ckpt", checkpoint.read(ckpt)
    torch.save({key: value for key, value in saved.items() if key != "format"}, path)
    checkpoint.read_strictly(path)
    data = bytearray(path.read_bytes())
    data[data.index(saved["state_dict"]["net.wte.weight"].numpy().tobytes()) + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read_strictly(path)


def test_the_newest_good_one_is_good_and_may_be_of_another_run(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["elsewhere/bad", "checkpoints/a/new", "checkpoints/a/old"]):
        path = tmp_path / f"{name}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ckpt, path)
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "checkpoints" / "folder.ckpt").mkdir()
    for name in "elsewhere/bad", "elsewhere/worse", "checkpoints/a/new":
        Path(f"{name}.ckpt").write_bytes(ckpt.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"The newest good one is checkpoints/a/old\.ckpt$"):
        checkpoint.read("elsewhere/bad.ckpt")


def test_a_folder_named_best_is_no_checkpoint(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    (tmp_path / "a").mkdir()
    shutil.copy(ckpt, tmp_path / "a" / "best.ckpt")
    os.utime(tmp_path / "a" / "best.ckpt", (1000, 1000))
    (tmp_path / "b" / "best.ckpt").mkdir(parents=True)
    assert checkpoint.find("best") == tmp_path / "a" / "best.ckpt"


def test_weights_that_are_no_numbers_are_not_loaded(ckpt, tmp_path):
    saved = checkpoint.read(ckpt)
    saved["state_dict"]["net.wte.weight"][0, 0] = math.inf
    checkpoint.write(saved, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no numbers"):
        checkpoint.load(tmp_path / "x.ckpt")


# settings.py


class Config(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    "path, name, root, goes_on",
    [
        ("r/tiny/version_0/checkpoints/last.ckpt", "tiny", "r", True),
        ("r/tiny/version_0/checkpoints/last.ckpt", "tiny", "checkpoints", True),  # the default, not asked for
        ("r/tiny/version_0/checkpoints/last.ckpt", "tiny", "else", False),
        ("r/tiny/version_0/checkpoints/last.ckpt", "other", "r", False),
        ("r/tiny/version_0/checkpoints/best.ckpt", "tiny", "r", False),
        ("r/tiny/version_0/copies/last.ckpt", "tiny", "r", False),
        ("r/tiny/mine/checkpoints/last.ckpt", "tiny", "r", False),
        ("r/tiny/version_0b/checkpoints/last.ckpt", "tiny", "r", False),
    ],
)
def test_a_run_goes_on_in_its_folder_only_as_what_it_was(path, name, root, goes_on):
    config = Config(trainer=Config(default_root_dir=root), name=name, data={"split": (0.8, 0.9)})
    assert goes_on_in_its_folder(config, {"data": {"split": [0.8, 0.9]}}, Path(path)) == goes_on


@pytest.mark.parametrize(
    "flag",
    ["--trainer.max_steps=0", "--trainer.val_check_interval=0.5", "--trainer.accumulate_grad_batches=0", "--name=.."],
)
def test_more_bad_settings(tmp_path, fails, text_file, flag):
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}/a/b"]
    assert flag.removeprefix("--").split("=")[0] in fails("fit", *TINY, *where, flag)
    assert not list(tmp_path.iterdir())


# training.py


@pytest.mark.parametrize("accumulate, bad_from, step", [(1, 3, 3), (2, 5, 3), (2, 6, 3), (4, 9, 3)])
def test_the_step_of_the_first_bad_loss_is_known_however_late_one_looks(accumulate, bad_from, step):
    lm = LanguageModel(block_size=8, n_layer=0, n_head=1, n_embd=4)
    lm.bad_losses, steps = torch.zeros((), dtype=torch.int64), 5
    reduce = SimpleNamespace(reduce=lambda x, **_: x)
    lm._trainer = SimpleNamespace(accumulate_grad_batches=accumulate, global_step=steps, max_steps=9, strategy=reduce)
    for batch in range(1, steps * accumulate + 1):
        lm.train_loss = lambda batch=batch: torch.tensor(math.nan if batch >= bad_from else 1.0)
        lm.training_step((), 0)
    with pytest.raises(Diverged, match=f"at step {step},"):
        lm.stop_if_diverged()


def test_a_bad_loss_stops_at_once_on_the_cpu(tmp_path, text_file, capsys):
    flags = "--trainer.max_steps 30 --trainer.log_every_n_steps 50 --model.learning_rate 1e30 --model.warmup_steps 0"
    watch = f"--trainer.callbacks=[{{class_path: {__name__}.Count}}]"
    Count.batches = 0
    with pytest.raises(SystemExit):
        fit(*flags.split(), watch, corpus=text_file, root=tmp_path)
    assert "at step 2," in capsys.readouterr().err and Count.batches == 2


class Count(L.Callback):
    batches = 0

    def on_train_batch_start(self, *_):
        Count.batches += 1


def test_no_validation_no_counters_touched(tmp_path, text_file):
    flags = ["--trainer.val_check_interval=4", "--save_every_n_steps=0", "--trainer.log_every_n_steps=1"]
    fit("--trainer.max_steps=4", *flags, "--trainer.limit_val_batches=0", corpus=text_file, root=tmp_path)
    (run,) = tmp_path.glob("tiny/version_*")
    resume(run, "--trainer.max_steps=8")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(8))


def test_a_curve_that_goes_on_from_an_older_save_has_every_step_once(tmp_path, text_file):
    with pytest.raises(SystemExit):
        fit(
            "--trainer.log_every_n_steps=1",
            "--save_every_n_steps=4",
            "--trainer.max_steps=9",
            f"--trainer.callbacks=[{{class_path: {__name__}.Cut}}]",
            corpus=text_file,
            root=tmp_path,
        )
    (run,) = tmp_path.glob("tiny/version_*")
    resume(run, "--trainer.max_steps=9", "--trainer.callbacks=null")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(9))  # and no step twice


class Cut(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 7:
            raise KeyboardInterrupt


# cli.py


@pytest.mark.parametrize(
    "error, code, message",
    [
        (OSError(28, "No space left"), 1, "make room"),
        (OSError(2, "No such file"), 2, "No such file"),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out"), 1, "out of memory"),
        (Diverged("bad"), 1, "error: bad. Go back"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_end_has_its_exit_code(error, code, message, capfd):
    if isinstance(error, Diverged):
        error.add_note("Go back")

    def fails(*_, **__):
        raise error

    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as nowhere:
        patch.setattr(sys, "stdout", nowhere)
        main_module.run(lambda args: cli.train(args, fails), [])
    assert stop.value.code == code and message in capfd.readouterr().err


def test_ngrams_dropout_is_for_whole_tokens_in_training_only(idx):
    torch.manual_seed(0)
    how = dict(dropout=0.0, ngram=3, ngram_rows=50, ngram_dropout=0.4)
    net = GPT(GPTConfig(V, T, n_layer=0, n_head=1, n_embd=16, **how)).double()
    idx = idx.repeat(300, 1)
    plain = net.wte(idx) + net.wpe.weight
    grams = net.ngrams(idx)
    for training in True, False:
        share = (net.train(training).features(idx) - plain) / grams  # (B, T, C): one number for all channels
        kept = share[..., :1] * torch.ones(16)
        torch.testing.assert_close(share, kept, rtol=0, atol=1e-6)
        values = share[..., 0]
        if training:
            assert {0.0, round(1 / 0.6, 4)} == {round(v, 4) + 0.0 for v in values.flatten().tolist()}
            assert (values == 0).double().mean().item() == pytest.approx(0.4, abs=0.03)
            assert 0 < (values[0] == 0).sum() < T
        else:
            torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-9)


def test_the_seal_is_the_archives_comment(tmp_path):
    checkpoint.write(PARTS, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.comment == (tmp_path / "x.ckpt").read_bytes()[-71:]


def test_a_sanity_check_is_no_validation(tmp_path, text_file):
    before = signal.getsignal(signal.SIGINT)
    fit("--trainer.num_sanity_val_steps=2", "--trainer.limit_val_batches=2", corpus=text_file, root=tmp_path)
    assert list(tmp_path.rglob("best.ckpt")) and signal.getsignal(signal.SIGINT) == before


class Steps(L.Callback):
    seen: list = []

    def on_step_done(self, trainer):
        self.seen.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))


def test_a_step_is_done_after_its_last_batch_only(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(Steps, "seen", [])
    how = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4", "--trainer.max_steps=5"]
    fit(*how, f"--trainer.callbacks=[{{class_path: {__name__}.Steps}}]", corpus=text_file, root=tmp_path)
    assert Steps.seen == [(step, 3 * step) for step in range(1, 5)]
