"""Figures of a GPT's activations and of a run's curves. Needs matplotlib (the extra `plots`).

Shapes   T time (tokens) · C channels · H heads · V vocabulary · L layers
"""

import io
import math
import warnings
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch import Tensor
from torch.nn import functional as F

from ..data.tokenizers import Tokenizer
from ..model.gpt import GPT
from .probes import attention_maps, position_similarity, residual_streams, token_label, token_losses

warnings.filterwarnings("ignore", "Glyph .* missing from font")  # no installed font may have the characters of a text
DPI = 100
LITERAL: dict = {"parse_math": False}  # for tokens and names: text between dollar signs is not a formula
MAX_EMBEDDINGS = 300  # labels overlap with more
MIN_EXPLAINED = 0.15  # of the variance; random embeddings of 65 characters reach 0.09
LOSS_COLOR, PROB_COLOR, ATTENTION_COLOR = "#ff8866", "#4bb062", "#08519c"  # AA with text, also inverted


def opacity_scale(color: str) -> LinearSegmentedColormap:
    """A color scale from transparent to color: it works on a light and on a dark page."""
    return LinearSegmentedColormap.from_list(color, [f"{color}00", f"{color}ff"])


def loss_color(loss: float, vmax: float) -> str:
    """The CSS color of a loss from 0 to vmax: a page and `draw_losses` share this scale."""
    return f"{LOSS_COLOR}{round(255 * min(loss / vmax, 1)):02x}"


def max_loss(vocab_size: int) -> float:
    """The end of the scale of losses: a little above the loss of a uniform guess."""
    return math.log(vocab_size) + 1


def render(figure: Figure, format: str) -> bytes:
    """The figure without its title as the bytes of a PNG or SVG file with a transparent background."""
    figure.suptitle("")
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):  # text as text, and the same bytes every time
        metadata = {"Date": None} if format == "svg" else {}
        figure.savefig(buffer, format=format, transparent=True, bbox_inches="tight", pad_inches=0.04, metadata=metadata)
    return buffer.getvalue()


def new_figure(title: str, width: float, height: float, narrow: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.suptitle(title.replace(": ", "\n", 1) if narrow else title, fontsize=9 if narrow else 11)
    return figure, figure.subplots()


def draw_attention(maps: Tensor, labels: Sequence[str], title: str, narrow: bool = False) -> Figure:
    """One panel per head of maps (H, queries T, keys T)."""
    H, T = maps.shape[:2]
    columns = 1 if narrow else H if H <= 3 else math.ceil(math.sqrt(H))
    rows, side, gap = math.ceil(H / columns), max(0.14 * T, 1.0), 0.4  # in inches
    width, height = columns * (side + gap) + gap, rows * (side + gap) + 0.45
    width = width if narrow else max(width, 7)
    figure = Figure(figsize=(width, height), dpi=DPI)  # constrained layout would take twice as long
    if narrow:
        figure.suptitle(title, fontsize=11, y=1 - 0.05 / height)
    else:
        figure.suptitle(f"{title}: each row is a query; the bluer a key, the more weight it has", fontsize=13)
    for h in range(H):
        left, top = gap + h % columns * (side + gap), 0.65 + h // columns * (side + gap)
        rect = (left / figure.get_figwidth(), 1 - (top + side) / height, side / figure.get_figwidth(), side / height)
        panel = figure.add_axes(rect)
        panel.imshow(maps[h].float().cpu().numpy(), cmap=opacity_scale(ATTENTION_COLOR), norm=PowerNorm(0.5, 0, 1))
        panel.set_title(f"head {h + 1}", fontsize=11, pad=3)
        panel.set_xticks([])
        panel.set_yticks([])
        for t, text in enumerate(labels):  # ticks would take twice as long
            panel.text(t, T + 0.35, text[:4], ha="center", fontsize=9, **LITERAL)
            panel.text(-0.7, t, text[:4], ha="right", va="center", fontsize=9, **LITERAL)
    return figure


def write_cell(ax: Axes, x: int, y: int, text: str) -> None:
    ax.text(x, y, text[:4], ha="center", va="center", fontsize=9 if len(text) == 1 else 5, **LITERAL)


def draw_losses(values: Tensor, labels: Sequence[str], vmax: float, title: str, narrow: bool = False) -> Figure:
    """The text in rows of tokens, shaded by the losses values (T,) in nats from 0 to vmax; one label per value."""
    T, columns = len(values), 16 if narrow else 32
    rows = math.ceil(T / columns)
    grid = torch.full((rows * columns,), math.nan)
    grid[:T] = values.float().cpu()
    title = f"{title}: {values.mean():.3f} nats on average; the redder a token, the higher its loss"
    figure, ax = new_figure(title, 4 if narrow else 7.6, 0.27 * rows + 0.8, narrow)
    image = ax.imshow(
        grid.view(rows, columns).numpy(), cmap=opacity_scale(LOSS_COLOR), vmin=0, vmax=vmax, aspect="auto"
    )
    for t, text in enumerate(labels):
        write_cell(ax, t % columns, t // columns, text)
    ax.set_xticks([])
    ax.set_yticks(range(rows), [str(1 + row * columns) for row in range(rows)], fontsize=7)
    figure.colorbar(image, ax=ax, aspect=8, pad=0.01, label="nats")
    return figure


def draw_lens(
    net: GPT, streams: Tensor, ids: Tensor, labels: Sequence[str], tokenizer, title: str, narrow: bool = False
) -> Figure:
    """The head's prediction from the residual stream after each layer (logit lens).

    Args:
        streams: (L + 1, T, C).
        ids, labels: T + 1 tokens, the input and the last target.
    """
    with torch.no_grad():
        probs = net.logits(streams).float().softmax(-1).cpu()  # (L + 1, T, V)
    predicted, target_probs = probs.argmax(-1).tolist(), probs[:, torch.arange(len(ids) - 1), ids[1:].cpu()]
    L, T = len(probs) - 1, len(ids) - 1
    title = f"{title}: the most likely next token; the greener, the more probable the true one"
    figure, ax = new_figure(title, max(4.5 if narrow else 7.6, 0.25 * T + 2), 0.25 * L + 1.65, narrow)
    image = ax.imshow(
        target_probs.numpy(), cmap=opacity_scale(PROB_COLOR), vmin=0, vmax=1, aspect="auto", origin="lower"
    )
    for row, tokens in enumerate(predicted):
        for t, i in enumerate(tokens):
            write_cell(ax, t, row, token_label(tokenizer, i))
    ax.set_yticks(range(L + 1), ["embedding", *(f"layer {i}" for i in range(1, L + 1))], fontsize=8)
    ax.set_xticks(range(T), labels[:-1], fontsize=8, **LITERAL)
    ax.set_xlabel("input token", fontsize=8)
    above = ax.secondary_xaxis("top")
    above.set_xticks(range(T), labels[1:], fontsize=8, **LITERAL)
    above.set_xlabel("true next token", fontsize=8)
    for side in ax, above:
        side.tick_params(length=0)
    figure.colorbar(image, ax=ax, aspect=12, pad=0.01, label="probability of the true token")
    return figure


CLASS_COLORS = {"vowels": "tab:red", "consonants": "tab:blue", "capitals": "tab:green", "others": "tab:gray"}


def char_class(text: str) -> str:
    if not text[:1].isalpha():
        return "others"
    return "capitals" if text[0].isupper() else "vowels" if text[0] in "aeiou" else "consonants"


def principal_plane(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first MAX_EMBEDDINGS rows of weight (V, C) on two principal components (V, 2), and their shares of the
    variance (2)."""
    x = weight.detach().float().cpu()[:MAX_EMBEDDINGS]
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    s, u = F.pad(s, (0, max(0, 2 - len(s)))), F.pad(u, (0, max(0, 2 - u.size(1))))
    return u[:, :2] * s[:2], s[:2].square() / s.square().sum().clamp(min=1e-30)


def draw_embeddings(
    plane: Tensor, explained: Tensor, labels: Sequence[str], title: str, narrow: bool = False
) -> Figure:
    """Token embeddings on their first two principal components: what `principal_plane` returns."""
    width, height = (4.5, 4.5) if narrow else (7, 6)
    figure, ax = new_figure(f"{title}: first two principal components", width, height, narrow)
    ax.scatter(plane[:, 0].numpy(), plane[:, 1].numpy(), s=0)  # sets the limits of the axes
    for (a, b), text in zip(plane.tolist(), labels, strict=False):
        ax.text(a, b, text, ha="center", va="center", fontsize=10, color=CLASS_COLORS[char_class(text)], **LITERAL)
    ax.set_xlabel(f"first component, {explained[0]:.0%} of the variance", fontsize=9)
    ax.set_ylabel(f"second component, {explained[1]:.0%}", fontsize=9)
    for name, color in CLASS_COLORS.items():
        ax.scatter([], [], color=color, label=name, s=20)
    ax.legend(fontsize=8, loc="best", framealpha=0.6)
    ax.tick_params(labelsize=7)
    return figure


def draw_positions(similarity: Tensor, title: str) -> Figure:
    """Cosine similarities (T, T) of all pairs of positions."""
    figure, ax = new_figure(title, 5.6, 4.8)
    image = ax.imshow(similarity.cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xlabel("position in the context", fontsize=9)
    ax.set_ylabel("position in the context", fontsize=9)
    ax.tick_params(labelsize=8)
    figure.colorbar(image, ax=ax, label="cosine")
    return figure


Curve = list[tuple[int, float]]  # (step, value)
MIN_SMOOTHED = 8  # points


def smooth(curve: Curve, steps: Collection[int]) -> Curve:
    """The curve without its noise, at the given steps.

    Each value is that of a line over log(step), fitted to the nearest tenth of the points or, if that is more, to the
    nearest MIN_SMOOTHED, but never to more than half of them: a line does not fit a whole run. Unlike a mean, a line
    does not lag behind where the loss falls fast.
    """
    known, values = np.array(curve).T
    count = max(1, min(max(MIN_SMOOTHED, len(curve) // 10), len(curve) // 2))
    fitted = []
    for step in steps:
        nearest = np.argsort(abs(known - step), kind="stable")[:count]
        line = np.polyfit(np.log(known[nearest] / step), values[nearest], min(1, count - 1))
        fitted.append((step, float(line[-1])))
    return fitted


def draw_curves(
    curves: dict[str, Curve],
    title: str,
    unit: str,
    log: bool = False,
    smoothed: Collection[str] = (),
    minimum: Collection[str] = (),
) -> Figure:
    """One line per curve over steps.

    Args:
        smoothed: names of the curves that are shown smoothed, in front of their faint points.
        minimum: names of the curves whose minimum is marked.
    """
    figure, ax = new_figure(title, 5, 3)
    few = len(curves) <= 4
    palette = colormaps["Dark2" if few else "plasma"]
    for i, (name, points) in enumerate(curves.items()):
        if not points:  # it still counts for the colors
            continue
        color = palette(i if few else 0.6 * i / (len(curves) - 1))  # the rest of plasma is too light
        if name in smoothed:
            ax.plot(*zip(*points, strict=True), color=color, alpha=0.3, linewidth=1)
            shown = points[:: max(1, len(points) // 200)]
            points = smooth(points, [step for step, _ in shown])
        label = f" {name}" if name.startswith("_") else name  # a legend omits labels that start with an underscore
        marker = "o" if len(points) < 9 else None
        ax.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.8, marker=marker, markersize=3)
        if name in minimum:
            step, value = min(points, key=lambda point: point[1])
            ax.plot(step, value, "o", color=color, markersize=7, fillstyle="none")
            ax.annotate(f"{value:.3f}", (step, value), (0, 7), textcoords="offset points", ha="right")
    if log:
        ax.set_yscale("log")
    else:
        whole = all(float(value).is_integer() for points in curves.values() for _, value in points)
        ax.yaxis.set_major_locator(
            MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)
        )  # no fractions of a token
    if max(value for points in curves.values() for _, value in points) >= 1000:
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_xlabel("step")
    ax.set_ylabel(unit)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        columns = max(1, min(4, 60 // (max(map(len, curves)) + 6)))
        legend = figure.legend(loc="outside upper left", fontsize=9, frameon=False, ncols=columns)
        for text in legend.get_texts():
            text.set(**LITERAL)
    return figure


def figures(
    net: GPT, tokenizer: Tokenizer, ids: Tensor, shown: int, narrow: bool = False
) -> Iterator[tuple[str, Figure]]:
    """Yields the name and the figure of each view of the net on ids (T + 1,), T <= block_size.

    Embeddings of which two components explain less than MIN_EXPLAINED and the fixed angles of RoPE have no figure.

    Args:
        net: in eval mode; it is not changed.
        shown: number of tokens in the figures of attention and of the prediction per layer.
        narrow: whether the figures must be legible at 350 pixels, the width of TensorBoard's cards.
    """
    labels = [token_label(tokenizer, i) for i in ids.tolist()]
    part = ids[: shown + 1]
    losses, vmax = token_losses(net, ids), max_loss(len(tokenizer))
    yield "loss_per_character", draw_losses(losses, labels[1:], vmax, "Loss per token", narrow)
    for i, maps in enumerate(attention_maps(net, part[None, :-1]), start=1):
        yield f"attention_layer_{i:02}", draw_attention(maps, labels[: len(part) - 1], f"Attention, layer {i}", narrow)
    streams = residual_streams(net, part[None, :-1])
    lens = draw_lens(net, streams, part, labels[: len(part)], tokenizer, "Prediction per layer", narrow)
    yield "prediction_per_layer", lens
    plane, explained = principal_plane(net.wte.weight)
    if explained.sum() >= MIN_EXPLAINED:
        names = [token_label(tokenizer, i) for i in range(len(plane))]
        yield "token_embeddings", draw_embeddings(plane, explained, names, "Token embeddings", narrow)
    if net.config.position == "learned":
        title = "Cosine similarity of the learned positions"
        yield "position_similarity", draw_positions(position_similarity(net), title)
