"""The corpus, its windows, name augmentation and token files."""

import hashlib
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_gpt.data.augment import NameAugmenter
from lightning_gpt.data.corpus import TINY_SHAKESPEARE
from lightning_gpt.data.datamodule import TextDataModule
from lightning_gpt.data.tokenizers import TokenIds
from lightning_gpt.data.windows import RandomWindows, SequentialWindows

LINE = torch.arange(1000)  # token t is at position t, so a window shows where it was taken from


def test_the_corpus_is_the_one_of_published_results():
    digest = hashlib.sha256(TINY_SHAKESPEARE.read_bytes()).hexdigest()
    assert digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_the_split_is_that_of_the_lecture():
    data = TextDataModule()
    assert (len(data.train_tokens), len(data.val_tokens), data.vocab_size) == (1_003_854, 111_540, 65)
    assert data.tokenizer.decode(data.train_tokens[:14]) == "First Citizen:"
    assert data.train_tokens.dtype == torch.uint8


def test_targets_are_the_next_tokens():
    data = TextDataModule()
    x, y = data.on_after_batch_transfer(RandomWindows(LINE, 8, 4, seed=1).batch(0), 0)
    assert x.shape == (4, 8) and torch.equal(y, x + 1)


def test_a_batch_depends_only_on_the_seed_and_its_number():
    first, again, other = (RandomWindows(LINE, 8, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(first.batch(5), again.batch(5))
    assert not torch.equal(first.batch(5), first.batch(6)) and not torch.equal(first.batch(5), other.batch(5))
    late = iter(RandomWindows(LINE, 8, 4, 1, lambda: count(5)))
    assert torch.equal(next(late), first.batch(5)) and torch.equal(next(late), first.batch(6))


def test_windows_reach_the_first_and_the_last_token_of_the_split():
    windows = torch.cat([RandomWindows(LINE[:12], 8, 16, 1).batch(k) for k in range(20)])
    assert windows.min() == 0 and windows.max() == 11


def test_the_ranks_parts_make_up_the_global_batch():
    full = RandomWindows(LINE, 8, 6, seed=1).batch(5)
    parts = [RandomWindows(LINE, 8, 6, 1, rank=rank, world_size=3).batch(5) for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), full)


def test_two_split_points_hold_out_a_part_of_the_training_split():
    full, tuning = TextDataModule(), TextDataModule(split=(0.81, 0.9))
    assert torch.equal(torch.cat((tuning.train_tokens, tuning.val_tokens)), full.train_tokens)
    assert len(tuning.val_tokens) == 100_385


PLAY = """ROMEO:
But soft! Is it Romeo, that Romeo whom Juliet loves?

LADY JULIET:
A lady loves thee, ROMEO; go to Verona, leave Verona.

KING:
The king is no name, nor is But. Who saw Verona?
"""


def test_name_augmentation_replaces_every_name_consistently_and_nothing_else():
    play = NameAugmenter(PLAY, keep=0.0)
    assert play.names == ["JULIET", "ROMEO", "VERONA"]
    for seed in range(20):
        copy = play.copy(seed)
        heading, new = copy.split(":")[0], copy.split("LADY ")[1].split(":")[0]
        town = copy.split("saw ")[1].split("?")[0]
        by_hand = PLAY
        for old, name in {"ROMEO": "<1>", "JULIET": "<2>", "Romeo": "<3>", "Juliet": "<4>", "Verona": "<5>"}.items():
            by_hand = by_hand.replace(old, name)
        for mark, name in zip("12345", (heading, new, heading.title(), new.title(), town), strict=True):
            by_hand = by_hand.replace(f"<{mark}>", name)
        assert copy == by_hand and heading.isupper() and town.istitle()
    assert len({play.copy(seed) for seed in range(20)}) > 15 and play.copy(3) == NameAugmenter(PLAY, keep=0.0).copy(3)


def test_kept_names_and_texts_without_names_are_unchanged():
    assert NameAugmenter(PLAY, keep=1.0).copy(1) == PLAY
    assert NameAugmenter("no play at all\n", keep=0.0).copy(1) == "no play at all\n"


def test_name_augmentation_extends_the_training_split_only():
    plain, augmented = TextDataModule(), TextDataModule(name_augmentation=2)
    assert torch.equal(augmented.val_tokens, plain.val_tokens) and augmented.vocab_size == 65
    assert torch.equal(augmented.train_tokens[: len(plain.train_tokens)], plain.train_tokens)
    assert 2.9 < len(augmented.train_tokens) / len(plain.train_tokens) < 3.1  # relative to the training text alone


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [9, 10, 17, 100, 1000])
def test_validation_predicts_every_token_except_the_first_exactly_once(n, world_size):
    targets = [
        window[:, 1:].flatten()
        for rank in range(world_size)
        for window in SequentialWindows(LINE[:n], 8, 3, rank, world_size)
    ]
    assert torch.equal(torch.cat(targets).sort().values, LINE[1:n])


def on_rank(rank, world_size):
    """The data module as the process of this rank sees it."""
    data = TextDataModule(block_size=16, batch_size=6)
    endless = dict(limit_train_batches=1.0, max_epochs=-1, overfit_batches=0.0)
    data.trainer = SimpleNamespace(
        state=SimpleNamespace(status="running"),
        fit_loop=SimpleNamespace(total_batch_idx=-1),
        global_rank=rank,
        world_size=world_size,
        **endless,
    )
    return data


@pytest.mark.parametrize("n", [33, 40, 49, 50, 81])
def test_every_rank_has_the_same_number_of_validation_batches(n):  # with FSDP, every rank takes part in each batch
    tokens = torch.arange(n)
    assert len({len(SequentialWindows(tokens, 8, 2, rank, 3)) for rank in range(3)}) == 1


def test_the_loaders_give_each_rank_its_part():
    full = next(iter(on_rank(0, 1).train_dataloader()))
    parts = [next(iter(on_rank(rank, 3).train_dataloader())) for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), full)
    targets = sum(window[:, 1:].numel() for rank in range(3) for window in on_rank(rank, 3).val_dataloader())
    assert targets == len(on_rank(0, 1).val_tokens) - 1


@pytest.mark.parametrize("overfit, numbers", [(0.0, [5, 6, 7]), (2, [1, 0, 1])])
def test_an_epoch_starts_where_the_last_one_ended_and_overfitting_repeats_batches(overfit, numbers):
    data = on_rank(0, 1)
    data.trainer.overfit_batches = overfit
    loader = data.train_dataloader()
    data.trainer.fit_loop.total_batch_idx = 4  # five batches have been trained on
    for batch, k in zip(loader, numbers, strict=False):
        assert torch.equal(batch, loader.batch(k))


def test_a_batch_size_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size=6 is not divisible by the 4 devices: use 4 or 8"):
        on_rank(0, 4).train_dataloader()


@pytest.mark.parametrize("size, dtype", [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)])
def test_tokens_are_stored_in_the_smallest_dtype_that_holds_them(tmp_path, size, dtype):
    text = "".join(chr(0x10000 + i) for i in range(size)) * 2
    (tmp_path / "text").write_text(text)
    data = TextDataModule(str(tmp_path / "text"), block_size=8)
    assert data.train_tokens.dtype == dtype
    assert data.tokenizer.decode(data.train_tokens) + data.tokenizer.decode(data.val_tokens) == text


def test_a_given_vocabulary_is_kept_for_a_text_with_fewer_characters_and_keeps_line_ends(tmp_path):
    (tmp_path / "text").write_bytes(b"b\r\na" * 50)
    data = TextDataModule(str(tmp_path / "text"), block_size=8, vocabulary="\n\rabcd")
    assert data.vocab_size == 6 and data.train_tokens[:4].tolist() == [3, 1, 0, 2]


# --- token files ------------------------------------------------------------------------------------------------------


def test_token_files_are_served_unchanged(token_files):
    train, val = (np.fromfile(path, dtype=np.uint16).astype(np.int64) for path in token_files.split(","))
    data = TextDataModule(block_size=8, batch_size=4, token_files=token_files, vocab_size=300)
    served = torch.cat([window.long()[:, 1:].flatten() for window in SequentialWindows(data.val_tokens, 8, 4)])
    np.testing.assert_array_equal(served, val[1:])
    windows = RandomWindows(data.train_tokens, 8, 4, seed=1).batch(7).long().numpy()
    everywhere = np.lib.stride_tricks.sliding_window_view(train, 9)
    assert all((everywhere == window).all(1).any() for window in windows)


@pytest.mark.parametrize(
    "content, settings, message",
    [
        (b"\1\0\2", {}, "has 3 bytes, but must hold one or more uint16 ids"),
        (b"", {}, "has 0 bytes"),
        (b"\1\0" * 50 + b"\54\1" + b"\1\2", {}, "has the id 300 at token 50, beyond the vocabulary size 300"),
        (b"\1\0" * 8, {}, "has 8 tokens, too few"),
        (b"\1\0\1\0" * 50, {"token_dtype": "uint32"}, "has the id 65537"),
        (b"\1\0\0\0" * 50, {}, "as if it were uint32: set data.token_dtype"),
        (b"\1\0" * 50, {"vocab_size": None}, "their vocabulary size"),
        (b"\1\0" * 50, {"corpus": "text"}, "data.corpus=text are two texts"),
    ],
)
def test_invalid_token_files_are_refused(tmp_path, token_files, content, settings, message):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        both = f"{tmp_path}/x.bin, {token_files.split(',')[1]}"
        TextDataModule(block_size=8, **{"token_files": both, "vocab_size": 300} | settings)


def test_a_vocabulary_size_without_token_files_is_refused():
    with pytest.raises(ValueError, match="is for token files"):
        TextDataModule(block_size=8, vocab_size=300)


def test_token_ids_are_written_as_numbers():
    tokenizer = TokenIds(300)
    assert tokenizer.decode(tokenizer.encode("7 299 0")).split() == ["7", "299", "0"]
    for text in "300", "-1", "a 1", "", "\n":
        with pytest.raises(ValueError, match="token ids from 0 to 299"):
            tokenizer.encode(text)


def test_the_hyper_parameters_name_the_tokenizer_and_its_size(token_files):
    chars, ids = TextDataModule(), TextDataModule(block_size=8, token_files=token_files, vocab_size=300)
    assert (chars.hparams.tokenizer, chars.hparams.vocab_size) == ("char", 65)
    assert (ids.hparams.tokenizer, ids.hparams.vocab_size) == ("ids", 300)
