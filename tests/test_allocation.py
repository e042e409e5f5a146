"""Allocation: against brute force and a dynamic programme over the budget; never worse than uniform; its inverse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spectra.errors import UsageError
from spectra.theory.allocation import allocate, error_curve, for_energy, uniform_cost, uniform_rank

Vector = NDArray[np.float64]


def kept(squares: list[Vector], ranks: NDArray[np.int64]) -> float:
    return math.fsum(float(np.sum(one[:r])) for one, r in zip(squares, ranks, strict=True))


def cost(costs: list[int], ranks: NDArray[np.int64]) -> int:
    return int(np.dot(costs, ranks))


def every_choice(squares: list[Vector], costs: list[int]) -> list[tuple[int, float]]:
    """Cost and kept energy of all ranks there are."""
    choices = itertools.product(*(range(len(one) + 1) for one in squares))
    return [(cost(costs, np.array(ranks)), kept(squares, np.array(ranks))) for ranks in choices]


def by_programme(squares: list[Vector], costs: list[int], budget: int) -> Vector:
    """Most that can be kept at every budget up to this one, taking in one matrix after the other."""
    best = np.zeros(budget + 1)
    for one, price in zip(squares, costs, strict=True):
        prefix = np.concatenate([[0.0], np.cumsum(one)])
        tried = [best[: budget + 1 - r * price] + prefix[r] for r in range(min(len(one), budget // price) + 1)]
        best = np.max([np.concatenate([np.full(budget + 1 - len(t), -np.inf), t]) for t in tried], axis=0)
        best = np.maximum.accumulate(best)
    return best


def by_greedy(squares: list[Vector], costs: list[int]) -> list[tuple[int, float]]:
    """Cost and kept energy after every direction, by descending σ²/c."""
    items = sorted(((v / c, v, c) for one, c in zip(squares, costs, strict=True) for v in one), reverse=True)
    spent = itertools.accumulate((c for *_, c in items), initial=0)
    return list(zip(spent, itertools.accumulate((v for _, v, _ in items), initial=0.0), strict=True))


def descending(values: list[float]) -> Vector:
    return np.sort(np.array(values, dtype=np.float64))[::-1]


# Small integers make ties of value, of density and of cost; floats make none.
small = st.lists(st.integers(0, 5), max_size=4) | st.lists(st.floats(0.0, 1.0), max_size=4)
models = st.lists(st.tuples(small, st.integers(1, 12)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(models, st.integers(0, 60))
def test_no_ranks_keep_more(model: list[tuple[list[float], int]], budget: int) -> None:
    squares, costs = [descending(values) for values, _ in model], [price for _, price in model]
    ranks = allocate(squares, costs, budget)
    assert cost(costs, ranks) <= budget
    best = max(energy for price, energy in every_choice(squares, costs) if price <= budget)
    assert kept(squares, ranks) == pytest.approx(best, rel=1e-12, abs=1e-300)  # two orders of summation


@settings(max_examples=100, deadline=None)
@given(models, st.floats(0.01, 1.0))
def test_no_fewer_parameters_keep_a_share(model: list[tuple[list[float], int]], share: float) -> None:
    squares, costs = [descending(values) for values, _ in model], [price for _, price in model]
    total = math.fsum(float(np.sum(one)) for one in squares)
    ranks = for_energy(squares, costs, share)
    enough = share * total * (1 - 2e-12)  # for_energy allows for sums rounded by 1e-12
    assert kept(squares, ranks) >= enough
    fewest = min(price for price, energy in every_choice(squares, costs) if energy >= share * total * (1 - 0.5e-12))
    assert cost(costs, ranks) <= fewest


def flat(costs: list[int], length: int) -> list[Vector]:
    return [np.full(length, float(price)) for price in costs]


def powers(costs: list[int], length: int, seed: int) -> list[Vector]:
    generator = np.random.default_rng(seed)
    decays = generator.uniform(0.2, 3.0, len(costs))
    scales = generator.uniform(0.3, 3.0, len(costs))
    return [s * np.arange(1.0, length + 1) ** -a for a, s in zip(decays, scales, strict=True)]


@pytest.mark.parametrize(
    ("squares", "costs"),
    [
        (powers([6, 10, 15] * 3, 20, 0), [6, 10, 15] * 3),  # pairwise common divisors, none of all three
        (powers([12, 20, 20, 28] * 2, 20, 1), [12, 20, 20, 28] * 2),  # in units of 4
        (powers(list(range(11, 23)), 12, 2), list(range(11, 23))),  # every matrix a class of its own
        (flat([6, 10, 15] * 3, 20), [6, 10, 15] * 3),  # all densities equal: sums of subsets
        (flat([29, 31, 37], 12), [29, 31, 37]),
        ([one + 1.0 for one in flat([6, 10, 15] * 2, 20)], [6, 10, 15] * 2),  # nearly so, and the greedy order is clear
    ],
)
def test_optimum_of_larger_models(squares: list[Vector], costs: list[int]) -> None:
    whole = sum(len(one) * price for one, price in zip(squares, costs, strict=True))
    best = by_programme(squares, costs, whole + 5)
    for budget in {*range(0, whole + 5, whole // 40), min(costs) - 1, whole - 1}:
        ranks = allocate(squares, costs, budget)
        assert cost(costs, ranks) <= budget
        assert kept(squares, ranks) == pytest.approx(best[budget], rel=1e-12)


def test_optimum_far_from_greedy() -> None:
    """Costs with no common divisor and one density: to spend all takes steps of up to a hundred directions."""
    costs = [101, 103, 107]
    squares, whole = flat(costs, 100), 100 * sum(costs)
    best = by_programme(squares, costs, whole)
    for budget in range(whole // 20, whole, whole // 37):
        assert kept(squares, allocate(squares, costs, budget)) == best[budget]


def test_what_cannot_be_paid_for_does_not_blur_the_rest() -> None:
    """Both of the small ones fit, though one in 10⁹ of the other, and that one in 10⁹ of what does not fit."""
    assert allocate([[0.85, 0.1], [3.5e-10], [5.7e-19]], [22, 1, 4], 12).tolist() == [0, 1, 1]


def test_greedy_is_right_where_it_spends_all_and_wrong_between() -> None:
    squares, costs = powers([6, 10, 15] * 3, 20, 3), [6, 10, 15] * 3
    steps = by_greedy(squares, costs)
    for spent, energy in steps:
        assert kept(squares, allocate(squares, costs, spent)) == pytest.approx(energy, rel=1e-12)
    better = 0
    for (spent, energy), (following, _) in itertools.pairwise(steps):
        found = kept(squares, allocate(squares, costs, following - 1))
        assert found >= energy * (1 - 1e-12)
        better += found > energy * (1 + 1e-9)
        assert spent <= following - 1 or following == spent
    assert better > len(steps) / 4


# Shapes of a small BERT: attention, both halves of the feed-forward, a table of words.
BERT = [(384, 384)] * 16 + [(1536, 384), (384, 1536)] * 4 + [(30522, 384)]


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_uniform_at_equal_parameters(seed: int) -> None:
    costs = [sum(shape) for shape in BERT]
    generator = np.random.default_rng(seed)
    squares = [np.arange(1.0, 385.0) ** -generator.uniform(0.0, 4.0) * generator.uniform(0.5, 2.0) for _ in BERT]
    for rank in (1, 2, 3, 7, 8, 16, 31, 64, 200, 383, 384):
        budget = uniform_cost(costs, rank, largest=[384] * len(BERT))
        ranks = allocate(squares, costs, budget)
        assert cost(costs, ranks) <= budget
        left = math.fsum(float(np.sum(one[r:])) for one, r in zip(squares, ranks, strict=True))
        uniform = math.fsum(float(np.sum(one[rank:])) for one in squares)
        assert left <= uniform * (1 + 1e-12)


def test_never_worse_than_uniform_far_down_the_tail() -> None:
    """What is left may be 10⁻²⁰ of the energy, and is still the least."""
    squares = [np.concatenate([[1.0], np.full(20, 1e-20 * s)]) for s in (1.0, 3.0, 1.5)]
    for rank in range(1, 21):
        budget = uniform_cost([4, 10, 25], rank, largest=[21] * 3)
        ranks = allocate(squares, [4, 10, 25], budget)
        left = math.fsum(float(np.sum(one[r:])) for one, r in zip(squares, ranks, strict=True))
        assert left <= math.fsum(float(np.sum(one[rank:])) for one in squares) * (1 + 1e-12)
        head, tail = [one[:1] for one in squares], [one[1:] for one in squares]
        assert np.all(ranks >= 1)
        assert kept(head, ranks) == 3.0
        assert kept(tail, ranks - 1) == pytest.approx(by_programme(tail, [4, 10, 25], budget - 39)[-1], rel=1e-12)


@given(models, st.integers(0, 60), st.integers(1, 9))
def test_units_do_not_matter(model: list[tuple[list[float], int]], budget: int, unit: int) -> None:
    squares, costs = [descending(values) for values, _ in model], [price for _, price in model]
    ranks = allocate(squares, costs, budget)
    larger = allocate([4.0 * one for one in squares], [unit * price for price in costs], unit * budget + unit - 1)
    assert larger.tolist() == ranks.tolist()


def test_directions_of_no_energy_are_not_paid_for() -> None:
    assert allocate([[4.0, 0.0, 0.0], [1.0, 0.0]], [3, 5], 10**12).tolist() == [1, 1]


def test_a_largest_rank_is_kept_to() -> None:
    squares = [np.array([9.0, 8.0, 7.0]), np.array([1.0, 1.0])]
    assert allocate(squares, [2, 3], 100, largest=[1, 5]).tolist() == [1, 2]
    assert allocate(squares, [2, 3], 6, largest=[1, 0]).tolist() == [1, 0]


def test_equal_values_go_to_the_first_matrix_first() -> None:
    assert allocate([[1.0, 1.0], [1.0, 1.0]], [3, 3], 9).tolist() == [2, 1]


def test_nothing_at_all() -> None:
    assert allocate([], [], 5).tolist() == []
    assert allocate([[], [1.0]], [2, 3], 2).tolist() == [0, 0]
    assert for_energy([[0.0], [0.0]], [1, 1], 0.9).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("squares", "costs", "budget", "said"),
    [
        ([[1.0]], [1, 2], 3, "1 spectra for 2 costs"),
        ([[1.0], [1.0, 2.0]], [1, 1], 3, r"squares\[1\]"),
        ([[-1.0]], [1], 3, r"squares\[0\]"),
        ([[math.nan]], [1], 3, r"squares\[0\]"),
        ([[1.0]], [0], 3, r"costs\[0\] = 0"),
        ([[1.0]], [1.5], 3, r"costs\[0\] = 1.5"),
        ([[1.0]], [1], -1, "budget = -1"),
    ],
)
def test_what_is_no_model_is_refused(squares: list[list[float]], costs: list[int], budget: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        allocate(squares, costs, budget)


def test_a_share_needs_directions_that_hold_it() -> None:
    with pytest.raises(ValueError, match="outside"):
        for_energy([[1.0]], [1], 0.0)
    with pytest.raises(UsageError, match=r"hold 0\.5 of the energy"):
        for_energy([[1.0]], [1], 0.6, totals=[2.0])
    assert for_energy([[1.0]], [1], 0.5, totals=[2.0]).tolist() == [1]
    with pytest.raises(UsageError, match=r"hold 0\.75"):
        for_energy([[2.0, 1.0, 1.0]], [1], 0.8, largest=[2])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_a_share_of_a_model_takes_the_fewest_parameters(share: float) -> None:
    """One parameter less does not do."""
    costs = [sum(shape) for shape in BERT]
    squares = powers(costs, 384, 11)
    target = share * math.fsum(float(np.sum(one)) for one in squares)
    ranks = for_energy(squares, costs, share)
    assert kept(squares, ranks) >= target * (1 - 1e-12)
    assert kept(squares, allocate(squares, costs, cost(costs, ranks) - 1)) < target


# Curves -----------------------------------------------------------------------------------------------------------


def test_curve_of_known_spectra() -> None:
    squares, costs = powers([6, 10, 15], 20, 5), [6, 10, 15]
    total = math.fsum(float(np.sum(one)) for one in squares)
    budgets = [0, 7, 31, 62, 200, 620, 1000]
    curve = error_curve(squares, costs, budgets)
    most = by_programme(squares, costs, max(budgets))
    for at, budget in enumerate(budgets):
        best = math.sqrt(max(0.0, 1 - most[budget] / total))
        assert curve.high[at] == pytest.approx(best, abs=1e-7)  # √ of a difference of sums rounded by 1e-15
        rank = min(budget // 31, 20)
        assert curve.uniform[at] == rank
        equal = math.sqrt(math.fsum(float(np.sum(one[rank:])) for one in squares) / total)
        assert curve.uniform_high[at] == pytest.approx(equal, rel=1e-12)
    assert np.array_equal(curve.low, curve.high)
    assert np.array_equal(curve.least, curve.high)
    assert np.all(curve.high <= curve.uniform_high)
    assert curve.high[0] == 1.0
    assert curve.high[-1] == curve.uniform_high[-1] == 0.0


@settings(deadline=None)
@given(st.integers(0, 10_000), st.tuples(st.integers(1, 19), st.integers(1, 19), st.integers(1, 20)))
def test_curve_of_truncated_spectra_holds_the_truth(seed: int, known: tuple[int, int, int]) -> None:
    """Values below and above the true ones, a tail of which only the energy and the largest value are known."""
    generator = np.random.default_rng(seed)
    costs = [6, 10, 15]
    truth = powers(costs, 20, seed)
    low = [descending(one[:k] * generator.uniform(0.9, 1.0, k)) for one, k in zip(truth, known, strict=True)]
    top = [np.minimum.accumulate(one[:k] * 1.1) for one, k in zip(truth, known, strict=True)]
    high = [
        np.concatenate([a, np.full(20 - len(a), np.append(b, 0.0)[len(a)])]) for a, b in zip(top, truth, strict=True)
    ]
    totals = [float(np.sum(one)) for one in truth]
    budgets = list(range(0, 620, 50))
    curve = error_curve(low, costs, budgets, high=high, totals=totals)
    whole = math.fsum(totals)
    assert curve.low[0] == curve.high[0] == 1.0  # nothing is in doubt where nothing is taken

    def error(ranks: NDArray[np.int64]) -> float:
        return math.sqrt(math.fsum(float(np.sum(one[r:])) for one, r in zip(truth, ranks, strict=True)) / whole)

    for at, budget in enumerate(budgets):
        assert cost(costs, curve.ranks[at]) <= budget
        assert curve.low[at] - 1e-12 <= error(curve.ranks[at]) <= curve.high[at] + 1e-12  # sums rounded otherwise
        equal = np.minimum(curve.uniform[at], known)
        assert curve.uniform_low[at] - 1e-12 <= error(equal) <= curve.uniform_high[at] + 1e-12
        assert curve.least[at] <= error(allocate(truth, costs, budget)) + 1e-7
        assert curve.high[at] <= curve.uniform_high[at] + 1e-12


def test_curve_refuses_upper_bounds_below_the_values() -> None:
    with pytest.raises(ValueError, match=r"high\[0\]"):
        error_curve([[2.0, 1.0]], [1], [1], high=[[1.0, 1.0]])


def test_curve_of_nothing_is_not_a_number() -> None:
    assert np.isnan(error_curve([[0.0]], [1], [1]).high).all()


def test_equal_ranks_are_paid_for() -> None:
    assert uniform_rank([3, 5], 7, largest=[4, 4]) == 0
    assert uniform_rank([3, 5], 10**9, largest=[4, 9]) == 9
    assert uniform_cost([3, 5], 9, largest=[4, 9]) == 57


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 120),
)
def test_uniform_rank_is_the_largest_that_is_paid_for(matrices: list[tuple[int, int]], budget: int) -> None:
    costs, limits = zip(*matrices, strict=True)

    def price(rank: int) -> int:
        return sum(min(rank, limit) * cost for cost, limit in matrices)

    want = max(rank for rank in range(max(limits) + 1) if price(rank) <= budget)
    assert price(uniform_rank(costs, budget, largest=limits)) == price(want)
    assert uniform_rank(costs, budget, largest=limits) <= want
