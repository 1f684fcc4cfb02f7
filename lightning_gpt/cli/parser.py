"""The argument parser: jsonargparse, with text options taken literally and errors in one line."""

import argparse
import re
import sys
from functools import partial
from pathlib import PurePath
from typing import Any, NoReturn, get_args

import jsonargparse
import yaml

from ..errors import print_error
from .suggestions import nearest_argument, nearest_option, wrong_value


class Dumper(yaml.SafeDumper):
    """Quotes strings such as 1e3, which jsonargparse reads as a number and PyYAML as a string."""


FLOAT_WITH_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+")
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_WITH_EXPONENT, list("-+.0123456789"))
as_yaml = partial(yaml.dump, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
jsonargparse.set_dumper("yaml", as_yaml)


WRONG_VALUE = re.compile(r'.*Parser key "(?P<key>[^"]+)":.*(Got value|Given value|load config):? (?P<value>.*)')


class LiteralText(str):
    """A string that is taken literally: jsonargparse parses YAML only in plain str."""


def types_of(action: argparse.Action) -> set[Any]:
    """The types that an option accepts, without None."""
    hint = getattr(action, "_typehint", str)
    return set(get_args(hint) if type(None) in get_args(hint) or str in get_args(hint) else [hint]) - {type(None)}


def is_text(action: argparse.Action) -> bool:
    """Whether an option accepts only a string or a path, apart from null."""
    types = types_of(action)
    return str in types and all(isinstance(t, type) and issubclass(t, (str, PurePath)) for t in types)


def is_flag(action: argparse.Action | None) -> bool:
    """Whether an option accepts only true and false, apart from null."""
    return action is not None and types_of(action) == {bool}


class Parser(jsonargparse.ArgumentParser):
    """Takes text options literally, requires full option names, and reports errors in one line.

    Boolean options are flags: `--json`, `--no-json`.

    jsonargparse reads every value as YAML, where `# 1`, `~` and the empty string are null. Here only `null` is.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            message = self.explain_unknown(found[1])
        elif found := re.search(r"option '(\S+)'$|Option '(\S+)' is not accepted$", message):  # in a config
            message = self.explain_unknown(f"--{found[1] or found[2]}")
        elif found := re.match(r'Linked "(\S+)" must be given via "(\S+)"', message):
            message = f"--{found[1]} follows from --{found[2]}: give that one"
        elif found := re.match(r"the following arguments are required: (.*)", message):
            message = f"--{found[1].replace(', ', ' and --')} must be given"
        elif found := re.search(WRONG_VALUE, message):
            message = self.explain_value(found["key"], found["value"].strip("'\"")) or message
        if message.endswith("expected one argument") and f"{self.args[-1]}:" not in message:  # something follows
            message += "; for a value that begins with a dash, use an equals sign, as in --prompt=-x"
        print_error(message)
        sys.exit(2)

    def explain_unknown(self, arg: str) -> str:
        """A sentence about an option that does not exist, or about a word where none is expected."""
        parsers = [self, *(self._subcommands_action.choices.values() if self._subcommands_action else ())]
        actions = {name: action for parser in parsers for name, action in parser._option_string_actions.items()}
        options = [name for name, action in actions.items() if not hasattr(action, "source")]  # not those that follow
        name = arg.split("=")[0]
        if arg.startswith("-"):
            meant, problem = nearest_option(name, options), f"there is no option {name}"
        else:
            meant, problem = nearest_argument(arg, options), f"the word {arg!r} follows no option"
        return f"{problem}: did you mean {meant}?" if meant else f"{problem}; --help lists the options"

    def explain_value(self, key: str, value: str) -> str | None:
        """A sentence about a value that its option does not take; None if jsonargparse's own is better."""
        if key == "data":
            return f"--data {value}: did you mean --data.corpus {value}?"
        action = self._option_string_actions.get(f"--{key}")
        return wrong_value(key, value, getattr(action, "_typehint", None))

    def parse_args(self, args=None, *rest, **kwargs):  # type: ignore[override]
        """As jsonargparse does, but a class's own option also works without `=`: --trainer.callbacks.option VALUE."""
        joined: list[str] = []
        for arg in sys.argv[1:] if args is None else args:
            option = joined[-1] if joined else ""
            nested = option.startswith("--") and "." in option and "=" not in option
            if nested and not arg.startswith("-") and option not in self._option_string_actions:
                joined[-1] += f"={arg}"
            else:
                joined.append(arg)
        options = super().parse_args(joined, *rest, **kwargs)
        for key, value in options.items():
            if isinstance(value, LiteralText):
                options[key] = str(value)
            is_count = isinstance(value, int) or isinstance(value, float) and "batches" in key
            if is_count and abs(value) >= 2**63:
                self.error(f"{key}={value} does not fit in 64 bits, the size of PyTorch's integers")
        return options

    def _parse_optional(self, arg_string):
        if arg_string.startswith("--no-") and is_flag(self._option_string_actions.get(f"--{arg_string[5:]}")):
            arg_string = f"--{arg_string[5:]}=false"
        found = super()._parse_optional(arg_string)
        one = found[0] if isinstance(found, list) and found else found  # Python >= 3.12 returns a list of one
        if one and is_flag(one[0]):
            one[0].nargs, one[0].const = "?", True  # accept --json as well as --json true and --json false
        if one and hasattr(one[0], "_typehint") and one[-1] is not None and one[1] not in one[0].option_strings:
            one = *one[:-1], LiteralText(one[-1])  # an option of a class, which its own parser reads
            return [one] if isinstance(found, list) else one
        return found

    def _get_values(self, action, arg_strings):
        value = super()._get_values(action, arg_strings)
        return literal_value(action, value) if type(value) is str and hasattr(action, "_typehint") else value

    def _check_value_key(self, action, value, key, cfg, append=False):
        if hasattr(action, "_typehint"):
            if type(value) is LiteralText:
                value = literal_value(action, str(value))
            elif type(value) is str and types_of(action) == {list[str]}:
                value = [value]
            if isinstance(value, str) and (is_text(action) or str in types_of(action) and is_yaml_null(value)):
                return str(value)  # also in a config file, whose strings are already parsed
        return super()._check_value_key(action, value, key, cfg, append)


def literal_value(action: argparse.Action, value: str) -> str | list[str] | None:
    """The parsed value of a text option or null; other values are returned as they are, for jsonargparse to parse."""
    if value == "null" and type(None) in get_args(action._typehint):  # type: ignore[attr-defined]
        return None
    if is_text(action):
        return LiteralText(value)
    if types_of(action) == {list[str]}:
        return parse_list(action, value)
    if value != "null" and is_yaml_null(value):
        if str in types_of(action):
            return LiteralText(value)
        raise argparse.ArgumentError(action, f"{value!r} is not a value; where an option may be unset, write null")
    return value


def parse_list(action: argparse.Action, value: str) -> list[str]:
    """A single string, or a YAML list in brackets whose items all stay strings."""
    try:
        node = yaml.compose(value, yaml.BaseLoader) if value.startswith("[") and value.endswith("]") else None
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(text, yaml.ScalarNode) for text in node.value):
        return [value]
    texts = [text.value for text in node.value]
    if len(texts) == 1 and node.value[0].style is None:
        raise argparse.ArgumentError(
            action, f"{value} may be a string or a list of one: write ['{value}'] or ['{texts[0]}']"
        )
    return texts


def is_yaml_null(value: str) -> bool:
    try:
        return yaml.safe_load(value) is None
    except (yaml.YAMLError, ValueError):
        return False
