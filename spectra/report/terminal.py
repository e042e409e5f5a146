"""The report as text for a terminal of 80 columns: inputs, tables by role and layer, flags, verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from spectra.report.build import ReportData
from spectra.report.tables import Group, share_span, span
from spectra.report.text import counted, elide, listed, percent, size, trace, visible, width

COLUMNS = 80
_LEAST_LABEL = 12  # columns kept for the name of a role, however wide the numbers are

Paint = Callable[[str, str], str]


def plain(text: str, role: str) -> str:
    """Leave a text as it is: the painter for files, pipes and ``NO_COLOR``.

    Parameters
    ----------
    text : str
        What is printed.
    role : str
        What it is: ``"title"``, ``"faint"``, ``"alarm"`` or ``"good"``.
    """
    return text


def ansi(text: str, role: str) -> str:
    """Colour a text by its role with the eight colours that every terminal has.

    Parameters
    ----------
    text : str
        What is printed.
    role : str
        ``"title"`` (bold), ``"faint"``, ``"alarm"`` (red) or ``"good"`` (green).
    """
    codes = {"title": "1", "faint": "2", "alarm": "31", "good": "32"}
    return f"\x1b[{codes[role]}m{text}\x1b[0m"


def render(data: ReportData, *, paint: Paint = plain) -> str:
    """Return the report as text.

    Parameters
    ----------
    data : ReportData
        Content of the report.
    paint : callable
        `plain` or `ansi`.

    Returns
    -------
    str
        No line is wider than 80 columns, and no character comes from a checkpoint unescaped.
    """
    blocks = [
        [*_inputs(data)],
        _table("by role", "role", data.by_role, paint),
        _table("by layer", "layer", data.by_layer, paint),
        _flags(data, paint),
        _verdict(data, paint),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _inputs(data: ReportData) -> list[str]:
    lines = [_side(label, data.info.get(label, {}), data) for label in ("base", "tuned")]
    matching = data.info.get("matching", {})
    if matching:
        share = percent(matching["share"])
        lines.append(f"matched {matching['matched']} of {counted(matching['total'], 'tensor')} ({share})")
        for sentence in matching.get("transforms", ()):
            lines += _wrapped(visible(str(sentence)), "        ")
    statuses = ", ".join(f"{count} {visible(status)}" for status, count in data.statuses.items())
    return [*lines, *_wrapped(f"rows    {statuses}", "        ", first="")]


def _side(label: str, side: dict[str, Any], data: ReportData) -> str:
    facts = []
    if side.get("tensors") is not None:
        facts.append(counted(side["tensors"], "tensor"))
    if side.get("bytes"):
        facts.append(size(side["bytes"]))
    dtypes = sorted({getattr(row, f"dtype_{label}") for row in data.rows} - {""})
    if dtypes:
        facts.append(listed(dtypes))
    told = f"  ({', '.join(facts)})" if facts else ""
    ref = visible(str(side.get("ref", label)))
    return f"{label:<8}{elide(ref, max(COLUMNS - 8 - width(told), 20))}{told}"


def _table(title: str, label: str, groups: Sequence[Group], paint: Paint) -> list[str]:
    """Return an aligned table; a label too wide for its column stands on a line of its own."""
    if not groups:
        return []
    heads = [
        ("", "", "‖Δ‖", "entropy", "above", "", "90 %", "error", "round-"),
        (label, "n", "/ ‖W‖", "rank", "floor", "of", "takes", "r = 16", "ing"),
    ]
    lines = [*heads, *(_cells(group) for group in groups)]
    widths = [max(width(line[i]) for line in lines) for i in range(len(heads[0]))]
    widths[0] = min(widths[0], max(COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1), _LEAST_LABEL))
    text = [paint(title, "title"), *(paint(_line(head, widths), "faint") for head in heads)]
    for group, line in zip(groups, lines[2:], strict=True):
        shown = [_line(line, widths)]
        if width(line[0]) > widths[0]:
            shown = [elide(line[0], COLUMNS), _line(("", *line[1:]), widths)]
        text += [paint(part, "alarm") for part in shown] if group.mostly_rounding else shown
    return text


def _cells(group: Group) -> tuple[str, ...]:
    return (
        visible(group.label),
        str(group.matrices),
        percent(group.relative),
        span(group.entropy_rank),
        span(group.signal_rank),
        span(group.limit),
        span(group.rank_90),
        share_span(group.error_r16),
        trace(group.rounding),
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0] + " " * (widths[0] - width(cells[0]))]
    padded += [" " * (w - width(cell)) + cell for cell, w in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join(padded).rstrip()


def _flags(data: ReportData, paint: Paint) -> list[str]:
    lines = []
    for flag in data.flags:
        mark = "!" if flag.level == "alarm" else "·"
        wrapped = _wrapped(flag.text, "  ", first=f"{mark} ")
        lines += [paint(line, "alarm") for line in wrapped] if flag.level == "alarm" else wrapped
    return lines


def _verdict(data: ReportData, paint: Paint) -> list[str]:
    lines = [paint("verdict", "title")]
    for number, sentence in enumerate(data.verdict, 1):
        lines += _wrapped(sentence, "   ", first=f"{number}. ")
    return lines


def _wrapped(text: str, indent: str, *, first: str | None = None) -> list[str]:
    start = indent if first is None else first
    return textwrap.wrap(
        text, COLUMNS, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False, break_long_words=True
    )
