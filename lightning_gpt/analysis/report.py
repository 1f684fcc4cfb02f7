"""lightning-gpt report: one self-contained HTML page about a run, or a comparison of several runs."""

import base64
import logging
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..checkpoint.io import atomic_write, find_checkpoint, load_net, read_verified
from ..data.corpus import TINY_SHAKESPEARE, find_files, read_files, slice_text
from ..errors import program_name
from ..model.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .figures import Curve

MAX_SAMPLES = 8  # per prompt, evenly spread over the run
MAX_TOKENS = 32  # in the figures of attention and of the prediction per layer


@dataclass
class Run:
    """The contents of a run's folder: curves and texts by tag, config, and the best readable checkpoint."""

    folder: Path
    name: str = ""  # set by name_runs
    curves: dict[str, "Curve"] = field(default_factory=dict)  # steps from 1, where Lightning counts from 0
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # steps from 1
    config: str = ""
    ckpt: Path | None = None
    checkpoint: dict[str, Any] | None = None
    seconds: float = math.nan  # from the first event to the last
    notes: list[str] = field(default_factory=list)  # what is missing and why

    @property
    def samples(self) -> dict[str, list[tuple[int, str]]]:
        return {tag: texts for tag, texts in self.texts.items() if tag.startswith("samples")}

    def last(self, tag: str) -> float:
        return self.curves[tag][-1][1] if self.curves.get(tag) else math.nan

    def best(self, tag: str) -> tuple[int, float]:
        """The step and the value of the minimum; (0, infinity) without the curve."""
        return min(self.curves.get(tag, []), key=lambda point: point[1], default=(0, math.inf))

    @property
    def steps(self) -> int:
        return max((curve[-1][0] for curve in self.curves.values() if curve), default=0)

    @property
    def settings(self) -> dict[str, str]:
        """The values of the config by dotted path, such as `model.n_layer`."""

        def leaves(value, path: str) -> Iterator[tuple[str, str]]:
            if isinstance(value, dict):
                for key, part in value.items():
                    yield from leaves(part, f"{path}.{key}" if path else str(key))
            else:
                yield path, str(value)

        return dict(leaves(yaml.safe_load(self.config) or {}, ""))


def find_run(path: str) -> Path:
    """Returns the folder of the run at path: the folder, the parent of its versions (the newest) or a file in it.

    Raises:
        FileNotFoundError: path does not exist.
        ValueError: path is not a run.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"the run {path} does not exist: give its folder, such as checkpoints/laptop/version_0")
    if folder.is_file():
        folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    is_run = [any(folder.glob(name)) for name in ("*tfevents*", "config.yaml", "checkpoints/*.ckpt")]
    versions = sorted(folder.glob("version_*"), key=lambda version: version.stat().st_mtime)
    if not any(is_run) and versions:
        return versions[-1]
    if not any(is_run):
        raise ValueError(f"{path} is not a run: it has no event files, no config.yaml and no checkpoints")
    return folder


def add_smooth_gap(curves: dict[str, "Curve"]) -> None:
    """Replaces the logged generalization gap, noisy as one train batch, with val/loss minus the smoothed train/loss."""
    from .figures import smooth

    val, train = curves.get("val/loss"), curves.get("train/loss")
    if val and train:
        smoothed = smooth(train, [step for step, _ in val])
        gaps = [(step, value - loss) for (step, value), (_, loss) in zip(val, smoothed, strict=True)]
        curves["val/generalization_gap"] = gaps


def read_run(folder: Path) -> Run:
    """Reads a run's folder; whatever cannot be read becomes a note."""
    run = Run(folder)
    for name in "tensorboard", "tensorflow":
        logging.getLogger(name).setLevel(logging.ERROR)
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    try:
        board.Reload()
    except Exception as error:  # a truncated file can raise anything
        run.notes.append(f"The event files could only be read in part: {str(error)[:200]}")
    tags, times = board.Tags(), list[float]()
    for tag in tags["scalars"]:
        events = board.Scalars(tag)
        run.curves[tag] = [(event.step + 1, event.value) for event in events if math.isfinite(event.value)]
        times += [event.wall_time for event in events]
    run.curves = {tag: curve for tag, curve in run.curves.items() if curve}
    add_smooth_gap(run.curves)
    run.seconds = max(times) - min(times) if times else math.nan
    for tag in tags["tensors"]:
        if tag.endswith("/text_summary"):
            # by step: unlike TensorBoard, EventAccumulator keeps a text that a resumed run has logged again
            texts = {e.step + 1: e.tensor_proto.string_val[0].decode(errors="replace") for e in board.Tensors(tag)}
            run.texts[tag.removesuffix("/text_summary")] = sorted(texts.items())
    if not run.curves:
        run.notes.append("No curves: there are no event files, or they are empty.")
    for name in "best", "last":
        path = folder / "checkpoints" / f"{name}.ckpt"
        if run.checkpoint is None and path.exists():
            try:
                run.checkpoint, run.ckpt = read_verified(path), path
            except (ValueError, OSError) as error:
                run.notes.append(f"{name}.ckpt cannot be read: {error}.")
    if run.checkpoint is None:
        run.notes.append("No checkpoint, so the net cannot be inspected.")
    try:
        run.config = (folder / "config.yaml").read_text(encoding="utf-8")
        yaml.safe_load(run.config)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        run.config = (run.checkpoint or {}).get("config", "")
        run.notes.append("No readable config.yaml" + (": this is the checkpoint's config." if run.config else "."))
    max_steps = run.settings.get("trainer.max_steps", "")
    if max_steps.isdecimal() and run.steps < int(max_steps):
        run.notes.append(f"Step {run.steps:,} of {int(max_steps):,}: the run was stopped or is still in progress.")
    return run


def name_runs(runs: list[Run]) -> None:
    """Names runs by the ends of their folders' paths, which are as long as needed to tell the runs apart."""
    parts, length = [run.folder.absolute().parts for run in runs], 2
    while len({path[-length:] for path in parts}) < len(runs):
        length += 1
    for run, path in zip(runs, parts, strict=True):
        run.name = "/".join(path[-length:])


def validation_passage(data: dict[str, Any], block_size: int, tokenizer) -> torch.Tensor:
    """Returns the first block_size + 1 tokens of the validation text from a run's data settings.

    Raises:
        OSError: the text no longer exists.
        ValueError: the text is not readable, or has characters that the tokenizer does not know.
    """
    if data.get("token_files"):
        file = data["token_files"].split(",")[1]
        return torch.from_numpy(np.fromfile(file, data["token_dtype"], block_size + 1).astype(np.int64))
    files = find_files(data["corpus"]) if data.get("corpus") else [TINY_SHAKESPEARE]
    keep_returns = "\r" in tokenizer.vocabulary

    def pieces() -> Iterator[str]:  # read twice, as the text may be larger than memory
        return read_files(files, keep_returns, Counter())

    split = data.get("split", 0.9)
    start = int((split if isinstance(split, float) else split[0]) * sum(map(len, pieces())))
    return tokenizer.encode("".join(slice_text(pieces(), start, start + block_size + 1)))


# --- the page ---------------------------------------------------------------------------------------------------------


def format_number(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "–"


def format_duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


def format_parameters(run: Run) -> str:
    weights = (run.checkpoint or {}).get("state_dict", {})
    size = sum(w.numel() for name, w in weights.items() if name.startswith("net."))
    if (run.checkpoint or {}).get("hyper_parameters", {}).get("tie_embeddings"):
        size -= weights["net.lm_head.weight"].numel()
    return f"{size / 1e6:.2f}M" if size >= 1e5 else f"{size:,}" if size else "–"


def run_hardware(run: Run) -> str:
    return run.texts.get("settings/hardware", [(0, "not recorded")])[-1][1]


def run_summary(run: Run) -> dict[str, str]:
    """The headline numbers of a run by label."""
    step, loss = run.best("val/loss")
    return {
        "best val/loss": format_number(loss),
        "at step": f"{step:,}" if step else "–",
        "last val/loss": format_number(run.last("val/loss")),
        "best bits per character": format_number(run.best("val/bpc")[1]),
        "last generalization gap": format_number(run.last("val/generalization_gap")),
        "steps": f"{run.steps:,}",
        "parameters": format_parameters(run),
        "tokens per second": format_number(run.last("perf/tokens_per_second"), 0),
        "duration": format_duration(run.seconds),
    }


def sample_parts(text: str) -> tuple[str, str]:
    """Splits a logged sample into its text and the remarks below it."""
    found = re.fullmatch(r"```\n(.*?)\n```\s*(.*)", text, re.S)
    return (found[1], found[2]) if found else (text, "")


def spread_samples(texts: list[tuple[int, str]]) -> list[tuple[int, str, str]]:
    """Step, text and remarks of at most MAX_SAMPLES of the logged samples."""
    chosen = {round(i * (len(texts) - 1) / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES)}
    return [(texts[i][0], *sample_parts(texts[i][1])) for i in sorted(chosen)]


def save_figure(folder: Path, name: str, drawn: "Figure", caption: str = "", kind: str = "png") -> dict[str, Any]:
    """Writes drawn as a PNG or SVG file; returns what the template's `figure` shows: the same bytes, or an error.

    The title is text on the page. It is split at a colon into a heading and a caption.
    """
    from .figures import render

    title, _, rest = drawn.get_suptitle().partition(": ")
    try:
        data = render(drawn, kind)
    except Exception as error:  # matplotlib can raise anything; the rest of the page is still useful
        return {"name": name, "error": str(error)[:200]}
    atomic_write(folder / f"{name}.{kind}", data)
    source = f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{base64.b64encode(data).decode()}"
    caption = caption or rest[:1].upper() + rest[1:]
    return {"title": title, "source": source, "caption": caption, "wide": kind == "png" and drawn.get_figwidth() > 7}


def varies(curve: "Curve") -> bool:
    """Whether a chart of the curve says more than a number."""
    return len({value for _, value in curve}) > 1


def curve_figures(run: Run, folder: Path) -> Iterator[dict[str, Any]]:
    from .figures import MIN_SMOOTHED, draw_curves

    ratios = [tag for tag in run.curves if tag.startswith("update_ratio/")]
    batch = "Train: one batch per point (faint), with dropout if enabled. The line is smoothed: at each step, a line "
    batch += f"over log(step) is fitted to the nearest {MIN_SMOOTHED} points (long runs: a tenth, short runs: half)."
    gap = "val/loss minus the smoothed train/loss. A rising gap means overfitting."
    usual = "About 0.001 is usual for AdamW; Muon takes larger steps."
    for name, tags, title, unit, caption in (
        ("loss", ["train/loss", "val/loss"], "Loss", "nats per token", batch),
        ("gap", ["val/generalization_gap"], "Generalization gap", "nats per token", gap),
        ("rates", ["train/lr", "train/muon_lr"], "Learning rate", "learning rate", ""),
        ("gradient", ["train/grad_norm"], "Gradient norm", "norm before clipping", ""),
        ("ratios", ratios, "Update ratio per layer", "|update| / |weights|", usual),
        ("speed", ["perf/tokens_per_second"], "Speed", "tokens per second", ""),
        ("copies", ["samples/longest_copy"], "Longest copied passage", "tokens", "Verbatim from the training text."),
    ):
        curves = {tag.removeprefix("update_ratio/"): run.curves[tag] for tag in tags if tag in run.curves}
        if any(map(varies, curves.values())):
            values = [value for curve in curves.values() for _, value in curve]
            log = name == "ratios" and 0 < 10 * min(values) < max(values)
            drawn = draw_curves(curves, title, unit, log, smoothed=["train/loss"], minimum=["val/loss"])
            yield save_figure(folder, name, drawn, caption, "svg")


def comparison_figures(runs: list[Run], folder: Path) -> Iterator[dict[str, Any]]:
    from .figures import draw_curves

    for tag, title, unit in (
        ("val/loss", "Validation loss", "nats per token"),
        ("train/loss", "Train loss, smoothed", "nats per token"),
        ("val/generalization_gap", "Generalization gap", "nats per token"),
        ("perf/tokens_per_second", "Speed", "tokens per second"),
        ("samples/longest_copy", "Longest copied passage", "tokens"),
    ):
        curves = {run.name: run.curves.get(tag, []) for run in runs}  # an empty one keeps the colors of the runs
        if any(map(varies, curves.values())):
            smoothed, minimum = [curves if tag == name else () for name in ("train/loss", "val/loss")]
            drawn = draw_curves(curves, title, unit, smoothed=smoothed, minimum=minimum)
            yield save_figure(folder, tag.replace("/", "_"), drawn, kind="svg")


def inspect_net(run: Run, folder: Path) -> dict[str, Any]:
    """Losses and figures of the run's checkpoint on the start of the validation text, or an error."""
    from .figures import figures, loss_color, max_loss
    from .probes import token_label, token_losses

    if run.ckpt is None or run.checkpoint is None:
        return {}
    try:
        net, tokenizer = load_net(run.ckpt)
        if not isinstance(net, GPT):
            raise ValueError("the figures need a GPT, and this net is a lecture step")
        ids = validation_passage(run.checkpoint["datamodule_hyper_parameters"], net.config.block_size, tokenizer)
        if len(ids) < 2:
            raise ValueError("the validation text has fewer than two tokens")
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    drawn = list[dict[str, Any]]()
    try:
        for name, figure in figures(net, tokenizer, ids, MAX_TOKENS):
            if name != "loss_per_character":  # the page has this one as text
                drawn.append(save_figure(folder, name, figure))
    except Exception as error:  # matplotlib can raise anything
        drawn.append({"name": "after these", "error": str(error)[:200]})
    losses, vmax = token_losses(net, ids), max_loss(len(tokenizer))
    labels = [token_label(tokenizer, i) for i in ids[1:].tolist()]
    return {
        "mean": losses.mean().item(),
        "tokens": [(label, loss, loss_color(loss, vmax)) for label, loss in zip(labels, losses.tolist(), strict=True)],
        "legend": [
            (loss, f"1 in {math.exp(loss):,.0f}", loss_color(loss, vmax))
            for loss in range(0, math.ceil(vmax), math.ceil(vmax / 8))
        ],
        "uniform": math.log(len(tokenizer)),
        "vocab_size": len(tokenizer),
        "figures": drawn,
    }


def shell_commands(run: Run) -> list[tuple[str, str]]:
    """What a command does, and the command: to train, validate and generate."""
    command = program_name()
    commands = [("train", f"{command} fit --config {shlex.quote(os.path.relpath(run.folder / 'config.yaml'))}")]
    if run.ckpt is not None:
        path = shlex.quote(os.path.relpath(run.ckpt))
        commands += [(verb, f"{command} {verb} --ckpt_path {path}") for verb in ("validate", "generate")]
    return commands


def single_page(run: Run, folder: Path) -> dict[str, Any]:
    """The template's variables for one run."""
    return {
        "cards": run_summary(run),
        "curves": list(curve_figures(run, folder)),
        "samples": {tag: spread_samples(texts) for tag, texts in run.samples.items()},
        "inside": inspect_net(run, folder),
        "hardware": run_hardware(run),
        "commands": shell_commands(run),
    }


def comparison_page(runs: list[Run], folder: Path) -> dict[str, Any]:
    """The template's variables for several runs."""
    columns = [run_summary(run) for run in runs]
    settings = [run.settings | {"hardware": run_hardware(run)} for run in runs]
    names = sorted(name for name in set().union(*settings) if len({s.get(name) for s in settings}) > 1)
    return {
        "summary": {row: [column[row] for column in columns] for row in columns[0]},
        "commands": [(run.name, shell_commands(run)[0][1]) for run in runs],
        "inside": {},
        "hardware": " / ".join(dict.fromkeys(map(run_hardware, runs))),
        "settings": {name: [s.get(name, "–") for s in settings] for name in names},
        "curves": list(comparison_figures(runs, folder)),
        "samples": [[sample_parts(texts[-1][1]) for texts in run.samples.values()] for run in runs],
    }


def report(runs: list[str], output: str | None = None) -> None:
    """Writes one HTML page about a run, or about several side by side, that needs no network, and its figures as PNGs.

    Args:
        runs: folders of runs; none is the run with the newest last.ckpt.
        output: folder of report.html; null is `report` in the run's folder, or in the common parent of several runs.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, PackageLoader
    except ImportError:
        raise ValueError("report needs matplotlib and jinja2: pip install 'tiny-lightning-gpt[plots]'") from None
    paths = runs or [str(find_checkpoint("last").parents[1])]
    found = [read_run(folder) for folder in dict.fromkeys(Path(os.path.abspath(find_run(path))) for path in paths)]
    name_runs(found)
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    parent = os.path.commonpath([run.folder for run in found])
    folder = Path(output) if output else Path(parent) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    best = min(found, key=lambda run: run.best("val/loss")[1])
    content = single_page(found[0], folder) if len(found) == 1 else comparison_page(found, folder)
    loader = PackageLoader(__package__, "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("report.html.jinja").render(title=title, runs=found, best=best, **content)
    atomic_write(folder / "report.html", html.encode(errors="replace"))
    print(os.path.relpath(folder / "report.html"))
