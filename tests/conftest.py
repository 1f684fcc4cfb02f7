import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gpt.main import main
from lightning_gpt.model import GPT, GPTConfig

V, T = 17, 12  # vocabulary and block size: small, and no two sizes alike

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # our kernels run in Python then

torch.set_num_threads(1)  # small tensors: threads only get in each other's way


def loud(net):
    """Weights far from uniform predictions, in float64: a difference is a bug, not rounding."""
    torch.manual_seed(0)
    for p in net.double().eval().parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


MODERN = dict(position="rotary", norm="rms", qk_norm=True, activation="relu2", logit_cap=5.0, init="zero", bias=False)
MODERN |= dict(ngram=3, ngram_rows=50)


@pytest.fixture
def net():
    return loud(GPT(GPTConfig(V, T, n_layer=3, n_head=2, n_embd=16, dropout=0.0)))


@pytest.fixture
def modern():
    return loud(GPT(GPTConfig(V, T, n_layer=3, n_head=2, n_embd=16, dropout=0.0, **MODERN)))


@pytest.fixture(params=["net", "modern"])
def any_net(request):
    """GPT-2's block and the modern one, in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def idx():
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


TINY = ["--config", str(Path(__file__).parent / "tiny.yaml")]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small made-up text of 27 characters; training on it takes no time."""
    words, dice = "the cat sat on a mat. who? VEX, quiz! jumbo (for) long years\n".split(" "), random.Random(0)
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(" ".join(dice.choice(words) for _ in range(1000)))
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, text_file):
    """The folder of a short run, and what it printed."""
    root = tmp_path_factory.mktemp("run")
    main(["fit", *TINY, "--data.corpus", str(text_file), "--trainer.default_root_dir", str(root)])
    return Path(root) / "tiny" / "version_0"


@pytest.fixture
def ckpt(run):
    return run / "checkpoints" / "best.ckpt"


@pytest.fixture
def fails(capsys):
    """Runs a command line that must fail, and returns the one line that it says."""

    def fails(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        assert stop.value.code == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("lightning-gpt: error: ") and "\n" not in said
        return said

    return fails


@pytest.fixture(scope="session")
def token_files(tmp_path_factory):
    """train.bin,val.bin: 3,000 and 2,000 ids below 300, in nanoGPT's format."""
    folder, dice = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for name, n in ("train", 3000), ("val", 2000):
        dice.integers(300, size=n, dtype=np.uint16).tofile(folder / f"{name}.bin")
    return f"{folder}/train.bin,{folder}/val.bin"
