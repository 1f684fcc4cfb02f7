"""Command-line options: text is taken literally, names are not abbreviated, invalid values get a one-line error."""

import json
import os
import typing
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import MODERN, TINY, V, loud
from jsonargparse import capture_parser
from lightning.pytorch.tuner import Tuner

from lightning_gpt.checkpoint.convert import write_onnx
from lightning_gpt.checkpoint.io import checkpoint_summary, read_checkpoint, write_checkpoint
from lightning_gpt.cli.main import main
from lightning_gpt.cli.parser import as_yaml
from lightning_gpt.data.datamodule import TextDataModule
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.training.module import LanguageModel

# texts that YAML reads as null, a number, a date, a bool, a list, a mapping, a reference, or cannot read
TEXTS = "# Chapter 1|#1.txt|###|~|Null|NULL|a null b|1e3|-1|007|0x1F|1_000|.nan|2020-01-01|12:30:45|yes|true|'q'"
TEXTS += '|"q"|{a: b}|- a|a: b| lead | ||$HOME|&a|*a|!!set|%x|@x|`|? a|\t|---|...|=|<<|-|[a|None|[]|é € 語|a\nb'
TEXTS = [*TEXTS.split("|"), "|"]
COMMANDS = {"generate": [], "score": ["--text_file=x"], "quantize": [], "export": ["--to=hf"]}
COMMANDS |= {"import": ["--source=x", "--output=x"], "fit": [], "validate": []}


@pytest.fixture(scope="module")
def parse():
    """Parse a command line and return its options; `parse.texts` lists the options that are text."""
    parsers = {command: capture_parser(main, [command]) for command in COMMANDS}

    def parse(command, *args):
        line = [*COMMANDS[command], *args]
        if command in ("fit", "validate"):
            return parsers[command].parse_args([command, *line])[command]
        return parsers[command].parse_args(line)

    def texts(command):
        parser = parsers[command]
        if command in ("fit", "validate"):
            parser = parser._subcommands_action.choices[command]
        single, multiple = {}, {}  # the flags of options with one text, and with a list of texts
        for action in parser._actions:
            hint = getattr(action, "_typehint", None)
            args = [arg for arg in typing.get_args(hint) if arg is not type(None)] or [hint]
            if str in args and set(args) <= {str, Path}:
                single[action.dest] = action.option_strings[0]
            elif list[str] in args:
                multiple[action.dest] = action.option_strings[0]
        return single, multiple

    parse.texts = texts
    return parse


def test_the_options_that_take_text_are_found(parse):
    assert {"ckpt_path", "prompt", "prompt_file", "output", "device"} <= set(parse.texts("generate")[0])
    assert {"data.corpus", "data.vocabulary", "model.init_from", "ckpt_path"} <= set(parse.texts("fit")[0])
    assert [*parse.texts("generate")[1]] == ["stop"] and [*parse.texts("fit")[1]] == ["sample.prompts"]


@pytest.mark.parametrize("command", COMMANDS)
def test_text_is_taken_literally(parse, command, tmp_path):
    single, multiple = parse.texts(command)
    for i in range(0, len(TEXTS), {"fit": 8, "validate": 24}.get(command, 1)):  # many options take many texts a line
        expected = {name: TEXTS[(i + k) % len(TEXTS)] for k, name in enumerate(single)}
        lists = {name: [TEXTS[i], TEXTS[i - 1]] for name in multiple}
        line = [f"{single[name]}={text}" for name, text in expected.items()]
        line += [f"{multiple[name]}+={text}" for name in lists for text in lists[name] if text != "[]"]
        options = parse(command, *line)
        assert {name: str(options[name]) for name in single} == expected
        assert all(options[name] == [text for text in lists[name] if text != "[]"] for name in multiple)
        (tmp_path / "config.yaml").write_text(json.dumps(nested(expected | lists)))  # JSON is YAML
        options = parse(command, f"--config={tmp_path}/config.yaml")
        assert {name: str(options[name]) for name in single} == expected
        assert all(options[name] == lists[name] for name in multiple)


def nested(flat):
    config = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        at = config
        for group in groups:
            at = at.setdefault(group, {})
        at[leaf] = value
    return config


def test_only_the_word_null_means_null(parse, fails):
    options = parse("generate", "--prompt=null", "--top_k=null", "--stop=null")
    assert options.prompt is options.top_k is options.stop is None
    assert parse("score", "--ckpt_path=null").ckpt_path == "null"  # ckpt_path cannot be null
    for nothing in "~", "# 3", "", "Null":
        assert f"{nothing!r} is not a value" in fails("generate", f"--top_k={nothing}")


def test_a_list_of_texts_can_be_given_as_one_text_or_a_list(parse, fails):
    assert parse("generate", "--stop", "THE END").stop == ["THE END"]
    assert parse("generate", "--stop=[1e3, ~, 'x, y', \"#\"]").stop == ["1e3", "~", "x, y", "#"]
    assert parse("generate", "--stop=['[INST]']").stop == ["[INST]"]
    assert "write ['[INST]'] or ['INST']" in fails("generate", "--stop=[INST]")


def test_text_options_of_callbacks_are_taken_literally(parse):
    for text, expected in [("# x: y", "# x: y"), ("1e3", "1e3"), ("{a: b}", "{a: b}"), ("null", None)]:
        flags = [
            "--trainer.callbacks+=lightning_gpt.analysis.inspector.ModelInspector",
            "--trainer.callbacks.passage",
            text,
        ]
        assert parse("fit", *flags).trainer.callbacks[0].init_args.passage == expected


def test_prompt_stop_and_corpus_are_taken_literally(ckpt, capsys, fails, tmp_path):
    main(["generate", f"--ckpt_path={ckpt}", "--prompt", "the cat", "--stop", "###", "--json=true", "--seed=3"])
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "the cat" and result["settings"]["stop"] == ["###"]
    assert "'#'" in fails("generate", f"--ckpt_path={ckpt}", "--prompt", "# the cat")
    assert "#1.txt" in fails("fit", "--data.corpus", "#1.txt", f"--trainer.default_root_dir={tmp_path}")


@pytest.mark.parametrize(
    "args, value",
    [(["--json"], True), (["--no-json"], False), (["--json", "true"], True), (["--json=false"], False)],
)
def test_boolean_options_are_flags(parse, args, value):
    options = parse("generate", *args, "--max_new_tokens", "7")
    assert options.json is value and options.max_new_tokens == 7
    train_args = [arg.replace("json", "model.compile") for arg in args]
    assert parse("fit", *train_args, "--model.n_layer", "3").model.compile is value


@pytest.mark.parametrize("command, abbreviation", [("fit", "ckpt"), ("validate", "ckpt"), ("fit", "model.n_lay")])
def test_options_cannot_be_abbreviated(fails, command, abbreviation):
    assert f"there is no option --{abbreviation}: did you mean" in fails(command, f"--{abbreviation}", "3")


@pytest.mark.parametrize("command", ["generate", "score", "report", "quantize", "import", "export"])
def test_options_of_quick_commands_cannot_be_abbreviated(fails, command):
    required = COMMANDS.get(command, [])
    assert "there is no option --conf: did you mean --config?" in fails(command, *required, "--conf=x.yaml")


def test_a_written_config_reads_back_the_same(parse, tmp_path):
    for text in TEXTS:
        written = as_yaml({"prompt": text, "stop": [text]})
        (tmp_path / "config.yaml").write_text(written)
        options = parse("generate", f"--config={tmp_path}/config.yaml")
        assert (options.prompt, options.stop) == (text, [text])


# --- messages ---------------------------------------------------------------------------------------------------------


def test_each_command_prints_which_checkpoint_it_uses(ckpt, text_file, capsys):
    checkpoint = read_checkpoint(ckpt)
    paths = ["--ckpt_path", str(ckpt)]
    for command in ["generate", "--max_new_tokens=3"], ["score", "--text_file", str(text_file)], ["validate"], ["test"]:
        capsys.readouterr()
        main([*command, *paths])
        line = f"lightning-gpt: {os.path.relpath(ckpt)}, step 5, val/loss {checkpoint['val_loss']:.4f}\n"
        assert capsys.readouterr().err == line


def test_a_newer_checkpoint_is_reported_together_with_a_better_one(ckpt, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path := tmp_path / "checkpoints").mkdir()
    checkpoint = read_checkpoint(ckpt)
    other_text = checkpoint["datamodule_hyper_parameters"] | {"corpus": "other.txt"}
    runs = {"good": {"val_loss": 2.5}, "best": {"val_loss": 2.25}, "other": {"datamodule_hyper_parameters": other_text}}
    runs |= {"trial": {"val_loss": 3.75}}
    for age, (name, change) in enumerate(runs.items()):
        path = tmp_path / name / "version_0" / "checkpoints" / "best.ckpt"
        write_checkpoint(checkpoint | {"val_loss": 1.0} | change, path)
        os.utime(path, (age, age))
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    (tmp_path / "broken" / "checkpoints" / "best.ckpt").write_bytes(b"PK")
    os.utime(tmp_path / "broken" / "checkpoints" / "best.ckpt", (0, 0))
    main(["generate", "--max_new_tokens=3"])
    line = capsys.readouterr().err
    assert "trial/version_0/checkpoints/best.ckpt, step 5, val/loss 3.7500; on the same text" in line
    assert "best/version_0/checkpoints/best.ckpt has 2.2500: use it with --ckpt_path" in line
    tune = ["fit", *TINY, "--model.init_from=best", f"--data.corpus={text_file}", "--trainer.fast_dev_run=true"]
    for args in ["validate"], tune:
        main([*args, f"--trainer.default_root_dir={tmp_path}/run"])
        captured = capsys.readouterr()
        assert line.removeprefix("lightning-gpt: ") in (captured.err if args == ["validate"] else captured.out)


def test_a_checkpoint_summary_is_read_without_the_weights(ckpt, tmp_path):
    checkpoint = read_checkpoint(ckpt)
    write_checkpoint(checkpoint | {"state_dict": {"net.x": torch.zeros(5_000_000)}}, tmp_path / "large.ckpt")

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1]) if Path("/proc/self/io").exists() else 0

    before = bytes_read()
    step, loss, data = checkpoint_summary(tmp_path / "large.ckpt")
    assert bytes_read() - before < 2_000_000
    assert (step, loss) == (5, checkpoint["val_loss"])
    assert data["corpus"] == checkpoint["datamodule_hyper_parameters"]["corpus"]
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    assert checkpoint_summary(tmp_path / "x.ckpt") is checkpoint_summary(tmp_path / "none.ckpt") is None


@pytest.mark.parametrize(
    "flags, reason",
    [
        ([], "ended after step 5: trainer.max_steps=5 is reached"),
        (["--trainer.max_time={milliseconds: 1}"], "trainer.max_time is reached (0 s of training)"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss", "--model.learning_rate=0"]
            + ["--trainer.callbacks.patience=2", "--trainer.val_check_interval=1"],
            "ended after step 3: EarlyStopping with patience=2: Monitored metric val/loss did not improve in the last",
        ),
        (["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"], "trainer.max_epochs=1 is reached"),
        (["--trainer.callbacks+=test_cli_options.StopAtStep2"], "ended after step 2: a callback requested it"),
    ],
)
def test_a_run_prints_why_it_ended(tmp_path, text_file, capsys, flags, reason):
    main(["fit", *TINY, *flags, f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"])
    assert reason in capsys.readouterr().out


class StopAtStep2(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 2


def test_output_requested_from_lightning_is_printed(launcher, tmp_path, text_file):
    flags = ["--trainer.profiler=simple", "--trainer.enable_model_summary=true", "--trainer.max_time=00:01:00:00"]
    assert launcher.run(tmp_path, "fit", *TINY, *flags, "--data.corpus", text_file) == 0
    log = launcher.log.read_text()
    assert "FIT Profiler Report" in log and "run_training_batch" in log and "Trainable params" in log
    assert "GPU available" not in log and "Tip" not in log and "Seed set" not in log


def test_a_limit_that_leaves_nothing_to_do_is_refused(run, tmp_path, fails):
    checkpoint, path = read_checkpoint(run / "checkpoints" / "last.ckpt"), tmp_path / "last.ckpt"
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    write_checkpoint(checkpoint | {"callbacks": {"Timer": {"time_elapsed": {"train": 61.0}}}}, path)
    go_on = "fit", "--ckpt_path", path, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=9"
    assert "trainer.max_time=00:00:01:00 leaves nothing to do after 61 s of training" in fails(
        *go_on, "--trainer.max_time=00:00:01:00"
    )
    epochs["processed"] = 3
    write_checkpoint(checkpoint, path)
    assert "trainer.max_epochs=3 leaves nothing to do after 3 epochs" in fails(*go_on, "--trainer.max_epochs=3")
    new = "fit", *TINY, f"--trainer.default_root_dir={tmp_path}"
    assert "max_time=00:00:00:00 leaves nothing to do" in fails(*new, "--trainer.max_time=00:00:00:00")
    assert "max_epochs=0 leaves nothing to do" in fails(*new, "--trainer.max_epochs=0")


# --- invalid values: a one-line error ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.betas=[-1,0.5]"], "betas=(-1.0, 0.5) must be 0 or more and less than 1"),
        (["--model.betas=[0.9,.nan]"], "betas=(0.9, nan)"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch=0 must be at least 1"),
        (["--trainer.devices="], "trainer.devices=, "),
        (["--trainer.devices=[]"], "trainer.devices=[]"),
        (["--trainer.strategy=ddp_spawn"], "use ddp_flat or ddp"),
        (["--trainer.strategy=ddp_notebook"], "use ddp_flat or ddp"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.default_root_dir=s3://bucket/runs"], "must be a local folder"),
        (["--trainer.default_root_dir=$HOME/runs"], "must be a local folder"),
        (["--name=$HOME"], "name='$HOME'"),
        ([f"--data.batch_size={2**63}"], f"data.batch_size={2**63} does not fit in 64 bits"),
        ([f"--model.warmup_steps={10**30}"], "model.warmup_steps=1000000000000000000000000000000 does not fit"),
        (["--trainer.limit_train_batches=1e300"], "trainer.limit_train_batches=1e+300 does not fit"),
        (
            ["--trainer.callbacks+=LearningRateFinder"],
            "LearningRateFinder would change the learning rate",
        ),
        (["--trainer.callbacks=BatchSizeFinder"], "BatchSizeFinder would change the learning rate"),
        (["--trainer.max_time=5"], "DD:HH:MM:SS"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, fails, text_file, flags, message):
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    assert message in fails("fit", *TINY, *paths, *flags)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_lightnings_search_for_a_batch_size_is_refused(tmp_path, text_file):
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=2, logger=False)
    model, data = LanguageModel(vocab_size=32, block_size=16, n_layer=1, n_head=1, n_embd=8), text_file
    with pytest.raises(ValueError, match="would change the learning rate or the batch size"):
        Tuner(trainer).scale_batch_size(model, datamodule=TextDataModule(str(data), block_size=16, batch_size=4))


def test_numbers_too_large_for_memory_are_refused(tmp_path, text_file, ckpt, capsys, fails):
    assert f"num_samples={2**64} does not fit" in fails("generate", f"--ckpt_path={ckpt}", f"--num_samples={2**64}")
    with pytest.raises(SystemExit) as stop:
        main(["generate", f"--ckpt_path={ckpt}", "--prompt=the", f"--num_samples={2**60}"])
    assert stop.value.code == 1 and "out of memory: " in capsys.readouterr().err
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", f"--data.batch_size={2**63 - 1}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TINY, *paths])
    assert stop.value.code == 1 and "out of memory: use a smaller batch or model" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Error detected in")  # detect_anomaly's report
def test_detect_anomaly_ends_with_a_one_line_error(tmp_path, text_file, capsys):
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TINY, *paths, "--trainer.detect_anomaly=true", "--model.learning_rate=1e30"])
    assert stop.value.code == 1 and "trainer.detect_anomaly stopped training" in capsys.readouterr().err


@pytest.mark.parametrize("callback", ["TQDMProgressBar", "test_cli_options.StopAtStep2"])
def test_a_users_progress_bar_replaces_ours(tmp_path, text_file, callback, capsys):
    paths = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *TINY, *paths, f"--trainer.callbacks={callback}"])
    assert ("val" in capsys.readouterr().out.split("ended after")[0].split("steps")[-1]) == ("StopAtStep2" in callback)


def test_the_error_for_unknown_characters_names_the_commands_flag(ckpt, fails, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the € cat", encoding="utf-8")
    for args in ["generate", "--prompt", "the € cat"], ["score", "--text_file", str(tmp_path / "text.txt")]:
        error = fails(*args, f"--ckpt_path={ckpt}")
        assert "'€'" in error and "--on_unknown drop" in error and "data.on_unknown" not in error
        main([*args, f"--ckpt_path={ckpt}", "--on_unknown=drop"])
        assert "dropped characters that this net doesn't know: '€'" in capsys.readouterr().err


def test_the_error_for_a_value_with_a_dash_says_how_to_write_it(fails):
    assert fails("generate", "--prompt", "-x").endswith("use an equals sign, as in --prompt=-x")


def test_the_meta_device_is_refused(ckpt, fails):
    assert "device=meta can't be used here" in fails("generate", f"--ckpt_path={ckpt}", "--device=meta")


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("overrides", [{}, MODERN], ids=["gpt2", "modern"])
def test_an_onnx_program_with_a_short_context_takes_any_length(tmp_path, T, overrides):
    runtime = pytest.importorskip("onnxruntime")
    net = loud(GPT(GPTConfig(V, T, n_layer=2, n_head=2, n_embd=16, dropout=0.0, **overrides))).float()
    write_onnx(net, tmp_path / "x.onnx", "{}")
    program = runtime.InferenceSession(tmp_path / "x.onnx")
    for length in range(1, T + 1):
        idx = torch.randint(V, (3, length))
        (logits,) = program.run(None, {"idx": idx.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), net(idx), rtol=0, atol=1e-4)
