"""The command line's options: text to the letter, full names, and a sentence for what can't be."""

import json
import typing
from pathlib import Path

import pytest
from jsonargparse import capture_parser

from lightning_gpt.main import as_yaml, main

# what YAML reads as nothing, a number, a date, a bool, a list, a mapping, a reference, or not at all
SHAPES = "# Chapter 1|#1.txt|###|~|Null|NULL|a null b|1e3|-1|007|0x1F|1_000|.nan|2020-01-01|12:30:45|yes|true|'q'"
SHAPES += '|"q"|{a: b}|- a|a: b| lead | ||$HOME|&a|*a|!!set|%x|@x|`|? a|\t|---|...|=|<<|-|[a|None|[]|é € 語|a\nb'
SHAPES = [*SHAPES.split("|"), "|"]
COMMANDS = {"generate": [], "score": ["--text_file=x"], "shrink": [], "export": ["--to=hf"]}
COMMANDS |= {"import": ["--from=x", "--output=x"], "fit": [], "validate": []}


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
        how = ["--trainer.callbacks+=lightning_gpt.look_inside.LookInside", "--trainer.callbacks.passage", text]
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


@pytest.mark.parametrize("command", ["generate", "score", "report", "shrink", "import", "export"])
def test_an_option_of_a_quick_command_has_its_full_name(fails, command):
    required = COMMANDS.get(command, [])
    assert "unrecognized arguments: --conf" in fails(command, *required, "--conf=x.yaml")


def test_a_config_that_is_written_is_read_as_it_was(parse, tmp_path):
    for text in SHAPES:
        written = as_yaml({"prompt": text, "stop": [text]})
        (tmp_path / "config.yaml").write_text(written)
        options = parse("generate", f"--config={tmp_path}/config.yaml")
        assert (options.prompt, options.stop) == (text, [text])
