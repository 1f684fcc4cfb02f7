"""Several processes are one run: the same steps, the same checkpoints, the same end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_gpt
from lightning_gpt.checkpoint.io import read_checkpoint
from lightning_gpt.data.corpus import TINY_SHAKESPEARE

# 64-true: what rounding does is below 1e-12, and the dice of dropout depend on the rank
STILL = ["--trainer.precision=64-true", "--model.dropout=0", "--trainer.val_check_interval=2", "--sample.length=9"]
# a schedule, clipped gradients, an average, 3 windows for each of 4 processes
HARD = ["--trainer.gradient_clip_val=0.1", "--model.warmup_steps=2", "--model.ema_decay=0.9", "--data.batch_size=12"]
ADAMW = [*HARD, "--model.n_layer=2", "--trainer.accumulate_grad_batches=2"]
MUON = [*HARD, "--model.n_layer=3", "--model.optimizer=muon", "--model.norm=rmsnorm", "--model.position=rope"]


def start(folder, *args, path=(), module="lightning_gpt", **env):
    """A command line in processes of its own, so that it can be waited for and ended as a whole."""
    command = [sys.executable, "-m", module, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*path, *sys.path])} | env
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process, timeout=120):
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


@pytest.fixture
def fit(nursery, tmp_path, text_file):
    """Trains in a folder of that name, by one process or several, and reads last.ckpt."""

    def fit(name, *args, **how):
        (tmp_path / name).mkdir(exist_ok=True)
        fresh = () if "--ckpt_path=last" in args else (*TINY, "--data.corpus", text_file, *STILL)
        assert nursery.run(tmp_path / name, "fit", *fresh, *args, **how) == 0, nursery.log.read_text()
        assert "Warning" not in nursery.log.read_text()
        (last,) = tmp_path.glob(f"{name}/checkpoints/*/*/checkpoints/last.ckpt")  # one run, whoever took part in it
        return read_checkpoint(last)

    return fit


def assert_same(a, b):
    assert a["global_step"] == b["global_step"] and a["state_dict"].keys() == b["state_dict"].keys()
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-6)  # which is summed up in float32
    for name, weight in a["state_dict"].items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, b["state_dict"][name], rtol=0, atol=1e-12)
    for mine, theirs in zip(moments(a), moments(b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def moments(saved):
    """What the optimizer knows of each parameter, in the order of its groups."""
    (optimizer,) = saved["optimizer_states"]
    states = (optimizer["state"][k] for group in optimizer["param_groups"] for k in group["params"])
    return [state[name] for state in states for name in sorted(state)]


@pytest.mark.parametrize(
    "processes, strategy, settings",
    [
        pytest.param(2, "ddp_flat", ADAMW, id="2 ddp_flat, adamw"),
        pytest.param(3, "ddp_flat", MUON, id="3 ddp_flat, muon"),
        pytest.param(2, "fsdp2", ADAMW, id="2 fsdp2"),
        pytest.param(4, "ddp_flat", ADAMW, id="4 ddp_flat, adamw", marks=pytest.mark.slow),
        pytest.param(4, "ddp_flat", MUON, id="4 ddp_flat, muon", marks=pytest.mark.slow),
        pytest.param(3, "fsdp2", ADAMW, id="3 fsdp2", marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_as_one(fit, processes, strategy, settings):
    how = [*settings, "--trainer.max_steps=6"]
    assert_same(fit("many", *how, f"--trainer.strategy={strategy}", processes=processes), fit("one", *how))


def logged(run):
    """Each curve of a run, but those of its speed, as [(step, value), ...]; and how many files it wrote."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}, len(list(run.rglob("*")))


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(["1 auto", "2 ddp_flat"], marks=pytest.mark.slow),
        ["3 ddp_flat", "2 fsdp2"],
        pytest.param(["2 fsdp2", "3 ddp_flat"], marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_any_number_of_processes_goes_on_where_others_stopped(fit, tmp_path, ways):
    saved = {}
    for run, parts in {"many": [*ways, "1 auto"], "one": ["1 auto"] * 3}.items():
        for i, part in enumerate(parts):
            processes, strategy = part.split()
            how = ["--ckpt_path=last", "--trainer.devices=1"] if i else [*ADAMW, "--trainer.log_every_n_steps=1"]
            how += [f"--trainer.strategy={strategy}", f"--trainer.max_steps={3 * i + 3}"]
            saved[run] = fit(run, *how, processes=int(processes))
    assert_same(saved["many"], saved["one"])
    (many, files), (one, as_many) = (logged(tmp_path / run / "checkpoints/tiny/version_0") for run in ("many", "one"))
    assert files == as_many and many.keys() == one.keys() and len(many["train/loss"]) == 9
    for tag, curve in many.items():
        assert curve == [(step, pytest.approx(value, rel=1e-5, abs=1e-6)) for step, value in one[tag]], tag


def test_what_fsdp2_saved_is_a_net_like_any_other(fit, nursery, tmp_path):
    val_loss = fit("run", *ADAMW, "--trainer.strategy=fsdp2", "--trainer.max_steps=2", processes=2)["val_loss"]
    assert nursery.run(tmp_path / "run", "generate", "--prompt", "the", "--max_new_tokens", "5") == 0
    assert "\nthe" in nursery.log.read_text()
    for how in {}, {"processes": 2}, {"processes": 3}:
        assert nursery.run(tmp_path / "run", "validate", "--trainer.accelerator=cpu", **how) == 0
        said = nursery.log.read_text().split("val/loss")[-1].split()
        assert float(said[1]) == pytest.approx(val_loss, rel=1e-6)


@pytest.mark.slow
def test_sharded_matrices_are_not_for_muon(tmp_path, text_file):
    args = ["fit", *TINY, "--data.corpus", text_file, "--config", "fsdp", "--trainer.devices", "2"]
    code, said = end(start(tmp_path, *args, "--model.optimizer", "muon"))
    assert code == 2 and "take adamw" in said and "Traceback" not in said


def training(process, folder):
    """Waits until a run saves."""
    since = time.monotonic()
    while not list(folder.glob("checkpoints/**/last.ckpt")):
        assert process.poll() is None and time.monotonic() - since < 60, process.communicate()[0]
        time.sleep(0.1)


LONG = ["--trainer.max_steps", "1000000", "--save_every_n_steps", "20", "--trainer.val_check_interval", "1000000"]


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_saves(tmp_path, text_file):
    process = start(tmp_path, "fit", *TINY, "--data.corpus", text_file, *LONG, "--trainer.devices", "2")
    training(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, said = end(process, 60)
    assert code == 143 and "stopped by SIGTERM after step" in said, said
    step = int(said.split("after step ")[1].split(",")[0].replace(",", ""))
    assert read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] == step


@pytest.mark.slow
def test_when_one_dies_the_other_ends_and_what_was_saved_is_good(tmp_path, text_file):
    process = start(tmp_path, "fit", *TINY, "--data.corpus", text_file, *LONG, "--trainer.devices", "2")
    training(process, tmp_path)
    (child,) = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(child), signal.SIGKILL)
    code, said = end(process, 60)
    assert code != 0
    assert read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] > 0
    assert (
        said.count("error") == 1
        and "another process of this run has ended or hangs" in said
        and "Traceback" not in said
    )


@pytest.mark.slow
def test_no_process_outlives_the_one_that_started_it(tmp_path, text_file):
    args = ["fit", *TINY, "--data.corpus", text_file, *LONG, "--data.batch_size", "6", "--trainer.devices", "3"]
    process = start(tmp_path, *args)
    training(process, tmp_path)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)  # as deaf as one that waits for its GPU
    process.kill()
    end(process, 30)  # until nobody holds the other end of its output
    assert len(children) == 2 and not any(os.path.exists(f"/proc/{child}/exe") for child in children)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_said_once(tmp_path, text_file):
    code, said = end(start(tmp_path, "fit", *TINY, "--data.corpus", text_file, "--trainer.devices", "3"))
    assert code == 2 and "data.batch_size=8 is not divisible by the 3 devices: use 6 or 9" in said
    assert said.count("\n") == 1


def test_torchrun_must_start_as_many_as_the_run_has(text_file, ckpt, fails, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    said = fails("fit", *TINY, "--data.corpus", text_file)
    assert "torchrun started 2 processes, but 1 x 1 make up the run" in said
    assert "3 x 1" in fails("validate", "--ckpt_path", ckpt, "--trainer.devices=3", "--trainer.accelerator=cpu")


def test_devices_that_are_not_there_are_named(text_file, fails):
    said = fails("fit", *TINY, "--data.corpus", text_file, "--trainer.devices=0")
    assert "trainer.devices=0" in said and "Take auto for both" in said


def as_torchrun_would(folder, text_file, rank, port, **how):
    args = ["fit", *TINY, "--data.corpus", text_file, "--trainer.devices", "2"]
    env = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return start(folder, *args, **env, TORCHELASTIC_RUN_ID="test", **how)


@pytest.fixture
def port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tmp_path, text_file, port):
    number = port.getsockname()[1]
    code, said = end(as_torchrun_would(tmp_path, text_file, 0, number))
    assert code == 2 and f"port {number}, is taken by another program: set MASTER_PORT" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_processes_with_other_software_end_and_say_so(tmp_path, text_file, port):
    number = port.getsockname()[1]
    port.close()
    package = tmp_path / "other" / "lightning_gpt"
    shutil.copytree(Path(lightning_gpt.__file__).parent, package, ignore=shutil.ignore_patterns("*.txt", "__pycache__"))
    (package / "data/tiny_shakespeare.txt").symlink_to(TINY_SHAKESPEARE)
    (package / "__init__.py").write_text('__version__ = "9.9"')
    both = [as_torchrun_would(tmp_path, text_file, r, number, path=[str(package.parent)] if r else []) for r in (0, 1)]
    for code, said in map(end, both):
        assert code == 2 and "rank 1 Python" in said and "lightning-gpt 9.9. Install the same" in said


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_flat", "fsdp2"])
def test_the_bench_times_two_processes(tmp_path, strategy):
    how = ["--trainer.accumulate_grad_batches=1", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    args = [*TINY, "--config=gpt2", *TINY, *how, "--model.compile=false", "--bench.vocab_size=300", "--bench.steps=40"]
    code, said = end(start(tmp_path, *args, "--trainer.precision=32-true", module="lightning_gpt.benchmarks.training"))
    assert code == 0 and said.count("\nTrainer ") == 1 and "2 x CPU" in said and "Traceback" not in said, said
