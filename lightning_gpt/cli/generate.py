"""lightning-gpt generate and score. Lightning is not imported, so that they start quickly."""

import json as json_format
import math
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os.path import relpath
from pathlib import Path
from typing import Any, Literal

from ..alignment.examples import read_completions
from ..alignment.rewards import Reward, find_reward
from ..checkpoint.io import RUNS_DIR, atomic_write, checkpoint_summary, find_checkpoints, newest_first
from ..data.corpus import read_text
from ..data.tokenizers import Tokenizer
from ..errors import print_info
from ..inference.text import (
    PACKAGED_CHECKPOINT,
    Completion,
    Precision,
    choose_device,
    complete,
    find_or_packaged,
    load_files,
    prepare_prompt,
    score,
    stream,
)
from ..model.ensemble import Net

MAX_COMPARED = 50  # newest best.ckpt files that are searched for a lower val/loss
SEPARATOR = "\n" + "-" * 40 + "\n"  # between two samples


def read_input(file: str, tokenizer: Tokenizer) -> str:
    """The text of a UTF-8 file, or of stdin for `-`, with newlines normalized as in training."""
    return read_text(file, keep_returns="\r" in tokenizer.vocabulary)


def read_pipe(tokenizer: Tokenizer) -> str:
    """The text that a pipe gives to stdin, without its last newline, which `echo` adds; "" without a pipe.

    Only a pipe is read: a file as stdin is often that of a loop, `while read line ... done < lines.txt`.
    """
    with suppress(OSError, ValueError):  # a notebook's stdin is no file
        if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
            print_info("reading the prompt from the pipe")
            return read_input("-", tokenizer).removesuffix("\n")
    return ""


def load_with_paths(ckpt_path: str, device: str, precision: Precision) -> tuple[Net, Tokenizer, list[str]]:
    paths = find_checkpoints(ckpt_path, find_or_packaged)
    return *load_files(paths, device, precision), [relpath(path) for path in paths]


def describe_checkpoint(path: str | Path, asked: str = "") -> str:
    """The path, step and val/loss of a checkpoint and, if `asked` is best or last, a better one of its text."""
    if asked == "best" and Path(path).resolve() == PACKAGED_CHECKPOINT.resolve():
        return f"no run below {RUNS_DIR}/ yet: using {PACKAGED_CHECKPOINT.name}, which comes with the package"
    step, loss, data = checkpoint_summary(Path(path)) or (None, math.nan, {})
    line = relpath(path) + ("" if step is None else f", step {step:,}")
    line += f", val/loss {loss:.4f}" if math.isfinite(loss) else ""
    others = newest_first(RUNS_DIR.glob("**/best.ckpt")) if asked in ("best", "last") else []
    found = [(summary, other) for other in others[:MAX_COMPARED] if (summary := checkpoint_summary(other))]
    lower = [(val_loss, other) for (_, val_loss, on), other in found if val_loss < loss and on == data]
    if lower and (best := min(lower)):
        line += f"; on the same text {relpath(best[1])} has {best[0]:.4f}: use it with --ckpt_path"
    return line


def describe_checkpoints(paths: Sequence[str | Path], asked: str = "") -> str:
    """As `describe_checkpoint`; for several, how many are averaged, and each one's path, step and val/loss."""
    if len(paths) == 1:
        return describe_checkpoint(paths[0], asked)
    return f"the mean of {len(paths)} nets: " + "; ".join(describe_checkpoint(path) for path in paths)


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
    best_of: int = 1,
    reward: str | None = None,
    seed: int = 1337,
    context_shift: int | None = None,
    on_unknown: Literal["error", "drop"] = "error",
    interactive: bool = False,
    output: str | None = None,
    json: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Generate text from a checkpoint and print it as it is generated.

    Args:
        ckpt_path: checkpoint to sample from; best or last is the newest file of that name below checkpoints/. Until a
            run has saved one, best is a small net that comes with the package. The probabilities of several, a pattern
            or a comma-separated list, are averaged.
        prompt: the text to continue; null is what a pipe gives, or else a newline, or the vocabulary's first character
            if it has no newline.
        prompt_file: a file with the prompt; - is stdin, with its last newline.
        max_new_tokens: number of tokens to generate (characters, for a character tokenizer).
        temperature: divides the logits; below 1 is safer, above 1 more varied, and 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only; null samples from all.
        top_p: sample from the smallest set of likeliest tokens whose probabilities add up to top_p.
        min_p: sample from tokens with at least min_p times the probability of the likeliest.
        repetition_penalty: above 1 makes tokens that already occur in the text less likely.
        stop: a string before which a text ends, or a list of them: ['THE END', '###'].
        num_samples: number of texts, generated in one batch, each with its own random generator.
        best_of: texts to generate for each that is kept, the one with the highest reward.
        reward: verse, the .ckpt of a reward model, or module:function or file.py:function.
        seed: seeds the random generators; the same seed gives the same texts.
        context_shift: tokens by which a full context is shifted; null is half the context, which is fast; 1 recomputes
            the full context for every token.
        on_unknown: whether characters of the prompt outside the vocabulary raise an error or are dropped.
        interactive: ask for prompts repeatedly; each continues the text so far.
        output: a file to write the text to instead of the terminal.
        json: write JSON with text, tokens, log-probabilities and speed.
        device: auto, cpu, cuda, cuda:1, mps ...; auto takes the accelerator if there is one.
        precision: auto is bfloat16 on CUDA, float32 elsewhere; on a CPU, float16 and int8 are faster for larger nets.
    """
    check_numbers(num_samples, best_of, reward)
    if prompt is not None and prompt_file is not None:
        raise ValueError("set prompt or prompt_file, not both")
    if interactive and (json or output or prompt_file or num_samples > 1 or best_of > 1):
        raise ValueError(
            "interactive writes one text to the terminal: no json, output, prompt_file, num_samples or best_of"
        )
    if output and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise ValueError(f"output={output} can't be written: it is a folder, or its folder does not exist")
    net, tokenizer, paths = load_with_paths(ckpt_path, device, precision)
    if prompt is None and not interactive:
        prompt = read_input(prompt_file, tokenizer) if prompt_file else read_pipe(tokenizer)
    prompt = prompt or ""
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or [],
        "context_shift": context_shift,
    }
    scorer = None if reward is None else find_reward(reward, next(net.parameters()).device)
    description = describe_checkpoints(paths, ckpt_path)
    if interactive:
        print_info(description)
        run_interactive(net, tokenizer, prompt, max_new_tokens, seed, on_unknown, sampling)
        return
    if on_unknown == "drop" and (unknown := tokenizer.unknown(prompt) if prompt else ""):
        print_info(f"dropped characters that this net doesn't know: {unknown[:40]!r}")
    prompt = prepare_prompt(tokenizer, prompt, on_unknown)
    warn_if_truncated(net, tokenizer, prompt)
    settings = sampling | {"seed": seed, "logprobs": json}
    updates = complete(net, tokenizer, [prompt] * (num_samples * best_of), max_new_tokens, **settings)
    quiet = bool(json or output or scorer)
    samples, speed, interrupted = receive(updates, description, quiet)
    rewards: list[float] = []
    if scorer is not None:
        samples, rewards = keep_best(samples, best_of, scorer)
        print_info(f"the best of {best_of} each, with a reward of {', '.join(f'{value:.3g}' for value in rewards)}")
    if json:
        result = {
            "checkpoint": ",".join(paths),
            "device": str(next(net.parameters()).device),
            "precision": "int8" if precision == "int8" else str(next(net.parameters()).dtype).removeprefix("torch."),
            "settings": sampling | {"seed": seed, "max_new_tokens": max_new_tokens},
            "prompt": prompt,
            "samples": describe_samples(samples, rewards),
        }
        result_text = json_format.dumps(result | speed, ensure_ascii=False, indent=1)
    else:
        result_text = SEPARATOR.join(sample.prompt + sample.text for sample in samples)
    if output:
        atomic_write(output, f"{result_text}\n".encode())
        print_info(f"wrote {len(samples)} texts of {sum(len(s.text) for s in samples):,} characters to {output}")
    elif json or quiet:
        print(result_text)
    else:
        print("".join(SEPARATOR + sample.prompt + sample.text for sample in samples[1:]))
    if interrupted:
        sys.exit(130)


def check_numbers(num_samples: int, best_of: int, reward: str | None) -> None:
    """Raises ValueError if there is nothing to generate, or a reward without a choice, or a choice without a reward."""
    for name, value in ("num_samples", num_samples), ("best_of", best_of):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if (best_of > 1) != (reward is not None):
        raise ValueError(f"best_of={best_of} with reward={reward}: give both, such as --best_of 16 --reward verse")


def receive(
    updates: Iterator[list[Completion]], description: str, quiet: bool
) -> tuple[list[Completion], dict[str, float], bool]:
    """The texts as they are at the end or at Ctrl-C; prints the first one as it grows, unless `quiet`.

    Returns:
        the texts, the speed as in the JSON, and whether Ctrl-C has ended them.
    """
    samples, shown, first, interrupted, start = list[Completion](), 0, math.nan, False, time.perf_counter()
    try:
        for samples in updates:
            if not shown:
                first = time.perf_counter() - start
                print_info(description)
            shown = 1 if quiet else print_new_text(samples[0], shown, first_time=not shown)
    except KeyboardInterrupt:
        interrupted = True
    seconds, count = time.perf_counter() - start, sum(len(sample.tokens) for sample in samples)
    speed = {"seconds": seconds, "seconds_to_first": first, "tokens_per_second": count / seconds}
    return samples, speed, interrupted


def describe_samples(samples: list[Completion], rewards: list[float]) -> list[dict[str, Any]]:
    """The texts for the JSON, each with its reward if there are any."""
    described = [
        {
            "text": sample.text,
            "tokens": sample.tokens,
            "logprobs": sample.logprobs,
            "finish_reason": sample.finish_reason or "interrupted",
        }
        for sample in samples
    ]
    if not rewards:
        return described
    return [each | {"reward": reward} for each, reward in zip(described, rewards, strict=True)]


def keep_best(samples: list[Completion], best_of: int, reward: Reward) -> tuple[list[Completion], list[float]]:
    """The sample with the highest reward of each `best_of` successive ones, and its reward."""
    rewards = reward([sample.prompt for sample in samples], [sample.text for sample in samples])
    groups = (range(start, start + best_of) for start in range(0, len(samples), best_of))
    best = [max(group, key=rewards.__getitem__) for group in groups]
    return [samples[i] for i in best], [rewards[i] for i in best]


def print_new_text(text: Completion, shown: int, first_time: bool) -> int:
    """Print what was added to a text; returns the number of characters printed so far, including the prompt."""
    stable = text.prompt + text.stable_text()
    print(stable[0 if first_time else shown :], end="", flush=True)
    return len(stable)


def warn_if_truncated(net: Net, tokenizer: Tokenizer, prompt: str) -> None:
    if (n := len(tokenizer.encode(prompt))) > net.config.block_size:
        print_info(f"the prompt has {n:,} tokens, but this net sees only the last {net.config.block_size} of them")


def run_interactive(
    net: Net,
    tokenizer: Tokenizer,
    history: str,
    max_new_tokens: int,
    seed: int,
    on_unknown: Literal["error", "drop"],
    sampling: dict,
) -> None:
    """Read a line, append it to the text, continue the text; repeat until the end of input or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() arrow keys and a history
    if sys.stdin.isatty():
        print_info("type a line to continue from, Ctrl-C to stop an answer, Ctrl-D to quit")
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
        pieces, turn = stream(net, tokenizer, history, max_new_tokens, seed=seed + turn, **sampling), turn + 1
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
    reward: str | None = None,
    on_unknown: Literal["error", "drop"] = "error",
    json: bool = False,
    device: str = "auto",
) -> None:
    """Print the negative log-likelihood of a text under a checkpoint, in nats and bits per character; or rewards.

    Args:
        text_file: a UTF-8 file; - is stdin. With --reward, JSON lines with prompt and completion, or with prompt,
            chosen and rejected.
        ckpt_path: the checkpoint; best or last is the newest file of that name below checkpoints/, or the small net
            that comes with the package. The probabilities of several, a pattern or a comma-separated list, are
            averaged.
        stride: tokens by which the window of block_size moves; each token is scored once. null is block_size: adjacent
            windows, as in validate. A smaller stride gives tokens a longer context and takes longer.
        reward: print the rewards of the file's completions instead: by verse, the .ckpt of a reward model, or
            module:function or file.py:function.
        on_unknown: whether characters outside the vocabulary raise an error or are dropped.
        json: print JSON.
        device: auto, cpu, cuda, cuda:1, mps ...; auto takes the accelerator if there is one.
    """
    if reward is not None:
        print_rewards(Path(text_file), reward, choose_device(device), json)
        return
    net, tokenizer, paths = load_with_paths(ckpt_path, device, "float32")
    text = read_input(text_file, tokenizer)
    if on_unknown == "drop" and text and (unknown := tokenizer.unknown(text)):
        print_info(f"dropped characters that this net doesn't know: {unknown[:40]!r}")
        text = prepare_prompt(tokenizer, text, "drop")
    result, path = score(net, tokenizer, text, stride), ",".join(paths)
    print_info(describe_checkpoints(paths, ckpt_path))
    if json:
        print(json_format.dumps({"checkpoint": path, "stride": stride or net.config.block_size} | result._asdict()))
        return
    print(
        f"{result.nats_per_character:.4f} nats, {result.bits_per_character:.4f} bits per character "
        f"({result.characters:,} of them, perplexity {result.perplexity:.3f}): {text_file} under {path}"
    )


def print_rewards(path: Path, reward: str, device: str, json: bool) -> None:
    """Prints the reward of each completion of a file of JSON lines, then their mean, or how many pairs are in order."""
    records = read_completions(path)
    scorer = find_reward(reward, device)
    prompts = [prompt for prompt, *_ in records]
    columns = [scorer(prompts, list(texts)) for texts in zip(*(texts for _, *texts in records), strict=True)]
    rows = list(zip(*columns, strict=True))
    if len(columns) == 2:
        right = sum(chosen > rejected for chosen, rejected in rows) / len(rows)
        summary, value = {"accuracy": right}, f"chosen is better in {right:.1%} of {len(rows):,} pairs"
    else:
        mean = sum(columns[0]) / len(rows)
        summary, value = {"mean": mean}, f"mean reward {mean:.4f} of {len(rows):,} texts"
    if json:
        print(json_format.dumps({"reward": reward, "rewards": rows} | summary))
        return
    for row in rows:
        print("  ".join(f"{value:.4f}" for value in row))
    print_info(f"{value}, by {reward}")
