"""How far two rank maps agree, each figure beside what chance or a uniform map would give; and the map of an SVD.

The SVD's map is the one of hindsight: of a full fine-tuning's update it keeps the directions that leave the least
error, as many in all as a budget kept during another training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectra.errors import MismatchError, UsageError
from spectra.importance.rank_map import RankMap

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Two rank maps, compared over the matrices that both have.

    Attributes
    ----------
    matrices : int
        How many both have.
    spearman : float
        Rank correlation of the two maps' ranks, ties sharing their mean place; NaN where a map is uniform.
    overlap : float
        Σ_m min(a_m/Σa, b_m/Σb): the share of one budget that lies where the other's does, whatever their sizes; one
        less the total variation of the two.
    uniform_overlaps : (float, float)
        What a map of equal ranks would reach against the first, and against the second: below that the other map is no
        better a guess than no map.
    common_directions : float or None
        Of the smaller number of kept directions, the share that both keep; None where the maps are not over the same
        directions.
    chance_common : float or None
        Its expectation for directions drawn at random: the larger number kept, of all.
    """

    matrices: int
    spearman: float
    overlap: float
    uniform_overlaps: tuple[float, float]
    common_directions: float | None = None
    chance_common: float | None = None

    def __str__(self) -> str:
        same = (
            ""
            if self.common_directions is None
            else f"; {self.common_directions:.1%} of the directions are common (at random {self.chance_common:.1%})"
        )
        first, second = self.uniform_overlaps
        return (
            f"over {self.matrices} matrices: Spearman {self.spearman:+.3f}; {self.overlap:.1%} of the budget lies in "
            f"the same matrices (equal ranks: {first:.1%} with the first, {second:.1%} with the second){same}"
        )


def agreement(first: RankMap, second: RankMap) -> Agreement:
    """Compare two rank maps.

    Parameters
    ----------
    first, second : RankMap
        Over matrices of the same names.

    Raises
    ------
    MismatchError
        If they have no matrix in common, or one keeps nothing in those.

    Examples
    --------
    >>> found = agreement(RankMap.of({"a": 1, "b": 3}), RankMap.of({"a": 3, "b": 5}))
    >>> found.spearman, round(found.overlap, 3), found.uniform_overlaps
    (1.0, 0.875, (0.75, 0.875))
    """
    names = [name for name in first.modules if name in set(second.modules)]
    if not names:
        raise MismatchError(
            f"the maps have no matrix in common: {first.modules[0]} … here, {second.modules[0]} … there"
        )
    a, b = (np.array([ranks.final[name] for name in names], dtype=np.float64) for ranks in (first, second))
    for ranks, which in ((a, "first"), (b, "second")):
        if not ranks.sum():
            raise MismatchError(f"the {which} map keeps nothing in the {len(names)} matrices that both have")
    even = np.ones(len(names))
    common = _common(first, second)
    return Agreement(
        len(names),
        _correlation(_places(a), _places(b)),
        _overlap(a, b),
        (_overlap(a, even), _overlap(b, even)),
        *(common or (None, None)),
    )


def svd_rank_map(
    squares: Mapping[str, ArrayLike], kept: int, *, shapes: Mapping[str, tuple[int, int]], by: str = "directions"
) -> RankMap:
    """The ranks that leave the least error of given updates, under a budget over all of them.

    Parameters
    ----------
    squares : mapping of str to float array
        σ² of each update's singular values, descending.
    kept : int
        The budget: directions in all, or parameters.
    shapes : mapping of str to (int, int)
        (out, in) of each.
    by : {"directions", "parameters"}
        What a direction costs: 1, as AdaLoRA counts, or out + in.

    Returns
    -------
    RankMap

    Raises
    ------
    UsageError
        If `by` is neither.

    Notes
    -----
    `spectra.theory.allocation.allocate` finds the ranks and says why they are the best.

    Examples
    --------
    >>> shapes = {"a": (4, 4), "b": (4, 4)}
    >>> svd_rank_map({"a": [9.0, 4.0], "b": [1.0, 0.5]}, 3, shapes=shapes).final
    {'a': 2, 'b': 1}
    """
    from spectra.theory.allocation import allocate

    if by not in ("directions", "parameters"):
        raise UsageError(f'a budget counts "directions" or "parameters", not {by!r}')
    energies = [np.asarray(values, dtype=np.float64) for values in squares.values()]
    costs = [1 if by == "directions" else sum(shapes[name]) for name in squares]
    ranks = allocate(energies, costs, kept)
    source = f"least error of the update under a budget of {kept:,} {by}"
    chosen = {name: int(rank) for name, rank in zip(squares, ranks, strict=True)}
    return RankMap.of(chosen, shapes=shapes, rule={"source": source, "budget": kept, "by": by})


def _overlap(a: Vector, b: Vector) -> float:
    return float(np.minimum(a / a.sum(), b / b.sum()).sum())


def _places(values: Vector) -> Vector:
    """Places in ascending order, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    places: Vector = (ends - (counts - 1) / 2.0)[inverse]
    return places


def _correlation(a: Vector, b: Vector) -> float:
    """Pearson's correlation; NaN where one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip(a @ b / size, -1.0, 1.0)) if size else math.nan


def _common(first: RankMap, second: RankMap) -> tuple[float, float] | None:
    """Share of common directions and its expectation, where both maps choose among the same."""
    if first.kept is None or second.kept is None or first.modules != second.modules:
        return None
    if [len(mask) for mask in first.kept] != [len(mask) for mask in second.kept]:
        return None
    a, b = np.concatenate(first.kept), np.concatenate(second.kept)
    fewer, more = sorted((int(a.sum()), int(b.sum())))
    return float((a & b).sum()) / fewer, more / len(a)
