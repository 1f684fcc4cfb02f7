"""The notebook runs from top to bottom, and its stored outputs are those of its code."""

import ast
import importlib.util
import io
import logging
import re
import socket
import warnings
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

import lightning_gpt

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "notebooks" / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
NOTEBOOK = nbformat.read(run.NOTEBOOK, as_version=4)
CELLS = run.code_cells(NOTEBOOK)
BLOB = "https://github.com/lightning-gpt/lightning-gpt/blob/main/"
SHOWS = {"print", "print_sample", "show_figure", "show_source", "train"}  # calls that give outputs


def parse(cell):
    """The syntax tree of a cell, without the lines that start with a percent sign."""
    return ast.parse(re.sub(r"^(\s*)%.*", r"\1pass", cell.source, flags=re.M))


def calls(tree):
    """The names of the functions that a cell calls itself, outside of its definitions."""
    nodes = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found = [call.func for node in nodes for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {func.id for func in found if isinstance(func, ast.Name)}


def texts(cell):
    """The outputs of a cell as text; of a picture, only that there is one."""
    shown = []
    for output in run.merge_streams(deepcopy(cell.outputs)):
        if output.output_type == "stream":
            shown.append((output.name, output.text))
        else:
            shown += [(kind, None if kind == "image/png" else text) for kind, text in sorted(output.data.items())]
    return shown


def kinds(cell):
    return [kind for kind, _ in texts(cell)]


def printed(*calls_of_cell):
    """The stored text of the cells whose source contains all of these strings."""
    cells = [cell for cell in CELLS if all(part in cell.source for part in calls_of_cell)]
    assert cells
    return "\n".join(text or "" for cell in cells for _, text in texts(cell))


def test_the_stored_outputs_are_those_of_the_stored_code():
    nbformat.validate(NOTEBOOK)
    assert [cell.execution_count for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    assert NOTEBOOK.metadata.source_hash == run.source_hash(NOTEBOOK), "run notebooks/run.py: the code has changed"


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_a_cell_has_stored_outputs_if_and_only_if_it_shows_something(cell):
    if "live" in run.tags(cell):
        assert not cell.outputs
    else:
        assert bool(calls(parse(cell)) & SHOWS) == bool(cell.outputs)


def test_the_stored_outputs_name_no_machine_and_have_no_control_characters():
    forbidden = (
        r"(/home|/root|/tmp|/usr|/opt|/Users|/work|site-packages|C:\\)|localhost|127\.0\.0\.1| at 0x|[\r\x1b\x08]"
    )
    for cell in CELLS:
        for kind, text in texts(cell):
            assert kind in ("stdout", "text/plain", "image/png"), kind  # GitHub draws these
            assert not re.search(forbidden, text or ""), (cell.id, text)
            assert socket.gethostname() not in (text or "")


def test_the_notebook_is_small_and_its_pictures_have_alternative_texts():
    assert run.NOTEBOOK.stat().st_size < 500_000
    outputs = [output for cell in CELLS for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4 and all(picture.metadata["image/png"]["alt"] for picture in pictures)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_the_notebook_imports_public_names_only(cell):
    for node in ast.walk(parse(cell)):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("lightning_gpt")]
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_gpt"):
            names = {alias.name for alias in node.names}
            public = {"lecture"} if node.module == "lightning_gpt.model" else {*lightning_gpt.__all__}
            assert node.module in ("lightning_gpt", "lightning_gpt.model") and names <= public, ast.unparse(node)


def test_the_stored_losses_are_those_of_the_lecture_and_of_our_table():
    readme = (ROOT / "lightning_gpt/model/README.md").read_text()
    table = dict(re.findall(r"^\| \[(\w+)\]\(\S+lecture/\S+ \|.*?\| (\d\.\d{3}) \|", readme, re.M))
    rows = re.findall(r"^(\w+) +[\d,]+ +(\d\.\d{3}) +(\d\.\d+)$", printed("lecture_losses = dict("), re.M)
    assert [name for name, *_ in rows] == [name for name in table if name != "gpt"]
    for name, loss, lecture_loss in rows:
        assert float(loss) == pytest.approx(float(table[name]), abs=0.01)
        assert float(loss) == pytest.approx(float(lecture_loss), abs=0.02)
    runs = printed("nets[", "= train(")
    for name, *_ in rows:
        steps = "3,000" if name == "bigram" else "5,000"
        assert re.search(rf"^{name} +step {steps} of {steps} ", runs, re.M)


def test_the_settings_of_laptop_are_those_of_its_config():
    (cell,) = (cell for cell in CELLS if cell.source.startswith("laptop = dict("))
    settings = {word.arg: ast.literal_eval(word.value) for word in parse(cell).body[0].value.keywords}
    config = yaml.safe_load((ROOT / "configs/laptop.yaml").read_text())
    assert settings | {"betas": [*settings["betas"]], "block_size": 128} == config["model"]
    assert config["data"] == {"batch_size": 12, "name_augmentation": 2} and config["trainer"]["max_steps"] == 850
    (cell,) = (cell for cell in CELLS if cell.source.startswith("laptop_data"))
    assert "block_size=128, batch_size=12, name_augmentation=2" in cell.source and '"laptop", 850' in cell.source


def test_the_links_of_the_notebook_lead_to_files():
    text = "".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    paths = re.findall(rf"{re.escape(BLOB)}([^)\s#]+)", text)
    assert len(paths) > 10 and not [path for path in paths if not (ROOT / path).exists()]
    colab = BLOB.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({colab}notebooks/lets_build_gpt.ipynb)" in NOTEBOOK.cells[0].source


def test_cells_without_training_print_what_is_stored(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.WARNING)  # restored after the test
    cells, names = run.without_training(NOTEBOOK).cells, {}
    with warnings.catch_warnings(), torch.random.fork_rng():
        for cell in cells:  # in this process, where PyTorch and Lightning are imported already
            with redirect_stdout(io.StringIO()) as stdout:
                exec(compile(parse(cell), cell.id, "exec"), names)
            printed_now = [("stdout", stdout.getvalue())] if stdout.getvalue() else []
            assert printed_now == texts(cell), f"{cell.id}: run notebooks/run.py --quick"
    assert sum(bool(cell.outputs) for cell in cells) > 10


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = deepcopy(NOTEBOOK)
    shorter = {  # one step of each training, few windows of validation, small groups
        "fraction = 1.0": "fraction = 0.0002",
        "num_sanity_val_steps=0,": "num_sanity_val_steps=0, limit_val_batches=2,",
        '"ROMEO:\\n", 64': '"ROMEO:\\n", 4',
    }
    for before, after in shorter.items():
        (cell,) = (cell for cell in run.code_cells(notebook) if before in cell.source)
        cell.source = cell.source.replace(before, after)
    run.execute(notebook, tmp_path)
    for cell, stored in zip(run.code_cells(notebook), CELLS, strict=True):
        if "live" in run.tags(cell):
            assert "tensorboard-frame" in "".join(text or "" for _, text in texts(cell))
        else:
            assert kinds(cell) == kinds(stored)
            assert "varies" in run.tags(cell) or texts(cell) == texts(stored)
