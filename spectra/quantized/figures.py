"""The figures of a quantized run: bits against decibels, what low rank holds of the error, spectra of errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from spectra.plot import DASHES, SERIES, tidy
from spectra.quantized.noise import noise_curve
from spectra.quantized.pooled import Pooled, decibels, lloyd_max_db
from spectra.quantized.running import FRACTIONS, kept_places
from spectra.quantized.verdict import leading
from spectra.report.drawing import FAINT, INK, Drawing, drawing_style, finished
from spectra.report.text import counted, elide, visible
from spectra.theory.quantization import rate_distortion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.quantized.result import QuantizedRun

LINES = 6  # schemes told apart by colour and dashes
_ROWS = 16  # schemes listed
_TALLEST = 2.0  # over the edge: what a spectrum's first values above it are told by in words
_LEVELS = 9  # whole bits of the Lloyd–Max points at most
_GAP = 1.3  # line heights between two labels beside their points


def draw_figures(run: QuantizedRun) -> tuple[Drawing, ...]:
    """Draw the figures of a run; none where no matrix was quantized.

    Parameters
    ----------
    run : QuantizedRun

    Returns
    -------
    tuple of Drawing
        ``ladder``, ``absorbed`` and ``errors``. The bytes depend on the run and the version of matplotlib alone.
    """
    if not run.pooled:
        return ()
    drawn = []
    with drawing_style():
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        ladder(left, run)
        short_of_bound(right, run)
        drawn.append(finished("ladder", "Bits and decibels", _ladder_caption(run), figure))
        if any(math.isfinite(share) for found in run.pooled for share in found.held):
            figure = Figure(figsize=(7.0, 3.8), layout="constrained")
            absorbed_against_rank(figure.subplots(), run)
            drawn.append(finished("absorbed", "What low rank holds of the error", _ABSORBED, figure))
            drawn += _errors(run)
    return tuple(drawn)


def ladder(ax: Axes, run: QuantizedRun) -> None:
    """Draw signal over error against bits a weight, beside Lloyd and Max's points and Shannon's line.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on.
    run : QuantizedRun
        At least one matrix of which was quantized.
    """
    shown = [found for found in run.pooled if math.isfinite(found.sqnr_db)]
    bits = [found.bits for found in run.pooled]
    left, right = max(0.0, min(bits) - 1.2), max(bits) + 1.6
    ends = np.array([left, right])
    ax.plot(ends, [decibels(rate_distortion(b)) for b in ends], color=INK, linewidth=1.0, label="rate–distortion bound")
    whole = list(range(max(1, math.ceil(left)), min(_LEVELS, math.floor(right)) + 1))
    ax.plot(
        whole, [lloyd_max_db(b) for b in whole], color=FAINT, linestyle=DASHES[2], linewidth=0.9, marker="D",
        markersize=4, label="Lloyd–Max",
    )  # fmt: skip
    for i, found in enumerate(run.pooled):
        at, kept = _every_matrix(run, found.scheme)
        ax.plot(at, kept, linestyle="", marker="_", markersize=9, alpha=0.35, color=SERIES[i % LINES], zorder=2)
    for found in shown:
        ax.plot(found.bits, found.sqnr_db, "o", markersize=6.5, color=SERIES[run.pooled.index(found) % LINES], zorder=4)
    predicted = [found for found in shown if math.isfinite(found.gaussian_db)]
    if predicted:
        ax.plot(
            [f.bits for f in predicted], [f.gaussian_db for f in predicted], linestyle="", marker="o", markersize=11,
            markerfacecolor="none", markeredgecolor=FAINT, markeredgewidth=0.9, label="the format on Gaussian weights",
        )  # fmt: skip
    values = [f.sqnr_db for f in shown] or [decibels(rate_distortion(b)) for b in bits]
    ax.set_xlim(left, right)
    ax.set_ylim(min(values) - 6.0, max(max(values), decibels(rate_distortion(max(bits)))) + 5.0)
    ax.set_xlabel("bits a weight, everything stored counted")
    ax.set_ylabel("signal over error, dB")
    tidy(ax)
    _labels(ax, shown, run.pooled)
    ax.legend(frameon=False, loc="upper left", handlelength=2.4)


def short_of_bound(ax: Axes, run: QuantizedRun) -> None:
    """Draw how far each scheme stays below the rate–distortion bound at its own bits: a line each, a dash a matrix.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on.
    run : QuantizedRun
        At least one matrix of which was quantized.
    """
    shown = run.pooled[:_ROWS]
    for i, found in enumerate(shown):
        at, kept = _every_matrix(run, found.scheme)
        below = [decibels(rate_distortion(b)) - db for b, db in zip(at, kept, strict=True)]
        ax.plot(below, [i] * len(below), linestyle="", marker="|", markersize=11, alpha=0.4, color=SERIES[i % LINES])
        for value, marker, color, size in (
            (found.shannon_db - found.gaussian_db, "o", FAINT, 11),
            (found.shannon_db - found.lloyd_max_db, "D", FAINT, 4),
            (found.short_of_shannon, "o", SERIES[i % LINES], 6.5),
        ):
            face = "none" if size == 11 else color
            if math.isfinite(value):
                ax.plot(value, i, marker=marker, markersize=size, markerfacecolor=face, markeredgecolor=color, zorder=4)
    ax.axvline(0.0, color=INK, linewidth=1.0)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_yticks(range(len(shown)), [elide(visible(found.scheme), 18) for found in shown])
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("short of the bound, dB")
    tidy(ax)


def absorbed_against_rank(ax: Axes, run: QuantizedRun) -> None:
    """Draw the share of the error in the leading directions against r/p, beside that of noise of the same shapes.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on.
    run : QuantizedRun
        At least one matrix of which has an error.
    """
    ax.set_xscale("log", base=2)
    lead = leading(run.pooled)
    for i, found in enumerate(run.pooled[:LINES]):
        ax.plot(
            FRACTIONS[: len(found.held)], found.held, color=SERIES[i], linestyle=DASHES[i], linewidth=1.5,
            label=elide(visible(found.scheme), 24),
        )  # fmt: skip
    ax.plot(
        FRACTIONS[: len(lead.held_noise)], lead.held_noise, color=INK, linewidth=0.9, label="noise (Marchenko–Pastur)"
    )
    even = np.geomspace(FRACTIONS[0], 1.0, 100)
    ax.plot(even, even, color=FAINT, linewidth=0.8, linestyle=DASHES[2], label="r/p: every direction alike")
    ax.set_xlim(FRACTIONS[0], 1.0)
    ax.set_ylim(0.0, 1.02)
    tidy(ax)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "1" if x == 1 else f"1/{round(1 / x)}"))
    ax.set_xticks([2.0**-k for k in range(8, -1, -1)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    ax.set_xlabel("r/p: rank kept over the shorter side")
    ax.set_ylabel("share of ‖W − Ŵ‖² held")
    ax.legend(frameon=False, loc="upper left", handlelength=3)


_ABSORBED = (
    "The most that an adapter of rank r beside the quantized weights can take back of the squared error, all matrices "
    "pooled at equal r/p. What stands above noise of the same shapes comes from rows and columns of larger scale, or "
    "from directions of the error’s own. The lowest line is an error with all singular values alike."
)


def _ladder_caption(run: QuantizedRun) -> str:
    return (
        f"Dots: all {counted(run.pooled[0].matrices, 'matrix', 'matrices')} together, by energy; dashes beside them, "
        "each matrix. Right: how far below the line. No code for independent Gaussian weights lies above the line, and "
        "none that rounds them one at a time, without scales, above the diamonds. Rings: the same on Gaussian weights."
    )


def _every_matrix(run: QuantizedRun, scheme: str) -> tuple[list[float], list[float]]:
    parts = [part for row in run.records for part in row.get("schemes", ()) if part["scheme"] == scheme]
    known = [(part["bits"], decibels(part["relative_mse"])) for part in parts if part["relative_mse"] > 0.0]
    return [bits for bits, _ in known], [kept for _, kept in known]


def _labels(ax: Axes, shown: Sequence[Pooled], everything: Sequence[Pooled]) -> None:
    """Names right of the points, pushed apart where points of as many bits lie close."""
    from matplotlib import rcParams

    figure = ax.get_figure(root=True)
    assert figure is not None  # for the type checker: axes that are drawn on stand in a figure
    low, high = ax.get_ylim()
    gap = _GAP * float(rcParams["font.size"]) / (ax.bbox.height / figure.dpi * 72) * (high - low)
    places: dict[int, list[tuple[float, Pooled]]] = {}
    for found in sorted(shown, key=lambda found: -found.sqnr_db):  # downwards: above are the bounds
        column = places.setdefault(round(found.bits), [])
        at = min(found.sqnr_db - gap / 2.0, column[-1][0] - gap if column else math.inf)
        column.append((at, found))
    for column in places.values():
        right = max(found.bits for _, found in column)
        for at, found in column:
            ax.annotate(
                f"{elide(visible(found.scheme), 24)}  {found.sqnr_db:.1f}",
                (right, at),
                xytext=(10, 0),
                textcoords="offset points",
                va="center",
                color=SERIES[everything.index(found) % LINES],
            )


def _errors(run: QuantizedRun) -> list[Drawing]:
    """Spectra of the leading scheme's error in the matrices that look least, middling and most like noise."""
    lead = leading(run.pooled)
    held = [
        (part["edge"], i, row, part)
        for i, row in enumerate(run.records)
        for part in row.get("schemes", ())
        if part["scheme"] == lead.scheme and "edge" in part and len(part.get("curve", ())) > 2
    ]
    held.sort(key=lambda one: one[:2])
    if not held:
        return []
    picked = [held[i] for i in sorted({0, len(held) // 2, len(held) - 1})]
    figure = Figure(figsize=(7.0, 3.1), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(picked), sharey=True))
    for ax, (_, _, row, part) in zip(axes, picked, strict=True):
        _error_spectrum(ax, row, part)
    axes[0].set_ylim(0.0, min(_TALLEST, max(1.25, 1.05 * picked[-1][0])))
    axes[0].set_ylabel("σᵢ over the noise edge")
    axes[0].legend(frameon=False, loc="upper right", handlelength=2.0)
    caption = (
        f"Singular values of the error of {visible(lead.scheme)} over the edge of noise of the same size, in the "
        "matrix whose largest stands lowest, at the median, and highest. The black line is what Marchenko and Pastur’s "
        "law has for independent entries of one size; larger rows or columns lift the left end above the edge at 1."
    )
    return [finished("errors", "Spectra of the error", caption, figure)]


def _error_spectrum(ax: Axes, row: Mapping[str, Any], part: Mapping[str, Any]) -> None:
    count = min(row["rows"], row["cols"])
    at = (np.array(kept_places(count)) + 0.5) / count
    edge = part["curve"][0] / part["edge"]
    ax.plot(at, np.array(part["curve"]) / edge, color=SERIES[0], linewidth=1.6, label="the error")
    ax.plot(at, noise_curve(row["rows"], row["cols"]), color=INK, linewidth=0.9, label="noise")
    ax.axhline(1.0, color=FAINT, linewidth=0.8, linestyle=DASHES[1])
    ax.set_xlim(0.0, 1.0)
    if part["edge"] > _TALLEST:
        ax.annotate(f"σ₁ at {part['edge']:.1f}", (0.06, 0.93), xycoords="axes fraction", color=SERIES[0])
    ax.set_xlabel("index over p")
    ax.set_title(elide(visible(row["name"].removesuffix(".weight")), 34), loc="left", fontsize=7.5)
    tidy(ax)
