"""How many directions: what budgets of parameters buy, and what the criteria say of all matrices of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike

from spectra.plot.axes import DASHES, SERIES, open_frame, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_budgets(
    ax: Axes,
    parameters: ArrayLike,
    allocated: tuple[ArrayLike, ArrayLike],
    uniform: tuple[ArrayLike, ArrayLike],
    *,
    ranks: Sequence[int] = (),
    least: ArrayLike | None = None,
) -> None:
    """Draw the relative error of a whole model against its parameters: ranks at their best, and equal ones.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on; scales and labels are set.
    parameters : array_like of shape (b,)
        Budgets, ascending.
    allocated, uniform : tuple of array_like of shape (b,)
        Lower and upper ends of the error with the best ranks, and with equal ones.
    ranks : sequence of int
        Equal ranks that cost these budgets, to write beside the upper curve.
    least : array_like of shape (b,), optional
        What no ranks can go below.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_budgets(ax, [10, 20], ([0.5, 0.2], [0.5, 0.2]), ([0.6, 0.4], [0.6, 0.4]), ranks=(1, 2))
    >>> [line.get_label() for line in ax.lines], [text.get_text() for text in ax.texts]
    (['equal ranks', 'best ranks'], ['r = 1', '2'])
    """
    at = np.asarray(parameters, dtype=np.float64)
    for position, (label, ends) in enumerate((("equal ranks", uniform), ("best ranks", allocated))):
        low, high = (np.asarray(end, dtype=np.float64) for end in ends)
        color, dash = SERIES[1 - position], cast("Any", DASHES[1 - position])
        ax.plot(at, high, color=color, linestyle=dash, linewidth=1.4, marker="o", markersize=3, label=label)
        if np.any(high - low > 1e-9):  # beyond rounding
            ax.fill_between(at, low, high, color=color, alpha=0.22, linewidth=0)
    if least is not None:
        floor = np.asarray(least, dtype=np.float64)
        ax.plot(at, floor, color=SERIES[-1], linestyle=(0, (1, 1.5)), linewidth=1.0, label="no ranks go below")
    top = np.asarray(uniform[1], dtype=np.float64)
    for k, (rank, x, y) in enumerate(zip(ranks, at, top, strict=False)):
        said = f"r = {rank}" if k == 0 else str(rank)
        ax.annotate(said, (x, y), xytext=(3, 3), textcoords="offset points", fontsize="small", color=SERIES[1])
    ax.set_xscale("log")
    ax.set_ylim(-0.02, 1.04)
    ax.set_xlabel("parameters of the factors")
    ax.set_ylabel("relative error ‖Δ − Δᵣ‖ / ‖Δ‖ of the model")
    tidy(ax)
    ax.legend(frameon=False)


def plot_criteria(ax: Axes, labels: Sequence[str], low: ArrayLike, high: ArrayLike) -> None:
    """Draw what every criterion says of every matrix: a row a criterion, a dot or band a matrix, the median a bar.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on; scales and labels are set.
    labels : sequence of str
        Names of the criteria.
    low, high : array_like of shape (criteria, matrices)
        Ends of each band, in directions; NaN where a criterion does not apply. A count of 0 is drawn at ½.

    Raises
    ------
    ValueError
        If the shapes do not match.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_criteria(ax, ["entropy rank"], [[3.0, 5.0]], [[3.0, 6.0]])
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['entropy rank']
    """
    least, most = (np.atleast_2d(np.asarray(end, dtype=np.float64)) for end in (low, high))
    if least.shape != most.shape or len(least) != len(labels):
        raise ValueError(f"{len(labels)} labels for bands of shapes {least.shape} and {most.shape}")
    for row, (left, right) in enumerate(zip(least, most, strict=True)):
        told = np.isfinite(left) & np.isfinite(right)
        if not told.any():
            continue
        left, right = np.maximum(left[told], 0.5), np.maximum(right[told], 0.5)
        spread = row + 0.5 + 0.5 * (np.arange(len(left)) / max(1, len(left) - 1) - 0.5)  # side by side, not on top
        ax.hlines(spread, left, right, color=SERIES[0], alpha=0.5, linewidth=1.0)
        known = left == right  # the middle of a band is no estimate, and gets no mark
        ax.plot(right[known], spread[known], linestyle="", marker="o", markersize=2.5, color=SERIES[0], alpha=0.6)
        middle = float(np.median(right))
        ax.plot([middle, middle], [row + 0.15, row + 0.85], color=SERIES[1], linewidth=1.8)
    ax.set_ylim(len(labels), 0)
    ax.set_yticks(np.arange(len(labels)) + 0.5, list(labels))
    ax.tick_params(axis="y", length=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x <= 0.5 else f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("directions (bar: median of the upper ends)")
    open_frame(ax)
