"""What a search for the intrinsic dimension found, as one figure: the held-out metric against the dimension."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from spectra.plot import DASHES, SERIES, tidy
from spectra.report.drawing import FAINT, INK, Drawing, drawing_style, finished
from spectra.report.text import grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.intrinsic.result import IntrinsicDimension

KEY = "intrinsic"
METRICS = {"accuracy": "accuracy on held-out texts", "negative loss": "minus the loss on held-out texts"}
UNTRAINED = {"accuracy": "commonest label", "negative loss": "untrained"}
_SIZE = (7.0, 4.3)  # inches
_DPI = 200  # of the bitmap: sharp on a slide, 1400 pixels wide
_GAP = 1.25  # line heights between two labels in the margin, as text is set
_TICKS = 8  # numbers of seven digits that stand side by side below the axes
_BELOW = 3.9  # font sizes from the axes down to the key: tick labels and the axis's name stand between


def accuracy_against_dimension(ax: Axes, result: IntrinsicDimension) -> None:
    """Draw what every training reached against how many numbers it trained, and where the target is crossed.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to draw on; scales, limits and labels are set. Labels of the levels stand in the right margin.
    result : IntrinsicDimension
        What a search found. A metric further beneath the baseline than full fine-tuning stands above it is drawn at
        the lower edge, as a triangle that points down: a diverged training must not flatten the others.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from spectra.intrinsic.trial import Ask, Trial
    >>> from types import SimpleNamespace
    >>> trial = Trial(Ask("subspace", 64, 0, 0.01, 200, 200, None), 0.7, 0.5, 200, False, 1.0, 64)
    >>> result = SimpleNamespace(
    ...     trials=(trial,), curve=[(64, 0.7, 0.7, 0.7, 1, 0.01)], metric_name="accuracy", share=0.9, baseline=0.5,
    ...     full=0.8, full_low=0.79, full_high=0.81, target=0.72, dimension=None, low=None, high=None, head=None,
    ...     verdict="never reached", config={}, above_chance=False,
    ... )
    >>> ax = Figure().subplots()
    >>> accuracy_against_dimension(ax, result)
    >>> [text.get_text() for text in ax.texts]
    ['commonest label 0.500', '90 % of it 0.720', 'full fine-tuning 0.800']
    """
    shown = [t for t in result.trials if t.ask.kind == "subspace" and t.ask.dimension and math.isfinite(t.metric)]
    bottom, top = _metric_range(result, [t.metric for t in shown])
    ax.set_xscale("log")
    ax.set_xlim(*_dimension_range(result, [t.ask.dimension or 1 for t in shown]))
    ax.set_ylim(bottom, top)
    _levels(ax, result)
    _crossing(ax, result)
    _dots(ax, [t for t in shown if not t.stopped], bottom, marker="o", label="one training")
    _dots(ax, [t for t in shown if t.stopped], bottom, marker="x", label="given up")
    # Where one training stopped early the mean is no mean of trained models; the line still says where it lies.
    curve = [(d, mean) for d, mean, *_ in result.curve if math.isfinite(mean)]
    if curve:
        ax.plot(*zip(*curve, strict=True), color=SERIES[0], linewidth=1.4, label="mean")
    ax.set_xlabel("numbers that train, d")
    ax.set_ylabel(METRICS.get(result.metric_name, result.metric_name))
    tidy(ax)
    left, right = ax.get_xlim()
    # Powers of four, as the search steps; of two where fewer than three of those would be left.
    ax.xaxis.set_major_locator(LogLocator(base=4.0 if right >= 64 * left else 2.0, numticks=_TICKS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda d, _: grouped(round(d))))
    ax.xaxis.set_minor_locator(NullLocator())
    _shares(ax, result)
    if shown:
        _legend(ax)


def name_of(share: float) -> str:
    """Return how the dimension at a share of the full metric is called.

    Parameters
    ----------
    share : float
        0.9 for the usual one.

    Examples
    --------
    >>> name_of(0.9), name_of(0.925)
    ('d90', 'd92.5')
    """
    return f"d{100 * share:g}"


def metric_text(value: float) -> str:
    """Return a metric with three decimals, as the sentence of a result prints it.

    Parameters
    ----------
    value : float
        An accuracy, or minus a loss.

    Examples
    --------
    >>> metric_text(0.8066), metric_text(-1.25), metric_text(1.0), metric_text(float("nan"))
    ('0.807', '−1.250', '1.000', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")  # adding 0 turns −0 into 0


def draw(result: IntrinsicDimension) -> tuple[Drawing, bytes]:
    """Draw the figure of a page.

    Parameters
    ----------
    result : IntrinsicDimension
        What a search found.

    Returns
    -------
    drawing : Drawing
        As SVG with title and description.
    bitmap : bytes
        As PNG. The bytes of both depend on the result and the version of matplotlib alone.
    """
    with drawing_style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        accuracy_against_dimension(figure.subplots(), result)
        drawing = finished(KEY, "What so many numbers reach", _caption(result), figure)
        held = io.BytesIO()
        # White paper: a bitmap is pasted where its ground is not known.
        figure.savefig(held, format="png", dpi=_DPI, metadata={"Software": None}, facecolor="white")
    return drawing, held.getvalue()


def _caption(result: IntrinsicDimension) -> str:
    parts = [
        f"Each dot is a training of d numbers in place of all weights, on the same steps; the line joins the means. "
        f"Band: full fine-tuning, {metric_text(result.full)}, with the 95 % interval of its mean."
    ]
    if result.dimension is not None or result.low is not None or result.high is not None:
        parts.append(f"Shaded upright: the 95 % interval of {name_of(result.share)}; an open side runs to the edge.")
    if result.head is not None:
        parts.append("The head alone is what training none of the model's own weights reaches.")
    if any(t.stopped for t in result.trials):
        parts.append("Crosses were given up at three quarters of their steps, far below the target.")
    return " ".join(parts)


def _metric_range(result: IntrinsicDimension, metrics: Iterable[float]) -> tuple[float, float]:
    held = [result.baseline, result.full, result.full_low, result.full_high, result.target, *metrics]
    held += [] if result.head is None else [result.head]
    known = [value for value in held if math.isfinite(value)] or [0.0]
    top = max(known)
    # No further below the baseline than full fine-tuning stands above it.
    bottom = max(min(known), 2 * result.baseline - top) if math.isfinite(result.baseline) else min(known)
    margin = 0.06 * (top - bottom) or 0.05
    return bottom - margin, top + margin


def _dimension_range(result: IntrinsicDimension, dimensions: Sequence[int]) -> tuple[float, float]:
    held = [float(d) for d in dimensions] + [end for end in (result.low, result.high, result.dimension) if end]
    if not held:
        held = [1.0, float(result.config.get("total") or 100)]
    return min(held) / 1.5, max(held) * 1.5


def _levels(ax: Axes, result: IntrinsicDimension) -> None:
    """Lines across the axes for what no dimension changes, named in the margin."""
    if result.full_high > result.full_low:
        ax.axhspan(result.full_low, result.full_high, color=SERIES[2], alpha=0.16, linewidth=0)
    untrained = UNTRAINED.get(result.metric_name, "baseline")
    goal = f"{100 * result.share:g} % of it" if not result.above_chance else f"{100 * result.share:g} % of the way"
    levels: list[tuple[float, str, str, Any, float]] = [
        (result.baseline, untrained, FAINT, DASHES[2], 0.8),
        (result.target, goal, SERIES[1], DASHES[1], 1.2),
        (result.full, "full fine-tuning", SERIES[2], DASHES[0], 1.2),
    ]
    if result.head is not None:
        levels.append((result.head, "head alone", SERIES[3], DASHES[3], 0.9))
    levels = sorted((level for level in levels if math.isfinite(level[0])), key=lambda level: level[0])
    for value, _, color, dashes, width in levels:
        ax.axhline(value, color=color, linestyle=dashes, linewidth=width)
    texts = [f"{name} {metric_text(value)}" for value, name, *_ in levels]
    _in_margin(ax, [level[0] for level in levels], texts, [level[2] for level in levels])


def _in_margin(ax: Axes, values: Sequence[float], texts: Sequence[str], colors: Sequence[str]) -> None:
    """Write labels right of the axes at their heights, ascending, pushed apart where lines lie close."""
    from matplotlib import rcParams

    size = 0.9 * float(rcParams["font.size"])
    figure = ax.get_figure(root=True)
    assert figure is not None  # for the type checker: axes that are drawn on stand in a figure
    height = ax.bbox.height / figure.dpi * 72  # points
    low, high = ax.get_ylim()
    gap = _GAP * size / height
    places = [(value - low) / (high - low) for value in values]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    if places and places[-1] > 1.0:  # back down from the top edge
        places[-1] = 1.0
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    for place, text, color in zip(places, texts, colors, strict=True):
        ax.text(1.015, place, text, color=color, fontsize=size, va="center", transform=ax.transAxes)


def _crossing(ax: Axes, result: IntrinsicDimension) -> None:
    """Shade the interval of the dimension, and mark and name the dimension itself."""
    left, right = ax.get_xlim()
    if result.dimension is not None or result.low is not None or result.high is not None:
        ends = (result.low or left, result.high or right)
        ax.axvspan(*ends, color=SERIES[1], alpha=0.13, linewidth=0, label="95 % interval")
    if result.dimension is None:
        return
    ax.plot([result.dimension] * 2, [ax.get_ylim()[0], result.target], color=SERIES[1], linewidth=0.9)
    ax.plot(result.dimension, result.target, marker="D", markersize=5, color=SERIES[1], linestyle="", zorder=4)
    # Below the line and to the right a rising curve leaves room; near the right edge, above and to the left.
    beside = math.log(result.dimension / left) < 0.62 * math.log(right / left)
    ax.annotate(
        f"{name_of(result.share)} = {grouped(round(float(f'{result.dimension:.3g}')))}",  # as the sentence says it
        (result.dimension, result.target),
        xytext=(8, -7) if beside else (-8, 6),
        textcoords="offset points",
        ha="left" if beside else "right",
        va="top" if beside else "bottom",
        color=INK,
        fontweight="bold",
    )


def _dots(ax: Axes, trials: Sequence[Any], bottom: float, *, marker: str, label: str) -> None:
    if not trials:
        return
    at = np.array([t.ask.dimension for t in trials], dtype=np.float64)
    metrics = np.array([t.metric for t in trials], dtype=np.float64)
    held = metrics >= bottom
    look: Any = {"color": SERIES[0], "linestyle": "", "alpha": 0.6}
    ax.plot(at[held], metrics[held], marker=marker, markersize=4.5, label=label, **look)
    if not held.all():
        ax.plot(at[~held], np.full(int((~held).sum()), bottom), marker="v", markersize=5, clip_on=False, **look)


def _legend(ax: Axes) -> None:
    """The key, below the axes: inside, lines across them would run through its words."""
    from matplotlib import rcParams
    from matplotlib.transforms import ScaledTranslation

    figure = ax.get_figure(root=True)
    assert figure is not None  # for the type checker: axes that are drawn on stand in a figure
    down = ScaledTranslation(0, -_BELOW * float(rcParams["font.size"]) / 72, figure.dpi_scale_trans)
    ax.legend(
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=ax.transAxes + down,
        ncols=4,
        handlelength=1.8,
    )


def _shares(ax: Axes, result: IntrinsicDimension) -> None:
    """A second axis on top: which share of all weights d is."""
    total = result.config.get("total")
    if not total:
        return
    above = ax.secondary_xaxis(
        "top", functions=(lambda d: np.divide(d, 0.01 * total), lambda share: np.multiply(share, 0.01 * total))
    )
    left, right = ax.get_xlim()
    steps = (1.0,) if right >= 100 * left else (1.0, 2.0, 5.0)  # within two decades, decades alone label too little
    above.xaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=_TICKS))
    above.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.10f}".rstrip("0").rstrip(".") + " %"))
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel(f"share of the model’s {grouped(int(total))} weights")
