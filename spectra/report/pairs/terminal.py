"""The report on two or more updates as text for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from spectra.pairwise.pooled import PooledPair, PooledUpdate
from spectra.pairwise.ranks import EPSILON, TOP
from spectra.pairwise.rows import EPSILONS
from spectra.report.pairs.build import PairsData
from spectra.report.pairs.verdict import cosine_text, name
from spectra.report.terminal import Paint, aligned, flag_lines, plain, side_line, verdict_lines, wrapped
from spectra.report.text import counted, elide, number, percent, significant, visible, whole_percent

LABEL = 24  # columns of an update's name at the head of a block


def render(data: PairsData, *, paint: Paint = plain) -> str:
    """Return the report as text.

    Parameters
    ----------
    data : PairsData
        Content of the report.
    paint : callable
        `plain` or `ansi`.

    Returns
    -------
    str
        No line is wider than 80 columns, and no character comes from a checkpoint unescaped.
    """
    blocks = [
        _inputs(data),
        _updates(data.updates, paint),
        _pairs(data, paint) if len(data.pairs) > 1 else [],
        _by_role(data, data.pairs[0], paint) if len(data.pairs) == 1 else [],
        flag_lines(data.flags, paint),
        verdict_lines(data.verdict, paint),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _inputs(data: PairsData) -> list[str]:
    dtypes = sorted({row.dtype_base for row in data.rows} - {""})
    lines = [side_line("base", data.info.get("base", {}), dtypes)]
    for i, (label, side) in enumerate(zip(data.labels, data.info.get("updates", ()), strict=True)):
        held = sorted({row.updates[i].dtype for row in data.rows if row.updates} - {""})
        shown = elide(name(label), LABEL)
        lines.append(side_line(shown, side, held))
        matching = side.get("matching")
        if matching:
            lines += wrapped(f"matched {matching['matched']} of {counted(matching['total'], 'tensor')}", "        ")
    statuses = ", ".join(f"{count} {visible(status)}" for status, count in data.statuses.items())
    return [*lines, *wrapped(f"rows    {statuses}", "        ", first="")]


def _updates(updates: Sequence[PooledUpdate], paint: Paint) -> list[str]:
    heads = [
        ("", "", "‖Δ‖", "", "resolved", "in 4", "intruders", "resolved"),
        ("update", "n", "/ ‖W‖", "rank", "(median)", "bits", f"of {TOP}", f"of the {TOP}"),
    ]
    place = EPSILONS.index(EPSILON)
    rows = [
        (
            name(u.label),
            str(u.matrices),
            percent(u.relative),
            _limits(u.limits),
            number(u.resolved),
            number(u.resolved_nf4),
            significant(u.intruders[place], 2) if u.intruders else "–",
            significant(u.clear / u.matched, 2) if u.matched else "–",
        )
        for u in updates
    ]
    return aligned("updates", heads, rows, paint)


def _pairs(data: PairsData, paint: Paint) -> list[str]:
    heads = [
        ("", "", "", "shared", "shared", "first in", "second in"),
        ("pair", "cosine", "in sd", "out", "in", "second", "first"),
    ]
    rows = [
        (f"{name(data.labels[p.a])} · {name(data.labels[p.b])}", *_numbers(p)) for p in data.pairs
    ]  # fmt: skip
    return aligned("pairs", heads, rows, paint)


def _by_role(data: PairsData, pair: PooledPair, paint: Paint) -> list[str]:
    first, second = (elide(name(data.labels[i]), LABEL) for i in (pair.a, pair.b))
    heads = [
        ("", "", "", "", "shared", "", "1st in", "2nd in", "re-"),
        ("role", "n", "cosine", "in sd", "out", "in", "2nd", "1st", "solved"),
    ]
    lines = data.by_role[pair.a, pair.b]
    rows = [(visible(role), str(p.matrices), *_numbers(p), str(p.resolved_matrices)) for role, p in lines]
    alarms = [p.resolved_matrices < p.counted for _, p in lines]
    return aligned(f"{first} and {second}, by role", heads, rows, paint, alarms)


def _numbers(pair: PooledPair) -> tuple[str, ...]:
    count = pair.deviations
    return (
        cosine_text(pair.cosine),
        number(float(round(count)) if abs(count) >= 10 else count, 2),
        whole_percent(pair.shared_above("left")),
        whole_percent(pair.shared_above("right")),
        percent(pair.captured["a_in_b"].share),
        percent(pair.captured["b_in_a"].share),
    )


def _limits(limits: tuple[int, int]) -> str:
    return str(limits[0]) if limits[0] == limits[1] else f"{limits[0]}–{limits[1]}"
