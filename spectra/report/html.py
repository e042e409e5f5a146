"""What every report's page is made of: templates with their filters, style, script, and the policy that allows them.

A page forbids itself everything by a content security policy, then allows its one style sheet and its one script by
their hashes: text from a checkpoint could not run even where an escape was forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape

from spectra.report.directions import at_least
from spectra.report.rows import Interval
from spectra.report.tables import Cell, Group, HeatMap, share_span, span
from spectra.report.text import elide, grouped, number, percent, size, trace, visible, whole_percent

SHADES = 33  # steps of viridis in a map: finer than anyone can tell apart in a cell
DENSE = 14  # layers beyond which the cells of a map are too narrow for numbers
SPARSE = 24  # layers beyond which only every fifth has its number above its column
NAME_COLUMNS, TITLE_COLUMNS = 72, 400


@dataclass(frozen=True)
class Line:
    """One row of a page's table of tensors, as text."""

    position: int
    name: str
    title: str
    layer: str
    shape: str
    status: str
    cells: tuple[str, ...]


def line(
    position: int, name: str, layer: int | None, shape: tuple[int, ...], status: str, cells: tuple[str, ...]
) -> Line:
    """Return a row of the table, its name made visible and short.

    Parameters
    ----------
    position : int
        Place of the tensor in the page's data.
    name : str
        As stored.
    layer : int or None
        None outside every layer.
    shape : tuple of int
        Of the tensor.
    status : str
        What was done with it.
    cells : tuple of str
        The columns after the status; a dash becomes an empty cell.
    """
    shown = visible(name)
    return Line(
        position=position,
        name=elide(shown, NAME_COLUMNS),
        title=elide(shown, TITLE_COLUMNS),
        layer="" if layer is None else str(layer),
        shape=" × ".join(map(str, shape)),
        status=status,
        cells=tuple("" if text.startswith("–") else text for text in cells),
    )


def render(template: str, *, style: str, script: str, **values: Any) -> str:
    """Return a page whose policy allows this style and this script alone.

    Parameters
    ----------
    template : str
        Its path, as `source` takes it.
    style, script : str
        As `style_of` and `script_of` put them together.
    **values
        What the template names.
    """
    held = {"policy": _policy(style, script), "style": Markup(style), "script": Markup(script)}
    return _environment().get_template(template).render(held | values)


def style_of(*more: str) -> str:
    """Return the style sheet: every report's, the shades of the maps, and a report's own.

    Parameters
    ----------
    *more : str
        Paths of further style sheets inside `spectra.report`.
    """
    return source("page.css") + _shade_rules() + "".join(source(name) for name in more)


def script_of(own: str) -> str:
    """Return the script: what every report shares, around what is its own, in a scope that nothing else sees.

    Parameters
    ----------
    own : str
        Path of a report's own script inside `spectra.report`.
    """
    shared = ("shared/text.js", "shared/table.js", "shared/panel.js", "shared/plots.js")
    return scoped(*shared, own, "shared/reader.js", "shared/theme.js")


def scoped(*names: str) -> str:
    """Return a script of several files, in a scope that nothing else sees.

    Parameters
    ----------
    *names : str
        Their paths, as `source` takes them.
    """
    return '(() => {\n"use strict";\n' + "\n".join(map(source, names)) + "})();\n"


@cache
def source(name: str) -> str:
    """Return a text file of the package, ended by one newline.

    Parameters
    ----------
    name : str
        Path inside `spectra.report`, or inside another package as ``"package:path"``.
    """
    package, _, path = name.rpartition(":")
    return resources.files(package or "spectra.report").joinpath(path).read_text(encoding="utf-8").strip() + "\n"


def short(ref: str) -> str:
    """Return the last two parts of a path or hub id, for a title: folders called ``model`` say little alone.

    Parameters
    ----------
    ref : str
        As given.

    Examples
    --------
    >>> short("/a/long/way/to/models/tuned/")
    'models/tuned'
    """
    parts = [p for p in ref.replace("\\", "/").split("/") if p not in ("", ".", "..")]
    return elide(visible("/".join(parts[-2:]) if parts else ref), 60)


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _shade_rules() -> str:
    """One class a shade of viridis: the page allows no inline style. Ink is black or white by the shade's luminance."""
    rules = []
    for i in range(SHADES):
        red, green, blue, _ = matplotlib.colormaps["viridis"](i / (SHADES - 1))
        ink = "#fff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45 else "#000"
        rules.append(f".h{i}{{background:{matplotlib.colors.to_hex((red, green, blue))};color:{ink}}}\n")
    return "".join(rules)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(source),
    )
    environment.filters |= {
        "visible": visible,
        "name": lambda text: elide(visible(text), NAME_COLUMNS),
        "span": span,
        "share_span": share_span,
        "percent": percent,
        "trace": trace,
        "broken": _broken,
        "number": number,
        "whole": _whole,
        "above": whole_percent,
        "size": size,
        "limits": _limits,
        "at_least": at_least,
        "grouped": grouped,
    }
    environment.globals |= {
        "shade": _shade,
        "scale": _scale,
        "plain": _plain_items,
        "dense": DENSE,
        "sparse": SPARSE,
    }
    return environment


def _shade(cell: Cell, heat_map: HeatMap) -> str:
    low, high = heat_map.range
    place = (cell.value - low) / (high - low) if high > low else 0.5
    return f"h{round(min(max(place, 0.0), 1.0) * (SHADES - 1))}" if math.isfinite(place) else "hx"


def _scale(heat_map: HeatMap) -> tuple[str, str]:
    """Return the ends of a map's colour scale, in words."""
    low, high = heat_map.range
    words = percent if heat_map.kind == "share" else number
    return words(low), words(high)


def _whole(value: float) -> str:
    """Return a count that is not whole by nature: from ten on its decimals say nothing."""
    return number(float(round(value)) if 10 <= abs(value) < 1e5 else value, 2)


def _limits(group: Group) -> str:
    return span(Interval(group.limit.low, group.limit.high))


def _broken(name: str) -> Markup:
    """Return a name, escaped, that a line may break after its dots and slashes."""
    escaped = str(escape(name))
    return Markup(escaped.replace(".", ".<wbr>").replace("/", "/<wbr>"))


def _plain_items(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings or versions as sorted pairs of text, without what is not set."""
    return [(str(k), elide(visible(str(v)), 200)) for k, v in sorted(mapping.items()) if v not in (None, "", [], ())]
