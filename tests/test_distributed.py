"""Several processes make one run: the same steps, the same checkpoints, the same end."""

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

# in 64-true, rounding stays below 1e-12; without dropout, since its masks depend on the rank
EXACT = ["--trainer.precision=64-true", "--model.dropout=0", "--trainer.val_check_interval=2", "--sample.length=9"]
# a schedule, clipped gradients, a weight average, 3 windows for each of 4 processes
COMMON = ["--trainer.gradient_clip_val=0.1", "--model.warmup_steps=2", "--model.ema_decay=0.9", "--data.batch_size=12"]
ADAMW = [*COMMON, "--model.n_layer=2", "--trainer.accumulate_grad_batches=2"]
MUON = [*COMMON, "--model.n_layer=3", "--model.optimizer=muon", "--model.norm=rmsnorm", "--model.position=rope"]


def start(folder, *args, path=(), module="lightning_gpt", **env):
    """Start a command line in a new session, so that all its processes can be killed together."""
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


def finish(process, timeout=120):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


@pytest.fixture
def fit(launcher, tmp_path, text_file):
    """Train in a folder of the given name, with one process or several, and return last.ckpt."""

    def fit(name, *args, **kwargs):
        (tmp_path / name).mkdir(exist_ok=True)
        fresh = () if "--ckpt_path=last" in args else (*TINY, "--data.corpus", text_file, *EXACT)
        assert launcher.run(tmp_path / name, "fit", *fresh, *args, **kwargs) == 0, launcher.log.read_text()
        assert "Warning" not in launcher.log.read_text()
        (last,) = tmp_path.glob(f"{name}/checkpoints/*/*/checkpoints/last.ckpt")  # one run, for any number of processes
        return read_checkpoint(last)

    return fit


def assert_same(a, b):
    assert a["global_step"] == b["global_step"] and a["state_dict"].keys() == b["state_dict"].keys()
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-6)  # the mean is accumulated in float32
    for name, weight in a["state_dict"].items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, b["state_dict"][name], rtol=0, atol=1e-12)
    for ours, theirs in zip(moments(a), moments(b), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def moments(checkpoint):
    """The optimizer's state of each parameter, in the order of its groups."""
    (optimizer,) = checkpoint["optimizer_states"]
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
def test_several_processes_train_the_same_weights_as_one(fit, processes, strategy, settings):
    flags = [*settings, "--trainer.max_steps=6"]
    assert_same(fit("many", *flags, f"--trainer.strategy={strategy}", processes=processes), fit("one", *flags))


def logged(run):
    """The curves of a run except those of its speed, as {tag: [(step, value), ...]}, and its number of files."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}, len(list(run.rglob("*")))


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(["1 auto", "2 ddp_flat"], marks=pytest.mark.slow),
        ["3 ddp_flat", "2 fsdp2"],
        pytest.param(["2 fsdp2", "3 ddp_flat"], marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_a_run_can_be_resumed_with_another_number_of_processes_and_strategy(fit, tmp_path, stages):
    checkpoints = {}
    for run, run_stages in {"many": [*stages, "1 auto"], "one": ["1 auto"] * 3}.items():
        for i, stage in enumerate(run_stages):
            processes, strategy = stage.split()
            flags = ["--ckpt_path=last", "--trainer.devices=1"] if i else [*ADAMW, "--trainer.log_every_n_steps=1"]
            flags += [f"--trainer.strategy={strategy}", f"--trainer.max_steps={3 * i + 3}"]
            checkpoints[run] = fit(run, *flags, processes=int(processes))
    assert_same(checkpoints["many"], checkpoints["one"])
    runs = (tmp_path / run / "checkpoints/tiny/version_0" for run in ("many", "one"))
    (many, many_files), (one, one_files) = map(logged, runs)
    assert many_files == one_files and many.keys() == one.keys() and len(many["train/loss"]) == 9
    for tag, curve in many.items():
        assert curve == [(step, pytest.approx(value, rel=1e-5, abs=1e-6)) for step, value in one[tag]], tag


def test_a_checkpoint_from_fsdp2_can_be_sampled_and_validated(fit, launcher, tmp_path):
    val_loss = fit("run", *ADAMW, "--trainer.strategy=fsdp2", "--trainer.max_steps=2", processes=2)["val_loss"]
    assert launcher.run(tmp_path / "run", "generate", "--prompt", "the", "--max_new_tokens", "5") == 0
    assert "\nthe" in launcher.log.read_text()
    for kwargs in {}, {"processes": 2}, {"processes": 3}:
        assert launcher.run(tmp_path / "run", "validate", "--trainer.accelerator=cpu", **kwargs) == 0
        val_line = launcher.log.read_text().split("val/loss")[-1].split()
        assert float(val_line[1]) == pytest.approx(val_loss, rel=1e-6)


@pytest.mark.slow
def test_muon_with_fsdp_is_refused(tmp_path, text_file):
    args = ["fit", *TINY, "--data.corpus", text_file, "--config", "fsdp", "--trainer.devices", "2"]
    code, output = finish(start(tmp_path, *args, "--model.optimizer", "muon"))
    assert code == 2 and "take adamw" in output and "Traceback" not in output


def wait_for_checkpoint(process, folder):
    """Wait until a run has saved last.ckpt."""
    since = time.monotonic()
    while not list(folder.glob("checkpoints/**/last.ckpt")):
        assert process.poll() is None and time.monotonic() - since < 60, process.communicate()[0]
        time.sleep(0.1)


LONG = ["--trainer.max_steps", "1000000", "--save_every_n_steps", "20", "--trainer.val_check_interval", "1000000"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_saves(tmp_path, text_file):
    process = start(tmp_path, "fit", *TINY, "--data.corpus", text_file, *LONG, "--trainer.devices", "2")
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 60)
    assert code == 143 and "stopped by SIGTERM after step" in output, output
    step = int(output.split("after step ")[1].split(",")[0].replace(",", ""))
    assert read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] == step


@pytest.mark.slow
def test_when_one_process_dies_the_other_ends_and_the_checkpoint_is_good(tmp_path, text_file):
    process = start(tmp_path, "fit", *TINY, "--data.corpus", text_file, *LONG, "--trainer.devices", "2")
    wait_for_checkpoint(process, tmp_path)
    (child,) = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(child), signal.SIGKILL)
    code, output = finish(process, 60)
    assert code != 0
    assert read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] > 0
    assert (
        output.count("error") == 1
        and "another process of this run has ended or hangs" in output
        and "Traceback" not in output
    )


@pytest.mark.slow
def test_no_process_outlives_its_launcher(tmp_path, text_file):
    args = ["fit", *TINY, "--data.corpus", text_file, *LONG, "--data.batch_size", "6", "--trainer.devices", "3"]
    process = start(tmp_path, *args)
    wait_for_checkpoint(process, tmp_path)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)  # like a process that waits for its GPU and ignores signals
    process.kill()
    finish(process, 30)  # waits until no process holds the other end of the output pipe
    assert len(children) == 2 and not any(os.path.exists(f"/proc/{child}/exe") for child in children)


@pytest.mark.slow
def test_a_batch_size_that_the_devices_do_not_divide_is_reported_once(tmp_path, text_file):
    code, output = finish(start(tmp_path, "fit", *TINY, "--data.corpus", text_file, "--trainer.devices", "3"))
    assert code == 2 and "data.batch_size=8 is not divisible by the 3 devices: use 6 or 9" in output
    assert output.count("\n") == 1


def test_a_number_of_torchrun_processes_other_than_devices_is_refused(text_file, ckpt, fails, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    error = fails("fit", *TINY, "--data.corpus", text_file)
    assert "torchrun started 2 processes, but trainer.devices x trainer.num_nodes is 1 x 1" in error
    assert "3 x 1" in fails("validate", "--ckpt_path", ckpt, "--trainer.devices=3", "--trainer.accelerator=cpu")


def test_invalid_devices_are_named(text_file, fails):
    error = fails("fit", *TINY, "--data.corpus", text_file, "--trainer.devices=0")
    assert "trainer.devices=0" in error and "Use auto for both" in error


def as_torchrun_would(folder, text_file, rank, port, **kwargs):
    args = ["fit", *TINY, "--data.corpus", text_file, "--trainer.devices", "2"]
    env = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return start(folder, *args, **env, TORCHELASTIC_RUN_ID="test", **kwargs)


@pytest.fixture
def port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


@pytest.mark.slow
def test_a_port_in_use_is_named(tmp_path, text_file, port):
    number = port.getsockname()[1]
    code, output = finish(as_torchrun_would(tmp_path, text_file, 0, number))
    assert code == 2 and f"port {number}, is in use by another program: set MASTER_PORT" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_processes_with_different_versions_are_refused(tmp_path, text_file, port):
    number = port.getsockname()[1]
    port.close()
    package = tmp_path / "other" / "lightning_gpt"
    shutil.copytree(Path(lightning_gpt.__file__).parent, package, ignore=shutil.ignore_patterns("*.txt", "__pycache__"))
    (package / "data/tiny_shakespeare.txt").symlink_to(TINY_SHAKESPEARE)
    (package / "__init__.py").write_text('__version__ = "9.9"')
    both = [as_torchrun_would(tmp_path, text_file, r, number, path=[str(package.parent)] if r else []) for r in (0, 1)]
    for code, output in map(finish, both):
        assert code == 2 and "rank 1 Python" in output and "lightning-gpt 9.9. Install the same" in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_flat", "fsdp2"])
def test_the_training_benchmark_measures_two_processes(tmp_path, strategy):
    flags = ["--trainer.accumulate_grad_batches=1", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    args = [
        *TINY,
        "--config=gpt2",
        *TINY,
        *flags,
        "--model.compile=false",
        "--bench.vocab_size=300",
        "--bench.steps=40",
    ]
    args += ["--trainer.precision=32-true"]
    code, output = finish(start(tmp_path, *args, module="lightning_gpt.benchmarks.training"))
    assert code == 0 and output.count("\nTrainer ") == 1 and "2 x CPU" in output and "Traceback" not in output, output
