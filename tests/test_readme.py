"""What the README tells people to do, works."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import TINY

from lightning_gpt.cli.main import main

README = Path(__file__).parents[1] / "README.md"
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.S) for line in block.splitlines()]
OURS = [line for line in COMMANDS if line.startswith("lightning-gpt ")]


@pytest.mark.parametrize("line", OURS)
def test_every_command_runs(line, run, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "laptop", "five":
        shutil.copytree(run, tmp_path / "checkpoints" / name / "version_0")
    for name in "my_text.txt", "five_plays.txt", "winters_tale.txt", "plays/one.txt", "letters/one.md":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text_file.read_text())
    shutil.copy(run / "checkpoints" / "best.ckpt", "imported.ckpt")
    args = shlex.split(line)[1:]
    if args[0] == "import":
        main(shlex.split(OURS[OURS.index(line) - 1])[1:])  # the line before makes what this one takes
    args = [arg.replace("ROMEO:", "the") for arg in args]  # the short run speaks of cats
    if args[0] == "fit":
        small = ["--trainer.max_steps=7"] if "--ckpt_path" in args or "lecture/" in line else TINY
        args += [*small, "--trainer.limit_val_batches=2", "--model.compile=false", "--data.name_augmentation=0"]
    main(args)


def test_every_make_target_exists():
    targets = {target for line in COMMANDS for target in re.findall(r"\bmake ([a-z-]+)", line)}
    assert {"train", "generate", "board", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=README.parent, check=True, capture_output=True)


def test_the_python_lines_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "checkpoints" / "laptop" / "version_0")
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S):
        exec(block, {})


def test_every_file_that_it_links_exists():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README.read_text())
    assert links and all((README.parent / link).exists() for link in links)
