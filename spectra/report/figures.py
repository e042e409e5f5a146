"""The four figures of a report as SVG bytes, and the same figures made ready to stand inside the page.

Text stays text (``svg.fonttype: none``): it can be searched, selected, read aloud and set in a journal's face, and the
files are a fraction of the size of outlined glyphs. What that costs, that a reader without DejaVu Sans sees another
sans-serif, moves no label: every one is anchored where it is drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra.plot import (
    DASHES,
    DEPTHS,
    RANK_MARKS,
    SERIES,
    draw_error_curve,
    plot_heatmap,
    style_error_axes,
    tidy,
)
from spectra.report.build import ReportData
from spectra.report.rows import TensorRow
from spectra.report.tables import HeatMap
from spectra.report.text import counted, elide, number, visible

INK, FAINT = "#1f2328", "#6b7280"
PANELS = 6  # roles drawn; the caption names those that are not
LINES = 12  # spectra a panel: one a depth step
POINTS = 60  # points a line in the overlay
DECADES = 5  # that the overlay's axis spans at most: the part of a spectrum that a reader can compare
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spectra",  # element ids from content alone: the same bytes every time
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "text.parse_math": False,  # a role may hold "$"
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "path.simplify": False,
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Drawing:
    """One figure: its file's stem, its title, what it shows in a sentence, and the SVG document."""

    key: str
    title: str
    caption: str
    svg: bytes


def draw_figures(data: ReportData) -> tuple[Drawing, ...]:
    """Draw the figures of a report; none without an analysed matrix.

    Parameters
    ----------
    data : ReportData
        Content of the report.

    Returns
    -------
    tuple of Drawing
        ``spectra``, ``truncation``, ``relative_change``, ``effective_rank``. The bytes depend on the data and the
        version of matplotlib alone.
    """
    roles = _main_roles(data.rows)
    if not roles:
        return ()
    with matplotlib.rc_context(cast("Any", _STYLE)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing", category=UserWarning)
        drawings = [_spectra(roles), _truncation(roles)]
        drawings += [_heat_map(heat_map) for heat_map in data.maps]
    return tuple(drawings)


def inline(drawing: Drawing) -> str:
    """Return a figure as an ``<svg>`` element for the page: no style of its own, colours that follow the theme.

    Parameters
    ----------
    drawing : Drawing
        A figure of `draw_figures`.

    Notes
    -----
    matplotlib writes ``style="…"`` attributes and a ``<style>`` that would reach the whole page. Both become plain
    presentation attributes, so that the page's content policy can forbid every inline style.
    """
    root = ElementTree.fromstring(drawing.svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style") or child.get("id") == "patch_1":  # the white paper
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _plain_attributes(element, drawing.key)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("class", "figure")
    return ElementTree.tostring(root, encoding="unicode")


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
    return _drawing("spectra", "Spectra of the updates", caption, figure)


def _spectra_panel(ax: Axes, role: str, held: Sequence[TensorRow], layers: Sequence[int]) -> None:
    ordered = sorted(held, key=lambda r: r.layer or 0)
    for row in _evenly(ordered, LINES):
        index, values = np.asarray(row.curve.index), np.asarray(row.curve.values)
        pick = _evenly_at(len(index), POINTS)
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
    return _drawing("truncation", "Truncation error", caption, figure)


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


def _heat_map(heat_map: HeatMap) -> Drawing:
    rows, columns = len(heat_map.roles), len(heat_map.layers)
    figure = Figure(figsize=(7.0, 0.9 + 0.3 * rows), layout="constrained")
    ax = figure.subplots()
    scale = 100.0
    values = [[cell.value * scale if cell else math.nan for cell in line] for line in heat_map.cells]
    wide = columns <= 14
    plot_heatmap(
        ax,
        values,
        row_labels=[elide(visible(role), 34) for role in heat_map.roles],
        col_labels=[_layer_label(n, i, columns) for i, n in enumerate(heat_map.layers)],
        label=f"{heat_map.unit}, %",
        texts=[[cell.text if cell else "" for cell in line] for line in heat_map.cells] if wide else None,
    )
    ax.set_xlabel("layer")
    return _drawing(heat_map.key, heat_map.title, heat_map.caption, figure)


def _layer_label(layer: int | None, place: int, columns: int) -> str:
    if layer is None:
        return "none"
    return str(layer) if columns <= 24 or place % (columns // 12) == 0 else ""


def _drawing(key: str, title: str, caption: str, figure: Figure) -> Drawing:
    held = io.BytesIO()
    figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    return Drawing(key, title, caption, _titled(held.getvalue(), key, title, caption))


def _titled(svg: bytes, key: str, title: str, caption: str) -> bytes:
    """Give the document a title and a description, which a screen reader reads out."""
    from xml.sax.saxutils import escape

    start = svg.index(b"<svg")
    end = svg.index(b">", start)
    named = f' role="img" aria-labelledby="{key}-title {key}-desc"'
    told = f'\n <title id="{key}-title">{escape(title)}</title>\n <desc id="{key}-desc">{escape(caption)}</desc>'
    return svg[:end] + named.encode() + b">" + told.encode() + svg[end + 1 :]


def _plain_attributes(element: ElementTree.Element, key: str) -> None:
    """Turn ``style`` into attributes, colours into theme variables, and make ids unique on the page."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = declaration.partition(":")
        if value and name.strip() != "font-family":
            element.set(name.strip(), value.strip())
    if _HREF in element.attrib:
        element.set("href", "#" + key + "-" + element.attrib.pop(_HREF).lstrip("#"))
    if "id" in element.attrib and not element.get("id", "").startswith(f"{key}-"):
        element.set("id", f"{key}-{element.get('id')}")
    for name, value in list(element.attrib.items()):
        themed = _THEME.get(value.lower())
        if themed and name in ("fill", "stroke"):
            element.set(name, f"var({themed})")
        elif value.startswith("url(#"):
            element.set(name, f"url(#{key}-{value[5:]}")
    if element.tag == "text" and "fill" not in element.attrib:
        element.set("fill", "var(--ink)")
    if element.text and element.tag == "path":
        element.text = None
    if "d" in element.attrib:
        element.set("d", re.sub(r"\s+", " ", element.get("d", "")).strip())


def _evenly(rows: Sequence[TensorRow], most: int) -> list[TensorRow]:
    return [rows[i] for i in _evenly_at(len(rows), most)]


def _evenly_at(count: int, most: int) -> list[int]:
    return [int(i) for i in np.unique(np.rint(np.linspace(0, count - 1, min(count, most))).astype(int))]


def _depth_color(layer: int | None, layers: Sequence[int]) -> str:
    if layer is None or len(layers) < 2:
        return SERIES[0]
    return DEPTHS[round(layers.index(layer) / (len(layers) - 1) * (len(DEPTHS) - 1))]


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(np.median(known)) if known else math.nan


_THEME = (
    {INK: "--ink", FAINT: "--faint"}
    | {color: f"--series-{i}" for i, color in enumerate(SERIES)}
    | {color: f"--depth-{i}" for i, color in enumerate(DEPTHS)}
)
