"""Ensembles: the mean of the probabilities of several checkpoints, in generate, score and validate."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import MODERN, TINY, T, V, loud
from torch.nn import functional as F

from lightning_gpt.checkpoint.io import find_checkpoints, load_net
from lightning_gpt.cli.main import main
from lightning_gpt.cli.train import CLI
from lightning_gpt.data.tokenizers import CharTokenizer
from lightning_gpt.data.windows import SequentialWindows
from lightning_gpt.inference.engine import generate_ids
from lightning_gpt.inference.text import complete, generate, load, score
from lightning_gpt.model.ensemble import Ensemble
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.model.lecture import build_net

TOKENIZER = CharTokenizer("\n abcdefghijklmno")


@pytest.fixture
def other():
    """A net of other sizes than `net`, with other blocks and a longer context."""
    torch.manual_seed(1)
    return loud(GPT(GPTConfig(V, T + 5, n_layer=1, n_head=1, n_embd=8, dropout=0.0, **MODERN)))


def mean_probs(nets, idx):
    return sum(net(idx).softmax(-1) for net in nets) / len(nets)


def test_logits_are_the_log_of_the_mean_of_the_probabilities(net, other, idx):
    lecture = loud(build_net({"lecture_step": "heads", "vocab_size": V, "block_size": T, "n_embd": 8, "n_head": 2}))
    logits = Ensemble([net, other, lecture])(idx)
    torch.testing.assert_close(logits, mean_probs([net, other, lecture], idx).log(), rtol=0, atol=1e-12)
    assert (
        Ensemble([net.half(), other])(idx).dtype == torch.float64 and Ensemble([net, net])(idx).dtype == torch.float32
    )
    assert Ensemble([other, net]).config == replace(other.config, block_size=T)


@pytest.mark.parametrize("context_shift", [1, 5, T])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 2 * T, T]])
def test_cached_generation_of_nets_of_two_sizes_gives_the_text_of_full_contexts(net, other, lengths, context_shift):
    both, sampling = Ensemble([other, net]), {"temperature": 0, "context_shift": context_shift}
    prompts = torch.randint(V, (3, max(lengths)), generator=torch.Generator().manual_seed(2))
    together = generate_ids(both, prompts, 2 * T, lengths=lengths, **sampling)
    for row, prompt, n in zip(together, prompts, lengths, strict=True):
        assert torch.equal(
            row[: n + 2 * T], generate_ids(both, prompt[None, :n], 2 * T, use_cache=False, **sampling)[0]
        )
    text, start = together[:1], 0  # by hand: no context is longer than the shortest block_size
    for n in range(lengths[0], lengths[0] + 2 * T):
        start += context_shift if n - start > T else 0
        assert text[0, n] == mean_probs([net, other], text[:, start:n])[0, -1].argmax()


def test_the_cache_of_each_net_is_used(net, other):
    read = []
    for each in net, other:
        each.h[0].register_forward_pre_hook(lambda _, args: read.append(args[0].size(1)))
    generate_ids(Ensemble([net, other]), torch.zeros(2, 3, dtype=torch.long), 5, lengths=[3, 2], temperature=0)
    assert read == [3, 3] + [1] * 8


def test_an_ensemble_of_one_net_twice_is_that_net(net):
    twice = Ensemble([net, net])
    assert generate(twice, TOKENIZER, "abc", 3 * T, seed=3) == generate(net, TOKENIZER, "abc", 3 * T, seed=3)
    *_, (one,) = complete(net, TOKENIZER, ["abc"], 20, logprobs=True)
    *_, (two,) = complete(twice, TOKENIZER, ["abc"], 20, logprobs=True)
    assert two.logprobs == pytest.approx(one.logprobs, abs=1e-6)  # they are stored in float32
    text = "abcde fgh" * 5
    assert score(twice, TOKENIZER, text) == pytest.approx(score(net, TOKENIZER, text), rel=1e-12)


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_ckpt(tmp_path_factory, text_file):
    """A checkpoint of another net with a shorter context, trained on the text of `ckpt`."""
    root = tmp_path_factory.mktemp("other")
    sizes = ["--model.block_size=7", "--model.n_embd=8", "--model.ema_decay=0.5", "--seed_everything=3"]
    main(["fit", *TINY, "--data.corpus", str(text_file), f"--trainer.default_root_dir={root}", *sizes])
    return root / "tiny" / "version_0" / "checkpoints" / "best.ckpt"


@pytest.fixture
def measured(monkeypatch):
    """Validates checkpoints in float64; returns val/loss and the tokens of the validation split."""
    seen = []
    monkeypatch.setattr(
        CLI,
        "after_validate",
        lambda cli: seen.append((float(cli.trainer.callback_metrics["val/loss"]), cli.datamodule.val_tokens.long())),
        raising=False,
    )

    def measured(*paths):
        main(["validate", f"--ckpt_path={','.join(map(str, paths))}", "--trainer.precision=64-true"])
        return seen.pop()

    return measured


def test_validate_averages_the_probabilities_over_the_whole_split(ckpt, other_ckpt, measured, capsys):
    (got, tokens), nats = measured(ckpt, other_ckpt), 0.0
    assert "the mean of 2 nets: " in capsys.readouterr().err
    nets = [load_net(path)[0].double() for path in (ckpt, other_ckpt)]
    for window in SequentialWindows(tokens, 7, 1):  # the shorter context of the two
        probs = mean_probs(nets, window[:, :-1])
        nats += F.nll_loss(probs.log().flatten(0, 1), window[:, 1:].flatten().long(), reduction="sum").item()
    assert got == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)  # the metric is in float32


def test_validate_of_one_checkpoint_twice_gives_its_loss(ckpt, measured):
    assert measured(ckpt, ckpt)[0] == pytest.approx(measured(ckpt)[0], rel=1e-6)


def test_generate_and_score_take_a_list_or_a_pattern(ckpt, other_ckpt, text_file, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path, name in (ckpt, "a"), (other_ckpt, "b"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "best.ckpt").write_bytes(path.read_bytes())
    outputs = []
    files = "checkpoints/a/best.ckpt,checkpoints/b/best.ckpt"
    for asked in files, "checkpoints/*/best.ckpt":
        main(["generate", "the", "--json", "--max_new_tokens=9", "--device=cpu", f"--ckpt_path={asked}"])
        out, err = capsys.readouterr()
        outputs.append(json.loads(out))
        assert "the mean of 2 nets: checkpoints/a/best.ckpt, step 5, val/loss" in err
    assert outputs[0]["checkpoint"] == outputs[1]["checkpoint"] == files
    assert outputs[0]["samples"] == outputs[1]["samples"]
    main(["score", str(text_file), "--json", "--device=cpu", "--ckpt_path=best,checkpoints/a/best.ckpt"])
    expected = score(*load(files, "cpu", "float32"), text_file.read_text())  # best is b, the newest
    assert json.loads(capsys.readouterr().out)["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert find_checkpoints("checkpoints/?/best.ckpt") == find_checkpoints(files)


def test_what_can_not_be_averaged_is_refused(ckpt, other_ckpt, tmp_path, text_file, fails):
    shorter = tmp_path / "shorter.txt"
    shorter.write_text(text_file.read_text().replace("q", "k"))
    main(["fit", *TINY, f"--data.corpus={shorter}", f"--trainer.default_root_dir={tmp_path}"])
    shorter = tmp_path / "tiny" / "version_0" / "checkpoints" / "best.ckpt"
    with pytest.raises(ValueError, match="different vocabulary sizes"):
        Ensemble([GPT(GPTConfig(n, 4, 0, 1, 2)) for n in (3, 4)])
    for command in ["generate"], ["score", str(text_file)]:
        error = fails(*command, f"--ckpt_path={ckpt},{shorter}")
        assert f"{ckpt} and {shorter} have different vocabularies" in error
    error = fails("validate", f"--ckpt_path={ckpt},{shorter}")
    assert f"{ckpt} and {shorter} differ in data.corpus and data.vocabulary" in error
    for command in ["fit"], ["quantize"], ["export", "--to=hf"]:
        assert "only generate, score, validate and test take" in fails(*command, f"--ckpt_path={ckpt},{other_ckpt}")
    for command in "generate", "validate":
        assert "no checkpoint matches the pattern nowhere/*.ckpt" in fails(command, "--ckpt_path=nowhere/*.ckpt")
        assert "empty item" in fails(command, f"--ckpt_path={ckpt},")
        assert "the checkpoint nowhere.ckpt does not exist" in fails(command, f"--ckpt_path={ckpt},nowhere.ckpt")
