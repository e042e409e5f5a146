"""In what order, how many at a time and on how many threads the updates of a plan are measured.

Small matrices go side by side, one thread each; large ones two at a time, each with half the threads, where there are
two; on an accelerator small ones of one shape go as one batch. All of it depends on the plan alone, so that the numbers
are the same bits whatever ``jobs``, and whether or not a run was interrupted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from threadpoolctl import threadpool_limits

from spectra.delta import AnyDelta
from spectra.record import Question, Record, measured, measured_together

if TYPE_CHECKING:
    from spectra.comparison import Plan

# Matrices are measured by one thread beside others up to so many entries, or to so small a side: BLAS gains little from
# a second thread there (30522 × 384: nothing), and two matrices at a time gain 1.6×.
SMALL_ENTRIES = 1 << 22
SMALL_SIDE = 512

# Matrices in a batch at most; memory may allow fewer.
BATCH = 64


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
    deltas = todo.deltas
    small = [record for record in records if _small(deltas[record["name"]])]
    large = [record for record in records if not _small(deltas[record["name"]])]
    threads = torch.get_num_threads()
    # Two at a time on a thread each take less than in turn on two: while one is read, subtracted or orthogonalised the
    # other multiplies. Not on a device, nor where only one is large.
    many = sum(not _small(delta) for delta in deltas.values()) > 1
    lanes = 2 if threads > 1 and many and not _batched(todo.question.device) else 1

    def measure(record: Record) -> Record:
        delta = deltas[record["name"]]
        return measured(delta, record, _question(todo, delta, resident_bytes(delta)))

    if _batched(todo.question.device):
        yield from _in_batches(todo, small)
    else:
        with _threads(1):
            yield from _side_by_side(measure, small, jobs, todo)
    with _threads(threads // lanes):
        yield from _side_by_side(measure, large, min(jobs, lanes), todo)


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
        if record["name"] in todo.deltas and _small(todo.deltas[record["name"]]):
            groups[todo.deltas[record["name"]].shape].append(record)
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


def _small(delta: AnyDelta) -> bool:
    return math.prod(delta.shape) <= SMALL_ENTRIES or min(delta.shape) <= SMALL_SIDE


def _side_by_side(
    measure: Callable[[Record], Record], records: list[Record], jobs: int, todo: Plan
) -> Iterator[Record]:
    """Measure records in a pool, never more at a time than memory admits."""
    threads = torch.get_num_threads()  # torch's setting is one a thread, so every worker sets its own
    pool = ThreadPoolExecutor(
        jobs, thread_name_prefix="spectra", initializer=torch.set_num_threads, initargs=(threads,)
    )
    running: dict[Future[Record], int] = {}
    try:
        for record in records:
            need = _peak_bytes(todo.deltas[record["name"]])
            while len(running) >= jobs or (running and sum(running.values()) + need > todo.question.max_bytes):
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
    """Bytes of both stored tensors and of their difference."""
    wide = 8 if "F64" in (delta.base_info.dtype, delta.tuned_info.dtype) else 4
    return delta.base_info.nbytes + delta.tuned_info.nbytes + wide * math.prod(delta.shape)


def _peak_bytes(delta: AnyDelta) -> int:
    rows, cols = delta.shape
    return resident_bytes(delta) + 8 * (2 * min(rows, cols) ** 2 + 2048 * min(rows, cols))
