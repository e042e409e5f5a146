"""A table of numbers as coloured cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector = NDArray[np.float64]


def plot_heatmap(
    ax: Axes,
    table: ArrayLike,
    *,
    row_labels: Sequence[str] | None = None,
    col_labels: Sequence[str] | None = None,
    label: str,
    cmap: str = "viridis",
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Draw a table of numbers as coloured cells, with a colour bar. Missing cells stay empty.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on.
    table : array_like or DataFrame of shape (rows, cols)
        Numbers; NaN where there is no cell.
    row_labels, col_labels : sequence of str, optional
        Names of the rows and columns; a DataFrame brings its own.
    label : str
        What the colour means, with its unit.
    cmap : str
        A perceptually even colour map: viridis or cividis.
    texts : sequence of sequence of str, optional
        What to print in each cell.

    Raises
    ------
    ValueError
        If the labels do not fit the table.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_heatmap(ax, [[0.1, 0.2]], row_labels=["query"], col_labels=["0", "1"], label="‖Δ‖/‖W‖")
    >>> [t.get_text() for t in ax.get_yticklabels()]
    ['query']
    """
    cells = np.atleast_2d(np.asarray(table, dtype=np.float64))
    row_labels = _labels(table, "index", cells.shape[0]) if row_labels is None else row_labels
    col_labels = _labels(table, "columns", cells.shape[1]) if col_labels is None else col_labels
    if cells.shape != (len(row_labels), len(col_labels)):
        raise ValueError(f"{cells.shape} cells for {len(row_labels)} row and {len(col_labels)} column labels")
    # pcolormesh and not imshow: cells stay vector shapes in an SVG.
    mesh = ax.pcolormesh(np.ma.masked_invalid(cells), cmap=cmap, edgecolors="white", linewidth=0.6)
    ax.invert_yaxis()
    ax.set_yticks(np.arange(len(row_labels)) + 0.5, list(row_labels))
    ax.set_xticks(np.arange(len(col_labels)) + 0.5, list(col_labels))
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    bar = cast("Any", ax.figure).colorbar(mesh, ax=ax, label=label, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    if texts is not None:
        _write_cells(ax, mesh, cells, texts)


def _labels(table: object, side: str, count: int) -> list[str]:
    return [str(label) for label in getattr(table, side, range(count))]


def _write_cells(ax: Axes, mesh: Any, cells: Vector, texts: Sequence[Sequence[str]]) -> None:
    """Print each cell's text in black or white, whichever stands out more on its colour."""
    colours = mesh.to_rgba(cells)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text and math.isfinite(cells[i, j]):
                dark = float(np.dot(colours[i, j, :3], (0.2126, 0.7152, 0.0722))) < 0.45
                ink = "#ffffff" if dark else "#000000"
                ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize="small", color=ink)
