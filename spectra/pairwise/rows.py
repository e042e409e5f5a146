"""Records of a geometry as plain values: what is known of each update of a matrix, and of each two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from spectra.pairwise.ranks import RANKS, TOP
from spectra.theory import chance
from spectra.values import Vector

SHARED = 8  # the rank at which shared directions are counted, where both updates have as many
EPSILONS = tuple(round(0.05 * i, 2) for i in range(21))
SIDES = ("left", "right")
# Statuses of a tensor, or of one update of it, that could not be analysed.
FAILED = ("nonfinite", "unsupported_dtype", "failed")


@dataclass(frozen=True)
class UpdateRow:
    """One update of one matrix. `kind` is ``"none"`` where it leaves it as it is, or `status` says what failed."""

    kind: str = "none"
    status: str = ""
    dtype: str = ""
    frobenius: float = math.nan
    relative: float = math.nan
    spectral_norm: float = math.nan
    storage_floor: float = math.nan
    storage_frobenius: float = math.nan
    rank_limit: int = 0
    held: int = 0
    resolved: int = 0
    resolved_nf4: int = 0
    values: tuple[float, ...] = ()
    sines: tuple[float, ...] = ()
    optimum: tuple[float, ...] = ()
    amplification: tuple[float, ...] = ()
    amplification_random: tuple[float, ...] = ()
    cosines: tuple[float, ...] = ()
    clear: tuple[bool, ...] = ()  # whether each of the directions behind `cosines` is one: no error turned it by 30°

    @property
    def changes(self) -> bool:
        """Whether it moves the matrix."""
        return self.kind != "none"

    @property
    def factored(self) -> bool:
        """Whether it is a product of two thin factors, whose training limits its rank."""
        return self.kind == "factors"

    @property
    def drowned(self) -> bool:
        """Whether rounding to the stored dtype alone could make every direction of it."""
        return self.changes and self.spectral_norm <= self.storage_floor

    def optimum_at(self, rank: int) -> float:
        """Share of ‖Δ‖² that its own leading directions hold: the most that any subspaces of this rank can."""
        if rank >= self.held == self.rank_limit:
            return 1.0
        if rank in RANKS:
            return self.optimum[RANKS.index(rank)] if self.optimum else math.nan
        energy = sum(v**2 for v in self.values[:rank])
        return min(energy / self.frobenius**2, 1.0) if self.frobenius > 0 and rank <= self.held else math.nan

    def intruders(self, epsilon: float) -> float:
        """How many of the leading directions of W + Δ resemble no direction of W; NaN where none was matched."""
        return float(sum(c < epsilon for c in self.cosines)) if self.cosines else math.nan


@dataclass(frozen=True)
class Sided:
    """How two updates agree on one side: left (outputs) or right (inputs)."""

    overlap: Vector = field(repr=False)  # (ranks of a, ranks of b), NaN where a rank passes what is held
    angles: tuple[float, ...]  # radians, ascending
    chordal: float
    geodesic: float


@dataclass(frozen=True)
class PairRow:
    """Two updates of one matrix.

    `captured` has six curves on `RANKS`: a in b, b in a; left, right, both. Past the rank of an adapter they stay where
    they are; past what is known of a dense update they are NaN. `all_held` is what all the directions that are known
    hold together, both sides.
    """

    a: int
    b: int
    cosine: float
    cosine_std: float
    norm_ratio: float
    left: Sided
    right: Sided
    angle_ranks: tuple[int, int]
    captured: Mapping[str, Mapping[str, tuple[float, ...]]]
    all_held: Mapping[str, float]

    @property
    def deviations(self) -> float:
        """Cosine in standard deviations of that of two random updates."""
        return self.cosine / self.cosine_std if self.cosine_std > 0 else math.nan


@dataclass(frozen=True)
class MatrixRow:
    """One tensor with all its updates."""

    position: int
    name: str
    layer: int | None
    role: str
    shape: tuple[int, ...]
    dtype_base: str
    status: str
    reason: str
    base_frobenius: float
    basis: int
    updates: tuple[UpdateRow, ...]
    pairs: Mapping[tuple[int, int], PairRow]

    @property
    def analysed(self) -> bool:
        """Whether it is a matrix that two updates change."""
        return self.status == "ok"

    @property
    def failed(self) -> bool:
        """Whether it, or one of its updates, could not be analysed."""
        return self.status in FAILED or any(update.status in FAILED for update in self.updates)

    @property
    def parameters(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape) if self.shape else 1

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, cols) of a matrix."""
        return self.shape[0], self.shape[1]

    def dimension(self, side: str) -> int:
        """Length of a direction: rows on the left, columns on the right."""
        return self.shape[0 if side == "left" else 1]

    @cached_property
    def chance_overlap(self) -> Mapping[str, Vector]:
        """Mean overlap of random subspaces at every two of `RANKS`, by side."""
        return {side: chance_table(self.dimension(side)) for side in SIDES}

    def above_chance(self, pair: PairRow, side: str) -> Vector:
        """Overlap as (φ − E) / (1 − E), E the mean of random subspaces; NaN where E is 1."""
        return chance.above_chance(getattr(pair, side).overlap, self.chance_overlap[side])

    def chance_captured(self, limit: int) -> Vector:
        """Mean share captured by random row and column spaces at `RANKS`, none of them larger than `limit`."""
        ranks = [min(r, limit) for r in RANKS]
        return np.array([chance.capture_both_mean(r, r, self.sides) if r else math.nan for r in ranks])

    @property
    def leading(self) -> int:
        """How many leading directions of a tuned matrix are matched with the base's: `TOP`, as far as there are."""
        return min(TOP, *self.sides)

    def chance_intruders(self, epsilon: float) -> float:
        """How many of as many random directions would count as intruders; NaN where none were looked for."""
        if not self.basis:
            return math.nan
        return self.leading * float(chance.match_below(epsilon, self.basis, self.shape[0])) if epsilon > 0 else 0.0


def chance_table(dimension: int) -> Vector:
    """Return the mean overlap of random subspaces at every two of `RANKS`; NaN where a rank passes the dimension.

    Parameters
    ----------
    dimension : int
        Of the space.
    """
    means = [
        [chance.overlap_mean(i, j, dimension) if max(i, j) <= dimension else math.nan for j in RANKS] for i in RANKS
    ]
    return np.array(means, dtype=np.float64)


def read_records(records: Sequence[Mapping[str, Any]]) -> tuple[MatrixRow, ...]:
    """Turn a geometry's records into rows, in their order.

    Parameters
    ----------
    records : sequence of dict
        `spectra.Geometry.records`. What is not there reads as unknown.
    """
    return tuple(_matrix(i, record) for i, record in enumerate(records))


def _matrix(position: int, record: Mapping[str, Any]) -> MatrixRow:
    sides = [int(record[side]) for side in ("rows", "cols") if record.get(side) is not None]
    shape = (max(sides),) if len(sides) == 2 and min(sides) == 1 else tuple(sides)
    layer = record.get("layer")
    updates = tuple(_update(held) for held in record.get("updates") or ())
    pairs = [_pair(held, updates) for held in record.get("pairs") or ()] if len(shape) == 2 else []
    return MatrixRow(
        position=position,
        name=_text(record.get("name")),
        layer=None if layer is None else int(layer),
        role=_text(record.get("role")),
        shape=shape,
        dtype_base=_text(record.get("dtype_base")),
        status=_text(record.get("status")),
        reason=_text(record.get("reason")),
        base_frobenius=_number(record.get("base_frobenius")),
        basis=int(record.get("basis") or 0),
        updates=updates,
        pairs={(pair.a, pair.b): pair for pair in pairs},
    )


def _update(held: Mapping[str, Any]) -> UpdateRow:
    if held.get("kind", "none") == "none":
        return UpdateRow(status=_text(held.get("status")))
    values = _numbers(held.get("values"))
    return UpdateRow(
        kind=_text(held["kind"]),
        dtype=_text(held.get("dtype")),
        frobenius=_number(held.get("frobenius")),
        relative=_number(held.get("relative_frobenius")),
        spectral_norm=_number(held.get("spectral_norm")),
        storage_floor=_number(held.get("storage_floor")),
        storage_frobenius=_number(held.get("storage_frobenius")),
        rank_limit=int(held.get("rank_limit") or 0),
        held=int(held.get("held") or len(values)),
        resolved=int(held.get("resolved") or 0),
        resolved_nf4=int(held.get("resolved_nf4") or 0),
        values=values,
        sines=_numbers(held.get("sines")),
        optimum=_on_ranks(held.get("optimum")),
        amplification=_on_ranks(held.get("amplification")),
        amplification_random=_on_ranks(held.get("amplification_random")),
        cosines=_numbers(held.get("intruder_cosines")),
        clear=tuple(bool(b) for b in held.get("intruder_resolved") or ()),
    )


def _pair(held: Mapping[str, Any], updates: Sequence[UpdateRow]) -> PairRow:
    capture = held.get("capture") or {}
    one, other = held.get("angle_ranks") or (0, 0)
    a, b = int(held["a"]), int(held["b"])
    nets = {"a_in_b": updates[b], "b_in_a": updates[a]}
    found = {way: capture.get(way) or {} for way in nets}
    return PairRow(
        a=a,
        b=b,
        cosine=_number(held.get("cosine")),
        cosine_std=_number(held.get("cosine_std")),
        norm_ratio=_number(held.get("norm_ratio")),
        left=_sided(held, "left"),
        right=_sided(held, "right"),
        angle_ranks=(int(one), int(other)),
        captured={way: {kind: _curve(found[way], kind, net) for kind in (*SIDES, "both")} for way, net in nets.items()},
        all_held={way: _number((found[way].get("held") or {}).get("both")) for way in nets},
    )


def _curve(found: Mapping[str, Any], kind: str, net: UpdateRow) -> tuple[float, ...]:
    """Captured shares on `RANKS`; an adapter has no more directions than its rank, and they hold what they hold."""
    last = _number((found.get("held") or {}).get(kind)) if net.held == net.rank_limit else math.nan
    return tuple(
        last if rank > net.held else share for rank, share in zip(RANKS, _on_ranks(found.get(kind)), strict=True)
    )


def _sided(held: Mapping[str, Any], side: str) -> Sided:
    return Sided(
        overlap=_table(held.get(f"overlap_{side}")),
        angles=_numbers(held.get(f"angles_{side}")),
        chordal=_number(held.get(f"chordal_{side}")),
        geodesic=_number(held.get(f"geodesic_{side}")),
    )


def _table(held: Any) -> Vector:
    lines = [_on_ranks(line) for line in held or ()]
    lines += [(math.nan,) * len(RANKS)] * (len(RANKS) - len(lines))
    return np.array(lines[: len(RANKS)], dtype=np.float64)


def _on_ranks(held: Any) -> tuple[float, ...]:
    """Numbers on `RANKS`; NaN from where a list ends."""
    values = _numbers(held)[: len(RANKS)]
    return values + (math.nan,) * (len(RANKS) - len(values))


def _numbers(held: Any) -> tuple[float, ...]:
    return () if held is None else tuple(_number(v) for v in held)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
