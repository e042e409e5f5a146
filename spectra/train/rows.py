"""Rows of a table of texts, (label, text), from CSV, TSV and JSON lines, plain or compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from spectra.errors import UsageError

TEXT_COLUMNS = ("text", "sentence", "review", "content", "document", "body")
LABEL_COLUMNS = ("label", "labels", "category", "class", "sentiment", "target")

_OPENERS: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson")

# Python's own limit for a field of a CSV is 131 072 characters, less than a chapter.
_FIELD_LIMIT = 100_000_000


@dataclass(frozen=True)
class Row:
    """One labelled text, and where it stands: ``file:line``."""

    label: str
    text: str
    place: str


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table that `read_rows` reads.

    Examples
    --------
    >>> [is_table(Path(name)) for name in ("a.csv", "a.tsv.gz", "a.jsonl", "a.txt")]
    [True, True, True, False]
    """
    return _format(path) in _FORMATS


def read_rows(path: Path, *, text_column: str | None = None, label_column: str | None = None) -> list[Row]:
    """Every row of a table of labelled texts.

    Parameters
    ----------
    path : Path
        ``.csv``, ``.tsv`` (no quoting), ``.jsonl`` or ``.ndjson``; ``.gz``, ``.bz2`` and ``.xz`` are unpacked on
        the way. The first line of a CSV or TSV names its columns.
    text_column, label_column : str, optional
        Columns to read; found by their usual names when not given (`TEXT_COLUMNS`, `LABEL_COLUMNS`).

    Returns
    -------
    list of Row

    Raises
    ------
    UsageError
        If the file is empty, malformed or not UTF-8, or has no such column.
    """
    suffix = _format(path)
    if suffix not in _FORMATS:
        raise UsageError(f"{path}: not a table of texts; there are readers for {', '.join(_FORMATS)}, .gz, .bz2, .xz")
    try:
        with _opened(path) as lines:
            records = _json_lines(lines, path) if suffix in (".jsonl", ".ndjson") else _delimited(lines, path, suffix)
            return list(_rows(records, path, text_column, label_column))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def pick_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], *, what: str, source: str) -> str:
    """Return the column to read: the wanted one, or the first with a usual name, capitals aside.

    Parameters
    ----------
    columns : sequence of str
        What there is.
    wanted : str or None
        What was asked for.
    usual : sequence of str
        Names to look for otherwise.
    what, source : str
        For messages: ``"text"`` or ``"label"``, and the file or data set.

    Raises
    ------
    UsageError
        If there is none.

    Examples
    --------
    >>> pick_column(["id", "Text"], None, TEXT_COLUMNS, what="text", source="a.csv")
    'Text'
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise UsageError(f"{source}: no column {wanted!r}; its columns are {_listed(columns)}")
    folded = {name.strip().lower(): name for name in reversed(columns)}
    for name in usual:
        if name in folded:
            return folded[name]
    raise UsageError(
        f"{source}: no {what} column; its columns are {_listed(columns)}: name the one to read with "
        f"--{what}-column (looked for {_listed(usual)})"
    )


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name[:40]) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    opener = _OPENERS.get(path.suffix.lower(), open)
    before = csv.field_size_limit(_FIELD_LIMIT)
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            yield stream
    finally:
        csv.field_size_limit(before)


def _delimited(lines: TextIO, path: Path, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a CSV (quoted as RFC 4180 says) or a TSV (not quoted), by the line they end on."""
    tabs = suffix == ".tsv"
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise UsageError(f"{path}: the file is empty; its first line must name the columns")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise UsageError(
                    f"{path}:{reader.line_num}: {len(fields)} fields under {len(header)} columns ({_listed(header)})"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: malformed: {error}") from error


def _json_lines(lines: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UsageError(f"{path}:{number}: not a JSON object: each line must read {{'text': …, 'label': …}}")
        yield number, record


def _rows(
    records: Iterable[tuple[int, dict[str, Any]]], path: Path, text_column: str | None, label_column: str | None
) -> Iterator[Row]:
    text = label = None
    for number, record in records:
        place = f"{path}:{number}"
        if text is None or label is None:
            text = pick_column(list(record), text_column, TEXT_COLUMNS, what="text", source=str(path))
            label = pick_column(list(record), label_column, LABEL_COLUMNS, what="label", source=str(path))
        yield Row(_label(record.get(label), label, place), _text(record.get(text), text, place), place)
    if text is None:
        raise UsageError(f"{path}: the file is empty: it holds no row of text")


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{place}: {column!r} holds {_kind(value)}, not a text")
    return value.strip()


def _label(value: Any, column: str, place: str) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, (bool, int)):
        return str(value)
    raise UsageError(f"{place}: {column!r} holds {_kind(value)}, not a label")


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == "" else type(value).__name__
