"""Runs lets_build_gpt.ipynb and stores its outputs in it, which GitHub shows: python notebooks/run.py

This takes about ten minutes. It has to be done after every change of the code in the notebook; tests/test_notebook.py
compares the stored outputs with the code. Needs the extra `dev`.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tensorboard import manager

NOTEBOOK = Path(__file__).with_name("lets_build_gpt.ipynb")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    """The tags of a cell: varies, if its outputs depend on the hardware; live, if they need a running notebook."""
    return cell.metadata.get("tags", [])


def source_hash(notebook):
    """SHA-256 of the code, which is stored beside the outputs that it gave."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def merge_streams(outputs):
    """Joins neighbouring pieces of printed text, as Jupyter does."""
    merged = []
    for output in outputs:
        if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def execute(notebook, folder):
    """Executes all cells in a temporary folder, in place."""
    previous, tempfile.tempdir = tempfile.tempdir, str(folder)  # TensorBoard records its running processes there
    try:
        client = NotebookClient(
            notebook, timeout=None, record_timing=False, resources={"metadata": {"path": str(folder)}}
        )
        client.execute(env=os.environ | {"TMPDIR": str(folder)})
    finally:
        for board in manager.get_all():
            os.kill(board.pid, 15)
        tempfile.tempdir = previous


def store(notebook):
    """Drops what is not for storage, and notes the code that gave the outputs."""
    for cell in code_cells(notebook):
        cell.outputs = [] if "live" in tags(cell) else merge_streams(cell.outputs)
    notebook.metadata = {
        "kernelspec": notebook.metadata.kernelspec,
        "language_info": {"name": "python"},
        "source_hash": source_hash(notebook),
    }
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)


def main():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder)
    store(notebook)  # nothing is stored if a cell fails


if __name__ == "__main__":
    main()
