"""Where a noisy rising curve crosses a target that is noisy itself: an isotonic fit, and an interval by drawing.

The curve is a few mean metrics over log d. The fit is the nearest nondecreasing one, weighted by numbers of seeds, and
straight between dimensions; it crosses where it first reaches the target. The interval is the central 95 % of the
crossings of curves and references drawn around what was measured.

One variance is shared by the reference and the dimensions beside the crossing. With three seeds each, resampling the
seeds themselves would draw from three points: it misses a third of the variance, and all of its uncertainty, and held
the true crossing of simulated searches in 72 to 83 of 100. So every draw takes a variance from what the pooled one
leaves possible, s²·f/χ²_f with f degrees of freedom, then means around the measured means, which makes the noise
Student's: 92 to 96 of 100, and 90 where the reference is three times as noisy as a subspace. Of dimensions far away the
variance tells little: where training fails every seed gives the majority class, without any spread. As long as no
dimension beside the crossing has two seeds, those with one get at least the binomial noise of their held-out rows.

The interval speaks of other seeds on the same held-out rows. Other rows would move reference and curve together, by how
much cannot be told from means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
DRAWS = 2000  # the ends of a 95 % interval are then the 50th draw from either side: 7 % of their own distance, or so
_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Level:
    """Mean metric of some seeds, with its 95 % interval; without one, `low` and `high` equal the mean."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Bracket:
    """Dimensions between which the fit crosses the target.

    Attributes
    ----------
    low, high : int or None
        The last dimension below, the first that reaches; None where all reach, or none.
    disputed : tuple of int
        Both, and those that the fit pools with one of them since their means fall where they should rise.
    """

    low: int | None
    high: int | None
    disputed: tuple[int, ...]


@dataclass(frozen=True)
class Crossing:
    """Estimate of the dimension at which the target is reached.

    Attributes
    ----------
    target : float
    dimension : float or None
        None where every dimension reaches the target, or none does.
    low, high : float or None
        95 % interval; None where it is open. Where all dimensions reach, `high` is at least the smallest of them;
        where none does, `low` is at most the largest.
    bracket : Bracket
    """

    target: float
    dimension: float | None
    low: float | None
    high: float | None
    bracket: Bracket


def isotonic(values: Any, weights: Any) -> Floats:
    """Nondecreasing fit of least weighted squares.

    Parameters
    ----------
    values : array of shape (..., k)
        Any number of curves.
    weights : array of shape (k,)
        Positive.

    Returns
    -------
    array of shape (..., k)
        fit_i = max_{a ≤ i} min_{b ≥ i} of the weighted mean of values a … b: the min-max form of Robertson, Wright and
        Dykstra, *Order Restricted Statistical Inference* (1988), theorem 1.4.4, which takes all curves at once.

    Examples
    --------
    >>> isotonic([1.0, 3.0, 2.0, 4.0], [1, 1, 1, 1])
    array([1. , 2.5, 2.5, 4. ])
    >>> isotonic([3.0, 0.0], [1, 2])
    array([1., 1.])
    """
    y, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    k = y.shape[-1]
    sums = np.concatenate([np.zeros((*y.shape[:-1], 1)), np.cumsum(y * w, axis=-1)], axis=-1)  # (..., k + 1)
    counts = np.concatenate([[0.0], np.cumsum(w)])
    fit = np.full(y.shape, -np.inf)
    for a in range(k):
        means = (sums[..., a + 1 :] - sums[..., a : a + 1]) / (counts[a + 1 :] - counts[a])  # of a … b, b = a … k − 1
        least = np.minimum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]  # over b ≥ i
        fit[..., a:] = np.maximum(fit[..., a:], least)
    return fit


def first_reach(places: Any, fit: Any, target: Any) -> Floats:
    """Where nondecreasing curves, straight between their points, first reach a target.

    Parameters
    ----------
    places : array of shape (k,)
        Ascending.
    fit : array of shape (..., k)
        Nondecreasing along the last axis.
    target : array of shape (...)

    Returns
    -------
    array of shape (...)
        −∞ where the first point reaches already, ∞ where none does.

    Examples
    --------
    >>> first_reach([0.0, 1.0, 3.0], [[0.0, 1.0, 2.0], [0.0, 0.0, 1.0], [2.0, 2.0, 2.0]], 1.5)
    array([  2.,  inf, -inf])
    """
    x, y = np.asarray(places, dtype=np.float64), np.asarray(fit, dtype=np.float64)
    t = np.broadcast_to(np.asarray(target, dtype=np.float64), y.shape[:-1])
    after = np.count_nonzero(y < t[..., None], axis=-1)  # index of the first point that reaches
    inner = np.clip(after, 1, max(len(x) - 1, 1))
    if len(x) > 1:
        low = np.take_along_axis(y, inner[..., None] - 1, axis=-1)[..., 0]
        high = np.take_along_axis(y, inner[..., None], axis=-1)[..., 0]
        rise = np.where(high > low, high - low, 1.0)
        found = x[inner - 1] + (t - low) / rise * (x[inner] - x[inner - 1])
    else:
        found = np.full(t.shape, np.nan)
    return np.where(after == 0, -np.inf, np.where(after == len(x), np.inf, found))


def target_of(full: Any, *, share: float, floor: float | None) -> Any:
    """Give the metric to reach: share·full, or the share of what full adds to a floor, where there is one.

    Examples
    --------
    >>> target_of(0.8, share=0.75, floor=None), target_of(0.8, share=0.75, floor=0.4)
    (0.6000000000000001, 0.7000000000000001)
    """
    return share * full if floor is None else floor + share * (full - floor)


def bracket(curve: Mapping[int, Sequence[float]], target: float) -> Bracket:
    """Dimensions between which the fit of some seeds' metrics crosses a target.

    Parameters
    ----------
    curve : mapping of int to sequence of float
        Metrics of the seeds at each dimension; at least one of each.
    target : float

    Examples
    --------
    >>> bracket({16: [0.5], 64: [0.6], 256: [0.8]}, 0.7)
    Bracket(low=64, high=256, disputed=(64, 256))
    >>> bracket({16: [0.5], 64: [0.75], 128: [0.6], 256: [0.8]}, 0.7)
    Bracket(low=128, high=256, disputed=(64, 128, 256))
    """
    dimensions = sorted(curve)
    fit = _fitted(dimensions, curve)
    after = int(np.count_nonzero(fit < target))
    ends = [i for i in (after - 1, after) if 0 <= i < len(dimensions)]
    pooled = tuple(d for d, value in zip(dimensions, fit, strict=True) if value in fit[ends])
    return Bracket(
        dimensions[after - 1] if after > 0 else None,
        dimensions[after] if after < len(dimensions) else None,
        pooled,
    )


def crossing(
    full: Sequence[float],
    curve: Mapping[int, Sequence[float]],
    *,
    share: float,
    floor: float | None = None,
    held_out: int | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Crossing:
    """Estimate the least dimension that reaches a share of the reference's metric, with its interval.

    Parameters
    ----------
    full : sequence of float
        Metrics of the reference's seeds.
    curve : mapping of int to sequence of float
        Metrics of the seeds at each dimension; at least one dimension, one of each.
    share : float
        Of the reference's mean.
    floor : float, optional
        Where given, the share is of what the reference adds to it.
    held_out : int, optional
        Rows that every metric is an accuracy over: their binomial noise stands in for seeds where there is one alone.
        Without it, and with one seed everywhere, there is no interval.
    seed, draws : int
        Of the drawing.

    Examples
    --------
    >>> found = crossing([0.80, 0.81, 0.79], {64: [0.60, 0.62, 0.61], 128: [0.75, 0.76, 0.74]}, share=0.9)
    >>> round(found.dimension), found.low < found.dimension < found.high
    (110, True)
    """
    dimensions = sorted(curve)
    places = np.log(dimensions)
    mean = float(np.mean(full))
    target = float(target_of(mean, share=share, floor=floor))
    between = bracket(curve, target)
    noise = _Noise.of(full, [curve[d] for d in between.disputed], held_out)
    fit = _fitted(dimensions, curve)
    at = float(first_reach(places, fit, target))
    low, high = noise.interval_of_crossing(full, curve, share=share, floor=floor, seed=seed, draws=draws)
    return Crossing(
        target=target,
        dimension=math.exp(at) if math.isfinite(at) else None,
        low=low,
        high=high,
        bracket=between,
    )


def levels(
    full: Sequence[float], curve: Mapping[int, Sequence[float]], target: float, *, held_out: int | None = None
) -> tuple[Level, dict[int, Level]]:
    """Means with their intervals: of the reference, and of every dimension.

    Examples
    --------
    >>> full, curve = levels([0.8], {64: [0.75], 16: [0.5]}, target=0.7, held_out=100)
    >>> full.high - full.low > 0.1, list(curve)  # one seed: binomial noise of 100 rows
    (True, [16, 64])
    """
    disputed = bracket(curve, target).disputed if curve else ()
    noise = _Noise.of(full, [curve[d] for d in disputed], held_out)
    return noise.level(full, noise.full), {d: noise.level(curve[d]) for d in sorted(curve)}


@dataclass(frozen=True)
class _Noise:
    """What is known of the noise of one training's metric.

    Parameters
    ----------
    variance : float
        Pooled over seeds.
    freedom : int
        Its degrees of freedom; 0: no variance is known.
    full : float
        Factor of the standard deviation for the reference: what its own seeds say, where that is more. All weights
        and a subspace need not be equally noisy, and the reference moves the target of every dimension.
    rows : int or None
        Held-out rows whose binomial noise a single seed has at least; None: it has the pooled variance.
    """

    variance: float
    freedom: int
    full: float
    rows: int | None

    @classmethod
    def of(cls, full: Sequence[float], deciding: Sequence[Sequence[float]], held_out: int | None) -> _Noise:
        groups = [full, *deciding]
        freedom = sum(len(group) - 1 for group in groups)
        squares = math.fsum(float(np.var(group)) * len(group) for group in groups)
        # Accuracies are multiples of 1/rows: seeds that agree to the last one still differ by less than a row.
        rounding = 0.0 if held_out is None else 1.0 / (12.0 * held_out**2)
        variance = max(squares / freedom, rounding) if freedom else 0.0
        own = float(np.var(full, ddof=1)) if len(full) > 1 else 0.0
        repeated = any(len(group) > 1 for group in deciding)
        factor = math.sqrt(max(own / variance, 1.0)) if variance > 0 else 1.0
        return cls(variance, freedom, factor, None if repeated else held_out)

    def binomial(self, metrics: Sequence[float]) -> float:
        """Standard deviation that held-out rows alone give one seed; 0 where the pooled variance speaks for it."""
        if self.rows is None or len(metrics) > 1:
            return 0.0
        rows = self.rows + 4  # two more right and two more wrong (Agresti and Coull 1998): 100 % is no certainty
        share = (self.rows * min(max(metrics[0], 0.0), 1.0) + 2) / rows
        return math.sqrt(share * (1.0 - share) / rows)

    def level(self, metrics: Sequence[float], factor: float = 1.0) -> Level:
        mean, count = float(np.mean(metrics)), len(metrics)
        student = float(stdtrit(self.freedom, _ENDS[1])) if self.freedom else 0.0
        pooled = student * factor * math.sqrt(self.variance / count)
        half = max(pooled, 1.96 * self.binomial(metrics))
        return Level(mean, mean - half, mean + half, count)

    def drawn(self, full: Sequence[float], groups: Sequence[Sequence[float]], seed: int, draws: int) -> Floats:
        """Means as they might have been, of shape (draws, 1 + groups), the reference first."""
        random = np.random.default_rng(seed)
        every = [full, *groups]
        spread = np.array([self.full] + [1.0] * len(groups)) / np.sqrt([len(group) for group in every])
        deviation = np.sqrt(self.variance * self.freedom / random.chisquare(max(self.freedom, 1), (draws, 1)))
        errors = np.maximum(deviation * spread, [self.binomial(group) for group in every])
        normal = random.standard_normal((draws, len(every)))
        return np.asarray(np.array([np.mean(group) for group in every]) + errors * normal)

    def interval_of_crossing(
        self,
        full: Sequence[float],
        curve: Mapping[int, Sequence[float]],
        *,
        share: float,
        floor: float | None,
        seed: int,
        draws: int,
    ) -> tuple[float | None, float | None]:
        if self.freedom == 0 and self.rows is None:
            return None, None
        dimensions = sorted(curve)
        places = np.log(dimensions)
        means = self.drawn(full, [curve[d] for d in dimensions], seed, draws)
        targets = target_of(means[:, 0], share=share, floor=floor)
        fits = isotonic(means[:, 1:], [len(curve[d]) for d in dimensions])
        # An order statistic, not a mean of two: crossings may be infinite.
        low, high = np.quantile(first_reach(places, fits, targets), _ENDS, method="inverted_cdf")
        return (
            None if low == -math.inf else math.exp(min(low, places[-1])),
            None if high == math.inf else math.exp(max(high, places[0])),
        )


def _fitted(dimensions: Sequence[int], curve: Mapping[int, Sequence[float]]) -> Floats:
    return isotonic([np.mean(curve[d]) for d in dimensions], [len(curve[d]) for d in dimensions])
