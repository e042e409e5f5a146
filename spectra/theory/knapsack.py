"""`Knapsack`: which leading directions of many matrices keep the most under one budget, exactly.

A direction of a matrix costs c = rows + cols parameters, its column of B and its row of A, and keeps σ² of the squared
Frobenius norm. Which ranks r_m lose least,

    min Σ_m Σ_{i > r_m} σ²_{m,i}   subject to   Σ_m c_m r_m ≤ budget,

is a knapsack of items of value σ² and cost c. That the kept items must be the leading ones of their matrix is no
constraint: items of a matrix cost the same, so that taking the larger ones first never hurts. For the same reason all
matrices of one cost form a class, in which the largest σ² go first, and only the number n_k of items of each class is
open. Real models have few classes: a transformer two to five.

Greedy, and why it is not enough. Take items by descending density σ²/c until one does not fit, and let λ be its
density. For every choice that fits,

    kept = Σ_taken (σ² − λc) + λ Σ_taken c  ≤  Σ_all max(σ² − λc, 0) + λ·budget =: U,                                (1)

with equality where exactly the items of density above λ, and any of density λ, are taken and the budget is spent to
the last parameter. So the greedy choice is optimal among all that cost no more than it does; with a fraction of the
next item it is the optimum of the relaxed problem; and at budgets that it does not spend it can be worse than equal
ranks: see the example of `spectra.theory.allocation.allocate`.

What is exact. Measured against (1), a choice loses

    U − kept = Σ_k ℓ_k(n_k) + λ·(budget − Σ_k c_k n_k),

ℓ_k(n) the sum of |σ² − λc| over the items between n and greedy's count: no term is negative, so a good choice has only
small ones. With a limit on the loss, each class has few counts left, and classes are added one at a time, keeping of
the partial choices that cost the same or more only the one that keeps more. If a whole choice within the limit turns
up, the best one is the optimum; if not, the limit grows, at last to the loss of a choice that is known.

No choice needs to be far from greedy's either. Let z be an optimum that differs from greedy's x in as few items as can
be. Go from x to z one item at a time, adding while the cost is within the budget and removing while it is above. The
cost stays within c_max of the budget, on either side, and so takes at most 2c_max values, in units of the greatest
common divisor of all costs. After 2c_max steps one would recur, and the steps in between, which change no cost, would
replace items of density ≥ λ by as much cost of density ≤ λ: undone, they leave an optimum nearer to x. Hence
Σ|z_k − x_k| < 2c_max.

References
----------
H. Everett, Oper. Res. 11 (1963), for (1); D. Pisinger, J. Algorithms 33 (1999), for adding and removing in balance;
G. Nemhauser and Z. Ullmann, Management Sci. 15 (1969), for the lists of choices that no other one beats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Counts = NDArray[np.int64]

# A first search that keeps so few partial choices, so near greedy's, is over in milliseconds, and what it finds is the
# optimum or close: on six families of spectra, of 7 to 200 classes, the full search that follows then ends at once.
_BEAM_LISTS, _BEAM_REACH = (1 << 11, 1 << 13, 1 << 15), 32
# Lists are thinned whenever so many partial choices wait, which bounds the memory of a search.
_WAITING = 1 << 20


@dataclass(frozen=True)
class ItemClass:
    """All items of one cost.

    Parameters
    ----------
    cost : int
        In units of the greatest common divisor of all costs.
    values : ndarray of shape (n,), float64
        σ², descending.
    owners : ndarray of shape (n,), int64
        Which matrix each is of.
    """

    cost: int
    values: Vector
    owners: Counts


@dataclass(frozen=True)
class Knapsack:
    """Classes by cost, and the order in which greedy takes their items.

    Parameters
    ----------
    classes : tuple of ItemClass
    unit : int
        Parameters of a cost of 1.
    matrices : int
    order : ndarray of shape (items,), int64
        Classes of the items, by descending density.
    densities : ndarray of shape (items,), float64
        σ²/c of each, c in units.
    spent : ndarray of shape (items,), int64
        Cost of the first 1, 2, … of them, in units.

    Examples
    --------
    >>> sack = Knapsack.of([np.array([4.0, 4.0]), np.array([6.0])], [6, 10])
    >>> sack.unit, sack.best(17), sack.ranks(sack.best(17)).tolist()
    (2, [1, 1], [1, 1])
    """

    classes: tuple[ItemClass, ...]
    unit: int
    matrices: int
    order: Counts
    densities: Vector
    spent: Counts

    @classmethod
    def of(cls, values: Sequence[Vector], costs: Sequence[int]) -> Knapsack:
        """Pool the items of all matrices.

        Parameters
        ----------
        values : sequence of ndarray of shape (p_m,), float64
            σ² of each matrix, descending. Those that are 0 are left out.
        costs : sequence of int
            Parameters of a direction of each.
        """
        values = [one[one > 0] for one in values]
        unit = math.gcd(*costs) or 1
        return cls.over([_pooled(cost, unit, values, costs) for cost in sorted(set(costs))], unit, len(values))

    @classmethod
    def over(cls, classes: Sequence[ItemClass], unit: int, matrices: int) -> Knapsack:
        """Order the items of these classes."""
        sizes = [len(one.values) for one in classes]
        kinds = np.repeat(np.arange(len(classes)), sizes)
        density = np.concatenate([np.zeros(0), *(one.values / one.cost for one in classes)])
        order = np.argsort(-density, kind="stable")
        spent = np.cumsum(np.repeat(np.array([one.cost for one in classes], dtype=np.int64), sizes)[order])
        return cls(tuple(classes), unit, matrices, kinds[order], density[order], spent)

    @property
    def everything(self) -> int:
        """Cost of all items, in units."""
        return int(self.spent[-1]) if len(self.spent) else 0

    def ranks(self, counts: Sequence[int]) -> Counts:
        """Ranks of the matrices where so many items of each class are taken."""
        found = np.zeros(self.matrices, dtype=np.int64)
        for one, count in zip(self.classes, counts, strict=True):
            found += np.bincount(one.owners[:count], minlength=self.matrices)
        return found

    def kept(self, counts: Sequence[int]) -> float:
        """What so many items of each class keep."""
        return math.fsum(float(np.sum(one.values[:n])) for one, n in zip(self.classes, counts, strict=True))

    def best(self, budget: int) -> list[int]:
        """How many items of each class to take: the optimum at a budget of parameters."""
        fitting = [one for one in self.classes if one.cost * self.unit <= budget]
        if len(fitting) < len(self.classes):
            # Not for speed: the density of what cannot be paid for must not set the scale that losses are rounded on.
            counts = iter(Knapsack.over(fitting, self.unit, self.matrices).best(budget))
            return [next(counts) if one.cost * self.unit <= budget else 0 for one in self.classes]
        return self._best(min(budget // self.unit, self.everything))

    def _best(self, room: int) -> list[int]:
        classes = self.classes
        taken = int(np.searchsorted(self.spent, room, side="right"))  # items before one does not fit
        counts = [int(n) for n in np.bincount(self.order[:taken], minlength=len(classes))]
        if taken == len(self.order) or len(classes) == 1:
            return counts
        density = float(self.densities[taken])
        # Σ|z_k − x_k| < 2c_max, and no count is below 0 or past its class.
        reach = 2 * max(one.cost for one in classes) - 1
        windows = [_Window.around(one, n, density, reach) for one, n in zip(classes, counts, strict=True)]
        slack = room - sum(one.cost * n for one, n in zip(classes, counts, strict=True))
        known, loss = _filled(windows, density, slack)
        # Losses are sums of |σ² − λc| near the marginal item, each rounded by ε of it, over at most `reach` units. What
        # differs by less cannot be told apart. ε of U would be too much: tails of 10⁻²⁰ of the energy can be.
        rounding = float(np.finfo(np.float64).eps) * density * reach
        narrow = [window.narrowed(_BEAM_REACH) for window in windows]
        for lists in _BEAM_LISTS:
            if loss > rounding:
                known, loss = _search(narrow, density, slack, loss, lists=lists) or (known, loss)
        for limit in (loss / 16.0, loss):
            if loss > rounding and (found := _search(windows, density, slack, limit)):
                known = found[0]
                break
        return [n + step for n, step in zip(counts, known, strict=True)]


def _pooled(cost: int, unit: int, values: Sequence[Vector], costs: Sequence[int]) -> ItemClass:
    members = [m for m, other in enumerate(costs) if other == cost]
    pooled = np.concatenate([values[m] for m in members])
    owners = np.repeat(np.array(members, dtype=np.int64), [len(values[m]) for m in members])
    order = np.argsort(-pooled, kind="stable")
    return ItemClass(cost // unit, pooled[order], owners[order])


@dataclass(frozen=True)
class _Window:
    """Steps of one class away from greedy's count: the first of them, ≤ 0, and the loss of each."""

    cost: int
    first: int
    losses: Vector

    @classmethod
    def around(cls, one: ItemClass, greedy: int, density: float, reach: int) -> _Window:
        first, last = max(0, greedy - reach), min(len(one.values), greedy + reach)
        # |σ² − λc| is 0 at least: next to λ the two roundings may put an item on the wrong side of it.
        below = np.maximum(one.values[first:greedy] - density * one.cost, 0.0)
        above = np.maximum(density * one.cost - one.values[greedy:last], 0.0)
        losses = np.concatenate([np.cumsum(below[::-1])[::-1], [0.0], np.cumsum(above)])
        return cls(one.cost, first - greedy, losses)

    @property
    def last(self) -> int:
        return self.first + len(self.losses) - 1

    def loss(self, steps: Counts) -> Vector:
        """Loss of every step; infinite before the first."""
        places = steps - self.first
        return np.where(places >= 0, self.losses[np.maximum(places, 0)], math.inf)

    def narrowed(self, reach: int) -> _Window:
        """Leave only steps of at most this length."""
        first = max(self.first, -reach)
        return _Window(self.cost, first, self.losses[first - self.first : min(self.last, reach) - self.first + 1])

    def within(self, limit: float) -> tuple[int, int]:
        """First and last step whose loss is within the limit: losses fall, then rise."""
        inside = np.flatnonzero(self.losses <= limit) + self.first
        return int(inside[0]), int(inside[-1])


_Choice = tuple[list[int], float]  # steps away from greedy's counts, and the loss


def _filled(windows: Sequence[_Window], density: float, slack: int) -> _Choice:
    """Greedy's choice, and of the classes whose items are small enough, what still fits of one after the other."""
    steps, loss = [0] * len(windows), 0.0
    for k in sorted(range(len(windows)), key=lambda k: windows[k].cost, reverse=True):
        steps[k] = min(slack // windows[k].cost, windows[k].last)
        slack -= steps[k] * windows[k].cost
        loss += float(windows[k].losses[steps[k] - windows[k].first])
    return steps, loss + density * slack


def _search(
    windows: Sequence[_Window], density: float, slack: int, limit: float, *, lists: int | None = None
) -> _Choice | None:
    """Find the best choice of loss within a limit, or None where there is none; `lists` caps the partial choices.

    A partial choice is its offset (cost above greedy's, over the classes decided) and its loss. What it keeps, above
    greedy's, is density·offset − loss: one that costs no less and keeps no more than another is dropped.
    """
    ranges = [window.within(limit) for window in windows]
    order = sorted(range(len(windows)), key=lambda k: ranges[k][1] - ranges[k][0])
    found = _Partial(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    trail: list[tuple[int, _Partial]] = []
    for position, k in enumerate(order[:-1]):
        # The classes still open can give back this much, and no more.
        most = slack - sum(ranges[other][0] * windows[other].cost for other in order[position + 1 :])
        found = found.extended(windows[k], ranges[k], density=density, limit=limit, most=most)
        if lists is not None and len(found.losses) > lists:
            found = found.take(np.lexsort((np.abs(found.offsets), found.losses))[:lists])
        if not len(found.losses):
            return None
        trail.append((k, found))
    # More of the last class is never worse, so each partial choice takes all that fits.
    last = windows[order[-1]]
    steps = np.minimum((slack - found.offsets) // last.cost, last.last)
    total = found.losses + last.loss(steps) + density * (slack - found.offsets - steps * last.cost)
    best = int(np.argmin(total))
    loss = float(total[best])
    if not loss <= limit:
        return None
    choice = [0] * len(windows)
    choice[order[-1]] = int(steps[best])
    for k, found in reversed(trail):
        choice[k] = int(found.steps[best])
        best = int(found.parents[best])
    return choice, loss


@dataclass(frozen=True)
class _Partial:
    """Choices over the classes decided so far: cost above greedy's, loss, the choice each extends, and by what."""

    offsets: Counts
    losses: Vector
    parents: Counts
    steps: Counts

    def take(self, index: Counts) -> _Partial:
        return _Partial(self.offsets[index], self.losses[index], self.parents[index], self.steps[index])

    def extended(self, window: _Window, steps: tuple[int, int], *, density: float, limit: float, most: int) -> _Partial:
        """Extend all by every step of one class, within a limit on the loss and at most an offset; unbeaten ones."""
        parts: list[_Partial] = []
        waiting = 0
        for step in range(steps[0], steps[1] + 1):
            losses = self.losses + window.losses[step - window.first]
            offsets = self.offsets + step * window.cost
            good = np.flatnonzero((losses <= limit) & (offsets <= most))
            parts.append(_Partial(offsets[good], losses[good], good, np.full(len(good), step, dtype=np.int64)))
            waiting += len(good)
            if waiting > _WAITING:
                parts = [_joined(parts).unbeaten(density)]
                waiting = len(parts[0].losses) // 2  # not all: what cannot be thinned must not be sorted at every step
        return _joined(parts).unbeaten(density)

    def unbeaten(self, density: float) -> _Partial:
        """Those that keep more than every one that costs less or the same."""
        kept = density * self.offsets - self.losses
        order = np.lexsort((-kept, self.offsets))
        best = np.maximum.accumulate(kept[order])
        return self.take(order[np.concatenate([[True], kept[order][1:] > best[:-1]])] if len(order) else order)


def _joined(parts: Sequence[_Partial]) -> _Partial:
    return _Partial(
        np.concatenate([part.offsets for part in parts]),
        np.concatenate([part.losses for part in parts]),
        np.concatenate([part.parents for part in parts]),
        np.concatenate([part.steps for part in parts]),
    )
