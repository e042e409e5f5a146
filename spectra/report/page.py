"""The report as one HTML file: template, style, script and data in a page that fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from spectra.advice import LABELS, Advice
from spectra.report.build import ReportData, certificate_words
from spectra.report.directions import bands
from spectra.report.drawing import Drawing, inline
from spectra.report.glossary import GENERAL, TERMS
from spectra.report.html import Line, line, render, script_of, short, style_of
from spectra.report.rows import MEASURES, NUMBERS, Interval, TensorRow
from spectra.report.tables import share_span, span
from spectra.report.text import dump, finite, percent, trace, visible

DIGITS = 4  # significant digits of a number in the page's data
# Columns of the table of tensors: key to sort by, head, what it is.
COLUMNS = (
    ("name", "Tensor", "canonical name"),
    ("layer", "Layer", "index of the layer"),
    ("shape", "Shape", "sorted by entries"),
    ("status", "Status", "what was done with it"),
    ("relative_frobenius", "‖Δ‖ / ‖W‖", "relative change"),
    ("entropy_rank", "Entropy rank", "effective rank: read it beside the next column"),
    ("signal_rank", "Above floor", "singular values above the storage rounding floor"),
    ("rank_90", "90 % takes", "directions that hold 90 % of the squared norm"),
    ("error_r16", "Error r = 16", "what the best rank-16 matrix leaves out"),
    ("rounding", "Rounding", "share of the norm that storage rounding explains"),
)


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
    figures = {d.key: (d, Markup(inline(d))) for d in drawings if d.key in ("spectra", "truncation", "budgets")}
    return render(
        "page.html",
        style=style_of(),
        script=script_of("page.js"),
        payload=Markup(dump(payload(data))),
        data=data,
        about=("How much, and where", "How many directions", "How sure"),
        base=short(data.base),
        tuned=short(data.tuned),
        figures=figures,
        columns=COLUMNS,
        lines=[_line(row) for row in data.rows],
        terms=TERMS,
        general=GENERAL,
        parquet="spectra.parquet",
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
        "criteria": list(LABELS.values()),
        "rows": [_row(row, data, grids) for row in data.rows],
        "grids": [list(grid) for grid in grids],
    }  # fmt: skip


def _row(row: TensorRow, data: ReportData, grids: dict[tuple[int, ...], int]) -> dict[str, Any]:
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
    if data.directions is not None and row.position in data.directions.matrices:
        plain["advice"] = _advice(data.directions.matrices[row.position])
    if row.curve:
        grid = grids.setdefault(row.curve.index, len(grids))
        curve = row.curve
        plain["curve"] = {"grid": grid, "values": curve.values, "error": curve.error}
        if row.truncated:
            plain["curve"] |= {"high": curve.high, "low": curve.error_low}
    return plain


def _advice(advice: Advice) -> dict[str, Any]:
    """What each criterion says, in the order of the page's list of them, and why those are silent that are."""
    held = {"bands": [_ends(band) if band.known else None for band in bands(advice).values()]}
    lacking = {str(i): band.reason for i, band in enumerate(advice.bands.values()) if band.reason}
    return held | {"lacking": lacking, "said": advice.verdict}


def _ends(interval: Interval) -> Any:
    ends = [finite(interval.low, DIGITS), finite(interval.high, DIGITS)]
    return ends[0] if interval.exact or ends[0] == ends[1] else ends


def _numbers(row: TensorRow) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name in MEASURES:
        interval = row.measures[name]
        if interval.known:
            known[name] = _ends(interval)
    for name in NUMBERS:
        value = finite(row.numbers[name], DIGITS)
        if value is not None:
            known[name] = value
    if math.isfinite(row.rounding):
        known["rounding"] = finite(row.rounding, DIGITS)
    return known


def _line(row: TensorRow) -> Line:
    cells = (
        percent(row.numbers["relative_frobenius"]),
        span(row.measures["entropy_rank"]),
        span(row.measures["signal_rank"]),
        span(row.measures["rank_90"]),
        share_span(row.measures["error_r16"]),
        trace(row.rounding) if row.analysed else "",
    )
    return line(row.position, row.name, row.layer, row.shape, row.status, cells)
