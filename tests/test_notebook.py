"""The notebook of the documentation: kept without outputs, and run from the first cell to the last."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)


def test_the_notebook_is_valid_and_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None
        compile(cell.source, cell.id, "exec")


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    results = {
        cell.id: {kind: text for output in cell.outputs for kind, text in output.get("data", {}).items()}
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    printed = {
        cell.id: "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "2 users in memory" in results["users"]["text/plain"]
    assert "noise multiplier" in results["plan"]["text/plain"]
    assert "noise multiplier" in results["config"]["text/plain"]
    assert [line.partition(",")[0] for line in printed["simulate"].splitlines()] == [f"round {n}" for n in range(1, 5)]
    assert "<table" in results["simulate"]["text/html"]
    assert "both" in results["simulate"]["text/html"]
    assert "delta" in results["promise"]["text/plain"]
    assert "'both'" in results["model"]["text/plain"]
    assert "<table" in results["compare"]["text/html"]
    assert "12 users paired" in results["compare"]["text/plain"]
    assert results["again"]["text/html"] == results["simulate"]["text/html"]
