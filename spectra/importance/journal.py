"""`ImportanceJournal`: recorded steps on their way to the Parquet file, one fixed-size record a step behind a header.

Parquet cannot be appended to, and is unreadable until it is closed. So steps go to a journal as they come; whatever
ends a training, its whole records can be read, and a resumed training drops those of steps that it takes again. When
training ends the journal becomes the Parquet file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from spectra.errors import MismatchError, UnsafeCheckpoint
from spectra.importance.recorded import NAME, Layout, write_recorded

JOURNAL = ".importance.journal"


class ImportanceJournal:
    """Appends one record a step.

    Parameters
    ----------
    folder : Path
        Where the journal stands, and the Parquet file will; it is there.
    layout : Layout
        What a record holds.
    after : int
        Number of the step that the training goes on from; records of later steps are dropped. 0 begins anew.
    written : int
        Records that must be there up to that step.

    Raises
    ------
    MismatchError
        If the journal is of another training, or lacks records.
    """

    def __init__(self, folder: Path, layout: Layout, *, after: int = 0, written: int = 0) -> None:
        self.layout = layout
        self.path = folder / JOURNAL
        self.written = written
        if after == 0:
            self.path.write_bytes(layout.to_json().encode() + b"\n")
            (folder / NAME).unlink(missing_ok=True)
        else:
            self._take_up(after)
        self._stream: BinaryIO | None = self.path.open("ab")

    def append(self, step: int, clip: float, scores: NDArray[np.float32]) -> None:
        """Write a step; it is on its way to disk when this returns.

        Parameters
        ----------
        step : int
            From 1.
        clip : float
            Factor by which clipping shortened the gradient.
        scores : array of shape (rows, scores)
        """
        assert self._stream is not None  # closed once, at the end
        record = np.zeros(1, dtype=self.layout.dtype)
        record["step"], record["clip"], record["scores"] = step, clip, scores
        self._stream.write(record.tobytes())
        self._stream.flush()
        self.written += 1

    def close(self, *, finished: bool) -> None:
        """Write the Parquet file of all steps so far.

        Parameters
        ----------
        finished : bool
            Whether the training is at its end; the journal is removed then.
        """
        if self._stream is None:
            return
        self._stream.close()
        self._stream = None
        layout, records = read_journal(self.path)
        write_recorded(layout, records, self.path.with_name(NAME))
        if finished:
            self.path.unlink()

    def _take_up(self, after: int) -> None:
        if not self.path.is_file():
            raise MismatchError(
                f"{self.path}: gone, and with it the importance recorded up to step {after}; go on without "
                "--record-importance, or begin anew with --no-resume"
            )
        layout, records = read_journal(self.path)
        if layout.to_json() != self.layout.to_json():
            raise MismatchError(
                f"{self.path}: recorded {_told(layout)}, where this training would record {_told(self.layout)}; go on "
                "with what it was begun with, or begin anew with --no-resume"
            )
        kept = int(np.searchsorted(records["step"], after, side="right"))
        if kept != self.written:
            raise MismatchError(
                f"{self.path}: holds {kept} steps up to step {after}, the checkpoint knows of {self.written}; go on "
                "without --record-importance, or begin anew with --no-resume"
            )
        del records  # the map, before the file changes under it
        os.truncate(self.path, _header(self.path) + kept * layout.dtype.itemsize)


def read_journal(path: Path) -> tuple[Layout, NDArray[Any]]:
    """What a journal holds: its layout, and its whole records as a memory map of shape (steps,).

    Raises
    ------
    UnsafeCheckpoint
        If it is no journal.
    """
    start = _header(path)
    with path.open("rb") as stream:
        layout = Layout.from_json(stream.read(start), source=path)
    count = (path.stat().st_size - start) // layout.dtype.itemsize
    if not count:
        return layout, np.zeros(0, dtype=layout.dtype)
    return layout, np.memmap(path, dtype=layout.dtype, mode="r", offset=start, shape=(count,))


def _header(path: Path) -> int:
    """Length of the first line, its end included."""
    with path.open("rb") as stream:
        line = stream.readline()
    if not line.endswith(b"\n"):
        raise UnsafeCheckpoint(f"{path} is no journal of importance: its first line has no end")
    return len(line)


def _told(layout: Layout) -> str:
    info = layout.info
    return f"{info['method']}, {layout.rows} rows every {info['every']} of {info['total']} steps"
