"""Two updates over all their matrices: pooled by energy where energy is what is shared out, medians elsewhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spectra.pairwise.ranks import RANKS
from spectra.pairwise.rows import EPSILONS, SHARED, SIDES, MatrixRow, PairRow, UpdateRow
from spectra.theory.chance import capture_both_mean
from spectra.values import Vector

KINDS = (*SIDES, "both")
WAYS = ("a_in_b", "b_in_a")


@dataclass(frozen=True)
class PooledUpdate:
    """One update over the matrices that two updates change. Counts of intruders are means a matrix."""

    position: int
    label: str
    matrices: int
    relative: float  # ‖Δ‖/‖W‖ of all of them together
    limits: tuple[int, int]  # least and greatest rank that it can have
    factored: bool
    resolved: float  # median count of leading directions whose subspace is resolved
    resolved_nf4: float
    drowned: int  # matrices in which rounding could make every direction
    matched: int  # matrices whose leading directions were looked for in the base
    directions: int  # those directions, `TOP` a matrix where it has as many
    clear: int  # of them determined: rounding and iteration cannot have turned them by 30°
    intruders: tuple[float, ...] = field(repr=False)  # on `EPSILONS`; empty where none were looked for
    chance: tuple[float, ...] = field(repr=False)

    def count(self, epsilon: float) -> int:
        """Intruders of all matrices together, at one of `EPSILONS`."""
        return round(self.intruders[EPSILONS.index(epsilon)] * self.matched) if self.intruders else 0


@dataclass(frozen=True)
class Captured:
    """What one update's leading spaces hold of another's squared norm.

    `share`, `best` and `random` are told at `ranks`: the adapter's own rank, where an adapter catches or is caught,
    else the largest of `RANKS` that is known. The curves stand on `RANKS`, NaN past what is known of every matrix.
    """

    ranks: tuple[int, int]  # least and greatest over matrices; (0, 0) where nothing is known
    limit: int  # most directions that the catching update has in any matrix, as far as they are known
    share: float
    best: float
    random: float
    left: Vector = field(repr=False)
    right: Vector = field(repr=False)
    both: Vector = field(repr=False)
    optimum: Vector = field(repr=False)
    chance: Vector = field(repr=False)

    @property
    def known(self) -> bool:
        """Whether there is a share at all."""
        return math.isfinite(self.share)


@dataclass(frozen=True)
class PooledPair:
    """Two updates over the matrices that both change. Tables of overlaps are medians over matrices."""

    a: int
    b: int
    matrices: int
    cosine: float  # of the two updates, each taken as one long vector
    cosine_std: float
    relative: tuple[float, float]  # ‖Δ‖/‖W‖ of each, over these matrices
    rank: int  # at which shared directions are counted; 0 where they cannot be
    overlap: Mapping[str, Vector] = field(repr=False)
    above: Mapping[str, Vector] = field(repr=False)
    chance: Mapping[str, float]  # mean overlap of random subspaces at `rank`
    resolved: tuple[int, int]  # median resolved rank of each
    counted: int  # matrices that have `rank` directions in both
    resolved_matrices: int  # in which both resolve `rank` directions
    captured: Mapping[str, Captured]

    @property
    def deviations(self) -> float:
        """Cosine in standard deviations of that of random updates."""
        return self.cosine / self.cosine_std if self.cosine_std > 0 else math.nan

    def shared(self, side: str) -> float:
        """Median overlap at `rank`, as a share of the directions."""
        return self._at(self.overlap[side])

    def shared_above(self, side: str) -> float:
        """The same above chance."""
        return self._at(self.above[side])

    @property
    def agreement(self) -> float:
        """Mean of the two sides' shares above chance: an order among pairs, never a claim."""
        return (self.shared_above("left") + self.shared_above("right")) / 2

    def _at(self, table: Vector) -> float:
        place = RANKS.index(self.rank) if self.rank else 0
        return float(table[place, place]) if self.rank else math.nan


def pool_updates(rows: Sequence[MatrixRow], labels: Sequence[str]) -> tuple[PooledUpdate, ...]:
    """Pool each update over the matrices that at least two change.

    Parameters
    ----------
    rows : sequence of MatrixRow
        Every row of the geometry.
    labels : sequence of str
        Short names of the updates.
    """
    held = [r for r in rows if r.analysed]
    return tuple(_pooled_update(i, label, held) for i, label in enumerate(labels))


def pool_pairs(rows: Sequence[MatrixRow], count: int) -> tuple[PooledPair, ...]:
    """Pool every two updates over the matrices that both change; two without one are left out.

    Parameters
    ----------
    rows : sequence of MatrixRow
        Every row of the geometry.
    count : int
        How many updates there are.
    """
    held = [r for r in rows if r.analysed]
    found = []
    for a in range(count):
        for b in range(a + 1, count):
            both = [r for r in held if (a, b) in r.pairs]
            if both:
                found.append(_pooled_pair(a, b, both))
    return tuple(found)


def pool_groups(
    rows: Sequence[MatrixRow], pair: PooledPair, label: Callable[[MatrixRow], str]
) -> tuple[tuple[str, PooledPair], ...]:
    """Pool one pair over the matrices of each label, in the order in which labels first appear.

    Parameters
    ----------
    rows : sequence of MatrixRow
        Every row of the geometry.
    pair : PooledPair
        The two updates.
    label : callable
        Of a row: its role, its layer.
    """
    members: dict[str, list[MatrixRow]] = {}
    for row in rows:
        if row.analysed and (pair.a, pair.b) in row.pairs:
            members.setdefault(label(row), []).append(row)
    return tuple((said, _pooled_pair(pair.a, pair.b, held)) for said, held in members.items())


def whole_relative(rows: Iterable[MatrixRow], position: int) -> float:
    """Return ‖Δ‖/‖W‖ of one update over matrices taken as one.

    Parameters
    ----------
    rows : iterable of MatrixRow
        Those without a known norm are left out.
    position : int
        Of the update.
    """
    norms = [(r.updates[position].frobenius, r.base_frobenius) for r in rows]
    known = [(delta, base) for delta, base in norms if math.isfinite(delta) and math.isfinite(base)]
    below = sum(base**2 for _, base in known)
    return math.sqrt(sum(delta**2 for delta, _ in known) / below) if below > 0 else math.nan


def rank_within(limit: float) -> int:
    """Return the largest of `RANKS` that is at most a limit; 0 where there is none.

    Parameters
    ----------
    limit : float
        A rank.

    Examples
    --------
    >>> rank_within(10), rank_within(64.0), rank_within(0)
    (8, 64, 0)
    """
    return max((r for r in RANKS if r <= limit), default=0)


def _pooled_update(position: int, label: str, rows: Sequence[MatrixRow]) -> PooledUpdate:
    held = [r for r in rows if r.updates[position].changes]
    mine = [r.updates[position] for r in held]
    matched = [r for r in held if r.updates[position].cosines]
    return PooledUpdate(
        position=position,
        label=label,
        matrices=len(held),
        relative=whole_relative(held, position),
        limits=(min((u.rank_limit for u in mine), default=0), max((u.rank_limit for u in mine), default=0)),
        factored=bool(mine) and all(u.factored for u in mine),
        resolved=_median(u.resolved for u in mine),
        resolved_nf4=_median(u.resolved_nf4 for u in mine),
        drowned=sum(u.drowned for u in mine),
        matched=len(matched),
        directions=sum(len(r.updates[position].cosines) for r in matched),
        clear=sum(sum(r.updates[position].clear) for r in matched),
        intruders=_means([[r.updates[position].intruders(e) for e in EPSILONS] for r in matched]),
        chance=_means([[r.chance_intruders(e) for e in EPSILONS] for r in matched]),
    )


def _pooled_pair(a: int, b: int, rows: Sequence[MatrixRow]) -> PooledPair:
    pairs = [r.pairs[a, b] for r in rows]
    ones, others = [r.updates[a] for r in rows], [r.updates[b] for r in rows]
    products = np.array([x.frobenius * y.frobenius for x, y in zip(ones, others, strict=True)])
    norms = [math.sqrt(sum(u.frobenius**2 for u in side)) for side in (ones, others)]
    whole = norms[0] * norms[1]
    held = [min(x.held, y.held) for x, y in zip(ones, others, strict=True)]
    rank = rank_within(min(_median(held), SHARED))  # a head of two rows does not set the rank of the whole
    place = RANKS.index(rank) if rank else 0
    return PooledPair(
        a=a,
        b=b,
        matrices=len(rows),
        cosine=float(products @ [p.cosine for p in pairs]) / whole,
        cosine_std=float(np.linalg.norm(products * [p.cosine_std for p in pairs])) / whole,
        relative=(whole_relative(rows, a), whole_relative(rows, b)),
        rank=rank,
        overlap={side: _middle([getattr(p, side).overlap for p in pairs]) for side in SIDES},
        above={side: _middle([r.above_chance(r.pairs[a, b], side) for r in rows]) for side in SIDES},
        chance={side: _median(r.chance_overlap[side][place, place] for r in rows) for side in SIDES},
        resolved=(int(_median(u.resolved for u in ones)), int(_median(u.resolved for u in others))),
        counted=sum(n >= rank for n in held),
        resolved_matrices=sum(min(x.resolved, y.resolved) >= rank for x, y in zip(ones, others, strict=True)),
        captured={
            "a_in_b": _captured("a_in_b", rows, pairs, ones, others),
            "b_in_a": _captured("b_in_a", rows, pairs, others, ones),
        },
    )


def _captured(
    way: str, rows: Sequence[MatrixRow], pairs: Sequence[PairRow], caught: Sequence[UpdateRow], net: Sequence[UpdateRow]
) -> Captured:
    """Pool what the leading spaces of `net` hold of `caught`, by the energy of `caught`."""
    energy = np.array([u.frobenius**2 for u in caught])

    def pooled(lines: Sequence[Sequence[float] | Vector]) -> Vector:
        return np.asarray(energy @ np.array(lines, dtype=np.float64) / energy.sum(), dtype=np.float64)

    told = [_told(way, *held) for held in zip(rows, pairs, caught, net, strict=True)]
    share, best, random = (float(f"{v:.12g}") for v in pooled([line[1:] for line in told]))  # all of it is 1
    ranks = [int(line[0]) for line in told]
    return Captured(
        ranks=(min(ranks), max(ranks)),
        limit=max(u.held for u in net),
        share=share,
        best=best,
        random=random,
        optimum=pooled([[u.optimum_at(r) for r in RANKS] for u in caught]),
        chance=pooled([r.chance_captured(u.rank_limit) for r, u in zip(rows, net, strict=True)]),
        **{kind: pooled([p.captured[way][kind] for p in pairs]) for kind in KINDS},
    )


def _told(way: str, row: MatrixRow, pair: PairRow, caught: UpdateRow, net: UpdateRow) -> tuple[float, ...]:
    """Rank at which a matrix' captured share is told, the share there, the best possible and the random one."""
    rank, share = capture_told(way, pair, caught, net)
    random = capture_both_mean(rank, rank, row.sides) if rank else math.nan
    return rank, share, caught.optimum_at(rank), random


def capture_told(way: str, pair: PairRow, caught: UpdateRow, net: UpdateRow) -> tuple[int, float]:
    """Return the rank at which a captured share is told, and the share.

    Parameters
    ----------
    way : str
        ``"a_in_b"`` or ``"b_in_a"``.
    pair : PairRow
        The two updates.
    caught, net : UpdateRow
        The one whose norm is shared out, and the one whose spaces hold it.
    """
    if net.factored and net.held == net.rank_limit and math.isfinite(pair.all_held[way]):
        return net.held, pair.all_held[way]
    rank = rank_within(min(caught.rank_limit if caught.factored else RANKS[-1], net.held))
    return rank, pair.captured[way]["both"][RANKS.index(rank)] if rank else math.nan


def _middle(tables: Sequence[Vector]) -> Vector:
    """Median of each cell over the matrices that have it; NaN where none has."""
    stacked = np.array(tables)
    whole = np.isfinite(stacked).any(axis=0)
    found = np.full(stacked.shape[1:], math.nan)
    found[whole] = np.nanmedian(stacked[:, whole], axis=0)
    return found


def _means(lines: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(v) for v in np.mean(np.array(lines), axis=0)) if lines else ()


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(statistics.median(known)) if known else math.nan
