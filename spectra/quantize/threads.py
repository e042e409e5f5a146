"""A range of work shared out over threads.

torch splits an operation over cores and waits for all of them, once an operation; a dozen short operations a piece
wait a dozen times, which on a machine with other work to do cost more than they took. Here each thread goes through
all operations of its share alone. torch lets go of the interpreter's lock inside them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(work: Callable[[int, int], object], count: int, *, unit: int = 1, least: int = 1) -> None:
    """Call ``work(start, stop)`` on shares of ``range(count)``, one a thread, as many as torch may use.

    Parameters
    ----------
    work : callable
        Must not depend on how the range is shared out.
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
    inference = torch.is_inference_mode_enabled()  # a thread's own; tensors made under it take no change outside it

    def run(start: int) -> None:
        with torch.inference_mode(inference):
            work(start, min(start + share, count))

    # Each on one core: torch's setting is a thread's own.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(run, range(0, count, share)))
