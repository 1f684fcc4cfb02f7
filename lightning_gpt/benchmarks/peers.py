"""Generation of one text by a GPT-2 124M with random weights on this CPU, beside ctranslate2 and onnxruntime.

    pip install ctranslate2 onnxruntime onnx transformers
    python -m lightning_gpt.benchmarks.peers

All have the same number of threads, and draw at temperature 0.8 from the 200 most likely tokens. Each has a process of
its own, as their thread pools slow one another; the processes take turns, and the figures are medians. onnxruntime gets
one token and the keys and values of the earlier ones at a time.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from torch import Tensor, nn

from ..cli.main import run
from ..cli.parser import Parser
from ..inference.engine import generate_ids
from ..inference.sampling import SamplingConfig, sample_next
from ..inference.text import in_precision
from ..model.gpt import GPT, GPTConfig
from .generation import SAMPLING

try:
    import ctranslate2
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError as error:
    raise SystemExit(f"{error}: pip install ctranslate2 onnxruntime onnx transformers") from None

CONFIG = GPTConfig(50257, 1024, 12, 12, 768, dropout=0.0, tie_embeddings=True, activation="gelu_tanh")


class GrowingCache:
    """Keys and values (1, H, past, D) of a layer, as tensors that ONNX can trace."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.k, self.v = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        return self.k, self.v, torch.zeros(1, 1)  # a mask, without which tracing fails


class OnnxStep(nn.Module):
    """One decode step for export; `past` has keys and values of each layer, (1, H, past, D)."""

    def __init__(self, net: GPT):
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor, pos: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        x = self.net.wte(ids) + self.net.wpe(pos)
        caches = [GrowingCache(k, v) for k, v in zip(past[::2], past[1::2], strict=True)]
        for block, layer in zip(self.net.h, caches, strict=True):
            x = block(x, None, layer)
        return self.net.logits(x)[:, -1], *(z for layer in caches for z in (layer.k, layer.v))


def onnx_generator(net: GPT, folder: Path, int8: bool) -> Callable[..., Any]:
    """Returns a function that generates with onnxruntime; `int8` quantizes the matrix products dynamically."""
    past = [torch.zeros(1, 12, 5, 64) for _ in range(24)]
    names = [f"past{i}" for i in range(24)]
    args = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long), *past
    torch.onnx.export(
        OnnxStep(net),
        args,
        file := folder / "step.onnx",
        input_names=["ids", "pos", *names],
        output_names=["logits", *(f"present{i}" for i in range(24))],
        dynamic_axes={name: {2: "past"} for name in names},
        dynamo=False,
    )
    if int8:
        quantize_dynamic(file, file := folder / "int8.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def generate(max_new_tokens: int) -> None:
        ids, past = torch.zeros(1, 1, dtype=torch.long), [torch.zeros(1, 12, 0, 64).numpy() for _ in names]
        for pos in range(max_new_tokens):
            inputs = {"ids": ids.numpy(), "pos": torch.tensor([pos]).numpy(), **dict(zip(names, past, strict=True))}
            logits, *past = session.run(None, inputs)
            ids = sample_next(torch.from_numpy(logits), SamplingConfig(**SAMPLING))

    return generate


def ctranslate2_generator(folder: Path, quantization: str) -> Callable[..., Any]:
    """Returns a function that generates with ctranslate2."""
    GPT2LMHeadModel(GPT2Config()).save_pretrained(source := folder / "gpt2")
    tokens = {f"t{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
    (source / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    (source / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    converter = ctranslate2.converters.TransformersConverter(str(source))
    path = converter.convert(str(folder / quantization), quantization=quantization, force=True)
    threads = torch.get_num_threads()
    generator = ctranslate2.Generator(path, compute_type=quantization, inter_threads=1, intra_threads=threads)
    sampling = {"sampling_temperature": 0.8, "sampling_topk": 200, "end_token": []}

    def generate(max_new_tokens: int) -> None:
        generator.generate_batch([["t1"]], max_length=max_new_tokens, min_length=max_new_tokens, **sampling)

    return generate


PRECISIONS = {
    "ours": ["float32", "float16", "int8"],
    "ctranslate2": ["float32", "int8"],
    "onnxruntime": ["float32", "int8"],
}


@cache
def make_generator(name: str, precision: str) -> Callable[..., Any]:
    """Returns a function that generates `max_new_tokens` tokens."""
    torch.manual_seed(0)
    if name == "ours":
        start = torch.zeros(1, 1, dtype=torch.long)
        return partial(generate_ids, in_precision(GPT(CONFIG).eval(), precision), start, **SAMPLING)
    with tempfile.TemporaryDirectory() as folder:
        if name == "ctranslate2":
            return ctranslate2_generator(Path(folder), precision)
        return onnx_generator(GPT(CONFIG).eval(), Path(folder), precision == "int8")


def time_generation(name: str, precision: str, tokens: int) -> float:
    """Returns the seconds for a text of this many tokens."""
    generate = make_generator(name, precision)
    since = time.perf_counter()
    generate(max_new_tokens=tokens)
    return time.perf_counter() - since


def bench(tokens: int = 128, repeats: int = 5) -> None:
    """Print the tokens per second of each, and how many times faster our int8 is.

    Args:
        tokens: length of the text.
        repeats: turns of each; the first, a warm-up, is not counted.
    """
    sides = [(name, precision) for name, precisions in PRECISIONS.items() for precision in precisions]
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        workers = {side: stack.enter_context(ProcessPoolExecutor(1, spawn)) for side in sides}
        seconds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
        for _ in range(repeats + 1):
            for side, worker in workers.items():
                seconds[side].append(worker.submit(time_generation, *side, tokens).result())
    speed = {side: tokens / statistics.median(times[1:]) for side, times in seconds.items()}
    print(f"CPU, {torch.get_num_threads()} threads, GPT-2 124M, one text of {tokens} tokens: tokens/s")
    for (name, precision), value in speed.items():
        ratio = speed["ours", "int8"] / value
        print(f"{name + ', ' + precision:24}{value:8.1f}   ours in int8 is {ratio:.2f}x")


if __name__ == "__main__":
    run(lambda args: jsonargparse.auto_cli(bench, args=args, as_positional=False, parser_class=Parser), sys.argv[1:])
