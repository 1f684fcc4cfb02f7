"""Callbacks, figures and reports are correct and complete, and do not change training."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import lightning as L
import matplotlib
import pytest
import torch
from conftest import TINY, T, V, loud
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.text import Text
from test_cli import scalars
from test_training import RECIPE, fit
from torch.utils.tensorboard import SummaryWriter

from lightning_gpt.analysis.figures import draw_curves, draw_losses, figures, loss_color, smooth
from lightning_gpt.analysis.inspector import ModelInspector
from lightning_gpt.analysis.probes import (
    attention_maps,
    attention_weights,
    position_similarity,
    residual_streams,
    token_losses,
)
from lightning_gpt.analysis.report import Run, add_smooth_gap, name_runs, read_run, validation_passage
from lightning_gpt.checkpoint.io import load_net
from lightning_gpt.cli.main import main
from lightning_gpt.data.ngram_index import NgramIndex
from lightning_gpt.data.tokenizers import CharTokenizer
from lightning_gpt.model.gpt import GPT, GPTConfig, parameter_role
from lightning_gpt.training.callbacks import SampleText
from lightning_gpt.training.losses import next_token_loss
from lightning_gpt.training.monitoring import Throughput, UpdateRatios

# --- training is unchanged --------------------------------------------------------------------------------------------


class RecordRNGState(L.Callback):
    """Records the global generator's state at each hook: the same before and after the other callbacks."""

    def __init__(self):
        self.states = []

    def record(self, *_):
        self.states.append(torch.get_rng_state())

    on_train_start = on_train_batch_start = on_train_batch_end = record
    on_validation_start = on_validation_epoch_end = on_validation_end = record


@pytest.mark.parametrize("model", [{}, RECIPE], ids=["adamw", "muon and average"])
def test_callbacks_and_loggers_do_not_change_training_by_a_bit(tmp_path, model):
    alone, losses_alone, _ = fit(tmp_path, 9, model=model)
    watchers = [UpdateRatios(), Throughput(), SampleText(length=5, console_length=0), ModelInspector(shown=5)]
    board = TensorBoardLogger(tmp_path, "board")
    before, after = RecordRNGState(), RecordRNGState()
    kwargs = dict(callbacks=[before, *watchers, after], logger=board, log_every_n_steps=2)
    watched, same, _ = fit(tmp_path, 9, model=model, **kwargs)
    assert same == losses_alone and all(torch.equal(watched[name], alone[name]) for name in alone)
    assert all(map(torch.equal, before.states, after.states)) and len(before.states) == len(after.states) > 20
    assert any(tag.startswith("inspect/") for tag in scalars(board.log_dir)[1].Tags()["images"])


# --- metrics of the training ------------------------------------------------------------------------------------------


class RecordWeights(L.Callback):
    def __init__(self):
        self.after = []

    def on_train_start(self, trainer, lm):
        self.after = [{name: p.detach().clone() for name, p in lm.net.named_parameters()}]

    def on_train_batch_end(self, trainer, lm, *_):
        if trainer.global_step == len(self.after):
            self.after.append({name: p.detach().clone() for name, p in lm.net.named_parameters()})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_ratio_is_the_norm_of_the_update_over_that_of_the_weights(tmp_path, accumulate):
    watch, board = RecordWeights(), TensorBoardLogger(tmp_path, "board")
    kwargs = dict(
        callbacks=[UpdateRatios(), watch], logger=board, log_every_n_steps=2, accumulate_grad_batches=accumulate
    )
    fit(tmp_path, 4, **kwargs)
    values, _ = scalars(board.log_dir)
    logged = {tag.removeprefix("update_ratio/"): curve for tag, curve in values.items() if "update_ratio" in tag}
    assert set(logged) == {"embeddings", "h.0", "h.1", "head"}
    for layer, curve in logged.items():
        assert [step for step, _ in curve] == [1, 3] == [step for step, _ in values["train/loss"]]
        for step, ratio in curve:
            old, new = watch.after[step], watch.after[step + 1]
            names = [name for name in new if parameter_role(name) == layer]
            moved = sum((new[name] - old[name]).square().sum() for name in names)
            assert ratio == pytest.approx(float((moved / sum(new[name].square().sum() for name in names)).sqrt()))


def test_best_loss_and_generalization_gap_are_right_after_a_resume(tmp_path, text_file):
    flags = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", "--trainer.log_every_n_steps=5"]
    main(["fit", *TINY, *flags, "--trainer.val_check_interval=6", "--trainer.accumulate_grad_batches=2"])
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    # step 6 is validated but not logged
    main(["fit", f"--ckpt_path={last}", *flags[1:], "--trainer.max_steps=7", "--model.learning_rate=3"])
    values, board = scalars(tmp_path / "tiny" / "version_0")
    values = {tag: dict(curve) for tag, curve in values.items()}
    assert values["val/loss"][6] > values["val/loss"][4] == min(values["val/loss"].values())
    assert values["val/best"][6] == values["val/loss"][4]
    assert values["val/generalization_gap"][5] == pytest.approx(
        values["val/loss"][5] - values["train/loss"][4], abs=1e-5
    )
    assert "epoch" not in values  # Lightning adds it
    assert values["train/bpc"][4] == pytest.approx(values["train/loss"][4] / math.log(2))
    assert set(board.PluginTagToContent("hparams")) == {"_hparams_/experiment", "_hparams_/session_start_info"}


@given(st.text("ab", min_size=1, max_size=60), st.text("ab", max_size=40), st.sampled_from([2, 2**13, 2**40]))
@settings(max_examples=60, deadline=None)
def test_the_ngram_index_finds_what_a_search_through_all_substrings_finds(text, words, vocab_size):
    ids = {
        name: torch.tensor([vocab_size - 1 - (c == "a") for c in s]) for name, s in (("text", text), ("words", words))
    }
    index = NgramIndex(ids["text"], vocab_size)
    start, length, share = index.find(ids["words"])
    runs = {words[i:j] for i in range(len(words)) for j in range(i + index.n, len(words) + 1)}
    assert length == max((len(run) for run in runs if run in text), default=0)
    assert words[start : start + length] in text
    grams = [words[i : i + index.n] for i in range(len(words) - index.n + 1)]
    assert share == pytest.approx(sum(gram in text for gram in grams) / max(1, len(grams)))


# --- inside the net ---------------------------------------------------------------------------------------------------


def test_attention_maps_times_the_values_equal_the_layers_output(any_net, idx):
    x, rope = torch.randn(1, T, 16, dtype=torch.float64), None
    if any_net.config.position == "rope":
        rope = any_net.rope[:, :T].double()
    for block in any_net.h:
        maps = attention_weights(block.attn, x, rope)  # 12 positions, 8 of them at a time
        assert not maps.triu(1).any() and torch.allclose(maps.sum(-1), torch.ones(2, T).double())
        values = block.attn.c_attn(x)[0, :, 32:].view(T, 2, 8).transpose(0, 1)
        by_hand = block.attn.c_proj((maps @ values).transpose(0, 1).flatten(1))
        torch.testing.assert_close(block.attn(x, rope)[0], by_hand, rtol=0, atol=1e-12)
    assert len(attention_maps(any_net, idx[:1])) == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_net.modules())


def test_attention_maps_of_a_layer_come_from_its_residual_stream(any_net, idx):
    seen = residual_streams(any_net, idx[:1])
    rope = any_net.rope[:, :T] if any_net.config.position == "rope" else None
    for layer, maps in enumerate(attention_maps(any_net, idx[:1])):
        by_hand = attention_weights(any_net.h[layer].attn, any_net.h[layer].ln_1(seen[layer][None]), rope)
        torch.testing.assert_close(maps, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_layer", [0, 3])
def test_the_last_residual_stream_gives_the_logits(n_layer, idx):
    net = loud(GPT(GPTConfig(V, T, n_layer, n_head=2, n_embd=16, dropout=0.0)))
    seen = residual_streams(net, idx[:1])
    assert seen.shape == (n_layer + 1, T, 16)
    torch.testing.assert_close(net.logits(seen[-1:]), net(idx[:1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[:1], net.wte(idx[:1]) + net.wpe.weight, rtol=0, atol=1e-12)


def test_the_mean_of_the_token_losses_is_the_loss(any_net, idx):
    ids = idx.flatten()[: T + 1]
    assert token_losses(any_net, ids).mean() == pytest.approx(
        next_token_loss(any_net, ids[None, :-1], ids[None, 1:]).item()
    )


def test_position_similarity_is_the_cosine_of_two_positions(net):
    a, b = net.wpe.weight[[3, 7]]
    assert position_similarity(net)[3, 7] == pytest.approx(float(a @ b / a.norm() / b.norm()))


def test_figures_that_say_nothing_are_hidden(any_net):
    tokenizer = CharTokenizer("".join(map(chr, range(97, 97 + V))))

    def names(weight):
        with torch.no_grad():
            any_net.wte.weight.copy_(weight)
        return {name for name, _ in figures(any_net, tokenizer, torch.arange(T + 1), shown=4)}

    every_direction = torch.eye(V, 16)  # two components explain 2 / 16
    assert "token_embeddings" not in names(every_direction)
    every_direction[:, :2] *= 5
    assert "token_embeddings" in names(every_direction)
    assert ("position_similarity" in names(every_direction)) == (any_net.config.position == "learned")


VARIANTS = {
    "bigram": ["--model.n_layer=0"],
    "tied n-grams and average": ["--model.tie_embeddings=true", "--model.ngram_max=3", "--model.ema_decay=0.9"],
    "modern in bfloat16": ["--model.position=rope", "--model.norm=rmsnorm", "--trainer.precision=bf16-true"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_net_can_be_inspected(variant, tmp_path, text_file):
    flags = [*VARIANTS[variant], f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *TINY, "--config=inspect", "--trainer.callbacks.shown=4", *flags])
    drawn = set(scalars(tmp_path / "tiny" / "version_0")[1].Tags()["images"])
    expected = {"loss_per_character", "prediction_per_layer", "token_embeddings"}
    expected |= set() if "modern" in variant else {"position_similarity"}
    expected |= set() if variant == "bigram" else {"attention_layer_01"}
    assert drawn == {f"inspect/{name}" for name in expected}
    assert len(next(tmp_path.rglob("metadata.tsv")).read_text().splitlines()) == 32  # the projector's: a line per token
    rows = [line.split("\t") for line in next(tmp_path.rglob("tensors.tsv")).read_text().splitlines()]
    net, _ = load_net(next(tmp_path.rglob("last.ckpt")))  # the weight average, if there is one
    assert torch.allclose(torch.tensor([[float(number) for number in row] for row in rows]), net.wte.weight)


@pytest.mark.parametrize("passage, message", [("the €uro", "'€'"), ("t", "too short")])
def test_an_unusable_passage_is_refused_with_its_reason(passage, message, fails, text_file, tmp_path):
    flags = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    error = fails("fit", *TINY, "--config=inspect", f"--trainer.callbacks.passage={passage}", *flags)
    assert "passage" in error and message in error


def test_without_matplotlib_training_continues_and_says_what_to_install(tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_gpt.analysis.figures", None)
    flags = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *TINY, "--config=inspect", *flags])
    lines = [line for line in capsys.readouterr().out.splitlines() if "ModelInspector" in line]
    assert len(lines) == 1 and "[plots]" in lines[0]
    assert list(tmp_path.rglob("last.ckpt"))


MARKUP = ["$$", "$\\\\frac$", "$", "_x", "\\\\$", "^{$", "<b>", "$a$"]


def drawn_texts(figure):
    """The texts of a drawn figure, and whether any of them is parsed as a formula."""
    figure.savefig(io.BytesIO(), format="png")
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return {text.get_text() for text in texts}, any(text.get_parse_math() and "$" in text.get_text() for text in texts)


def test_text_in_figures_is_never_parsed_as_markup(net):
    class Markup(CharTokenizer):
        def decode(self, ids):
            return MARKUP[int(ids[0]) % len(MARKUP)]

    tokenizer = Markup("".join(map(chr, range(97, 97 + V))))
    for name, figure in figures(net, tokenizer, torch.arange(T + 1), shown=8):
        texts, formulas = drawn_texts(figure)
        assert not formulas and (name == "position_similarity" or "$$" in texts), name
    curves = {"_a$b$c/version_0 val/loss": [(1, 2.0), (2, 1.0)], "b": [(1, 3.0)]}
    texts, formulas = drawn_texts(draw_curves(curves, "Loss", "nats"))
    assert not formulas and " _a$b$c/version_0 val/loss" in texts  # the legend's text too


def test_figures_for_tensorboard_are_legible_at_the_width_of_its_cards():
    net = loud(GPT(GPTConfig(V, T, n_layer=2, n_head=8, n_embd=16, dropout=0.0)))
    tokenizer = CharTokenizer("".join(map(chr, range(97, 97 + V))))
    for name, figure in figures(net, tokenizer, torch.arange(T + 1), shown=16, narrow=True):
        figure.savefig(io.BytesIO(), format="png")
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        pixels = min(text.get_fontsize() for text in texts) / 72 * 350 / figure.get_figwidth()
        assert pixels > (5 if name == "position_similarity" else 7), name


def test_a_failed_figure_does_not_stop_training(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setenv("PATH", str(tmp_path))  # a PATH without LaTeX
    flags = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks.shown=4"]
    main(["fit", *TINY, "--config=inspect", *flags])
    assert "ModelInspector has no figures of step 5" in capsys.readouterr().err


def test_a_resumed_run_has_every_logged_point_exactly_once(tmp_path, text_file):
    where = [f"--trainer.default_root_dir={tmp_path}", "--trainer.log_every_n_steps=1"]
    inspect = ["--config=inspect", "--trainer.callbacks.shown=2"]
    flags = [f"--data.corpus={text_file}", "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    main(["fit", *TINY, *inspect, *flags, *where])
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    main(["fit", f"--ckpt_path={last}", *inspect, *where, "--trainer.max_steps=6", "--trainer.val_check_interval=3"])
    values, board = scalars(tmp_path / "tiny" / "version_0")
    assert [step for step, _ in values["train/loss"]] == list(range(6))  # every step once
    for tag in "val/loss", "samples/longest_copy", "inspect/seconds":
        assert [step for step, _ in values[tag]] == [3, 5], tag
    (sample,) = [tag for tag in board.Tags()["tensors"] if tag.startswith("samples/")]
    assert [event.step for event in board.Tensors(sample)] == [3, 5]
    assert [event.step for event in board.Images("inspect/token_embeddings")] == [3, 5]
    listed = next(tmp_path.rglob("projector_config.pbtxt")).read_text()
    names = re.findall(r'"([a-z _]+:\d+)"', listed)
    assert names == ["token_embeddings:00003", "latest token_embeddings:00005"]
    assert min(names) == names[-1]  # the projector opens the name that sorts first
    assert [step for step, _ in read_run(last.parents[1]).texts[sample.removesuffix("/text_summary")]] == [4, 6]


# --- the report -------------------------------------------------------------------------------------------------------


def test_smoothing_removes_noise_and_keeps_a_line_over_log_steps():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    steps = [10 * i for i in range(1, 401)]
    exact = [3 - 0.2 * math.log(step) for step in steps]
    assert [value for _, value in smooth(list(zip(steps, exact, strict=True)), steps)] == pytest.approx(exact)
    noisy = [(step, value + 0.1 * e) for step, value, e in zip(steps, exact, noise, strict=True)]
    errors = [value - true for (_, value), true in zip(smooth(noisy, steps), exact, strict=True)]
    assert max(map(abs, errors)) < 0.1 and sum(e * e for e in errors) / 400 < 0.01 / 20
    assert smooth([(7, 2.0)], [3, 9]) == [(3, 2.0), (9, 2.0)]
    few = [(50, 2.0), (100, 1.0), (150, 0.9), (200, 0.85)]  # no line fits them all
    assert [value for _, value in smooth(few, [50, 100, 150, 200])] == pytest.approx([2.0, 1.0, 0.9, 0.85])


def test_the_gap_is_to_the_smoothed_train_loss():
    train = [(10 * i, 2 + 0.1 * (-1) ** i) for i in range(1, 101)]  # 2 with noise
    curves = {"train/loss": train, "val/loss": [(500, 2.5), (1000, 2.25)], "val/generalization_gap": [(500, 9.0)]}
    add_smooth_gap(curves)
    (_, middle), (_, end) = curves["val/generalization_gap"]
    assert middle == pytest.approx(0.5, abs=0.03) and end == pytest.approx(0.25, abs=0.06)


def test_the_text_and_the_figure_of_the_losses_share_one_color_scale():
    losses = torch.tensor([0.0, 1.0, 2.5, 4.0, 9.0])
    (image,) = draw_losses(losses, list("abcde"), 4.0, "Loss").axes[0].images
    for loss in losses.tolist():
        drawn = [round(255 * part) for part in image.cmap(image.norm(loss))]
        assert drawn == pytest.approx(list(bytes.fromhex(loss_color(loss, 4.0)[1:])), abs=1)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [Run(tmp_path / part / "laptop" / "version_0") for part in ("a", "b")]
    name_runs(runs)
    assert [run.name for run in runs] == ["a/laptop/version_0", "b/laptop/version_0"]
    name_runs(runs[:1])
    assert runs[0].name == "laptop/version_0"


class Page(HTMLParser):
    """Parses a page: its tags, all of them closed, its text, its anchors, and what it refers to."""

    EMPTY = {"meta", "link", "img", "br", "wbr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], set(), [], ""
        self.links, self.anchors = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and tag != "a"]
        self.links += [value for name, value in attrs if name == "href" and tag == "a"]
        self.anchors += [f"#{value}" for name, value in attrs if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory, text_file):
    """The folder of a run that logged every kind of curve."""
    root = tmp_path_factory.mktemp("watched")
    flags = ["--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2", "--sample.prompts=['<b>the']"]
    corpus = root / "tags.txt"
    corpus.write_text(text_file.read_text() + "<b>")
    main(["fit", *TINY, *flags, f"--data.corpus={corpus}", f"--trainer.default_root_dir={root}"])
    return root / "tiny" / "version_0"


def picture_files(tmp_path):
    return [file for file in (tmp_path / "page").iterdir() if file.suffix in (".png", ".svg")]


def write_report(tmp_path, *runs):
    main(["report", *map(str, runs), "--output", str(tmp_path / "page")])
    return Page((tmp_path / "page" / "report.html").read_text())


def test_a_report_is_one_self_contained_page(logged_run, tmp_path, capsys):
    page = write_report(tmp_path, logged_run)
    pictures = {base64.b64decode(source.split("base64,")[1]) for source in page.sources if len(source) > 9}
    assert all(source.startswith("data:") for source in page.sources) and "http" not in page.text
    assert "script" not in page.tags
    assert pictures == {file.read_bytes() for file in picture_files(tmp_path)} and len(pictures) == 9
    assert page.links == page.anchors == ["#repeat", "#curves", "#samples", "#losses", "#inside", "#config"]
    assert (tmp_path / "page" / "attention_layer_01.png").exists()
    values, _ = scalars(logged_run)
    assert page.text.index(f"{min(value for _, value in values['val/loss']):.3f}") < page.text.index("fit --config")
    assert page.text.index("fit --config") < page.text.index("Curves", page.text.index("Repeat this run"))
    assert page.text.count("<b>the") == 5  # escaped, in the heading, the samples of steps 2, 4 and 5, and the config
    assert all(words in page.text for words in ("step 5", "max_steps: 5", "1 x cpu", "fit --config"))
    for tag in "val/loss", "samples/longest_copy":
        assert [step for step, _ in read_run(logged_run).curves[tag]] == [2, 4, 5]  # as the Trainer counts steps
    assert "page/report.html" in capsys.readouterr().out


FRAME = """<iframe src="page/report.html" width={width} height="900" style="border: 0"></iframe><pre></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument
  const shown = [...page.images].filter(image => image.complete && image.naturalWidth && image.clientWidth > 250)
  const root = page.documentElement
  document.querySelector("pre").textContent = "saw " + [shown.length, root.scrollWidth - root.clientWidth]
}}
</script>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_figure_without_console_messages(width, logged_run, tmp_path):
    write_report(tmp_path, logged_run)
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert f"saw {len(picture_files(tmp_path))},0<" in done.stdout  # the page itself does not scroll sideways
    assert "CONSOLE" not in done.stderr


def test_a_report_on_several_runs_shows_the_settings_that_differ(logged_run, run, tmp_path):
    page = write_report(tmp_path, logged_run, run.parent)  # given a folder of versions, it takes the newest
    assert "sample.prompts" in page.text and "model.n_layer" not in page.text
    assert {file.stem for file in picture_files(tmp_path)} >= {"val_loss", "train_loss"}


@pytest.mark.parametrize("left", [0, 7, 0.9, 0.999])
def test_a_report_on_a_truncated_event_file_shows_what_is_left(left, logged_run, tmp_path):
    half = shutil.copytree(logged_run, tmp_path / "half")
    (events,) = half.glob("*tfevents*")
    data = events.read_bytes()
    events.write_bytes(data[: left if isinstance(left, int) else int(left * len(data))])
    (half / "checkpoints" / "best.ckpt").write_bytes(b"no checkpoint")
    page = write_report(tmp_path, half)
    assert "best.ckpt cannot be read" in page.text and "Inside last.ckpt" in page.text
    assert ("No curves" in page.text) == (left in (0, 7))


def test_a_report_says_what_is_missing(logged_run, tmp_path):
    bare = tmp_path / "a run"
    bare.mkdir()
    config = (logged_run / "config.yaml").read_text()
    (bare / "config.yaml").write_text(config.replace("max_steps: 5", "max_steps: 5000"))
    page = write_report(tmp_path, bare)
    assert all(words in page.text for words in ("No curves", "No checkpoint", "Step 0 of 5,000", "not recorded"))
    assert "a run/config.yaml'" in page.text  # quoted for a shell
    moved = shutil.copytree(logged_run, tmp_path / "moved", ignore=shutil.ignore_patterns("config.yaml"))
    corpus = logged_run.parents[1] / "tags.txt"
    corpus.rename(tmp_path / "tags.txt")
    page = write_report(tmp_path, moved)
    (tmp_path / "tags.txt").rename(corpus)
    assert "this is the checkpoint's config" in page.text and "cannot be inspected" in page.text


def test_a_report_finds_the_validation_text_across_files(text_file, tmp_path):
    text = text_file.read_text()
    (tmp_path / "a.txt").write_bytes(text[:1000].replace("\n", "\r\n").encode("utf-8-sig"))
    (tmp_path / "b.txt").write_text(text[1000:])
    tokenizer, data = CharTokenizer(text), {"corpus": str(tmp_path), "split": [0.5, 0.9], "vocabulary": text}
    full = text if text[999] == "\n" else text[:1000] + "\n" + text[1000:]
    start = len(full) // 2
    assert torch.equal(validation_passage(data, 30, tokenizer), tokenizer.encode(full[start : start + 31]))


@pytest.mark.parametrize("path, message", [("none", "does not exist"), ("empty", "is not a run")])
def test_a_report_on_a_folder_without_a_run_is_refused(path, message, fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert message in fails("report", tmp_path / path)


def test_a_report_without_arguments_takes_the_newest_run(logged_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(logged_run, tmp_path / "checkpoints" / "tiny" / "version_3")
    monkeypatch.chdir(tmp_path)
    main(["report"])
    assert re.search(r"checkpoints/tiny/version_3/report/report.html", capsys.readouterr().out)


def test_prompts_of_equal_length_may_have_different_numbers_of_tokens(tmp_path, text_file):
    pytest.importorskip("tokenizers")
    corpus = text_file.read_text()
    prompts = [corpus[:12], "zqzqzqzqzqzq"]
    flags = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", "--data.tokenizer=bpe"]
    main(["fit", *TINY, *flags, "--data.vocab_size=300", f"--sample.prompts={json.dumps(prompts)}"])
    _, board = scalars(tmp_path / "tiny" / "version_0")
    texts = [
        board.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in board.Tags()["tensors"]
        if "samples/" in tag
    ]
    assert len(texts) == 2 and all(any(prompt in text for text in texts) for prompt in prompts)


def test_a_report_shows_a_sample_that_a_resumed_run_logged_again_once(tmp_path):
    for text, purge_step in ("lost", None), ("kept", 6):
        with SummaryWriter(tmp_path, purge_step=purge_step, filename_suffix=f".{text}") as writer:
            writer.add_text("samples/the", text, 6)
    assert read_run(tmp_path).texts["samples/the"] == [(7, "kept")]


# --- the terminal -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns, speed", [(80, False), (120, True)])
def test_a_terminal_shows_one_bar_in_steps_and_a_line_for_each_validation(
    columns, speed, tmp_path, text_file, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    flags = ["--trainer.log_every_n_steps=1", "--trainer.val_check_interval=16", "--trainer.accumulate_grad_batches=2"]
    flags += [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *TINY, *flags, "--trainer.max_steps=16"])
    main(["fit", f"--ckpt_path={tmp_path}/tiny/version_0/checkpoints/last.ckpt", *flags[:3], "--trainer.max_steps=18"])
    lines = re.split("[\r\n]", sys.stdout.getvalue())
    values, _ = scalars(tmp_path / "tiny" / "version_0")
    bars = [line for line in lines if re.match(r"step \d+/1[68] \|", line)]
    for step, limit in (10, 16), (16, 16), (18, 18):
        bar = [bar for bar in bars if bar.startswith(f"step {step}/{limit} ")][-1]
        assert len(bar) <= columns and all(f"{name}=" in bar for name in ("loss", "val", "best")) and " left" in bar
        assert ("tokens/s=" in bar) == (speed and limit == 16)  # the resumed run is too short to measure it
    best = dict(values["val/best"])
    for step, loss in values["val/loss"]:
        assert sum(f" val/loss {loss:.4f}  best {best[step]:.4f}" in line for line in lines) == 1
    assert not any("Training:" in line and "?" not in line for line in lines)
