import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gpt.cli.main import main
from lightning_gpt.model.gpt import GPT, GPTConfig

V, T = 17, 12  # vocabulary and block size: small and different from all other sizes, so that a swapped axis fails

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton then runs our kernels in Python

torch.set_num_threads(1)  # for small tensors, more threads are slower


def loud(net):
    """Large random weights in float64: predictions are far from uniform, and a difference is a bug, not rounding."""
    torch.manual_seed(0)
    for p in net.double().eval().parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


MODERN = dict(
    position="rope", norm="rmsnorm", qk_norm=True, activation="relu2", logit_softcap=5.0, init="zero", bias=False
)
MODERN |= dict(ngram_max=3, ngram_buckets=50)


@pytest.fixture
def net():
    return loud(GPT(GPTConfig(V, T, n_layer=3, n_head=2, n_embd=16, dropout=0.0)))


@pytest.fixture
def modern():
    return loud(GPT(GPTConfig(V, T, n_layer=3, n_head=2, n_embd=16, dropout=0.0, **MODERN)))


@pytest.fixture(params=["net", "modern"])
def any_net(request):
    """A GPT of GPT-2's blocks, then one of modern blocks."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def idx():
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


TINY = ["--config", str(Path(__file__).parent / "tiny.yaml")]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small random text of few distinct characters: training on it is quick."""
    words, rng = "the cat sat on a mat. who? VEX, quiz! jumbo (for) long years\n".split(" "), random.Random(0)
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(1000)))
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, text_file):
    """The folder of a short run of five steps."""
    root = tmp_path_factory.mktemp("run")
    main(["fit", *TINY, "--data.corpus", str(text_file), "--trainer.default_root_dir", str(root)])
    return Path(root) / "tiny" / "version_0"


@pytest.fixture
def ckpt(run):
    return run / "checkpoints" / "best.ckpt"


@pytest.fixture
def fails(capsys):
    """Run a command line that must fail, and return its one-line error message."""

    def fails(*args):
        capsys.readouterr()  # drop earlier output
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("lightning-gpt: error: ") and "\n" not in error
        return error

    return fails


@pytest.fixture(scope="session")
def token_files(tmp_path_factory):
    """The paths train.bin,val.bin: 3,000 and 2,000 ids below 300, in nanoGPT's format."""
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for name, n in ("train", 3000), ("val", 2000):
        rng.integers(300, size=n, dtype=np.uint16).tofile(folder / f"{name}.bin")
    return f"{folder}/train.bin,{folder}/val.bin"


# A process that has imported everything forks for each command line, so a run takes half a second. It can fork several
# processes with the environment variables that torchrun sets.
LAUNCHER = """
import json, os, resource, sys, traceback
import torch
torch.set_num_threads(1)
import lightning_gpt.cli.train  # main imports it, and Lightning, lazily
from lightning_gpt.cli.main import main
for line in sys.stdin:
    args, folder, log, limit, environments = json.loads(line)
    pids = []
    for environment in environments:
        pids.append(os.fork())
        if pids[-1]:
            continue
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2), os.chdir(folder), os.environ.update(environment)
        sys.stdin = open(os.devnull)  # the child must not read our command lines
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            main(args)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pids[0], flush=True)
    print(max((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), key=abs), flush=True)
"""


class Launcher:
    def __init__(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, "-c", LAUNCHER], **pipes)

    def start(self, folder, *args, limit=0, processes=1):
        self.log, environments = Path(folder) / "log.txt", [{}]
        if processes > 1:
            shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
            ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
            environments = [{name: str(value) for name, value in rank.items()} for rank in ranks]
            args = *args, f"--trainer.devices={processes}"
        line = json.dumps([[str(arg) for arg in args], str(folder), str(self.log), limit, environments])
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self):
        return int(self.process.stdout.readline())

    def run(self, folder, *args, **kwargs):
        self.start(folder, *args, **kwargs)
        return self.end()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="session")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.process.stdin.close()
    launcher.process.wait()
