"""What the READMEs tell people to do, works: their commands, their Python and their links, in a shortened form."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from conftest import TINY

from lightning_gpt.benchmarks import generation
from lightning_gpt.cli.main import dispatch, main
from lightning_gpt.model.gpt import GPTConfig

ROOT = Path(__file__).parents[1]
FOLDERS = "", "checkpoints", "configs", "lightning_gpt/*", "notebooks", "tests"
READMES = sorted({path.resolve() for folder in FOLDERS for path in ROOT.glob(f"{folder}/README.md".lstrip("/"))})
TEXT = {path: path.read_text(encoding="utf-8") for path in READMES}
every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))

TOOLS = {"cat", "cp", "echo", "head", "mkdir", "printf", "sed", "tail"}  # run as they are
NOT_RUN = {"cd", "git", "jupyter", "pip", "source", "tensorboard"}  # they change or need more than a folder
OTHER_CHARACTERS = 'In 1603, "Hamlet" was printed: £5, he said.\n'  # a reader's text is not Tiny Shakespeare
SIZES = [*TINY, "--model.block_size=64"]


def blocks(readme, language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT[readme], re.S)


def command_lines(readme):
    lines = "\n".join(blocks(readme, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


FIRST = {line: readme for readme in reversed(READMES) for line in command_lines(readme)}  # where it stands first


def split_commands(line):
    """The commands of a line, each as words, without assignments and redirections."""
    words, commands = shlex.shlex(line, posix=True, punctuation_chars="|&;<>"), [[]]
    words.whitespace_split, redirected = True, False
    for word in words:
        if set(word) <= set("<>"):
            redirected = True
        elif set(word) <= set("|&;"):
            commands.append([])
        elif not redirected and (commands[-1] or not re.match(r"[A-Z_]+=", word)):
            commands[-1].append(word)
        else:
            redirected = False
    return commands


def shorten(args):
    """The same command line, with a small net, few steps and short texts."""
    if args[0] == "fit":
        # the sizes are those of the checkpoint, or of the lecture's step
        fixed = "--ckpt_path" in args or "lecture" in " ".join(args)
        small = ["--trainer.max_steps=7", "--trainer.accelerator=cpu"] if fixed else SIZES
        small += ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.limit_val_batches=2"]
        return [*args, *small, "--trainer.precision=32-true", "--model.compile=false", "--data.name_augmentation=0"]
    if args[0] in ("sft", "reward", "dpo", "grpo"):
        small = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1", "--data.batch_size=4"]
        if args[0] in ("dpo", "grpo"):
            small += ["--data.val_texts=4", "--data.text_batch_size=2", "--model.max_new_tokens=50"]
        return [*args, *small, *["--model.group_size=2"] * (args[0] == "grpo")]
    if args[0] == "preferences":
        return [*args, "--pairs=20", "--max_new_tokens=50", "--device=cpu"]
    if args[0] == "frontier":
        return [*args, "--texts=64", "--group_size=16", "--max_new_tokens=50", "--device=cpu"]
    return [*args, "--max_new_tokens=20"] if args[0] == "generate" else args


def run_command(args, monkeypatch):
    """Run the command of one line: ours in this process, a target of make as a dry run."""
    program = Path(args[0]).name
    if program == "make":
        subprocess.run(["make", "--dry-run", *args[1:]], cwd=ROOT, check=True, capture_output=True)
    elif program == "lightning-gpt":
        run_ours(args[1:])
    elif "-m" in args and program in ("python", "python3", "torchrun"):
        module, rest = args[args.index("-m") + 1], args[args.index("-m") + 2 :]
        if module == "lightning_gpt":
            run_ours(rest)
        elif module == "lightning_gpt.benchmarks.training":
            training = importlib.import_module(module)
            small = ["--bench.steps=2", "--trainer.accumulate_grad_batches=1", "--trainer.default_root_dir=bench"]
            training.train([*shorten(["fit", *rest]), *small], training.Bench)
        elif module == "lightning_gpt.benchmarks.generation":
            sizes = GPTConfig(65, 8, 1, 1, 8, dropout=0.0)
            monkeypatch.setattr(generation, "MODELS", dict.fromkeys(generation.MODELS, sizes))
            monkeypatch.setattr(generation, "time_generation", lambda *_: (1.0, 1.0))
            monkeypatch.setattr(generation, "time_recomputing", lambda *_: 1.0)
            generation.jsonargparse.auto_cli(
                generation.bench, args=rest, as_positional=False, parser_class=generation.Parser
            )
        else:
            assert module in ("venv", "pip"), f"{module} is not known here"
    else:
        assert program in NOT_RUN, f"{program} is not known here: add it to TOOLS or NOT_RUN"


def run_ours(args):
    if args[:1] == ["import"]:
        source = args[args.index("--source") + 1]
        if not Path(source.partition(":")[2]).exists() or ":" not in source:
            return  # it would come from a hub
    try:
        main(shorten(args) if args else args)
    except SystemExit as stop:  # of --help and --print_config
        assert not stop.code


@pytest.fixture(scope="session")
def shakespeare_run(tmp_path_factory):
    """The folder of a short run on a text with all characters of Tiny Shakespeare, and that text."""
    root = tmp_path_factory.mktemp("readme")
    text = (ROOT / "lightning_gpt/data/tiny_shakespeare.txt").read_text(encoding="utf-8")
    (root / "text.txt").write_text(text[:20_000] + "".join(sorted(set(text))))
    dispatch(["fit", *SIZES, "--data.corpus", str(root / "text.txt"), "--trainer.default_root_dir", str(root)])
    return root / "tiny" / "version_0", root / "text.txt"


@pytest.fixture
def folder(shakespeare_run, tmp_path, monkeypatch):
    """The root folder of the repository, as it is after `make train`, with some files of a reader's own."""
    run, text = shakespeare_run
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("checkpoints", "build", "dist"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(run, tmp_path / "checkpoints" / "laptop" / "version_0")
    shutil.copy(text, tmp_path / "my_text.txt")
    for name, n in ("train", 3000), ("val", 2000):
        np.random.default_rng(0).integers(300, size=n, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "readme",  # the stages of alignment take minutes
    [pytest.param(path, marks=[pytest.mark.slow] * (path.parent.name == "alignment")) for path in READMES],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_commands_of_a_readme_run_in_their_order(readme, folder, shakespeare_run, monkeypatch):
    """Each line runs once, in the README where it stands first; what makes files runs in each."""
    for name in set(re.findall(r"checkpoints/(\w+)/version_0", TEXT[readme])) - {"laptop", "reward", "dpo", "grpo"}:
        shutil.copytree(shakespeare_run[0], folder / "checkpoints" / name / "version_0")
    for line in command_lines(readme):
        commands = split_commands(line)
        if all(command[0] in TOOLS for command in commands):
            subprocess.run(["bash", "-ec", line], check=True, capture_output=True)
            for made in re.findall(r"> (\w*_text\.txt)", line):
                with open(folder / made, "a", encoding="utf-8") as file:
                    file.write(OTHER_CHARACTERS)
            continue
        if FIRST[line] != readme and "--output" not in line:
            continue
        with open(folder / "my_text.txt" if "|" in line or " - " in line else os.devnull, encoding="utf-8") as file:
            monkeypatch.setattr(sys, "stdin", file)
            for command in commands:
                try:
                    if command[0] not in TOOLS:
                        run_command(command, monkeypatch)
                except BaseException as error:
                    error.add_note(f"in {readme.relative_to(ROOT)}: {line}")
                    raise


@every_readme
def test_the_python_of_a_readme_runs(readme, folder, monkeypatch):
    class ShortTrainer(L.Trainer):
        def __init__(self, **kwargs):
            short = {"max_steps": min(kwargs.get("max_steps", 4), 10), "limit_val_batches": 2, "accelerator": "cpu"}
            short |= {"val_check_interval": 4} if "val_check_interval" in kwargs else {}
            super().__init__(**kwargs | short | {"enable_progress_bar": False, "enable_model_summary": False})

    monkeypatch.setattr(L, "Trainer", ShortTrainer)
    threads, names = torch.get_num_threads(), {"__name__": "readme"}
    for block in blocks(readme, "python"):
        exec(compile(block, str(readme), "exec"), names)
    torch.set_num_threads(threads)


def anchors(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_readme
def test_what_a_readme_links_exists(readme):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", TEXT[readme]):
        name, _, anchor = link.partition("#")
        path = readme.parent / name if name else readme
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_the_top_readme_names_the_targets_of_make():
    targets = set(re.findall(r"\bmake ([a-z-]+)", TEXT[ROOT / "README.md"]))
    assert {"train", "board", "test", "lint"} <= targets
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
