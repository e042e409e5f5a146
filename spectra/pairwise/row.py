"""One record of a geometry: all updates of one tensor, alone and in pairs, as plain numbers that survive JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch

from spectra.delta import is_float
from spectra.errors import MatrixError, NonFiniteMatrix, SpectraError, UnsupportedFormat
from spectra.linalg.matrix import row_blocks, sum_of_squares
from spectra.pairwise.operand import Array, Operand, decomposed, inner, leading, read, times, vectors
from spectra.pairwise.ranks import RANKS, TOP
from spectra.pairwise.unit import Asked, Unit
from spectra.quantize import quantize
from spectra.record import Record, failing_into, refuse_scaled, without_gaps
from spectra.subspace import (
    amplification,
    capture_curve,
    chordal_distance,
    direction_sines,
    geodesic_distance,
    intruders,
    optimal_capture,
    overlap_table,
    principal_angles,
    subspace_sines,
)
from spectra.subspace.bases import Side
from spectra.theory.bounds import RESOLVED
from spectra.theory.chance import cosine_std
from spectra.theory.noise import storage_floor
from spectra.values import Spectrum

# Blocks that share a scale where weights are quantized to NF4 (QLoRA).
_NF4_BLOCK = 64


def measured(unit: Unit, asked: Asked) -> Record:
    """Complete a record: read all updates of one tensor, decompose, compare. Deliberate errors become its status.

    Parameters
    ----------
    unit : Unit
    asked : Asked

    Returns
    -------
    dict
        JSON-able; numbers that are not finite are left out.
    """
    row = dict(unit.record)
    with failing_into(row):
        row |= _compared(unit, asked)
    return without_gaps(row)


def _compared(unit: Unit, asked: Asked) -> Record:
    rows, cols = unit.shape
    if rows * cols == 0:
        return {"status": "empty", "reason": f"shape {unit.model.base_info.shape} holds no entries"}
    if not is_float(unit.model.base_info.dtype):
        return {"status": "integer", "reason": "not floating point"}
    if min(rows, cols) == 1:
        return {"status": "vector"}
    whole = asked.whole(unit)
    weights = unit.model.weights()[:rows]
    weights = weights if asked.device is None else weights.to(asked.device)
    frobenius = math.sqrt(sum_of_squares(weights))
    if not math.isfinite(frobenius):
        bad = sum(int((~torch.isfinite(block)).sum()) for block in row_blocks(weights))
        raise NonFiniteMatrix(f"{unit.record['name']}: {bad} NaN or infinite entries in base, of {weights.numel()}")
    updates, changed = _operands(unit, asked, whole)
    nf4 = nf4_floor(weights)
    for i, operand in changed:
        updates[i] |= _update(operand, weights, frobenius, nf4, asked.rank)
    row: Record = {"base_frobenius": frobenius, "nf4_floor": nf4, "updates": updates}
    if changed and whole and frobenius > 0.0:
        row |= _intruders(weights, changed, updates, asked.seed)
    pairs = [{"a": a, "b": b, **_pair(x, y, updates[a], updates[b])} for (a, x), (b, y) in combinations(changed, 2)]
    if changed:
        routes = dict.fromkeys(operand.spectrum.certificate.method for _, operand in changed)
        row |= {"route": "; ".join(routes), "pairs": pairs}
    failed = [update for update in updates if "status" in update]
    if failed:
        row["reason"] = "; ".join(update["reason"] for update in failed)
    alone = failed[0]["status"] if failed else "one_sided" if changed else "unchanged"
    return row | {"status": "ok" if pairs else alone}


def _operands(unit: Unit, asked: Asked, whole: bool) -> tuple[list[Record], list[tuple[int, Operand]]]:
    """Read every update: one record each, and those that change the matrix by position. One that fails says why."""
    updates: list[Record] = []
    changed = []
    for i, (label, delta, refused) in enumerate(zip(asked.labels, unit.deltas, unit.refused, strict=True)):
        updates.append({"kind": "none"})
        if delta is None:
            updates[i] |= {"status": "shape_mismatch", "reason": f"{label}: {refused}"} if refused else {}
            continue
        with failing_into(updates[i]), _named(label):
            if delta.shape != unit.shape:
                own, others = (f"{rows} × {cols}" for rows, cols in (delta.shape, unit.shape))
                raise MatrixError(f"{own} entries, where {asked.labels[unit.deltas.index(unit.model)]} has {others}")
            if not is_float(delta.tuned_info.dtype):
                raise UnsupportedFormat(f"{delta.tuned_info.dtype}, where the base is {delta.base_info.dtype}")
            refuse_scaled(delta)
            operand = read(delta, rank=asked.rank, whole=whole, seed=asked.seed, device=asked.device)
            if operand is not None:
                updates[i]["dtype"] = delta.tuned_info.dtype
                changed.append((i, operand))
    return updates, changed


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Say in every deliberate error which update it is of."""
    try:
        yield
    except SpectraError as error:
        raise type(error)(f"{label}: {error}") from error


def nf4_floor(weights: torch.Tensor) -> float:
    """Estimate of ‖W − NF4(W)‖₂: what quantizing the base, as QLoRA does, moves it by; NaN past float32's range.

    Row and column sums of the squared error in the place of a variance profile (`spectra.theory.noise.storage_floor`).
    """
    try:
        back = quantize(weights if weights.dtype == torch.float64 else weights.float(), "nf4", block=_NF4_BLOCK)
    except NonFiniteMatrix:
        return math.nan
    # torch's own kernel: looking for another one's package would take longer than all matrices of a small model.
    rows, cols = [], torch.zeros(weights.shape[1], dtype=torch.float64, device=weights.device)
    for stored, coded in zip(row_blocks(weights), row_blocks(back.dequantize(backend="torch")), strict=True):
        squares = (stored.double() - coded.double()).square_()
        rows.append(squares.sum(1))
        cols += squares.sum(0)
    return storage_floor(torch.cat(rows).cpu().numpy(), cols.cpu().numpy()).spectral


def _update(operand: Operand, weights: torch.Tensor, base: float, nf4: float, rank: int) -> Record:
    """What is known of one update by itself."""
    spectrum = operand.spectrum
    held = min(rank, vectors(spectrum)[0].shape[1])
    left, right = _bases(spectrum, held)
    certificate, values = spectrum.certificate, spectrum.values[:rank]
    sines = subspace_sines(spectrum)[: len(values)]
    core = left.T @ times(weights, right)  # UᵀWV (held, held)
    random = spectrum.frobenius * math.sqrt(math.prod(spectrum.shape)) / base if base > 0 else math.nan
    amplified = amplification(spectrum.frobenius, core)
    optimum = optimal_capture(spectrum)
    return without_gaps(
        {
            "kind": operand.kind,
            "frobenius": spectrum.frobenius,
            "relative_frobenius": spectrum.frobenius / base if base > 0 else math.nan,
            "storage_floor": certificate.storage_floor,
            "storage_frobenius": operand.rounding,
            "spectral_norm": float(spectrum.values[0]),
            "rank_limit": operand.rank_limit,
            "held": held,
            "values": _numbers(values),
            "sines": _numbers(sines),
            "vector_sines": _numbers(direction_sines(spectrum)[: len(values)]),
            "resolved": _resolved(sines),
            "resolved_nf4": math.nan if math.isnan(nf4) else _resolved(_blurred(spectrum, nf4)[: len(values)]),
            "optimum": _at_ranks(optimum, after=1.0 if len(optimum) >= operand.rank_limit else None),
            "amplification": _at_ranks(amplified),
            "amplification_random": _at_ranks(random / np.arange(1.0, held + 1.0)),
        }
    )


def _blurred(spectrum: Spectrum, floor: float) -> Array:
    """Sines of the leading subspaces where what is stored carries an error of this norm."""
    stored = spectrum.certificate.storage_floor
    least = floor if math.isnan(stored) else max(floor, stored)
    return subspace_sines(replace(spectrum, certificate=replace(spectrum.certificate, storage_floor=least)))


def _intruders(
    weights: torch.Tensor, changed: Sequence[tuple[int, Operand]], updates: Sequence[Record], seed: int
) -> Record:
    """Match the leading directions of every tuned matrix with the base's, which is decomposed once; fill `updates`."""
    wide = weights if weights.dtype == torch.float64 else weights.float()
    base = decomposed(wide)
    top, basis = min(TOP, min(weights.shape)), 0
    for i, operand in changed:
        tuned = leading(operand.added_to(wide), top, seed=seed)
        # W + Δ is no better known than Δ is.
        known = replace(tuned.certificate, storage_floor=operand.spectrum.certificate.storage_floor)
        found = intruders(base, replace(tuned, certificate=known), top=top)
        updates[i]["intruder_cosines"] = _numbers(found.cosines)
        updates[i]["intruder_resolved"] = [bool(known) for known in found.resolved]
        basis = found.basis
    return {"basis": basis}


def _pair(a: Operand, b: Operand, of_a: Record, of_b: Record) -> Record:
    """Compare two updates of one matrix."""
    one, two = a.spectrum, b.spectrum
    ranks = [[rank for rank in RANKS if rank <= update["held"]] for update in (of_a, of_b)]
    resolved = [update["resolved"] or update["held"] for update in (of_a, of_b)]
    q_a, q_b = (min(count, update["held"], RANKS[-1]) for count, update in zip(resolved, (of_a, of_b), strict=True))
    pair: Record = {
        "cosine": inner(a, b) / one.frobenius / two.frobenius,
        "cosine_std": cosine_std(one.shape),
        "norm_ratio": two.frobenius / one.frobenius,
        "angle_ranks": [q_a, q_b],
    }
    sides: tuple[Side, Side] = "left", "right"
    for side, space, basis_a, basis_b in zip(sides, one.shape, _bases(one, q_a), _bases(two, q_b), strict=True):
        table = overlap_table(one, two, ranks[0], ranks[1], side=side)
        error = np.add.outer(*(_turned(of, at, space) for of, at in zip((of_a, of_b), ranks, strict=True)))
        angles = principal_angles(basis_a, basis_b)
        pair |= {
            f"overlap_{side}": _padded(table),
            f"overlap_{side}_error": _padded(np.minimum(error, 1.0)),
            f"angles_{side}": _numbers(angles),
            f"chordal_{side}": float(chordal_distance(angles)),
            f"geodesic_{side}": float(geodesic_distance(angles)),
        }
    return pair | {"capture": {"a_in_b": _capture(a, b, of_b["held"]), "b_in_a": _capture(b, a, of_a["held"])}}


def _capture(a: Operand, b: Operand, held: int) -> Record:
    """Share of ‖Δ_a‖² inside the leading row and column directions of Δ_b, and inside all that are held."""
    left, right = _bases(b.spectrum, held)
    left_image = a.against(left)  # (held, cols)
    found = capture_curve(left_image, a.times(right), left_image @ right, a.spectrum.frobenius)
    curves = {"left": found.left, "right": found.right, "both": found.both}
    last = {"rank": held} | {side: float(curve[-1]) for side, curve in curves.items()}
    return {side: _at_ranks(curve) for side, curve in curves.items()} | {"held": last}


def _bases(spectrum: Spectrum, count: int) -> tuple[Array, Array]:
    """Leading columns of U (rows, count) and V (cols, count)."""
    left, right = vectors(spectrum)
    return np.ascontiguousarray(left[:, :count]), np.ascontiguousarray(right[:count].T)


def _turned(update: Record, ranks: Sequence[int], space: int) -> Array:
    """Sines of the leading subspaces; the whole space has nowhere to turn to."""
    return np.array([0.0 if rank == space else update["sines"][rank - 1] for rank in ranks])


def _resolved(sines: Array) -> int:
    """Largest rank whose leading subspace is resolved; 0 where none is."""
    known = np.flatnonzero(sines <= RESOLVED)
    return int(known[-1]) + 1 if len(known) else 0


def _numbers(values: Array) -> list[float]:
    return [float(value) for value in values]


def _at_ranks(curve: Array, *, after: float | None = None) -> list[float | None]:
    """Read a curve over r = 1, 2, … off at `RANKS`; `after` where it is not known so far."""
    read_off = [float(curve[rank - 1]) if rank <= len(curve) else after for rank in RANKS]
    return [None if value is not None and not math.isfinite(value) else value for value in read_off]


def _padded(table: Array) -> list[list[float | None]]:
    """A table over the ranks that are held, as one over `RANKS`, None beyond."""
    rows, cols = table.shape
    return [
        [float(table[i, j]) if i < rows and j < cols else None for j in range(len(RANKS))] for i in range(len(RANKS))
    ]
