"""What quantizing a model lost as one HTML file, of the same make as the report on weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spectra.quantized.build import Findings, findings, summary
from spectra.quantized.figures import draw_figures
from spectra.quantized.glossary import GENERAL, TERMS
from spectra.quantized.noise import noise_curve
from spectra.quantized.pooled import Pooled, decibels
from spectra.quantized.result import PARQUET, QuantizedRun
from spectra.quantized.running import FRACTIONS, kept_places
from spectra.report.drawing import Drawing, inline
from spectra.report.files import figures_folder, write_atomically
from spectra.report.html import Line, line, render, script_of, short, source, style_of
from spectra.report.text import counted, dump, elide, finite, number, percent, visible

PAGE, JSON = "quantized.html", "quantized.json"

DIGITS = 4  # significant digits of a number in the page's data
CURVE_DIGITS = 3
COLUMNS = 5  # schemes with a column of their own in the table of tensors
_MISSING = "–"
# Numbers of a matrix in one scheme, in the order of the panel's rows: key, and how the page prints it.
_SHOWN = (
    "bits", "sqnr_db", "gaussian_db", "shannon_db", "edge", "edge_whitened", "outliers", "distance_whitened",
    "weighted_db", "repaired",
)  # fmt: skip
_OPTIONAL = ("weighted_db", "weighted_optimal", "weighted_plain", "captured", "captured_chance", "repaired")


def write_page(run: QuantizedRun, out: str | os.PathLike[str], *, found: Findings | None = None) -> list[Path]:
    """Write ``quantized.html``, ``quantized.json``, ``quantized.parquet`` and ``figures/*.svg``.

    Parameters
    ----------
    run : QuantizedRun
    out : path
        Folder to write to; made if it is not there.
    found : Findings, optional
        What is said of the run, where `findings` has been asked already.

    Returns
    -------
    list of Path
        What was written, the page first. The same run gives the same bytes.

    Raises
    ------
    JournalError
        If ``figures`` is a symbolic link: what it points to is not the caller's folder.
    OSError
        If a file cannot be written; whatever stood there before is whole.
    """
    folder = Path(out)
    figures = figures_folder(folder)
    found = findings(run) if found is None else found
    drawings = draw_figures(run)
    table = run.save(folder)
    return [
        write_atomically(folder / PAGE, render_page(found, drawings).encode()),
        write_atomically(folder / JSON, (dump(summary(found), indent=1) + "\n").encode()),
        table,
        *(write_atomically(figures / f"{drawing.key}.svg", drawing.svg) for drawing in drawings),
    ]


def render_page(found: Findings, drawings: Iterable[Drawing]) -> str:
    """Return the page.

    Parameters
    ----------
    found : Findings
        What is said of a run.
    drawings : iterable of Drawing
        Its figures.

    Returns
    -------
    str
        An HTML document that is complete without any other file and without a network.
    """
    other = found.info["other"]
    sides = [("Model", found.info["model"])]
    if other is not None:
        sides.append(("What it became" if other["side"] == "tuned" else "What it was", other))
    known = {key for key in _OPTIONAL if _any_known(found.run, key)}
    return render(
        "spectra.quantized:page.html",
        style=style_of() + source("spectra.quantized:page.css"),
        script=script_of("spectra.quantized:page.js"),
        payload=Markup(dump(payload(found))),
        data=found,
        model=short(str(found.info["model"]["ref"])),
        schemes=_schemes(found),
        about=found.about,
        figures={d.key: (d, Markup(inline(d))) for d in drawings},
        pooled=[_pooled(one, found.run.ranks) for one in found.pooled],
        ranks=found.run.ranks,
        on_inputs="weighted_db" in known,
        calibration=_calibration(found.info["calibration"]),
        roles=[_role(role, held) for role, held in found.by_role],
        columns=_columns(found),
        lines=[_line(position, row, found) for position, row in enumerate(found.run.records)],
        terms=[term for term in TERMS if term.key not in _OPTIONAL or term.key in known],
        general=GENERAL,
        parquet=PARQUET,
        sides=sides,
    )


def payload(found: Findings) -> dict[str, Any]:
    """Return what the page's script reads: every row's numbers and curves, and how each number reads.

    Parameters
    ----------
    found : Findings
        What is said of a run.
    """
    shapes: dict[tuple[int, int], int] = {}
    schemes = [one.scheme for one in found.pooled]
    rows = [_row(row, found, shapes) for row in found.run.records]
    return {
        "schemes": [visible(scheme) for scheme in schemes],
        "lead": 0 if found.lead is None else schemes.index(found.lead.scheme),
        "ranks": list(found.run.ranks),
        "fractions": _rounded(FRACTIONS, DIGITS),
        "terms": [
            {"key": t.key, "label": t.label, "kind": t.kind} for t in TERMS if t.key in _SHOWN
        ],
        "shares": [{"key": t.key, "label": t.label} for t in TERMS if t.kind == "share"],
        "rows": rows,
        "noise": [
            {"at": _rounded(_middles(shape), DIGITS), "values": _rounded(noise_curve(*shape), CURVE_DIGITS)}
            for shape in shapes
        ],
    }  # fmt: skip


def _schemes(found: Findings) -> str:
    """The schemes for a heading: the first few, the rest counted."""
    names = [visible(one.scheme) for one in found.pooled] or [visible(s) for s in found.info["settings"]["formats"]]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _any_known(run: QuantizedRun, key: str) -> bool:
    stored = {"weighted_db": "weighted_mse", "captured_chance": "captured"}.get(key, key)
    return any(stored in part for row in run.records for part in row.get("schemes", ()))


def _calibration(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return ""
    where = f" of {visible(str(told['file']))}" if told["file"] else ""
    digest = f", SHA-256 {told['sha256']}" if told.get("sha256") else ""
    held = f"{counted(told['inputs'], 'input')}, {counted(told['matrices'], 'matrix', 'matrices')}"
    return f"Second moments{where}: {held}{digest}."


def _pooled(one: Pooled, ranks: Sequence[int]) -> dict[str, Any]:
    return {
        "scheme": visible(one.scheme),
        "bits": f"{one.bits:.3f}",
        "db": _db(one.sqnr_db),
        "gaussian": _db(one.gaussian_db),
        "lloyd_max": _db(one.lloyd_max_db),
        "shannon": _db(one.shannon_db),
        "short": _db(one.short_of_shannon),
        "noise_like": f"{one.noise_like} of {one.matrices}",
        "edge": number(one.raw_edge),
        "shares": [(percent(one.absorbed[rank]), percent(one.noise[rank])) for rank in ranks],
        "weighted": _db(decibels(one.weighted)),
    }


def _role(role: str, held: Sequence[Pooled]) -> dict[str, Any]:
    return {"role": role, "matrices": held[0].matrices, "cells": [_db(one.sqnr_db) for one in held]}


def _columns(found: Findings) -> list[tuple[str, str, str]]:
    fixed = [
        ("name", "Tensor", "name as stored"),
        ("layer", "Layer", "index of the layer"),
        ("shape", "Shape", "sorted by entries"),
        ("status", "Status", "what was done with it"),
    ]
    if found.lead is None:
        return fixed
    kept = [
        (f"db{i}", f"{elide(visible(one.scheme), 14)}, dB", "signal over error")
        for i, one in enumerate(found.pooled[:COLUMNS])
    ]
    lead, rank = elide(visible(found.lead.scheme), 14), found.run.ranks[-1]
    return [
        *fixed,
        *kept,
        ("edge", "σ₁ / edge", f"of {lead}’s error over the edge of noise"),
        ("edge_whitened", "without profile", f"the same of {lead}, rows and columns divided by their sizes"),
        ("absorbed", f"r = {rank}", f"share of {lead}’s error that rank {rank} holds"),
        ("absorbed_noise", "of noise", f"what rank {rank} holds of noise of the shape"),
    ]


def _line(position: int, row: Mapping[str, Any], found: Findings) -> Line:
    cells: tuple[str, ...] = ()
    if found.lead is not None:
        keys = [key for key, _, _ in _columns(found)[4:]]
        numbers = _sorted_by(row, found)
        shares = ("absorbed", "absorbed_noise")
        cells = tuple(
            percent(numbers.get(k)) if k in shares else _db(numbers.get(k, math.nan)) if k.startswith("db") else
            _ratio(numbers.get(k, math.nan)) for k in keys
        )  # fmt: skip
    return line(position, row["name"], row.get("layer"), tuple(row["shape"]), row["status"], cells)


def _sorted_by(row: Mapping[str, Any], found: Findings) -> dict[str, float]:
    """Numbers of the table's columns."""
    parts = {part["scheme"]: part for part in row.get("schemes", ())}
    shown = {
        f"db{i}": decibels(parts[one.scheme]["relative_mse"])
        for i, one in enumerate(found.pooled[:COLUMNS])
        if one.scheme in parts
    }
    assert found.lead is not None  # for the type checker: columns are of runs that have one
    lead = parts.get(found.lead.scheme, {})
    for key in ("edge", "edge_whitened"):
        if key in lead:
            shown[key] = lead[key]
    for key in ("absorbed", "absorbed_noise"):
        if lead.get(key):
            shown[key] = lead[key][-1]
    return shown


def _row(row: Mapping[str, Any], found: Findings, shapes: dict[tuple[int, int], int]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": visible(row["name"]),
        "layer": row.get("layer"),
        "role": visible(row["role"]),
        "shape": list(row["shape"]),
        "dtype": visible(row["dtype"]),
        "status": visible(row["status"]),
        "reason": visible(" ".join(filter(None, (row.get("reason", ""), row.get("update_reason", ""))))),
        "turned": row["turned"],
        "numbers": {},
    }
    if "schemes" in row:
        numbers = {key: finite(value, DIGITS) for key, value in _sorted_by(row, found).items()}
        plain["numbers"] = {key: value for key, value in numbers.items() if value is not None}
        plain["noise"] = shapes.setdefault((row["rows"], row["cols"]), len(shapes))
        plain["heldNoise"] = _rounded(row["schemes"][0]["held_noise"], CURVE_DIGITS)
        plain["schemes"] = [_scheme(part) for part in row["schemes"]]
    return plain


def _scheme(part: Mapping[str, Any]) -> dict[str, Any]:
    derived = {
        "sqnr_db": decibels(part["relative_mse"]),
        "gaussian_db": decibels(part.get("gaussian_mse", math.nan)),
        "shannon_db": 20.0 * math.log10(2.0) * part["bits"],
        "weighted_db": decibels(part.get("weighted_mse", math.nan)),
    }
    numbers = {key: finite({**part, **derived}.get(key), DIGITS) for key in _SHOWN}
    kept: dict[str, Any] = {"numbers": {key: value for key, value in numbers.items() if value is not None}}
    kept["shares"] = {t.key: _rounded(part[t.key], DIGITS) for t in TERMS if t.kind == "share" and t.key in part}
    if "curve" in part:
        edge = part["curve"][0] / part["edge"]
        kept["curve"] = _rounded([value / edge for value in part["curve"]], CURVE_DIGITS)
        kept["held"] = _rounded(part["held"], CURVE_DIGITS)
    return kept


def _middles(shape: tuple[int, int]) -> list[float]:
    count = min(shape)
    return [(place + 0.5) / count for place in kept_places(count)]


def _rounded(values: Iterable[float | None], digits: int) -> list[float | int | None]:
    return [finite(value, digits) for value in values]


def _db(value: float) -> str:
    if math.isnan(value):
        return _MISSING
    return number(value) if math.isinf(value) else f"{value:.1f}".replace("-", "−")


def _ratio(value: float) -> str:
    return _MISSING if math.isnan(value) else f"{value:.2f}"
