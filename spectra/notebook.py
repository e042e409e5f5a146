"""What a result shows in a notebook: axes of a new figure, and a drawing as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7, 4.5)  # inches: as wide as a notebook's cell


def new_axes() -> Axes:
    """Axes of a new pyplot figure, which a notebook shows by itself."""
    import matplotlib.pyplot as plt

    return plt.figure(figsize=_SIZE, layout="constrained").subplots()


def inline_svg(draw: Callable[..., object]) -> str:
    """Draw on a figure of its own and give it as inline SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    draw(ax=figure.subplots())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
