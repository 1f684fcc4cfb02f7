"""Generation speed on this machine, beside a loop that recomputes the full context for every token as nanoGPT does.

    python -m lightning_gpt.benchmarks.generation

Both run in one process with the same random weights. "recomputing" is the loop of nanoGPT's sample.py: a forward pass
over the last block_size tokens for each token, on CUDA with float32 weights under bfloat16 autocast; its mean time at
lengths spread evenly over the text. "ours" generates the full text, from the call to the last token on the host, on
CUDA in bfloat16, on a CPU in float32, then in float16 and int8. Both start from token 0. Within a block the two give
the same text up to 16-bit and int8 rounding; beyond it, our context shifts by half a block whenever it is full, see
`stream_ids`.
"""

import json as json_format
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, cast

import jsonargparse
import torch

from ..cli.main import run
from ..cli.parser import Parser
from ..inference.engine import generate_ids
from ..inference.sampling import SamplingConfig, sample_next
from ..inference.text import in_precision
from ..model.gpt import GPT, GPTConfig

MODELS = {
    "0.8M, block 64": GPTConfig(65, 64, 4, 4, 128, dropout=0.0, bias=False),
    "10.7M, block 256": GPTConfig(65, 256, 6, 6, 384, dropout=0.0, bias=False),
    "GPT-2 124M, block 1024": GPTConfig(50304, 1024, 12, 12, 768, dropout=0.0, bias=False, tie_embeddings=True),
}
CPU_ROWS = ["0.8M, block 64 x 1", "10.7M, block 256 x 1", "GPT-2 124M, block 1024 x 1"]
GPU_ROWS = ["10.7M, block 256 x 1", "10.7M, block 256 x 64", "GPT-2 124M, block 1024 x 1"]
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 200}  # the defaults of sample.py


@torch.no_grad()
def time_recomputing(net: GPT, batch_size: int, n: int) -> float:
    """Returns the seconds for n tokens without a KV cache."""
    S, device, times = net.config.block_size, net.wte.weight.device, []
    lengths = torch.linspace(1, n, 16).int().tolist()
    text = torch.zeros(batch_size, n, dtype=torch.long, device=device)
    with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        for _ in range(4):  # the first is a warm-up
            text.cpu()
            since = time.perf_counter()
            for length in lengths:
                window = text[:, max(0, length - S) : length]
                last = torch.full((batch_size,), window.size(1) - 1, device=device)
                new = sample_next(net(window, only=last)[:, 0], SamplingConfig(**SAMPLING))
                torch.cat((text[:, :length], new), 1)
            new.cpu()
            times.append(time.perf_counter() - since)
    return min(times[1:]) / len(lengths) * n


def time_generation(net: GPT, batch_size: int, n: int) -> tuple[float, float]:
    """Returns the seconds for n tokens with the KV cache: the best call, and the first one."""
    idx, times = torch.zeros(batch_size, 1, dtype=torch.long, device=net.wte.weight.device), []
    for _ in range(3):
        since = time.perf_counter()
        generate_ids(net, idx, n, context_shift=net.config.block_size // 2, **SAMPLING).cpu()
        times.append(time.perf_counter() - since)
    return min(times[1:]), times[0]


def bench(nets: list[str] | None = None, json: bool = False) -> None:
    """Print the tokens per second of generation, and the speed-up over recomputing the full context.

    Args:
        nets: what to measure, each "NAME x BATCH_SIZE" with a name in MODELS; null: defaults for this device.
        json: print JSON instead of a table.
    """
    gpu, rows = torch.cuda.is_available(), []
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    if not json:
        print(f"{device}: tokens/s\n{'':28}{'':>16}{'recomputing':>12}{'ours':>19}", end="")
        print("" if gpu else f"{'float16':>19}{'int8':>19}")
    for each in nets or (GPU_ROWS if gpu else CPU_ROWS):
        name, _, batch_size = each.rpartition(" x ")
        if name not in MODELS or not batch_size.isdecimal() or batch_size == "0":
            raise ValueError(f"nets has {each!r}: give NAME x BATCH_SIZE, with a NAME among {', '.join(MODELS)}")
        torch.manual_seed(0)
        B, net = int(batch_size), GPT(MODELS[name]).eval()
        fast = GPT(MODELS[name]).eval()
        fast.load_state_dict(net.state_dict())
        if gpu:
            net.cuda(), fast.cuda().bfloat16()
        S = net.config.block_size
        for n in sorted({S - 1, max(500, S + S // 2), *([5000] if gpu else [])}):
            text = "within a block" if n < S else f"{n:,} tokens"
            row: dict[str, Any] = {
                "net": name,
                "batch_size": B,
                "text": text,
                "recomputing": B * n / time_recomputing(net, B, n),
            }
            seconds, first = time_generation(fast, B, n)
            row |= {"ours": B * n / seconds, "first_call_s": first}
            if not gpu:
                for precision in "float16", "int8":
                    other = cast(GPT, in_precision(deepcopy(fast), precision))
                    row[precision] = B * n / time_generation(other, B, n)[0]
            rows.append(row)
            if not json:
                speeds = [row[key] for key in ("ours", "float16", "int8") if key in row]
                cells = [f"{speed:12,.0f}{speed / row['recomputing']:6.1f}x" for speed in speeds]
                print(f"{each:28}{text:>16}{row['recomputing']:12,.0f}" + "".join(cells), flush=True)
    if json:
        print(json_format.dumps({"device": device, "rows": rows}))


if __name__ == "__main__":
    run(lambda args: jsonargparse.auto_cli(bench, args=args, as_positional=False, parser_class=Parser), sys.argv[1:])
