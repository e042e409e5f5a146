"""Ranks for many matrices under one budget of parameters: the least error, its inverse, and curves over budgets.

A direction of a matrix costs c = rows + cols parameters, its column of B and its row of A, and takes σ² off the squared
error. `allocate` finds the ranks of least total error exactly, `for_energy` the fewest parameters that keep a share;
how, and why it is exact, is the matter of `spectra.theory.knapsack`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from spectra.errors import UsageError
from spectra.theory.knapsack import Counts, Knapsack, Vector

# Both sides of "kept ≥ share · total" are sums of up to a million rounded terms; numpy adds pairwise, and is within
# 40·2⁻⁵³ of the truth. A share that is kept exactly must count as kept.
_SUM_ERROR = 1e-12


def allocate(
    squares: Sequence[ArrayLike], costs: Sequence[int], budget: int, *, largest: Sequence[int] | None = None
) -> Counts:
    """Ranks of least total error Σ_m Σ_{i > r_m} σ²_{m,i} among all with Σ_m c_m r_m ≤ budget.

    Parameters
    ----------
    squares : sequence of array_like of shape (p_m,)
        σ² of every matrix, descending. A direction of value 0 is never taken.
    costs : sequence of int
        Parameters of one direction of each: rows + cols. Or 1 each, where directions are counted.
    budget : int
        Parameters at most, in all.
    largest : sequence of int, optional
        Largest rank of each matrix; by default all its values.

    Returns
    -------
    ndarray of shape (m,), int64
        Ranks. Among equal values of equal cost the matrix that comes first gets its direction first.

    Raises
    ------
    ValueError
        If the arguments are not of one length, a value is negative, not finite or larger than the one before it, a
        cost is below 1, or the budget or a largest rank is below 0.

    Notes
    -----
    Exact, and so never worse than equal ranks of no more parameters: `spectra.theory.knapsack` has the proof. Taking
    the largest σ²/c first is the optimum at every budget which that spends to the last parameter, and need not be at
    others.

    Examples
    --------
    By σ²/c both directions of the first matrix, 4/3 each, come before the second's, 6/5, for which nothing is left
    then. That keeps 8; rank 1 everywhere keeps 10:

    >>> allocate([[4.0, 4.0], [6.0]], [3, 5], 8).tolist()
    [1, 1]
    """
    sack = _packed(squares, costs, largest)
    if budget < 0:
        raise ValueError(f"budget = {budget} is negative")
    return sack.ranks(sack.best(int(budget)))


def for_energy(
    squares: Sequence[ArrayLike],
    costs: Sequence[int],
    share: float,
    *,
    totals: Sequence[float] | None = None,
    largest: Sequence[int] | None = None,
) -> Counts:
    """Ranks that keep a share of the energy of all matrices together, with the fewest parameters.

    Parameters
    ----------
    squares, costs, largest
        As in `allocate`.
    share : float
        In (0, 1].
    totals : sequence of float, optional
        ‖A_m‖²_F of every matrix, where `squares` do not hold all of it.

    Returns
    -------
    ndarray of shape (m,), int64
        Ranks; of all that cost the least, those that keep the most.

    Raises
    ------
    ValueError
        As `allocate`, or if the share is outside (0, 1].
    UsageError
        If the directions that may be taken do not hold that share.

    Notes
    -----
    What the optimum keeps grows with the budget, so the least budget that keeps enough is found by doubling steps and
    bisection, up from the cost of the relaxed problem, which may take a fraction of its last direction and so costs no
    more than any ranks that keep as much.

    Examples
    --------
    >>> [for_energy([[4.0, 4.0], [6.0]], [3, 5], share).tolist() for share in (0.4, 0.5, 0.7)]
    [[0, 1], [2, 0], [1, 1]]
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share = {share} is outside (0, 1]; 0.9 means nine tenths of the energy")
    sack = _packed(squares, costs, largest)
    total = math.fsum(_sum(one) for one in squares) if totals is None else math.fsum(totals)
    target = share * total * (1.0 - _SUM_ERROR)
    held = sack.kept([len(one.values) for one in sack.classes])
    if held < target:
        raise UsageError(
            f"share = {share}: the directions that may be taken hold {held / total:.6g} of the energy; ask for less, "
            "or give more values of each spectrum"
        )

    def enough(room: int) -> bool:
        return sack.kept(sack.best(room * sack.unit)) >= target

    low, step = _relaxed_cost(sack, target) - 1, 1
    while low >= 0 and enough(low):  # only where the rounding of a long sum put it too high
        low, step = low - step, 2 * step
    high, step = low + 1, 1
    while high < sack.everything and not enough(high):
        low, high, step = high, min(sack.everything, high + step), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return sack.ranks(sack.best(max(high, 0) * sack.unit))


def _relaxed_cost(sack: Knapsack, target: float) -> int:
    """Least cost that keeps `target` where the last item may be taken in part, in units, rounded up."""
    kept = np.cumsum(sack.densities * np.diff(sack.spent, prepend=0))
    last = int(np.searchsorted(kept, target))  # the first item that keeps enough, with all before it
    if last >= len(kept):
        return sack.everything
    before = int(sack.spent[last - 1]) if last else 0
    lacking = target - (float(kept[last - 1]) if last else 0.0)
    return before + math.ceil(lacking / float(sack.densities[last]))


def uniform_rank(costs: Sequence[int], budget: int, *, largest: Sequence[int]) -> int:
    """Largest rank that all matrices can have, each at most its own, within a budget; 0 where not even 1 fits.

    Parameters
    ----------
    costs : sequence of int
        Parameters of a direction of each matrix.
    budget : int
        Parameters at most, in all.
    largest : sequence of int
        Largest rank of each: it takes no more where the others go on.

    Examples
    --------
    >>> uniform_rank([3, 5], 20, largest=[4, 4]), uniform_rank([3, 5], 20, largest=[4, 1])
    (2, 4)
    """
    low, high = 0, max(largest, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if uniform_cost(costs, middle, largest=largest) <= budget else (low, middle - 1)
    return low


def uniform_cost(costs: Sequence[int], rank: int, *, largest: Sequence[int]) -> int:
    """Parameters of one rank everywhere, or of a matrix's largest where that is less.

    Parameters
    ----------
    costs : sequence of int
        Parameters of a direction of each matrix.
    rank : int
    largest : sequence of int
        Largest rank of each.

    Examples
    --------
    >>> uniform_cost([3, 5], 2, largest=[4, 1])
    11
    """
    return sum(cost * min(rank, limit) for cost, limit in zip(costs, largest, strict=True))


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Relative error of all matrices together, √(Σ_m ‖A_m − B_m‖²_F / Σ_m ‖A_m‖²_F), at growing budgets.

    Parameters
    ----------
    budgets : ndarray of shape (b,), int64
        Parameters.
    ranks : ndarray of shape (b, m), int64
        Ranks by `allocate`.
    low, high : ndarray of shape (b,), float64
        Bounds on the error at these ranks; one where everything is known. NaN where all matrices are 0.
    least : ndarray of shape (b,), float64
        No ranks have less error than this at that budget, not even with directions past those known.
    uniform : ndarray of shape (b,), int64
        Largest equal rank.
    uniform_low, uniform_high : ndarray of shape (b,), float64
        Bounds on the error at equal ranks.
    """

    budgets: Counts
    ranks: Counts
    low: Vector
    high: Vector
    least: Vector
    uniform: Counts
    uniform_low: Vector
    uniform_high: Vector


def error_curve(
    squares: Sequence[ArrayLike],
    costs: Sequence[int],
    budgets: Sequence[int],
    *,
    high: Sequence[ArrayLike] | None = None,
    totals: Sequence[float] | None = None,
) -> ErrorCurve:
    """Error at every budget, with the best ranks and with equal ones. Both use only the directions of `squares`.

    Parameters
    ----------
    squares : sequence of array_like of shape (k_m,)
        σ² of every matrix, descending; lower bounds where `high` is given.
    costs : sequence of int
        Parameters of a direction of each.
    budgets : sequence of int
        Parameters.
    high : sequence of array_like of shape (≥ k_m,), optional
        Upper bounds on the same σ², descending, and after them on those of directions that `squares` lack.
    totals : sequence of float, optional
        ‖A_m‖²_F of every matrix where `squares` do not hold all of it.

    Returns
    -------
    ErrorCurve

    Raises
    ------
    ValueError
        As `allocate`, or where an upper bound is below the lower one.

    Notes
    -----
    At ranks r the squared error is Σ_m (‖A_m‖² − Σ_{i ≤ r_m} σ²_{m,i}), which is bounded by putting in the bounds of
    σ². `least` is the optimum of `allocate` over the upper bounds: it keeps at least what any ranks keep.

    Examples
    --------
    >>> curve = error_curve([[9.0, 1.0], [4.0, 2.0]], [3, 5], [3, 8])
    >>> curve.ranks.tolist(), (16 * curve.high**2).round(9).tolist(), curve.uniform.tolist()
    ([[1, 0], [1, 1]], [7.0, 3.0], [0, 1])
    """
    lower = [np.asarray(one, dtype=np.float64) for one in squares]
    upper = lower if high is None else [np.asarray(one, dtype=np.float64) for one in high]
    sums = [_sum(one) for one in lower]
    missing = math.fsum(
        max(0.0, whole - part) for whole, part in zip(sums if totals is None else totals, sums, strict=True)
    )
    for m, (least, most) in enumerate(zip(lower, upper, strict=True)):
        if len(most) < len(least) or np.any(most[: len(least)] < least):
            raise ValueError(f"high[{m}] must hold an upper bound for every value of squares[{m}]")
    total = math.fsum(sums) + missing
    sack, relaxed = _packed(lower, costs, None), _packed(upper, costs, None)

    def error(ranks: Sequence[int] | Counts) -> tuple[float, float]:
        left = missing + math.fsum(_sum(one[r:]) for one, r in zip(lower, ranks, strict=True))
        doubt = math.fsum(_sum(b[: len(a)][:r] - a[:r]) for a, b, r in zip(lower, upper, ranks, strict=True))
        return _relative(left - doubt, total), _relative(left, total)

    count = len(budgets)
    ranks, uniform = np.zeros((count, len(lower)), dtype=np.int64), np.zeros(count, dtype=np.int64)
    errors = np.zeros((5, count))
    for at, budget in enumerate(budgets):
        ranks[at] = sack.ranks(sack.best(int(budget)))
        uniform[at] = uniform_rank(costs, int(budget), largest=[len(one) for one in lower])
        errors[:2, at], errors[3:, at] = error(ranks[at]), error([int(uniform[at])] * len(lower))
        # Where all is known the tail itself is the bound, which loses nothing to cancellation.
        bound = _relative(total - relaxed.kept(relaxed.best(int(budget))), total)
        errors[2, at] = errors[0, at] if high is None else min(bound, errors[0, at])
    low, top, least_error, uniform_low, uniform_high = errors
    return ErrorCurve(
        np.array(budgets, dtype=np.int64), ranks, low, top, least_error, uniform, uniform_low, uniform_high
    )


def _relative(squared: float, total: float) -> float:
    return math.sqrt(min(1.0, max(0.0, squared / total))) if total > 0 else math.nan


def _sum(values: ArrayLike) -> float:
    return float(np.sum(np.asarray(values, dtype=np.float64)))


def _packed(squares: Sequence[ArrayLike], costs: Sequence[int], largest: Sequence[int] | None) -> Knapsack:
    values = [np.asarray(one, dtype=np.float64) for one in squares]
    if len(values) != len(costs) or (largest is not None and len(largest) != len(values)):
        told = "" if largest is None else f" and {len(largest)} largest ranks"
        raise ValueError(f"{len(values)} spectra for {len(costs)} costs{told}")
    for m, one in enumerate(values):
        if one.ndim != 1 or not np.all(np.isfinite(one)) or np.any(one < 0) or np.any(np.diff(one) > 0):
            raise ValueError(f"squares[{m}] must be one row of finite, non-negative, descending values")
        if int(costs[m]) != costs[m] or costs[m] < 1:
            raise ValueError(f"costs[{m}] = {costs[m]} is not a number of parameters")
        if largest is not None and largest[m] < 0:
            raise ValueError(f"largest[{m}] = {largest[m]} is negative")
    if largest is not None:
        values = [one[:limit] for one, limit in zip(values, largest, strict=True)]
    return Knapsack.of(values, [int(cost) for cost in costs])
