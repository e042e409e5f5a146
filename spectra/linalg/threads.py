"""A range of work shared out over threads.

torch splits an operation over cores and waits for all of them, once an operation; a dozen short operations a piece
wait a dozen times, which on a machine with other work to do cost more than they took. Here each thread goes through
all operations of its share alone. torch lets go of the interpreter's lock inside them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

_T = TypeVar("_T")


def in_threads(work: Callable[[int, int], object], count: int, *, unit: int = 1, least: int = 1) -> None:
    """Call ``work(start, stop)`` on shares of ``range(count)``, one a thread, as many as torch may use.

    Parameters
    ----------
    work : callable
        Must not depend on how the range is shared out, nor keep a gradient: where there is more than one share, none
        is.
    count : int
    unit : int
        Shares begin at multiples of it.
    least : int
        A share that is smaller is not worth a thread.

    Examples
    --------
    >>> squares = torch.zeros(5)
    >>> in_threads(lambda start, stop: squares[start:stop].copy_(torch.arange(start, stop) ** 2), 5, unit=2)
    >>> squares
    tensor([ 0.,  1.,  4.,  9., 16.])
    """
    threads = max(1, min(torch.get_num_threads(), count // least))
    share = -(-count // (threads * unit)) * unit
    if share >= count:
        work(0, count)
        return
    each_in_threads(lambda start: work(start, min(start + share, count)), range(0, count, share))


def each_in_threads(work: Callable[[_T], object], items: Sequence[_T]) -> None:
    """Call ``work(item)`` for every item; each thread takes the next one as soon as it is done with one.

    Parameters
    ----------
    work : callable
        Must not depend on the order, nor on the thread. torch uses one thread in it, whatever its setting, so that
        results are the same bits for any number of them. No gradient is kept.
    items : sequence

    Examples
    --------
    >>> cubes = torch.zeros(5)
    >>> each_in_threads(lambda i: cubes[i].fill_(i**3), range(5))
    >>> cubes
    tensor([ 0.,  1.,  8., 27., 64.])
    """
    inference = torch.is_inference_mode_enabled()  # a thread's own; tensors made under it take no change outside it
    before, left = torch.get_num_threads(), iter(items)  # a list's or a range's iterator may be shared by threads
    failed = threading.Event()

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for item in left:
                if failed.is_set():  # one thread's error, or an interrupt, ends the others' work too
                    return
                try:
                    work(item)
                except BaseException:
                    failed.set()
                    raise

    helpers = min(before, len(items)) - 1
    others = [_pool(helpers, os.getpid()).submit(run) for _ in range(helpers)]
    torch.set_num_threads(1)
    try:
        run()
    finally:
        torch.set_num_threads(before)
        wait(others)
    for other in others:
        other.result()


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that are kept, each on one core: torch's setting is a thread's own. A forked process has none of them."""
    return ThreadPoolExecutor(
        threads, thread_name_prefix="spectra-share", initializer=torch.set_num_threads, initargs=(1,)
    )
