"""The report on two or more updates as one HTML file, of the same make as the report on one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from spectra.pairwise.pooled import KINDS, PooledPair
from spectra.pairwise.ranks import EPSILON, RANKS, TOP
from spectra.pairwise.rows import EPSILONS, SIDES, MatrixRow, PairRow, UpdateRow
from spectra.report.drawing import Drawing, inline
from spectra.report.html import Line, line, render, script_of, short, style_of
from spectra.report.pairs.build import PairsData, pair_numbers
from spectra.report.pairs.figures import PAIRS
from spectra.report.pairs.glossary import GENERAL, TERMS, UPDATE_TERMS
from spectra.report.pairs.verdict import deviations, name
from spectra.report.text import dump, elide, finite, number, percent, visible

DIGITS = 4  # significant digits of a number in the page's data
SHARES = 3  # of a captured share
HEAD = 13  # columns of an update's name above a column
# Keys of the columns after the status that depend on the pair; their heads name the two updates.
KEYS = ("cosine", "deviations", "shared_left", "shared_right", "captured_ab", "captured_ba", "resolved")
_KIND = {term.key: term.kind for term in TERMS}


def render_page(data: PairsData, drawings: Iterable[Drawing]) -> str:
    """Return the page.

    Parameters
    ----------
    data : PairsData
        Content of the report.
    drawings : iterable of Drawing
        Its figures; the maps are not repeated, since the page draws them itself.

    Returns
    -------
    str
        An HTML document that is complete without any other file and without a network.
    """
    held = {d.key: (d, Markup(inline(d))) for d in drawings if d.key.partition("-")[0] in _DRAWN}
    names = [name(label) for label in data.labels]
    first = data.pairs[0] if data.pairs else None
    return render(
        "pairs/page.html",
        style=style_of("pairs/page.css"),
        script=script_of("pairs/page.js"),
        payload=Markup(dump(payload(data))),
        data=data,
        about=data.about,
        names=names,
        heads=[elide(label, HEAD) for label in names],
        base=short(data.base),
        drawn=held,
        shown=data.pairs[:PAIRS],
        matrices=_matrices(data, names) if len(data.labels) > 2 else (),
        columns=_columns(data, first),
        lines=[_line(row, first) for row in data.rows],
        terms=(*TERMS, *UPDATE_TERMS),
        general=GENERAL,
        parquet="geometry.parquet",
        deviations=deviations,
        sides=[("Base", data.info.get("base", {})), *zip(names, data.info.get("updates", ()), strict=True)],
    )


_DRAWN = ("captured_curve", "overlap", "intruders", "spectra")


def payload(data: PairsData) -> dict[str, Any]:
    """Return what the page's script reads: every row's tables, curves and numbers, and how each number reads.

    Parameters
    ----------
    data : PairsData
        Content of the report.
    """
    chances: dict[tuple[int, int, int], int] = {}  # by base vectors, their length, and how many were matched
    rows = [_row(row, data.pairs, chances) for row in data.rows]
    return {
        "labels": [name(label) for label in data.labels],
        "pairs": [
            {"key": key_of(pair), "a": pair.a, "b": pair.b, "rank": pair.rank, "heads": _heads(data, pair)}
            | {"named": _named(data, pair)}
            for pair in data.pairs
        ],
        "ranks": list(RANKS),
        "epsilons": list(EPSILONS),
        "top": TOP,
        "columns": [{"key": key, "kind": _KIND[key]} for key in KEYS],
        "terms": [{"key": t.key, "label": t.label, "kind": t.kind, "reading": t.reading} for t in TERMS],
        "updateTerms": [{"key": t.key, "label": t.label, "kind": t.kind} for t in UPDATE_TERMS],
        "rows": rows,
        "chances": [_chance(key, data.rows) for key in chances],
    }


def key_of(pair: PooledPair) -> str:
    """Return how a pair is called in the page's data and ids.

    Parameters
    ----------
    pair : PooledPair
        Two updates.
    """
    return f"{pair.a}-{pair.b}"


def _row(row: MatrixRow, pairs: Sequence[PooledPair], chances: dict[tuple[int, int, int], int]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": visible(row.name),
        "layer": row.layer,
        "role": visible(row.role),
        "shape": list(row.shape),
        "dtype": visible(row.dtype_base),
        "status": visible(row.status),
        "reason": visible(row.reason),
    }
    if any(update.changes for update in row.updates):
        plain["updates"] = [_update(update) if update.changes else None for update in row.updates]
        if row.basis and len(row.shape) == 2:
            plain["chance"] = chances.setdefault((row.basis, row.shape[0], row.leading), len(chances))
    if row.analysed:
        held = [pair for pair in pairs if (pair.a, pair.b) in row.pairs]
        plain["pairs"] = {key_of(pair): _pair(row, pair) for pair in held}
    return plain


def _update(update: UpdateRow) -> dict[str, Any]:
    at = [i for i, rank in enumerate(RANKS) if rank <= update.held]
    last = at[-1] if at else 0
    numbers = {
        "relative": update.relative,
        "frobenius": update.frobenius,
        "spectral_norm": update.spectral_norm,
        "storage_floor": update.storage_floor,
        "resolved_count": float(update.resolved),
        "resolved_nf4": float(update.resolved_nf4),
        "intruder_count": update.intruders(EPSILON),
        "intruder_resolved": float(sum(update.clear)) if update.cosines else math.nan,
        "amplification": update.amplification[last] if update.amplification else math.nan,
    }
    return {
        "kind": visible(update.kind),
        "dtype": visible(update.dtype),
        "limit": update.rank_limit,
        "held": update.held,
        "resolved": update.resolved,
        "numbers": _known(numbers),
        "values": _rounded(update.values),
        "sines": _rounded([update.sines[RANKS[i] - 1] for i in at if RANKS[i] <= len(update.sines)], SHARES),
        "optimum": _rounded([update.optimum_at(rank) for rank in RANKS], SHARES),
        "amplification": _rounded([update.amplification[i] for i in at], SHARES),
        "random": _rounded([update.amplification_random[i] for i in at], SHARES),
        "cosines": _rounded(update.cosines),
        "clear": list(update.clear),
    }


def _pair(row: MatrixRow, pair: PooledPair) -> dict[str, Any]:
    held: PairRow = row.pairs[pair.a, pair.b]
    plain: dict[str, Any] = {
        "numbers": _known(shown_numbers(row, pair)),
        "angleRanks": list(held.angle_ranks),
        "capture": {way: {kind: _rounded(held.captured[way][kind], SHARES) for kind in KINDS} for way in held.captured},
    }
    for side in SIDES:
        sided = getattr(held, side)
        plain[side] = {
            "overlap": _trimmed(sided.overlap),
            "angles": [finite(math.degrees(angle), DIGITS) for angle in sided.angles],
        }
    return plain


def shown_numbers(row: MatrixRow, pair: PooledPair) -> dict[str, float]:
    """Return `pair_numbers` as the page prints them: shares above chance in whole per cent, since chance itself varies.

    Parameters
    ----------
    row : MatrixRow
        An analysed matrix that both updates change.
    pair : PooledPair
        The two updates.
    """
    found = pair_numbers(row, pair)
    return found | {key: round(value, 2) + 0.0 for key, value in found.items() if key.startswith("shared_")}


def _trimmed(table: Any) -> list[list[float | None]]:
    """A table of overlaps without the rows and columns of ranks that are not held, in thousandths."""
    kept = [line for line in table.tolist() if any(math.isfinite(v) for v in line)]
    return [[round(1000 * v) for v in line if math.isfinite(v)] for line in kept]


def _chance(key: tuple[int, int, int], rows: Sequence[MatrixRow]) -> list[float | int | None]:
    row = next(r for r in rows if len(r.shape) == 2 and (r.basis, r.shape[0], r.leading) == key)
    return _rounded([row.chance_intruders(epsilon) for epsilon in EPSILONS], SHARES)


def _known(numbers: dict[str, float]) -> dict[str, Any]:
    found = {key: finite(value, DIGITS) for key, value in numbers.items()}
    return {key: value for key, value in found.items() if value is not None}


def _rounded(values: Iterable[float], digits: int = DIGITS) -> list[float | int | None]:
    return [finite(v, digits) for v in values]


def _columns(data: PairsData, pair: PooledPair | None) -> list[tuple[str, str, str]]:
    fixed = [
        ("name", "Tensor", "canonical name"),
        ("layer", "Layer", "index of the layer"),
        ("shape", "Shape", "sorted by entries"),
        ("status", "Status", "what was done with it"),
    ]
    if pair is None:
        return fixed
    hints = {term.key: term.label for term in TERMS}
    return fixed + [(key, head, hints[key]) for key, head in zip(KEYS, _heads(data, pair), strict=True)]


def _heads(data: PairsData, pair: PooledPair) -> list[str]:
    a, b = (elide(name(data.labels[i]), HEAD) for i in (pair.a, pair.b))
    shared = f"Shared of {pair.rank}" if pair.rank else "Shared"
    return ["Cosine", "in sd", f"{shared}, out", f"{shared}, in", f"{a} in {b}", f"{b} in {a}", "Resolved"]


def _named(data: PairsData, pair: PooledPair) -> dict[str, str]:
    """Labels that say A and B in the glossary, with the names of the two updates in their place."""
    a, b = (name(data.labels[i]) for i in (pair.a, pair.b))
    return {"norm_ratio": f"norm of {b} over {a}", "captured_ab": f"{a} held by {b}", "captured_ba": f"{b} held by {a}"}


def _line(row: MatrixRow, pair: PooledPair | None) -> Line:
    cells = [""] * (len(KEYS) if pair else 0)
    if pair and row.analysed and (pair.a, pair.b) in row.pairs:
        found = shown_numbers(row, pair)
        # From the digits that the script has, so that it writes the same text when it turns to another pair and back.
        kept = {key: finite(value, DIGITS) for key, value in found.items()}
        cells = [_text(kept.get(key), _KIND[key]) for key in KEYS]
    return line(row.position, row.name, row.layer, row.shape, row.status, tuple(cells))


def _text(value: float | None, kind: str) -> str:
    if value is None or kind == "share":
        return percent(value)
    return number(float(round(value)) if 100 <= abs(value) < 1e5 else value)


def _matrices(data: PairsData, names: Sequence[str]) -> list[dict[str, Any]]:
    """What every two of more than two updates have in common, as square tables whose cells choose the pair."""
    held = {(p.a, p.b): p for p in data.pairs}

    def table(title: str, caption: str, value: Any, text: Any) -> dict[str, Any]:
        lines = []
        for i in range(len(names)):
            cells: list[dict[str, Any] | None] = []
            for j in range(len(names)):
                pair = held.get((min(i, j), max(i, j)))
                known = value(pair, i, j) if pair else math.nan
                shown = {"key": key_of(pair), "value": known, "text": text(known)} if pair else None
                cells.append(shown if i != j and math.isfinite(known) else None)
            lines.append(cells)
        return {"title": title, "caption": caption, "lines": lines}

    return [
        table(
            "Cosine",
            "Of the two updates, each as one long vector.",
            lambda pair, i, j: pair.cosine,
            lambda v: f"{v:.2f}",
        ),
        table(
            "Shared directions",
            "Above chance, in per cent of the leading directions; output and input side averaged.",
            lambda pair, i, j: max(pair.agreement, 0.0),
            _hundred,
        ),
        table(
            "Captured",
            "Per cent of the row’s squared norm that the column’s leading directions hold.",
            lambda pair, i, j: pair.captured["a_in_b" if i < j else "b_in_a"].share,
            _hundred,
        ),
    ]


def _hundred(share: float) -> str:
    return f"{100 * share:.0f}"
