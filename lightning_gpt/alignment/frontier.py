"""lightning-gpt frontier: what runs gained in reward for their KL divergence, beside best-of-n and the optimum.

Shapes   P prompts · M texts of each prompt, a group · S validations · V versions (seeds) of a run
"""

import io
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..analysis.report import Run, find_run, read_run
from ..checkpoint.io import atomic_write, find_checkpoint
from ..data.tokenizers import Tokenizer
from ..data.windows import derive_seed
from ..errors import print_info
from ..inference.text import load
from ..model.gpt import GPT
from .examples import prompts_or_headings
from .preferences import TEXTS
from .rewards import Reward, find_reward
from .rollouts import roll_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_SAMPLES = 5  # effective samples of a group, below which its weights say little
BETAS = np.geomspace(1e4, 1e-3, 400)  # times the span of the rewards
MARKERS = "os^DvPX"


# --- what can be had from texts of the reference ----------------------------------------------------------------------


def expected_maximum(rewards: np.ndarray, n: int) -> np.ndarray:
    """The mean over all subsets of n of each group's rewards (P, M) of the subset's maximum, (P,).

    It is the unbiased estimate of best-of-n's reward that has the least variance (a U-statistic). The k-th smallest
    reward is the maximum of C(k - 1, n - 1) of the C(M, n) subsets.

    Raises:
        ValueError: a group has fewer than n rewards.
    """
    M = rewards.shape[1]
    if not 1 <= n <= M:
        raise ValueError(f"n={n} must be at least 1 and at most {M}, the texts of a prompt")
    return np.sort(rewards, 1) @ [math.comb(k - 1, n - 1) / math.comb(M, n) for k in range(1, M + 1)]


def best_of_n_kl(n: int) -> float:
    """An upper bound of the KL divergence of best-of-n from the reference: Beirami et al. 2024, theorem 1.

    It is the exact value if no two texts have the same reward and none is likely.
    """
    return math.log(n) - (n - 1) / n


class Optimum(NamedTuple):
    """The largest reward at each KL divergence, both means over prompts, from a KL divergence of 0 on; (B,) each."""

    beta: np.ndarray  # the slope of reward over kl
    kl: np.ndarray
    reward: np.ndarray
    error: np.ndarray  # standard error over prompts of the reward at this KL divergence
    bias: np.ndarray  # by about so much the reward is too low, because of the finite groups

    def at(self, kl: np.ndarray) -> np.ndarray:
        """The largest reward at these KL divergences; to the right of the curve an upper bound of it, the tangent."""
        beyond = np.maximum(0, kl - self.kl[-1])
        return np.interp(kl, self.kl, self.reward) + self.beta[-1] * beyond


def find_optimum(rewards: np.ndarray, betas: np.ndarray) -> Optimum:
    """The maximum of reward - beta * KL over all policies, for each beta, from rewards (P, M) of the reference's texts.

    The optimal policy weighs a text by exp(reward / beta) (Rafailov et al. 2023, equation 4); here the weights w are
    normalised over each group, so reward = sum w r and KL = sum w ln(w M), which can't exceed ln M. Maximum minus
    beta * KL is beta * ln(mean exp(r / beta)). Its standard error over prompts is that of the reward at a fixed KL
    divergence, since the optimal beta there changes it in second order only. It is too low, by beta / 2 times the
    relative variance of the mean of exp(r / beta), to first order (Jensen's inequality). With normal rewards the bias
    at the end of the curve is twice that.

    Args:
        betas: decreasing; the curve ends where the weights of a group are worth fewer than LEAST_SAMPLES equal ones.
    """
    P, M = rewards.shape
    logits = rewards[None] / betas[:, None, None]  # (B, P, M)
    logits -= logits.max(2, keepdims=True)
    w = np.exp(logits)
    w /= w.sum(2, keepdims=True)
    reward = (w * rewards).sum(2)
    kl = (w * np.log(np.maximum(w * M, 1e-300))).sum(2)
    squares = (w**2).sum(2).mean(1)  # 1 / the effective number of samples
    error = (reward - betas[:, None] * kl).std(1, ddof=1) / math.sqrt(P) if P > 1 else np.full(len(betas), math.nan)
    bias = betas / 2 * (squares - 1 / M)
    return Optimum(*(x[squares * LEAST_SAMPLES <= 1] for x in (betas, kl.mean(1), reward.mean(1), error, bias)))


def rewards_of_texts(
    net: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    reward: Reward,
    groups: int,
    group_size: int,
    max_new_tokens: int,
    stop: list[str],
    seed: int,
) -> np.ndarray:
    """The rewards (groups, group_size) of texts of the net; the prompts are taken in random order, in turns."""
    order, rewards = random.Random(seed).sample(prompts, len(prompts)), list[float]()
    numbers = [(group, i) for group in range(groups) for i in range(group_size)]
    at_once = TEXTS.get(next(net.parameters()).device.type, 256)
    for start in range(0, len(numbers), at_once):
        part = numbers[start : start + at_once]
        chosen = [order[group % len(order)] for group, _ in part]
        _, texts = roll_out(net, tokenizer, chosen, [derive_seed(seed, *n) for n in part], max_new_tokens, stop)
        rewards += reward(chosen, texts)
    return np.array(rewards).reshape(groups, group_size)


# --- what runs have got -----------------------------------------------------------------------------------------------


class Series(NamedTuple):
    """The validations of the versions of a run; a DPO run's last one only. (S, V) each."""

    name: str
    kl: np.ndarray
    reward: np.ndarray  # val/gold_reward if there is one
    proxy: np.ndarray | None  # val/reward, if reward is val/gold_reward

    @property
    def label(self) -> str:
        versions = self.kl.shape[1]
        return f" {self.name}, {versions} seeds" if versions > 1 else f" {self.name}"


def series_of(name: str, runs: list[Run]) -> Series:
    """The series of a run's versions, at the steps at which all of them have validations.

    Raises:
        ValueError: a version has no val/kl or no reward; only some have val/gold_reward; they share no step.
    """
    gold = {"val/gold_reward" in run.curves for run in runs}
    if len(gold) > 1:
        raise ValueError(f"only some versions of {name} have val/gold_reward: give their folders different names")
    tags = ["val/kl", "val/reward", *(["val/gold_reward"] if gold.pop() else [])]
    for run in runs:
        if missing := [tag for tag in tags if not run.curves.get(tag)]:
            raise ValueError(f"{run.folder} has no {' and no '.join(missing)}: give runs of dpo or grpo with a reward")
    curves = [[dict(run.curves[tag]) for tag in tags] for run in runs]
    steps = sorted(set.intersection(*(set(curve) for version in curves for curve in version)))
    if not steps:
        raise ValueError(f"the versions of {name} have no step at which all have a validation")
    if all("val/margin" in run.curves for run in runs):  # DPO
        steps = steps[-1:]
    kl, reward, *rest = (np.array([[version[i][s] for version in curves] for s in steps]) for i in range(len(tags)))
    return Series(name, kl, rest[0], reward) if rest else Series(name, kl, reward, None)


def read_series(runs: list[str], reward: str) -> list[Series]:
    """The series of run folders; those in the same folder, checkpoints/NAME, are versions of one.

    Raises:
        ValueError: see `series_of`; or there is no run.
    """
    found: dict[str, list[Run]] = {}
    for folder in dict.fromkeys(find_run(path).absolute() for path in runs):
        run = read_run(folder)
        run.checkpoint = None  # its weights may be large
        name = folder.parent.name if folder.name.startswith("version_") else folder.name
        found.setdefault(name, []).append(run)
        measured = run.settings.get("model.gold_reward" if "val/gold_reward" in run.curves else "model.reward", reward)
        if measured != reward:
            print_info(f"{folder} measured {measured}, which is drawn as if it were {reward}")
    return [series_of(name, versions) for name, versions in found.items()]


def compare(series: list[Series], optimum: Optimum) -> str:
    """A table of the last validation of each series beside the optimum at its KL divergence.

    The standard error of the difference is that of the optimum, and with several versions theirs too. A difference of
    more than twice that and the optimum's bias is marked. Beyond the KL that the texts drawn can tell about, there is
    only an upper bound, which is drawn.
    """
    rows = [("series", "reward", "KL", "optimum", "difference", "")]
    for one in series:
        kl, reward = one.kl[-1], one.reward[-1]
        values = one.label.strip(), f"{reward.mean():.3f}", f"{kl.mean():.2f}"
        if kl.mean() > optimum.kl[-1]:
            rows.append((*values, "beyond the texts drawn", "", ""))
            continue
        difference = reward - optimum.at(kl)
        error, bias = (float(np.interp(kl.mean(), optimum.kl, x)) for x in (optimum.error, optimum.bias))
        of_versions = difference.std(ddof=1) / math.sqrt(len(kl)) if len(kl) > 1 else 0.0
        total = math.hypot(error, of_versions)
        above = difference.mean() > 2 * total + bias
        columns = *values, f"{optimum.at(kl).mean():.3f} ± {error:.3f}"
        rows.append((*columns, f"{difference.mean():+.3f} ± {total:.3f}", "above the optimum" if above else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = "<>>>><"
    return "\n".join("  ".join(map(format, row, map("{}{}".format, align, widths))).rstrip() for row in rows)


# --- the picture ------------------------------------------------------------------------------------------------------


def draw_series(ax, series: list[Series], values: list[np.ndarray | None], suffix: str = "", **style) -> None:
    """Means and standard deviations over versions of the values that there are; a series keeps its color."""
    for i, (one, value) in enumerate(zip(series, values, strict=True)):
        if value is None:
            continue
        means = one.kl.mean(1), value.mean(1)
        deviations = [x.std(1, ddof=1) for x in (value, one.kl)] if one.kl.shape[1] > 1 else [None, None]
        marker, label = MARKERS[i % len(MARKERS)], one.label + suffix
        kwargs = {"color": f"C{i % 10}", "marker": marker, "markersize": 4, "linewidth": 1.4, "elinewidth": 0.8}
        ax.errorbar(*means, *deviations, label=label, **kwargs | style)


def finish_axes(ax, title: str, handles: list) -> None:
    from ..analysis.figures import LITERAL

    ax.set_title(title, fontsize=10, **LITERAL)
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set_xlim(left=0)
    ax.set_xlabel("KL divergence from the start, nats per text (square-root axis)")
    ax.grid(alpha=0.25)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3}
    for text in ax.legend(handles=handles, fontsize=8, frameon=False, **place).get_texts():
        text.set(**LITERAL)


def draw(series: list[Series], rewards: np.ndarray, optimum: Optimum, reward: str) -> "Figure":
    """Left, reward over KL; right, if a run has a gold reward, it and its proxy: Gao et al. 2022, figure 1."""
    from matplotlib.figure import Figure

    from ..analysis.figures import DPI, LITERAL

    gold = [None if one.proxy is None else one.reward for one in series]
    panels = 1 if all(value is None for value in gold) else 2
    figure = Figure(figsize=(6.5 * panels, 5.2), dpi=DPI, layout="constrained")
    left, *others = figure.subplots(1, panels, squeeze=False)[0]
    P, M = rewards.shape
    left.plot(optimum.kl, optimum.reward, color="black", label="optimum, ± 1 standard error")
    band = (optimum.reward + sign * optimum.error for sign in (-1, 1))
    left.fill_between(optimum.kl, *band, color="black", alpha=0.15, linewidth=0)
    ns = [2**i for i in range(M.bit_length())]
    best = np.stack([expected_maximum(rewards, n) for n in ns])  # (n, P)
    errors = best.std(1, ddof=1) / math.sqrt(P)
    kls = [best_of_n_kl(n) for n in ns]
    style = {"color": "gray", "fmt": "s--", "markersize": 3, "linewidth": 1, "label": "best of n, KL at most this"}
    left.errorbar(kls, best.mean(1), errors, **style)
    for n, x, y in zip(ns, kls, best.mean(1), strict=True):
        left.annotate(str(n), (x, y), (3, -9), textcoords="offset points", fontsize=7, color="gray")
    draw_series(left, series, [one.reward for one in series])
    furthest = max(one.kl.max() for one in series) if series else 0
    limits = left.get_ylim()  # the bound may be far above them
    if furthest > optimum.kl[-1]:
        beyond = np.linspace(optimum.kl[-1], furthest, 50)
        left.plot(beyond, optimum.at(beyond), ":", color="black", label="upper bound of the optimum")
    left.set_ylim(limits)
    left.set_ylabel(f"reward: {reward}", **LITERAL)
    left.spines[["top", "right"]].set_visible(False)
    finish_axes(left, "Reward over KL divergence", left.get_legend_handles_labels()[0])
    for ax in others:
        proxies = ax.twinx()
        draw_series(ax, series, gold, ": gold")
        draw_series(proxies, series, [one.proxy for one in series], ": proxy", linestyle="--")
        ax.set_ylabel(f"gold reward: {reward} (solid)", **LITERAL)
        proxies.set_ylabel("proxy reward (dashed)")
        handles = ax.get_legend_handles_labels()[0] + proxies.get_legend_handles_labels()[0]
        finish_axes(ax, "What was trained for, and what it stands in for", handles)
    return figure


# --- the command ------------------------------------------------------------------------------------------------------


def frontier(
    runs: list[str],
    ckpt_path: str,
    reward: str = "verse",
    texts: int = 1024,
    group_size: int = 64,
    prompts: str | None = None,
    max_new_tokens: int = 200,
    stop: str | None = None,
    output: str = "frontier.svg",
    seed: int = 1337,
    device: str = "auto",
) -> None:
    """Draw the reward of dpo and grpo runs against their KL divergence, beside best-of-n and the optimum.

    Best-of-n and the optimum are computed from texts of the start, group_size for each prompt. The folders
    checkpoints/NAME/version_* are one series, with its mean and standard deviation. The runs' val/gold_reward is drawn,
    or their val/reward, at their own validation prompts. Gao et al. 2022; Beirami et al. 2024.

    Args:
        runs: folders of runs; none is the run with the newest last.ckpt.
        ckpt_path: the checkpoint that the runs started from (--model.init_from).
        reward: what to draw: verse, the .ckpt of a reward model, or module:function or file.py:function.
        texts: how many to draw from the start, at temperature 1.
        group_size: how many of them for each prompt; the optimum's KL divergence can't exceed its logarithm.
        prompts: a file of JSON lines with a prompt each; null takes the headings of Tiny Shakespeare's first 90%.
        max_new_tokens: length of a text, as in the runs.
        stop: a string before which a text ends, as in the runs.
        output: the picture to write; its ending, such as .svg or .png, is the format.
        seed: of the sampling.
        device: auto, cpu, cuda, cuda:1, mps ...; auto takes the accelerator if there is one.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("frontier needs matplotlib: pip install 'tiny-lightning-gpt[plots]'") from None
    kind = Path(output).suffix[1:]
    if kind not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"output={output} must end in .svg, .png or .pdf")
    if group_size < 2 * LEAST_SAMPLES:
        raise ValueError(f"group_size={group_size} must be at least {2 * LEAST_SAMPLES}; 64 is usual")
    if texts < 2 * group_size:
        raise ValueError(f"texts={texts} must be at least {2 * group_size}, group_size={group_size} for two prompts")
    series = read_series(runs or [str(find_checkpoint("last").parents[1])], reward)
    net, tokenizer = load(ckpt_path, device)
    if not isinstance(net, GPT):
        raise ValueError(f"{ckpt_path} is a step of the lecture or an ensemble: dpo and grpo start from a GPT")
    found = prompts_or_headings(prompts, tokenizer, net.config.block_size - max_new_tokens)
    scorer = find_reward(reward, next(net.parameters()).device)
    stops = [] if stop is None else [stop]
    groups = texts // group_size
    rewards = rewards_of_texts(net, tokenizer, found, scorer, groups, group_size, max_new_tokens, stops, seed)
    span = np.ptp(rewards, 1).max()
    if not span:
        raise ValueError(f"the texts of each prompt all have the same reward {reward}: nothing can be gained")
    optimum = find_optimum(rewards, span * BETAS)
    buffer = io.BytesIO()
    draw(series, rewards, optimum, reward).savefig(buffer, format=kind)
    print(compare(series, optimum))
    print(f"The optimum is from {rewards.size:,} texts of {groups} prompts, up to a KL of {optimum.kl[-1]:.2f}.")
    atomic_write(Path(output), buffer.getvalue())
    print(os.path.relpath(output))
