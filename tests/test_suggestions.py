"""A command line that is almost right is understood, or its error names what is meant; help fits a screen."""

import io
import os
import shlex
import sys

import pytest
import yaml
from conftest import TINY

from lightning_gpt import __version__
from lightning_gpt.cli.main import main
from lightning_gpt.cli.suggestions import CONFIGS, spell_out

SLIPS = {
    "fit laptop": "--config laptop",
    "fit lapto": "--config laptop",
    "fit --config lapto": "laptop",
    "fit last": "--ckpt_path last",
    "fit --max_steps 3": "--trainer.max_steps",
    "fit --batch_size 3": "--data.batch_size",
    "fit --lr 1e-3": "--model.learning_rate",
    "fit --model.lr=1e-3": "--model.learning_rate",
    "fit --corpus my.txt": "--data.corpus",
    "fit --data my.txt": "--data.corpus my.txt",
    "fit --model.n_layers 3": "--model.n_layer",
    "fit --trainer.gpus 1": "--trainer.devices",
    "fit --compile": "--model.compile",
    "fit --resume": "--ckpt_path last",
    "fit --seed 3": "--seed_everything",
    "fit --trainer.callbacks=EarlyStoppin": "EarlyStopping",
    "fit --trainer.callbacks=EarlyStopping --trainer.callbacks.monitr=x": "--monitor",
    "validate --config laptop X.ckpt": "--ckpt_path X.ckpt",
    "generate --topk 4": "--top_k",
    "generate --max_tokens 4": "--max_new_tokens",
    "generate --gpu": "--device cuda",
    "generate --bf16": "--precision bfloat16",
    "generate --seed 3 ROMEO:": "the prompt first, right after generate",
    "fit --gpu": "--trainer.accelerator gpu",
    "fit --bf16": "--trainer.precision bf16-mixed",
    "fit --no-compile": "--no-model.compile",
    "fit lapto.yaml": "--config laptop",
    "grpo --model.rewrd verse": "--model.reward",
    "train": "fit",
    "laptop": "fit --config laptop",
    "generat": "generate",
    "chat": "generate --interactive",
    "some.ckpt": "generate --ckpt_path some.ckpt",
}


@pytest.mark.parametrize("line", SLIPS)
def test_the_error_for_a_slip_names_what_is_meant(fails, line):
    assert fails(*shlex.split(line)).endswith(f"did you mean {SLIPS[line]}?")


@pytest.mark.parametrize(
    "text, meant", [("model: {n_layers: 3}", "--model.n_layer"), ("n_layer: 3", "--model.n_layer")]
)
def test_the_error_for_a_wrong_name_in_a_config_names_what_is_meant(fails, tmp_path, text, meant):
    (tmp_path / "mine.yaml").write_text(text)
    assert fails("fit", "--config", tmp_path / "mine.yaml").endswith(f"did you mean {meant}?")


def test_what_is_like_nothing_gets_no_suggestion(fails):
    for option in "--qwertz", "--max_tokens", "--lora":
        assert fails("fit", option).endswith(f"there is no option {option}; --help lists the options")
    assert "use fit, sft" in fails("qwertz")


def test_options_before_the_command_are_put_behind_it(fails):
    assert fails("--config", "laptop", "fit").endswith("the command comes first: lightning-gpt fit --config laptop")


@pytest.mark.parametrize(
    "line, message",
    [
        ("fit --model.position rotary", "model.position=rotary: give learned or rope"),
        ("fit --model.n_layer three", "model.n_layer=three: give an integer"),
        ("fit --model.betas [a,b]", "model.betas=a: give 2 numbers in brackets"),
        ("fit --trainer.precision bf17", "32-true, 64-true, bf16 or null; did you mean bf16?"),
        ("generate --temperature hot", "temperature=hot: give a number"),
        ("generate --top_k all", "top_k=all: give an integer or null"),
        ("generate --json maybe", "json=maybe: give true or false"),
        ("generate --on_unknown drp", "on_unknown=drp: give error or drop; did you mean drop?"),
        ("score", "--text_file must be given"),
        ("import", "--source and --output must be given"),
        ("fit --model.vocab_size 9", "--model.vocab_size follows from --data.vocab_size: give that one"),
    ],
)
def test_the_error_for_a_wrong_value_lists_the_right_ones(fails, line, message):
    error = fails(*line.split())
    assert error.endswith(message) and not any(word in error for word in ("Union", "NoneType", "typing", "Parser key"))


@pytest.mark.parametrize(
    "line, spelled",
    [
        ("generate ROMEO:", ["--prompt=ROMEO:"]),
        ("generate X.ckpt --seed 3", ["--ckpt_path=X.ckpt", "--seed", "3"]),
        ("generate -", ["--prompt_file=-"]),
        ("generate --prompt=To be", ["--prompt=To be"]),
        ("generate To be --seed 3", ["--prompt=To be", "--seed", "3"]),
        ("validate X.ckpt --data.batch-size=3", ["--ckpt_path=X.ckpt", "--data.batch_size=3"]),
        ("score my.txt", ["--text_file=my.txt"]),
        ("score -", ["--text_file=-"]),
        ("generate --stop THE END --no-json", ["--stop", "THE END", "--no-json"]),
        ("generate --max-new-tokens 3 --prompt a-b", ["--max_new_tokens", "3", "--prompt", "a-b"]),
        ("generate --prompt --seed 3", ["--prompt", "--seed", "3"]),
        ("fit --save-every-n-steps 3 laptop", ["--save_every_n_steps", "3", "laptop"]),
    ],
)
def test_what_people_leave_out_is_spelled_out(line, spelled):
    assert spell_out(line.split()) == [line.split()[0], *spelled]


def test_the_first_word_is_the_prompt_the_text_or_the_checkpoint(ckpt, text_file, capsys):
    for line in (
        ["generate", "the cat", f"--ckpt-path={ckpt}", "--max-new-tokens=4"],
        ["score", str(text_file), f"--ckpt_path={ckpt}"],
        ["validate", str(ckpt)],
    ):
        main(line)
    out = capsys.readouterr().out
    assert out.startswith("the cat") and f"{text_file} under" in out and "val/loss" in out


@pytest.mark.parametrize("piped, shown", [("the mat\n", "the mat"), ("the\nmat\n\n", "the\nmat\n"), ("", "\n")])
def test_a_prompt_is_read_from_a_pipe(ckpt, capsys, monkeypatch, piped, shown):
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        file.write(piped)
    with open(reader) as file:
        monkeypatch.setattr(sys, "stdin", file)
        main(["generate", f"--ckpt_path={ckpt}", "--max_new_tokens=3"])
    assert capsys.readouterr().out[: len(shown)] == shown


def test_a_prompt_or_a_file_as_stdin_leaves_stdin_alone(ckpt, capsys, monkeypatch, tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"the mat\n")
    os.close(writer)
    (tmp_path / "lines.txt").write_text("the mat\n")  # as in a loop over the lines of a file
    for source, prompt in (reader, ["a cat"]), (tmp_path / "lines.txt", []):
        with open(source) as file:
            monkeypatch.setattr(sys, "stdin", file)
            main(["generate", *prompt, f"--ckpt_path={ckpt}", "--max_new_tokens=3"])
            assert file.read() == "the mat\n" and not capsys.readouterr().out.startswith("the mat")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the mat"))  # as in a notebook, it is no file
    main(["generate", f"--ckpt_path={ckpt}", "--max_new_tokens=3"])


# --- help -------------------------------------------------------------------------------------------------------------


def help_of(capsys, *args):
    capsys.readouterr()
    try:
        main([*args, "--help"])
    except SystemExit as stop:
        assert not stop.code
    return capsys.readouterr().out


def test_the_help_of_fit_fits_a_screen_and_shows_the_values_that_fit_has(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, "fit")
    lines = text.splitlines()
    assert len(lines) < 50 and all(len(line) <= 80 for line in lines)
    laptop = yaml.safe_load((CONFIGS / "laptop.yaml").read_text())
    assert f"--trainer.max_steps {laptop['trainer']['max_steps']} " in text
    assert f"--model.n_layer {laptop['model']['n_layer']} " in text
    assert "--model.n_layer 3 " in help_of(capsys, "fit", "--config=nanogpt", "--model.n_layer=3")
    assert "--config lecture/head " in help_of(capsys, "fit", "--model.lecture_step=head")


def test_each_command_has_a_short_help_and_a_full_one(capsys):
    shown, full = help_of(capsys, "validate"), help_of(capsys, "help", "validate")
    assert shown == full and "--data.corpus" in shown and "n_layer" not in shown and "max_steps" not in shown
    main(["generate", "--help", "all"])
    everything = capsys.readouterr().out
    assert "vocabulary's first character if it has no newline" in " ".join(everything.split())
    assert len(help_of(capsys, "generate").splitlines()) < 50 < len(everything.splitlines())
    assert "--model.group_size 8" in help_of(capsys, "grpo") and "lightning-gpt grpo" in help_of(capsys, "grpo")
    with pytest.raises(SystemExit):
        main(["fit", "--help", "all"])
    everything = capsys.readouterr().out
    assert "--trainer.detect_anomaly" in everything and "hpc" not in everything and "registry:" not in everything


def test_the_version_is_printed(capsys):
    for args in ["--version"], ["version"]:
        main(args)
        assert capsys.readouterr().out == f"lightning-gpt {__version__}\n"


def test_a_suggested_command_line_works(tmp_path, text_file, capsys):
    flags = f"--save-every-n-steps 3 --data.corpus {text_file} --trainer.default-root-dir {tmp_path}"
    main(["fit", *TINY, *flags.split()])
    assert list(tmp_path.rglob("last.ckpt"))
