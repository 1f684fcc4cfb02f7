"""Checks that the contents of a checkpoint are plain data and match its settings, before a net is built.

A hostile file can have a valid checksum. Time and memory of each check are proportional to the size of the file.
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

from ..data.tokenizers import TOKENIZER_TYPES, build_from_state
from ..model.gpt import GPTConfig
from ..model.lecture import LECTURE_STEPS, build_net
from ..model.reward import RewardModel

MAX_VALUES, MAX_DEPTH = 300_000, 50  # values in a file, and how deeply they are nested
MAX_PICKLE_OPS = 2_000_000  # a thousand blocks with Adam's moments take most of these
MAX_TEXT = 2**24  # characters of the config and of each string setting
MAX_AUGMENTATION = 1000  # copies of the training text, which are made before training
MAX_INT = 2**53  # a float represents all integers up to this
STAGES = "fit", "sft", "reward", "dpo", "grpo"  # the commands that train
VERSION_KEY = "pytorch-lightning_version"  # Lightning refuses checkpoints without it

# globals that a pickle may refer to: plain containers, dense tensors and their parts
PLAIN_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|_codecs encode"
    r"|torch (Size|device|bool|bfloat16|float\d+\w*|u?int\d+|complex\d+)"
    r"|torch ((?!Q)\w*Storage)|torch\.cuda \w*Storage|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
)
PLAIN_SCALARS = (str, int, float, bool, complex, bytes, type(None), torch.dtype, torch.device)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def short_repr(value: Any) -> str:
    """A value for a message; of a container only the type, as it may be endless."""
    if isinstance(value, int) and abs(value) > MAX_INT**2:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value[:40] if isinstance(value, str) else value)
    return f"a {type(value).__name__}"


def check_archive(data: bytes) -> None:
    """Raises ValueError if a zip archive would unpack to more than its size, or if its pickle is not plain data."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > len(data) or data[:4] != b"PK\3\4":
            raise ValueError("its archive is compressed, or would unpack to more than its size")
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1:
            raise ValueError(f"its archive holds {len(pickles)} pickles, not one")
        for n, (operation, argument, _) in enumerate(pickletools.genops(archive.read(pickles[0]))):
            if n > MAX_PICKLE_OPS:
                raise ValueError(f"it takes more than {MAX_PICKLE_OPS:,} operations to read")
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not PLAIN_GLOBALS.fullmatch(str(argument)):
                raise ValueError(f"Unsupported: it refers to {str(argument).replace(' ', '.')[:100]}")


def check_plain(loaded: Any, size: int) -> None:
    """Raises ValueError unless all of `loaded` is plain values and dense CPU tensors, of about `size` bytes."""
    stack, seen, tensor_bytes = [(loaded, 0)], 0, 0
    while stack:
        value, depth = stack.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels or holds more than {MAX_VALUES:,} values")
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter) or value.is_nested or value.is_quantized:
                raise ValueError("it holds a nested or quantized tensor, or a subclass of Tensor")
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise ValueError(f"it holds a tensor that is {value.layout} on {value.device}, not dense on the CPU")
            tensor_bytes += (n := value.numel() * value.element_size())
            if n > value.untyped_storage().nbytes() or tensor_bytes > 3 * size + 2**20:  # tied weights count twice
                raise ValueError("its tensors are larger than the file")
        elif isinstance(value, (dict, OrderedDict, Counter)):
            stack += [(key, depth + 1) for key in value] + [(item, depth + 1) for item in value.values()]
        elif isinstance(value, (list, tuple, set)):
            stack += [(item, depth + 1) for item in value]
        elif type(value) not in PLAIN_SCALARS:
            raise ValueError(f"it holds a {type(value).__name__}")
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("it holds a string with half a character (a lone surrogate)")
        elif isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"it holds a number of {value.bit_length()} bits")


def is_number(value: Any) -> bool:
    """Whether a value is a finite float, or an integer of at most MAX_INT in size; bools are not."""
    return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) <= MAX_INT


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field of GPTConfig, a class or a Literal of strings; a float may be an int."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    return is_number(value) if hint is float else type(value) is hint and (hint is not int or abs(value) <= MAX_INT)


def check_settings(settings: dict, group: str) -> None:
    """Raises ValueError unless all names are strings and all values None, bools, strings, numbers or short lists."""
    for name, value in settings.items():
        for item in value if isinstance(value, (list, tuple)) and len(value) <= 16 else [value]:
            if not isinstance(name, str) or not (item is None or isinstance(item, (bool, str)) or is_number(item)):
                raise ValueError(f"{group}.{str(name)[:40]} is {short_repr(value)}, which is not a plain value")
            if isinstance(item, str) and len(item) > MAX_TEXT:
                raise ValueError(f"{group}.{name} has {len(item):,} characters, more than {MAX_TEXT:,}")


def stage_of(checkpoint: dict) -> str:
    """The command that wrote a checkpoint; fit for one that does not say.

    Raises:
        ValueError: there is no such command.
    """
    stage = checkpoint.get("stage", "fit")
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"its stage is {short_repr(stage)}, none of {', '.join(STAGES)}")
    return stage


def expected_shapes(settings: dict, max_blocks: int, reward: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes by name of the weights of a net; at most one of its blocks is built, without memory.

    Args:
        settings: GPTConfig's fields, and lecture_step.
        reward: whether the net is a reward model.
        max_blocks: number of weights in the file, which bounds the number of blocks.
    Raises:
        ValueError: a setting is missing or has a wrong type or value, or the settings contradict each other.
    """
    for field in fields(GPTConfig):
        if field.name not in settings:
            raise ValueError(f"{field.name} is missing")
        if not matches_type(settings[field.name], field.type):
            raise ValueError(f"{field.name} is {short_repr(settings[field.name])}")
    lecture_step = settings.get("lecture_step")  # the packaged checkpoint does not have it
    if lecture_step is not None and (not isinstance(lecture_step, str) or lecture_step not in LECTURE_STEPS):
        raise ValueError(f"lecture_step is {short_repr(lecture_step)}")
    n_layer = 1 if lecture_step is not None and "n_layer" in LECTURE_STEPS[lecture_step].fixed else settings["n_layer"]
    for name, blocks in {"n_layer": n_layer, "n_head": 0 if lecture_step is None else settings["n_head"]}.items():
        if blocks > max_blocks:
            raise ValueError(f"{name}={settings[name]} takes more weights than the {max_blocks} in the file")
    # the shapes of the weights need not bound these
    if settings["ngram_max"] > 1024 or settings["block_size"] * settings["n_embd"] > 2**36:
        raise ValueError(f"ngram_max={settings['ngram_max']} or block_size={settings['block_size']} is too large")
    try:
        with torch.device("meta"):
            net = build_net(settings | ({"n_layer": 1} if n_layer > 1 else {}))  # all blocks have the same shapes
            net = RewardModel(net.config) if reward else net
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"no net can have these settings: {' '.join(str(error).split())[:100]}") from None
    shapes = {name: tuple(w.shape) for name, w in net.state_dict().items()}
    first = {name.removeprefix("h.0."): shape for name, shape in shapes.items() if name.startswith("h.0.")}
    return shapes | {f"h.{i}.{name}": shape for i in range(1, n_layer) for name, shape in first.items()}


def check_weights(weights: dict, settings: dict, stage: str = "fit") -> None:
    """Raises ValueError unless the weights have the names and shapes that the settings give, and finite values."""
    decay: Any = settings.get("ema_decay")
    if not is_number(decay) or not 0 <= decay < 1:
        raise ValueError(f"ema_decay is {short_repr(decay)}")
    shapes = expected_shapes(settings, len(weights), stage == "reward")
    has_reference = stage in ("dpo", "grpo") and any(str(name).startswith("reference.") for name in weights)
    prefixes = ("net.", *["ema_net."] * bool(decay), *["reference."] * has_reference)
    expected = {prefix + name: shape for prefix in prefixes for name, shape in shapes.items()}
    for name in expected:
        if name not in weights:
            raise ValueError(f"the weight {name} is missing")
    for name, w in weights.items():
        if name not in expected:
            raise ValueError(f"the weight {short_repr(name)} does not belong to this net")
        if not isinstance(w, Tensor) or w.dtype not in FLOAT_DTYPES:
            raise ValueError(f"the weight {name} is not a floating-point tensor")
        if tuple(w.shape) != expected[name]:
            raise ValueError(f"the weight {name} is {tuple(w.shape)}, and the settings make it {expected[name]}")
        if not w.isfinite().all():
            raise ValueError(f"the weight {name} is NaN or infinite: training diverged")
    for prefix in prefixes if settings["tie_embeddings"] and stage != "reward" else ():
        if not torch.equal(weights[f"{prefix}lm_head.weight"], weights[f"{prefix}wte.weight"]):
            raise ValueError("tie_embeddings is true, and lm_head.weight differs from wte.weight")


def check_tokenizer(data: dict, vocab_size: int) -> None:
    """Raises ValueError unless the settings describe a tokenizer of `vocab_size` tokens."""
    kind, vocabulary = data.get("tokenizer"), data.get("vocabulary")
    strings = vocabulary, data.get("token_files")
    if kind not in TOKENIZER_TYPES or not all(isinstance(value, (str, type(None))) for value in strings):
        raise ValueError(f"the tokenizer is {short_repr(kind)} with the vocabulary {short_repr(vocabulary)}")
    if data.get("on_unknown") not in ("error", "drop", "replace", "extend"):
        raise ValueError(f"data.on_unknown is {short_repr(data.get('on_unknown'))}")
    if kind in ("char", "bpe") and vocabulary is None:
        raise ValueError(f"the tokenizer is {kind}, without a vocabulary")
    if kind == "char" and vocabulary is not None and len(set(vocabulary)) != len(vocabulary):
        raise ValueError("the vocabulary has a character twice")
    if (size := len(build_from_state(data, vocab_size))) != vocab_size:
        raise ValueError(f"the vocabulary has {size} tokens, and the net has {vocab_size}")


def check_contents(checkpoint: dict) -> None:
    """Raises ValueError unless the weights and the vocabulary match the settings, and all values are in range."""
    settings, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    check_settings(settings, "model")
    check_settings(data, "data")
    check_weights(checkpoint["state_dict"], settings, stage_of(checkpoint))
    check_tokenizer(data, settings["vocab_size"])
    if not matches_type(copies := data.get("name_augmentation", 0), int) or not 0 <= copies <= MAX_AUGMENTATION:
        raise ValueError(f"data.name_augmentation is {short_repr(copies)}, not an integer from 0 to {MAX_AUGMENTATION}")
    seed = settings.get("seed")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {short_repr(seed)}, not an integer from 0 to 2^32 - 1")
    for name in "epoch", "global_step":
        if not matches_type(step := checkpoint.get(name, 0), int) or step < 0:
            raise ValueError(f"{name} is {short_repr(step)}")
    if type(checkpoint.get("val_loss", 0.0)) not in (float, int, type(None)):
        raise ValueError(f"val_loss is {short_repr(checkpoint['val_loss'])}")
    if not isinstance(config := checkpoint.get("config", ""), str) or len(config) > MAX_TEXT:
        raise ValueError(f"the config is not a string, or longer than {MAX_TEXT:,} characters")
    version = checkpoint.get(VERSION_KEY)
    if not isinstance(version, str) or not re.fullmatch(r"[2-9]\.\d{1,4}(\.\d{1,4})?([a-z.+]\w{0,30})*", version):
        raise ValueError(f"{VERSION_KEY} is {short_repr(version)}")
