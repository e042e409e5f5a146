"""What quantizing a model lost, as text for a terminal of 80 columns: totals, low rank, roles, flags, verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spectra.quantized.build import Findings
from spectra.quantized.pooled import Pooled, decibels
from spectra.report.terminal import COLUMNS, Paint, aligned, flag_lines, plain, side_line, verdict_lines, wrapped
from spectra.report.text import elide, number, percent, visible, width

_NAME = 18  # columns of a scheme's name
_ROLE = 30  # columns of a role's


def render(found: Findings, *, paint: Paint = plain) -> str:
    """Return what was found as text.

    Parameters
    ----------
    found : Findings
    paint : callable
        `spectra.report.terminal.plain` or ``ansi``.

    Returns
    -------
    str
        No line is wider than 80 columns, and no character comes from a checkpoint unescaped.
    """
    blocks = [
        _inputs(found),
        _totals(found, paint),
        _low_rank(found, paint),
        _roles(found, paint),
        flag_lines(found.flags, paint),
        verdict_lines(found.verdict, paint),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _inputs(found: Findings) -> list[str]:
    info = found.info
    dtypes = sorted({row["dtype"] for row in found.run.records})
    lines = [side_line("model", info["model"], dtypes)]
    if info["other"] is not None:
        lines.append(side_line(info["other"]["side"], info["other"], ()))
    if info["calibration"] is not None:
        told = f"moments {info['calibration']['file'] or ''} of {info['calibration']['inputs']} inputs"
        lines += wrapped(visible(told), "        ", first="")
    statuses = ", ".join(f"{count} {visible(status)}" for status, count in found.statuses.items())
    return [*lines, *wrapped(f"rows    {statuses}", "        ", first="")]


def _totals(found: Findings, paint: Paint) -> list[str]:
    if not found.pooled:
        return []
    on_inputs = any(math.isfinite(one.weighted) for one in found.pooled)
    heads: list[tuple[str, ...]] = [
        ("", "bits a", "signal /", "Gaussian", "Lloyd–", "", "short", *(["on"] if on_inputs else [])),
        ("scheme", "weight", "error, dB", "weights", "Max", "bound", "of it", *(["inputs"] if on_inputs else [])),
    ]
    rows = [
        (
            _name(one, _NAME),
            f"{one.bits:.3f}",
            _db(one.sqnr_db),
            _db(one.gaussian_db),
            _db(one.lloyd_max_db),
            _db(one.shannon_db),
            _db(one.short_of_shannon),
            *([_db(decibels(one.weighted))] if on_inputs else []),
        )
        for one in found.pooled
    ]
    return aligned("all matrices together", heads, rows, paint)


def _low_rank(found: Findings, paint: Paint) -> list[str]:
    ranks = found.run.ranks[-3:]
    held = [one for one in found.pooled if any(math.isfinite(one.absorbed[rank]) for rank in ranks)]
    if not held:
        return []
    heads = [
        ("", "like", "σ₁ /", *(part for rank in ranks for part in (f"r = {rank}", "of"))),
        ("scheme", "noise", "edge", *(part for _ in ranks for part in ("holds", "noise"))),
    ]
    rows = [
        (
            _name(one, _NAME),
            f"{one.noise_like}/{one.matrices}",
            number(one.raw_edge),
            *(percent(share) for rank in ranks for share in (one.absorbed[rank], one.noise[rank])),
        )
        for one in held
    ]
    return aligned("low rank in the error", heads, rows, paint)


def _roles(found: Findings, paint: Paint) -> list[str]:
    if len(found.by_role) < 2:
        return []
    shown = _fitting(found.pooled)
    rows = [
        (elide(visible(role), _ROLE), str(held[0].matrices), *(_db(one.sqnr_db) for one in held if one.scheme in shown))
        for role, held in found.by_role
    ]
    return aligned("signal over error by role, dB", [("role", "n", *map(visible, shown))], rows, paint)


def _fitting(pooled: Sequence[Pooled]) -> list[str]:
    """As many schemes as have room beside a role's name."""
    shown, room = [], COLUMNS - _ROLE - 8
    for one in pooled:
        room -= max(width(visible(one.scheme)), 5) + 2
        if room < 0:
            break
        shown.append(one.scheme)
    return shown


def _name(one: Pooled, columns: int) -> str:
    return elide(visible(one.scheme), columns)


def _db(value: float) -> str:
    return "–" if math.isnan(value) else number(value) if math.isinf(value) else f"{value:.1f}".replace("-", "−")
