"""Every notebook runs from its text, and its two forms say the same."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, real_pair: tuple[Path, Path]) -> None:
    """Without an error, within three minutes (Jupyter's limit is of one cell; the whole is far below it)."""
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=170, resources={"metadata": {"path": FOLDER}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pair(path: Path) -> None:
    """The .ipynb holds the cells of the text, and no outputs."""
    pair = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    text = jupytext.read(path)
    assert [(c.cell_type, c.source) for c in pair.cells] == [(c.cell_type, c.source) for c in text.cells]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in pair.cells)
