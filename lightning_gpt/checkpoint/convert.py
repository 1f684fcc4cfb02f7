"""lightning-gpt import and export: weights from GPT-2, nanoGPT and safetensors, to safetensors, Hugging Face and ONNX.

Our modules bear GPT-2's names, so weights move by name. The libraries are optional and imported when they are needed.
"""

import io
import json
import logging
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    TokenIds,
    Tokenizer,
    build_from_state,
    byte_symbols,
)
from ..errors import import_optional, print_info, program_name
from ..model.gpt import GPT, GPTConfig
from .io import TMP_PREFIX, check_regular_file, find_checkpoint, load_net, read_plain, write_checkpoint
from .validation import VERSION_KEY, check_contents, matches_type, short_repr

# GPT-2's settings as transformers names them, and ours
HF_SETTINGS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "resid_pdrop": "dropout",
    "tie_word_embeddings": "tie_embeddings",
}
HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# what else GPT-2 could be told, and the one value that our block has; then the reverse
FIXED_IN_OURS: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
FIXED_IN_GPT2: dict[str, Any] = {
    "position": "learned",
    "norm": "layernorm",
    "qk_norm": False,
    "logit_softcap": 0.0,
    "ngram_max": 1,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 keeps these as (inputs, outputs)


def gpt2_name(ours: str) -> str:
    return ours if ours.startswith("lm_head") else f"transformer.{ours}"


# --- import -----------------------------------------------------------------------------------------------------------


def import_weights(
    source: str, output: str, meta: str | None = None, tokenizer: Literal["byte", "gpt2", "ids"] | None = None
) -> None:
    """Make a checkpoint of weights that were trained elsewhere.

    Args:
        source: hf:FOLDER, a GPT-2 as transformers saves it; gpt2, gpt2-medium, gpt2-large, gpt2-xl or hf:OWNER/NAME, a
            GPT-2 on the Hugging Face hub; nanogpt:FILE, a ckpt.pt; or safetensors:FILE, as `export` writes it.
        output: the checkpoint to write.
        meta: nanoGPT's meta.pkl with the characters of its vocabulary; null looks beside the ckpt.pt.
        tokenizer: what the ids mean, where the weights come without that; null is gpt2 for 50,257 of them or 50,304,
            and ids, which are written as numbers, for others.
    """
    check_regular_file(Path(output))
    kind, _, path = (
        source.rpartition(":")
        if not source.startswith(("hf:", "nanogpt:", "safetensors:"))
        else (source.partition(":"))
    )
    if kind == "nanogpt":
        config, weights, words = read_nanogpt(Path(path), meta)
    elif kind == "safetensors":
        config, weights, words = read_safetensors(Path(path))
    elif kind in ("hf", ""):
        config, weights, words = read_hugging_face(path)
    else:
        raise ValueError(f"--source {source}: take hf:FOLDER, nanogpt:FILE, safetensors:FILE, or the hub's gpt2")
    if not words or tokenizer:
        words = {"tokenizer": tokenizer or ("gpt2" if config.vocab_size in (50257, 50304) else "ids")}
        words |= {"vocab_size": config.vocab_size, "vocabulary": None}
    saved: dict[str, Any] = {
        "state_dict": {f"net.{name}": w for name, w in weights.items()},
        "hyper_parameters": asdict(config) | {"seed": 1337},
        "datamodule_hyper_parameters": words,
        "global_step": 0,
        VERSION_KEY: version("lightning"),
    }
    try:
        check_contents(saved)
    except ValueError as error:
        raise ValueError(f"{source} is not what it says of itself: {error}") from None
    known = build_from_state(words, config.vocab_size)
    saved["state_dict"] = {name: w.float() for name, w in saved["state_dict"].items()}
    saved["datamodule_hyper_parameters"] = known.state()
    write_checkpoint(saved, output)
    tied = config.tie_embeddings
    size = sum(w.numel() for name, w in weights.items() if not (tied and name == "lm_head.weight")) / 1e6
    text = "--data.token_files train.bin,val.bin" if isinstance(known, TokenIds) else "--data.corpus my_text.txt"
    print(
        f"{size:.2f}M parameters, {config.vocab_size:,} token ids ({known.name}), in {output}\n\n"
        "Next:\n"
        f"  {program_name()} generate --ckpt_path {output}\n"
        f"  {program_name()} fit --config finetune --model.init_from {output} {text}"
    )


def from_gpt2_names(weights: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """GPT-2's weights by our names; causal masks, which some files hold, are left out."""
    ours = {}
    for name, w in weights.items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            ours[name] = w.t().contiguous() if transposed and name.endswith(TRANSPOSED) else w
    if "lm_head.weight" not in ours and "wte.weight" in ours:
        ours["lm_head.weight"] = ours["wte.weight"]
    return ours


def read_hugging_face(name: str) -> tuple[GPTConfig, dict[str, Tensor], dict]:
    """Settings, weights and, where it is known, the tokenizer of a GPT-2 in a folder or on the hub.

    Raises:
        ValueError: nothing is there, or no GPT-2, or one that our block can't be; names the setting.
    """
    transformers = import_optional("transformers", "formats")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(name)
    if not name or not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"the folder {name} does not exist: give hf:FOLDER with config.json and the weights")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # each of its retries
    try:
        theirs = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a dozen kinds, by what the network or the folder lacks
        if folder.is_dir():
            why = " ".join(str(error).split())[:150]
            raise ValueError(f"{name} is no folder with a config.json that can be read: {why}") from None
        raise ValueError(
            f"{name} is no folder here, and the Hugging Face hub could not be reached or does not have it "
            f"({type(error).__name__}): connect, or give a copy of its folder as hf:FOLDER"
        ) from None
    if theirs.model_type != "gpt2":
        raise ValueError(f"{name} is a {theirs.model_type}, and only the GPT-2 family can be imported")
    for setting, needed in FIXED_IN_OURS.items():
        if (value := getattr(theirs, setting, needed)) != needed:
            raise ValueError(f"{name} has {setting}={value}, and our block only has {needed}")
    if theirs.activation_function not in HF_ACTIVATIONS:
        known = ", ".join(HF_ACTIVATIONS)
        raise ValueError(f"{name} has activation_function={theirs.activation_function}, and our block only {known}")
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        raise ValueError(f"{name} has n_inner={theirs.n_inner}, and our MLP is 4 * n_embd={4 * theirs.n_embd} wide")
    sizes = {ours: getattr(theirs, setting) for setting, ours in HF_SETTINGS.items()}
    for setting, ours in HF_SETTINGS.items():
        if not matches_type(sizes[ours], type(getattr(GPTConfig, ours))):
            raise ValueError(f"{name}/config.json has {setting}={short_repr(sizes[ours])}")
    config = GPTConfig(**sizes, activation=HF_ACTIVATIONS[theirs.activation_function])  # type: ignore[arg-type]
    least = 12 * config.n_layer * config.n_embd**2 + (config.vocab_size + config.block_size) * config.n_embd
    files = [file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")] if folder.is_dir() else []
    if config.n_layer > 1000 or files and least > sum(file.stat().st_size for file in files):
        raise ValueError(
            f"{name}/config.json says n_layer={config.n_layer}, and these weights hold less than that takes"
        )
    try:
        model, told = transformers.GPT2LMHeadModel.from_pretrained(
            name, output_loading_info=True, attn_implementation="eager"
        )
    except Exception as error:
        raise ValueError(f"the weights of {name} can't be read: {' '.join(str(error).split())[:200]}") from None
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{name} lacks weights: {', '.join(missing)[:200]}")
    weights, words = (
        from_gpt2_names(model.float().state_dict(), transposed=True),
        getattr(theirs, "lightning_gpt", None),
    )
    if words is not None and not isinstance(words, dict):
        raise ValueError(f"{name}/config.json has lightning_gpt={short_repr(words)}")
    if not words and folder.is_dir():
        words, order = read_hf_tokenizer(folder, config.vocab_size)
        if order != list(range(config.vocab_size)):
            print_info(f"the token ids of {name} are put in another order: bytes, then merges, then what is no text")
            for matrix in "wte.weight", "lm_head.weight":
                weights[matrix] = weights[matrix][order]
    return config, weights, words or {}


def read_hf_tokenizer(folder: Path, size: int) -> tuple[dict, list[int]]:
    """The byte pairs in a folder of transformers': their settings, and their ids in the order of our own.

    Where it has others, that is said, and there are no settings.
    """
    file, as_it_is = folder / "merges.txt", list(range(size))
    try:
        if file.exists():
            lines = file.read_text("utf-8").split("\n")
            merges = "\n".join(line for line in lines if line and not line.startswith("#version"))
            file = folder / "vocab.json"
            ids = json.loads(file.read_text("utf-8"))
        else:
            file = folder / "tokenizer.json"
            if not file.exists():
                return {}, as_it_is
            told = json.loads(file.read_text("utf-8"))
            if told["pre_tokenizer"]["type"] != "ByteLevel" or told["pre_tokenizer"].get("add_prefix_space"):
                raise ValueError("it does not cut texts into words as GPT-2 does")
            if told.get("normalizer"):
                raise ValueError("it changes texts before it reads them")
            pairs, ids = told["model"]["merges"], told["model"]["vocab"]
            merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in pairs)
        tokens = BPETokenizer(merges, size).tokens
        order = [ids[token] for token in tokens]
        if any(type(i) is not int or not 0 <= i < size for i in order) or len({*order}) < len(order):
            raise ValueError("its ids are not those of the net")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:150]
        print_info(f"the tokenizer in {file} is none that can be taken along ({why}): the net's token ids stay numbers")
        return {}, as_it_is
    rest = sorted({*as_it_is} - {*order})  # special tokens, which no text has
    return {"tokenizer": "bpe", "vocabulary": merges, "on_unknown": "error", "vocab_size": size}, order + rest


class PlainUnpickler(pickle.Unpickler):
    """Reads what consists of dicts, lists, strings and numbers; anything else could run code."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"it names {module}.{name}, and only dicts, strings and numbers are read")


def read_nanogpt(path: Path, meta: str | None) -> tuple[GPTConfig, dict[str, Tensor], dict]:
    """Settings, weights and, where its meta.pkl is there, the characters of a checkpoint of nanoGPT's.

    Raises:
        ValueError: a file is no such thing; what could run code is not read. OSError: it can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist: give nanogpt:FILE, the ckpt.pt of its out_dir")
    try:
        saved = read_plain(path.read_bytes())
        args, weights = dict(saved["model_args"]), from_gpt2_names(saved["model"], transposed=False)
        config = GPTConfig(
            **{name: args[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")},
            dropout=args.get("dropout", 0.0),
            bias=args.get("bias", True),
            tie_embeddings=True,
        )
    except Exception as error:
        what = str(error).split("WeightsUnpickler error: ")[-1]  # torch says before that how to run code all the same
        reason = f"it lacks {error}" if isinstance(error, KeyError) else what.strip().split("\n")[0][:200]
        raise ValueError(f"{path} is no checkpoint of nanoGPT's that can be read as plain data: {reason}") from None
    file = Path(meta) if meta else path.with_name("meta.pkl")
    if not file.exists():
        if meta:
            raise FileNotFoundError(f"the file {meta} does not exist: give --meta FILE, nanoGPT's data/.../meta.pkl")
        return config, weights, {}
    try:
        itos = PlainUnpickler(io.BytesIO(file.read_bytes())).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        if any(not isinstance(character, str) or len(character) != 1 for character in characters):
            raise ValueError("its itos are no characters")
    except Exception as error:
        raise ValueError(f"{file} is no meta.pkl of nanoGPT's: {type(error).__name__}: {error}") from None
    return config, weights, {"tokenizer": "char", "vocabulary": "".join(characters), "on_unknown": "error"}


def read_safetensors(path: Path) -> tuple[GPTConfig, dict[str, Tensor], dict]:
    """What `export` wrote.

    Raises:
        ValueError: the file is damaged, or says nothing of its net. OSError: it can't be read.
    """
    safetensors = import_optional("safetensors", "formats")
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["lightning_gpt"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = {field.name for field in fields(GPTConfig)}
        config = GPTConfig(**{name: value for name, value in told["model"].items() if name in names})
        words = {str(name): value for name, value in told["data"].items()}
    except KeyError:
        raise ValueError(f"{path} does not say what net its weights are of: only files of our export do") from None
    except Exception as error:
        raise ValueError(f"{path} is no safetensors file of ours: {' '.join(str(error).split())[:200]}") from None
    return config, from_gpt2_names(weights, transposed=False), words


# --- export -----------------------------------------------------------------------------------------------------------


def export(to: Literal["safetensors", "hf", "onnx"], ckpt_path: str = "best", output: str | None = None) -> None:
    """Write a checkpoint's net in a form that other programs read.

    Args:
        to: safetensors, weights and what they are of in one file; hf, a folder that transformers loads as a GPT-2;
            onnx, a program that maps idx (B, T) to logits (B, T, V).
        ckpt_path: the checkpoint; best or last is the newest file of that name below checkpoints/.
        output: file or folder to write; null is gpt.safetensors, gpt_hf or gpt.onnx.
    """
    source = find_checkpoint(ckpt_path)
    net, tokenizer = load_net(source)
    if not isinstance(net, GPT):
        raise ValueError(f"the checkpoint {source} is a lecture_step of the lecture, which no other program knows")
    path = Path(os.path.realpath(output or {"hf": "gpt_hf"}.get(to, f"gpt.{to}")))  # a link stays one
    for file in path / "model.safetensors" if to == "hf" else path, path.with_name(f"{path.name}.data"):
        check_regular_file(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = json.dumps({"model": asdict(net.config), "data": tokenizer.state()})
    if to == "safetensors":
        write_safetensors(net.state_dict(), net.config.tie_embeddings, path, {"lightning_gpt": told})
    elif to == "hf":
        write_hugging_face(net, tokenizer, path)
    else:
        write_onnx(net, path, told)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{size:.2f}M parameters of {source} in {os.path.relpath(path)}")


def write_safetensors(weights: dict[str, Tensor], tied: bool, path: Path, metadata: dict[str, str]) -> None:
    """Save all tensors in one file, a tied head only once."""
    safetensors = import_optional("safetensors", "formats")
    from safetensors.torch import save_file

    kept = {name: w.contiguous() for name, w in weights.items() if not (tied and name == "lm_head.weight")}
    try:
        save_file(kept, path, {"format": "pt"} | metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}; what was there before still is") from None


def write_hugging_face(net: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """A folder with config.json, model.safetensors and, where it is ours to give, the tokenizer.

    Raises:
        ValueError: the net has a setting that GPT-2 does not have; names it.
    """
    config = net.config
    needed = FIXED_IN_GPT2 | ({"activation": "gelu"} if config.activation not in HF_ACTIVATIONS.values() else {})
    for setting, value in needed.items():
        if getattr(config, setting) != value:
            raise ValueError(
                f"transformers' GPT-2 has no model.{setting}={getattr(config, setting)}, only {value}: "
                "export to safetensors or onnx, which take every net"
            )
    weights = {}
    for name, w in net.state_dict().items():
        weights[gpt2_name(name)] = w.t() if name.endswith(TRANSPOSED) else w
        bias = name.removesuffix("weight") + "bias"
        if not config.bias and name.startswith(("h.", "ln_f")):  # GPT-2 has one everywhere; 0 changes nothing
            weights[gpt2_name(bias)] = w.new_zeros(len(w))
    activation = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}[config.activation]
    settings = {theirs: getattr(config, ours) for theirs, ours in HF_SETTINGS.items()}
    settings |= {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "activation_function": activation}
    end = 50256 if isinstance(tokenizer, GPT2Tokenizer) else None
    settings |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end}
    settings |= {"dtype": "float32", "lightning_gpt": tokenizer.state()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, config.tie_embeddings, folder / "model.safetensors", {})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if isinstance(tokenizer, (CharTokenizer, ByteTokenizer, BPETokenizer)):
        lib = import_optional("tokenizers", "tokenizers")
        if isinstance(tokenizer, BPETokenizer):
            engine = tokenizer.engine
        elif isinstance(tokenizer, ByteTokenizer):
            engine = lib.Tokenizer(lib.models.BPE({symbol: byte for byte, symbol in byte_symbols().items()}, []))
            engine.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            engine.decoder = lib.decoders.ByteLevel()
        else:
            engine = lib.Tokenizer(lib.models.BPE({c: i for i, c in enumerate(tokenizer.vocabulary)}, []))
            engine.decoder = lib.decoders.Fuse()
        engine.save(str(folder / "tokenizer.json"))
        how = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")


def write_onnx(net: GPT, path: Path, told: str) -> None:
    """One .onnx file by torch's exporter, B and T free, T up to block_size; beyond 2 GB the weights lie beside it."""
    import_optional("onnx", "formats")
    import_optional("onnxscript", "formats")
    T = net.config.block_size
    example = torch.zeros(2, min(T, 4), dtype=torch.int64)
    free = {0: torch.export.Dim("B", max=2**16), **({1: torch.export.Dim("T", min=1, max=T)} if T > 1 else {})}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes={"idx": free},
            input_names=["idx"],
            output_names=["logits"],
        )
    assert done is not None
    done.model.metadata_props["lightning_gpt"] = told
    with TemporaryDirectory(prefix=f"{TMP_PREFIX}{path.name}.", dir=path.parent) as draft:
        done.save(f"{draft}/{path.name}", external_data=sum(p.numel() * 4 for p in net.parameters()) > 1.9e9)
        for file in sorted(Path(draft).iterdir(), reverse=True):  # NAME.data before NAME, which needs it
            os.replace(file, path.with_name(file.name))
