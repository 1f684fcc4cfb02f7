"""Fine-tuning: a new run that starts from the weights of a checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY

from lightning_gpt.checkpoint.io import load_net, read_checkpoint
from lightning_gpt.checkpoint.transfer import transfer_weights
from lightning_gpt.cli.main import main
from lightning_gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from lightning_gpt.inference.engine import generate_ids

SHAPE = [
    "--model.ngram_max=3",
    "--model.ngram_buckets=50",
    "--model.n_layer=2",
    "--model.position=rope",
    "--model.norm=rmsnorm",
]
RECIPE = ["--model.optimizer=muon", "--model.ema_decay=0.5"]
SMALL = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--sample.length=10"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_file):
    """The last checkpoint of a run with a weight average, n-grams and Muon; no size is the default."""
    root = tmp_path_factory.mktemp("base")
    fit(root, text_file, *TINY, *SHAPE, *RECIPE)
    return root / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture
def play(tmp_path, text_file):
    """Another text with the same characters."""
    (tmp_path / "play.txt").write_text(text_file.read_text()[::-1])
    return tmp_path / "play.txt"


def fit(root, corpus, *flags):
    main(["fit", *map(str, flags), f"--data.corpus={corpus}", f"--trainer.default_root_dir={root}"])


def tune(root, base, corpus, *flags):
    """Fine-tune for four steps and return the last checkpoint."""
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--model.min_lr_ratio=1"]
    fit(root, corpus, "--config=finetune", *SMALL, *short, f"--model.init_from={base}", *flags)
    return read_checkpoint(Path(root) / "finetune" / "version_0" / "checkpoints" / "last.ckpt")


def weights(checkpoint, prefix):
    return {k.removeprefix(prefix): w for k, w in checkpoint["state_dict"].items() if k.startswith(prefix)}


def test_fine_tuning_starts_from_the_average_with_the_checkpoints_sizes_and_vocabulary(tmp_path, base, play):
    start = read_checkpoint(base)
    tuned = tune(tmp_path, base, play, "--model.learning_rate=0", "--model.ema_decay=0.9")
    for prefix in "net.", "ema_net.":
        now, then = weights(tuned, prefix), weights(start, "ema_net.")
        assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in now)
    assert not torch.equal(start["state_dict"]["net.wte.weight"], start["state_dict"]["ema_net.wte.weight"])
    assert tuned["datamodule_hyper_parameters"]["vocabulary"] == start["datamodule_hyper_parameters"]["vocabulary"]
    assert tuned["global_step"] == 4 and tuned["hyper_parameters"]["n_layer"] == 2


def test_a_resumed_fine_tuning_equals_the_unbroken_one_bit_for_bit_without_the_first_checkpoint(tmp_path, base, play):
    flags = ["--model.freeze_layers=1", *RECIPE]
    copy = shutil.copy(base, tmp_path / "start.ckpt")
    tune(tmp_path / "a", copy, play, *flags)
    Path(copy).unlink()
    last = tmp_path / "a" / "finetune" / "version_0" / "checkpoints" / "last.ckpt"
    main(["fit", f"--ckpt_path={last}", "--trainer.max_steps=7", f"--trainer.default_root_dir={tmp_path}/a"])
    unbroken, resumed = tune(tmp_path / "b", base, play, *flags, "--trainer.max_steps=7"), read_checkpoint(last)
    assert resumed["global_step"] == unbroken["global_step"] == 7
    for name, w in unbroken["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], w), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_layers_stay_the_same_and_the_others_change(tmp_path, base, play, optimizer):
    start = weights(read_checkpoint(base), "ema_net.")
    tuned = weights(tune(tmp_path, base, play, "--model.freeze_layers=1", f"--model.optimizer={optimizer}"), "net.")
    for name, w in tuned.items():
        assert torch.equal(w, start[name]) == name.startswith(("w", "h.0.")), name


def test_extending_the_vocabulary_keeps_old_ids_and_logits(tmp_path, base, play):
    text = "Zoë sat on a mat\n" * 30
    play.write_text(text + play.read_text())
    tune(tmp_path, base, play, "--data.on_unknown=extend", "--model.learning_rate=0")
    last = tmp_path / "finetune" / "version_0" / "checkpoints" / "last.ckpt"
    (old_net, old), (net, new) = load_net(base), load_net(last)
    assert new.vocabulary == old.vocabulary + "Zë"
    idx = old.encode("the cat")[None]
    assert torch.equal(net(idx)[..., : len(old)], old_net(idx))
    assert torch.equal(new.encode("the cat"), old.encode("the cat"))
    assert new.decode(generate_ids(net, new.encode("Zoë")[None], 5))[:3] == "Zoë"
    main(["validate", f"--ckpt_path={last}"])


def test_a_shorter_context_keeps_the_first_position_embeddings(tmp_path, text_file, play):
    fit(tmp_path, text_file, *TINY)
    first = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    tuned = tune(tmp_path, first, play, "--model.block_size=7", "--model.learning_rate=0")
    before = read_checkpoint(first)["state_dict"]["net.wpe.weight"]
    assert torch.equal(tuned["state_dict"]["net.wpe.weight"], before[:7]) and len(before) == 16


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.n_layer=3"], "model.n_layer=3 contradicts the checkpoint"),
        (["--model.block_size=99"], "model.block_size=99 contradicts"),
        (["--data.tokenizer=byte"], "data.tokenizer=byte contradicts"),
        (["--data.vocabulary=abc"], "data.vocabulary=abc contradicts"),
        (["--model.freeze_layers=3"], "freeze_layers=3 must be 0 or more, and 2 at most"),
        (["--model.init_from=nowhere.ckpt"], "nowhere.ckpt does not exist"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(tmp_path, base, play, fails, flags, message):
    paths = [f"--data.corpus={play}", f"--trainer.default_root_dir={tmp_path}/run"]
    assert message in fails("fit", "--config=finetune", *SMALL, f"--model.init_from={base}", *paths, *flags)


def test_unknown_characters_are_named_and_refused_with_frozen_embeddings(tmp_path, base, play, fails):
    play.write_text("Zoë\n" * 300)
    args = ["fit", "--config=finetune", *SMALL, f"--model.init_from={base}", f"--data.corpus={play}"]
    args += [f"--trainer.default_root_dir={tmp_path}/run"]
    error = fails(*args)
    assert "'Zë'" in error and "--data.on_unknown drop, replace or extend" in error
    assert "'Zë'" in fails(*args, "--data.on_unknown=extend", "--model.freeze_layers=1")


def test_a_vocabulary_cannot_be_extended_by_resuming_or_validating(base, fails):
    for command in "fit", "validate":
        assert "would change the vocabulary" in fails(command, f"--ckpt_path={base}", "--data.on_unknown=extend")


def test_weights_for_another_tokenizer_or_shape_are_refused_naming_both(base):
    net, tokenizer = load_net(base)
    fresh = net.state_dict()
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens of its CharTokenizer.* 256 of a ByteTokenizer"):
        transfer_weights(base, fresh, ByteTokenizer())
    with pytest.raises(ValueError, match="which lack"):
        transfer_weights(base, fresh, CharTokenizer(tokenizer.vocabulary[1:]))
    with pytest.raises(ValueError, match=r"h.0.attn.c_proj.weight is \(16, 16\) in it and \(9, 16\) here"):
        transfer_weights(base, fresh | {"h.0.attn.c_proj.weight": torch.zeros(9, 16)}, tokenizer)
    with pytest.raises(ValueError, match="wpe.weight is missing in it"):
        transfer_weights(base, fresh | {"wpe.weight": torch.zeros(9, 16)}, tokenizer)
