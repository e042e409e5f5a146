"""`RateLadder`: which factor of the rule's learning rate a dimension trains with, found by short pilot trainings.

The best rate moves slowly with the dimension. So the first dimension tries every factor, and later ones try their
nearest neighbour's winner and the better of the two factors beside it. A winner at the end of the ladder is followed
outward by one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


class RateLadder:
    """Factors of a learning rate, ascending, and what they came to at each dimension.

    Parameters
    ----------
    factors : sequence of float
        Positive. One alone is taken as it is, without a pilot.
    pilot : callable
        ``pilot(dimension, factor)`` gives the training loss of a short training; infinite where it failed.

    Examples
    --------
    >>> ladder = RateLadder((0.25, 1.0, 4.0), lambda dimension, factor: abs(math.log(factor / 3)))
    >>> ladder.factor(256), ladder.tried(256)  # 4 won at the end of the ladder: 16 was tried too
    (4.0, (0.25, 1.0, 4.0, 16.0))
    >>> ladder.factor(512), ladder.tried(512)
    (4.0, (1.0, 4.0))
    """

    def __init__(self, factors: Sequence[float], pilot: Callable[[int, float], float]) -> None:
        self._ladder = sorted(factors)
        self._pilot = pilot
        self._losses: dict[int, dict[float, float]] = {}

    def factor(self, dimension: int) -> float:
        """Give the factor for a dimension; pilots are made when it is first asked for."""
        if len(self._ladder) == 1:
            return self._ladder[0]
        if dimension not in self._losses:
            self._losses[dimension] = self._choose(dimension)
        return _winner(self._losses[dimension])

    def tried(self, dimension: int) -> tuple[float, ...]:
        """Factors that pilots were made with, ascending."""
        return tuple(sorted(self._losses.get(dimension, {})))

    def _choose(self, dimension: int) -> dict[float, float]:
        if self._losses:
            near = _winner(self._losses[self._nearest(dimension, self._losses)])
            return {factor: self._pilot(dimension, factor) for factor in (near, self._beside(near, dimension))}
        losses = {factor: self._pilot(dimension, factor) for factor in self._ladder}
        winner = _winner(losses)
        if winner in (self._ladder[0], self._ladder[-1]):
            outward = self._outward(upward=winner == self._ladder[-1])
            losses[outward] = self._pilot(dimension, outward)
        return losses

    def _beside(self, factor: float, dimension: int) -> float:
        """The factor next to one that lost least by it where it was tried last; a new one beyond the end first."""
        at = self._ladder.index(factor)
        if at in (0, len(self._ladder) - 1):
            return self._outward(upward=at > 0)
        return min(self._ladder[at + 1], self._ladder[at - 1], key=lambda other: self._excess(other, dimension))

    def _excess(self, factor: float, dimension: int) -> float:
        known = [d for d, losses in self._losses.items() if factor in losses]
        losses = self._losses[self._nearest(dimension, known)]
        excess = losses[factor] - min(losses.values())
        return excess if math.isfinite(excess) else math.inf  # two failures: ∞ − ∞

    def _outward(self, *, upward: bool) -> float:
        """Lengthen the ladder by a factor, as far from its end as the one before is."""
        end, before = (self._ladder[-1], self._ladder[-2]) if upward else (self._ladder[0], self._ladder[1])
        self._ladder.insert(len(self._ladder) if upward else 0, end * end / before)
        return self._ladder[-1 if upward else 0]

    @staticmethod
    def _nearest(dimension: int, known: Sequence[int] | dict[int, dict[float, float]]) -> int:
        return min(known, key=lambda d: (abs(math.log(d / dimension)), d))


def _winner(losses: dict[float, float]) -> float:
    """The factor of the least loss; of equal ones, and where all failed, the smallest."""
    return min(losses, key=lambda factor: (losses[factor], factor))
