"""What every plot here shares: colours and dashes that tell lines apart, decade labels, an open frame."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    open_frame(ax)


def next_color(ax: Axes) -> str:
    """Return the first colour of `SERIES` that no line of the axes has yet, then round again.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes that are about to get one line more.
    """
    used = {line.get_color() for line in ax.lines}
    return next((c for c in SERIES if c not in used), SERIES[len(ax.lines) % len(SERIES)])


def open_frame(ax: Axes) -> None:
    """Leave only the left and the lower side of the frame.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Axes to change.
    """
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
