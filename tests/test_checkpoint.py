"""Untrusted checkpoints: well-formed or not, loading one runs no code, ends soon and fails with one sentence."""

import io
import itertools
import math
import os
import random
import re
import shutil
import struct
import time
import warnings
import zipfile
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from conftest import TINY

from lightning_gpt.checkpoint.io import append_checksum, load_net, read_checkpoint, read_verified, write_checkpoint
from lightning_gpt.checkpoint.quantize import quantize
from lightning_gpt.checkpoint.validation import FLOAT_DTYPES
from lightning_gpt.cli.config import (
    FROM_TRAINER,
    as_lists,
    check_counters,
    check_optimizer_state,
    class_settings,
    is_plain,
    names_classes,
    run_settings,
    to_quoted_yaml,
)
from lightning_gpt.cli.main import main
from lightning_gpt.cli.train import TrainingParser
from lightning_gpt.data.datamodule import TextDataModule
from lightning_gpt.data.tokenizers import BPETokenizer
from lightning_gpt.inference.engine import generate_ids
from lightning_gpt.training.module import LanguageModel


@pytest.fixture
def checkpoint(run):
    """The contents of a run's last checkpoint, for a test to change."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def set_item(checkpoint, path, value):
    """Set the item at a path of nested keys; `...` deletes it."""
    *above, last = path
    for key in above:
        checkpoint = checkpoint[key]
    if value is ...:
        del checkpoint[last]
    else:
        checkpoint[last] = value


W = "state_dict", "net.wte.weight"
MODEL, DATA = "hyper_parameters", "datamodule_hyper_parameters"


def to_qint8(w):
    with warnings.catch_warnings(action="ignore"):  # torch deprecates quantized tensors
        return torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)


# --- what a file says about itself ------------------------------------------------------------------------------------


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
        ((MODEL, "lecture_step"), ["gpt"], "lecture_step"),
        ((MODEL, "seed"), ..., "seed is None"),
        ((MODEL, "norm"), ..., "norm is missing"),
        ((MODEL, "ema_decay"), ..., "ema_decay is None"),
        ((MODEL, "ema_decay"), 0.9, "the weight ema_net.wte.weight is missing"),
        ((MODEL, "tie_embeddings"), True, "lm_head.weight differs from wte.weight"),
        ((MODEL, "betas"), {"class_path": "evil.Evil"}, "model.betas"),
        ((MODEL, "ngram_max"), 10**9, "ngram_max=1000000000"),
        ((DATA, "vocabulary"), "abc", "the vocabulary has 3 tokens, and the net has 32"),
        ((DATA, "vocabulary"), "a" * 32, "a character twice"),
        ((DATA, "vocabulary"), None, "without a vocabulary"),
        ((DATA, "vocabulary"), "\ud800" + "a" * 31, "half a character"),
        ((DATA, "tokenizer"), "words", "the tokenizer is 'words'"),
        ((DATA, "tokenizer"), ..., "the tokenizer is None"),
        ((DATA, "on_unknown"), 3, "data.on_unknown is 3"),
        ((DATA, "on_unknown"), ..., "data.on_unknown is None"),
        ((DATA, "name_augmentation"), 10**9, "data.name_augmentation is 1000000000"),
        (("state_dict", 5), torch.zeros(1), "the weight 5 does not belong"),
        (("state_dict", "net.lm_head.weight"), ..., "the weight net.lm_head.weight is missing"),
        (W, torch.zeros(32, 17), "net.wte.weight is (32, 17)"),
        (W, torch.zeros(32, 16, dtype=torch.int64), "not a floating-point tensor"),
        (W, torch.full((32, 16), math.nan), "net.wte.weight is NaN or infinite"),
        (W, torch.zeros(32, 16).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (W, torch.zeros(32, 16, device="meta"), "_rebuild_meta_tensor"),
        (W, to_qint8(torch.zeros(32, 16)), "_rebuild_qtensor"),
        (W, torch.zeros(1, 1).expand(10**6, 10**6), "its tensors are larger than the file"),
        (W, "hello", "not a floating-point tensor"),
        (("scales",), {"net.wte.weight": torch.ones(3)}, "does not have one value for each row"),
        (("scales",), ["net.wte.weight"], "does not have one value for each row"),
        (("global_step",), -1, "global_step is -1"),
        (("epoch",), [0], "epoch is a list"),
        (("val_loss",), "low", "val_loss is 'low'"),
        (("config",), {"trainer": {}}, "the config is not a string"),
        (("pytorch-lightning_version",), ..., "pytorch-lightning_version is None"),
        (("pytorch-lightning_version",), "1.0.0", "pytorch-lightning_version is '1.0.0'"),
        (("anything",), bytearray(9), "bytearray"),
        (("anything",), 2**70, "a number of 71 bits"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_contradicts_itself_is_refused_with_one_sentence(checkpoint, tmp_path, path, value, message):
    set_item(checkpoint, path, value)
    write_checkpoint(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError) as error:
        read_verified(tmp_path / "x.ckpt")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_endless_nesting_is_refused(checkpoint, tmp_path):
    for cycle in [], {}:
        nested = cycle
        for _ in range(60):
            nested = [nested, nested]  # 2^60 leaves in a few bytes
        cycle.append(cycle) if isinstance(cycle, list) else cycle.update(self=cycle)
        for value in cycle, nested:
            write_checkpoint(checkpoint | {"anything": value}, tmp_path / "x.ckpt")
            with pytest.raises(ValueError, match="nests deeper"):
                read_verified(tmp_path / "x.ckpt")


def archive(entries, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(checkpoint, tmp_path):
    write_checkpoint(checkpoint, path := tmp_path / "x.ckpt")
    with zipfile.ZipFile(path) as good:
        entries = [(name, good.read(name)) for name in good.namelist()]
    twice = [*entries, ("other/data.pkl", entries[0][1])]
    bomb = archive([*entries, ("archive/data/99", bytes(10**8))], zipfile.ZIP_DEFLATED)
    plain = archive(entries)
    at = plain.rindex(b"PK\1\2")  # the last entry of the table says that it is larger
    lies = plain[: at + 20] + struct.pack("<II", 2**31, 2**31) + plain[at + 28 :]
    for data in bomb, archive(twice), lies, b"before" + plain:
        append_checksum(file := io.BytesIO(data))
        path.write_bytes(file.getvalue())
        with pytest.raises(ValueError, match="can't be read as plain data|not a complete zip archive"):
            read_verified(path)
    path.write_bytes(plain)
    with pytest.raises(ValueError, match="its checksum is missing"):  # everything else is valid
        read_verified(path)


def test_a_net_with_tied_embeddings_and_byte_pairs_loads(checkpoint, tmp_path):
    merges = BPETokenizer.merges_of(["# ## ### the the the"] * 9, 260)
    tied = deepcopy(checkpoint)
    tied["state_dict"] |= {f"net.{name}.weight": torch.zeros(264, 16) for name in ("wte", "lm_head")}
    tied[MODEL] |= {"vocab_size": 264, "tie_embeddings": True}
    tied[DATA] |= {"tokenizer": "bpe", "vocabulary": merges}
    write_checkpoint(tied, tmp_path / "x.ckpt")
    net, tokenizer = load_net(tmp_path / "x.ckpt")
    assert net.lm_head.weight is net.wte.weight and len(tokenizer) == 264


# --- what a file says about its run -----------------------------------------------------------------------------------

EVIL = [{"class_path": "evil.Evil"}]
SAVER = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "elsewhere"}}


@pytest.fixture
def hostile_checkpoint(checkpoint, tmp_path, monkeypatch):
    """Write a checkpoint with a changed config, in a folder with a module that must not be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("from lightning import Callback\nopen('bomb', 'w')\nclass Evil(Callback): ...")

    def hostile_checkpoint(change):
        config = yaml.safe_load(checkpoint["config"])
        write_checkpoint(
            checkpoint | {"config": change if isinstance(change, str) else yaml.safe_dump(change(config))}, "x.ckpt"
        )
        return read_checkpoint("x.ckpt")

    return hostile_checkpoint


@pytest.mark.parametrize(
    "key, value",
    [
        ("callbacks", EVIL),
        ("callbacks+", EVIL),
        ("callbacks.class_path", "evil.Evil"),
        ("callbacks+", SAVER),
        ("plugins+", EVIL),
        ("plugins", "evil.Evil"),
        ("logger+", EVIL),
        ("logger.class_path", "evil.Evil"),
        ("logger", "evil.Evil"),
        ("profiler", {"class_path": "evil.Evil"}),
        ("profiler", "advanced"),
        ("strategy", "evil.Evil"),
        ("strategy", EVIL[0]),
        ("strategy", {"accelerator": 1}),
        ("num_nodes", 7),
        ("accelerator", EVIL),
        ("default_root_dir", "elsewhere"),
        ("barebones", True),
        ("evil.Evil", 1),
        (7, EVIL),
    ],
    ids=str,
)
def test_no_setting_from_a_checkpoint_names_a_class_or_a_folder(hostile_checkpoint, key, value):
    checkpoint = hostile_checkpoint(lambda config: config | {"trainer": config["trainer"] | {key: value}})
    for command in "fit", "validate":
        trainer = run_settings(checkpoint, command, LanguageModel, TextDataModule)["trainer"]
        assert set(trainer) <= FROM_TRAINER and all(map(is_plain, trainer.values()))
    assert class_settings(Path("x.ckpt"), checkpoint, ".")[0] == {}


def test_classes_named_in_a_checkpoint_are_not_imported_and_a_warning_says_so(hostile_checkpoint, capsys):
    keys = "callbacks+", "callbacks.class_path", "plugins+", "logger+"
    hostile_checkpoint(lambda config: config | {"trainer": config["trainer"] | {key: deepcopy(EVIL) for key in keys}})
    capsys.readouterr()
    main(["fit", "--ckpt_path=x.ckpt", "--trainer.max_steps=6"])
    assert not Path("bomb").exists() and not Path("elsewhere").exists()
    assert capsys.readouterr().err.startswith("lightning-gpt: the run had trainer.callbacks and trainer.logger and ")


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")
)


@pytest.mark.parametrize(
    "config, message",
    [
        (BOMB, "aliases"),
        ("trainer: " + "[" * 5000, "too many aliases, values, levels or digits"),
        ("trainer: [" + "1," * 20_000 + "]", "too many aliases, values, levels or digits"),
        ("trainer: {max_steps: 0x" + "9" * 5000 + "}", "its trainer.max_steps is a number of 20000 bits"),
        ("trainer: {max_steps: 2020-99-99}", "can't be read"),
        ("trainer: {max_steps: [", "can't be read"),
        ("a: &a {b: 1}\nc: {<<: *a}", "too many aliases, values, levels or digits"),
        ("trainer:\n  max_steps: " + "1:" * 900 + "1", "too many aliases, values, levels or digits"),
        ("trainer: !!python/object/apply:os.system [touch bomb]", "can't be read"),
        ("- a\n- b", "it is a list"),
        ("trainer: 5", "its trainer is a int"),
        ("sample: [5]", "its sample is a list"),
        ("sample: {prompts: [5]}", "its sample.prompts is a list"),
        ("trainer: {max_steps: evil.Evil}", "its trainer.max_steps is 'evil.Evil'"),
        ("trainer: {max_steps: 2020-01-01}", "its trainer.max_steps"),
        ("trainer: {max_steps: .nan}", "its trainer.max_steps"),
    ],
    ids=lambda text: text[:30],
)
def test_an_invalid_config_text_is_refused(hostile_checkpoint, fails, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_settings(hostile_checkpoint(config), "fit", LanguageModel, TextDataModule)
    if config in (BOMB, "- a\n- b"):
        for command in "fit", "validate":
            assert message in fails(command, "--ckpt_path=x.ckpt")
    assert not Path("bomb").exists()


def test_plain_trainer_settings_are_kept(hostile_checkpoint, monkeypatch):
    given = {"max_time": "00:12:00:00", "devices": [0, 1], "gradient_clip_val": math.inf, "precision": "bf16-mixed"}
    given |= {"deterministic": "warn", "limit_val_batches": 0.5, "val_check_interval": 3, "strategy": "fsdp2"}
    checkpoint = hostile_checkpoint(lambda config: config | {"trainer": given | {"num_nodes": 2, "max_steps": None}})
    assert run_settings(checkpoint, "fit", LanguageModel, TextDataModule)["trainer"] == given | {"max_steps": None}
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert run_settings(checkpoint, "fit", LanguageModel, TextDataModule)["trainer"]["num_nodes"] == 2


def test_a_pipe_named_by_the_checkpoint_is_not_read(checkpoint, tmp_path, fails):
    os.mkfifo(pipe := tmp_path / "pipe")
    checkpoint[DATA]["corpus"] = f"{tmp_path}/none,{pipe}"
    write_checkpoint(checkpoint, tmp_path / "x.ckpt")
    assert f"{pipe}, a device or a pipe" in fails("validate", f"--ckpt_path={tmp_path}/x.ckpt")


def test_token_files_with_another_vocabulary_size_are_refused(token_files):
    kwargs = dict(token_files=token_files, block_size=4, tokenizer="char", vocabulary="aab")
    with pytest.raises(ValueError, match="data.vocab_size=300 must be 2, the number of tokens"):
        TextDataModule(**kwargs, vocab_size=300)


def test_an_unknown_setting_is_refused(checkpoint):
    checkpoint[MODEL]["callbacks"] = 3
    with pytest.raises(ValueError, match="unknown here: callbacks"):
        run_settings(checkpoint, "fit", LanguageModel, TextDataModule)


STATE = "optimizer_states", 0
IN_GROUP = *STATE, "param_groups", 0
IN_LOOP = "loops", "fit_loop"


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("loops",), {}, "loops.fit_loop is missing"),
        ((*IN_LOOP, "epoch_progress", "total"), 7, "loops.fit_loop.epoch_progress.total.ready is missing"),
        ((*IN_LOOP, "epoch_progress", "total", "ready"), -1, "loops.fit_loop.epoch_progress.total.ready is -1"),
        ((*IN_LOOP, "epoch_progress", "total", "ready"), "1", "loops.fit_loop.epoch_progress.total.ready is '1'"),
        ((*IN_LOOP, "state_dict"), {"combined_loader": 3}, "loops.fit_loop.state_dict is not empty"),
        (("optimizer_states",), {}, "no state of exactly one optimizer"),
        ((*STATE, "param_groups"), [], "does not have the 2 parameter groups"),
        ((*IN_GROUP, "params"), [0], "does not have the 7 parameters"),
        ((*IN_GROUP, "params"), [0] * 7, "indices are not unique integers"),
        ((*IN_GROUP, "params"), [[]] * 7, "indices are not unique integers"),
        ((*IN_GROUP, "eps"), "small", "its optimizer has eps='small'"),
        ((*IN_GROUP, "amsgrad"), True, "flags that this package does not set"),
        ((*IN_GROUP, "fused"), "yes", "flags that this package does not set"),
        ((*STATE, "state", 0, "exp_avg"), torch.zeros(3), "exp_avg does not have the parameter's shape (32, 16)"),
        ((*STATE, "state", 0, "exp_avg"), "none", "exp_avg does not have the parameter's shape (32, 16)"),
        ((*STATE, "state", 0), {"momentum_buffer": torch.zeros(32, 16)}, "does not have exp_avg, exp_avg_sq, step"),
        ((*STATE, "state", 99), {}, "parameters that do not exist"),
    ],
    ids=str,
)
def test_a_training_state_that_does_not_fit_is_refused(checkpoint, path, value, message):
    loops, groups = deepcopy(checkpoint["loops"]), LanguageModel(**checkpoint[MODEL]).parameter_groups()
    set_item(checkpoint, path, value)
    with pytest.raises(ValueError) as error:
        check_counters(checkpoint["loops"], loops, "loops")
        check_optimizer_state(checkpoint["optimizer_states"], groups)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("loops",), ..., "loops.fit_loop is missing"),
        (("global_step",), 3, "its optimizer has taken 5 steps, but its global_step is 3"),
        (("lr_schedulers",), ..., "no lr_schedulers"),
        (("callbacks",), [1], "its callbacks have no names"),
        (("callbacks", "UpdateRatios", "best"), "low", "UpdateRatios.best is 'low'"),
    ],
    ids=str,
)
def test_a_run_with_a_bad_training_state_is_refused_before_it_starts(checkpoint, tmp_path, fails, path, value, message):
    set_item(checkpoint, path, value)
    write_checkpoint(checkpoint, tmp_path / "x.ckpt")
    root = f"--trainer.default_root_dir={tmp_path}"
    error = fails("fit", f"--ckpt_path={tmp_path}/x.ckpt", "--trainer.max_steps=6", root)
    assert message in error and "--model.init_from" in error and not list(tmp_path.rglob("last.ckpt"))


# --- settings in a checkpoint are kept literally ----------------------------------------------------------------------


TEXTS = ["#.$*@ \n", "~", "1e3", "yes", "no", "{}", "[]", "0x1", "- a", "a: b", "!y", "&a", "*a", "'a'", '"a"', "|\n"]
TEXTS += [
    "null",
    "2020-01-01",
    "12:30:00",
    "# #\n## ##",
    "",
    " ",
    "key: [a",
    "\ufeff\x85\u2028\x07é😀",
    ".5",
    "1_0",
    "=",
]


def test_every_text_reaches_a_config_unchanged(tmp_path):
    parser = TrainingParser()
    parser.add_argument("--text", type=str | None)
    parser.add_argument("--config", action="config")
    for text in TEXTS:
        assert parser.parse_args([f"--config={to_quoted_yaml({'text': text})}"]).text == text


@pytest.mark.parametrize("characters", ["#.$*@ \n", pytest.param("~", marks=pytest.mark.slow)])
def test_any_vocabulary_can_be_trained_validated_resumed_and_fine_tuned(tmp_path, characters, capsys):
    rng = random.Random(0)
    (tmp_path / "text").write_text("".join(rng.choice(characters) for _ in range(400)))
    paths = [f"--data.corpus={tmp_path}/text", f"--trainer.default_root_dir={tmp_path}", "--sample.length=0"]
    main(["fit", *TINY, *paths, "--trainer.max_steps=1"])
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    main(["validate", f"--ckpt_path={last}"])
    main(["fit", f"--ckpt_path={last}", paths[1], "--trainer.max_steps=2"])
    main(["fit", *TINY, *paths, "--trainer.max_steps=1", f"--model.init_from={last}"])
    vocabularies = [read_checkpoint(file)[DATA]["vocabulary"] for file in tmp_path.rglob("last.ckpt")]
    assert vocabularies == ["".join(sorted(characters))] * 2 and "val/loss" in capsys.readouterr().out


# --- resuming ---------------------------------------------------------------------------------------------------------


class UserCallback(L.Callback):
    def on_train_start(self, trainer, *_):
        print(f"user callback since {trainer.global_step}")


def test_a_users_callbacks_are_restored_from_the_runs_config_file_only(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "tiny" / "version_0"))
    config_file, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    config = yaml.safe_load(config_file.read_text())
    config["trainer"] |= {"callbacks": [{"class_path": f"{__name__}.UserCallback"}], "default_root_dir": str(tmp_path)}
    config_file.write_text(yaml.safe_dump(config))
    checkpoint = read_checkpoint(last)
    write_checkpoint(checkpoint | {"config": config_file.read_text()}, last)
    shutil.copy(last, tmp_path / "copy.ckpt")
    capsys.readouterr()
    more = [f"--trainer.default_root_dir={tmp_path}", "--sample.length=0", "--trainer.max_steps"]
    main(["fit", f"--ckpt_path={last}", *more, "6"])
    captured = capsys.readouterr()
    assert "user callback since 5" in captured.out and "are not restored" not in captured.err
    main(["fit", f"--ckpt_path={tmp_path}/copy.ckpt", *more, "6"])
    captured = capsys.readouterr()
    assert "user callback since" not in captured.out and "had trainer.callbacks, which name classes" in captured.err
    main(["fit", f"--ckpt_path={last}", f"--config={config_file}", *more, "7"])  # Lightning's usual way
    main(["validate", f"--config={config_file}", f"--ckpt_path={last}"])
    captured = capsys.readouterr()
    assert "user callback since 6" in captured.out and "val/loss" in captured.out and "not restored" not in captured.err
    assert read_checkpoint(last)["global_step"] == 7


def test_a_resumed_run_can_start_or_drop_the_weight_average(run, tmp_path, capsys):
    last, more = run / "checkpoints" / "last.ckpt", ["--sample.length=0", "--model.learning_rate=0"]
    with_ema = ["--model.ema_decay=0.9", "--trainer.max_steps=6", f"--trainer.default_root_dir={tmp_path}/a"]
    main(["fit", f"--ckpt_path={last}", *with_ema, *more])
    (averaged,) = (tmp_path / "a").rglob("last.ckpt")
    weights, first = read_checkpoint(averaged)["state_dict"], read_checkpoint(last)["state_dict"]
    assert all(torch.equal(weights[f"{net}.{name[4:]}"], w) for name, w in first.items() for net in ("net", "ema_net"))
    capsys.readouterr()
    without = ["--model.ema_decay=0", "--trainer.max_steps=7", f"--trainer.default_root_dir={tmp_path}/b"]
    main(["fit", f"--ckpt_path={averaged}", *without, *more])
    assert "their average is dropped" in capsys.readouterr().err
    (plain,) = (tmp_path / "b").rglob("last.ckpt")
    assert read_checkpoint(plain)["state_dict"].keys() == first.keys()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--data.on_unknown=replace", "data.on_unknown=replace needs "),
        ("--model.optimizer=muon", "model.optimizer=muon contradicts the checkpoint"),
        ("--trainer.precision=transformer-engine", "trainer.precision=transformer-engine"),
    ],
)
def test_settings_that_a_resumed_run_cannot_change_are_refused(run, tmp_path, fails, flag, message):
    last = run / "checkpoints" / "last.ckpt"
    assert message in fails("fit", f"--ckpt_path={last}", flag, "--trainer.max_steps=6")
    if "data" in flag:
        assert message in fails("validate", f"--ckpt_path={last}", flag)


def test_load_from_checkpoint_reads_full_and_int8_checkpoints(run, tmp_path):
    net, _ = load_net(last := run / "checkpoints" / "last.ckpt")
    lm = LanguageModel.load_from_checkpoint(last)
    assert all(torch.equal(w, lm.net.state_dict()[name]) for name, w in net.state_dict().items())
    quantize(str(last), str(tmp_path / "small.ckpt"))
    (small, _), lm = (
        load_net(tmp_path / "small.ckpt"),
        LanguageModel.load_from_checkpoint(tmp_path / "small.ckpt"),
    )
    assert all(torch.equal(w, lm.net.state_dict()[name]) for name, w in small.state_dict().items())


# --- arbitrary files --------------------------------------------------------------------------------------------------

SCALARS = [None, True, False, 0, 1, -1, 7, 2**31, 2**53 + 1, 2**62, -(2**62), 0.0, 0.5, -1.5, 1e300, math.inf, math.nan]
SCALARS += ["", "a", "null", "~", "# a", "evil.Evil", "../../out", "/dev/zero", "a" * 5000, "\0", "é😀", "[" * 300]
EVIL_VALUES = [EVIL, EVIL[0], SAVER, {"class_path": "os.system", "init_args": {"command": "touch bomb"}}]
BAD_CONFIGS = [BOMB, "- a", "{", "\0", "a: " + "[" * 9999, "trainer: {plugins+: !!python/name:os.a }", "é" * 10**6]
SHAPES, TYPES = [(), (0,), (1,), (16,), (32, 16), (3, 4, 5)], [*FLOAT_DTYPES, torch.int64, torch.bool]


def random_value(rng, depth=0):
    """A random value of any type, size and nesting that a pickle of plain data can hold."""
    choice = rng.randrange(14 if depth < 4 else 6)
    if choice < 6:
        return rng.choice(SCALARS)
    if choice < 8:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if choice < 10:
        return {rng.choice([*"abc", *SCALARS[:9]]): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if choice == 10:
        return tuple(random_value(rng, depth + 1) for _ in range(3))
    if choice == 11:
        return deepcopy(rng.choice(EVIL_VALUES))
    if choice == 12:
        w = torch.zeros(rng.choice(SHAPES), dtype=rng.choice(TYPES))
        return rng.choice([w, w + 1, w.to_sparse() if w.dim() else w, w.to("meta"), w.expand(7, *w.shape), w / 0])
    nested = random_value(rng, depth + 1)
    for _ in range(rng.choice([3, 30, 300])):
        nested = [nested, nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def key_paths(value, path=()):
    """The path of keys to every item in a checkpoint."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from key_paths(value[key], (*path, key))


def corrupt(checkpoint, config, rng):
    """A copy of a checkpoint with random values for some fields or for its config text."""
    paths, checkpoint, config = list(key_paths(checkpoint)), deepcopy(checkpoint), deepcopy(config)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if rng.random() < 0.4:
            parts = [part for part in (config, *config.values(), *[config["trainer"]] * 3) if type(part) is dict]
            part, end = rng.choice(parts), rng.choice(["", "", "", "+", ".class_path", ".init_args"])
            part[rng.choice([*part, "callbacks", "plugins", "logger", "profiler"]) + end] = random_value(rng)
            continue
        top = rng.choice([*checkpoint, MODEL, DATA, MODEL, DATA, "state_dict"])
        path = rng.choice([path for path in paths if path[0] == top] or [("more",)])
        path = rng.choice([path, path, (*path[:-1], "more")])
        with suppress(KeyError, IndexError, TypeError):  # an earlier change removed that item
            set_item(checkpoint, path, ... if rng.random() < 0.15 else random_value(rng))
    if isinstance(checkpoint.get("config"), str):
        try:
            checkpoint["config"] = yaml.safe_dump(config) if rng.random() < 0.95 else rng.choice(BAD_CONFIGS)
        except (yaml.YAMLError, RecursionError, TypeError):  # it has a tensor, or nests too deep
            checkpoint["config"] = rng.choice(BAD_CONFIGS)
    return checkpoint


@pytest.fixture(scope="module")
def parser():
    """The part of the command line that parses a checkpoint's settings."""
    parser = TrainingParser()
    parser.add_argument("--config", action="config")
    for made_of, name in (L.Trainer, "trainer"), (LanguageModel, "model"), (TextDataModule, "data"):
        parser.add_lightning_class_args(made_of, name)
    return parser


def try_to_load(path, parser, capsys):
    """Read a file as each command does before Lightning starts; return "" or its one-line error message."""
    try:
        net, tokenizer = load_net(path)
        checkpoint = read_verified(path)
        tokenizer.decode(generate_ids(net, torch.zeros(1, 1, dtype=torch.int64), 2)[0])
        for command in "fit", "validate":
            settings = run_settings(checkpoint, command, LanguageModel, TextDataModule)
            trainer = settings["trainer"]
            assert set(trainer) <= FROM_TRAINER and not any(names_classes(key, trainer[key]) for key in trainer)
            assert yaml.safe_load(to_quoted_yaml(settings)) == as_lists(settings)
            config = parser.parse_args(
                [f"--config={to_quoted_yaml({key: settings[key] for key in ('trainer', 'model', 'data')})}"]
            )
            lm = LanguageModel(**config.model)
        assert class_settings(path, checkpoint, ".")[0] == {}
        if "optimizer_states" in checkpoint:
            check_optimizer_state(checkpoint["optimizer_states"], lm.parameter_groups())
            check_counters(checkpoint.get("loops"), checkpoint.get("loops"), "loops")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    except SystemExit as stop:
        assert stop.code == 2
        return capsys.readouterr().err.strip()
    return ""


@pytest.mark.parametrize("times", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_corrupted_file_runs_no_code_and_is_loaded_or_refused_quickly(
    checkpoint, tmp_path, monkeypatch, parser, capsys, times
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("open('bomb', 'w')\nclass Evil: ...")
    path, config, outcomes, slowest = tmp_path / "x.ckpt", yaml.safe_load(checkpoint["config"]), Counter(), 0.0
    for seed in range(times):
        try:
            write_checkpoint(corrupt(checkpoint, config, random.Random(seed)), path)
        except RecursionError:  # it cannot be pickled
            continue
        since = time.perf_counter()
        outcomes[re.sub("[^a-z ]+", "", try_to_load(path, parser, capsys).split(": ")[-1])[:40]] += 1
        slowest = max(slowest, time.perf_counter() - since)
        assert slowest < 20, seed
    assert {file.name for file in tmp_path.iterdir()} <= {"evil.py", "x.ckpt", "__pycache__"}
    assert 0.05 * times < outcomes[""] < 0.9 * times  # both outcomes occur
    print(f"\n{outcomes.total()} files, slowest {slowest:.2f} s", *outcomes.most_common(), sep="\n")


@pytest.mark.slow
def test_every_command_loads_or_refuses_a_corrupted_file(checkpoint, launcher, tmp_path):
    (tmp_path / "evil.py").write_text("open('bomb', 'w')\nclass Evil: ...")
    quick = ["--sample.length=0", "--trainer.max_steps=6", "--trainer.max_time=00:00:00:20"]
    path, config, corpus = tmp_path / "x.ckpt", yaml.safe_load(checkpoint["config"]), checkpoint[DATA]["corpus"]
    for seed in range(50):
        write_checkpoint(corrupt(checkpoint, config, random.Random(10_000 + seed)), path)
        for command in (
            ["fit", f"--ckpt_path={path}", *quick],
            ["fit", *TINY, f"--model.init_from={path}", f"--data.corpus={corpus}", *quick],
            ["validate", f"--ckpt_path={path}"],
            ["generate", f"--ckpt_path={path}", "--max_new_tokens=2"],
            ["score", f"--ckpt_path={path}", f"--text_file={corpus}"],
            ["quantize", f"--ckpt_path={path}", "--output=small.ckpt"],
            ["export", "--to=safetensors", f"--ckpt_path={path}", "--output=x.safetensors"],
        ):
            code = launcher.run(tmp_path, *command)
            output = launcher.log.read_text() if launcher.log.exists() else ""
            assert code in (0, 1, 2) and "Traceback" not in output, (seed, command, output[-2000:])
            launcher.log.unlink(missing_ok=True)
    assert not (tmp_path / "bomb").exists() and not (tmp_path / "elsewhere").exists()
