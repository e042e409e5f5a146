"""Work shared out over threads: everything once, one error for all, nothing after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from spectra.linalg.threads import each_in_threads, in_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_item_once() -> None:
    done: list[int] = []
    each_in_threads(done.append, range(1000))
    assert sorted(done) == list(range(1000))
    assert torch.get_num_threads() == 2


def test_shares_cover_the_range() -> None:
    shares: list[tuple[int, int]] = []
    in_threads(lambda start, stop: shares.append((start, stop)), 103, unit=10)
    assert sorted(shares) == [(0, 60), (60, 103)]


def test_an_error_ends_the_work_of_all() -> None:
    """Items that come after it are not begun, and torch's setting is put back."""
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ZeroDivisionError
        time.sleep(0.005)

    with pytest.raises(ZeroDivisionError):
        each_in_threads(work, range(200))
    assert len(begun) < 20
    assert torch.get_num_threads() == 2


def test_both_threads_work() -> None:
    seen: set[int] = set()

    def work(_: int) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    each_in_threads(work, range(20))
    assert len(seen) == 2
