"""Rewards: a program (`verse`), a reward model's checkpoint, or a Python function. Lightning is not imported."""

import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from ..checkpoint.io import find_checkpoint, load_net
from ..data.tokenizers import Tokenizer
from ..model.reward import RewardModel
from .syllables import verse

Reward = Callable[[list[str], list[str]], list[float]]  # prompts and completions to rewards, higher is better
BATCH = 256  # texts that a reward model reads at once


class ModelReward:
    """The rewards that a reward model gives to texts.

    Raises:
        ValueError: the checkpoint is not of a reward model.
    """

    def __init__(self, path: str, device: str | torch.device):
        self.path = path
        self.net, self.tokenizer = load_reward_model(path, device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            heads = [self.tokenizer.encode(text) for text in prompts[part]]
            tails = [self.tokenizer.encode(text) for text in completions[part]]
            rows = [torch.cat(pair)[-self.net.config.block_size :] for pair in zip(heads, tails, strict=True)]
            masks = [torch.arange(len(row)) >= len(row) - len(tail) for row, tail in zip(rows, tails, strict=True)]
            ids = pad_sequence(rows, batch_first=True).to(self.device)
            mask = pad_sequence(masks, batch_first=True).to(self.device)
            scores = self.net(ids, mask)
            rewards += torch.where(mask.any(1), scores, torch.zeros_like(scores)).tolist()  # an empty completion: 0
        return rewards


def load_reward_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[RewardModel, Tokenizer]:
    """The net and the tokenizer of a reward model's checkpoint.

    Raises:
        ValueError: the checkpoint is of a language model.
    """
    net, tokenizer = load_net(find_checkpoint(path), device, reward=True)
    assert isinstance(net, RewardModel)
    return net, tokenizer


def load_function(name: str) -> Reward:
    """The function of `module:function` or `file.py:function`.

    Raises:
        ValueError: there is no such module or function.
    """
    source, _, function = name.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        found = getattr(module, function)
    except (Exception, SystemExit) as error:  # the file is the user's
        raise ValueError(f"the reward function {name} can't be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"the reward {name} is a {type(found).__name__}, not a function")
    return found


def check_rewards(rewards, count: int, name: str) -> list[float]:
    """The rewards as floats.

    Raises:
        ValueError: there are not `count` of them, or one is not a finite number.
    """
    rewards = list(rewards) if hasattr(rewards, "__iter__") else rewards
    if not isinstance(rewards, list) or len(rewards) != count:
        given = f"{len(rewards)} values" if isinstance(rewards, list) else f"a {type(rewards).__name__}"
        raise ValueError(f"the reward {name} returned {given} for {count} completions: return one number for each")
    for i, value in enumerate(rewards):
        try:
            finite = math.isfinite(value)
        except TypeError:
            finite = False
        if not finite:
            raise ValueError(f"the reward {name} returned {value!r} for completion {i}: return finite numbers")
    return [float(value) for value in rewards]


def find_reward(name: str, device: str | torch.device = "cpu") -> Reward:
    """The reward of a name, which is checked each time that it is called.

    Args:
        name: verse (see syllables.py); the path of a reward model's checkpoint; or module:function or file.py:function,
            a Python function of prompts and completions, two lists of strings, that returns a list of numbers.
        device: of a reward model.
    Raises:
        ValueError: there is no such reward, or later: the function fails, or returns anything but one finite number for
            each completion.
    """
    if name == "verse":
        return verse
    if name.endswith(".ckpt") or name in ("best", "last"):
        return ModelReward(name, device)
    if ":" not in name:
        raise ValueError(f"the reward {name} is none: give verse, a reward model's .ckpt, or file.py:function")
    function = load_function(name)

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        try:
            rewards = function(prompts, completions)
        except Exception as error:  # it is the user's
            raise ValueError(f"the reward {name} failed: {type(error).__name__}: {error}") from error
        return check_rewards(rewards, len(completions), name)

    return reward
