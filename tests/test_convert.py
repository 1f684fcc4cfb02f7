"""Imported and exported nets compute the same function up to rounding, and a round trip keeps every bit."""

import json
import math
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from conftest import MODERN, TINY, T, V, loud

from lightning_gpt.checkpoint.convert import read_hf_tokenizer
from lightning_gpt.checkpoint.io import load_net, read_checkpoint, write_checkpoint
from lightning_gpt.cli.main import main
from lightning_gpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, TokenIds
from lightning_gpt.model.gpt import GPT, GPTConfig

SIZES = dict(n_layer=3, n_head=2, n_embd=16, dropout=0.1)
MERGES = "t h\nth e\nĠ the\nÃ ¯"


def hugging_face(folder, **overrides):
    """Save a small random GPT-2 of Hugging Face's to a folder."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()  # it would precede the line that a test reads
    sizes = dict(vocab_size=V, n_positions=T, n_embd=16, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None)
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | overrides)).eval()
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    net.save_pretrained(folder)
    return net


def save_net(path, tokenizer, **overrides):
    """Save a checkpoint of a random net with large weights."""
    net = loud(GPT(GPTConfig(len(tokenizer), T, **SIZES | overrides))).float()
    checkpoint = {
        "hyper_parameters": net.config.__dict__ | {"ema_decay": 0.0, "seed": 1},
        "datamodule_hyper_parameters": tokenizer.state(),
    }
    checkpoint["pytorch-lightning_version"] = "2.6.6"
    write_checkpoint(checkpoint | {"state_dict": {f"net.{k}": w for k, w in net.state_dict().items()}}, path)
    return net


def are_equal(one, other):
    one, other = read_checkpoint(one), read_checkpoint(other)
    assert one["datamodule_hyper_parameters"] == other["datamodule_hyper_parameters"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    return all(torch.equal(w, other["state_dict"][name]) for name, w in one["state_dict"].items())


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [{}, {"activation_function": "gelu"}, {"activation_function": "relu", "tie_word_embeddings": False}],
    ids=["gpt2", "gelu", "relu, untied"],
)
def test_an_imported_gpt2_has_the_same_logits_and_a_round_trip_keeps_every_bit(tmp_path, idx, overrides):
    theirs = hugging_face(tmp_path / "hf", **overrides)
    main(["import", "--source", f"hf:{tmp_path}/hf", "--output", f"{tmp_path}/one.ckpt"])
    net, _ = load_net(tmp_path / "one.ckpt")
    torch.testing.assert_close(net(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(net.double()(idx), theirs.double()(idx).logits, rtol=0, atol=1e-10)
    assert net.config.tie_embeddings == overrides.get("tie_word_embeddings", True)

    main(["export", "--to=hf", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/back"])
    main(["import", f"--source=hf:{tmp_path}/back", f"--output={tmp_path}/two.ckpt"])
    assert are_equal(tmp_path / "one.ckpt", tmp_path / "two.ckpt")


@pytest.mark.parametrize("overrides", [{}, {"bias": False, "tie_embeddings": True, "activation": "gelu_tanh"}], ids=str)
def test_an_exported_net_has_the_same_logits_in_transformers(tmp_path, idx, overrides):
    transformers = pytest.importorskip("transformers")
    net = save_net(tmp_path / "one.ckpt", CharTokenizer("abcdefghijklmnopq"), **overrides)
    main(["export", "--to=hf", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/hf"])
    theirs, loading_info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading_info["missing_keys"] and not loading_info["unexpected_keys"]
    torch.testing.assert_close(theirs(idx).logits, net(idx), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.double()(idx).logits, net.double()(idx), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("\n aehlopt,ï"), ByteTokenizer(), BPETokenizer(MERGES)], ids=["char", "byte", "bpe"]
)
def test_the_tokenizer_is_exported_and_imported(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    save_net(tmp_path / "one.ckpt", tokenizer)
    main(["export", "--to=hf", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/hf"])
    theirs, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), "the pale, the  other\n\nhotel ï"
    text = text.replace("r", "")
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
    main(["import", f"--source=hf:{tmp_path}/hf", f"--output={tmp_path}/two.ckpt"])
    assert are_equal(tmp_path / "one.ckpt", tmp_path / "two.ckpt")


@pytest.mark.parametrize("file_format", ["merges.txt", "tokenizer.json"])
def test_byte_pairs_in_a_folder_are_imported(tmp_path, file_format):
    tokenizer = BPETokenizer(MERGES)
    hugging_face(tmp_path, vocab_size=len(tokenizer) + 1)  # one more, as GPT-2's end-of-text token
    if file_format == "merges.txt":
        (tmp_path / file_format).write_text("#version: 0.2\n" + MERGES + "\n")
        (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokenizer.tokens)}))
    else:
        tokenizer.engine.save(str(tmp_path / file_format))
    main(["import", f"--source=hf:{tmp_path}", f"--output={tmp_path}/one.ckpt"])
    net, ours = load_net(tmp_path / "one.ckpt")
    assert ours.vocabulary == MERGES and len(ours) == net.config.vocab_size == len(tokenizer) + 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"activation_function": "silu"}, "activation_function=silu"),
        ({"n_inner": 40}, "n_inner=40, but only 4 * n_embd=64 is supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_a_gpt2_with_unsupported_settings_is_refused(tmp_path, fails, overrides, message):
    hugging_face(tmp_path, **overrides)
    assert message in fails("import", f"--source=hf:{tmp_path}", f"--output={tmp_path}/one.ckpt")


def test_folders_without_a_gpt2_are_refused(tmp_path, fails):
    args = ["import", f"--output={tmp_path}/one.ckpt", "--source"]
    hugging_face(tmp_path / "gpt2")
    assert "not a folder with a readable config.json" in fails(*args, f"hf:{tmp_path}")
    assert "does not exist" in fails(*args, f"hf:{tmp_path}/none") and "does not exist" in fails(*args, "hf:")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is a llama, but only the GPT-2 family" in fails(*args, f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text((tmp_path / "gpt2" / "config.json").read_text())
    assert "can't be read" in fails(*args, f"hf:{tmp_path}")
    config = json.loads((tmp_path / "config.json").read_text()) | {"n_layer": 4}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    assert "lacks weights: transformer.h.3" in fails(*args, f"hf:{tmp_path}/gpt2")
    assert "use hf:FOLDER, nanogpt:FILE" in fails(*args, "keras:x")


def test_the_error_without_a_network_says_that_the_hub_was_not_reached(tmp_path, fails, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = fails("import", "--source=gpt2-medium", f"--output={tmp_path}/one.ckpt")
    assert "gpt2-medium is not a local folder, and the Hugging Face hub could not be reached" in error


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"position": "rope"}, "model.position=rope, only learned"),
        ({"activation": "swiglu"}, "model.activation=swiglu, only gelu"),
        ({"ngram_max": 2, "ngram_buckets": 5}, "model.ngram_max=2, only 1"),
        ({"logit_softcap": 5.0}, "model.logit_softcap=5.0"),
        ({"norm": "rmsnorm"}, "model.norm=rmsnorm"),
        ({"qk_norm": True}, "model.qk_norm=True"),
    ],
)
def test_a_net_that_gpt2_cannot_represent_is_not_exported_as_one(tmp_path, fails, overrides, message):
    save_net(tmp_path / "one.ckpt", TokenIds(V), **overrides)
    error = fails("export", "--to=hf", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/hf")
    assert message in error and "safetensors or onnx" in error and not (tmp_path / "hf").exists()


# --- safetensors and ONNX ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{"tie_embeddings": True}, MODERN], ids=["tied", "modern"])
def test_a_round_trip_through_safetensors_keeps_every_bit_and_the_vocabulary(tmp_path, overrides):
    pytest.importorskip("safetensors")
    save_net(tmp_path / "one.ckpt", CharTokenizer("the cat", "replace"), **overrides)
    main(["export", "--to=safetensors", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/x.safetensors"])
    main(["import", f"--source=safetensors:{tmp_path}/x.safetensors", f"--output={tmp_path}/two.ckpt"])
    assert are_equal(tmp_path / "one.ckpt", tmp_path / "two.ckpt")


@pytest.mark.parametrize("file_format", ["safetensors", "hf"])
def test_an_output_that_cannot_be_written_is_named(tmp_path, fails, file_format):
    pytest.importorskip("safetensors")
    save_net(tmp_path / "one.ckpt", TokenIds(V))
    target = tmp_path / "a folder" / ("model.safetensors" if file_format == "hf" else "")
    target.mkdir(parents=True)
    error = fails("export", f"--to={file_format}", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/a folder")
    assert f"{target} can't be written" in error


def test_a_foreign_or_damaged_safetensors_file_is_refused(tmp_path, fails):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    (tmp_path / "text").write_text("hello")
    args = ["import", f"--output={tmp_path}/one.ckpt", "--source"]
    assert "does not describe its net" in fails(*args, f"safetensors:{tmp_path}/foreign")
    assert "is not a valid safetensors file" in fails(*args, f"safetensors:{tmp_path}/text")
    assert "does not exist" in fails(*args, f"safetensors:{tmp_path}/none")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{"tie_embeddings": True}, MODERN], ids=["tied", "modern"])
def test_an_onnx_program_has_the_same_logits_at_any_length(tmp_path, overrides):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    net = save_net(tmp_path / "one.ckpt", TokenIds(V), **overrides)
    main(["export", "--to=onnx", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/x.onnx"])
    program = runtime.InferenceSession(tmp_path / "x.onnx")
    for B, length in (2, T), (1, 1), (3, 5):
        idx = torch.randint(V, (B, length))
        (logits,) = program.run(None, {"idx": idx.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), net(idx), rtol=0, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert json.loads(metadata["lightning_gpt"])["model"]["n_embd"] == 16
    before, limits = (tmp_path / "x.onnx").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as if the disk were full
        with pytest.raises(SystemExit):
            main(["export", "--to=onnx", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/x.onnx"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "x.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.ckpt", "x.onnx"]


# --- nanoGPT ----------------------------------------------------------------------------------------------------------


def nanogpt(folder, vocab_size, bias, **more):
    """Save a ckpt.pt as nanoGPT's train.py does, compiled, with optimizer and settings; return its net."""
    config = GPTConfig(vocab_size, T, **SIZES, bias=bias, tie_embeddings=True)
    net = loud(GPT(config)).float()
    weights = {
        "_orig_mod." + ("" if k == "lm_head.weight" else "transformer.") + k: w for k, w in net.state_dict().items()
    }
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T)  # the mask in old checkpoints
    args = dict(n_layer=3, n_head=2, n_embd=16, block_size=T, bias=bias, vocab_size=vocab_size, dropout=0.1)
    checkpoint = {
        "model": weights,
        "optimizer": {"state": {}},
        "model_args": args,
        "iter_num": 7,
        "config": {"dataset": "x"},
    }
    torch.save(checkpoint | {"best_val_loss": torch.tensor(1.0)} | more, folder / "ckpt.pt")
    return net


@pytest.mark.parametrize("bias", [True, False])
def test_an_imported_nanogpt_checkpoint_has_the_same_logits_and_characters(tmp_path, idx, bias):
    theirs = nanogpt(tmp_path, V, bias)
    vocabulary = "zyxw\n vutsrqponml"  # not sorted
    meta = {"vocab_size": V, "itos": dict(enumerate(vocabulary)), "stoi": {c: i for i, c in enumerate(vocabulary)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    main(["import", f"--source=nanogpt:{tmp_path}/ckpt.pt", f"--output={tmp_path}/one.ckpt"])
    net, tokenizer = load_net(tmp_path / "one.ckpt")
    assert torch.equal(net(idx), theirs(idx)) and tokenizer.decode(torch.arange(V)) == vocabulary
    main(["generate", f"--ckpt_path={tmp_path}/one.ckpt", "--max_new_tokens=20"])


def test_a_nanogpt_checkpoint_without_characters_gets_token_ids_or_gpt2s_tokenizer(tmp_path):
    for vocab_size, tokenizer in (V, "ids"), (50304, "gpt2"):
        nanogpt(tmp_path, vocab_size, bias=True)
        main(["import", f"--source=nanogpt:{tmp_path}/ckpt.pt", f"--output={tmp_path}/one.ckpt"])
        assert read_checkpoint(tmp_path / "one.ckpt")["datamodule_hyper_parameters"]["tokenizer"] == tokenizer
        assert len(load_net(tmp_path / "one.ckpt")[1]) == vocab_size


class RunsCode:
    def __reduce__(self):
        return (Path.write_text, (Path("bomb"), "it ran"))


def test_code_in_nanogpts_files_is_not_run(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["import", "--source=nanogpt:ckpt.pt", "--output=one.ckpt"]
    nanogpt(tmp_path, V, bias=True)
    for content in {"itos": RunsCode()}, [RunsCode()], {"itos": {0: "long"}}, {"itos": 3}:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
        assert "meta.pkl is not a valid meta.pkl of nanoGPT" in fails(*args)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))
    assert "the vocabulary has 2 tokens, and the net has 17" in fails(*args)
    nanogpt(tmp_path, V, bias=True, config=RunsCode())
    error = fails(*args)
    assert "is not a nanoGPT checkpoint of plain data: Unsupported" in error and "`False`" not in error
    assert not (tmp_path / "bomb").exists() and not (tmp_path / "one.ckpt").exists()
    torch.save({"weights": 1}, "ckpt.pt")
    assert "it lacks 'model_args'" in fails(*args)
    Path("ckpt.pt").unlink()
    assert "does not exist" in fails(*args)


# --- using an imported checkpoint -------------------------------------------------------------------------------------


def test_imported_weights_can_be_validated_and_fine_tuned(tmp_path, text_file, capsys, fails):
    save_net(tmp_path / "one.ckpt", CharTokenizer(text_file.read_text()))
    main(["export", "--to=hf", f"--ckpt_path={tmp_path}/one.ckpt", f"--output={tmp_path}/hf"])
    first = tmp_path / "two.ckpt"
    main(["import", f"--source=hf:{tmp_path}/hf", f"--output={first}"])
    data = f"--data.corpus={text_file}"
    main(["validate", f"--ckpt_path={first}", data, "--trainer.accelerator=cpu"])
    assert "val/bpc" in capsys.readouterr().out
    small = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--sample.length=0"]
    main(
        [
            "fit",
            "--config=finetune",
            f"--model.init_from={first}",
            data,
            *small,
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    checkpoint = read_checkpoint(next(tmp_path.rglob("last.ckpt")))
    assert checkpoint["global_step"] == 3 and checkpoint["hyper_parameters"]["n_layer"] == 3
    assert "weights but no training state" in fails("fit", f"--ckpt_path={first}", data)


def test_bits_per_character_count_characters_for_every_tokenizer(tmp_path, capsys):
    text = "naïve café, 日本語\n" * 60
    (tmp_path / "text").write_text(text)
    figures = {}
    for name, tokenizer in {"byte": ByteTokenizer(), "bpe": BPETokenizer(MERGES)}.items():
        save_net(tmp_path / "one.ckpt", tokenizer)
        main(
            [
                "validate",
                f"--ckpt_path={tmp_path}/one.ckpt",
                f"--data.corpus={tmp_path}/text",
                "--trainer.accelerator=cpu",
            ]
        )
        out = capsys.readouterr().out
        figures[name] = {key: float(out.split(key)[1].split()[1]) for key in ("val/bpc", "val/loss")}
        part = text[int(0.9 * len(text)) :]
        ids = tokenizer.encode(part)
        begun = len(part) - len(tokenizer.decode(ids[:1]))  # every token but the first is predicted
        bits = figures[name]["val/loss"] * (len(ids) - 1) / math.log(2)
        assert figures[name]["val/bpc"] == pytest.approx(bits / begun, rel=1e-5)


def test_token_files_have_bits_per_character_only_if_their_tokenizer_is_given(token_files, tmp_path, capsys):
    data = [f"--data.token_files={token_files}", "--data.vocab_size=300", f"--trainer.default_root_dir={tmp_path}"]
    for more, known in ([], False), (["--data.tokenizer=byte"], True):
        main(["fit", *TINY, *data, *more])
        main(["validate", f"--ckpt_path={sorted(tmp_path.rglob('last.ckpt'))[-1]}"])
        assert ("val/bpc" in capsys.readouterr().out) == known


# --- untrusted files --------------------------------------------------------------------------------------------------


def save_reordered(folder, tokenizer, special):
    """Save the same byte pairs with special tokens first and other ids, as trainers of tokenizers do."""
    lib = pytest.importorskip("tokenizers")
    tokens = [*special, *sorted(tokenizer.tokens)]
    engine = lib.Tokenizer(lib.models.BPE({token: i for i, token in enumerate(tokens)}, tokenizer.pairs))
    engine.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.save(str(folder / "tokenizer.json"))
    return engine


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_reordered_byte_pairs_with_special_tokens_give_the_same_logits(tmp_path, capsys, overrides):
    tokenizer = BPETokenizer(MERGES)
    theirs = hugging_face(tmp_path, vocab_size=len(tokenizer) + 2, **overrides)
    engine = save_reordered(tmp_path, tokenizer, ["<s>", "<pad>"])
    main(["import", f"--source=hf:{tmp_path}", f"--output={tmp_path}/one.ckpt"])
    assert "are reordered" in capsys.readouterr().err
    (net, ours), text = load_net(tmp_path / "one.ckpt"), "the pale ï"
    logits, expected = net(ours.encode(text)[None]), theirs(torch.tensor([engine.encode(text).ids])).logits
    their_ids = [engine.token_to_id(token) for token in ours.tokens] + [0, 1]
    torch.testing.assert_close(logits, expected[..., their_ids], rtol=0, atol=1e-5)


def test_an_unsupported_tokenizer_is_reported_and_the_suggested_commands_work(tmp_path, capsys, token_files):
    tokenizer = BPETokenizer(MERGES)
    hugging_face(tmp_path, vocab_size=300)
    save_reordered(tmp_path, tokenizer, [])
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = {token: i + 999 for token, i in good["model"]["vocab"].items()}
    for broken, message in (
        (good | {"normalizer": {"type": "NFC"}}, "it normalizes text"),
        (good | {"model": good["model"] | {"vocab": {}}}, "(it lacks '!')"),
        (good | {"model": good["model"] | {"vocab": ids}}, "its ids do not match the net's vocabulary"),
        ([], "list indices"),
        ({}, "it lacks 'pre_tokenizer'"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        assert read_hf_tokenizer(tmp_path, 300) == ({}, list(range(300)))
        err = capsys.readouterr().err
        assert f"{tmp_path}/tokenizer.json" in err and message in err and "read and written as numbers" in err
    (tmp_path / "tokenizer.json").write_text(json.dumps(good | {"pre_tokenizer": {"type": "Whitespace"}}))
    main(["import", f"--source=hf:{tmp_path}", f"--output={tmp_path}/one.ckpt"])
    captured = capsys.readouterr()
    assert "does not split text into words as GPT-2 does" in captured.err
    *_, generate, fit = captured.out.strip().splitlines()
    main([*generate.split()[generate.split().index("generate") :], "--max_new_tokens=3"])
    command = fit.replace("train.bin,val.bin", token_files).split()
    small = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--sample.length=0"]
    main([*command[command.index("fit") :], *small, f"--trainer.default_root_dir={tmp_path}/run"])


def test_code_in_a_folder_is_not_run(tmp_path, fails, monkeypatch):
    transformers = pytest.importorskip("transformers")
    hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text("open('bomb', 'w')\nfrom transformers import GPT2Config as Evil")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "yes")  # a user who agrees to everything
    for kind in "gpt2", "evil":
        more = {"model_type": kind, "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        if kind == "gpt2":
            main(["import", f"--source=hf:{tmp_path}", f"--output={tmp_path}/one.ckpt"])
        else:
            assert "config.json" in fails("import", f"--source=hf:{tmp_path}", f"--output={tmp_path}/one.ckpt")
    assert not (tmp_path / "bomb").exists() and not asked and transformers


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layer": 10**8}, "config.json has n_layer=100000000"),
        ({"n_embd": 2**40, "n_head": 2**40}, "weight files are too small for that"),
        ({"n_layer": "many"}, "config.json"),
        ({"resid_pdrop": [1]}, "config.json"),
        ({"lightning_gpt": 3}, "config.json has lightning_gpt=3"),
        (
            {"lightning_gpt": {"tokenizer": "char", "vocabulary": "ab", "on_unknown": "error"}},
            "the vocabulary has 2 tokens, and the net has 17",
        ),
        ({"lightning_gpt": {"tokenizer": "char", "vocabulary": [1]}}, "the tokenizer is 'char'"),
        (None, "config.json"),
    ],
    ids=str,
)
def test_a_wrong_config_json_is_refused_by_name(tmp_path, fails, change, message):
    hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text("{" if change is None else json.dumps(config | change))
    error = fails("import", f"--source=hf:{tmp_path}", f"--output={tmp_path}/one.ckpt")
    assert message in error and str(tmp_path) in error and not (tmp_path / "one.ckpt").exists()


@pytest.mark.parametrize(
    "model, data",
    [
        ({"n_layer": 10**8}, {}),
        ({"n_layer": "3"}, {}),
        ({"vocab_size": 2**62}, {}),
        ({"dropout": None}, {}),
        ([], {}),
        ({}, []),
        ({}, None),
        ({}, {"vocabulary": 5, "tokenizer": "char"}),
        ({}, {"tokenizer": "char", "vocabulary": "abc"}),
        ({}, {"tokenizer": {"class_path": "evil.Evil"}}),
    ],
    ids=str,
)
def test_safetensors_with_wrong_metadata_are_refused(tmp_path, fails, model, data):
    save_file = pytest.importorskip("safetensors.torch").save_file
    net = save_net(tmp_path / "one.ckpt", TokenIds(V))
    metadata = {"model": net.config.__dict__ | model if isinstance(model, dict) else model, "data": data}
    save_file(dict(net.state_dict()), tmp_path / "x", {"lightning_gpt": json.dumps(metadata)})
    assert f"{tmp_path}/x" in fails("import", f"--source=safetensors:{tmp_path}/x", f"--output={tmp_path}/two.ckpt")
    assert not (tmp_path / "two.ckpt").exists()


def test_only_regular_files_are_replaced_and_links_are_kept(tmp_path, fails, ckpt):
    pytest.importorskip("safetensors")
    os.mkfifo(pipe := tmp_path / "pipe")  # stands for a device such as /dev/null
    for command in (
        ["quantize", f"--ckpt_path={ckpt}"],
        ["import", f"--source=hf:{tmp_path}"],
        ["export", "--to=safetensors", f"--ckpt_path={ckpt}"],
        ["export", "--to=onnx", f"--ckpt_path={ckpt}"],
    ):
        assert f"{pipe} can't be written: it is a device or a pipe" in fails(*command, f"--output={pipe}")
    with pytest.raises(OSError, match="a device or a pipe"):
        write_checkpoint({}, pipe)
    assert pipe.is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("old")
    main(["quantize", f"--ckpt_path={ckpt}", f"--output={tmp_path}/link"])
    main(["export", "--to=safetensors", f"--ckpt_path={tmp_path}/link", f"--output={tmp_path}/link"])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes()[8:20].startswith(b"{")
