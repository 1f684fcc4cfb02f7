"""Saving, stopping and resuming in detail, one property per test."""

import ast
import io
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import TINY, T, V
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_gpt
import lightning_gpt.cli.train as train_module
from lightning_gpt.checkpoint.io import (
    find_checkpoint,
    load_net,
    read_checkpoint,
    read_verified,
    write_checkpoint,
)
from lightning_gpt.cli.config import resumes_in_place
from lightning_gpt.cli.main import main, run
from lightning_gpt.cli.train import train
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.training.checkpointing import AsyncCheckpointIO, CheckpointSaver
from lightning_gpt.training.logger import BufferedEventFile, create_run_folder, lock_run_folder
from lightning_gpt.training.module import DivergenceError, LanguageModel

PARTS = {"state_dict": {}, "hyper_parameters": {}, "datamodule_hyper_parameters": {}, "global_step": 1}


def fit(*flags, corpus=None, root=None):
    paths = [f"--data.corpus={corpus}"] * bool(corpus) + [f"--trainer.default_root_dir={root}"] * bool(root)
    main(["fit", *(TINY if corpus else []), *paths, *map(str, flags)])


@pytest.fixture
def resumable(run, tmp_path):
    """A copy of a run's folder; resuming from its last.ckpt continues in this folder."""
    return Path(shutil.copytree(run, tmp_path / "tiny" / "version_0"))


def resume(run, *flags):
    main(["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--trainer.default_root_dir={run.parents[1]}", *flags])


def test_the_temporary_file_of_a_killed_run_is_removed(resumable):
    (resumable / "checkpoints" / ".tmp.last.ckpt.123").write_bytes(b"half")
    resume(resumable, "--trainer.max_steps=6")
    assert {file.name for file in (resumable / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize("loss, replaced", [(0.5, False), (9.0, True), (None, True)])
def test_a_resumed_run_replaces_best_only_by_a_better_one(resumable, loss, replaced):
    best = resumable / "checkpoints" / "best.ckpt"
    write_checkpoint(read_checkpoint(best) | {"val_loss": loss}, best)
    if loss is None:  # damaged
        best.write_bytes(best.read_bytes()[:-1000])
    before = best.read_bytes()
    resume(resumable, "--trainer.max_steps=6")
    assert (best.read_bytes() != before) == replaced


def test_a_checkpoint_between_validations_has_no_val_loss(tmp_path, text_file):
    flags = ["--trainer.val_check_interval=2", "--save_every_n_steps=3", "--trainer.max_steps=4"]
    seen = {}

    class Spy(AsyncCheckpointIO):
        def write(self, checkpoint, path, ready):
            seen[path.name, checkpoint["global_step"]] = checkpoint["val_loss"]
            super().write(checkpoint, path, ready)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "AsyncCheckpointIO", Spy)
        fit(*flags, corpus=text_file, root=tmp_path)
    assert {at: math.isnan(loss) for at, loss in seen.items() if at[0] == "last.ckpt"} == {
        ("last.ckpt", 2): False,
        ("last.ckpt", 3): True,
        ("last.ckpt", 4): False,
    }


class MakeWeightsNaN(L.Callback):
    """Makes the weights NaN after step 3, before any loss can show it."""

    def on_train_batch_end(self, trainer, lm, *_):
        if trainer.global_step == 3:
            lm.net.wte.weight.data.fill_(math.nan)


@pytest.mark.parametrize("flags", [["--save_every_n_steps=1"], ["--trainer.val_check_interval=3"]])
def test_nan_weights_are_never_saved_and_the_last_good_file_is_named(tmp_path, text_file, capsys, flags):
    args = [f"--trainer.callbacks=[{{class_path: {__name__}.MakeWeightsNaN}}]", "--trainer.max_steps=9", *flags]
    with pytest.raises(SystemExit) as stop:
        fit(*args, corpus=text_file, root=tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "the weights became NaN or infinite at step 3" in error
    if "--save_every_n_steps=1" in flags:
        assert "The last good checkpoint is" in error and "last.ckpt, of step 2" in error
        assert read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] == 2
    else:
        assert not list(tmp_path.rglob("*.ckpt")) and "last good" not in error


class MakeAverageNaN(L.Callback):
    def on_train_batch_end(self, trainer, lm, *_):
        if trainer.global_step == 3:
            lm.ema_net.wte.weight.data.fill_(math.nan)


def test_a_nan_val_loss_stops_the_run(tmp_path, text_file, capsys):
    flags = [f"--trainer.callbacks=[{{class_path: {__name__}.MakeAverageNaN}}]", "--model.ema_decay=0.5"]
    with pytest.raises(SystemExit) as stop:
        fit(*flags, "--trainer.val_check_interval=3", "--trainer.max_steps=9", corpus=text_file, root=tmp_path)
    assert stop.value.code == 1 and "val/loss became nan at step 3" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_after_a_failed_save_of_best_the_next_loss_is_saved_as_best(tmp_path, monkeypatch):
    class Trainer(SimpleNamespace):
        def save_checkpoint(self, path):
            attempts.append(path.name)

    attempts, saver = [], CheckpointSaver(tmp_path, 0)
    lm, io = SimpleNamespace(check_divergence=lambda: None), SimpleNamespace(failed={})
    strategy = SimpleNamespace(broadcast=lambda x: x, checkpoint_io=io)
    trainer = Trainer(lightning_module=lm, strategy=strategy, fast_dev_run=False, loggers=[], is_global_zero=True)
    for step, loss, failed in (1, 2.0, {}), (2, 3.0, {saver.best: OSError()}):
        trainer.global_step, saver.val_loss, io.failed = step, loss, failed
        saver.val_step = trainer.global_step
        saver.on_step_done(trainer)
    assert attempts == ["best.ckpt", "last.ckpt"] * 2  # 3.0 is saved as best, since saving 2.0 failed
    saver.on_step_done(trainer)
    assert len(attempts) == 4  # once per step


class SendSignal(L.Callback):
    handlers: list = []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and not self.handlers:
            if "SLURM_JOB_ID" in os.environ:
                assert callable(signal.getsignal(signal.SIGUSR1))
            os.kill(os.getpid(), signal.SIGUSR1 if "SLURM_JOB_ID" in os.environ else signal.SIGTERM)
            self.handlers += [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("slurm", [False, True])
def test_a_signal_stops_the_run_once_and_leaves_no_handler(tmp_path, text_file, monkeypatch, slurm):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    monkeypatch.setattr(SendSignal, "handlers", [])
    (monkeypatch.setenv("SLURM_JOB_ID", "1") if slurm else monkeypatch.delenv("SLURM_JOB_ID", raising=False))
    with pytest.raises(SystemExit) as stop:
        fit(f"--trainer.callbacks=[{{class_path: {__name__}.SendSignal}}]", corpus=text_file, root=tmp_path)
    assert stop.value.code == 128 + (signal.SIGUSR1 if slurm else signal.SIGTERM)
    assert read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] == 4
    assert SendSignal.handlers == [signal.SIG_DFL] * 2  # a second signal ends it at once
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_run_works_in_another_thread(tmp_path, text_file):
    done = []
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    thread = threading.Thread(target=lambda: done.append(main(["fit", *TINY, *paths])))
    thread.start(), thread.join()
    assert done == [None] and list(tmp_path.rglob("best.ckpt"))


class FailAfterValidation(L.Callback):
    def on_validation_end(self, trainer, *_):
        if trainer.global_step == 2:
            raise ValueError("a callback's own\nlines")


def test_a_validated_step_is_saved_if_a_callback_fails_after_it(tmp_path, text_file, capsys):
    flags = ["--trainer.val_check_interval=2", f"--trainer.callbacks=[{{class_path: {__name__}.FailAfterValidation}}]"]
    with pytest.raises(SystemExit) as stop:
        fit(*flags, corpus=text_file, root=tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "last.ckpt, of step 2" in error and "Traceback" not in error
    for name in "best", "last":
        checkpoint = read_checkpoint(tmp_path / f"tiny/version_0/checkpoints/{name}.ckpt")
        assert checkpoint["global_step"] == 2 and math.isfinite(checkpoint["val_loss"])


class TearWeights(L.Callback):
    """Makes an optimizer step fail halfway: some weights are updated, the others are not."""

    def on_train_start(self, trainer, *_):
        def step(closure):
            closure()
            if trainer.global_step == 3:
                raise RuntimeError("torn")

        trainer.optimizers[0].step = step


def test_an_incomplete_update_is_not_saved(tmp_path, text_file):
    with pytest.raises(RuntimeError, match="torn"):
        fit(f"--trainer.callbacks=[{{class_path: {__name__}.TearWeights}}]", corpus=text_file, root=tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


# --- a folder for each run --------------------------------------------------------------------------------------------


def test_runs_that_start_together_get_separate_folders(tmp_path):
    together = threading.Barrier(8)

    def start(_):
        together.wait()
        return create_run_folder(tmp_path / "tiny")

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(start, range(8)))
    assert folders == {tmp_path / "tiny" / f"version_{n}" for n in range(8)}
    (tmp_path / "tiny" / "version_11").touch()
    assert create_run_folder(tmp_path / "tiny").name == "version_12"


def test_two_processes_never_train_in_one_folder(resumable, fails):
    lock = lock_run_folder(resumable)
    before = {file: file.read_bytes() for file in resumable.rglob("*") if file.is_file()}
    flags = [f"--trainer.default_root_dir={resumable.parents[1]}", "--trainer.max_steps=6"]
    error = fails("fit", f"--ckpt_path={resumable}/checkpoints/last.ckpt", *flags)
    assert "another process trains in" in error and "version_0" in error
    assert {file: file.read_bytes() for file in resumable.rglob("*") if file.is_file()} == before
    os.close(lock)
    main(["fit", f"--ckpt_path={resumable}/checkpoints/last.ckpt", *flags])  # at its end, this run releases its lock:
    os.close(lock_run_folder(resumable))


def test_validate_and_fast_dev_run_create_no_folder(ckpt, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["validate", f"--ckpt_path={ckpt}", f"--trainer.default_root_dir={tmp_path}/a"])
    fit("--trainer.fast_dev_run=true", corpus=text_file, root=tmp_path / "b")
    assert not list(tmp_path.iterdir())


# --- a full disk ------------------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size):
    """No file can grow beyond `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_event_file_holds_complete_records_only_and_catches_up_when_there_is_room(tmp_path, capsys):
    path, records = tmp_path / "events", [bytes([n]) * 100 for n in range(9)]
    path.touch()
    file = BufferedEventFile(str(path), most=450)
    file.SECONDS = 0.0
    file.write(records[0])
    with file_size_limit(250):
        for record in records[1:]:
            file.write(record)
        file.flush()
        assert path.read_bytes() == b"".join(records[:2])  # the third record does not fit completely
    file.close()
    assert path.read_bytes() == b"".join(records[:6])
    error = capsys.readouterr().err
    assert error.count("Training continues") == 1 and error.count("works again, but 3 records are lost") == 1
    with file_size_limit(650):
        file.write(records[6])
        file.close()
    assert path.read_bytes() == b"".join(records[:6]) and "1 records of the curves are lost" in capsys.readouterr().err


class FillDisk(L.Callback):
    """Keeps the disk full from step 4 to step 9."""

    filler: Path

    def on_step_done(self, trainer):
        if trainer.global_step == 4:
            trainer.strategy.checkpoint_io.wait()
            for size in 2**16, 1:
                with suppress(OSError), open(self.filler, "ab", buffering=0) as file:
                    while file.write(b"x" * size):
                        pass
        elif trainer.global_step == 5:
            print("." * 5000, flush=True)  # more than is left of the log file's last page
            print("." * 5000, file=sys.stderr, flush=True)
        elif trainer.global_step == 9:
            self.filler.unlink()


@pytest.fixture
def disk(tmp_path):
    """A disk of 2 MiB."""
    (tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "disk")]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_full_disk_does_not_stop_training_and_loses_no_curve(disk, text_file, monkeypatch):
    monkeypatch.setattr(FillDisk, "filler", disk / "filler", raising=False)
    flags = ["--save_every_n_steps=2", "--trainer.val_check_interval=3", "--trainer.max_steps=12"]
    flags += ["--trainer.log_every_n_steps=1", f"--trainer.callbacks=[{{class_path: {__name__}.FillDisk}}]"]
    with open(disk / "log.txt", "w") as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", log)  # the log is on the full disk
        patch.setattr(sys, "stderr", log)
        fit(*flags, corpus=text_file, root=disk / "runs")
    (run,) = disk.glob("runs/tiny/*")
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 12
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(12))
    assert "no record is lost" in (disk / "log.txt").read_text()


def test_a_disk_without_any_room_does_not_stop_training(tmp_path, text_file, capsys):
    with file_size_limit(300), pytest.raises(SystemExit) as stop:
        fit(corpus=text_file, root=tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "training finished, but its last state could not be saved to" in error
    assert "config.yaml could not be written" in error and "records of the curves are lost" in error
    assert not list(tmp_path.rglob("config*")) and not list(tmp_path.rglob("hparams.yaml"))  # not even a part of one


def test_output_is_replaced_completely_or_not_at_all(ckpt, tmp_path, capsys):
    file, link = tmp_path / "out.txt", tmp_path / "link.txt"
    file.write_text("what was there")
    file.chmod(0o640)
    link.symlink_to(file)
    args = ["generate", f"--ckpt_path={ckpt}", "--max_new_tokens=30", f"--output={link}"]
    with file_size_limit(10), pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 1 and "intact" in capsys.readouterr().err
    assert file.read_text() == "what was there" and {f.name for f in tmp_path.iterdir()} == {"out.txt", "link.txt"}
    main(args)
    assert len(file.read_text()) > 30 and link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
    pipe = tmp_path / "pipe"  # not a device: if this failed, root would replace it
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    main([*args[:-1], f"--output={pipe}"])
    assert os.read(reader, 1000).decode() == file.read_text() and pipe.is_fifo()
    os.close(reader)


def test_running_out_of_memory_in_a_save_is_reported_and_stops_nothing(tmp_path, capfd):
    checkpoint = PARTS | {"state_dict": {"w": torch.zeros(2**28)}}  # 1 GiB: more than is free in the heap
    pid = os.fork()
    if not pid:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        io = AsyncCheckpointIO()
        for spare in 20, 1100:  # too few MiB for the copy; enough for the copy, too few for the file
            resource.setrlimit(resource.RLIMIT_AS, (size + spare * 2**20, resource.RLIM_INFINITY))
            io.save_checkpoint(checkpoint, tmp_path / f"{spare}.ckpt")
            io.wait()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        io.save_checkpoint(PARTS | {"state_dict": {"w": torch.zeros(2)}}, tmp_path / "20.ckpt")
        io.wait()
        sys.stderr.flush()
        os._exit(0 if set(io.failed) == {tmp_path / "1100.ckpt"} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    error = capfd.readouterr().err
    assert "20.ckpt could not be saved at step 1: out of memory" in error and "1100.ckpt could not be saved" in error
    assert torch.load(tmp_path / "20.ckpt", weights_only=True)["global_step"] == 1


# --- output -----------------------------------------------------------------------------------------------------------


def test_a_terminal_that_lacks_a_character_stops_nothing(tmp_path, monkeypatch):
    corpus, printed = tmp_path / "emoji.txt", io.BytesIO()
    corpus.write_text("Łódź 🙂 — naïve\n" * 100, encoding="utf-8")
    terminal = io.TextIOWrapper(printed, encoding="latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        fit("--trainer.val_check_interval=2", corpus=corpus, root=tmp_path)
        main(["generate", f"--ckpt_path={next(tmp_path.rglob('best.ckpt'))}", "--prompt=🙂", "--max_new_tokens=9"])
    terminal.flush()
    text = printed.getvalue().decode("latin-1")
    assert "\\U0001f642" in text and "Next:" in text


def test_no_file_is_read_or_written_in_the_locales_encoding():
    for path in Path(lightning_gpt.__file__).parent.rglob("*.py"):
        for call in filter(lambda node: isinstance(node, ast.Call), ast.walk(ast.parse(path.read_text("utf-8")))):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if ast.unparse(call.func) == "read_text":  # our function, which reads UTF-8 only
                continue
            of_text = name in ("read_text", "write_text") or name == "open" and isinstance(call.func, ast.Name)
            explicit = {arg.value for arg in call.args if isinstance(arg, ast.Constant)} & {"utf-8", "rb", "wb", "ab"}
            explicit |= {keyword.arg for keyword in call.keywords} & {"encoding"}
            assert explicit or not of_text, f"{path.name}, line {call.lineno}: {ast.unparse(call)}"


# --- monitors ---------------------------------------------------------------------------------------------------------


def test_a_monitor_must_be_the_name_of_a_logged_metric(tmp_path, text_file, fails):
    watch = "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: %s}}]"
    flags = [*TINY, f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", "--model.optimizer=muon"]
    error = fails("fit", *flags, watch % "val_loss", "--trainer.log_every_n_steps=2")
    names = error.split("give one of ")[1].split(", ")
    assert "monitor=val_loss is not logged" in error
    late = fails("fit", *flags, watch % "train/loss", "--trainer.val_check_interval=2")  # first logged after 50 steps
    assert "is first logged after the first validation" in late and "train/lr" not in late.split("give one of ")[1]
    assert not list(tmp_path.iterdir())
    main(["fit", *flags, watch % "val/bpc", "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=2"])
    board = EventAccumulator(str(tmp_path / "tiny" / "version_0")).Reload()
    others = ("epoch", "perf/", "samples/", "update_ratio/")
    assert set(names) == {tag for tag in board.Tags()["scalars"] if not tag.startswith(others)}


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events, path, fsync, replace = [], tmp_path / "x.ckpt", os.fsync, os.replace
    sizes = []

    def recording_fsync(fd):
        name = Path(os.readlink(f"/proc/self/fd/{fd}"))
        events.append("folder" if name == tmp_path else name.name)
        sizes.append(os.fstat(fd).st_size)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_checkpoint(PARTS, path)
    assert events == [f".tmp.x.ckpt.{os.getpid()}", "replace", "folder"]
    assert sizes[0] == path.stat().st_size


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"?" + data[1:], lambda data: data[:-71]])
def test_a_checkpoint_that_does_not_read_back_is_not_renamed(tmp_path, monkeypatch, spoil):
    path, read = tmp_path / "x.ckpt", Path.read_bytes
    write_checkpoint(PARTS, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda file: spoil(read(file)))
        with pytest.raises(OSError, match="does not read back"):
            write_checkpoint(PARTS | {"global_step": 2}, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_checkpoint_whose_checksum_was_cut_off_is_refused(ckpt, tmp_path):
    torch.save(read_checkpoint(ckpt), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="checksum is missing"):
        read_verified(tmp_path / "x.ckpt")


def test_a_flipped_bit_in_the_checkpoint_of_a_plain_trainer_is_detected(ckpt, tmp_path):
    path, checkpoint = tmp_path / "x.ckpt", read_checkpoint(ckpt)
    torch.save({key: value for key, value in checkpoint.items() if key != "format"}, path)
    read_verified(path)
    data = bytearray(path.read_bytes())
    data[data.index(checkpoint["state_dict"]["net.wte.weight"].numpy().tobytes()) + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_verified(path)


def test_the_suggested_checkpoint_is_the_newest_good_one_of_any_run(ckpt, tmp_path, monkeypatch):
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
        read_checkpoint("elsewhere/bad.ckpt")


def test_a_folder_named_best_ckpt_is_ignored(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path := tmp_path / "checkpoints").mkdir()
    (tmp_path / "a").mkdir()
    shutil.copy(ckpt, tmp_path / "a" / "best.ckpt")
    os.utime(tmp_path / "a" / "best.ckpt", (1000, 1000))
    (tmp_path / "b" / "best.ckpt").mkdir(parents=True)
    assert find_checkpoint("best") == Path("checkpoints/a/best.ckpt")


def test_infinite_weights_are_not_loaded(ckpt, tmp_path):
    checkpoint = read_checkpoint(ckpt)
    checkpoint["state_dict"]["net.wte.weight"][0, 0] = math.inf
    write_checkpoint(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_net(tmp_path / "x.ckpt")


# --- settings ---------------------------------------------------------------------------------------------------------


class Config(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    "path, name, root, resumes",
    [
        ("r/tiny/version_0/checkpoints/last.ckpt", "tiny", "r", True),
        ("r/tiny/version_0/checkpoints/last.ckpt", "tiny", "checkpoints", True),  # the default root
        ("r/tiny/version_0/checkpoints/last.ckpt", "tiny", "else", False),
        ("r/tiny/version_0/checkpoints/last.ckpt", "other", "r", False),
        ("r/tiny/version_0/checkpoints/best.ckpt", "tiny", "r", False),
        ("r/tiny/version_0/copies/last.ckpt", "tiny", "r", False),
        ("r/tiny/mine/checkpoints/last.ckpt", "tiny", "r", False),
        ("r/tiny/version_0b/checkpoints/last.ckpt", "tiny", "r", False),
    ],
)
def test_a_run_resumes_in_its_folder_only_if_name_root_and_file_match(path, name, root, resumes):
    config = Config(trainer=Config(default_root_dir=root), name=name, data={"split": (0.8, 0.9)})
    assert resumes_in_place(config, {"data": {"split": [0.8, 0.9]}}, Path(path)) == resumes


@pytest.mark.parametrize(
    "flag",
    ["--trainer.max_steps=0", "--trainer.val_check_interval=0.5", "--trainer.accumulate_grad_batches=0", "--name=.."],
)
def test_invalid_settings_are_refused_before_a_folder_is_created(tmp_path, fails, text_file, flag):
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}/a/b"]
    assert flag.removeprefix("--").split("=")[0] in fails("fit", *TINY, *paths, flag)
    assert not list(tmp_path.iterdir())


# --- losses and curves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate, bad_from, step", [(1, 3, 3), (2, 5, 3), (2, 6, 3), (4, 9, 3)])
def test_the_step_of_the_first_bad_loss_is_known_later(accumulate, bad_from, step):
    lm = LanguageModel(block_size=8, n_layer=0, n_head=1, n_embd=4)
    lm.bad_losses, steps = torch.zeros((), dtype=torch.int64), 5
    reduce = SimpleNamespace(reduce=lambda x, **_: x)
    rates = SimpleNamespace(param_groups=[group | {"lr": 1.0} for group in lm.parameter_groups()])
    counts = {"accumulate_grad_batches": accumulate, "global_step": steps, "estimated_stepping_batches": 9}
    lm._trainer = SimpleNamespace(**counts, strategy=reduce, optimizers=[rates], lr_scheduler_configs=[])
    for batch in range(1, steps * accumulate + 1):
        lm.train_loss = lambda batch=batch: torch.tensor(math.nan if batch >= bad_from else 1.0)
        lm.training_step((), 0)
    with pytest.raises(DivergenceError, match=f"at step {step},"):
        lm.check_divergence()


def test_a_bad_loss_stops_training_at_once_on_the_cpu(tmp_path, text_file, capsys):
    flags = "--trainer.max_steps 30 --trainer.log_every_n_steps 50 --model.learning_rate 1e30 --model.warmup_steps 0"
    watch = f"--trainer.callbacks=[{{class_path: {__name__}.CountBatches}}]"
    CountBatches.batches = 0
    with pytest.raises(SystemExit):
        fit(*flags.split(), watch, corpus=text_file, root=tmp_path)
    assert "at step 2," in capsys.readouterr().err and CountBatches.batches == 2


class CountBatches(L.Callback):
    batches = 0

    def on_train_batch_start(self, *_):
        CountBatches.batches += 1


def test_a_resumed_run_without_validation_logs_every_step(tmp_path, text_file):
    flags = ["--trainer.val_check_interval=4", "--save_every_n_steps=0", "--trainer.log_every_n_steps=1"]
    fit("--trainer.max_steps=4", *flags, "--trainer.limit_val_batches=0", corpus=text_file, root=tmp_path)
    (run,) = tmp_path.glob("tiny/version_*")
    resume(run, "--trainer.max_steps=8")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert sorted(event.step for event in board.Scalars("train/loss")) == list(range(8))


def test_a_curve_resumed_from_an_older_save_has_every_step_once(tmp_path, text_file):
    with pytest.raises(SystemExit):
        fit(
            "--trainer.log_every_n_steps=1",
            "--save_every_n_steps=4",
            "--trainer.max_steps=9",
            f"--trainer.callbacks=[{{class_path: {__name__}.FailAtStep8}}]",
            corpus=text_file,
            root=tmp_path,
        )
    (run,) = tmp_path.glob("tiny/version_*")
    resume(run, "--trainer.max_steps=9", "--trainer.callbacks=null")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(9))  # every step exactly once


class FailAtStep8(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 7:
            raise DivergenceError("this step is not saved")


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, message",
    [
        (OSError(28, "No space left"), 1, "free some space"),
        (OSError(2, "No such file"), 2, "No such file"),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out"), 1, "out of memory"),
        (DivergenceError("bad"), 1, "error: bad. Go back"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_error_has_its_exit_code(error, code, message, capfd):
    if isinstance(error, DivergenceError):
        error.add_note("Go back")

    def fails(*_, **__):
        raise error

    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as nowhere:
        patch.setattr(sys, "stdout", nowhere)
        run(lambda args: train(args, fails), [])
    assert stop.value.code == code and message in capfd.readouterr().err


def test_ngram_dropout_drops_complete_tokens_and_in_training_only(idx):
    torch.manual_seed(0)
    config = dict(dropout=0.0, ngram_max=3, ngram_buckets=50, ngram_dropout=0.4)
    net = GPT(GPTConfig(V, T, n_layer=0, n_head=1, n_embd=16, **config)).double()
    idx = idx.repeat(300, 1)
    plain = net.wte(idx) + net.wpe.weight
    grams = net.ngram_embeddings(idx)
    for training in True, False:
        ratio = (net.train(training).features(idx) - plain) / grams  # (B, T, C), the same for all channels
        kept = ratio[..., :1] * torch.ones(16)
        torch.testing.assert_close(ratio, kept, rtol=0, atol=1e-6)
        values = ratio[..., 0]
        if training:
            assert {0.0, round(1 / 0.6, 4)} == {round(v, 4) + 0.0 for v in values.flatten().tolist()}
            assert (values == 0).double().mean().item() == pytest.approx(0.4, abs=0.03)
            assert 0 < (values[0] == 0).sum() < T
        else:
            torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-9)


def test_the_checksum_is_the_archives_comment(tmp_path):
    write_checkpoint(PARTS, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.comment == (tmp_path / "x.ckpt").read_bytes()[-71:]


def test_a_sanity_check_does_not_count_as_a_validation(tmp_path, text_file):
    before = signal.getsignal(signal.SIGINT)
    fit("--trainer.num_sanity_val_steps=2", "--trainer.limit_val_batches=2", corpus=text_file, root=tmp_path)
    assert list(tmp_path.rglob("best.ckpt")) and signal.getsignal(signal.SIGINT) == before


class RecordSteps(L.Callback):
    seen: list = []

    def on_step_done(self, trainer):
        self.seen.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))


def test_on_step_done_is_called_after_the_last_batch_of_a_step(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(RecordSteps, "seen", [])
    flags = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4", "--trainer.max_steps=5"]
    fit(*flags, f"--trainer.callbacks=[{{class_path: {__name__}.RecordSteps}}]", corpus=text_file, root=tmp_path)
    assert RecordSteps.seen == [(step, 3 * step) for step in range(1, 5)]
