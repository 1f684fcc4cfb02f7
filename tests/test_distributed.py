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

from lightning_gpt import checkpoint

pytestmark = pytest.mark.slow
FSDP = ["--config", "fsdp", "--trainer.devices", "2"]
THREE = ["--data.batch_size", "6", "--trainer.max_steps", "4", "--model.optimizer", "muon"]
STILL = [
    "--model.dropout",
    "0",
    "--model.ema_decay",
    "0.9",
    "--trainer.val_check_interval",
    "2",
    "--sample.length",
    "9",
]


def start(folder, *args, path=(), **env):
    """A command line in processes of its own, so that it can be waited for and ended as a whole."""
    command = [sys.executable, "-m", "lightning_gpt", *map(str, args)]
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


def fit(folder, text_file, *args):
    folder.mkdir(exist_ok=True)
    code, said = end(start(folder, "fit", *TINY, "--data.corpus", text_file, *STILL, *args))
    assert code == 0, said
    (last,) = folder.glob("checkpoints/tiny/version_0/checkpoints/last.ckpt")
    return checkpoint.read(last)


def assert_same(a, b):
    assert a["global_step"] == b["global_step"] and a["state_dict"].keys() == b["state_dict"].keys()
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
    for name, weight in a["state_dict"].items():
        torch.testing.assert_close(weight, b["state_dict"][name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_file):
    return fit(tmp_path_factory.mktemp("alone"), text_file, "--trainer.max_steps", 9)


def in_parts(folder, text_file, *middle):
    fit(folder, text_file, "--trainer.max_steps", 3)
    fit(folder, text_file, "--ckpt_path", "last", "--trainer.max_steps", 6, *middle)
    return fit(folder, text_file, "--ckpt_path", "last", "--trainer.max_steps", 9, "--trainer.strategy", "auto")


@pytest.fixture(scope="module")
def alone_in_parts(tmp_path_factory, text_file):
    return in_parts(tmp_path_factory.mktemp("parts"), text_file)


@pytest.mark.parametrize("how", [["--trainer.devices", "2"], FSDP], ids=["replicas", "sharded"])
def test_two_processes_go_on_where_one_stopped_and_back(tmp_path, text_file, alone_in_parts, how):
    saved = in_parts(tmp_path, text_file, *how)
    assert_same(saved, alone_in_parts)
    optimizers = (part["optimizer_states"][0]["state"] for part in (saved, alone_in_parts))
    for mine, theirs in zip(*(map(dict.values, optimizers)), strict=True):
        torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", [["--trainer.devices", "2"], FSDP], ids=["replicas", "sharded"])
def test_two_processes_train_as_one(tmp_path, text_file, alone, how):
    assert_same(fit(tmp_path, text_file, "--trainer.max_steps", 9, *how), alone)
    code, said = end(start(tmp_path, "generate", "--prompt", "the", "--max_new_tokens", 5))
    assert code == 0 and said.startswith("the")


@pytest.mark.parametrize("strategy", ["auto", "shards"])
def test_three_processes_train_as_one(tmp_path, text_file, strategy):
    how = THREE if strategy == "auto" else [*THREE, "--model.optimizer", "adamw"]
    many = fit(tmp_path / "3", text_file, *how, "--trainer.strategy", strategy, "--trainer.devices", 3)
    assert_same(many, fit(tmp_path / "1", text_file, *how))


def test_sharded_matrices_are_not_for_muon(tmp_path, text_file):
    args = ["fit", *TINY, "--data.corpus", text_file, *STILL, *FSDP, "--model.optimizer", "muon"]
    code, said = end(start(tmp_path, *args))
    assert code == 2 and "take adamw" in said and "Traceback" not in said


def training(process, folder):
    """Waits until a run saves."""
    since = time.monotonic()
    while not list(folder.glob("checkpoints/**/last.ckpt")):
        assert process.poll() is None and time.monotonic() - since < 60, process.communicate()[0]
        time.sleep(0.1)


LONG = ["--trainer.max_steps", "1000000", "--save_every_n_steps", "20", "--trainer.val_check_interval", "1000000"]


def test_a_signal_to_one_stops_all_and_saves(tmp_path, text_file):
    process = start(tmp_path, "fit", *TINY, "--data.corpus", text_file, *LONG, "--trainer.devices", "2")
    training(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, said = end(process, 60)
    assert code == 143 and "stopped by SIGTERM after step" in said, said
    step = int(said.split("after step ")[1].split(",")[0].replace(",", ""))
    assert checkpoint.read(next(tmp_path.rglob("last.ckpt")))["global_step"] == step


def test_when_one_dies_the_other_ends_and_what_was_saved_is_good(tmp_path, text_file):
    process = start(tmp_path, "fit", *TINY, "--data.corpus", text_file, *LONG, "--trainer.devices", "2")
    training(process, tmp_path)
    (child,) = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(child), signal.SIGKILL)
    code, said = end(process, 60)
    assert code != 0
    assert checkpoint.read(next(tmp_path.rglob("last.ckpt")))["global_step"] > 0
    assert said.count("error") == 1 and "another process of this run has ended" in said and "Traceback" not in said


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


def test_a_batch_that_cannot_be_shared_is_said_once(tmp_path, text_file):
    code, said = end(start(tmp_path, "fit", *TINY, "--data.corpus", text_file, "--trainer.devices", "3"))
    assert code == 2 and "data.batch_size=8 can't be shared equally by 3 devices: take 6 or 9" in said
    assert said.count("\n") == 1


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


def test_a_port_that_is_taken_is_named(tmp_path, text_file, port):
    number = port.getsockname()[1]
    code, said = end(as_torchrun_would(tmp_path, text_file, 0, number))
    assert code == 2 and f"port {number}, is taken by another program: set MASTER_PORT" in said
    assert "Traceback" not in said


def test_processes_with_other_software_end_and_say_so(tmp_path, text_file, port):
    number = port.getsockname()[1]
    port.close()
    package = tmp_path / "other" / "lightning_gpt"
    shutil.copytree(Path(checkpoint.__file__).parent, package, ignore=shutil.ignore_patterns("corpus", "__pycache__"))
    (package / "corpus").symlink_to(Path(checkpoint.__file__).parent / "corpus")
    (package / "__init__.py").write_text('__version__ = "9.9"')
    both = [as_torchrun_would(tmp_path, text_file, r, number, path=[str(package.parent)] if r else []) for r in (0, 1)]
    for code, said in map(end, both):
        assert code == 2 and "rank 1 Python" in said and "lightning-gpt 9.9. Install the same" in said
