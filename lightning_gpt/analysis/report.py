"""lightning-gpt report: what a run was and what became of it, as one page that opens from the disk. No Lightning."""

import base64
import io
import logging
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
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

SAMPLES_SHOWN = 8  # of each prompt, spread over the run
SHOWN = 32  # characters in the figures of attention


@dataclass
class Run:
    """What a run's folder holds: curves and texts by tag, config, and its best checkpoint."""

    folder: Path
    curves: dict[str, "Curve"] = field(default_factory=dict)  # steps from 1, where Lightning counts from 0
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # steps from 1
    config: str = ""
    ckpt: Path | None = None
    saved: dict[str, Any] | None = None
    seconds: float = math.nan  # from the first event to the last
    notes: list[str] = field(default_factory=list)  # what is missing, and why

    @property
    def name(self) -> str:
        return "/".join(self.folder.absolute().parts[-2:])

    def last(self, tag: str) -> float:
        return self.curves[tag][-1][1] if self.curves.get(tag) else math.nan

    def least(self, tag: str) -> float:
        return min((value for _, value in self.curves.get(tag, [])), default=math.nan)

    @property
    def steps(self) -> int:
        return max((curve[-1][0] for curve in self.curves.values() if curve), default=0)

    @property
    def settings(self) -> dict[str, str]:
        """The config's leaves by their path, `model.n_layer`."""

        def leaves(value, path: str) -> Iterator[tuple[str, str]]:
            if isinstance(value, dict):
                for key, part in value.items():
                    yield from leaves(part, f"{path}.{key}" if path else str(key))
            else:
                yield path, str(value)

        return dict(leaves(yaml.safe_load(self.config) or {}, ""))


def find_run(path: str) -> Path:
    """The run's folder that is meant by itself, by the folder of its versions or by a file in it.

    Raises:
        OSError: there is no such thing. ValueError: it is no run's.
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
        raise ValueError(f"{path} is no run's folder: it has no event files, no config.yaml and no checkpoints")
    return folder


def read_run(folder: Path) -> Run:
    """All there is in a run's folder; what can't be read becomes a note."""
    run = Run(folder)
    for name in "tensorboard", "tensorflow":
        logging.getLogger(name).setLevel(logging.ERROR)
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    try:
        board.Reload()
    except Exception as error:  # whatever half a file makes the reader say
        run.notes.append(f"The event files could be read in part only: {str(error)[:200]}")
    tags, times = board.Tags(), list[float]()
    for tag in tags["scalars"]:
        events = board.Scalars(tag)
        run.curves[tag] = [(event.step + 1, event.value) for event in events if math.isfinite(event.value)]
        times += [event.wall_time for event in events]
    run.curves = {tag: curve for tag, curve in run.curves.items() if curve}
    run.seconds = max(times) - min(times) if times else math.nan
    for tag in tags["tensors"]:
        if tag.endswith("/text_summary"):
            run.texts[tag.removesuffix("/text_summary")] = [
                (event.step + 1, event.tensor_proto.string_val[0].decode(errors="replace"))
                for event in board.Tensors(tag)
            ]
    if not run.curves:
        run.notes.append("No curves: there are no event files, or nothing is in them yet.")
    for name in "best", "last":
        path = folder / "checkpoints" / f"{name}.ckpt"
        if run.saved is None and path.exists():
            try:
                run.saved, run.ckpt = read_verified(path), path
            except (ValueError, OSError) as error:
                run.notes.append(f"No look at {name}.ckpt: {error}.")
    if run.saved is None:
        run.notes.append("No checkpoint, so nothing from inside the net.")
    try:
        run.config = (folder / "config.yaml").read_text(encoding="utf-8")
        yaml.safe_load(run.config)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        run.config = (run.saved or {}).get("config", "")
        run.notes.append("No config.yaml that can be read" + (": this is the checkpoint's." if run.config else "."))
    most = run.settings.get("trainer.max_steps", "")
    if most.isdecimal() and run.steps < int(most):
        run.notes.append(f"Step {run.steps:,} of {int(most):,}: the run was stopped, or is still going.")
    return run


def validation_passage(data: dict[str, Any], block_size: int, tokenizer) -> torch.Tensor:
    """The first block_size + 1 tokens of the validation text that a run's data settings name.

    Raises:
        OSError, ValueError: the text is not there any more, or is another one.
    """
    if data.get("token_files"):
        file = data["token_files"].split(",")[1]
        return torch.from_numpy(np.fromfile(file, data["token_dtype"], block_size + 1).astype(np.int64))
    files = find_files(data["corpus"]) if data.get("corpus") else [TINY_SHAKESPEARE]
    keep_returns = "\r" in tokenizer.vocabulary

    def pieces() -> Iterator[str]:  # read twice rather than held: a text may be larger than memory
        return read_files(files, keep_returns, Counter())

    split = data.get("split", 0.9)
    start = int((split if isinstance(split, float) else split[0]) * sum(map(len, pieces())))
    return tokenizer.encode("".join(slice_text(pieces(), start, start + block_size + 1)))


# --- the page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5d6778; --line: #e3e6ec; --accent: #2458c5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 12px; }
h3 { font-size: 16px; margin: 20px 0 8px; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 12px; margin: 20px 0; }
.card, figure, .box { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px; margin: 0; }
.card b { display: block; font-size: 19px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 12px; }
.wide { overflow-x: auto; margin: 12px 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; margin: 0; }
.text { font: 16px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; max-width: none; }
.text span { padding: 3px 0; border-radius: 2px; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th { white-space: nowrap; }
.note { border-left: 4px solid #d29a1c; background: #fff8e6; padding: 8px 12px; }
summary { cursor: pointer; color: var(--accent); }
.title { display: none; }
@media (max-width: 700px) {
  .wide img { max-width: none; width: max(100%, 720px); }
  .wide table { min-width: 640px; }
  .wide .title { display: block; position: sticky; left: 0; }
}
"""


class Page:
    """HTML as it grows; every figure is a PNG in the folder and, the same bytes, in the page."""

    def __init__(self, title: str, folder: Path):
        self.title, self.folder, self.parts = title, folder, list[str]()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, html: str) -> None:
        self.parts.append(html)

    def figure(self, name: str, drawn: "Figure", caption: str = "", wide: bool = False) -> None:
        buffer = io.BytesIO()
        try:
            drawn.savefig(buffer, format="png", dpi=100 if wide else 160)
        except Exception as error:  # whatever matplotlib says; the page has more to show
            self.no_figure(name, error)
            return
        atomic_write(self.folder / f"{name}.png", buffer.getvalue())
        title = drawn.get_suptitle()
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        source = base64.b64encode(buffer.getvalue()).decode()
        kind, above = "", ""
        if wide and drawn.get_figwidth() > 6:  # on a phone larger than the page, so its title is words as well
            kind, above = ' class="wide"', f'<figcaption class="title">{escape(title)} (scroll sideways)</figcaption>'
        self.add(
            f'<figure{kind}>{above}<img alt="{escape(title)}" src="data:image/png;base64,{source}">{below}</figure>'
        )

    def no_figure(self, name: str, error: Exception) -> None:
        self.add(f"<p class=note>No figure {escape(name)}: {escape(str(error)[:200])}</p>")

    def write(self) -> Path:
        path = self.folder / "report.html"
        html = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{escape(self.title)}</title>'
            f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(self.parts) + "\n</main></body></html>\n"
        )
        atomic_write(path, html.encode(errors="replace"))
        return path


def format_number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def format_duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    return (
        f"{hours} h {minutes % 60} min"
        if hours
        else f"{minutes} min {seconds % 60:.0f} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def format_parameters(run: Run) -> str:
    weights = (run.saved or {}).get("state_dict", {})
    size = sum(w.numel() for name, w in weights.items() if name.startswith("net."))
    if (run.saved or {}).get("hyper_parameters", {}).get("tie_embeddings"):
        size -= weights["net.lm_head.weight"].numel()
    return f"{size / 1e6:.2f}M" if size >= 1e5 else f"{size:,}" if size else "–"


def run_hardware(run: Run) -> str:
    return run.texts.get("run/hardware", [(0, "not recorded")])[-1][1]


def run_summary(run: Run) -> dict[str, str]:
    """What one wants to know first."""
    return {
        "best val/loss": format_number(run.least("val/loss"), 4),
        "last val/loss": format_number(run.last("val/loss"), 4),
        "best bits per character": format_number(run.least("val/bpc")),
        "gap to the train loss, last": format_number(run.last("val/generalization_gap")),
        "steps": f"{run.steps:,}",
        "parameters": format_parameters(run),
        "tokens per second": format_number(run.last("perf/tokens_per_second"), 0),
        "first to last event": format_duration(run.seconds),
    }


def sample_parts(text: str) -> tuple[str, str]:
    """A logged sample's own words, and what is said of it below."""
    found = re.fullmatch(r"```\n(.*?)\n```\s*(.*)", text, re.S)
    return (found[1], found[2]) if found else (text, "")


def add_curves(page: Page, run: Run) -> None:
    from .figures import draw_curves

    def some(*tags: str) -> dict[str, "Curve"]:
        return {tag: run.curves[tag] for tag in tags if tag in run.curves}

    ratios = some(*(tag for tag in run.curves if tag.startswith("update_ratio/")))
    groups = [
        (
            "loss",
            "Loss",
            "nats per token",
            some("train/loss", "val/loss"),
            "The train loss is of one batch, with dropout if there is any.",
        ),
        (
            "gap",
            "Gap: validation less training",
            "nats",
            some("val/generalization_gap"),
            "Where it rises, the text is learnt by heart.",
        ),
        ("rates", "Learning rates", "rate", some("train/lr", "train/muon_lr"), ""),
        ("gradient", "Norm of the gradient", "norm, before it is clipped", some("train/grad_norm"), ""),
        (
            "ratios",
            "Update over weights, per layer",
            "share",
            {tag[13:]: c for tag, c in ratios.items()},
            "AdamW: 0.001 or so.",
        ),
        ("speed", "Speed", "tokens per second", some("perf/tokens_per_second"), ""),
        (
            "copies",
            "Longest run copied",
            "tokens",
            some("samples/longest_copy"),
            "Word for word from the training text.",
        ),
    ]
    page.add("<h2>Curves</h2><div class=grid>")
    for name, title, unit, curves, caption in groups:
        if curves:
            positive = all(value > 0 for curve in curves.values() for _, value in curve)
            page.figure(name, draw_curves(curves, title, unit, log=name == "ratios" and positive), caption)
    page.add("</div>")


def add_samples(page: Page, run: Run, shown: int = SAMPLES_SHOWN) -> None:
    samples = {tag: texts for tag, texts in run.texts.items() if tag.startswith("samples")}
    if not samples:
        return
    page.add("<h2>The same prompts over time</h2>")
    for tag, texts in samples.items():
        page.add(f"<h3>{escape(tag.removeprefix('samples').strip('/') or 'samples')}</h3><div class=grid>")
        chosen = {round(i * (len(texts) - 1) / max(1, shown - 1)) for i in range(shown)}
        for step, text in (texts[i] for i in sorted(chosen)):
            words, below = sample_parts(text)
            page.add(
                f"<div class=box><p class=soft>step {step:,}</p><pre>{escape(words)}</pre>"
                f"<p class=soft>{escape(below)}</p></div>"
            )
        page.add("</div>")


def add_inside(page: Page, run: Run) -> None:
    """Figures of the checkpoint that read() found."""
    from .figures import figures
    from .probes import token_label, token_losses

    if run.ckpt is None or run.saved is None:
        return
    try:
        net, tokenizer = load_net(run.ckpt)
        if not isinstance(net, GPT):
            raise ValueError("the figures are of a GPT, and this is a lecture_step of the lecture")
        ids = validation_passage(run.saved["datamodule_hyper_parameters"], net.config.block_size, tokenizer)
        if len(ids) < 2:
            raise ValueError("the validation text is gone")
    except (ValueError, OSError) as error:
        page.add(f"<p class=note>No look inside the net: {escape(str(error))}</p>")
        return
    page.add(f"<h2>Inside {escape(run.ckpt.name)}</h2><p>It reads the beginning of the validation text.</p>")
    values, worst = token_losses(net, ids), math.log(len(tokenizer)) + 1
    letters = []
    for i, value in zip(ids[1:].tolist(), values.tolist(), strict=True):
        red = 100 - 45 * min(1.0, value / worst)
        colour = f"background:hsl(12 85% {red:.0f}%)"
        sign = token_label(tokenizer, i)
        wrap = "<br>" if sign == "↵" else "<wbr>" if sign == "␣" else ""
        letters.append(f'<span style="{colour}" title="{value:.2f} nats">{escape(sign)}</span>{wrap}')
    page.add(
        f"<h3>Which letters surprise it: {values.mean():.3f} nats on average</h3>"
        f'<div class="box text">{"".join(letters)}</div>'
    )
    try:
        for name, drawn in figures(net, tokenizer, ids, SHOWN):
            page.figure(name, drawn, wide=True)
    except Exception as error:  # whatever matplotlib says
        page.no_figure("after these", error)


def add_repeat(page: Page, run: Run) -> None:
    config, me = os.path.relpath(run.folder / "config.yaml"), program_name()
    commands = [f"{me} fit --config {shlex.quote(config)}"]
    if run.ckpt is not None:
        path = shlex.quote(os.path.relpath(run.ckpt))
        commands += [f"{me} validate --ckpt_path {path}", f"{me} generate --ckpt_path {path}"]
    page.add(
        f"<h2>Hardware and config</h2><p>{escape(run_hardware(run))}</p><h3>To repeat it, measure it, hear it</h3>"
        f"<div class=box><pre>{escape(chr(10).join(commands))}</pre></div><h3>Config</h3><details class=box>"
        f"<summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
    )


def add_comparison(page: Page, runs: list[Run]) -> None:
    from .figures import draw_curves

    columns = [run_summary(run) | {"hardware": run_hardware(run)} for run in runs]
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{escape(row)}</th>" + "".join(f"<td>{escape(column[row])}</td>" for column in columns) + "</tr>"
        for row in columns[0]
    )
    page.add(
        f'<div class="box wide"><table><tr><th></th>{head}</tr>{rows}</table></div><h2>Curves</h2><div class=grid>'
    )
    for tag, title, unit in (
        ("val/loss", "Validation loss", "nats per token"),
        ("train/loss", "Train loss", "nats per token"),
        ("perf/tokens_per_second", "Speed", "tokens per second"),
        ("samples/longest_copy", "Longest run copied", "tokens"),
    ):
        curves = {
            f"{run.name} {tag}" if "val" in tag else run.name: run.curves[tag] for run in runs if tag in run.curves
        }
        if curves:
            page.figure(tag.replace("/", "_"), draw_curves(curves, title, unit))
    page.add("</div><h2>Where their settings differ</h2>")
    settings = [run.settings for run in runs]
    names = sorted(name for name in set().union(*settings) if len({s.get(name) for s in settings}) > 1)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(s.get(name, '–'))}</td>" for s in settings) + "</tr>"
        for name in names
    )
    page.add(f'<div class="box wide"><table><tr><th></th>{head}</tr>{rows}</table></div>')
    page.add("<h2>Their last words</h2>")
    for run in runs:
        page.add(f"<h3>{escape(run.name)}</h3><div class=grid>")
        for tag, texts in run.texts.items():
            if tag.startswith("samples"):
                words, below = sample_parts(texts[-1][1])
                page.add(f"<div class=box><pre>{escape(words)}</pre><p class=soft>{escape(below)}</p></div>")
        page.add("</div>")


def report(runs: list[str], output: str | None = None) -> None:
    """Make one HTML page of a run, or of several side by side, that needs no network; its figures are PNGs beside it.

    Args:
        runs: their folders.
        output: the folder to write report.html into; null is `report` in the run's folder, or in the one that all
            these runs are in.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("report draws with matplotlib: pip install 'tiny-lightning-gpt[plots]'") from None
    paths = runs or [str(path.parents[1]) for path in [find_checkpoint("last")]]
    found = [read_run(find_run(path)) for path in paths]
    place = os.path.commonpath([run.folder.absolute() for run in found])
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    page = Page(title, Path(output) if output else Path(place) / "report")
    page.add(f"<h1>{escape(title)}</h1>")
    for run in found:
        whose = "" if len(found) == 1 else f"{run.name}: "
        for note in run.notes:
            page.add(f"<p class=note>{escape(whose + note)}</p>")
    if len(found) > 1:
        add_comparison(page, found)
    else:
        cards = "".join(
            f"<div class=card><b>{escape(v)}</b>{escape(k)}</div>" for k, v in run_summary(found[0]).items()
        )
        page.add(f"<div class=cards>{cards}</div>")
        for part in add_curves, add_samples, add_inside, add_repeat:
            part(page, found[0])
    print(os.path.relpath(page.write()))
