"""Roots of second moments, taken when a matrix needs one and kept only while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from spectra.moments import Moments

# Bytes of roots that are kept for whoever reads the same input next; twice the largest one, if that is more.
KEPT_BYTES = 1 << 30
# Inputs up to which a root is taken on one thread: beside it another matrix is measured.
_ONE_THREAD = 2048


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of one input, which several maps may read: queries, keys and values do.

    Parameters
    ----------
    read : callable
        Gives its moments.
    size : int
        Its entries.
    """

    read: Callable[[], Moments]
    size: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class Roots:
    """Roots of moments, each taken once by whoever needs it first, and again where there was no room to keep it.

    Parameters
    ----------
    most : int
        Bytes to keep.
    """

    def __init__(self, most: int = 0) -> None:
        self.most, self.threads = most, torch.get_num_threads()
        self._kept: OrderedDict[Inputs, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """S of shape (k, s) with SSᵀ = R, the same bits on whichever thread."""
        with inputs.lock:
            with self._lock:
                if inputs in self._kept:
                    self._kept.move_to_end(inputs)
                    return self._kept[inputs]
            root = self._taken(inputs)
            with self._lock:
                self._kept[inputs] = root
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self.most:
                    self._kept.popitem(last=False)
        return root

    def _taken(self, inputs: Inputs) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(1 if inputs.size <= _ONE_THREAD else self.threads)
        try:
            return inputs.read().root
        finally:
            torch.set_num_threads(before)
