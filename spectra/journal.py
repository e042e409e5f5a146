"""The journal of a run: finished rows in SQLite, so that an interrupted run resumes and no matrix is measured twice.

SQLite's write-ahead log makes every row atomic: a killed process leaves a whole journal. A lock file says who is
writing; the operating system frees it when its owner dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np

from spectra.errors import JournalBusy, JournalError, JournalMismatch
from spectra.record import Record

_ARRAYS = ("singular_values", "singular_values_high")


class Journal:
    """Rows of one run in ``DIR/journal.sqlite``, owned by one process at a time.

    Parameters
    ----------
    folder : path
        Output folder; made if need be. A symbolic link is refused.
    fingerprint : mapping
        What the rows depend on (inputs, flags, versions), JSON-able. A journal with another one is refused.
    resume : bool
        Keep rows that are there already; otherwise begin anew.

    Raises
    ------
    JournalBusy
        If another process owns the folder.
    JournalMismatch
        If the journal was begun with other inputs or flags; the message names them.
    JournalError
        If the folder or the file cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any], *, resume: bool = True) -> None:
        self.folder = Path(folder)
        if self.folder.is_symlink():
            raise JournalError(f"{self.folder} is a symbolic link; give the folder it points to")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"{self.folder}: the output folder cannot be made: {error.strerror}") from error
        self.path = self.folder / "journal.sqlite"
        self._guard = threading.Lock()
        self._lock = filelock.FileLock(self.folder / ".lock")
        self._own()
        try:
            self._open(fingerprint, resume)
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise JournalError(f"{self.path} is not a journal of this program ({error}); use another --out") from error
        except BaseException:
            self._lock.release()
            raise

    def _own(self) -> None:
        owner = self.folder / ".owner"
        try:
            self._lock.acquire(timeout=0)
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except filelock.Timeout as error:
            with contextlib.suppress(OSError):
                raise JournalBusy(
                    f"{self.folder} is in use by {owner.read_text()}; wait for it, stop it, or give another --out"
                ) from error
            raise JournalBusy(f"{self.folder} is in use by another run; give another --out") from error
        except OSError as error:
            raise JournalError(f"{self.folder} cannot be written: {error.strerror}") from error

    def _open(self, fingerprint: Mapping[str, Any], resume: bool) -> None:
        if not resume:
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        if self.path.is_symlink():
            raise JournalError(f"{self.path} is a symbolic link; remove it or give another --out")
        self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) STRICT")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS rows"
            " (name TEXT PRIMARY KEY, row TEXT, singular_values BLOB, singular_values_high BLOB) STRICT"
        )
        begun = self._db.execute("SELECT value FROM meta WHERE key = 'fingerprint'").fetchone()
        if begun is None:
            self._db.execute("INSERT INTO meta VALUES ('fingerprint', ?)", (json.dumps(fingerprint, sort_keys=True),))
            return
        changes = list(differences(json.loads(begun[0]), json.loads(json.dumps(fingerprint))))
        if changes:
            self._db.close()
            raise JournalMismatch(
                f"{self.path} was begun with other inputs or flags: {'; '.join(changes)}. "
                "Give another --out, or --no-resume to begin anew"
            )

    def rows(self) -> dict[str, Record]:
        """Finished rows by name."""
        found = {}
        for name, row, values, high in self._db.execute("SELECT * FROM rows"):
            arrays = zip(_ARRAYS, (values, high), strict=True)
            found[name] = json.loads(row) | {key: np.frombuffer(b) for key, b in arrays if b is not None}
        return found

    def write(self, record: Record) -> None:
        """Write one finished row; safe from several threads.

        Raises
        ------
        JournalError
            If the disk is full or the file cannot be written.
        """
        plain = {key: value for key, value in record.items() if key not in _ARRAYS}
        arrays = [np.asarray(record[key]).tobytes() if key in record else None for key in _ARRAYS]
        with self._guard:
            try:
                self._db.execute(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)",
                    (record["name"], json.dumps(plain, allow_nan=False), *arrays),
                )
            except sqlite3.OperationalError as error:
                raise JournalError(
                    f"{self.path} cannot be written: {error}; what was finished is kept, run the same command to go on"
                ) from error

    def close(self) -> None:
        """Fold the log into the file and give the folder free."""
        with self._guard:
            self._db.close()
        (self.folder / ".owner").unlink(missing_ok=True)
        self._lock.release()  # the lock file stays: removing it would let two later runs lock two files of one name

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Say on what two JSON values differ, a sentence each.

    Parameters
    ----------
    old, new : JSON values
        As they were, and as they are.
    path : str
        Where in the whole they stand.

    Examples
    --------
    >>> list(differences({"rank": 8, "seed": 0}, {"rank": 16, "seed": 0}))
    ['rank was 8, is 16']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        before, after = (text if len(text) < 90 else text[:87] + "…" for text in map(json.dumps, (old, new)))
        yield f"{path} was {before}, is {after}"
