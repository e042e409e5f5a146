"""A spectrum against its index, with the levels that noise reaches; what a low rank would leave out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from spectra.plot.axes import RANK_MARKS, SERIES, next_color, open_frame, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector = NDArray[np.float64]


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
    color = next_color(ax) if color is None else color
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
    color = next_color(ax) if color is None else color
    norm = frobenius if frobenius is not None else getattr(spectrum, "frobenius", None)
    low, high = truncation_curve(values, norm, upper=_upper(spectrum))
    ranks = np.arange(1, len(values) + 1)
    draw_error_curve(ax, ranks, low, high, marks=marks, label=label, color=color, **line)
    style_error_axes(ax, len(values))
    if label:
        ax.legend(frameon=False)


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
    open_frame(ax)


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
