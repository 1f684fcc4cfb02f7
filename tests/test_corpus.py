"""Reading a corpus: files, encodings, errors, vocabularies, and large texts through the token cache."""

import gzip
import io
import os
import random
import re
import shutil
import signal
import subprocess
import zipfile
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gpt.analysis.report import validation_passage
from lightning_gpt.data import corpus, datamodule, token_cache
from lightning_gpt.data.corpus import find_files, read_files, read_pieces
from lightning_gpt.data.datamodule import TextDataModule
from lightning_gpt.data.token_cache import memory_map
from lightning_gpt.errors import print_info

VERSE = "The quality of mercy is not strain'd,\nIt droppeth as the gentle rain from heaven — naïve café.\n"


@pytest.fixture
def folder(tmp_path):
    """Three texts, two of them in a folder, and a binary file."""
    (tmp_path / "plays" / "late").mkdir(parents=True)
    for name, content in {"plays/b.txt": "b", "plays/late/a.txt": "a\n", "c.md": "c\n", "plays/x.bin": "x"}.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    "corpus, text",
    [
        ("plays", "b\na\n"),
        ("plays,c.md", "b\na\nc\n"),
        ("plays/*.*", "b\nx"),
        ("c.md, plays/b.txt", "c\nb"),
        ("**/*.md", "c\n"),
        ("plays, plays/../plays/b.txt, ~/c.md, c.md", "b\na\nc\n"),
    ],
)
def test_a_corpus_can_be_files_folders_and_patterns(folder, monkeypatch, corpus, text):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert "".join(read_files(find_files(corpus), False, Counter())) == text


@pytest.mark.parametrize("corpus", ["", "c.md,", "c.md,,c.md"])
def test_an_empty_name_in_a_list_is_refused(folder, monkeypatch, corpus):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="has an empty item"):
        TextDataModule(corpus, block_size=1)


def test_a_list_of_files_may_be_longer_than_a_path_can_be(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = [f"{i}.md" for i in range(100)]
    for name in names:
        (folder / name).write_text(name)
    assert "".join(read_files(find_files(",".join(names)), False, Counter())) == "\n".join(names)


def test_a_file_with_a_comma_in_its_name_is_one_file(tmp_path):
    (tmp_path / "a,b").write_text("text")
    assert find_files(f"{tmp_path}/a,b") == [tmp_path / "a,b"]


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.text("a\r\né日", min_size=1))
def test_the_pieces_of_a_file_join_to_its_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("pieces") / "text"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "READ_BYTES", 3)
        verbatim, normalized = ("".join(read_pieces(path, keep, Counter())) for keep in (True, False))
    assert verbatim == text.removeprefix("\ufeff") and normalized == verbatim.replace("\r\n", "\n").replace("\r", "\n")


def test_changes_to_the_text_are_reported(tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\r\nsix\r" * 30)
    data = TextDataModule(str(tmp_path / "text"), block_size=8)
    err = capsys.readouterr().err
    assert "byte order mark" in err and "60 Windows line endings" in err and "30 old Mac line endings" in err
    assert err.count("lightning-gpt: ") == 3 and set(data.tokenizer.vocabulary) == set("one\ntwosix")
    TextDataModule(str(tmp_path / "text"), block_size=8, vocabulary="\r\nonetwsix")  # which has carriage returns
    assert "byte order mark" in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"abcdefg\xe9 caf\xe9", "is not UTF-8 text: byte 0xe9 at offset 7"),
        ("h\u00e9".encode("utf-16"), "byte 0xff at offset 0"),
        (b"abcdefghij\0", "a zero byte at offset 10; it is a binary file"),
        (b"abc\xe6\x97", "byte 0xe6 at offset 3"),
        (b"", "is empty"),
    ],
)
def test_bytes_that_are_not_text_are_refused_with_their_offset(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(corpus, "READ_BYTES", 4)
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match="the corpus .*bad.txt.*" + re.escape(message)):
        "".join(read_files([tmp_path / "bad.txt"], False, Counter()))
    if content:
        with pytest.raises(ValueError, match=re.escape(message)):
            TextDataModule(str(tmp_path), block_size=1)


SAMPLES = {
    "cp1252": "Où sont les neiges d'antan ? L'été, déjà passé, nous a laissé des forêts brûlées — ça ira.\n",
    "cp1250": "Litwo! Ojczyzno moja! ty jesteś jak zdrowie; ile cię trzeba cenić, kto cię stracił. Żółć gęślą jaźń.\n",
    "cp1251": "Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил.\n",
    "koi8_r": "Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил.\n",
    "cp866": "Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил.\n",
    "cp1253": "Μήνιν άειδε θεά Πηληϊάδεω Αχιλήος ουλομένην, η μυρί Αχαιοίς άλγε έθηκε.\n",
    "cp1255": "בראשית ברא אלהים את השמים ואת הארץ והארץ היתה תהו ובהו וחשך על פני תהום\n",
    "gb18030": "道可道，非常道；名可名，非常名。无名天地之始，有名万物之母。故常无欲，以观其妙；常有欲，以观其徼。\n",
    "big5": "道可道，非常道；名可名，非常名。無名天地之始，有名萬物之母。故常無欲，以觀其妙；常有欲，以觀其徼。\n",
    "cp932": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "euc_jp": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "cp949": "동해물과 백두산이 마르고 닳도록 하느님이 보우하사 우리나라 만세.\n",
    "utf_16": "Es war einmal ein König, der hatte einen großen Wald.\n",
    "utf_16_le": "It was the best of times - it was the worst of times.\n",
    "utf_16_be": "Мой дядя самых честных правил, когда не в шутку занемог.\n",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_for_another_encoding_the_error_shows_the_text_and_a_command_that_converts_it(tmp_path, name):
    text, path = SAMPLES[name] * 40, tmp_path / "text"
    path.write_bytes(text.encode(name))
    with pytest.raises(ValueError, match="is not UTF-8 text") as error:
        TextDataModule(str(path), 8)
    shown, encoding = re.search(r"it reads '(.*?)' as ([\w-]+)", str(error.value)).groups()
    assert shown in text.replace("\n", " ") and f"iconv -f {encoding} -t UTF-8" in str(error.value)
    if shutil.which("iconv"):
        assert subprocess.check_output(["iconv", "-f", encoding, "-t", "UTF-8", path]).decode() == text


def test_if_several_encodings_fit_the_error_shows_the_text_in_each(tmp_path):
    (tmp_path / "text").write_bytes("tiempo que vivía un hidalgo; ¿qué señor?\n".encode("mac_roman"))
    with pytest.raises(ValueError, match="viv’a un .*' as WINDOWS-1252, .*vivía un .*' as MACINTOSH: .*the right one"):
        TextDataModule(str(tmp_path / "text"), 8)


@pytest.mark.parametrize("bad, remedy", [(b"\xff", "iconv -c -f UTF-8 -t UTF-8"), (b"\0", "tr -d '.000'")])
def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path, bad, remedy):
    (tmp_path / "text").write_bytes(SAMPLES["big5"].encode() + bad + SAMPLES["big5"].encode())
    with pytest.raises(ValueError, match=f"damaged UTF-8 text: .* at offset 148; .*{remedy}"):
        TextDataModule(str(tmp_path / "text"), 8)
    (tmp_path / "text").write_bytes(SAMPLES["big5"].encode()[:-2])
    with pytest.raises(ValueError, match="damaged UTF-8 text: byte 0xe3 at offset 144"):
        TextDataModule(str(tmp_path / "text"), 8)


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, "<xml/>" * 900)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (zipped("[Content_Types].xml", "_rels/.rels", "word/document.xml"), "is a Word document"),
        (zipped("[Content_Types].xml", "xl/workbook.xml"), "is an Excel workbook"),
        (zipped("a.txt"), "is a zip archive: unpack it"),
        (b"%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\n" * 9, "is a PDF file"),
        (b"{\\rtf1\\ansi Hello}" * 9, "is a rich text file"),
        (gzip.compress(VERSE.encode()), "is compressed .gzip.: decompress it, for example with gunzip"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is an image"),
        (bytes(random.Random(0).randbytes(5000)), "it is a binary file or has a rare encoding"),
    ],
    ids=["docx", "xlsx", "zip", "pdf", "rtf", "gz", "png", "random"],
)
def test_the_error_for_another_file_format_names_it(tmp_path, content, message):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"the corpus .*file.txt .*{message}"):
        TextDataModule(str(tmp_path), 8)


def test_hidden_files_are_skipped_and_suffixes_may_be_upper_case(tmp_path, capsys):
    for name in "a.txt", "B.TXT", "c/d.Txt", "c/.ipynb_checkpoints/d-checkpoint.txt", ".git/e.txt", ".f.txt", "g.txt~":
        (tmp_path / ".home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".home" / name).write_text(f"{name} " * 10)
    corpus = str(tmp_path / ".home")  # a hidden folder may be named explicitly
    assert [file.name for file in find_files(corpus)] == ["B.TXT", "a.txt", "d.Txt"]
    data = TextDataModule(corpus, 8)
    assert (
        f"{corpus} is 3 files with {len(data.train_tokens) + len(data.val_tokens)} characters"
        in capsys.readouterr().err
    )
    shutil.rmtree(tmp_path / ".home" / "c")
    for name in "a.txt", "B.TXT":
        (tmp_path / ".home" / name).unlink()
    with pytest.raises(ValueError, match="no .txt file that isn't hidden"):
        find_files(corpus)


def test_brackets_in_a_name_are_taken_literally(tmp_path):
    (tmp_path / "plays[1]").mkdir()
    for name in "a1.txt", "b[1].txt", "plays[1]/c.txt":
        (tmp_path / name).write_text("text")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_files(f"{tmp_path}/a[1].txt")
    found = find_files(f"{tmp_path}/b[1].txt,{tmp_path}/plays[1]/*.txt,{tmp_path}/*[1].txt")
    assert [file.name for file in found] == ["b[1].txt", "c.txt"]


def test_a_report_reads_the_text_as_training_did(tmp_path):
    (tmp_path / "text").write_bytes(VERSE.replace("\n", "\r\n").encode() * 31)
    for vocabulary in None, "".join(sorted(set(VERSE + "\r"))):
        data = TextDataModule(str(tmp_path / "text"), 90, split=0.5, vocabulary=vocabulary)
        assert validation_passage(dict(data.hparams), 90, data.tokenizer).tolist() == data.val_tokens[:91].tolist()


def test_only_the_first_of_several_processes_prints(monkeypatch, capsys):
    for ranks, lines in ({}, 1), ({"LOCAL_RANK": "1"}, 0), ({"RANK": "0", "LOCAL_RANK": "0"}, 1), ({"RANK": "2"}, 0):
        with monkeypatch.context() as patch:
            for name, rank in ranks.items():
                patch.setenv(name, rank)
            print_info("something")
        assert capsys.readouterr().err.count("something") == lines


def test_a_folder_without_text_and_a_pattern_without_files_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ValueError, match=r"has no \.txt file.*\*\.md"):
        find_files(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_files(f"{tmp_path}/*.txt")


@pytest.mark.parametrize("split", [0.9, 0.5, (0.3, 0.4)])
def test_the_error_for_a_short_text_says_how_long_it_must_be(tmp_path, split):
    def data(length, block_size):
        (tmp_path / "text").write_text("ab" * length)
        return TextDataModule(str(tmp_path / "text"), block_size, split=split)

    with pytest.raises(ValueError, match="too few for one window of block_size=50") as error:
        data(40, 50)
    needed, block_size = re.search(r"about ([\d,]+) characters.* --model.block_size (\d+)", str(error.value)).groups()
    enough = int(needed.replace(",", ""))
    data((enough + 1) // 2, 50), data(40, int(block_size))
    with pytest.raises(ValueError, match="too few"):
        data((enough - 25) // 2, 50)


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.fixture
def poem(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text(VERSE * 40 + "The end: 日本語, and Q\n" + VERSE * 10)
    return path


def test_merges_are_learnt_from_the_training_split_alone(tmp_path, poem):
    one = TextDataModule(str(poem), 8, tokenizer="bpe", vocab_size=290)
    training = poem.read_text()[: int(0.9 * len(poem.read_text()))]
    (tmp_path / "other").write_text(training + "zyx " * (len(poem.read_text()) - len(training) >> 2))
    other = TextDataModule(str(tmp_path / "other"), 8, tokenizer="bpe", vocab_size=290)
    assert other.tokenizer.vocabulary == one.tokenizer.vocabulary
    assert one.vocab_size == 290 and len(one.train_tokens) < 0.7 * len(training)


def test_a_text_with_few_pairs_still_gets_the_given_vocab_size(poem, large, capsys):
    kwargs = dict(tokenizer="bpe", vocab_size=999)
    for serve in lambda **kwargs: TextDataModule(str(poem), 8, **kwargs), large:
        data = serve(**kwargs)
        assert "pairs for 324 ids" in capsys.readouterr().err
        again = serve(**kwargs, vocabulary=data.hparams.vocabulary)  # as a checkpoint stores it
        assert data.vocab_size == again.vocab_size == 999 and torch.equal(data.val_tokens, again.val_tokens)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_every_tokenizer_splits_the_text_at_the_same_character(poem, kind):
    data, text = TextDataModule(str(poem), 8, tokenizer=kind), poem.read_text()
    n = int(0.9 * len(text))
    assert data.tokenizer.decode(data.train_tokens.long()) == text[:n]
    assert data.tokenizer.decode(data.val_tokens.long()) == text[n:]


def test_rare_characters_become_the_token_for_unknown_ones(poem):
    data = TextDataModule(str(poem), 8, on_unknown="replace")
    assert not set("日本語Q:") & set(data.tokenizer.vocabulary) and "\ufffd" in data.tokenizer.vocabulary
    assert "The end\ufffd \ufffd\ufffd\ufffd, and \ufffd\n" in data.tokenizer.decode(data.train_tokens)


def test_a_vocabulary_is_extended_at_its_end(poem):
    data = TextDataModule(str(poem), 8, vocabulary="zTheQ", on_unknown="extend")
    assert data.tokenizer.vocabulary.startswith("zTheQ") and "日" in data.tokenizer.vocabulary
    with pytest.raises(ValueError, match="lacks: .*日"):
        TextDataModule(str(poem), 8, vocabulary="".join(set(VERSE)))


def test_name_augmentation_works_for_a_text_with_few_letters(tmp_path):
    (tmp_path / "play").write_text("ZZYX:\nhow now, Zzyx, and you, Zzyx.\n\n" * 30)
    data = TextDataModule(str(tmp_path / "play"), 8, name_augmentation=3)
    assert len(data.train_tokens) > 3 * 30 * 35


# --- large texts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(poem, tmp_path, monkeypatch):
    """Serve the poem as a large text is served, in small pieces."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def large(**kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datamodule, "CACHE_FROM_BYTES", 0)
            patch.setattr(corpus, "READ_BYTES", 100)
            patch.setattr(token_cache, "READ_BYTES", 100)
            return TextDataModule(str(poem), 8, **kwargs)

    return large


def files(tmp_path):
    return {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.tokens")}


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"tokenizer": "byte"},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"split": (0.5, 0.7)},
        {"on_unknown": "replace"},
    ],
    ids=str,
)
def test_a_large_text_is_served_as_a_small_one(poem, large, tmp_path, kwargs):
    small, mapped = TextDataModule(str(poem), 8, **kwargs), large(**kwargs)
    assert mapped.tokenizer.vocabulary == small.tokenizer.vocabulary and mapped.vocab_size == small.vocab_size
    for name in "train_tokens", "val_tokens":
        assert torch.equal(getattr(mapped, name).long(), getattr(small, name).long())
    before = files(tmp_path)
    again, resumed = large(**kwargs), large(**kwargs | {"vocabulary": small.hparams.vocabulary})
    assert files(tmp_path) == before and len(before) == 1  # made once, and reused with a checkpoint's vocabulary
    assert torch.equal(again.val_tokens, mapped.val_tokens) and torch.equal(resumed.val_tokens, mapped.val_tokens)


def test_the_token_cache_is_rebuilt_if_the_text_changes_or_the_cache_is_truncated(poem, large, tmp_path):
    first = large().train_tokens.clone()
    (file,) = files(tmp_path)
    os.truncate(file, 100)
    assert torch.equal(large().train_tokens, first)
    before = poem.stat()
    poem.write_text(poem.read_text().replace("mercy", "MERCY"))
    os.utime(poem, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p sets it
    assert "M" in large().tokenizer.vocabulary


def test_a_memory_map_may_be_larger_than_memory(tmp_path):
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open(tmp_path / "tokens", "wb") as file:
        file.write(b"\5\0")
        file.truncate(size)  # a sparse file
    ids = memory_map(tmp_path / "tokens", "uint16")
    assert len(ids) == size // 2 and ids[0] == 5 and ids[-1] == 0


def test_large_texts_get_no_name_augmentation_and_a_warning_says_so(large, capsys):
    assert len(large(name_augmentation=2).train_tokens) == len(large().train_tokens)
    assert "data.name_augmentation=2 is for small texts" in capsys.readouterr().err


def test_a_full_disk_raises_an_error_and_leaves_no_files(large, tmp_path):
    resource = pytest.importorskip("resource")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="make room, or set XDG_CACHE_HOME"):
            large()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.name for file in (tmp_path / "cache" / "lightning-gpt").iterdir()] == ["lock"]


def test_the_error_for_an_unwritable_cache_says_how_to_move_it(large, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        large()
