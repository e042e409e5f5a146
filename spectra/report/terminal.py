"""The report as text for a terminal of 80 columns: inputs, tables by role and layer, flags, verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spectra.report.build import ReportData
from spectra.report.flags import Flag
from spectra.report.tables import Group, share_span, span
from spectra.report.text import counted, elide, listed, percent, size, take, trace, visible, width

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
        _directions(data, paint),
        flag_lines(data.flags, paint),
        verdict_lines(data.verdict, paint),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _inputs(data: ReportData) -> list[str]:
    lines = []
    for label in ("base", "tuned"):
        dtypes = sorted({getattr(row, f"dtype_{label}") for row in data.rows} - {""})
        lines.append(side_line(label, data.info.get(label, {}), dtypes))
    matching = data.info.get("matching", {})
    if matching:
        share = percent(matching["share"])
        lines.append(f"matched {matching['matched']} of {counted(matching['total'], 'tensor')} ({share})")
        for sentence in matching.get("transforms", ()):
            lines += wrapped(visible(str(sentence)), "        ")
    statuses = ", ".join(f"{count} {visible(status)}" for status, count in data.statuses.items())
    return [*lines, *wrapped(f"rows    {statuses}", "        ", first="")]


def side_line(label: str, side: Mapping[str, Any], dtypes: Sequence[str]) -> str:
    """Return one input in a line: how it was given, what it holds.

    Parameters
    ----------
    label : str
        What it is called here.
    side : mapping
        Its part of ``info``.
    dtypes : sequence of str
        Stored element types.
    """
    facts = []
    if side.get("tensors") is not None:
        facts.append(counted(side["tensors"], "tensor"))
    if side.get("bytes"):
        facts.append(size(side["bytes"]))
    if dtypes:
        facts.append(listed(dtypes))
    told = f"  ({', '.join(facts)})" if facts else ""
    ref = visible(str(side.get("ref", label)))
    head = label + " " * max(8 - width(label), 1)
    return f"{head}{elide(ref, max(COLUMNS - width(head) - width(told), 20))}{told}"


def _table(title: str, label: str, groups: Sequence[Group], paint: Paint) -> list[str]:
    if not groups:
        return []
    heads = [
        ("", "", "‖Δ‖", "entropy", "above", "", "90 %", "error", "round-"),
        (label, "n", "/ ‖W‖", "rank", "floor", "of", "takes", "r = 16", "ing"),
    ]
    return aligned(title, heads, [_cells(g) for g in groups], paint, [bool(g.mostly_rounding) for g in groups])


def aligned(
    title: str,
    heads: Sequence[tuple[str, ...]],
    rows: Sequence[tuple[str, ...]],
    paint: Paint,
    alarms: Sequence[bool] = (),
) -> list[str]:
    """Return the lines of a table; a label too wide for its column stands on a line of its own.

    Parameters
    ----------
    title : str
        Stands above it.
    heads, rows : sequence of tuple of str
        Cells, the label first.
    paint : callable
        `plain` or `ansi`.
    alarms : sequence of bool
        Rows to be painted as an alarm; none where empty.
    """
    lines = [*heads, *rows]
    widths = [max(width(line[i]) for line in lines) for i in range(len(heads[0]))]
    widths[0] = min(widths[0], max(COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1), _LEAST_LABEL))
    text = [paint(title, "title"), *(paint(_line(head, widths), "faint") for head in heads)]
    for line, alarm in zip(rows, alarms or [False] * len(rows), strict=True):
        shown = [_line(line, widths)]
        if width(line[0]) > widths[0]:
            shown = [elide(line[0], COLUMNS), _line(("", *line[1:]), widths)]
        text += [paint(part, "alarm") for part in shown] if alarm else shown
    return text


def _directions(data: ReportData, paint: Paint) -> list[str]:
    if data.directions is None:
        return []
    said = [line for sentence in data.directions.said for line in wrapped(sentence, "  ", first="")]
    return [paint("how many directions", "title"), *said]


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


def flag_lines(flags: Sequence[Flag], paint: Paint) -> list[str]:
    """Return the flags, each marked by its level.

    Parameters
    ----------
    flags : sequence of Flag
        Alarms first.
    paint : callable
        `plain` or `ansi`.
    """
    lines = []
    for flag in flags:
        mark = "!" if flag.level == "alarm" else "·"
        text = wrapped(flag.text, "  ", first=f"{mark} ")
        lines += [paint(line, "alarm") for line in text] if flag.level == "alarm" else text
    return lines


def verdict_lines(verdict: Sequence[str], paint: Paint) -> list[str]:
    """Return the verdict's sentences, numbered.

    Parameters
    ----------
    verdict : sequence of str
        The sentences.
    paint : callable
        `plain` or `ansi`.
    """
    lines = [paint("verdict", "title")]
    for number, sentence in enumerate(verdict, 1):
        lines += wrapped(sentence, "   ", first=f"{number}. ")
    return lines


def wrapped(text: str, indent: str, *, first: str | None = None) -> list[str]:
    """Return a text in lines of 80 columns.

    Parameters
    ----------
    text : str
        One paragraph.
    indent : str
        Before each line.
    first : str, optional
        Before the first one, where that differs.
    """
    lines, line = [], indent if first is None else first
    started = False
    for word in text.split(" "):  # a hard space holds a number and its sign together
        if started and width(line) + 1 + width(word) > COLUMNS:
            lines.append(line)
            line, started = indent, False
        while width(line) + width(word) > COLUMNS:
            part = take(word, COLUMNS - width(line))
            lines.append(line + part)
            line, word = indent, word[len(part) :]
        line += f" {word}" if started else word
        started = True
    return [*lines, line]
