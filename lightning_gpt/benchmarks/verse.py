"""How often a checkpoint writes what it is asked for, verse or prose, before and after `lightning-gpt sft`.

    python -m lightning_gpt.benchmarks.verse --ckpt_path best

A text counts if all its complete lines begin with a capital letter (verse), or at least a third of them do not (prose),
see alignment/verse.py. The prompts ask each of eight speakers for both, in turn.
"""

import json as json_format
import sys

import jsonargparse

from ..alignment.verse import KINDS, is_followed, prompt_for
from ..cli.main import run
from ..cli.parser import Parser
from ..data.tokenizers import Tokenizer
from ..inference.text import complete, load
from ..model.ensemble import Net

SPEAKERS = "ROMEO", "JULIET", "MENENIUS", "First Citizen", "KING RICHARD III", "CLOWN", "AUTOLYCUS", "DUKE OF YORK"


def obedience(net: Net, tokenizer: Tokenizer, texts: int, temperature: float, seed: int) -> dict:
    """For each kind the share of `texts` texts that are of it when it is asked for."""
    share = {}
    for kind in KINDS:
        prompts = [prompt_for(kind, SPEAKERS[i % len(SPEAKERS)]) for i in range(texts)]
        length = net.config.block_size - max(map(len, prompts))
        *_, completions = complete(net, tokenizer, prompts, length, temperature=temperature, seed=seed, stop=["\n\n"])
        finished = (one.text + "\n\n" * (one.finish_reason == "stop") for one in completions)
        share[kind] = sum(is_followed(kind, text) for text in finished) / texts
    return share


def bench(
    ckpt_path: str = "best", texts: int = 128, temperature: float = 0.8, seed: int = 1337, json: bool = False
) -> None:
    """Print the share of texts that are of the kind that was asked for.

    Args:
        ckpt_path: the checkpoint; best or last is the newest file of that name below checkpoints/.
        texts: how many to generate of each kind.
        temperature: of the sampling.
        seed: of the sampling.
        json: print JSON.
    """
    if texts < 1:
        raise ValueError(f"texts={texts} must be at least 1")
    net, tokenizer = load(ckpt_path)
    share = obedience(net, tokenizer, texts, temperature, seed)
    print(json_format.dumps(share) if json else "  ".join(f"{kind} {value:.1%}" for kind, value in share.items()))


if __name__ == "__main__":
    run(lambda args: jsonargparse.auto_cli(bench, args=args, as_positional=False, parser_class=Parser), sys.argv[1:])
