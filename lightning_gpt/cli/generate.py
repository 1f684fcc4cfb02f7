"""lightning-gpt generate and score: text from a checkpoint, and how likely it finds a text. Torch only, to be quick."""

import json as json_format
import math
import sys
import time
from contextlib import suppress
from os.path import relpath
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.io import RUNS_DIR, atomic_write, checkpoint_summary, newest_first
from ..data.corpus import read_text
from ..data.tokenizers import Tokenizer
from ..errors import print_info
from ..inference.text import (
    PACKAGED_CHECKPOINT,
    Completion,
    complete,
    find_or_packaged,
    load,
    prepare_prompt,
    score,
    stream,
)
from ..model.gpt import GPT
from ..model.lecture import LectureModel

MAX_COMPARED = 50  # newest best.ckpt among which a better one is named
SEPARATOR = "\n" + "-" * 40 + "\n"  # between two samples


def read_input(file: str, tokenizer: Tokenizer) -> str:
    """The text of a UTF-8 file, or of stdin for `-`, read as training reads one."""
    return read_text(file, keep_returns="\r" in tokenizer.vocabulary)


def load_with_path(
    ckpt_path: str, device: str, precision: Literal["auto", "float32", "bfloat16", "float16"]
) -> tuple[GPT | LectureModel, Tokenizer, str]:
    path = find_or_packaged(ckpt_path)
    return *load(path, device, precision), relpath(path)


def describe_checkpoint(path: str | Path, asked: str = "") -> str:
    """Which checkpoint it is, of what step and val/loss, and which better one was not taken for `best` or `last`."""
    if asked == "best" and Path(path).resolve() == PACKAGED_CHECKPOINT.resolve():
        return f"no run below {RUNS_DIR}/ yet: this is {PACKAGED_CHECKPOINT.name}, which comes with the package"
    step, loss, data = checkpoint_summary(Path(path)) or (None, math.nan, {})
    line = relpath(path) + ("" if step is None else f", step {step:,}")
    line += f", val/loss {loss:.4f}" if math.isfinite(loss) else ""
    others = newest_first(RUNS_DIR.glob("**/best.ckpt")) if asked in ("best", "last") else []
    found = [(facts, other) for other in others[:MAX_COMPARED] if (facts := checkpoint_summary(other))]
    losses = [(least, other) for (_, least, on), other in found if least < loss and on == data]
    if losses and (best := min(losses)):
        line += f"; on the same text {relpath(best[1])} has {best[0]:.4f}: --ckpt_path takes it"
    return line


def generate_command(
    ckpt_path: str = "best",
    prompt: str | None = None,
    prompt_file: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    num_samples: int = 1,
    seed: int = 1337,
    context_shift: int | None = None,
    on_unknown: Literal["error", "drop"] = "error",
    interactive: bool = False,
    output: str | None = None,
    json: bool = False,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Write text from a checkpoint, character by character as it comes.

    Args:
        ckpt_path: checkpoint to sample from; best or last is the newest file of that name below checkpoints/. Where no
            run has left one yet, best is a small net that comes with the package.
        prompt: the text to go on from; null is a new line, or the first character of a vocabulary without one.
        prompt_file: a file with the prompt; - is stdin.
        max_new_tokens: characters to write.
        temperature: below 1 safer, above 1 wilder; 0 takes the likeliest character.
        top_k: draw among the k likeliest characters only; null draws from all.
        top_p: draw among the likeliest characters that together have this share of the odds.
        min_p: draw among characters at least this share as likely as the likeliest.
        repetition_penalty: above 1 makes characters that are in the text already less likely.
        stop: a string before which a text ends, or several: ['THE END', '###'].
        num_samples: texts to write, at once, each with dice of its own.
        seed: another seed gives another text, the same one the same text.
        context_shift: number of characters by which the context moves on once it is full; null is half the context,
            which is fast; 1 recomputes the whole context for every character.
        on_unknown: what to do with characters of the prompt that the net doesn't know.
        interactive: ask for a prompt after a prompt; the net remembers what was said.
        output: a file for the text, in place of the terminal.
        json: write JSON, with text, tokens, log-probabilities and speed.
        device: auto, cpu, cuda, cuda:1, mps ...; auto takes the accelerator if there is one.
        precision: auto is bfloat16 on CUDA, float32 elsewhere; on a CPU float16 writes twice as fast with larger nets.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be 1 or more")
    if prompt is not None and prompt_file is not None:
        raise ValueError("give a prompt or a prompt_file, not both")
    if interactive and (json or output or prompt_file or num_samples > 1):
        raise ValueError("interactive writes one text to the terminal: no json, output, prompt_file or num_samples")
    if output and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise ValueError(f"output={output} can't be written: it is a folder, or lies in none")
    net, tokenizer, path = load_with_path(ckpt_path, device, precision)
    prompt = read_input(prompt_file, tokenizer) if prompt_file else prompt or ""
    how: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or [],
        "context_shift": context_shift,
    }
    which = describe_checkpoint(path, ckpt_path)
    if interactive:
        print_info(which)
        run_interactive(net, tokenizer, prompt, max_new_tokens, seed, on_unknown, how)
        return
    if on_unknown == "drop" and (unknown := tokenizer.unknown(prompt) if prompt else ""):
        print_info(f"left out what this net doesn't know: {unknown[:40]!r}")
    prompt = prepare_prompt(tokenizer, prompt, on_unknown)
    warn_if_truncated(net, tokenizer, prompt)
    since, first, cut = time.perf_counter(), math.nan, False
    settings = how | {"seed": seed, "logprobs": json}
    written = complete(net, tokenizer, [prompt] * num_samples, max_new_tokens, **settings)
    samples, shown, quiet = list[Completion](), 0, json or output
    try:
        for samples in written:
            if not shown:
                first = time.perf_counter() - since
                print_info(which)
            shown = print_new_text(samples[0], shown, first_time=not shown) if not quiet else 1
    except KeyboardInterrupt:
        cut = True
    seconds = time.perf_counter() - since
    if json:
        count = sum(len(sample.tokens) for sample in samples)
        result = {
            "checkpoint": path,
            "device": str(next(net.parameters()).device),
            "precision": str(next(net.parameters()).dtype).removeprefix("torch."),
            "settings": how | {"seed": seed, "max_new_tokens": max_new_tokens},
            "prompt": prompt,
            "samples": [
                {
                    "text": s.text,
                    "tokens": s.tokens,
                    "logprobs": s.logprobs,
                    "finish_reason": s.finish_reason or "interrupted",
                }
                for s in samples
            ],
            "seconds": seconds,
            "seconds_to_first": first,
            "tokens_per_second": count / seconds,
        }
        result_text = json_format.dumps(result, ensure_ascii=False, indent=1)
    else:
        result_text = SEPARATOR.join(sample.prompt + sample.text for sample in samples)
    if output:
        atomic_write(output, f"{result_text}\n".encode())
        print_info(f"{len(samples)} texts of {sum(len(s.text) for s in samples):,} characters are in {output}")
    elif json:
        print(result_text)
    else:
        print("".join(SEPARATOR + sample.prompt + sample.text for sample in samples[1:]))
    if cut:
        sys.exit(130)


def print_new_text(text: Completion, shown: int, first_time: bool) -> int:
    """Print what of a text has come since; returns how much of it is printed now, the prompt counted in."""
    sure = text.prompt + text.stable_text()
    print(sure[0 if first_time else shown :], end="", flush=True)
    return len(sure)


def warn_if_truncated(net: GPT | LectureModel, tokenizer: Tokenizer, prompt: str) -> None:
    if (n := len(tokenizer.encode(prompt))) > net.config.block_size:
        print_info(f"the prompt has {n:,} tokens, and this net sees the last {net.config.block_size} of them")


def run_interactive(
    net: GPT | LectureModel,
    tokenizer: Tokenizer,
    history: str,
    max_new_tokens: int,
    seed: int,
    on_unknown: Literal["error", "drop"],
    how: dict,
) -> None:
    """Ask for a line, go on with the text so far and that line, and so on until the end of input or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then has arrow keys and a history
    if sys.stdin.isatty():
        print_info("type a line to go on from, Ctrl-C to cut an answer short, Ctrl-D to end")
    turn = 0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").removeprefix("\ufeff")  # a file's byte order mark
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            line = prepare_prompt(tokenizer, line, on_unknown) if line else ""
        except ValueError as error:
            print_info(str(error))
            continue
        end = "" if tokenizer.unknown("\n") else "\n"
        history = prepare_prompt(tokenizer, history + line + end)
        pieces, turn = stream(net, tokenizer, history, max_new_tokens, seed=seed + turn, **how), turn + 1
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                history += piece
        except KeyboardInterrupt:
            pass
        print()
        history += end


def score_command(
    text_file: str,
    ckpt_path: str = "best",
    stride: int | None = None,
    on_unknown: Literal["error", "drop"] = "error",
    json: bool = False,
    device: str = "auto",
) -> None:
    """Say how likely a checkpoint finds a text, in nats and bits per character.

    Args:
        text_file: a UTF-8 file; - is stdin.
        ckpt_path: the checkpoint; best or last is the newest file of that name below checkpoints/, or the small net
            that comes with the package.
        stride: characters by which the window of block_size moves on; only new ones are counted. null is block_size,
            windows side by side as in validate; a smaller one gives each character a longer past, and takes longer.
        on_unknown: what to do with characters that the net doesn't know.
        json: print JSON.
        device: auto, cpu, cuda, cuda:1, mps ...; auto takes the accelerator if there is one.
    """
    net, tokenizer, path = load_with_path(ckpt_path, device, "float32")
    text = read_input(text_file, tokenizer)
    if on_unknown == "drop" and text and (unknown := tokenizer.unknown(text)):
        print_info(f"left out what this net doesn't know: {unknown[:40]!r}")
        text = prepare_prompt(tokenizer, text, "drop")
    found = score(net, tokenizer, text, stride)
    print_info(describe_checkpoint(path, ckpt_path))
    if json:
        print(json_format.dumps({"checkpoint": path, "stride": stride or net.config.block_size} | found._asdict()))
        return
    print(
        f"{found.nats_per_character:.4f} nats, {found.bits_per_character:.4f} bits per character "
        f"({found.characters:,} of them, perplexity {found.perplexity:.3f}): {text_file} under {path}"
    )
