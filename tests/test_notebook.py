"""The notebook runs from top to bottom and is stored without outputs."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tensorboard import manager

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "lets_build_gpt.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("LETS_BUILD_GPT_SHORT", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # TensorBoard records its running processes here
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    finally:
        for board in manager.get_all():
            os.kill(board.pid, 15)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3 and all(picture.metadata["image/png"]["alt"] for picture in pictures)
    assert any("tensorboard-frame" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "[46, 47, 47, 1, 58, 46, 43, 56, 43] -> hii there" in printed  # the lecture's token ids
    if find_spec("ipywidgets"):
        return  # the progress bar is a widget then, not text
    bar = [line for line in re.split("[\r\n]", printed) if re.match(r"step (\d+)/\1 ", line)][-1]
    assert all(f"{name}=" in bar for name in ("loss", "val", "best", "tokens/s")) and "Validation" not in printed


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
