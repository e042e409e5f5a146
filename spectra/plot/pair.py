"""Two updates side by side: how far their leading subspaces agree, what one holds of the other, which are new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike

from spectra.plot.axes import next_color, open_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAINT = "#6b7280"


def plot_overlap(
    ax: Axes,
    table: ArrayLike,
    ranks_a: Sequence[int],
    ranks_b: Sequence[int],
    *,
    names: tuple[str, str] = ("A", "B"),
    resolved: tuple[int, int] | None = None,
    label: str = "overlap φ",
    texts: bool = True,
    bar: bool = True,
) -> None:
    """Draw the overlap φ(i, j) of the leading i and j directions of two updates as cells, ranks of A downwards.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on.
    table : array_like of shape (len(ranks_a), len(ranks_b))
        Shares: 1 where one subspace holds the other. NaN leaves a cell empty.
    ranks_a, ranks_b : sequence of int
        Ranks of the rows and columns.
    names : tuple of str
        What the two updates are called on the axes.
    resolved : tuple of int, optional
        Largest resolved rank of each: cells beyond are hatched, since rounding may have turned their subspaces.
    label : str
        What the colour means.
    texts : bool
        Print each share as a percentage in its cell.
    bar : bool
        Draw the colour bar.

    Raises
    ------
    ValueError
        If the ranks do not fit the table.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_overlap(ax, [[1.0, 0.5], [0.5, 0.25]], (1, 2), (1, 2), resolved=(2, 1))
    >>> [t.get_text() for t in ax.texts], len(ax.patches)
    (['100', '50', '50', '25'], 2)
    """
    cells = np.atleast_2d(np.asarray(table, dtype=np.float64))
    if cells.shape != (len(ranks_a), len(ranks_b)):
        raise ValueError(f"{cells.shape} cells for {len(ranks_a)} and {len(ranks_b)} ranks")
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(cells), cmap="viridis", vmin=0.0, vmax=1.0, edgecolors="white", linewidth=0.4
    )
    ax.invert_yaxis()
    ax.set_yticks(np.arange(len(ranks_a)) + 0.5, [str(r) for r in ranks_a])
    ax.set_xticks(np.arange(len(ranks_b)) + 0.5, [str(r) for r in ranks_b])
    ax.tick_params(length=0)
    ax.set_ylabel(f"leading i of {names[0]}")
    ax.set_xlabel(f"leading j of {names[1]}")
    for side in ax.spines.values():
        side.set_visible(False)
    if bar:
        drawn = cast("Any", ax.figure).colorbar(mesh, ax=ax, label=label, pad=0.02, fraction=0.05)
        drawn.outline.set_visible(False)
    colours = mesh.to_rgba(cells)
    for place in np.argwhere(np.isfinite(cells)):
        i, j = (int(k) for k in place)
        dark = float(np.dot(colours[i, j, :3], (0.2126, 0.7152, 0.0722))) < 0.45
        ink = "#ffffff" if dark else "#000000"
        if resolved is not None and (ranks_a[i] > resolved[0] or ranks_b[j] > resolved[1]):
            _hatch(ax, i, j, ink)
        if texts:
            said = f"{100 * cells[i, j]:.0f}"
            ax.text(j + 0.5, i + 0.5, said, ha="center", va="center", fontsize="x-small", color=ink)


def plot_capture(
    ax: Axes,
    ranks: Sequence[int],
    share: ArrayLike,
    *,
    optimum: ArrayLike | None = None,
    chance: ArrayLike | None = None,
    label: str | None = None,
    color: str | None = None,
    **line: Any,
) -> None:
    """Draw the share of an update that lies in the leading r directions of another, between chance and optimum.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on; scales and labels are set.
    ranks : sequence of int
        Ranks r.
    share : array_like of shape (len(ranks),)
        ‖U_rU_rᵀ Δ V_rV_rᵀ‖² / ‖Δ‖², or one side alone; NaN where a rank passes what is known.
    optimum : array_like, optional
        What the update's own leading r directions hold: no rank-r projection can hold more.
    chance : array_like, optional
        What random subspaces would hold.
    label : str, optional
        Legend entry of the share.
    color : str, optional
        Colour of the share; the next of `SERIES` when not given.
    **line
        Passed to ``ax.plot`` for the share.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_capture(ax, (1, 2), [0.1, 0.3], optimum=[0.4, 0.6], chance=[0.01, 0.04])
    >>> len(ax.lines), ax.get_xlabel()
    (3, 'directions r')
    """
    at = np.asarray(ranks, dtype=np.float64)
    color = next_color(ax) if color is None else color
    style: dict[str, Any] = {"linewidth": 1.4, "marker": "o", "markersize": 3} | line
    ax.plot(at, np.asarray(share, dtype=np.float64), color=color, label=label, **style)
    for level, said, dashes in ((optimum, "best possible", (0, (5, 2))), (chance, "random", (0, (1, 1.5)))):
        if level is not None:
            values = np.asarray(level, dtype=np.float64)
            ax.plot(at, values, color=FAINT, linewidth=1.0, linestyle=cast("Any", dashes), label=_once(ax, said))
    ax.set_xscale("log", base=2)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("directions r")
    ax.set_ylabel("share of the squared norm")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    open_frame(ax)


def plot_intruders(
    ax: Axes,
    epsilons: ArrayLike,
    counts: ArrayLike,
    *,
    chance: ArrayLike | None = None,
    top: int = 10,
    label: str | None = None,
    color: str | None = None,
    **line: Any,
) -> None:
    """Draw how many of the leading directions of a tuned matrix resemble no direction of its base, against ε.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on; scales and labels are set.
    epsilons : array_like of shape (m,)
        Thresholds on the greatest absolute cosine.
    counts : array_like of shape (m,)
        How many of the `top` directions stay below each.
    chance : array_like of shape (m,), optional
        How many of `top` random directions would.
    top : int
        Directions that were matched.
    label : str, optional
        Legend entry.
    color : str, optional
        Colour of the counts; the next of `SERIES` when not given.
    **line
        Passed to ``ax.plot``.

    References
    ----------
    R. Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence" (2024), algorithm 1.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_intruders(ax, [0.2, 0.5, 0.8], [0, 1, 4], chance=[9.0, 10.0, 10.0])
    >>> ax.get_ylabel()
    'intruders of 10'
    """
    at = np.asarray(epsilons, dtype=np.float64)
    color = next_color(ax) if color is None else color
    ax.plot(at, np.asarray(counts, dtype=np.float64), color=color, label=label, **({"linewidth": 1.4} | line))
    if chance is not None:
        values = np.asarray(chance, dtype=np.float64)
        ax.plot(at, values, color=FAINT, linewidth=1.0, linestyle=(0, (1, 1.5)), label=_once(ax, "random directions"))
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(-0.02 * top, 1.04 * top)
    ax.set_xlabel("threshold ε on |cos|")
    ax.set_ylabel(f"intruders of {top}")
    open_frame(ax)


def _once(ax: Axes, said: str) -> str:
    """Return a legend entry, hidden where the axes have it already."""
    return "_nolegend_" if said in ax.get_legend_handles_labels()[1] else said


def _hatch(ax: Axes, row: int, column: int, ink: str) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor=ink, linewidth=0, alpha=0.35))
