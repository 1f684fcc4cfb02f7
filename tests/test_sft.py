"""Supervised fine-tuning: the loss is that of the completions, on any number of devices, and a run resumes exactly."""

import json
import re
from itertools import count

import pytest
import torch
from conftest import T, V
from torch.nn import functional as F

from lightning_gpt import LanguageModel
from lightning_gpt.alignment.examples import (
    IGNORED,
    Example,
    ShuffledExamples,
    collate,
    read_examples,
    sequential_batches,
)
from lightning_gpt.alignment.verse import demonstrations, is_followed, kind_of, prompt_for
from lightning_gpt.checkpoint.io import read_checkpoint
from lightning_gpt.cli.main import main
from lightning_gpt.data.tokenizers import CharTokenizer

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz :\n")
TEMPLATE = "{role}:\n{content}\n"


def example(n, prompt, seed=0):
    ids = torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))
    return Example(ids, torch.arange(n) >= prompt)


EXAMPLES = [
    example(n, prompt, seed) for seed, (n, prompt) in enumerate([(9, 3), (5, 2), (T, 6), (7, 1), (4, 3), (8, 4)])
]


@pytest.fixture
def lm():
    torch.manual_seed(0)
    lm = LanguageModel(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=16, dropout=0.0).double()
    torch.nn.init.normal_(lm.net.lm_head.weight)
    return lm


def test_the_loss_is_the_mean_over_the_tokens_of_completions(lm):
    nats = []
    for ids, trained in EXAMPLES:
        losses = F.cross_entropy(lm.net(ids[None, :-1])[0], ids[1:], reduction="none")
        nats += losses[trained[1:]].tolist()
    loss = lm.train_loss(*collate(EXAMPLES))
    torch.testing.assert_close(loss, torch.tensor(nats, dtype=torch.float64).mean(), rtol=0, atol=1e-12)


def test_prompts_and_padding_get_no_targets():
    x, y, targets = collate(EXAMPLES)
    for row, (ids, trained) in enumerate(EXAMPLES):
        n = len(ids)
        assert torch.equal(x[row, :n][: x.size(1)], ids[: x.size(1)])
        assert torch.equal(y[row, : n - 1] != IGNORED, trained[1:]) and (y[row, n - 1 :] == IGNORED).all()
        assert torch.equal(y[row, : n - 1][trained[1:]], ids[1:][trained[1:]])
    assert targets == (y != IGNORED).sum()


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_loss_of_several_devices_is_that_of_one(lm, ranks):
    one = ShuffledExamples(EXAMPLES, 6, 7, collate, count).batch(3)
    shares = [ShuffledExamples(EXAMPLES, 6, 7, collate, count, rank, ranks).batch(3) for rank in range(ranks)]
    losses = [lm.train_loss(*share) for share in shares]  # each times the number of ranks in a run, and then averaged
    torch.testing.assert_close(sum(losses), lm.train_loss(*one), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_validation_sees_every_example_once_on_any_number_of_devices(ranks):
    shares = [sequential_batches(EXAMPLES, 2, collate, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    seen = [int(targets) for share in shares for _, _, targets in share]
    assert sum(seen) == sum(int(one.trained[1:].sum()) for one in EXAMPLES)


def test_a_batch_has_examples_of_similar_length_and_each_is_equally_likely():
    lengths = [2 + i // 8 for i in range(200)]  # 2 to 26, eight of each
    batches = ShuffledExamples([example(n, 1, n) for n in lengths], 4, 0, collate, count)
    counts, padding, total = torch.zeros(27), 0, 0
    for k in range(1500):
        _, y, _ = batches.batch(k)
        sizes = (y != IGNORED).sum(1) + 1
        counts += sizes.bincount(minlength=27)
        padding, total = padding + int((y == IGNORED).sum()), total + y.numel()
    assert padding / total < 0.15
    share = counts[2:] / counts.sum()
    assert ((share - 1 / 25).abs() < 0.25 / 25).all()
    assert torch.equal(batches.batch(5)[0], batches.batch(5)[0]) and not torch.equal(
        batches.batch(5)[0], batches.batch(6)[0]
    )


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_of_a_chat_the_assistant_is_trained_on(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]}
    path = write(tmp_path / "chat.jsonl", chat)
    ((ids, trained),) = read_examples(path, LETTERS, 64, TEMPLATE)
    assert LETTERS.decode(ids) == "user:\nhello\nassistant:\nhi there\n"
    assert LETTERS.decode(ids[trained]) == "hi there\n"


GOOD = {"prompt": "the", "completion": " cat"}


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "a", "completed": "b"}, "line 2 of .* has no 'completion', only 'prompt', 'completed'"),
        ({"prompt": "a", "completion": ""}, "line 2 of .* has an empty completion"),
        ({"prompt": "a", "completion": 3}, "line 2 of .*: 'completion' is a int"),
        ({"prompt": "a" * 60, "completion": "b" * 9}, "line 2 of .* has 69 tokens, more than block_size . 1 = 65"),
        ({"prompt": "A", "completion": "b"}, "line 2 of .*: .*'A'"),
        ({"prompt": "", "completion": "b"}, "line 2 of .* has no prompt before its only token"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2 of .* has an empty completion"),
        ({"messages": "hello"}, "line 2 of .*: messages is not a list"),
        ("{'prompt': 1}", "line 2 of .* is not JSON"),
        ("[1]", "line 2 of .* is a list"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_examples(write(tmp_path / "x.jsonl", GOOD, line), LETTERS, 64, TEMPLATE)


@pytest.fixture
def jsonl(tmp_path):
    words = ["cat", "mat", "sat", "on", "a", "for"]
    lines = [{"prompt": f"the {a}", "completion": f" {b} who"} for a in words for b in words[: 1 + len(a)]]
    return write(tmp_path / "pairs.jsonl", *lines)


def sft(ckpt, jsonl, root, steps, *args):
    start = [f"--ckpt_path={args[0]}"] if args else [f"--model.init_from={ckpt}", f"--data.corpus={jsonl}"]
    main(
        ["sft", *start, f"--trainer.max_steps={steps}", "--trainer.val_check_interval=3", "--sample.length=8"]
        + [f"--trainer.default_root_dir={root}", "--data.batch_size=4", "--trainer.accelerator=cpu"]
        + ["--model.schedule=cosine", "--model.min_lr_ratio=1", "--trainer.devices=1"]
    )
    return root / "sft" / "version_0" / "checkpoints" / "last.ckpt"


def test_sft_learns_the_completions_and_resumes_bit_for_bit(ckpt, jsonl, tmp_path, capsys):
    unbroken = sft(ckpt, jsonl, tmp_path / "a", 6)
    resumed = sft(ckpt, jsonl, tmp_path / "b", 6, sft(ckpt, jsonl, tmp_path / "b", 3))
    a, b = (read_checkpoint(path)["state_dict"] for path in (unbroken, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = read_checkpoint(ckpt)["state_dict"]
    assert not torch.equal(a["net.h.0.attn.c_attn.weight"], start["net.h.0.attn.c_attn.weight"])
    capsys.readouterr()
    main(["validate", f"--ckpt_path={unbroken}", "--trainer.accelerator=cpu", "--trainer.devices=1"])
    (loss,) = re.findall(r"val/loss .*?([0-9.]+) ", capsys.readouterr().out)
    assert float(loss) == pytest.approx(read_checkpoint(unbroken)["val_loss"], abs=1e-5)


def test_a_checkpoint_of_sft_is_not_resumed_as_pre_training_nor_the_other_way_round(ckpt, jsonl, tmp_path, fails):
    tuned = sft(ckpt, jsonl, tmp_path, 1)
    assert "is of sft, not of fit: resume it with sft" in fails("fit", f"--ckpt_path={tuned}", "--trainer.max_steps=9")
    assert "is of fit, not of sft: resume it with fit" in fails("sft", f"--ckpt_path={ckpt}", "--trainer.max_steps=9")


def test_demonstrations_are_of_the_kind_that_their_prompts_ask_for(tmp_path):
    demonstrations(str(tmp_path / "verse.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "verse.jsonl").read_text().splitlines()]
    kinds = [record["prompt"].split("\n")[0] for record in records]
    assert kinds.count("verse") == kinds.count("prose") == len(kinds) / 2
    for kind, record in zip(kinds, records, strict=True):
        assert kind_of([line for line in record["completion"].split("\n") if line]) == kind
        assert len(record["prompt"] + record["completion"]) <= 250


def test_verse_and_prose_are_told_apart():
    verse, prose = "To be\nOr not\nTo be", "it is a\nlong way\nTo go"
    assert kind_of(verse.split("\n")) == "verse" and kind_of(prose.split("\n")) == "prose" and kind_of([]) is None
    assert is_followed("verse", f"{verse}\nand cut") and not is_followed("verse", f"{prose}\n")
    assert prompt_for("verse", "ROMEO") == "verse\n\nROMEO:\n"


def test_sft_without_a_file_says_what_it_needs(ckpt, fails):
    assert "sft needs a file of JSON lines, and there is none" in fails("sft", f"--model.init_from={ckpt}")
