"""Checks of a checkpoint's contents against what the file says of itself, before anything is built. Torch only.

A stranger can write a file whose checksum is right. Each check takes time and memory in proportion to the file's size.
"""

import io
import math
import pickletools
import re
import zipfile
from collections import Counter, OrderedDict
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from ..data.tokenizers import build_from_state
from ..model.gpt import GPTConfig
from ..model.lecture import LECTURE_STEPS, build_net

MAX_VALUES, MAX_DEPTH = 300_000, 50  # of all that is in a file, and how deeply it may be nested
MAX_PICKLE_OPS = 2_000_000  # of the pickle in it; a thousand blocks with Adam's moments take most of them
MAX_TEXT = 2**24  # characters of its config, and of each of its texts
MAX_AUGMENTATION = 1000  # of the training text with other names, which are made before training
MAX_INT = 2**53  # of a whole number; a float still tells it from its neighbours
VERSION_KEY = "pytorch-lightning_version"  # of who saved it; Lightning asks for it

# what a pickle may name: plain containers, dense tensors and what these are made of
PLAIN_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|_codecs encode"
    r"|torch (Size|device|bool|bfloat16|float\d+\w*|u?int\d+|complex\d+)"
    r"|torch ((?!Q)\w*Storage)|torch\.cuda \w*Storage|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
)
PLAIN_SCALARS = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.device)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHECKPOINT_TOKENIZERS = ("char", "byte", "bpe", "gpt2", "ids", None)


def short_repr(value: Any) -> str:
    """A value for a message, never looked through: it may have no end."""
    if isinstance(value, int) and abs(value) > MAX_INT**2:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value[:40] if isinstance(value, str) else value)
    return f"a {type(value).__name__}"


def check_archive(data: bytes) -> None:
    """Raises ValueError for an archive that is larger unpacked, or whose pickle asks for more than plain data."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > len(data) or data[:4] != b"PK\3\4":
            raise ValueError("its archive holds more than its bytes")
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1:
            raise ValueError(f"its archive holds {len(pickles)} pickles, not one")
        for n, (operation, argument, _) in enumerate(pickletools.genops(archive.read(pickles[0]))):
            if n > MAX_PICKLE_OPS:
                raise ValueError(f"it takes more than {MAX_PICKLE_OPS:,} operations to read")
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not PLAIN_GLOBALS.fullmatch(str(argument)):
                raise ValueError(f"Unsupported: it names {str(argument).replace(' ', '.')[:100]}")


def check_plain(saved: Any, size: int) -> None:
    """Raises ValueError unless all is plain values and dense tensors on the CPU, of about `size` bytes in all."""
    stack, seen, held = [(saved, 0)], 0, 0
    while stack:
        value, depth = stack.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels or holds more than {MAX_VALUES:,} values")
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter) or value.is_nested or value.is_quantized:
                raise ValueError("it holds a tensor that is nested, quantized or of a class of its own")
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise ValueError(f"it holds a tensor that is {value.layout} on {value.device}, not dense on the CPU")
            held += (n := value.numel() * value.element_size())
            if n > value.untyped_storage().nbytes() or held > 3 * size + 2**20:  # tied weights stand in it twice
                raise ValueError("its tensors hold more than its bytes")
        elif isinstance(value, (dict, OrderedDict, Counter)):
            stack += [(key, depth + 1) for key in value] + [(one, depth + 1) for one in value.values()]
        elif isinstance(value, (list, tuple, set)):
            stack += [(one, depth + 1) for one in value]
        elif type(value) not in PLAIN_SCALARS:
            raise ValueError(f"it holds a {type(value).__name__}")
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("it holds a text with half a character (a surrogate)")
        elif isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"it holds a number of {value.bit_length()} bits")


def is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) <= MAX_INT


def matches_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    return is_number(value) if kind is float else type(value) is kind and (kind is not int or abs(value) <= MAX_INT)


def check_settings(settings: dict, what: str) -> None:
    """Raises ValueError unless these are names with plain values, or with a few of them in a row."""
    for name, value in settings.items():
        for one in value if isinstance(value, (list, tuple)) and len(value) <= 16 else [value]:
            if not isinstance(name, str) or not (one is None or isinstance(one, (bool, str)) or is_number(one)):
                raise ValueError(f"{what}.{str(name)[:40]} is {short_repr(value)}, which no setting can be")
            if isinstance(one, str) and len(one) > MAX_TEXT:
                raise ValueError(f"{what}.{name} has {len(one):,} characters")


def expected_shapes(sizes: dict, most: int) -> dict[str, tuple[int, ...]]:
    """The weights of the net that settings describe, by name; it is not built.

    Args:
        sizes: GPTConfig's settings, and lecture_step.
        most: weights that there are in the file, so no net has more blocks.
    Raises:
        ValueError: a setting has a wrong type or value, or there can be no such net.
    """
    for field in fields(GPTConfig):
        if field.name in sizes and not matches_type(sizes[field.name], field.type):
            raise ValueError(f"{field.name} is {short_repr(sizes[field.name])}")
    lecture_step = sizes.get("lecture_step")
    if lecture_step is not None and (not isinstance(lecture_step, str) or lecture_step not in LECTURE_STEPS):
        raise ValueError(f"lecture_step is {short_repr(lecture_step)}")
    told = {field.name: sizes.get(field.name, field.default) for field in fields(GPTConfig)}
    n_layer = 1 if lecture_step is not None and "n_layer" in LECTURE_STEPS[lecture_step].fixed else told["n_layer"]
    for name, blocks in {"n_layer": n_layer, "n_head": 0 if lecture_step is None else told["n_head"]}.items():
        if blocks > most:
            raise ValueError(f"{name}={told[name]} takes more weights than the {most} that are there")
    if told["ngram_max"] > 1024 or told["block_size"] * told["n_embd"] > 2**36:  # neither shows in the weights' shapes
        raise ValueError(
            f"ngram_max={told['ngram_max']} or block_size={told['block_size']} is beyond what a net can use"
        )
    try:
        with torch.device("meta"):
            net = build_net(sizes | ({"n_layer": 1} if n_layer > 1 else {}))  # all blocks are alike
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"no net has these sizes: {' '.join(str(error).split())[:100]}") from None
    shapes = {name: tuple(w.shape) for name, w in net.state_dict().items()}
    first = {name.removeprefix("h.0."): shape for name, shape in shapes.items() if name.startswith("h.0.")}
    more = range(1, n_layer)
    return shapes | {f"h.{i}.{name}": shape for i in more for name, shape in first.items()}


def check_weights(weights: dict, sizes: dict) -> None:
    """Raises ValueError unless the weights are those of the net that settings describe: names, shapes and numbers."""
    decay = sizes.get("ema_decay", 0.0)
    if not is_number(decay) or not 0 <= decay < 1:
        raise ValueError(f"ema_decay is {short_repr(decay)}")
    shapes = expected_shapes(sizes, len(weights))
    prefixes = ("net.", "ema_net.") if decay else ("net.",)
    wanted = {prefix + name: shape for prefix in prefixes for name, shape in shapes.items()}
    for name in wanted:
        if name not in weights:
            raise ValueError(f"the weight {name} is missing")
    for name, w in weights.items():
        if name not in wanted:
            raise ValueError(f"the weight {short_repr(name)} is none of this net's")
        if not isinstance(w, Tensor) or w.dtype not in FLOAT_DTYPES:
            raise ValueError(f"the weight {name} is no tensor of floating-point numbers")
        if tuple(w.shape) != wanted[name]:
            raise ValueError(f"the weight {name} is {tuple(w.shape)}, and the settings make it {wanted[name]}")
        if not w.isfinite().all():
            raise ValueError("has weights that are no numbers: its training diverged")
    for prefix in prefixes if sizes.get("tie_embeddings") else ():
        if not torch.equal(weights[f"{prefix}lm_head.weight"], weights[f"{prefix}wte.weight"]):
            raise ValueError("the head is tied to the embedding, and differs from it")


def check_tokenizer(data: dict, vocab_size: int) -> None:
    """Raises ValueError unless the settings describe a tokenizer of `vocab_size` tokens."""
    kind, words = data.get("tokenizer"), data.get("vocabulary")
    tokens = data.get("token_files")
    if (
        kind not in CHECKPOINT_TOKENIZERS
        or not isinstance(words, (str, type(None)))
        or not isinstance(tokens, (str, type(None)))
    ):
        raise ValueError(f"the tokenizer is {short_repr(kind)} with the vocabulary {short_repr(words)}")
    if data.get("on_unknown") not in ("error", "drop", "replace", "extend", None):
        raise ValueError(f"data.on_unknown is {short_repr(data['on_unknown'])}")
    kind = kind or ("ids" if tokens else "char")
    if kind in ("char", "bpe") and words is None:
        raise ValueError(f"the tokenizer is {kind}, without a vocabulary")
    if kind == "char" and words is not None and len(set(words)) != len(words):
        raise ValueError("the vocabulary has a character twice")
    if (known := len(build_from_state(data, vocab_size))) != vocab_size:
        raise ValueError(f"the vocabulary has {known} tokens, and the net has {vocab_size}")


def check_contents(saved: dict) -> None:
    """Raises ValueError unless the weights and the vocabulary are what the settings say, and all is in its range."""
    sizes, data = saved["hyper_parameters"], saved["datamodule_hyper_parameters"]
    check_settings(sizes, "model")
    check_settings(data, "data")
    check_weights(saved["state_dict"], sizes)
    check_tokenizer(data, sizes.get("vocab_size", GPTConfig.vocab_size))
    if not matches_type(copies := data.get("name_augmentation", 0), int) or not 0 <= copies <= MAX_AUGMENTATION:
        raise ValueError(f"data.name_augmentation is {short_repr(copies)}, not a number up to {MAX_AUGMENTATION}")
    seed = sizes.get("seed")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {short_repr(seed)}, not a number from 0 to 2^32")
    for name in "epoch", "global_step":
        if not matches_type(step := saved.get(name, 0), int) or step < 0:
            raise ValueError(f"{name} is {short_repr(step)}")
    if type(saved.get("val_loss", 0.0)) not in (float, int, type(None)):
        raise ValueError(f"val_loss is {short_repr(saved['val_loss'])}")
    if not isinstance(config := saved.get("config", ""), str) or len(config) > MAX_TEXT:
        raise ValueError(f"the config is no text, or longer than {MAX_TEXT:,} characters")
    version = saved.get(VERSION_KEY)
    if not isinstance(version, str) or not re.fullmatch(r"[2-9]\.\d{1,4}(\.\d{1,4})?([a-z.+]\w{0,30})*", version):
        raise ValueError(f"{VERSION_KEY} is {short_repr(version)}")
