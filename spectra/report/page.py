"""The report as one HTML file: template, style, script and data in a page that fetches nothing.

The page forbids itself everything by a content security policy, then allows its one style sheet and its one script by
their hashes: text from a checkpoint could not run even where an escape was forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape

from spectra.report.build import ReportData, certificate_words
from spectra.report.figures import Drawing, inline
from spectra.report.glossary import GENERAL, TERMS
from spectra.report.rows import MEASURES, NUMBERS, Interval, TensorRow
from spectra.report.tables import Cell, Group, HeatMap, share_span, span
from spectra.report.text import dump, elide, finite, number, percent, size, trace, visible

SHADES = 33  # steps of viridis in a map: finer than anyone can tell apart in a cell
DENSE = 14  # layers beyond which the cells of a map are too narrow for numbers
SPARSE = 24  # layers beyond which only every fifth has its number above its column
NAME_COLUMNS, TITLE_COLUMNS = 72, 400
DIGITS = 4  # significant digits of a number in the page's data


@dataclass(frozen=True)
class _Line:
    """One row of the page's table of tensors, as text."""

    position: int
    name: str
    title: str
    layer: str
    shape: str
    status: str
    cells: tuple[str, ...]


def render_page(data: ReportData, drawings: Iterable[Drawing]) -> str:
    """Return the page.

    Parameters
    ----------
    data : ReportData
        Content of the report.
    drawings : iterable of Drawing
        Its figures; those that the page draws itself, the maps, are not repeated.

    Returns
    -------
    str
        An HTML document that is complete without any other file and without a network.
    """
    style, script = _source("page.css") + _shade_rules(), _source("page.js")
    figures = {d.key: d for d in drawings if d.key in ("spectra", "truncation")}
    return _template().render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        payload=Markup(dump(payload(data))),
        data=data,
        base=_short(data.base),
        tuned=_short(data.tuned),
        figures=[(d, Markup(inline(d))) for d in figures.values()],
        lines=[_line(row) for row in data.rows],
        terms=TERMS,
        general=GENERAL,
        dense=DENSE,
        sparse=SPARSE,
        sides=[(label, data.info.get(key, {})) for key, label in (("base", "Base"), ("tuned", "Tuned"))],
    )


def payload(data: ReportData) -> dict[str, Any]:
    """Return what the page's script reads: every row's numbers and thinned curves, and how each number reads.

    Parameters
    ----------
    data : ReportData
        Content of the report.
    """
    grids: dict[tuple[int, ...], int] = {}
    return {
        "terms": [
            {"key": t.key, "label": t.label, "kind": t.kind, "reading": t.reading}
            for t in TERMS
        ],
        "rows": [_row(row, grids) for row in data.rows],
        "grids": [list(grid) for grid in grids],
    }  # fmt: skip


def _row(row: TensorRow, grids: dict[tuple[int, ...], int]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": visible(row.name),
        "layer": row.layer,
        "role": visible(row.role),
        "shape": list(row.shape),
        "dtypes": [visible(row.dtype_base), visible(row.dtype_tuned)],
        "status": visible(row.status),
        "reason": visible(row.reason),
        "numbers": _numbers(row),
    }
    if row.analysed:
        plain |= {"limit": row.limit, "certificate": visible(certificate_words(row)), "noisy": row.mostly_rounding}
    if row.curve:
        grid = grids.setdefault(row.curve.index, len(grids))
        curve = row.curve
        plain["curve"] = {"grid": grid, "values": curve.values, "error": curve.error}
        if row.truncated:
            plain["curve"] |= {"high": curve.high, "low": curve.error_low}
    return plain


def _numbers(row: TensorRow) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name in MEASURES:
        interval = row.measures[name]
        if interval.known:
            ends = [finite(interval.low, DIGITS), finite(interval.high, DIGITS)]
            known[name] = ends[0] if interval.exact or ends[0] == ends[1] else ends
    for name in NUMBERS:
        value = finite(row.numbers[name], DIGITS)
        if value is not None:
            known[name] = value
    if math.isfinite(row.rounding):
        known["rounding"] = finite(row.rounding, DIGITS)
    return known


def _line(row: TensorRow) -> _Line:
    shown = visible(row.name)
    return _Line(
        position=row.position,
        name=elide(shown, NAME_COLUMNS),
        title=elide(shown, TITLE_COLUMNS),
        layer="" if row.layer is None else str(row.layer),
        shape=" × ".join(map(str, row.shape)),
        status=row.status,
        cells=(
            _blank(percent(row.numbers["relative_frobenius"])),
            _blank(span(row.measures["entropy_rank"])),
            _blank(span(row.measures["signal_rank"])),
            _blank(span(row.measures["rank_90"])),
            _blank(share_span(row.measures["error_r16"])),
            _blank(trace(row.rounding) if row.analysed else ""),
        ),
    )


def _blank(text: str) -> str:
    return "" if text.startswith("–") else text


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _source(name: str) -> str:
    return resources.files("spectra.report").joinpath(name).read_text(encoding="utf-8").strip() + "\n"


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
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    environment.filters |= {
        "visible": visible,
        "name": lambda text: elide(visible(text), NAME_COLUMNS),
        "span": span,
        "share_span": share_span,
        "percent": percent,
        "trace": trace,
        "broken": _broken,
        "number": number,
        "size": size,
        "limits": _limits,
    }
    environment.globals |= {"shade": _shade, "scale": _scale, "plain": _plain_items}
    return environment.from_string(_source("page.html"))


def _shade(cell: Cell, heat_map: HeatMap) -> str:
    low, high = _range(heat_map)
    place = (cell.value - low) / (high - low) if high > low else 0.5
    return f"h{round(place * (SHADES - 1))}" if math.isfinite(place) else "hx"


def _scale(heat_map: HeatMap) -> tuple[str, str]:
    """Return the ends of a map's colour scale, in words."""
    low, high = _range(heat_map)
    return percent(low), percent(high)


def _range(heat_map: HeatMap) -> tuple[float, float]:
    values = [c.value for line in heat_map.cells for c in line if c and math.isfinite(c.value)]
    return (min(values), max(values)) if values else (math.nan, math.nan)


def _limits(group: Group) -> str:
    return span(Interval(group.limit.low, group.limit.high))


def _short(ref: str) -> str:
    """Return the last two parts of a path or hub id, for the title: folders called ``model`` say little alone."""
    parts = [p for p in ref.replace("\\", "/").split("/") if p not in ("", ".", "..")]
    return elide(visible("/".join(parts[-2:]) if parts else ref), 60)


def _broken(name: str) -> Markup:
    """Return a name, escaped, that a line may break after its dots and slashes."""
    escaped = str(escape(name))
    return Markup(escaped.replace(".", ".<wbr>").replace("/", "/<wbr>"))


def _plain_items(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings or versions as sorted pairs of text, without what is not set."""
    return [(str(k), elide(visible(str(v)), 200)) for k, v in sorted(mapping.items()) if v not in (None, "", [], ())]
