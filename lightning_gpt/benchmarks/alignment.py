"""All stages in a row on the example task: what each buys and what it costs, as a table.

    python -m lightning_gpt.benchmarks.alignment

`make align` runs it. A CPU gets fewer and shorter texts than a GPU, so that it takes about a quarter of an hour on two
cores. Gold reward: the share of lines with ten syllables (alignment/syllables.py), of texts of 200 characters from
headings that no stage has trained on. val/loss: nats per character on the last tenth of Tiny Shakespeare. KL: nats per
text, from the start.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jsonargparse
import torch

from ..alignment.examples import headings
from ..alignment.losses import kl_divergence, next_token_logprobs
from ..alignment.rollouts import roll_out
from ..alignment.syllables import verse
from ..cli.main import main, run
from ..cli.parser import Parser
from ..data.corpus import TINY_SHAKESPEARE
from ..data.tokenizers import Tokenizer
from ..data.windows import derive_seed
from ..inference.text import PACKAGED_CHECKPOINT, complete, load, score
from ..model.gpt import GPT
from ..training.logger import create_run_folder
from .verse import obedience

NEW_TOKENS = 200
BEST_OF = 16


class Size(NamedTuple):
    """How much each stage does; steps are optimizer steps, of the batches that `stages` gives."""

    sft_steps: int
    pairs: int
    reward_steps: int
    dpo_steps: int
    grpo_steps: int
    batch: int  # pairs, and prompts of a batch of rollouts
    windows: int  # of the pre-training text in a step of DPO and GRPO
    new_tokens: int  # of the texts to train on
    texts: int  # to measure with


SIZES = {
    "cpu": Size(50, 1500, 120, 80, 25, 8, 2, 100, 64),
    "cuda": Size(300, 15_000, 800, 250, 60, 64, 32, NEW_TOKENS, 512),
}


class Row(NamedTuple):
    """A line of the table; a value that does not apply is None."""

    stage: str
    gold: float | None
    val_loss: float | None
    kl: float | None
    seconds: float
    note: str
    sample: str = ""


def measure(net: GPT, start: GPT, tokenizer: Tokenizer, texts: int, seed: int) -> dict[str, Any]:
    """Gold reward, val/loss, KL and a sample of a net."""
    text = TINY_SHAKESPEARE.read_text(encoding="utf-8")
    unseen = headings(text)[-(len(headings(text)) // 10) :]
    prompts = [unseen[i % len(unseen)] for i in range(texts)]
    rollouts, completions = roll_out(net, tokenizer, prompts, [derive_seed(seed, i) for i in range(texts)], NEW_TOKENS)
    kl = 0.0
    with torch.inference_mode():
        for ids, completion in zip(*(part.split(64) for part in rollouts[:2]), strict=True):
            policy, reference = (next_token_logprobs(one, ids) for one in (net, start))
            kl += float((kl_divergence(policy, reference) * completion[:, 1:]).sum())
    return {
        "gold": sum(verse(prompts, completions)) / texts,
        "val_loss": score(net, tokenizer, text[int(0.9 * len(text)) :]).nats_per_character,
        "kl": kl / texts,
        "sample": prompts[0] + completions[0],
    }


def best_of(net: GPT, tokenizer: Tokenizer, texts: int, seed: int) -> tuple[float, str]:
    """The mean gold reward of the best of BEST_OF texts, and one of them."""
    text = TINY_SHAKESPEARE.read_text(encoding="utf-8")
    unseen = headings(text)[-(len(headings(text)) // 10) :]
    prompts = [unseen[i // BEST_OF % len(unseen)] for i in range(texts // BEST_OF * BEST_OF)]
    *_, found = complete(net, tokenizer, prompts, NEW_TOKENS, temperature=1.0, seed=seed)
    scored = list(
        zip(verse(prompts, [one.text for one in found]), (one.prompt + one.text for one in found), strict=True)
    )
    best = [max(scored[start : start + BEST_OF]) for start in range(0, len(scored), BEST_OF)]
    return sum(reward for reward, _ in best) / len(best), best[0][1]


def stages(folder: Path, start: str, size: Size, seed: int) -> dict[str, list[str]]:
    """The command line of each stage by name, in their order."""
    common = [f"--model.init_from={start}", f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
    common += ["--sample.length=0", "--trainer.val_check_interval=1000000"]  # the last weights are validated
    policy = [f"--data.batch_size={size.batch}", f"--data.text_batch_size={size.windows}", "--data.val_texts=64"]
    policy += [f"--model.max_new_tokens={size.new_tokens}"]
    pairs, proxy = f"--data.corpus={folder / 'pairs.jsonl'}", folder / "reward" / "version_0" / "checkpoints/best.ckpt"
    return {
        "sft": ["sft", f"--data.corpus={folder / 'verse.jsonl'}", f"--trainer.max_steps={size.sft_steps}", *common],
        "reward": ["reward", pairs, f"--trainer.max_steps={size.reward_steps}", f"--data.batch_size={size.batch}"]
        + ["--trainer.callbacks=null", *common],
        "dpo": ["dpo", pairs, f"--trainer.max_steps={size.dpo_steps}", *policy, *common],
        "grpo": ["grpo", f"--trainer.max_steps={size.grpo_steps}", *policy, *common],
        "grpo on the reward model": ["grpo", f"--trainer.max_steps={size.grpo_steps}", *policy, *common]
        + [f"--model.reward={proxy}", "--model.gold_reward=verse", "--name=proxy"],
    }


def bench(ckpt_path: str = str(PACKAGED_CHECKPOINT), device: str = "auto", seed: int = 1337) -> None:
    """Run SFT, the reward model, DPO and GRPO from one checkpoint, and print what each has reached.

    Args:
        ckpt_path: the checkpoint to start from, which must encode Tiny Shakespeare.
        device: auto, cpu or cuda.
        seed: of all stages.
    """
    net, tokenizer = load(ckpt_path, device, "float32")
    start, where = cast(GPT, net), next(net.parameters()).device.type
    size, folder = SIZES[where if where in SIZES else "cpu"], create_run_folder(Path("checkpoints/align"))
    rows: list[Row] = []

    def timed(stage: str, work: Callable[[], Any], note: str = "") -> Any:
        print(f"\n=== {stage}", flush=True)
        begin = time.perf_counter()
        result = work()
        return result, time.perf_counter() - begin

    measured, seconds = timed("start", lambda: measure(start, start, tokenizer, size.texts, seed))
    rows.append(Row("start", seconds=seconds, note="", **measured))
    (gold, sample), seconds = timed(f"best of {BEST_OF}", lambda: best_of(start, tokenizer, size.texts * 4, seed))
    rows.append(Row(f"best of {BEST_OF}", gold, rows[0].val_loss, None, seconds, "", sample))
    main(["demonstrations", "--output", str(folder / "verse.jsonl")])
    make_pairs = ["preferences", "--output", str(folder / "pairs.jsonl"), f"--pairs={size.pairs}", f"--seed={seed}"]
    make_pairs += [f"--ckpt_path={ckpt_path}", f"--max_new_tokens={size.new_tokens}", f"--device={device}"]
    _, seconds = timed("preferences", lambda: main(make_pairs))
    rows.append(Row("preferences", None, None, None, seconds, f"{size.pairs:,} pairs"))
    accelerator = f"--trainer.accelerator={'gpu' if where == 'cuda' else 'cpu'}"
    for stage, args in stages(folder, ckpt_path, size, seed).items():
        _, seconds = timed(stage, partial(main, [*args, accelerator, "--trainer.devices=1"]))
        name = "proxy" if "on" in stage.split() else stage
        path = folder / name / "version_0" / "checkpoints" / "last.ckpt"
        if stage == "reward":
            accuracy = last_accuracy(folder / name / "version_0")
            rows.append(Row(stage, None, None, None, seconds, f"{accuracy:.1%} of held-out pairs"))
            continue
        trained = cast(GPT, load(path, device, "float32")[0])
        note = ""
        if stage == "sft":
            shares = obedience(trained, tokenizer, size.texts // 2, 0.8, seed)
            note = ", ".join(f"{share:.0%} {kind}" for kind, share in shares.items()) + " as asked"
        rows.append(Row(stage, seconds=seconds, note=note, **measure(trained, start, tokenizer, size.texts, seed)))
    print_table(rows, folder)


def last_accuracy(folder: Path) -> float:
    from ..analysis.report import read_run  # imports TensorBoard

    return read_run(folder).last("val/accuracy")


def print_table(rows: list[Row], folder: Path) -> None:
    for row in rows:
        if row.sample:
            print(f"\n--- {row.stage}\n{row.sample}")
    print(f"\n{'stage':<26} {'gold':>6} {'val/loss':>9} {'KL':>7} {'seconds':>8}")
    for row in rows:
        gold, loss, kl = (
            "" if value is None else f"{value:.{digits}f}"
            for value, digits in ((row.gold, 3), (row.val_loss, 4), (row.kl, 1))
        )
        print(f"{row.stage:<26} {gold:>6} {loss:>9} {kl:>7} {row.seconds:>8.0f}  {row.note}".rstrip())
    (folder / "table.json").write_text(json.dumps([row._asdict() for row in rows], indent=1), encoding="utf-8")
    print(f"\n{sum(row.seconds for row in rows):.0f} s; the runs are in {folder}")


if __name__ == "__main__":
    run(lambda args: jsonargparse.auto_cli(bench, args=args, as_positional=False, parser_class=Parser), sys.argv[1:])
