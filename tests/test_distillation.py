"""Distillation: a model that learns from the mean probabilities of other checkpoints."""

import pytest
import torch
from conftest import TINY, T, V
from torch.nn import functional as F

from lightning_gpt.checkpoint.io import find_checkpoints, read_checkpoint
from lightning_gpt.cli.main import main
from lightning_gpt.inference.text import load
from lightning_gpt.model.ensemble import Ensemble
from lightning_gpt.training.losses import cross_entropy
from lightning_gpt.training.module import LanguageModel


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_sum_of_both_cross_entropies_over_the_counted_targets(net, modern, idx, weight):
    y = idx.roll(-1, 1).clone()
    y[0, :5] = -100
    teacher = Ensemble([net, modern])(idx)
    logits = torch.randn(2, T, V, dtype=torch.float64, requires_grad=True)
    total = 0.0
    for b in range(2):
        for t in range(T):
            if y[b, t] >= 0:
                logprobs = logits[b, t] - logits[b, t].exp().sum().log()
                target = weight * (net(idx)[b, t].softmax(-1) + modern(idx)[b, t].softmax(-1)) / 2
                target = target + (1 - weight) * F.one_hot(y[b, t], V).double()
                total = total - (target * logprobs).sum() / (y >= 0).sum()
    loss = cross_entropy(logits, y, teacher, weight)
    torch.testing.assert_close(loss, total, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, total)), rtol=0, atol=1e-12)


def test_a_student_that_equals_its_teacher_stays_as_it_is(net, idx):
    lm = LanguageModel(
        vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=16, dropout=0.0, soft_weight=1.0
    ).double()
    lm.net.load_state_dict(net.state_dict())
    lm.teachers = [net.requires_grad_(False)]
    lm.train_loss(idx, idx.roll(-1, 1)).backward()
    assert max(p.grad.abs().max() for p in lm.net.parameters()) < 1e-15
    assert not any("teacher" in name for name in lm.state_dict())


def fit(root, corpus, *flags):
    main(["fit", *TINY, "--data.corpus", str(corpus), "--trainer.default_root_dir", str(root), *flags])
    return root / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, text_file):
    root = tmp_path_factory.mktemp("teachers")
    return [fit(root / seed, text_file, "--seed_everything", seed, "--trainer.max_steps", "2") for seed in "12"]


def test_a_resumed_student_has_the_same_teachers_and_ends_with_the_same_weights(tmp_path, teachers, text_file, capsys):
    pattern = str(teachers[0].parents[4] / "?" / "tiny" / "version_0" / "checkpoints" / "last.ckpt")
    assert find_checkpoints(pattern) == teachers
    flags = "--model.teachers", pattern, "--save_every_n_steps", "1", "--trainer.precision", "64-true"
    unbroken = read_checkpoint(fit(tmp_path / "unbroken", text_file, *flags, "--trainer.max_steps", "4"))
    begun = fit(tmp_path / "resumed", text_file, *flags, "--trainer.max_steps", "2")
    main(["fit", "--ckpt_path", str(begun), "--trainer.max_steps", "4"])
    resumed, alone = (
        read_checkpoint(begun),
        read_checkpoint(fit(tmp_path / "alone", text_file, *flags[2:], "--trainer.max_steps", "4")),
    )
    assert resumed["hyper_parameters"]["teachers"] == ",".join(map(str, teachers))
    assert resumed["state_dict"].keys() == alone["state_dict"].keys()
    for name, weight in unbroken["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name])
    assert any(not torch.equal(weight, alone["state_dict"][name]) for name, weight in unbroken["state_dict"].items())
    main(["validate", "--ckpt_path", str(begun)])  # needs no teachers
    assert "nats" in capsys.readouterr().out
    assert load(begun, "cpu")[0].training is False


@pytest.mark.slow
def test_a_compiled_student_ends_with_the_same_weights(tmp_path, teachers, text_file):
    flags = "--trainer.max_steps=3", "--trainer.precision=64-true", "--model.dropout=0"
    student = *flags, f"--model.teachers={teachers[0]},{teachers[1]}"
    eager = read_checkpoint(fit(tmp_path / "eager", text_file, *student))["state_dict"]
    alone = read_checkpoint(fit(tmp_path / "alone", text_file, *flags))["state_dict"]
    compiled = read_checkpoint(fit(tmp_path / "compiled", text_file, *student, "--model.compile=true"))["state_dict"]
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-9)
    assert max((alone[name] - weight).abs().max() for name, weight in eager.items()) > 1e-4


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--model.block_size", "40"], "the teachers' block_size=16 is less than model.block_size=40"),
        (["--data.tokenizer", "byte"], "another vocabulary"),
        (["--model.soft_weight", "1.5"], "soft_weight=1.5"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, teachers, text_file, capsys, flags, error):
    with pytest.raises(SystemExit, match="2"):
        fit(tmp_path, text_file, "--model.teachers", str(teachers[0]), *flags)
    message = capsys.readouterr().err
    assert error in message and "Traceback" not in message
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_stage_with_another_loss_refuses_teachers(tmp_path, teachers):
    from lightning_gpt.alignment.stages import RewardModeling

    with pytest.raises(ValueError, match="for fit and sft; reward has another loss"):
        RewardModeling(vocab_size=V, block_size=T, teachers=str(teachers[0]))
