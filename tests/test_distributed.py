"""Several processes are one run: the same steps, the same checkpoints, the same end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY

from lightning_gpt import checkpoint

pytestmark = pytest.mark.slow
FSDP = ["--config", "fsdp", "--trainer.devices", "2"]
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


def start(folder, *args):
    """A command line in processes of its own, so that it can be waited for and ended as a whole."""
    command = [sys.executable, "-m", "lightning_gpt", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
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
