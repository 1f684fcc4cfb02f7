"""An interrupted run loses nothing that was saved, and the resumed run equals the unbroken one bit for bit."""

import io
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import lightning as L
import pytest
import torch
import yaml
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import capture_parser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli_options import TEXTS

from lightning_gpt.checkpoint.io import load_net, read_checkpoint, read_verified, write_checkpoint
from lightning_gpt.cli.main import main
from lightning_gpt.cli.parser import types_of
from lightning_gpt.data.datamodule import TextDataModule
from lightning_gpt.inference.engine import generate_ids
from lightning_gpt.training import strategies
from lightning_gpt.training.checkpointing import AsyncCheckpointIO
from lightning_gpt.training.strategies import die_with_parent, export_launcher_pid

# everything with a state: dropout, accumulation, Muon, weight average, schedule; validations between checkpoints
STATEFUL = {
    "trainer": {"max_steps": 60, "val_check_interval": 14, "accumulate_grad_batches": 2, "log_every_n_steps": 1},
    "model": {"optimizer": "muon", "ema_decay": 0.9, "schedule": "wsd", "norm": "rmsnorm", "position": "rope"},
    "sample": {"length": 9},
    "save_every_n_steps": 3,
}


@pytest.fixture(scope="module")
def stateful(tmp_path_factory, launcher, text_file):
    """The command line of a run with every kind of state, and the folder of its unbroken run."""
    folder = tmp_path_factory.mktemp("hard")
    (folder / "hard.yaml").write_text(yaml.safe_dump(STATEFUL))
    args = ["fit", *TINY, "--config", folder / "hard.yaml", "--data.corpus", text_file]
    assert launcher.run(folder, *args) == 0, launcher.log.read_text()
    return args, folder


def differences(a, b, where=""):
    """The paths at which two nested structures of dicts, lists, tensors and values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}/{key}" for key in a.keys() ^ b.keys()]
        return missing + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    return [] if a == b or (a != a and b != b) else [f"{where}: {a} and {b}"]


def final_state(folder):
    """The complete result of a run: weights, optimizer, counters, best checkpoint, curves."""
    (path,) = folder.glob("checkpoints/tiny/version_*/checkpoints/last.ckpt")
    run, last, best = path.parents[1], *map(read_verified, (path, path.with_name("best.ckpt")))
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("perf/")]
    curves = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}
    for tag in board.Tags()["tensors"]:
        if tag.startswith("samples/"):
            # by step: unlike TensorBoard, EventAccumulator keeps a text that a resumed run has logged again
            curves[tag] = sorted({event.step: event.tensor_proto.string_val[0] for event in board.Tensors(tag)}.items())
    parts = ("state_dict", "optimizer_states", "loops", "global_step", "val_loss")
    return {
        "last": {part: last[part] for part in parts},
        "best": {part: best[part] for part in parts},
        "curves": curves,
    }


def run_with_kills(launcher, folder, args, end, delays):
    """Run and resume until the run finishes, sending `end` after each of `delays`; return the number of kills."""
    kills = 0
    while True:
        checkpoints = list(folder.glob("checkpoints/**/last.ckpt"))
        pid = launcher.start(folder, *(["fit", "--ckpt_path", "last"] if checkpoints else args))
        delay = next(delays, None)
        if delay is None:
            code = launcher.end()
            assert code == 0 or "leaves nothing to do" in launcher.log.read_text(), launcher.log.read_text()
            return kills
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it had finished
            os.kill(pid, end)
        code = launcher.end()
        if code == (-end if end == signal.SIGKILL else 128 + end):  # the signal came during training
            kills += 1
        if code == -signal.SIGKILL:
            for file in folder.glob("checkpoints/**/*.ckpt"):
                read_verified(file)  # every file is complete
        elif code == 128 + end:
            lines = launcher.log.read_text()
            step = int(lines.rsplit("after step ", 1)[1].split(",")[0])
            (file,) = folder.glob("checkpoints/**/last.ckpt")
            assert read_verified(file)["global_step"] == step, "a step was lost"
        else:
            assert code in (0, 2, -end), launcher.log.read_text()  # it had finished, or had not started to train


def check_kills(launcher, stateful, tmp_path, end, times, seed):
    args, unbroken = stateful
    expected, rng, kills, attempt = final_state(unbroken), random.Random(seed), 0, 0
    while kills < times:
        folder = tmp_path / str(attempt)
        folder.mkdir()
        kills += run_with_kills(launcher, folder, args, end, iter([rng.uniform(0.5, 2.0) for _ in range(3)]))
        assert differences(final_state(folder), expected) == []
        shutil.rmtree(folder)
        attempt += 1
    return kills


@pytest.mark.parametrize("times", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkill_loses_nothing_that_was_saved(launcher, stateful, tmp_path, times):
    check_kills(launcher, stateful, tmp_path, signal.SIGKILL, times, seed=1)


@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_sigterm_loses_no_step(launcher, stateful, tmp_path, times):
    check_kills(launcher, stateful, tmp_path, signal.SIGTERM, times, seed=2)


# a validation is due at steps 7 and 14, a checkpoint at step 9
@pytest.mark.parametrize("step", [7, pytest.param(9, marks=pytest.mark.slow), pytest.param(14, marks=pytest.mark.slow)])
def test_a_resumed_curve_has_every_step_once(launcher, stateful, tmp_path, step):
    args, unbroken = stateful
    assert launcher.run(tmp_path, *args, f"--trainer.max_steps={step}") == 0, launcher.log.read_text()
    assert launcher.run(tmp_path, "fit", "--ckpt_path", "last", "--trainer.max_steps=20") == 0, launcher.log.read_text()
    assert [step for step, _ in final_state(tmp_path)["curves"]["train/loss"]] == list(range(20))


def test_resuming_twice_keeps_the_folder_and_every_file_in_it(launcher, stateful, tmp_path):
    args, unbroken = stateful
    before = {}
    for i, steps in enumerate((20, 40, 60)):
        flags = (
            ["fit", "--ckpt_path", "last", f"--trainer.max_steps={steps}"]
            if i
            else [*args, f"--trainer.max_steps={steps}"]
        )
        assert launcher.run(tmp_path, *flags) == 0, launcher.log.read_text()
        (folder,) = tmp_path.glob("checkpoints/tiny/version_*")
        kept = {file: file.read_bytes() for file in folder.glob("*") if file.is_file()}
        assert before.items() <= kept.items()
        before = kept
    names = {"config.yaml", "config_from_step_20.yaml", "config_from_step_40.yaml"}
    assert {file.name for file in folder.glob("config*")} == names
    assert [step for step, _ in final_state(tmp_path)["curves"]["train/loss"]] == list(range(60))


def test_another_checkpoint_file_or_other_data_start_a_new_run(launcher, stateful, tmp_path, text_file):
    args, unbroken = stateful
    shutil.copytree(unbroken / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "tiny" / "version_0" / "checkpoints"
    shutil.copy(folder / "last.ckpt", tmp_path / "mine.ckpt")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    more = ["--trainer.max_steps", "62"]
    for i, source in enumerate((["mine.ckpt"], [folder / "best.ckpt"], ["last", "--data.corpus", other]), start=1):
        assert launcher.run(tmp_path, "fit", "--ckpt_path", *source, *more) == 0, launcher.log.read_text()
        assert (tmp_path / "checkpoints" / "tiny" / f"version_{i}").is_dir()
        shutil.rmtree(tmp_path / "checkpoints" / "tiny" / f"version_{i}" / "checkpoints")


class FailAtHook(L.Callback):
    """Raises an error in the given hook at the given step."""

    def __init__(self, hook: str, step: int):
        def fail(trainer, *_):
            if trainer.state.fn == "fit" and trainer.global_step == step:
                raise RuntimeError("a callback's own")

        setattr(self, hook, fail)


HOOKS = [("on_before_backward", 5), ("on_validation_batch_end", 14), ("on_before_optimizer_step", 31)]
MORE = [("on_train_batch_start", 3), ("on_validation_start", 7), ("on_validation_epoch_end", 21), ("on_step_done", 35)]


@pytest.mark.parametrize("hooks", [HOOKS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_an_exception_in_any_hook_loses_no_step_and_the_resumed_run_is_bitwise_equal(
    stateful, tmp_path, monkeypatch, hooks
):
    args, unbroken = stateful
    monkeypatch.chdir(tmp_path)
    for attempt, (hook, step) in enumerate(hooks):
        init = f"{{hook: {hook}, step: {step}}}"
        callback = f"--trainer.callbacks=[{{class_path: {__name__}.FailAtHook, init_args: {init}}}]"
        with pytest.raises(RuntimeError, match="own") as raised:
            main([*(["fit", "--ckpt_path=last"] if attempt else map(str, args)), callback])
        (last,) = tmp_path.glob("checkpoints/tiny/version_*/checkpoints/last.ckpt")
        assert read_verified(last)["global_step"] == step
        assert raised.value.__notes__ == [f"The last good checkpoint is {last.relative_to(tmp_path)}, of step {step}"]
    main(["fit", "--ckpt_path=last", "--trainer.callbacks=null"])  # otherwise the failing callback would be restored
    assert differences(final_state(tmp_path), final_state(unbroken)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its parent dies")
@pytest.mark.parametrize("launcher_name", ["Lightning", "torchrun"])
def test_a_rank_ends_if_its_launcher_died_during_the_import(launcher_name):
    reading_end, writing_end = os.pipe()
    starter = os.fork()
    if not starter:
        export_launcher_pid()
        parent = os.getpid()
        if not os.fork():  # a rank whose launcher dies while it imports
            os.environ["LOCAL_RANK"] = "1"
            if launcher_name == "torchrun":
                os.environ["TORCHELASTIC_RUN_ID"] = "test"
                strategies.STARTED = os.getpid(), parent
            while os.getppid() == parent:
                time.sleep(0.01)
            os.write(writing_end, b"imported")
            die_with_parent()
            os.write(writing_end, b" and trains")
        os._exit(0)
    os.waitpid(starter, 0)
    os.close(writing_end)
    with open(reading_end, "rb") as pipe:
        assert pipe.read() == b"imported"


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_full_disk_loses_nothing_that_was_saved(launcher, stateful, tmp_path, times):
    args, unbroken = stateful
    size = next(unbroken.glob("checkpoints/**/last.ckpt")).stat().st_size
    for i in range(times):
        folder = tmp_path / str(i)
        shutil.copytree(unbroken, folder)
        files = {file: file.read_bytes() for file in folder.glob("checkpoints/**/*.ckpt")}
        limit = size // 2 + i * (size // 2) // times  # between half the file and almost all of it
        more = ["--trainer.max_steps", "66", "--model.learning_rate", "0.1"]
        code = launcher.run(folder, "fit", "--ckpt_path", "last", *more, limit=limit)
        log = launcher.log.read_text()
        assert code == 1 and "last.ckpt could not be saved at step 63" in log and "Traceback" not in log
        assert "but its last state could not be saved to" in log
        assert {file: file.read_bytes() for file in folder.glob("checkpoints/**/*.ckpt*")} == files
        shutil.rmtree(folder)


def test_after_a_failed_save_the_next_one_succeeds(tmp_path):
    checkpoint = {"state_dict": {}, "hyper_parameters": {}, "datamodule_hyper_parameters": {}, "global_step": 1}
    path, io = tmp_path / "last.ckpt", AsyncCheckpointIO()
    path.mkdir()  # a path that can't be written
    io.save_checkpoint(checkpoint, path)
    io.wait()
    assert path in io.failed
    path.rmdir()
    io.save_checkpoint(checkpoint | {"global_step": 2}, path)
    io.teardown()
    assert not io.failed and torch.load(path, weights_only=True)["global_step"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]  # no temporary file is left


def test_an_async_save_writes_the_state_at_the_time_of_the_call(tmp_path):
    weight, io = torch.zeros(1000), AsyncCheckpointIO()
    for step in range(20):
        weight.fill_(step)
        io.save_checkpoint(
            {"state_dict": {"w": weight}, "hyper_parameters": {}, "datamodule_hyper_parameters": {}},
            tmp_path / f"{step}",
        )
        weight.fill_(-1)
    io.teardown()
    for step in range(20):
        assert (torch.load(tmp_path / f"{step}", weights_only=True)["state_dict"]["w"] == step).all()


@pytest.mark.parametrize("every, interval", [(1, 3), (3, 1), (2, 2), (0, 4), (5, 100)])
def test_best_holds_the_weights_of_its_val_loss(tmp_path, text_file, every, interval):
    flags = f"--save_every_n_steps {every} --trainer.val_check_interval {interval} --trainer.max_steps 12"
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", *TINY, "--data.corpus", str(text_file), root, *flags.split(), "--model.learning_rate=0.3"])
    (run,) = tmp_path.glob("tiny/version_*")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    best = read_checkpoint(run / "checkpoints" / "best.ckpt")
    assert best["val_loss"] == pytest.approx(min(event.value for event in board.Scalars("val/loss")), rel=1e-6)
    net, tokenizer = load_net(run / "checkpoints" / "best.ckpt")
    text = text_file.read_text()
    tokens = tokenizer.encode(text[int(0.9 * len(text)) :])
    losses = []
    for window in [tokens[i : i + 17] for i in range(0, len(tokens) - 1, 16)]:
        with torch.no_grad():
            logits = net(window[None, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="none"))
    assert torch.cat(losses).mean().item() == pytest.approx(best["val_loss"], rel=1e-5)


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, text_file, capsys):
    root = f"--trainer.default_root_dir={tmp_path}"
    flags = "--save_every_n_steps 2 --trainer.max_steps 8 --model.schedule linear --model.warmup_steps 0".split()
    main(["fit", *TINY, "--data.corpus", str(text_file), root, *flags])
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        flags = "--trainer.max_steps 30 --model.learning_rate 1e30".split()
        main(["fit", "--ckpt_path", str(last), root, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "NaN or infinite at step 10" in error and "learning_rate" in error
    assert read_checkpoint(last)["global_step"] == 8


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_bytes(stateful):
    """The bytes of a checkpoint."""
    return next(stateful[1].glob("checkpoints/**/last.ckpt")).read_bytes()


def assert_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checkpoint"):
        read_verified(path)


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_truncated_checkpoints_are_refused(good_bytes, tmp_path, times):
    rng = random.Random(0)
    for length in [
        0,
        1,
        22,
        len(good_bytes) - 71,
        len(good_bytes) - 1,
        *(rng.randrange(len(good_bytes)) for _ in range(times)),
    ]:
        assert_refused(tmp_path / "x.ckpt", good_bytes[:length])
    assert_refused(tmp_path / "x.ckpt", good_bytes + b"\0")


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_checkpoints_with_a_flipped_bit_are_refused(good_bytes, tmp_path, times):
    rng = random.Random(0)
    for at in [*range(-90, 0), *(rng.randrange(len(good_bytes)) for _ in range(times))]:  # in the checksum and anywhere
        flipped = bytearray(good_bytes)
        flipped[at] ^= 1 << rng.randrange(8)
        assert_refused(tmp_path / "x.ckpt", bytes(flipped))


class Hostile:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def test_code_in_a_checkpoint_is_not_run(good_bytes, tmp_path):
    marker = tmp_path / "mark"
    payloads = [
        Hostile(os.system, f"touch {marker}"),
        Hostile(exec, f"open({str(marker)!r}, 'w')"),
        Hostile(eval, f"open({str(marker)!r}, 'w')"),
        Hostile(subprocess.Popen, ["touch", str(marker)]),
        Hostile(shutil.copy, __file__, str(marker)),
        Hostile(Path.touch, marker),
    ]
    parts = {"hyper_parameters": {}, "datamodule_hyper_parameters": {}, "state_dict": {}}
    for i, payload in enumerate(payloads):
        zipped, legacy, raw = (tmp_path / f"{i}{suffix}.ckpt" for suffix in "abc")
        torch.save(parts | {"state_dict": {"x": payload}}, zipped)
        torch.save(parts | {"config": payload}, legacy, _use_new_zipfile_serialization=False)
        raw.write_bytes(pickle.dumps(payload))
        with_checksum = tmp_path / f"{i}d.ckpt"
        write_checkpoint(parts | {"x": payload}, with_checksum)  # a checksum does not make a file trusted
        for path in zipped, legacy, raw, with_checksum:
            with pytest.raises(ValueError, match="checkpoint"):
                read_verified(path)
            assert not marker.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 99}, "has format 99, and this lightning-gpt reads 2 and 3"),
        ({"state_dict": None}, "is a PyTorch file, but not a lightning-gpt checkpoint"),
        ({"hyper_parameters": {}}, "does not fit this version"),
    ],
)
def test_a_checkpoint_of_another_format_or_program_is_refused(good_bytes, tmp_path, change, message):
    checkpoint, path = torch.load(io.BytesIO(good_bytes), weights_only=True) | change, tmp_path / "x.ckpt"
    write_checkpoint(checkpoint, path)
    if "format" in change:  # write_checkpoint sets the current format
        torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message):
        load_net(path)


def test_the_error_for_a_damaged_last_names_the_newest_good_checkpoint(stateful, tmp_path, monkeypatch, capsys):
    shutil.copytree(stateful[1] / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (last,) = tmp_path.glob("checkpoints/**/last.ckpt")
    last.write_bytes(last.read_bytes()[:-1000])
    for command in "fit", "validate", "generate":
        with pytest.raises(SystemExit) as stop:
            main([command, "--ckpt_path", "last"])
        assert stop.value.code == 2
        assert (
            capsys.readouterr()
            .err.strip()
            .endswith(f"The newest good one is {last.parent.relative_to(tmp_path)}/best.ckpt")
        )


# --- arbitrary input --------------------------------------------------------------------------------------------------

relaxed = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(max_examples=200, **relaxed)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_corpus_or_are_refused(tmp_path, data):
    path = tmp_path / "corpus.txt"
    path.write_bytes(data)
    try:
        module = TextDataModule(str(path), block_size=3, batch_size=2, name_augmentation=1)
    except ValueError as error:
        assert "\n" not in str(error) and ("corpus" in str(error) or "split has" in str(error))
    else:
        text = module.tokenizer.decode(module.train_tokens.long())
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert lines.startswith(text[: len(module.train_tokens) // 2])


@settings(max_examples=200, **relaxed)
@given(st.text(max_size=30), st.floats(0, 5), st.none() | st.integers(1, 100))
def test_any_prompt_is_continued_or_refused(good_bytes, tmp_path, prompt, temperature, top_k):
    path = tmp_path / "x.ckpt"
    if not path.exists():
        path.write_bytes(good_bytes)
    net, tokenizer = load_net(path)
    try:
        idx = tokenizer.encode(prompt)
    except ValueError as error:
        assert set(prompt) - set(tokenizer.vocabulary) and "this vocabulary of" in str(error)
        return
    if len(idx):
        text = tokenizer.decode(generate_ids(net, idx[None], 20, temperature=temperature, top_k=top_k)[0])
        assert text.startswith(prompt) and len(text) == len(prompt) + 20


@settings(max_examples=300, **relaxed)
@given(st.binary(max_size=500))
def test_any_bytes_are_refused_as_a_checkpoint(tmp_path, data):
    assert_refused(tmp_path / "x.ckpt", data)


@settings(max_examples=100, **relaxed)
@given(st.dictionaries(st.text("abc/.", min_size=1, max_size=5), st.binary(max_size=100), max_size=3))
def test_any_archive_is_refused_as_a_checkpoint(tmp_path, files):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    assert_refused(path, path.read_bytes())


ints = st.integers(-2, 40) | st.sampled_from([10**13, -(10**13)])
floats = st.floats(-0.5, 1.5) | st.sampled_from([float("nan"), float("inf"), 0.0, 1.0])
FLAG_VALUES = {
    "model": dict(n_layer=st.integers(-1, 3), n_head=st.integers(-1, 5), n_embd=ints, block_size=ints)
    | dict(dropout=floats, logit_softcap=floats, ngram_max=st.integers(-1, 5), ngram_buckets=ints, warmup_steps=ints)
    | dict(learning_rate=floats, muon_lr=floats, weight_decay=floats, min_lr_ratio=floats, ema_decay=floats)
    | dict(activation=st.sampled_from(["gelu", "relu2", "swiglu", "?"]), norm=st.sampled_from(["layernorm", "rmsnorm"]))
    | dict(position=st.sampled_from(["learned", "rope"]), optimizer=st.sampled_from(["adamw", "muon"]))
    | dict(qk_norm=st.booleans(), bias=st.booleans(), tie_embeddings=st.booleans(), decay_fraction=floats),
    "data": dict(batch_size=ints, split=floats, name_augmentation=st.integers(-2, 3)),
    "trainer": dict(max_steps=st.integers(-2, 4), val_check_interval=st.integers(-1, 4) | st.floats(0, 1))
    | dict(accumulate_grad_batches=st.integers(-1, 3), gradient_clip_val=st.none() | floats)
    | dict(limit_val_batches=st.integers(-1, 3), log_every_n_steps=st.integers(-1, 3)),
    "sample": dict(length=st.integers(-1, 30), temperature=floats, top_k=st.none() | ints),
}
one_flag = st.sampled_from([(group, name) for group in FLAG_VALUES for name in FLAG_VALUES[group]]).flatmap(
    lambda at: FLAG_VALUES[at[0]][at[1]].map(lambda value: f"--{at[0]}.{at[1]}={'null' if value is None else value}")
)


def trains_or_is_refused(tmp_path, text_file, capsys, args):
    root = f"--trainer.default_root_dir={tmp_path}"
    try:
        main(["fit", *TINY, "--data.corpus", str(text_file), root, "--trainer.max_steps=3", *args])
    except SystemExit as stop:
        error = capsys.readouterr().err.strip()
        assert stop.code in (1, 2) and error.startswith("lightning-gpt: error: ") and "\n" not in error, error
    shutil.rmtree(tmp_path / "tiny", ignore_errors=True)


@settings(max_examples=15, **relaxed)
@given(st.lists(one_flag, min_size=1, max_size=3))
def test_random_settings_train_or_are_refused(tmp_path, text_file, capsys, args):
    trains_or_is_refused(tmp_path, text_file, capsys, args)


@pytest.mark.slow
@settings(max_examples=500, **relaxed)
@given(st.lists(one_flag, min_size=1, max_size=4))
def test_many_random_settings_train_or_are_refused(tmp_path, text_file, capsys, args):
    trains_or_is_refused(tmp_path, text_file, capsys, args)


# options whose large values are valid and mean endless work
ENDLESS = "n_layer max_steps fast_dev_run name_augmentation length max_new_tokens accumulate_grad_batches".split()
INTEGERS = "0 1 2 3 7 40 -1".split()
HUGE = "-7 10000000000000 -10000000000000 9223372036854775807 18446744073709551616".split()
BROKEN = "0.0 1.0 0.5 0.999 1.5 -0.5 1e30 1e-300 1e300 -1e300 .nan .inf -.inf".split()
NESTED = "[] [1] [1,2] [0.5,0.9] [[1]] {} {a:1} {class_path:Timer} [{class_path:Timer}] [null] [~,1]".split()
STRANGE = ["\udcff", "é" * 300, "a/b", "..", ".", "/", "/dev/null/x", "Timer", "os.system", "cpu", "auto"]
ANYTHING = [*TEXTS, *INTEGERS, *BROKEN, *NESTED, *STRANGE, "null", "false", "nan", "1_0", "0x10", "1e400"]
CALLBACKS = "RichProgressBar TQDMProgressBar RichModelSummary ModelSummary LearningRateMonitor DeviceStatsMonitor "
CALLBACKS += "LearningRateFinder BatchSizeFinder ModelCheckpoint StochasticWeightAveraging OnExceptionCheckpoint "
CALLBACKS += "GradientAccumulationScheduler LambdaCallback WeightAveraging EMAWeightAveraging Timer EarlyStopping"
CALLBACKS = CALLBACKS.split()
USUAL_VALUES = {
    "ckpt_path": ["last.ckpt"],
    "init_from": ["last.ckpt"],
    "corpus": ["cats.txt"],
    "text_file": ["cats.txt"],
    "source": ["nanogpt:x", "safetensors:cats.txt", "hf:.", "nanogpt:", "x:y", ":"],  # no network
    "devices": ["1", "0", "-1", "auto", "1,", "[0]", "[]", "", "x", "[1.5]", "~"],  # no child processes
    "num_nodes": ["1", "0", "-1", "x"],
    "callbacks": [*CALLBACKS, *(f"[{one},{two}]" for one, two in itertools.pairwise(CALLBACKS))],
    "logger": "true false TensorBoardLogger CSVLogger WandbLogger MLFlowLogger CometLogger [CSVLogger]".split(),
    "profiler": "simple advanced pytorch xla SimpleProfiler AdvancedProfiler PyTorchProfiler".split(),
    "strategy": "auto ddp fsdp ddp_flat fsdp2 deepspeed ddp_spawn ddp_fork xla single_xla dp ddp_notebook".split(),
    "accelerator": "cpu auto gpu cuda tpu mps hpu CPUAccelerator".split(),
    "gradient_clip_algorithm": ["norm", "value"],
    "max_time": ["00:00:00:01", "00:00:00:00", "{seconds:1}", "{seconds:-1}", "1:2"],
    "device": ["cpu", "auto", "cuda", "meta", "cpu:7", "mps", "vulkan"],
    "stop": ["a", "['a','b']", "[]", "['']", "[a]"],
}
COMMANDS = {
    "fit": ["fit", *TINY, "--data.corpus=cats.txt", "--trainer.max_steps=2"],
    "fit, resumed": ["fit", "--ckpt_path=last.ckpt", "--trainer.max_steps=6"],
    "fit, tuned": ["fit", *TINY, "--model.init_from=last.ckpt", "--data.corpus=cats.txt", "--trainer.max_steps=2"],
    "validate": ["validate", "--ckpt_path=last.ckpt"],
    "test": ["test", "--ckpt_path=last.ckpt"],
    "generate": ["generate", "--ckpt_path=last.ckpt", "--max_new_tokens=20", "--prompt=the"],
    "score": ["score", "--ckpt_path=last.ckpt", "--text_file=cats.txt"],
    "quantize": ["quantize", "--ckpt_path=last.ckpt"],
    "export": ["export", "--ckpt_path=last.ckpt", "--to=safetensors"],
    "import": ["import", "--source=nanogpt:last.ckpt", "--output=one.ckpt"],
    "report": ["report", "."],
}


def value_for(action, rng):
    """A value to try for an option: usually of its type, sometimes anything."""
    name, types = action.dest.rsplit(".", 1)[-1], types_of(action)
    values = list(USUAL_VALUES.get(name, []))
    if name in ("source", "devices", "num_nodes"):
        return rng.choice(values)
    values += [str(part) for hint in types if get_origin(hint) is Literal for part in get_args(hint)]
    values += ["true", "false"] * (bool in types) + NESTED[2:4] * any(get_origin(hint) is tuple for hint in types)
    values += (INTEGERS + HUGE * (name not in ENDLESS)) * (int in types) + (INTEGERS + BROKEN) * (float in types)
    return rng.choice(values if values and rng.random() < 0.93 else ANYTHING)


@cache
def options_of(command):
    parser = capture_parser(main, [command])
    parser = parser._subcommands_action.choices[command] if command in ("fit", "validate", "test") else parser
    return [action for action in parser._actions if action.option_strings and hasattr(action, "_typehint")]


def command_line(rng):
    line = list(COMMANDS[rng.choice([*COMMANDS, "fit", "fit", "fit, resumed", "generate"])])
    for action in rng.choices(options_of(line[0]), k=rng.randint(1, 4)):
        line.append(f"{rng.choice(action.option_strings)}={value_for(action, rng)}")
    return line


@pytest.fixture(scope="module")
def playground(tmp_path_factory, stateful, text_file):
    folder = tmp_path_factory.mktemp("playground")
    shutil.copy(next(stateful[1].glob("checkpoints/**/last.ckpt")), folder / "last.ckpt")
    return folder


@pytest.mark.parametrize("seed, times", [(1, 8), pytest.param(2, 2000, marks=pytest.mark.slow)])
def test_any_command_line_succeeds_or_prints_a_one_line_error(launcher, playground, text_file, seed, times):
    rng = random.Random(seed)
    for i in range(times):
        folder, line = playground / str(i), command_line(rng)
        folder.mkdir()
        shutil.copy(playground / "last.ckpt", folder)
        shutil.copy(text_file, folder / "cats.txt")
        code = launcher.run(folder, *line)
        log = launcher.log.read_text(errors="replace")
        assert code in (0, 1, 2) and "Traceback" not in log, (line, log)
        assert code == 0 or "lightning-gpt: error: " in log, (line, log)
        shutil.rmtree(folder)
