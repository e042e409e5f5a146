"""The five figures of a report on one update: spectra, truncation errors, budgets of parameters, two maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra.plot import DASHES, DEPTHS, RANK_MARKS, SERIES, draw_error_curve, style_error_axes, tidy
from spectra.report.build import ReportData
from spectra.report.directions import Directions
from spectra.report.drawing import FAINT, Drawing, drawing_style, evenly_at, finished, heat_map_drawing
from spectra.report.rows import TensorRow
from spectra.report.text import counted, elide, number, visible

PANELS = 6  # roles drawn; the caption names those that are not
LINES = 12  # spectra a panel: one a depth step
POINTS = 60  # points a line in the overlay
DECADES = 5  # that the overlay's axis spans at most: the part of a spectrum that a reader can compare


def draw_figures(data: ReportData) -> tuple[Drawing, ...]:
    """Draw the figures of a report; none without an analysed matrix.

    Parameters
    ----------
    data : ReportData
        Content of the report.

    Returns
    -------
    tuple of Drawing
        ``spectra``, ``truncation``, ``budgets``, ``relative_change``, ``effective_rank``. The bytes depend on the data
        and the version of matplotlib alone.
    """
    roles = _main_roles(data.rows)
    if not roles:
        return ()
    with drawing_style():
        drawings = [_spectra(roles), _truncation(roles)]
        drawings += [] if data.directions is None else [_budgets(data.directions)]
        drawings += [heat_map_drawing(heat_map) for heat_map in data.maps]
    return tuple(drawings)


def _main_roles(rows: Sequence[TensorRow]) -> dict[str, list[TensorRow]]:
    """The roles with most parameters among those with layers, in the order of the model; all roles if none has any."""
    held = [r for r in rows if r.analysed and r.curve]
    layered = [r for r in held if r.layer is not None] or held
    members: dict[str, list[TensorRow]] = {}
    for row in layered:
        members.setdefault(row.role, []).append(row)
    largest = sorted(members, key=lambda role: -sum(r.parameters for r in members[role]))[:PANELS]
    return {role: members[role] for role in members if role in largest}


def _spectra(roles: Mapping[str, list[TensorRow]]) -> Drawing:
    columns = min(3, len(roles))
    lines = math.ceil(len(roles) / columns)
    figure = Figure(figsize=(7.0, 0.6 + 2.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    layers = sorted({r.layer for held in roles.values() for r in held if r.layer is not None})
    for ax, (role, held) in zip(panels, roles.items(), strict=False):
        _spectra_panel(ax, role, held, layers)
    for ax in panels[len(roles) :]:
        ax.set_visible(False)
    _finish_panels(panels, roles)
    figure.supxlabel("index i", fontsize=9)
    figure.supylabel("singular value σᵢ", fontsize=9)
    _depth_legend(figure, panels[0], layers)
    caption = (
        f"Singular values of the updates by role, {counted(len(roles), 'role')}, coloured by depth. Dashed: storage "
        "rounding floor (median over layers); values beneath it cannot be told from rounding. Dotted: "
        "Marchenko–Pastur edge, where pure noise of the same size would end (median over layers)."
    )
    return finished("spectra", "Spectra of the updates", caption, figure)


def _spectra_panel(ax: Axes, role: str, held: Sequence[TensorRow], layers: Sequence[int]) -> None:
    ordered = sorted(held, key=lambda r: r.layer or 0)
    for row in _evenly(ordered, LINES):
        index, values = np.asarray(row.curve.index), np.asarray(row.curve.values)
        pick = evenly_at(len(index), POINTS)
        index, values = index[pick], values[pick]
        color = _depth_color(row.layer, layers)
        ax.plot(index[values > 0], values[values > 0], color=color, linewidth=1.0)
    for name, dashes in (("storage_floor", (0, (5, 2))), ("mp_edge", (0, (1, 1.5)))):
        level = _median(r.numbers[name] for r in held)
        if level > 0:
            ax.axhline(level, color=FAINT, linewidth=0.9, linestyle=dashes)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_title(elide(visible(role), 30), loc="left")


def _finish_panels(panels: Sequence[Axes], roles: Mapping[str, list[TensorRow]]) -> None:
    """End the shared axis `DECADES` below the largest value; a floor beneath that is told in words."""
    low, high = panels[0].get_ylim()
    bottom = max(low, high * 10.0**-DECADES)
    for ax, held in zip(panels, roles.values(), strict=False):
        ax.set_ylim(bottom, high)
        tidy(ax)
        ax.minorticks_off()  # too small to count in a panel, and half of the drawing time
        floor = _median(r.numbers["storage_floor"] for r in held)
        if 0 < floor < bottom:
            ax.text(0.03, 0.04, f"storage floor below, at {number(floor, 2)}", transform=ax.transAxes, fontsize=7.5,
                    color=FAINT)  # fmt: skip


def _depth_legend(figure: Figure, ax: Axes, layers: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    ends = [layers[0], layers[len(layers) // 2], layers[-1]] if len(layers) > 3 else list(layers)
    handles = [Line2D([], [], color=_depth_color(n, layers), label=f"layer {n}") for n in dict.fromkeys(ends)]
    handles.append(Line2D([], [], color=FAINT, linewidth=0.9, linestyle=(0, (5, 2)), label="storage floor"))
    handles.append(Line2D([], [], color=FAINT, linewidth=0.9, linestyle=(0, (1, 1.5)), label="Marchenko–Pastur edge"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, handlelength=2.2)


def _truncation(roles: Mapping[str, list[TensorRow]]) -> Drawing:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    ax = figure.subplots()
    largest = 2
    for i, (role, held) in enumerate(roles.items()):
        ranks, low, high = _median_curve(held)
        label = elide(visible(role), 44)
        draw_error_curve(ax, ranks, low, high, marks=RANK_MARKS, label=label, color=SERIES[i], linestyle=DASHES[i])
        largest = max(largest, int(ranks[-1]))
    style_error_axes(ax, largest)
    ax.legend(frameon=False, loc="upper right", handlelength=3)
    caption = (
        "What the best matrix of rank r leaves of an update, ‖Δ − Δᵣ‖ / ‖Δ‖: the median over layers of each role, with "
        "dots at ranks 8, 16 and 64. A shaded band, where there is one, is the certified interval of truncated spectra."
    )
    return finished("truncation", "Truncation error", caption, figure)


def _budgets(found: Directions) -> Drawing:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    found.model.plot.budgets(ax=figure.subplots())
    caption = (
        "What a budget of parameters leaves of all updates together, ‖Δ\xa0−\xa0Δᵣ‖\xa0/\xa0‖Δ‖: spent on one rank "
        "everywhere (equal ranks, written beside the upper curve) and spent where directions help most (best ranks). A "
        "shaded band, where there is one, is the certified interval of truncated spectra; the dotted line is then what "
        "no ranks can go below."
    )
    return finished("budgets", "Error against parameters", caption, figure)


def _median_curve(held: Sequence[TensorRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median error over matrices at the ranks that every one of them has."""
    common = sorted(set.intersection(*(set(r.curve.index) for r in held)))
    low, high = [], []
    for row in held:
        at = [row.curve.index.index(r) for r in common]
        most = np.asarray(row.curve.error)[at]
        high.append(most)
        low.append(np.asarray(row.curve.error_low)[at] if row.curve.error_low else most)
    return np.asarray(common), np.median(low, axis=0), np.median(high, axis=0)


def _evenly(rows: Sequence[TensorRow], most: int) -> list[TensorRow]:
    return [rows[i] for i in evenly_at(len(rows), most)]


def _depth_color(layer: int | None, layers: Sequence[int]) -> str:
    if layer is None or len(layers) < 2:
        return SERIES[0]
    return DEPTHS[round(layers.index(layer) / (len(layers) - 1) * (len(DEPTHS) - 1))]


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(np.median(known)) if known else math.nan
