"""Records of many matrices pooled by energy: a capture curve, a cosine, a count of intruders a pair of updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from spectra.pairwise.ranks import EPSILON, RANKS
from spectra.theory.chance import above_chance, capture_both_mean, cosine_std, overlap_mean
from spectra.values import Vector

Side = Literal["left", "right", "both"]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class PooledCapture:
    """Shares of ‖Δ_a‖² inside the leading r directions of Δ_b, over all matrices that both change.

    Parameters
    ----------
    ranks : tuple of int
        r.
    share : ndarray of shape (len(ranks),)
        Of row and column space together; NaN where a matrix' b holds more than r directions but not that many are
        known. A b of fewer directions gives all it has.
    optimum : ndarray of shape (len(ranks),)
        What the best subspaces of the same rank would hold (Eckart–Young); NaN where not enough values are known.
    chance : ndarray of shape (len(ranks),)
        What random subspaces of the same rank would hold on average.
    """

    ranks: tuple[int, ...]
    share: Vector
    optimum: Vector
    chance: Vector


def pairs_of(records: Iterable[Record], a: int, b: int) -> Iterator[tuple[Record, Mapping[str, Any]]]:
    """Records in which updates a and b (positions, in either order) both change the matrix, each with its pair."""
    for record in records:
        for pair in record.get("pairs", ()):
            if {pair["a"], pair["b"]} == {a, b}:
                yield record, pair


def shares(record: Record, pair: Mapping[str, Any], a: int, b: int, side: Side = "both") -> Vector:
    """Share of ‖Δ_a‖² inside the leading r directions of Δ_b for r in `RANKS`; NaN where r passes what is known.

    Where b has fewer than r directions, and all of them are known, the share is that of all.
    """
    found = pair["capture"]["a_in_b" if pair["a"] == a else "b_in_a"]
    last, all_of_b = found["held"], record["updates"][b]
    curve = [math.nan if share is None else share for share in found[side]]
    if last["rank"] < all_of_b["rank_limit"]:
        return np.array(curve)
    return np.array([last[side] if r > last["rank"] else share for r, share in zip(RANKS, curve, strict=True)])


def capture(records: Sequence[Record], a: int, b: int) -> PooledCapture:
    """Share of Δ_a inside Δ_b over all matrices that both change, weighted by ‖Δ_a‖²."""
    weights, rows = [], []
    for record, pair in pairs_of(records, a, b):
        weights.append(record["updates"][a]["frobenius"] ** 2)
        optimum = [math.nan if share is None else share for share in record["updates"][a]["optimum"]]
        counts = np.minimum(RANKS, record["updates"][b]["rank_limit"])
        shape = record["rows"], record["cols"]
        chance = [capture_both_mean(int(count), int(count), shape) for count in counts]
        rows.append([shares(record, pair, a, b), optimum, chance])
    if not rows:
        nothing = np.full(len(RANKS), math.nan)
        return PooledCapture(RANKS, nothing, nothing, nothing)
    share, best, chance_share = np.average(np.array(rows), axis=0, weights=weights)
    return PooledCapture(RANKS, share, best, chance_share)


def cosine(records: Sequence[Record], a: int, b: int) -> tuple[float, float]:
    """Cosine of two updates over all matrices that both change, and its standard deviation by chance.

    ⟨Δ_a, Δ_b⟩ / (‖Δ_a‖‖Δ_b‖) of all matrices as one vector; the deviations of independent matrices add in squares.
    """
    inner = variance = energy_a = energy_b = 0.0
    for record, pair in pairs_of(records, a, b):
        norms = record["updates"][a]["frobenius"], record["updates"][b]["frobenius"]
        product = norms[0] * norms[1]
        inner += pair["cosine"] * product
        variance += (cosine_std((record["rows"], record["cols"])) * product) ** 2
        energy_a, energy_b = energy_a + norms[0] ** 2, energy_b + norms[1] ** 2
    size = math.sqrt(energy_a * energy_b)
    return (inner / size, math.sqrt(variance) / size) if size > 0 else (math.nan, math.nan)


def overlap_above(record: Record, pair: Mapping[str, Any], rank_a: int, rank_b: int, side: str) -> float:
    """Overlap of the leading subspaces on the scale where chance is 0 and the same subspace 1; NaN where unknown."""
    found = pair[f"overlap_{side}"][RANKS.index(rank_a)][RANKS.index(rank_b)]
    if found is None:
        return math.nan
    mean = overlap_mean(rank_a, rank_b, record["rows" if side == "left" else "cols"])
    return float(above_chance(found, mean)) if mean < 1.0 else math.nan


def intruders(records: Iterable[Record], position: int, *, epsilon: float = EPSILON) -> tuple[int, int]:
    """How many leading directions of the tuned matrices resemble none of the base's, and how many were matched."""
    cosines = [
        value
        for record in records
        if position < len(record.get("updates", ()))
        for value in record["updates"][position].get("intruder_cosines", ())
    ]
    return sum(value < epsilon for value in cosines), len(cosines)
