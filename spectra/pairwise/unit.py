"""One tensor with all its updates, what is asked of it, and what answering takes in memory and multiplications."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.delta import AnyDelta, LowRankDelta
from spectra.errors import OutOfMemory
from spectra.inputs import EXACT_BELOW
from spectra.linalg.route import gram_bytes, sketch_bytes
from spectra.record import Record


@dataclass(frozen=True)
class Unit:
    """All updates of one tensor.

    Parameters
    ----------
    record : dict
        What is known before anything is read: name, layer, role, shape, dtype, status.
    deltas : tuple of delta or None
        One an update, in order; None where it has none of this tensor.
    refused : tuple of str
        One an update: why it has the tensor and no delta of it, its shape; "" otherwise.
    """

    record: Record
    deltas: tuple[AnyDelta | None, ...]
    refused: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the tensor as a matrix."""
        return self.record["rows"], self.record["cols"]

    @property
    def present(self) -> list[AnyDelta]:
        """Updates that there are."""
        return [delta for delta in self.deltas if delta is not None]

    @property
    def model(self) -> AnyDelta:
        """The first update of the tensor's shape: what the others are held against."""
        return next(delta for delta in self.present if delta.shape == self.shape)

    @property
    def dense(self) -> list[AnyDelta]:
        """Updates that are a matrix, not factors."""
        return [delta for delta in self.present if not isinstance(delta, LowRankDelta)]


@dataclass(frozen=True)
class Asked:
    """What is asked of every tensor.

    Parameters
    ----------
    labels : tuple of str
        Short names of the updates, for messages.
    rank : int
        Leading directions to hold of each update.
    exact : bool
        Every singular value, and intruders, whatever the size.
    seed : int
        Of the sketches.
    max_bytes : float
        Memory allowed for a tensor.
    device : str, optional
        Where dense updates are decomposed.
    """

    labels: tuple[str, ...]
    rank: int = 64
    exact: bool = False
    seed: int = 0
    max_bytes: float = math.inf
    device: str | None = None

    def whole(self, unit: Unit) -> bool:
        """Whether every singular value is taken, and intruders are looked for: by size, and where memory admits it.

        Raises
        ------
        OutOfMemory
            If not even the leading directions fit; the message says what they need.
        """
        if (self.exact or min(unit.shape) <= EXACT_BELOW) and self._bytes(unit, whole=True) <= self.max_bytes:
            return True
        least = self._bytes(unit, whole=False)
        if least > self.max_bytes:
            rows, cols = unit.shape
            raise OutOfMemory(
                f"{len(unit.present)} updates of a {rows} × {cols} matrix need {least / 1e6:,.3g} MB, but "
                f"{self.max_bytes / 1e6:,.3g} MB are left for them; allow more memory or ask for fewer directions"
            )
        return False

    def peak_bytes(self, unit: Unit) -> int:
        """Most memory that the tensor needs at a time."""
        try:
            return self._bytes(unit, whole=self.whole(unit))
        except OutOfMemory:
            return 0

    def work(self, unit: Unit) -> float:
        """Multiply-adds: every dense update decomposed, base and sums too where intruders are looked for; images."""
        rows, cols = unit.shape
        whole = self.exact or min(unit.shape) <= EXACT_BELOW
        decompositions = len(unit.dense) + (1 + len(unit.present) if whole else 0)
        each = min(rows, cols) if whole else 4 * self.rank
        return float(rows * cols) * (decompositions * each + 6 * self.rank * len(unit.present))

    def _bytes(self, unit: Unit, *, whole: bool) -> int:
        """Matrices, leading vectors and engine.

        Matrices: the base as stored and wide, every dense update, the one being read, one sum W + Δ. Where intruders
        are looked for also the base's singular vectors in float64, and as much again while they are made and matched.
        """
        rows, cols = unit.shape
        p, count = min(rows, cols), min(self.rank, rows, cols)
        wide = 8 if any("F64" in (d.base_info.dtype, d.tuned_info.dtype) for d in unit.present) else 4
        stored = unit.model.base_info.read_bytes + max((d.tuned_info.read_bytes for d in unit.dense), default=0)
        matrices = stored + wide * rows * cols * (len(unit.dense) + 2)
        held = 8 * (rows + cols) * count * (len(unit.present) + 2)
        if whole:
            return matrices + held + gram_bytes(rows, cols) + 8 * p * (2 * max(rows, cols) + p)
        return matrices + held + (sketch_bytes(rows, cols, self.rank, wide) if unit.dense else 0)
