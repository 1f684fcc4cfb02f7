"""lightning-gpt import and export: weights from GPT-2, nanoGPT and safetensors, to safetensors, Hugging Face and ONNX.

Modules have GPT-2's names, so weights are matched by name. The libraries are optional and imported when needed.
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

# settings of transformers' GPT2Config -> settings of GPTConfig
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
# settings of one side that the other side supports with one value only
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
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in_features, out_features) in transformers


def gpt2_name(ours: str) -> str:
    return ours if ours.startswith("lm_head") else f"transformer.{ours}"


# --- import -----------------------------------------------------------------------------------------------------------


def import_weights(
    source: str, output: str, meta: str | None = None, tokenizer: Literal["byte", "gpt2", "ids"] | None = None
) -> None:
    """Make a checkpoint from weights that were trained elsewhere.

    Args:
        source: hf:FOLDER, a GPT-2 saved by transformers; gpt2, gpt2-medium, gpt2-large, gpt2-xl or hf:OWNER/NAME, a
            GPT-2 on the Hugging Face hub; nanogpt:FILE, a ckpt.pt; or safetensors:FILE, written by `export`.
        output: the checkpoint to write.
        meta: nanoGPT's meta.pkl with the characters of its vocabulary; null looks for it next to the ckpt.pt.
        tokenizer: the tokenizer, for weights without one. null is gpt2 for a vocabulary of 50,257 or 50,304 tokens,
            otherwise ids, which writes token ids as numbers.
    """
    check_regular_file(Path(output))
    kind, _, path = (
        source.rpartition(":")
        if not source.startswith(("hf:", "nanogpt:", "safetensors:"))
        else (source.partition(":"))
    )
    if kind == "nanogpt":
        config, weights, state = read_nanogpt(Path(path), meta)
    elif kind == "safetensors":
        config, weights, state = read_safetensors(Path(path))
    elif kind in ("hf", ""):
        config, weights, state = read_hugging_face(path)
    else:
        raise ValueError(f"--source {source}: use hf:FOLDER, nanogpt:FILE, safetensors:FILE, or the hub's gpt2")
    if not state or tokenizer:
        state = {"tokenizer": tokenizer or ("gpt2" if config.vocab_size in (50257, 50304) else "ids")}
        state |= {"vocab_size": config.vocab_size, "vocabulary": None, "on_unknown": "error"}
    checkpoint: dict[str, Any] = {
        "state_dict": {f"net.{name}": w for name, w in weights.items()},
        "hyper_parameters": asdict(config) | {"lecture_step": None, "ema_decay": 0.0, "seed": 1337},
        "datamodule_hyper_parameters": state,
        "global_step": 0,
        VERSION_KEY: version("lightning"),
    }
    try:
        check_contents(checkpoint)
    except ValueError as error:
        raise ValueError(f"{source} is inconsistent: {error}") from None
    built = build_from_state(state, config.vocab_size)
    checkpoint["state_dict"] = {name: w.float() for name, w in checkpoint["state_dict"].items()}
    checkpoint["datamodule_hyper_parameters"] = built.state()
    write_checkpoint(checkpoint, output)
    tied = config.tie_embeddings
    size = sum(w.numel() for name, w in weights.items() if not (tied and name == "lm_head.weight")) / 1e6
    data = "--data.token_files train.bin,val.bin" if isinstance(built, TokenIds) else "--data.corpus my_text.txt"
    print(
        f"{size:.2f}M parameters, {config.vocab_size:,} token ids ({built.name}), in {output}\n\n"
        "Next:\n"
        f"  {program_name()} generate --ckpt_path {output}\n"
        f"  {program_name()} fit --config finetune --model.init_from {output} {data}"
    )


def from_gpt2_names(weights: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """GPT-2's weights under the names of `GPT`, without the causal masks that some files contain."""
    ours = {}
    for name, w in weights.items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            ours[name] = w.t().contiguous() if transposed and name.endswith(TRANSPOSED) else w
    if "lm_head.weight" not in ours and "wte.weight" in ours:
        ours["lm_head.weight"] = ours["wte.weight"]
    return ours


def read_hugging_face(name: str) -> tuple[GPTConfig, dict[str, Tensor], dict]:
    """The config, weights and tokenizer state (empty if unknown) of a GPT-2 in a folder or on the hub.

    Raises:
        ValueError: there is no readable GPT-2, or `GPT` does not support one of its settings, which is named.
        FileNotFoundError: the folder does not exist.
    """
    transformers = import_optional("transformers", "formats")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(name)
    if not name or not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"the folder {name} does not exist: give hf:FOLDER with config.json and the weights")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it would log every retry
    try:
        theirs = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # many types, depending on the network and the folder
        if folder.is_dir():
            why = " ".join(str(error).split())[:150]
            raise ValueError(f"{name} is not a folder with a readable config.json: {why}") from None
        raise ValueError(
            f"{name} is not a local folder, and the Hugging Face hub could not be reached or does not have it "
            f"({type(error).__name__}): connect, or pass a copy of its folder as hf:FOLDER"
        ) from None
    if theirs.model_type != "gpt2":
        raise ValueError(f"{name} is a {theirs.model_type}, but only the GPT-2 family can be imported")
    for setting, needed in FIXED_IN_OURS.items():
        if (value := getattr(theirs, setting, needed)) != needed:
            raise ValueError(f"{name} has {setting}={value}, but only {needed} is supported")
    if theirs.activation_function not in HF_ACTIVATIONS:
        known = ", ".join(HF_ACTIVATIONS)
        raise ValueError(f"{name} has activation_function={theirs.activation_function}, but only {known} are supported")
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        raise ValueError(f"{name} has n_inner={theirs.n_inner}, but only 4 * n_embd={4 * theirs.n_embd} is supported")
    sizes = {ours: getattr(theirs, setting) for setting, ours in HF_SETTINGS.items()}
    for setting, ours in HF_SETTINGS.items():
        if not matches_type(sizes[ours], type(getattr(GPTConfig, ours))):
            raise ValueError(f"{name}/config.json has {setting}={short_repr(sizes[ours])}")
    config = GPTConfig(**sizes, activation=HF_ACTIVATIONS[theirs.activation_function])  # type: ignore[arg-type]
    min_params = 12 * config.n_layer * config.n_embd**2 + (config.vocab_size + config.block_size) * config.n_embd
    files = [file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")] if folder.is_dir() else []
    if config.n_layer > 1000 or files and min_params > sum(file.stat().st_size for file in files):
        raise ValueError(
            f"{name}/config.json has n_layer={config.n_layer}, but the weight files are too small for that"
        )
    try:
        model, loading_info = transformers.GPT2LMHeadModel.from_pretrained(
            name, output_loading_info=True, attn_implementation="eager"
        )
    except Exception as error:
        raise ValueError(f"the weights of {name} can't be read: {' '.join(str(error).split())[:200]}") from None
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"{name} lacks weights: {', '.join(missing)[:200]}")
    weights, state = (
        from_gpt2_names(model.float().state_dict(), transposed=True),
        getattr(theirs, "lightning_gpt", None),
    )
    if state is not None and not isinstance(state, dict):
        raise ValueError(f"{name}/config.json has lightning_gpt={short_repr(state)}")
    if not state and folder.is_dir():
        state, order = read_hf_tokenizer(folder, config.vocab_size)
        if order != list(range(config.vocab_size)):
            print_info(f"the token ids of {name} are reordered: bytes, then merges, then special tokens")
            for matrix in "wte.weight", "lm_head.weight":
                weights[matrix] = weights[matrix][order]
    return config, weights, state or {}


def read_hf_tokenizer(folder: Path, size: int) -> tuple[dict, list[int]]:
    """The state of the byte-level BPE tokenizer in a transformers folder, and its ids in the order of `BPETokenizer`.

    An unsupported tokenizer is reported on stderr; its state is empty and the order unchanged.
    """
    file, unchanged = folder / "merges.txt", list(range(size))
    try:
        if file.exists():
            lines = file.read_text("utf-8").split("\n")
            merges = "\n".join(line for line in lines if line and not line.startswith("#version"))
            file = folder / "vocab.json"
            ids = json.loads(file.read_text("utf-8"))
        else:
            file = folder / "tokenizer.json"
            if not file.exists():
                return {}, unchanged
            spec = json.loads(file.read_text("utf-8"))
            if spec["pre_tokenizer"]["type"] != "ByteLevel" or spec["pre_tokenizer"].get("add_prefix_space"):
                raise ValueError("it does not split text into words as GPT-2 does")
            if spec.get("normalizer"):
                raise ValueError("it normalizes text")
            pairs, ids = spec["model"]["merges"], spec["model"]["vocab"]
            merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in pairs)
        tokens = BPETokenizer(merges, size).tokens
        order = [ids[token] for token in tokens]
        if any(type(i) is not int or not 0 <= i < size for i in order) or len({*order}) < len(order):
            raise ValueError("its ids do not match the net's vocabulary")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:150]
        print_info(f"the tokenizer in {file} can't be imported ({why}): token ids are read and written as numbers")
        return {}, unchanged
    rest = sorted({*unchanged} - {*order})  # special tokens, which no text is encoded to
    return {"tokenizer": "bpe", "vocabulary": merges, "on_unknown": "error", "vocab_size": size}, order + rest


class PlainUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings and numbers only, since anything else could run code."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"it contains {module}.{name}, but only dicts, lists, strings and numbers are read")


def read_nanogpt(path: Path, meta: str | None) -> tuple[GPTConfig, dict[str, Tensor], dict]:
    """The config, weights and, if there is a meta.pkl, the tokenizer state of a nanoGPT checkpoint.

    Raises:
        ValueError: a file is not valid, or could run code when unpickled.
        OSError: a file can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist: use nanogpt:FILE with the ckpt.pt of its out_dir")
    try:
        checkpoint = read_plain(path.read_bytes())
        args, weights = dict(checkpoint["model_args"]), from_gpt2_names(checkpoint["model"], transposed=False)
        config = GPTConfig(
            **{name: args[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")},
            dropout=args.get("dropout", 0.0),
            bias=args.get("bias", True),
            tie_embeddings=True,
        )
    except Exception as error:
        what = str(error).split("WeightsUnpickler error: ")[-1]  # without torch's advice to set weights_only=False
        reason = f"it lacks {error}" if isinstance(error, KeyError) else what.strip().split("\n")[0][:200]
        raise ValueError(f"{path} is not a nanoGPT checkpoint of plain data: {reason}") from None
    file = Path(meta) if meta else path.with_name("meta.pkl")
    if not file.exists():
        if meta:
            raise FileNotFoundError(f"the file {meta} does not exist: set --meta to nanoGPT's data/.../meta.pkl")
        return config, weights, {}
    try:
        itos = PlainUnpickler(io.BytesIO(file.read_bytes())).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        if any(not isinstance(character, str) or len(character) != 1 for character in characters):
            raise ValueError("the values of itos are not single characters")
    except Exception as error:
        raise ValueError(f"{file} is not a valid meta.pkl of nanoGPT: {type(error).__name__}: {error}") from None
    return config, weights, {"tokenizer": "char", "vocabulary": "".join(characters), "on_unknown": "error"}


def read_safetensors(path: Path) -> tuple[GPTConfig, dict[str, Tensor], dict]:
    """The config, weights and tokenizer state of a safetensors file written by `export`.

    Raises:
        ValueError: the file is damaged, or was not written by `export`.
        OSError: the file can't be read.
    """
    safetensors = import_optional("safetensors", "formats")
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["lightning_gpt"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = {field.name for field in fields(GPTConfig)}
        config = GPTConfig(**{name: value for name, value in meta["model"].items() if name in names})
        state = {str(name): value for name, value in meta["data"].items()}
    except KeyError:
        raise ValueError(f"{path} does not describe its net: only files written by lightning-gpt export do") from None
    except Exception as error:
        raise ValueError(f"{path} is not a valid safetensors file: {' '.join(str(error).split())[:200]}") from None
    return config, from_gpt2_names(weights, transposed=False), state


# --- export -----------------------------------------------------------------------------------------------------------


def export(to: Literal["safetensors", "hf", "onnx"], ckpt_path: str = "best", output: str | None = None) -> None:
    """Write a checkpoint's net in a format that other programs read.

    Args:
        to: safetensors, one file with the weights and the model settings; hf, a folder that transformers loads as a
            GPT-2; onnx, a program that maps idx (B, T) to logits (B, T, V).
        ckpt_path: the checkpoint; best or last is the newest file of that name below checkpoints/.
        output: the file or folder to write; null is gpt.safetensors, gpt_hf or gpt.onnx.
    """
    source = find_checkpoint(ckpt_path)
    net, tokenizer = load_net(source)
    if not isinstance(net, GPT):
        raise ValueError(f"the checkpoint {source} is a model of a lecture step, which no export format supports")
    path = Path(os.path.realpath(output or {"hf": "gpt_hf"}.get(to, f"gpt.{to}")))  # write through a symbolic link
    for file in path / "model.safetensors" if to == "hf" else path, path.with_name(f"{path.name}.data"):
        check_regular_file(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = json.dumps({"model": asdict(net.config), "data": tokenizer.state()})
    if to == "safetensors":
        write_safetensors(net.state_dict(), net.config.tie_embeddings, path, {"lightning_gpt": meta})
    elif to == "hf":
        write_hugging_face(net, tokenizer, path)
    else:
        write_onnx(net, path, meta)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{size:.2f}M parameters of {source} in {os.path.relpath(path)}")


def write_safetensors(weights: dict[str, Tensor], tied: bool, path: Path, metadata: dict[str, str]) -> None:
    """Save all tensors in one file, without a head that is tied to the embedding."""
    safetensors = import_optional("safetensors", "formats")
    from safetensors.torch import save_file

    kept = {name: w.contiguous() for name, w in weights.items() if not (tied and name == "lm_head.weight")}
    try:
        save_file(kept, path, {"format": "pt"} | metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}; an earlier file there is intact") from None


def write_hugging_face(net: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder with config.json, model.safetensors and, for char, byte and bpe, the tokenizer.

    Raises:
        ValueError: the net has a setting that transformers' GPT-2 does not support, which is named.
    """
    config = net.config
    needed = FIXED_IN_GPT2 | ({"activation": "gelu"} if config.activation not in HF_ACTIVATIONS.values() else {})
    for setting, value in needed.items():
        if getattr(config, setting) != value:
            raise ValueError(
                f"transformers' GPT-2 does not support model.{setting}={getattr(config, setting)}, only {value}: "
                "export to safetensors or onnx, which support every net"
            )
    weights = {}
    for name, w in net.state_dict().items():
        weights[gpt2_name(name)] = w.t() if name.endswith(TRANSPOSED) else w
        bias = name.removesuffix("weight") + "bias"
        if not config.bias and name.startswith(("h.", "ln_f")):  # GPT-2 has biases everywhere; zeros have no effect
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
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", "utf-8")


def write_onnx(net: GPT, path: Path, meta: str) -> None:
    """Write an .onnx file with dynamic B and T <= block_size; weights beyond 1.9 GB go to a file next to it."""
    import_optional("onnx", "formats")
    import_optional("onnxscript", "formats")
    T = net.config.block_size
    example = torch.zeros(2, min(T, 4), dtype=torch.int64)
    dynamic = {0: torch.export.Dim("B", max=2**16), **({1: torch.export.Dim("T", min=1, max=T)} if T > 1 else {})}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes={"idx": dynamic},
            input_names=["idx"],
            output_names=["logits"],
        )
    assert program is not None
    program.model.metadata_props["lightning_gpt"] = meta
    with TemporaryDirectory(prefix=f"{TMP_PREFIX}{path.name}.", dir=path.parent) as tmp:
        program.save(f"{tmp}/{path.name}", external_data=sum(p.numel() * 4 for p in net.parameters()) > 1.9e9)
        for file in sorted(Path(tmp).iterdir(), reverse=True):  # NAME.data before NAME, which refers to it
            os.replace(file, path.with_name(file.name))
