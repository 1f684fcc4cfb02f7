"""Every tokenizer encodes any text and decodes it back."""

import json
import os
import random
import signal
import sys
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_gpt.data import tokenizers
from lightning_gpt.data.tokenizers import (
    MAX_WORD,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    build_from_state,
    cut_at_spaces,
    split_words,
)

WORDS = "the cat sat on a mat, who's there? naïve café\n日本語 the then there\n\nquiz  42 "
MERGES = "t h\nth e\nĠ the\nĠ t\nh e\nĠt he\na t\nr e\nÃ ¯\nc at\nĠ cat"  # some of the merges that training would find


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("tiktoken")
    tokenizer = GPT2Tokenizer()
    try:
        return tokenizer if tokenizer.engine else None
    except ValueError:
        pytest.skip("GPT-2's table is not on this machine and can't be downloaded")


TOKENIZERS = [ByteTokenizer(), BPETokenizer(MERGES), BPETokenizer("")]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte", "bpe", "bpe without merges"])
@settings(max_examples=60, deadline=None)
@example("the cat<|endoftext|>\r\n\0")
@given(st.text() | st.text("thecarÃ¯ \n", max_size=300))
def test_decoding_inverts_encoding_and_tokens_count_the_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64 and tokenizer.decode(ids) == text
    assert tokenizer.chars_per_token[ids].sum() == len(text)


def test_decoding_inverts_encoding_with_gpt2s_tokens(gpt2):
    @settings(max_examples=60, deadline=None)
    @given(st.text())
    def round_trip(text):
        ids = gpt2.encode(text)
        assert gpt2.decode(ids) == text and gpt2.chars_per_token[ids].sum() == len(text)

    round_trip()
    assert gpt2.encode("Hello world<|endoftext|>").tolist() == [15496, 995, 27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode(torch.tensor([50256])) == "<|endoftext|>" and gpt2.chars_per_token[50256] == 0


def test_byte_pairs_are_merged_in_the_order_of_the_table():
    tokenizer = BPETokenizer(MERGES)
    pieces = [tokenizer.pieces[i].decode() for i in tokenizer.encode("the cat, the hat")]
    assert pieces == ["the", " cat", ",", " the", " ", "h", "at"]  # "Ġ the" comes before "Ġ t" and "Ġt he"


PAIRS = BPETokenizer("a b\nĠ a\nĊ Ċ\nĠ Ġ\nab ab\nĠ ab\nĊ Ġ\na a\n_ .")


def made_of(*parts):
    return st.lists(st.sampled_from(parts), max_size=90).map("".join)


TEXTS = st.text("ab' \n\t\u3000é日.1_", max_size=400) | made_of("a", "ab.", "ab_.")
TEXTS |= made_of(" ", "\n", "a", ". ", "ab" * 20, "b" * 50)


@settings(max_examples=200, deadline=None)
@example("ab. " + "ab" * 100, 5, 50, 900)
@given(TEXTS, st.integers(1, 60), st.integers(1, 150), st.integers(1, 900))
def test_the_byte_pairs_of_a_text_do_not_depend_on_how_it_is_cut(text, word, length, piece):
    parts = [text[at : at + piece] for at in range(0, len(text), piece)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "MAX_WORD", word)
        pieces = list(cut_at_spaces(parts, length))
        assert "".join(pieces) == text and max(map(len, pieces), default=0) <= max(2 * max(length, word), piece)
        ids = PAIRS.encode(text).tolist()
        assert [i for piece in pieces for i in PAIRS.encode(piece).tolist()] == ids
        words = split_words(text)
    assert "".join(words) == text and max(map(len, words)) <= word
    safe_cuts = [at for at in range(1, len(text)) if is_safe_cut(text[at - 1], text[at])]
    if all(b - a <= word for a, b in pairwise([0, *safe_cuts, len(text)])):
        assert ids == PAIRS.engine.encode(text).ids


def is_safe_cut(before, after):
    """Whether GPT-2's pattern splits between these two characters in every context."""
    return (not before.isspace() and after in " \n") or (before.isalnum() and not (after.isalnum() or after == "_"))


def test_cutting_a_long_text_does_not_change_its_tokens():
    rng = random.Random(0)
    text = "".join(rng.choice(WORDS) for _ in range(150_000))
    tokenizer = BPETokenizer(MERGES)
    assert tokenizer.encode(text).tolist() == tokenizer.engine.encode(text).ids


def test_a_text_without_spaces_is_cut_into_words_of_limited_length():
    merges = BPETokenizer.merges_of(["a" * 30_000], 300)  # merges double tokens up to the longest allowed word
    assert max(map(len, BPETokenizer(merges).pieces)) == MAX_WORD
    assert BPETokenizer.merges_of(["a" * 7000, "a" * 3000, "a" * 20_000], 300) == merges
    rng = random.Random(0)
    text = "".join(rng.choice("abcdefgh") for _ in range(200_000))
    merges = BPETokenizer.merges_of([text], 300)  # quadratic time would take a minute
    ids = BPETokenizer(merges).encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "MAX_CACHED_WORD", 0)
        fresh = BPETokenizer(merges)
        assert torch.equal(torch.cat([fresh.encode(piece) for piece in cut_at_spaces([text], 9000)]), ids)
        assert not fresh.ids_of


def test_ctrl_c_interrupts_the_training_of_merges():
    rng, before = random.Random(0), set(threading.enumerate())

    def text():
        yield "".join(rng.choice("abcdefgh") for _ in range(200_000))
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        BPETokenizer.merges_of(text(), 512)
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive() and thread.daemon
    thread.join()


def test_an_error_while_reading_the_text_is_raised_by_the_training_of_merges():
    def text():
        yield "the cat"
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        BPETokenizer.merges_of(text(), 300)


def test_merges_depend_on_the_text_alone():
    text = WORDS * 30
    merges = BPETokenizer.merges_of([text], 280)
    assert merges == BPETokenizer.merges_of([text[:100], text[100:]], 280)
    assert merges != BPETokenizer.merges_of([text.replace("the", "who")], 280)
    tokenizer = BPETokenizer(merges)
    assert len(tokenizer) == 280
    assert len(tokenizer.encode(text)) < 0.75 * len(text.encode())


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer("hello wrd"), CharTokenizer("helo", "replace"), CharTokenizer("helo", "drop"), *TOKENIZERS],
)
def test_a_tokenizer_is_rebuilt_from_plain_data(tokenizer):
    plain = json.loads(json.dumps(tokenizer.state()))
    again = build_from_state(plain, len(tokenizer))
    assert torch.equal(again.encode("hello"), tokenizer.encode("hello")) and len(again) == len(tokenizer)
    assert type(again) is type(tokenizer)


def test_padding_ids_of_a_vocabulary_decode_to_the_replacement_character():
    tokenizer = ByteTokenizer(300)
    assert len(tokenizer) == 300 and tokenizer.chars_per_token[299] == 0
    assert tokenizer.decode(torch.tensor([104, 299, 105])) == "h\ufffdi"
    with pytest.raises(ValueError, match="vocab_size=200 is less than the 256"):
        ByteTokenizer(200)


@pytest.mark.parametrize("policy, text", [("drop", "hell"), ("replace", "hell\ufffd")])
def test_unknown_characters_are_dropped_or_replaced(policy, text):
    tokenizer = CharTokenizer("hel", policy)
    assert tokenizer.decode(tokenizer.encode("hell\U0001f600")) == text


def test_unknown_characters_are_named():
    for policy, text in ("error", "help ö"), ("drop", " öp"):
        with pytest.raises(ValueError, match="' pö'"):
            CharTokenizer("hel", policy).encode(text)


@pytest.mark.parametrize("library, tokenizer", [("tokenizers", BPETokenizer(MERGES)), ("tiktoken", GPT2Tokenizer())])
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, library, tokenizer):
    monkeypatch.setitem(sys.modules, library, None)
    tokenizer.__dict__.pop("engine", None)
    with pytest.raises(ValueError, match=f"needs the package {library}.*pip install 'tiny-lightning-gpt.tokenizers"):
        tokenizer.encode("text")


def test_without_a_network_the_error_says_how_to_provide_gpt2s_table(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="can't be downloaded.*TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer().encode("text")
