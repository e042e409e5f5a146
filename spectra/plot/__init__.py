"""Plots of spectra on axes that the caller owns: ``f(ax, data)``, numpy and matplotlib only.

Nothing here opens a figure, shows one or touches matplotlib's global state, so the functions serve a notebook, a
paper's grid of panels and the report alike. Line art never relies on colour alone: bands, dashes and labels say
the same.
"""

from __future__ import annotations

from spectra.plot.axes import DASHES, DEPTHS, RANK_MARKS, SERIES, power_of_ten, tidy
from spectra.plot.heatmap import plot_heatmap
from spectra.plot.pair import plot_capture, plot_intruders, plot_overlap
from spectra.plot.spectrum import (
    SpectrumLike,
    draw_error_curve,
    plot_spectrum,
    plot_truncation_error,
    style_error_axes,
    truncation_curve,
)

__all__ = [
    "DASHES",
    "DEPTHS",
    "RANK_MARKS",
    "SERIES",
    "SpectrumLike",
    "draw_error_curve",
    "plot_capture",
    "plot_heatmap",
    "plot_intruders",
    "plot_overlap",
    "plot_spectrum",
    "plot_truncation_error",
    "power_of_ten",
    "style_error_axes",
    "tidy",
    "truncation_curve",
]
