"""`TrialJournal`: finished trainings, one JSON line each, so that an interrupted search repeats none of them.

A search makes some dozens of trainings that take minutes: a text file that is only appended to, and brought to disk
after every line, is enough, and can be read as it grows. A process killed while it writes leaves a last line without
its end; that line is dropped, since a training whose record is torn is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

from spectra.errors import JournalBusy, JournalError, MismatchError
from spectra.intrinsic.trial import Ask, Trial
from spectra.journal import differences

NAME = "trials.jsonl"
_FORMAT = "spectra intrinsic journal 1"


class TrialJournal:
    """Trainings of one search in ``DIR/trials.jsonl``, owned by one process at a time.

    Parameters
    ----------
    folder : path
        Made if need be.
    fingerprint : mapping
        What a trial depends on besides its ask, JSON-able. A journal with another one is refused.
    resume : bool
        Keep trials that are there already; otherwise begin anew.

    Raises
    ------
    MismatchError
        If the journal was begun with another fingerprint; the message names what differs.
    JournalBusy
        If another process owns the folder.
    JournalError
        If the folder or the file cannot be used.

    Examples
    --------
    >>> import tempfile
    >>> ask = Ask("full", None, seed=0, learning_rate=None, steps=200, schedule_steps=200, give_up_below=None)
    >>> folder = tempfile.mkdtemp()
    >>> with TrialJournal(folder, {"model": "tiny"}) as journal:
    ...     journal.write(Trial(ask, metric=0.8, loss=0.3, steps=200, stopped=False, seconds=9.5, parameters=4400))
    >>> with TrialJournal(folder, {"model": "tiny"}) as journal:
    ...     journal.find(ask).metric
    0.8
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path = Path(folder) / NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.path.parent / ".lock")
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise JournalBusy(f"{folder} is in use by another search; wait for it, or give another --out") from error
        except OSError as error:
            raise JournalError(f"{folder}: the output folder cannot be used: {error.strerror}") from error
        try:
            self._trials = self._opened(json.loads(json.dumps(fingerprint)), resume)
            self._stream = self.path.open("ab")
        except OSError as error:
            self._lock.release()
            raise JournalError(f"{self.path} cannot be used: {error.strerror}") from error
        except BaseException:
            self._lock.release()
            raise

    def __len__(self) -> int:
        return len(self._trials)

    def find(self, ask: Ask) -> Trial | None:
        """What came of a training, or None if it was not made yet."""
        return self._trials.get(ask)

    def write(self, trial: Trial) -> None:
        """Append a finished training; it is on disk when this returns.

        Raises
        ------
        JournalError
            If the disk is full or the file cannot be written.
        """
        try:
            self._append(trial.record())
        except OSError as error:
            raise JournalError(
                f"{self.path} cannot be written: {error.strerror}; what was finished is kept, run the same command to "
                "go on"
            ) from error
        self._trials[trial.ask] = trial

    def close(self) -> None:
        """Give the folder free."""
        self._stream.close()
        self._lock.release()  # the lock file stays: removing it would let two later searches lock two files of one name

    def __enter__(self) -> TrialJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self, fingerprint: Any, resume: bool) -> dict[Ask, Trial]:
        """Trials that are there, the file cut after the last whole one; a new file with its first line otherwise."""
        content = self.path.read_bytes() if resume and self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            with self.path.open("wb") as self._stream:
                self._append({"format": _FORMAT, "fingerprint": fingerprint})
            return {}
        begun, *records = self._read(whole)
        if not isinstance(begun, dict) or begun.get("format") != _FORMAT:
            raise JournalError(f"{self.path} is no journal of this program; give another --out")
        changes = list(differences(begun.get("fingerprint"), fingerprint))
        if changes:
            raise MismatchError(
                f"{self.path} was begun with other inputs or flags: {'; '.join(changes)}. "
                "Give another --out, or --no-resume to begin anew"
            )
        os.truncate(self.path, len(whole))
        try:
            trials = [Trial.from_record(record) for record in records]
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError(f"{self.path} holds a line that is no training: {error}; use --no-resume") from error
        return {trial.ask: trial for trial in trials}

    def _read(self, whole: bytes) -> list[Any]:
        lines = whole.splitlines()
        try:
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise JournalError(f"{self.path} is damaged: {error}; use --no-resume, or give another --out") from error

    def _append(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
