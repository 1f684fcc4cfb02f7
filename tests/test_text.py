"""Text in, text out: streaming, stop strings, scores, the int8 checkpoint, and the commands that use them."""

import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from itertools import cycle

import pytest
import torch
from conftest import loud
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_gpt
from lightning_gpt.checkpoint.io import load_net, read_checkpoint
from lightning_gpt.cli.generate import read_input
from lightning_gpt.cli.main import main
from lightning_gpt.data.corpus import TINY_SHAKESPEARE
from lightning_gpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, TokenIds
from lightning_gpt.data.windows import SequentialWindows
from lightning_gpt.inference.text import (
    PACKAGED_CHECKPOINT,
    Completion,
    complete,
    find_or_packaged,
    generate,
    load,
    prepare_prompt,
    score,
    stream,
)
from lightning_gpt.model.gpt import GPT, GPTConfig

KNOWN = CharTokenizer("\n abcdefgh")


@pytest.fixture(scope="module")
def small():
    return loud(GPT(GPTConfig(len(KNOWN), 12, 2, 2, 16, dropout=0.0)))


def test_streamed_pieces_join_to_the_generated_text_and_prompts_are_independent(small):
    full = generate(small, KNOWN, "abc", 30, seed=3)
    assert len(full) == 30 and "".join(stream(small, KNOWN, "abc", 30, seed=3)) == full
    *_, texts = complete(small, KNOWN, ["abc", "a" * 20], 30, seed=3, logprobs=True)
    assert texts[0].text == full and [t.finish_reason for t in texts] == ["length", "length"]
    assert all(len(t.tokens) == len(t.logprobs) == 30 and max(t.logprobs) < 0 for t in texts)


@pytest.mark.parametrize("size", [1, 7])
def test_a_text_ends_before_a_stop_string_and_never_shows_a_part_of_it(size):
    shown, written = "", Completion("", stop=["gab", "hh"])
    tokens = KNOWN.encode("abgafgabhhc").tolist()
    for pos in range(0, len(tokens), size):
        written.add(tokens[pos : pos + size], [-1.0] * len(tokens[pos : pos + size]), KNOWN, last=False)
        assert written.stable_text().startswith(shown)
        shown = written.stable_text()
    assert (shown, written.finish_reason, len(written.tokens), len(written.logprobs)) == ("abgaf", "stop", 8, 8)


def test_a_withheld_prefix_of_a_stop_string_is_shown_at_the_end():
    written = Completion("", stop=["gab"])
    written.add(KNOWN.encode("hga").tolist(), [], KNOWN, last=False)
    assert written.stable_text() == "h"
    written.add(KNOWN.encode("g").tolist(), [], KNOWN, last=True)
    assert written.stable_text() == "hgag" and written.finish_reason == "length"


def test_a_character_of_several_tokens_is_shown_when_it_is_complete():
    written, shown = Completion(""), []
    for n, byte in enumerate("né🎭!".encode(), start=1):
        written.add([byte], [], ByteTokenizer(), last=n == 8)
        shown.append(written.stable_text())
    assert shown == ["n", "n", "né", "né", "né", "né", "né🎭", "né🎭!"]


GROUPS = st.lists(st.integers(1, 40), min_size=1)
SPLIT = BPETokenizer("æ Ĺ\nð Ł\nðŁ İ")  # tokens of two or three bytes of a longer character


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(300), SPLIT, TokenIds(9)], ids=["byte", "bpe", "ids"])
@settings(max_examples=60, deadline=None)
@given(st.text("日本語🎭é,a", max_size=90), st.lists(st.integers(0, 299)), GROUPS, st.text("日🎭a", max_size=4))
def test_a_text_does_not_depend_on_how_tokens_are_grouped(tokenizer, text, random_ids, groups, stop):
    tokens = [i % len(tokenizer) for i in random_ids]
    if tokenizer.chars_per_token is not None:
        tokens = [*tokenizer.encode(text).tolist(), *tokens, *tokenizer.encode(text).tolist()[:-1]]
    one, many = (Completion("", stop=[s for s in (stop, stop[1:], "2 ") if s]) for _ in range(2))
    for n, token in enumerate(tokens, start=1):
        one.add([token], [-n], tokenizer, last=n == len(tokens))
    pos, shown, groups = 0, "", cycle(groups)
    while pos < len(tokens):
        group = range(pos, min(len(tokens), pos + next(groups)))
        pos = group.stop
        many.add([tokens[n] for n in group], [-n - 1 for n in group], tokenizer, last=pos == len(tokens))
        assert many.stable_text().startswith(shown)
        shown = many.stable_text()
    assert many == one and len(one.tokens) == len(one.logprobs)
    if one.finish_reason != "stop":
        assert shown == tokenizer.decode(torch.tensor(tokens, dtype=torch.long))


def test_an_empty_prompt_becomes_a_newline_and_unknown_characters_can_be_dropped(small):
    assert prepare_prompt(KNOWN, "") == "\n" and prepare_prompt(CharTokenizer("xy"), "") == "x"
    assert prepare_prompt(KNOWN, "aXbYc", "drop") == "abc" and prepare_prompt(KNOWN, "XY", "drop") == "\n"
    with pytest.raises(ValueError, match="'XY'"):
        prepare_prompt(KNOWN, "aXbYc")
    assert generate(small, KNOWN, "aXb", 9, on_unknown="drop") == generate(small, KNOWN, "ab", 9)


@pytest.mark.parametrize("n", [13, 14, 40, 61])
def test_score_without_stride_equals_validation(small, n):
    ids = torch.randint(len(KNOWN), (n,), generator=torch.Generator().manual_seed(n))
    losses = [
        (torch.nn.functional.cross_entropy(small(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum"))
        for w in SequentialWindows(ids, 12, 3)
    ]
    result = score(small, KNOWN, KNOWN.decode(ids))
    assert result.characters == n - 1
    assert result.nats_per_character == pytest.approx(sum(losses).item() / (n - 1), abs=1e-12)
    assert result.bits_per_character == pytest.approx(result.nats_per_character / math.log(2))


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("n", [8, 13, 44])
def test_score_with_stride_counts_each_token_once_with_the_longest_context(small, n, stride):
    ids = torch.randint(len(KNOWN), (n,), generator=torch.Generator().manual_seed(n))
    nats = 0.0
    for target in range(1, n):
        window = 0 if target <= 12 else math.ceil((target - 12) / stride) * stride  # of the first window with it
        nats -= small(ids[None, window:target])[0, -1].log_softmax(-1)[ids[target]].item()
    assert score(small, KNOWN, KNOWN.decode(ids), stride).nats_per_token == pytest.approx(nats / (n - 1), abs=1e-12)


def test_score_refuses_invalid_texts_and_strides(small):
    for text, stride, message in ("a", None, "1 tokens"), ("abc", 13, "stride=13"), ("aX", None, "'X'"):
        with pytest.raises(ValueError, match=message):
            score(small, KNOWN, text, stride)


def test_the_score_command_equals_the_validate_command(ckpt, text_file, tmp_path, capsys):
    text = text_file.read_text()
    (tmp_path / "val.txt").write_text(text[int(0.9 * len(text)) :])
    main(["validate", f"--ckpt_path={ckpt}"])
    loss = float(re.search(r"val/loss[^\w\n]+([\d.]+)", capsys.readouterr().out).group(1))
    main(["score", f"--text_file={tmp_path}/val.txt", f"--ckpt_path={ckpt}", "--json=true"])
    assert json.loads(capsys.readouterr().out)["nats_per_character"] == pytest.approx(loss, abs=1e-5)
    main(["score", f"--text_file={tmp_path}/val.txt", f"--ckpt_path={ckpt}", "--stride=4"])
    assert re.match(r"\d\.\d{4} nats, \d\.\d{4} bits per character", capsys.readouterr().out)


def test_a_quantized_checkpoint_is_within_half_a_step_of_its_source_and_validates(ckpt, tmp_path, capsys):
    out = tmp_path / "small.ckpt"
    main(["quantize", f"--ckpt_path={ckpt}", f"--output={out}"])
    assert out.stat().st_size < ckpt.stat().st_size / 3
    (net, tokenizer), (quantized, same) = load_net(ckpt), load_net(out)
    assert tokenizer.vocabulary == same.vocabulary
    for w, v in zip(net.parameters(), quantized.parameters(), strict=True):
        step = w.abs().amax(-1, keepdim=True) / 127 if w.dim() == 2 else 0 * w
        assert ((w - v).abs() <= step / 2 + 1e-7).all()
    main(["validate", f"--ckpt_path={out}"])
    assert "val/loss" in capsys.readouterr().out
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(out)


def test_without_a_trained_run_the_packaged_checkpoint_generates_and_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["generate", "--prompt=ROMEO:", "--max_new_tokens=8", "--device=cpu"])
    captured = capsys.readouterr()
    assert captured.out.startswith("ROMEO:\n") and len(captured.out) == len("ROMEO:") + 8 + 1
    assert "shakespeare.ckpt" in captured.err and captured.err.count("\n") == 1
    assert PACKAGED_CHECKPOINT.stat().st_size < 2_000_000
    with pytest.raises(FileNotFoundError):
        find_or_packaged("last")
    net, tokenizer = load(device="cpu")
    text = TINY_SHAKESPEARE.read_text()
    assert score(net, tokenizer, text[-3000:]).nats_per_character < 1.5


def test_the_package_imports_torch_lazily():
    code = "import sys, lightning_gpt as p; early = 'torch' in sys.modules; p.load; "
    code += "sys.exit(early or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert lightning_gpt.load is load and lightning_gpt.generate is generate
    with pytest.raises(AttributeError, match="nonsense"):
        lightning_gpt.nonsense  # noqa: B018


def run_generate(capsys, *args):
    capsys.readouterr()
    main(["generate", "--device=cpu", *map(str, args)])
    return capsys.readouterr()


def test_prompts_can_be_read_from_a_file_or_stdin_and_output_written_to_a_file(ckpt, tmp_path, capsys, monkeypatch):
    args = ["--ckpt_path", ckpt, "--max_new_tokens", 20]
    expected = run_generate(capsys, *args, "--prompt", "the cat").out
    (tmp_path / "prompt.txt").write_text("the cat")
    assert run_generate(capsys, *args, "--prompt_file", tmp_path / "prompt.txt").out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    captured = run_generate(capsys, *args, "--prompt_file", "-", "--output", tmp_path / "out.txt")
    assert captured.out == "" and "20 characters" in captured.err and (tmp_path / "out.txt").read_text() == expected


@pytest.mark.parametrize("start, end", [("", "\r\n"), ("", "\r"), ("\ufeff", "\n")])
def test_files_and_stdin_are_normalized_as_the_training_text_is(
    ckpt, text_file, tmp_path, capsys, monkeypatch, start, end
):
    text = text_file.read_text()[-300:]
    changed = (start + text.replace("\n", end)).encode()
    assert changed != text.encode()
    (tmp_path / "plain").write_bytes(text.encode())
    (tmp_path / "changed").write_bytes(changed)

    def scored(file):
        main(["score", f"--text_file={file}", f"--ckpt_path={ckpt}", "--json=true"])
        return json.loads(capsys.readouterr().out)

    plain = scored(tmp_path / "plain")
    assert scored(tmp_path / "changed") == plain
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(changed)))
    assert scored("-") == plain
    args = ["--ckpt_path", ckpt, "--max_new_tokens", 5, "--prompt_file"]
    captured = run_generate(capsys, *args, tmp_path / "changed")
    assert captured.out == run_generate(capsys, *args, tmp_path / "plain").out and "changed " in captured.err


def test_carriage_returns_are_kept_for_a_vocabulary_that_has_them(tmp_path):
    (tmp_path / "text").write_bytes(b"a\r\nb\rc")
    assert read_input(str(tmp_path / "text"), CharTokenizer("\r\nabc")) == "a\r\nb\rc"
    assert read_input(str(tmp_path / "text"), CharTokenizer("\nabc")) == "a\nb\nc"
    assert read_input(str(tmp_path / "text"), ByteTokenizer()) == "a\nb\nc"


def test_json_has_text_tokens_logprobs_and_speed(ckpt, capsys):
    args = ["--ckpt_path", ckpt, "--prompt", "the cat", "--max_new_tokens", 15, "--num_samples", 2]
    result = json.loads(run_generate(capsys, *args, "--json", "true").out)
    plain = run_generate(capsys, *args).out
    for sample in result["samples"]:
        assert "the cat" + sample["text"] in plain and len(sample["tokens"]) == len(sample["logprobs"]) == 15
    assert result["tokens_per_second"] == pytest.approx(30 / result["seconds"])
    assert result["prompt"] == "the cat" and result["settings"]["max_new_tokens"] == 15


def test_long_prompts_and_dropped_characters_are_reported(ckpt, capsys):
    captured = run_generate(
        capsys, "--ckpt_path", ckpt, "--prompt", "the cat € " * 3, "--max_new_tokens", 5, "--on_unknown=drop"
    )
    assert "'€'" in captured.err and "sees only the last 16 of them" in captured.err
    assert captured.out.startswith("the cat  the cat  ")


def test_an_interactive_session_continues_from_its_earlier_text(ckpt, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffthe cat\n€\nwho\n"))
    captured = run_generate(capsys, "--ckpt_path", ckpt, "--interactive=true", "--max_new_tokens", 9)
    net, tokenizer = load(ckpt, "cpu")
    first = generate(net, tokenizer, "the cat\n", 9)
    second = generate(net, tokenizer, f"the cat\n{first}\nwho\n", 9, seed=1338)
    assert captured.out == f"{first}\n{second}\n\n" and "'€'" in captured.err


def test_ctrl_c_ends_generation_with_the_text_so_far(ckpt, tmp_path):
    command = [sys.executable, "-m", "lightning_gpt", "generate", f"--ckpt_path={ckpt}", "--max_new_tokens=1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(5)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"step 5, val/loss" in err and err.count(b"\n") == 1 and out.endswith(b"\n")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_scores_agree_with_float32(precision):
    speech = TINY_SHAKESPEARE.read_text()[-3000:]
    exact, half = (score(*load(PACKAGED_CHECKPOINT, "cpu", which), speech) for which in ("float32", precision))
    assert half != exact and half.nats_per_token == pytest.approx(exact.nats_per_token, abs=3e-3)
