"""A matplotlib figure as SVG bytes, and the same made ready to stand inside the page.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from spectra.plot import DEPTHS, SERIES, plot_heatmap
from spectra.report.tables import HeatMap
from spectra.report.text import elide, visible

INK, FAINT = "#1f2328", "#6b7280"
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


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw in the reports' face; a glyph that it lacks is drawn by another font and is no warning."""
    with matplotlib.rc_context(cast("Any", _STYLE)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing", category=UserWarning)
        yield


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


def heat_map_drawing(heat_map: HeatMap, key: str | None = None) -> Drawing:
    """Draw a layer × role map.

    Parameters
    ----------
    heat_map : HeatMap
        What to draw.
    key : str, optional
        Stem of its file; the map's own where not given.
    """
    rows, columns = len(heat_map.roles), len(heat_map.layers)
    figure = Figure(figsize=(7.0, 0.9 + 0.3 * rows), layout="constrained")
    ax = figure.subplots()
    scale = 100.0 if heat_map.kind == "share" else 1.0
    values = [[cell.value * scale if cell else math.nan for cell in line] for line in heat_map.cells]
    wide = columns <= 14
    plot_heatmap(
        ax,
        values,
        row_labels=[elide(visible(role), 34) for role in heat_map.roles],
        col_labels=[_layer_label(n, i, columns) for i, n in enumerate(heat_map.layers)],
        label=f"{heat_map.unit}, %" if heat_map.kind == "share" else heat_map.unit,
        texts=[[cell.text if cell else "" for cell in line] for line in heat_map.cells] if wide else None,
    )
    ax.set_xlabel("layer")
    return finished(key or heat_map.key, heat_map.title, heat_map.caption, figure)


def _layer_label(layer: int | None, place: int, columns: int) -> str:
    if layer is None:
        return "none"
    return str(layer) if columns <= 24 or place % (columns // 12) == 0 else ""


def finished(key: str, title: str, caption: str, figure: Figure) -> Drawing:
    """Write a figure as SVG, with a title and a description that a screen reader reads out.

    Parameters
    ----------
    key : str
        Stem of its file; ids in it begin with it.
    title, caption : str
        What it is, and what it shows.
    figure : Figure
        Drawn under `drawing_style`.
    """
    held = io.BytesIO()
    figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    return Drawing(key, title, caption, _titled(held.getvalue(), key, title, caption))


def _titled(svg: bytes, key: str, title: str, caption: str) -> bytes:
    """Give the document its title and description."""
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


def evenly_at(count: int, most: int) -> list[int]:
    """Return at most so many of the places 0 … count − 1, evenly spread, both ends among them.

    Parameters
    ----------
    count : int
        How many places there are.
    most : int
        How many to keep.
    """
    return [int(i) for i in np.unique(np.rint(np.linspace(0, count - 1, min(count, most))).astype(int))]


_THEME = (
    {INK: "--ink", FAINT: "--faint"}
    | {color: f"--series-{i}" for i, color in enumerate(SERIES)}
    | {color: f"--depth-{i}" for i, color in enumerate(DEPTHS)}
)
