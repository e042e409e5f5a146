"""`MetricsFile`: a run's steps as JSON lines, one a step, that a resumed run takes up where its checkpoint stands."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends one line a step; every line is on its way to disk before the next step begins.

    Parameters
    ----------
    path : Path or None
        The file; its folder is there. None writes nothing.
    after : int
        Number of the step that the run goes on from. Lines of later steps, which it will take again, and a line that
        was cut short are dropped.
    """

    def __init__(self, path: Path | None, *, after: int = 0) -> None:
        self._stream: TextIO | None = None
        if path is None:
            return
        kept = [line for line in _lines(path) if 0 < _step(line) <= after]
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        self._stream = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, numbers that JSON does not know as null.

        Parameters
        ----------
        record : mapping
            With ``step``.
        """
        if self._stream is not None:
            self._stream.write(json.dumps(_plain(record), allow_nan=False) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _step(line: str) -> int:
    """Number of a line's step; 0 for a line that was cut short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return 0
    return step if isinstance(step, int) else 0


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
