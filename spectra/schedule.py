"""In what order, how many at a time and on how many threads the matrices of a plan are measured.

Small matrices go side by side, one thread each; large ones two at a time, each with half the threads, where there are
two; on an accelerator small ones of one shape go as one batch. All of it depends on the plan alone, so that the numbers
are the same bits whatever ``jobs``, and whether or not a run was interrupted. Finished rows go to the journal.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from threadpoolctl import threadpool_limits

from spectra.delta import AnyDelta
from spectra.inputs import progress_bar
from spectra.journal import Journal
from spectra.record import Question, Record, measured, measured_together
from spectra.requantized import RequantizedDelta, RequantizedLowRankDelta

if TYPE_CHECKING:
    from spectra.comparison import Plan

# Matrices are measured by one thread beside others up to so many entries, or to so small a side: BLAS gains little from
# a second thread there (30522 × 384: nothing), and two matrices at a time gain 1.6×.
SMALL_ENTRIES = 1 << 22
SMALL_SIDE = 512

# Matrices in a batch at most; memory may allow fewer.
BATCH = 64


@dataclass(frozen=True)
class Load:
    """What measuring one row asks of the machine.

    Parameters
    ----------
    shape : tuple of int
        (rows, cols) of its matrix, which decides the lane.
    peak_bytes : int
        Most memory it holds at a time.
    """

    shape: tuple[int, int]
    peak_bytes: int

    @property
    def small(self) -> bool:
        """Whether one thread does, beside others."""
        return _small(self.shape)


def measure_all(todo: Plan, records: list[Record], jobs: int) -> Iterator[Record]:
    """Rows of a plan's records as they are finished, small matrices first.

    Parameters
    ----------
    todo : Plan
    records : list of dict
        Those still to measure.
    jobs : int
        Matrices to measure at a time on the CPU.
    """
    loads = {name: Load(delta.shape, _peak_bytes(delta)) for name, delta in todo.deltas.items()}

    def measure(record: Record) -> Record:
        delta = todo.deltas[record["name"]]
        return measured(delta, record, _question(todo, delta, resident_bytes(delta)))

    device, limit = todo.question.device, todo.question.max_bytes
    if _batched(device):
        yield from _in_batches(todo, [record for record in records if loads[record["name"]].small])
        records = [record for record in records if not loads[record["name"]].small]
    yield from in_lanes(measure, records, loads, jobs=jobs, max_bytes=limit, device=device)


def in_lanes(
    measure: Callable[[Record], Record],
    records: Sequence[Record],
    loads: Mapping[str, Load],
    *,
    jobs: int,
    max_bytes: float,
    device: str | None = None,
) -> Iterator[Record]:
    """Rows as they are finished: small matrices side by side on a thread each, then large ones, two at a time.

    Parameters
    ----------
    measure : callable
        Completes one row; called from several threads.
    records : sequence of dict
        Rows still to measure, by ``"name"``.
    loads : mapping of str to Load
        Of every row of the plan, those already measured too: the lanes are the same after an interruption.
    jobs : int
        Rows to measure at a time at most.
    max_bytes : float
        Memory that the rows measured at a time may need together; one alone always goes.
    device : str, optional
        Where they are measured; anything but the CPU takes them one at a time.
    """
    small = [record for record in records if loads[record["name"]].small]
    large = [record for record in records if not loads[record["name"]].small]
    threads = torch.get_num_threads()
    alone = _batched(device)
    # Two at a time on a thread each take less than in turn on two: while one is read, subtracted or orthogonalised the
    # other multiplies. Not on a device, nor where only one is large.
    many = sum(not load.small for load in loads.values()) > 1
    lanes = 2 if threads > 1 and many and not alone else 1
    with _threads(1):
        yield from _side_by_side(measure, small, 1 if alone else jobs, loads, max_bytes)
    with _threads(threads // lanes):
        yield from _side_by_side(measure, large, min(jobs, lanes), loads, max_bytes)


def journalled(
    records: Sequence[Record],
    work: Mapping[str, float],
    measure: Callable[[list[Record]], Iterator[Record]],
    *,
    out: str | os.PathLike[str] | None,
    fingerprint: Mapping[str, Any],
    resume: bool,
    progress: bool,
) -> tuple[Record, ...]:
    """All rows of a plan: those that need measuring measured, each kept in the journal as soon as it is there.

    Parameters
    ----------
    records : sequence of dict
        Every row of the plan.
    work : mapping of str to float
        Multiply-adds of the rows that need measuring, by name; the others stay as they are.
    measure : callable
        Gives rows as they are finished, of those still missing.
    out : path or None
        Folder of the journal; None keeps none.
    fingerprint : mapping
        What the rows depend on.
    resume, progress : bool
        Take up what the journal holds; show a bar.

    Raises
    ------
    JournalError
        If the folder is in use, or was begun with other inputs or flags.
    """
    with Journal(Path(out), fingerprint, resume=resume) if out is not None else nullcontext() as journal:
        finished = journal.rows() if journal is not None else {}
        missing = [record for record in records if record["name"] in work and record["name"] not in finished]
        with progress_bar({record["name"]: work[record["name"]] for record in missing}, progress) as advance:
            for row in measure(missing):
                finished[row["name"]] = row
                if journal is not None:
                    journal.write(row)
                advance(row["name"])
    return tuple(finished.get(record["name"], record) for record in records)


def _question(todo: Plan, delta: AnyDelta, resident: int) -> Question:
    return replace(todo.question, rank=todo.rank(delta), max_bytes=todo.question.max_bytes - resident)


def _batched(device: str | None) -> bool:
    """Whether small matrices of one shape are taken as a batch: wherever another device than the CPU computes."""
    return device is not None and torch.device(device).type != "cpu"


def _in_batches(todo: Plan, records: list[Record]) -> Iterator[Record]:
    """Measure records of one shape together.

    Who shares a batch is decided from the whole plan: a batch of which a row is missing is measured whole again.
    """
    missing = {record["name"] for record in records}
    groups: dict[tuple[int, int], list[Record]] = defaultdict(list)
    for record in todo.records:
        delta = todo.deltas.get(record["name"])
        if delta is not None and _small(delta.shape):
            groups[delta.shape].append(record)
    for group in groups.values():
        deltas = [todo.deltas[record["name"]] for record in group]
        most = max(1, min(BATCH, int(todo.question.max_bytes // max(map(_peak_bytes, deltas)))))
        for start in range(0, len(group), most):
            batch, updates = group[start : start + most], deltas[start : start + most]
            if missing.isdisjoint(record["name"] for record in batch):
                continue
            resident = sum(map(resident_bytes, updates))
            rows = measured_together(updates, batch, _question(todo, updates[0], resident))
            yield from (row for row in rows if row["name"] in missing)


def _small(shape: tuple[int, int]) -> bool:
    return math.prod(shape) <= SMALL_ENTRIES or min(shape) <= SMALL_SIDE


def _side_by_side(
    measure: Callable[[Record], Record],
    records: list[Record],
    jobs: int,
    loads: Mapping[str, Load],
    max_bytes: float,
) -> Iterator[Record]:
    """Measure records in a pool, never more at a time than memory admits."""
    threads = torch.get_num_threads()  # torch's setting is one a thread, so every worker sets its own
    pool = ThreadPoolExecutor(
        jobs, thread_name_prefix="spectra", initializer=torch.set_num_threads, initargs=(threads,)
    )
    running: dict[Future[Record], int] = {}
    try:
        for record in records:
            need = loads[record["name"]].peak_bytes
            while len(running) >= jobs or (running and sum(running.values()) + need > max_bytes):
                yield from _finished(running)
            running[pool.submit(measure, record)] = need
        while running:
            yield from _finished(running)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[Record], int]) -> Iterator[Record]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        del running[future]
        yield future.result()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def resident_bytes(delta: AnyDelta) -> int:
    """Bytes of both tensors as they are read, and of their difference; of a requantized base also Ŵ and the error."""
    wide = 8 if "F64" in (delta.base_info.dtype, delta.tuned_info.dtype) else 4
    matrices = 3 if isinstance(delta, RequantizedDelta | RequantizedLowRankDelta) else 1
    return delta.base_info.read_bytes + delta.tuned_info.read_bytes + matrices * wide * math.prod(delta.shape)


def _peak_bytes(delta: AnyDelta) -> int:
    rows, cols = delta.shape
    return resident_bytes(delta) + 8 * (2 * min(rows, cols) ** 2 + 2048 * min(rows, cols))
