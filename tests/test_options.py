"""The command line's options: text to the letter, full names, and a sentence for what can't be."""

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

# what YAML reads as nothing, a number, a date, a bool, a list, a mapping, a reference, or not at all
SHAPES = "# Chapter 1|#1.txt|###|~|Null|NULL|a null b|1e3|-1|007|0x1F|1_000|.nan|2020-01-01|12:30:45|yes|true|'q'"
SHAPES += '|"q"|{a: b}|- a|a: b| lead | ||$HOME|&a|*a|!!set|%x|@x|`|? a|\t|---|...|=|<<|-|[a|None|[]|é € 語|a\nb'
SHAPES = [*SHAPES.split("|"), "|"]
COMMANDS = {"generate": [], "score": ["--text_file=x"], "quantize": [], "export": ["--to=hf"]}
COMMANDS |= {"import": ["--source=x", "--output=x"], "fit": [], "validate": []}


@pytest.fixture(scope="module")
def parse():
    """Parses a command line and returns its options, flat."""
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
        one, several = {}, {}  # their flags
        for action in parser._actions:
            hint = getattr(action, "_typehint", None)
            args = [arg for arg in typing.get_args(hint) if arg is not type(None)] or [hint]
            if str in args and set(args) <= {str, Path}:
                one[action.dest] = action.option_strings[0]
            elif list[str] in args:
                several[action.dest] = action.option_strings[0]
        return one, several

    parse.texts = texts
    return parse


def test_options_that_are_text_are_found(parse):
    assert {"ckpt_path", "prompt", "prompt_file", "output", "device"} <= set(parse.texts("generate")[0])
    assert {"data.corpus", "data.vocabulary", "model.init_from", "ckpt_path"} <= set(parse.texts("fit")[0])
    assert [*parse.texts("generate")[1]] == ["stop"] and [*parse.texts("fit")[1]] == ["sample.prompts"]


@pytest.mark.parametrize("command", COMMANDS)
def test_text_is_taken_to_the_letter(parse, command, tmp_path):
    one, several = parse.texts(command)
    for i in range(0, len(SHAPES), {"fit": 8, "validate": 24}.get(command, 1)):  # many options take many shapes a line
        wanted = {name: SHAPES[(i + k) % len(SHAPES)] for k, name in enumerate(one)}
        lists = {name: [SHAPES[i], SHAPES[i - 1]] for name in several}
        line = [f"{one[name]}={text}" for name, text in wanted.items()]
        line += [f"{several[name]}+={text}" for name in lists for text in lists[name] if text != "[]"]
        options = parse(command, *line)
        assert {name: str(options[name]) for name in one} == wanted
        assert all(options[name] == [text for text in lists[name] if text != "[]"] for name in several)
        (tmp_path / "config.yaml").write_text(json.dumps(nested(wanted | lists)))  # JSON is YAML with quotes
        options = parse(command, f"--config={tmp_path}/config.yaml")
        assert {name: str(options[name]) for name in one} == wanted
        assert all(options[name] == lists[name] for name in several)


def nested(flat):
    config = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        at = config
        for group in groups:
            at = at.setdefault(group, {})
        at[leaf] = value
    return config


def test_only_the_word_null_is_null(parse, fails):
    options = parse("generate", "--prompt=null", "--top_k=null", "--stop=null")
    assert options.prompt is options.top_k is options.stop is None
    assert parse("score", "--ckpt_path=null").ckpt_path == "null"  # which is no value that it may have
    for nothing in "~", "# 3", "", "Null":
        assert f"{nothing!r} is no value" in fails("generate", f"--top_k={nothing}")


def test_several_texts_are_one_or_a_list(parse, fails):
    assert parse("generate", "--stop", "THE END").stop == ["THE END"]
    assert parse("generate", "--stop=[1e3, ~, 'x, y', \"#\"]").stop == ["1e3", "~", "x, y", "#"]
    assert parse("generate", "--stop=['[INST]']").stop == ["[INST]"]
    assert "write ['[INST]'] or ['INST']" in fails("generate", "--stop=[INST]")


def test_the_text_of_a_class_is_one_too(parse):
    for text, wanted in [("# x: y", "# x: y"), ("1e3", "1e3"), ("{a: b}", "{a: b}"), ("null", None)]:
        how = [
            "--trainer.callbacks+=lightning_gpt.analysis.inspector.ModelInspector",
            "--trainer.callbacks.passage",
            text,
        ]
        assert parse("fit", *how).trainer.callbacks[0].init_args.passage == wanted


def test_the_prompt_and_the_corpus_are_what_was_typed(ckpt, capsys, fails, tmp_path):
    main(["generate", f"--ckpt_path={ckpt}", "--prompt", "the cat", "--stop", "###", "--json=true", "--seed=3"])
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "the cat" and result["settings"]["stop"] == ["###"]
    assert "'#'" in fails("generate", f"--ckpt_path={ckpt}", "--prompt", "# the cat")
    assert "#1.txt" in fails("fit", "--data.corpus", "#1.txt", f"--trainer.default_root_dir={tmp_path}")


@pytest.mark.parametrize("command, abbreviation", [("fit", "ckpt"), ("validate", "ckpt"), ("fit", "model.n_lay")])
def test_an_option_has_its_full_name(fails, command, abbreviation):
    assert f"unrecognized arguments: --{abbreviation}" in fails(command, f"--{abbreviation}", "3")


@pytest.mark.parametrize("command", ["generate", "score", "report", "quantize", "import", "export"])
def test_an_option_of_a_quick_command_has_its_full_name(fails, command):
    required = COMMANDS.get(command, [])
    assert "unrecognized arguments: --conf" in fails(command, *required, "--conf=x.yaml")


def test_a_config_that_is_written_is_read_as_it_was(parse, tmp_path):
    for text in SHAPES:
        written = as_yaml({"prompt": text, "stop": [text]})
        (tmp_path / "config.yaml").write_text(written)
        options = parse("generate", f"--config={tmp_path}/config.yaml")
        assert (options.prompt, options.stop) == (text, [text])


# --- what is said -----------------------------------------------------------------------------------------------------


def test_each_command_says_which_checkpoint_it_uses(ckpt, text_file, capsys):
    saved = read_checkpoint(ckpt)
    where = ["--ckpt_path", str(ckpt)]
    for command in ["generate", "--max_new_tokens=3"], ["score", "--text_file", str(text_file)], ["validate"], ["test"]:
        capsys.readouterr()
        main([*command, *where])
        line = f"lightning-gpt: {os.path.relpath(ckpt)}, step 5, val/loss {saved['val_loss']:.4f}\n"
        assert capsys.readouterr().err == line


def test_a_short_trial_does_not_hide_a_better_model(ckpt, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path := tmp_path / "checkpoints").mkdir()
    saved = read_checkpoint(ckpt)
    other_text = saved["datamodule_hyper_parameters"] | {"corpus": "other.txt"}
    runs = {"good": {"val_loss": 2.5}, "best": {"val_loss": 2.25}, "other": {"datamodule_hyper_parameters": other_text}}
    runs |= {"trial": {"val_loss": 3.75}}
    for age, (name, change) in enumerate(runs.items()):
        path = tmp_path / name / "version_0" / "checkpoints" / "best.ckpt"
        write_checkpoint(saved | {"val_loss": 1.0} | change, path)
        os.utime(path, (age, age))
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    (tmp_path / "broken" / "checkpoints" / "best.ckpt").write_bytes(b"PK")
    os.utime(tmp_path / "broken" / "checkpoints" / "best.ckpt", (0, 0))
    main(["generate", "--max_new_tokens=3"])
    said = capsys.readouterr().err
    assert "trial/version_0/checkpoints/best.ckpt, step 5, val/loss 3.7500; on the same text" in said
    assert "best/version_0/checkpoints/best.ckpt has 2.2500: --ckpt_path takes it" in said
    tune = ["fit", *TINY, "--model.init_from=best", f"--data.corpus={text_file}", "--trainer.fast_dev_run=true"]
    for line in ["validate"], tune:
        main([*line, f"--trainer.default_root_dir={tmp_path}/run"])
        told = capsys.readouterr()
        assert said.removeprefix("lightning-gpt: ") in (told.err if line == ["validate"] else told.out)


def test_the_head_of_a_checkpoint_is_read_without_its_weights(ckpt, tmp_path):
    saved = read_checkpoint(ckpt)
    write_checkpoint(saved | {"state_dict": {"net.x": torch.zeros(5_000_000)}}, tmp_path / "large.ckpt")

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1]) if Path("/proc/self/io").exists() else 0

    before = bytes_read()
    step, loss, data = checkpoint_summary(tmp_path / "large.ckpt")
    assert bytes_read() - before < 2_000_000
    assert (step, loss, data["corpus"]) == (5, saved["val_loss"], saved["datamodule_hyper_parameters"]["corpus"])
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    assert checkpoint_summary(tmp_path / "x.ckpt") is checkpoint_summary(tmp_path / "none.ckpt") is None


@pytest.mark.parametrize(
    "how, reason",
    [
        ([], "ended after step 5: trainer.max_steps=5 is reached"),
        (["--trainer.max_time={milliseconds: 1}"], "the time that it was given is used up (0 s; trainer.max_time)"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss", "--model.learning_rate=0"]
            + ["--trainer.callbacks.patience=2", "--trainer.val_check_interval=1"],
            "ended after step 3: EarlyStopping with patience=2: Monitored metric val/loss did not improve in the last",
        ),
        (["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"], "trainer.max_epochs=1 is reached"),
        (["--trainer.callbacks+=test_options.Enough"], "ended after step 2: a callback asked for it"),
    ],
)
def test_a_run_says_why_it_ended(tmp_path, text_file, capsys, how, reason):
    main(["fit", *TINY, *how, f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"])
    assert reason in capsys.readouterr().out


class Enough(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 2


def test_what_was_asked_of_lightning_is_printed(nursery, tmp_path, text_file):
    how = ["--trainer.profiler=simple", "--trainer.enable_model_summary=true", "--trainer.max_time=00:01:00:00"]
    assert nursery.run(tmp_path, "fit", *TINY, *how, "--data.corpus", text_file) == 0
    said = nursery.log.read_text()
    assert "FIT Profiler Report" in said and "run_training_batch" in said and "Trainable params" in said
    assert "GPU available" not in said and "Tip" not in said and "Seed set" not in said


def test_a_limit_that_is_used_up_is_said_when_a_run_goes_on(run, tmp_path, fails):
    saved, path = read_checkpoint(run / "checkpoints" / "last.ckpt"), tmp_path / "last.ckpt"
    epochs = saved["loops"]["fit_loop"]["epoch_progress"]["current"]
    write_checkpoint(saved | {"callbacks": {"Timer": {"time_elapsed": {"train": 61.0}}}}, path)
    go_on = "fit", "--ckpt_path", path, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=9"
    assert "trainer.max_time=00:00:01:00 leaves nothing to do after 61 s of training" in fails(
        *go_on, "--trainer.max_time=00:00:01:00"
    )
    epochs["processed"] = 3
    write_checkpoint(saved, path)
    assert "trainer.max_epochs=3 leaves nothing to do after 3 epochs" in fails(*go_on, "--trainer.max_epochs=3")
    new = "fit", *TINY, f"--trainer.default_root_dir={tmp_path}"
    assert "max_time=00:00:00:00 leaves nothing to do" in fails(*new, "--trainer.max_time=00:00:00:00")
    assert "max_epochs=0 leaves nothing to do" in fails(*new, "--trainer.max_epochs=0")


# --- what can't be: one sentence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.betas=[-1,0.5]"], "betas=(-1.0, 0.5) must be 0 or more and less than 1"),
        (["--model.betas=[0.9,.nan]"], "betas=(0.9, nan)"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch=0: give a number of epochs, 1 or more"),
        (["--trainer.devices="], "trainer.devices=, "),
        (["--trainer.devices=[]"], "trainer.devices=[]"),
        (["--trainer.strategy=ddp_spawn"], "take ddp_flat or ddp"),
        (["--trainer.strategy=ddp_notebook"], "take ddp_flat or ddp"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.default_root_dir=s3://bucket/runs"], "a folder on a disk of this machine"),
        (["--trainer.default_root_dir=$HOME/runs"], "a folder on a disk of this machine"),
        (["--name=$HOME"], "name='$HOME'"),
        ([f"--data.batch_size={2**63}"], f"data.batch_size={2**63} is beyond the numbers of 64 bits"),
        ([f"--model.warmup_steps={10**30}"], "model.warmup_steps=1000000000000000000000000000000 is beyond"),
        (["--trainer.limit_train_batches=1e300"], "trainer.limit_train_batches=1e+300 is beyond"),
        (
            ["--trainer.callbacks+=LearningRateFinder"],
            "LearningRateFinder would change the learning rate",
        ),
        (["--trainer.callbacks=BatchSizeFinder"], "BatchSizeFinder would change the learning rate"),
        (["--trainer.max_time=5"], "DD:HH:MM:SS"),
    ],
)
def test_settings_that_can_not_be_are_refused(tmp_path, fails, text_file, flags, message):
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    assert message in fails("fit", *TINY, *where, *flags)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("find", ["lr_find", "scale_batch_size"])
def test_a_tuner_is_told_in_one_sentence_too(tmp_path, text_file, find):
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=2, logger=False)
    model, data = LanguageModel(vocab_size=32, block_size=16, n_layer=1, n_head=1, n_embd=8), text_file
    with pytest.raises(ValueError, match="would change the learning rate or the batch size"):
        getattr(Tuner(trainer), find)(model, datamodule=TextDataModule(str(data), block_size=16, batch_size=4))


def test_numbers_too_large_for_memory_are_said_to_be(tmp_path, text_file, ckpt, capsys, fails):
    assert f"num_samples={2**64} is beyond" in fails("generate", f"--ckpt_path={ckpt}", f"--num_samples={2**64}")
    with pytest.raises(SystemExit) as stop:
        main(["generate", f"--ckpt_path={ckpt}", "--prompt=the", f"--num_samples={2**60}"])
    assert stop.value.code == 1 and "out of memory: " in capsys.readouterr().err
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}", f"--data.batch_size={2**63 - 1}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TINY, *where])
    assert stop.value.code == 1 and "out of memory: take a smaller batch or model" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Error detected in")  # where, which is what was asked for
def test_detect_anomaly_ends_with_a_sentence(tmp_path, text_file, capsys):
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TINY, *where, "--trainer.detect_anomaly=true", "--model.learning_rate=1e30"])
    assert stop.value.code == 1 and "trainer.detect_anomaly stopped the training" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["TQDMProgressBar", "test_options.Enough"])
def test_a_bar_of_the_users_own_takes_the_place_of_ours(tmp_path, text_file, given, capsys):
    where = [f"--data.corpus={text_file}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *TINY, *where, f"--trainer.callbacks={given}"])
    assert ("val" in capsys.readouterr().out.split("ended after")[0].split("steps")[-1]) == ("Enough" in given)


def test_unknown_characters_name_the_flag_that_helps_here(ckpt, fails, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the € cat", encoding="utf-8")
    for ask in ["generate", "--prompt", "the € cat"], ["score", "--text_file", str(tmp_path / "text.txt")]:
        said = fails(*ask, f"--ckpt_path={ckpt}")
        assert "'€'" in said and "--on_unknown drop" in said and "data.on_unknown" not in said
        main([*ask, f"--ckpt_path={ckpt}", "--on_unknown=drop"])
        assert "left out what this net doesn't know: '€'" in capsys.readouterr().err


def test_a_value_with_a_dash_is_told_where_it_goes(fails):
    assert fails("generate", "--prompt", "-x").endswith("it follows an equals sign, as in --prompt=-x")


def test_the_meta_device_is_refused(ckpt, fails):
    assert "device=meta can't be used here" in fails("generate", f"--ckpt_path={ckpt}", "--device=meta")


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("how", [{}, MODERN], ids=["gpt2", "modern"])
def test_an_onnx_program_of_a_short_context_takes_any_length(tmp_path, T, how):
    runtime = pytest.importorskip("onnxruntime")
    net = loud(GPT(GPTConfig(V, T, n_layer=2, n_head=2, n_embd=16, dropout=0.0, **how))).float()
    write_onnx(net, tmp_path / "x.onnx", "{}")
    program = runtime.InferenceSession(tmp_path / "x.onnx")
    for length in range(1, T + 1):
        idx = torch.randint(V, (3, length))
        (logits,) = program.run(None, {"idx": idx.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), net(idx), rtol=0, atol=1e-4)
