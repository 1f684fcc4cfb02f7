"""A checkpoint is a stranger's file: well-formed or not, it runs no code, hangs nothing and ends in one sentence."""

import io
import math
import struct
import warnings
import zipfile
from copy import deepcopy

import pytest
import torch

from lightning_gpt import checkpoint
from lightning_gpt.tokenizer import BPETokenizer


@pytest.fixture
def saved(run):
    """All that the last checkpoint of a run holds, to be changed."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def put(saved, path, value):
    """Set what stands under keys one in the other; `...` takes the key away."""
    *above, last = path
    for key in above:
        saved = saved[key]
    if value is ...:
        del saved[last]
    else:
        saved[last] = value


W = "state_dict", "net.wte.weight"
MODEL, DATA = "hyper_parameters", "datamodule_hyper_parameters"


def quantized(w):
    with warnings.catch_warnings(action="ignore"):  # torch is about to drop them
        return torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)


# --- what a file says of itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, value, message",
    [
        ((MODEL, "n_layer"), 100_000_000, "n_layer=100000000 takes more weights than"),
        ((MODEL, "vocab_size"), 2**62, "vocab_size"),
        ((MODEL, "vocab_size"), 2**40, "net.wte.weight is (32, 16), and the settings make it (1099511627776, 16)"),
        ((MODEL, "n_embd"), "16", "n_embd is '16'"),
        ((MODEL, "n_embd"), True, "n_embd is True"),
        ((MODEL, "dropout"), math.nan, "model.dropout"),
        ((MODEL, "position"), "sideways", "position is 'sideways'"),
        ((MODEL, "rung"), ["gpt"], "rung"),
        ((MODEL, "seed"), ..., "seed is None"),
        ((MODEL, "ema_decay"), 0.9, "the weight average.wte.weight is missing"),
        ((MODEL, "tie_embeddings"), True, "the head is tied to the embedding, and differs"),
        ((MODEL, "betas"), {"class_path": "evil.Evil"}, "model.betas"),
        ((MODEL, "ngram"), 10**9, "ngram=1000000000"),
        ((DATA, "vocabulary"), "abc", "the vocabulary has 3 tokens, and the net has 32"),
        ((DATA, "vocabulary"), "a" * 32, "a character twice"),
        ((DATA, "vocabulary"), None, "without a vocabulary"),
        ((DATA, "vocabulary"), "\ud800" + "a" * 31, "half a character"),
        ((DATA, "tokenizer"), "words", "the tokenizer is 'words'"),
        ((DATA, "unknown"), 3, "data.unknown is 3"),
        (("state_dict", 5), torch.zeros(1), "the weight 5 is none"),
        (("state_dict", "net.lm_head.weight"), ..., "the weight net.lm_head.weight is missing"),
        (W, torch.zeros(32, 17), "net.wte.weight is (32, 17)"),
        (W, torch.zeros(32, 16, dtype=torch.int64), "no tensor of floating-point numbers"),
        (W, torch.full((32, 16), math.nan), "no numbers"),
        (W, torch.zeros(32, 16).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (W, torch.zeros(32, 16, device="meta"), "_rebuild_meta_tensor"),
        (W, quantized(torch.zeros(32, 16)), "_rebuild_qtensor"),
        (W, torch.zeros(1, 1).expand(10**6, 10**6), "hold more than its bytes"),
        (W, "hello", "no tensor"),
        (("scales",), {"net.wte.weight": torch.ones(3)}, "not one number for each row"),
        (("scales",), ["net.wte.weight"], "not one number for each row"),
        (("global_step",), -1, "global_step is -1"),
        (("epoch",), [0], "epoch is '[0]'"),
        (("val_loss",), "low", "val_loss is 'low'"),
        (("config",), {"trainer": {}}, "the config is no text"),
        (("pytorch-lightning_version",), ..., "pytorch-lightning_version is None"),
        (("pytorch-lightning_version",), "1.0.0", "pytorch-lightning_version is '1.0.0'"),
        (("anything",), bytearray(9), "bytearray"),
        (("anything",), 2**70, "a number of 71 bits"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_contradicts_itself_is_refused_in_one_sentence(saved, tmp_path, path, value, message):
    put(saved, path, value)
    checkpoint.write(saved, tmp_path / "x.ckpt")
    with pytest.raises(ValueError) as error:
        checkpoint.read_strictly(tmp_path / "x.ckpt")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_nests_without_end_is_refused(saved, tmp_path):
    for loop in [], {}:
        deep = loop
        for _ in range(60):
            deep = [deep, deep]  # 2^60 ways through it, in a few bytes
        loop.append(loop) if isinstance(loop, list) else loop.update(self=loop)
        for value in loop, deep:
            checkpoint.write(saved | {"anything": value}, tmp_path / "x.ckpt")
            with pytest.raises(ValueError, match="nests deeper"):
                checkpoint.read_strictly(tmp_path / "x.ckpt")


def archive(entries, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def test_an_archive_that_swells_is_not_unpacked(saved, tmp_path):
    checkpoint.write(saved, path := tmp_path / "x.ckpt")
    with zipfile.ZipFile(path) as good:
        entries = [(name, good.read(name)) for name in good.namelist()]
    twice = [*entries, ("other/data.pkl", entries[0][1])]
    bomb = archive([*entries, ("archive/data/99", bytes(10**8))], zipfile.ZIP_DEFLATED)
    plain = archive(entries)
    at = plain.rindex(b"PK\1\2")  # the last entry of the table says that it is larger
    lies = plain[: at + 20] + struct.pack("<II", 2**31, 2**31) + plain[at + 28 :]
    for data in bomb, archive(twice), lies, b"before" + plain:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="checkpoint"):
            checkpoint.read_strictly(path)
    path.write_bytes(plain)
    with pytest.raises(ValueError, match="its checksum is missing"):  # else it would be good
        checkpoint.read_strictly(path)


def test_a_tied_net_and_byte_pairs_are_what_they_say(saved, tmp_path):
    merges = BPETokenizer.merges_of(["# ## ### the the the"] * 9, 260)
    tied = deepcopy(saved)
    tied["state_dict"] |= {f"net.{name}.weight": torch.zeros(264, 16) for name in ("wte", "lm_head")}
    tied[MODEL] |= {"vocab_size": 264, "tie_embeddings": True}
    tied[DATA] |= {"tokenizer": "bpe", "vocabulary": merges}
    checkpoint.write(tied, tmp_path / "x.ckpt")
    net, tokenizer = checkpoint.load(tmp_path / "x.ckpt")
    assert net.lm_head.weight is net.wte.weight and len(tokenizer) == 264
