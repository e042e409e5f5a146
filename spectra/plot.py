"""Plots of spectra on axes that the caller owns: ``f(ax, data)``, numpy and matplotlib only.

Nothing here opens a figure, shows one or touches matplotlib's global state, so the functions serve a notebook, a
paper's grid of panels and the report alike. Line art never relies on colour alone: bands, dashes and labels say
the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector = NDArray[np.float64]

# Okabe and Ito's safe set for colour-blind readers, light ones darkened until each stands 3:1 against white
# (WCAG 1.4.11).
SERIES = ("#0072b2", "#c4570a", "#007a5a", "#a2518f", "#967200", "#2f86bb", "#5b606b")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), (0, (8, 2)), (0, (2, 2)))
# viridis at twelve even steps up to 0.85: the yellow end does not show on white paper.
DEPTHS = (
    "#440154", "#481c6e", "#453581", "#3d4d8a", "#33628d", "#2b748e",
    "#24878e", "#1f9a8a", "#26ad81", "#42be71", "#69cd5b", "#9bd93c",
)  # fmt: skip
RANK_MARKS = (8, 16, 64)

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@runtime_checkable
class SpectrumLike(Protocol):
    """What a plot needs of a `spectra.Spectrum`."""

    @property
    def values(self) -> Vector:
        """Singular values, descending."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix."""

    @property
    def frobenius(self) -> float:
        """Frobenius norm of the whole matrix."""


def plot_spectrum(
    ax: Axes,
    spectrum: SpectrumLike | ArrayLike,
    *,
    floor: float | None = None,
    mp_edge: float | None = None,
    label: str | None = None,
    color: str | None = None,
    log_index: bool = True,
    **line: Any,
) -> None:
    """Draw singular values against their index, with the two levels that noise reaches.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on; its scales and labels are set.
    spectrum : Spectrum or array_like of shape (k,)
        Singular values, descending, or a `spectra.Spectrum`, whose certified band is drawn where it is
        truncated.
    floor : float, optional
        Spectral norm of the storage rounding, in the units of the values. Taken from a Spectrum's certificate
        when not given.
    mp_edge : float, optional
        Marchenko–Pastur edge, in the units of the values.
    label : str, optional
        Legend entry of the values.
    color : str, optional
        Colour of the values; the next of `SERIES` when not given.
    log_index : bool
        Logarithmic index axis: shows a power law as a line. Linear shows an exponential as one.
    **line
        Passed to ``ax.plot`` for the values.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_spectrum(ax, [3.0, 1.0, 0.2], floor=0.5)
    >>> ax.get_ylabel(), ax.get_yscale()
    ('singular value σᵢ', 'log')
    """
    values = _values(spectrum)
    color = _next_color(ax) if color is None else color
    index = np.arange(1, len(values) + 1)
    marker = "o" if len(values) <= 24 else ""
    style: dict[str, Any] = {"linewidth": 1.4, "marker": marker, "markersize": 3} | line
    seen = values > 0  # zeros have no place on a logarithmic axis
    ax.plot(index[seen], values[seen], color=color, label=label or "singular values", **style)
    _draw_band(ax, spectrum, index, color)
    floor = _stored_floor(spectrum) if floor is None else floor
    _draw_level(ax, floor, "storage rounding floor", (0, (5, 2)))
    _draw_level(ax, mp_edge, "Marchenko–Pastur edge", (0, (1, 1.5)))
    ax.set_yscale("log")
    ax.set_xscale("log" if log_index else "linear")
    ax.set_xlabel("index i")
    ax.set_ylabel("singular value σᵢ")
    tidy(ax)
    ax.legend(frameon=False)


def plot_truncation_error(
    ax: Axes,
    spectrum: SpectrumLike | ArrayLike,
    *,
    frobenius: float | None = None,
    marks: Sequence[int] = RANK_MARKS,
    label: str | None = None,
    color: str | None = None,
    **line: Any,
) -> None:
    """Draw what the best rank-r matrix leaves out, ‖A − A_r‖_F / ‖A‖_F, against r.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on; its scales and labels are set.
    spectrum : Spectrum or array_like of shape (k,)
        Singular values, descending. A truncated Spectrum gets its certified band.
    frobenius : float, optional
        ‖A‖_F where `spectrum` is an array that does not hold every singular value.
    marks : sequence of int
        Ranks to mark on the curve.
    label : str, optional
        Legend entry.
    color : str, optional
        Colour of the curve; the next of `SERIES` when not given.
    **line
        Passed to ``ax.plot``.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().subplots()
    >>> plot_truncation_error(ax, [3.0, 1.0, 0.2])
    >>> ax.get_xlabel()
    'rank r kept'
    """
    values = _values(spectrum)
    color = _next_color(ax) if color is None else color
    norm = frobenius if frobenius is not None else getattr(spectrum, "frobenius", None)
    low, high = truncation_curve(values, norm, upper=_upper(spectrum))
    ranks = np.arange(1, len(values) + 1)
    draw_error_curve(ax, ranks, low, high, marks=marks, label=label, color=color, **line)
    style_error_axes(ax, len(values))
    if label:
        ax.legend(frameon=False)


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


def truncation_curve(
    values: ArrayLike, frobenius: float | None = None, *, upper: ArrayLike | None = None
) -> tuple[Vector, Vector]:
    """Relative Frobenius error of keeping r = 1…k directions, as certified (low, high).

    Parameters
    ----------
    values : array_like of shape (k,)
        Singular values, descending: exact, or lower bounds where `upper` is given.
    frobenius : float, optional
        ‖A‖_F; needed where the spectrum is truncated, else the norm of the values.
    upper : array_like of shape (k,), optional
        Upper bounds on the singular values of a truncated spectrum.

    Returns
    -------
    low, high : ndarray of shape (k,)
        The same array twice for a complete spectrum, where the tail is summed from its small end; for a
        truncated one √(‖A‖² − Σ_{i≤r} upper²) and √(‖A‖² − Σ_{i≤r} values²), relative to ‖A‖. NaN for a zero
        matrix.

    Examples
    --------
    >>> low, high = truncation_curve([3.0, 4 ** 0.5, 3 ** 0.5])
    >>> high.round(3).tolist()
    [0.661, 0.433, 0.0]
    """
    s = np.asarray(values, dtype=np.float64)
    total = float(np.sum(s**2)) if frobenius is None else float(frobenius) ** 2
    if not len(s) or not total > 0:
        nothing = np.full(len(s), math.nan)
        return nothing, nothing
    if upper is None:
        tail = np.append(np.cumsum((s**2)[::-1])[::-1][1:], 0.0)
        error = np.minimum(np.sqrt(tail / total), 1.0)
        return error, error
    most = np.sqrt(np.clip(1.0 - np.cumsum(s**2) / total, 0.0, 1.0))
    least = np.sqrt(np.clip(1.0 - np.cumsum(np.asarray(upper, dtype=np.float64) ** 2) / total, 0.0, 1.0))
    return least, most


def draw_error_curve(
    ax: Axes,
    ranks: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    marks: Sequence[int] = RANK_MARKS,
    label: str | None = None,
    color: str = SERIES[0],
    **line: Any,
) -> None:
    """Draw one error curve and its band on axes that `style_error_axes` finishes.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on.
    ranks, low, high : array_like of shape (k,)
        Ranks, and the certified bounds of the error at each.
    marks : sequence of int
        Ranks that get a dot, where they are among `ranks`.
    label, color, **line
        As in ``ax.plot``.
    """
    r, least, most = (np.asarray(x, dtype=np.float64) for x in (ranks, low, high))
    ax.plot(r, most, color=color, label=label, **({"linewidth": 1.4} | line))
    if np.any(most - least > 1e-9):
        ax.fill_between(r, least, most, color=color, alpha=0.22, linewidth=0)
    at = np.isin(r, np.asarray(marks))
    ax.plot(r[at], most[at], linestyle="", marker="o", markersize=3.5, color=color)


def style_error_axes(ax: Axes, largest: int) -> None:
    """Set scales, labels and the line under which 90 % of the squared norm is kept.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes with error curves.
    largest : int
        Largest rank drawn.
    """
    ax.set_xscale("log", base=2)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlim(0.9, max(largest, 2) * 1.05)
    ax.axhline(math.sqrt(0.1), color="#6b7280", linewidth=0.8, linestyle=(0, (2, 2)))
    ax.annotate(
        "90 % of the squared norm kept below this line",
        (0.0, math.sqrt(0.1)),
        xycoords=("axes fraction", "data"),
        xytext=(4, -3),
        textcoords="offset points",
        va="top",
        fontsize="small",
        color="#6b7280",
    )
    ax.set_xlabel("rank r kept")
    ax.set_ylabel("relative error ‖Δ − Δᵣ‖ / ‖Δ‖")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    _open_frame(ax)


def power_of_ten(value: float, position: int | None = None) -> str:
    """Label of a tick on a logarithmic axis, in Unicode: math text in an SVG is laid out glyph by glyph.

    Parameters
    ----------
    value : float
        Position of the tick, positive.
    position : int, optional
        Ignored; matplotlib passes it.

    Examples
    --------
    >>> power_of_ten(0.001), power_of_ten(10.0), power_of_ten(1.0)
    ('10⁻³', '10', '1')
    """
    if not value > 0:
        return ""
    exponent = round(math.log10(value))
    if exponent in (0, 1, 2) or not math.isclose(value, 10.0**exponent, rel_tol=1e-6):
        return f"{value:.3g}"
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def tidy(ax: Axes) -> None:
    """Give logarithmic axes plain decade labels, and open the frame.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes whose scales are set.
    """
    for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
        if scale == "log":
            low, high = sorted(axis.get_view_interval())
            short = low > 0 and high / low < 30  # within a decade and a half, decades alone label too little
            axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if short else (1.0,), numticks=8))
            axis.set_major_formatter(FuncFormatter(power_of_ten))
            axis.set_minor_formatter(NullFormatter())
            if low > 0 and high / low > 1e3:  # a forest of minor ticks says nothing there, and is slow to draw
                axis.set_minor_locator(NullLocator())
    _open_frame(ax)


def _next_color(ax: Axes) -> str:
    """First colour of `SERIES` that no line of the axes has yet, then round again."""
    used = {line.get_color() for line in ax.lines}
    return next((c for c in SERIES if c not in used), SERIES[len(ax.lines) % len(SERIES)])


def _labels(table: object, side: str, count: int) -> list[str]:
    return [str(label) for label in getattr(table, side, range(count))]


def _open_frame(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _values(spectrum: SpectrumLike | ArrayLike) -> Vector:
    held = spectrum.values if isinstance(spectrum, SpectrumLike) else spectrum
    values = np.asarray(held, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"singular values are a vector; got an array of shape {values.shape}")
    return values


def _upper(spectrum: object) -> Vector | None:
    """Upper bounds of a truncated Spectrum's values; None where they are exact or unknown."""
    if getattr(spectrum, "complete", True) or not hasattr(spectrum, "interval"):
        return None
    return np.asarray(spectrum.interval()[1], dtype=np.float64)


def _stored_floor(spectrum: object) -> float | None:
    floor = getattr(getattr(spectrum, "certificate", None), "storage_floor", None)
    return None if floor is None else float(floor)


def _draw_band(ax: Axes, spectrum: object, index: ArrayLike, color: str) -> None:
    upper = _upper(spectrum)
    if upper is not None:
        lower = np.asarray(cast("Any", spectrum).interval()[0], dtype=np.float64)
        ax.fill_between(
            np.asarray(index, dtype=np.float64),
            lower,
            upper,
            color=color,
            alpha=0.22,
            linewidth=0,
            label="certified interval",
        )


def _draw_level(ax: Axes, level: float | None, label: str, dashes: object) -> None:
    if level is not None and math.isfinite(level) and level > 0:
        told = label in ax.get_legend_handles_labels()[1]  # several spectra: one legend entry for all their floors
        entry = "_nolegend_" if told else label
        ax.axhline(level, color="#6b7280", linewidth=1.0, linestyle=cast("Any", dashes), label=entry)


def _write_cells(ax: Axes, mesh: Any, cells: Vector, texts: Sequence[Sequence[str]]) -> None:
    """Print each cell's text in black or white, whichever stands out more on its colour."""
    colours = mesh.to_rgba(cells)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text and math.isfinite(cells[i, j]):
                dark = float(np.dot(colours[i, j, :3], (0.2126, 0.7152, 0.0722))) < 0.45
                ink = "#ffffff" if dark else "#000000"
                ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize="small", color=ink)
