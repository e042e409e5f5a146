"""One row of a run: every measure of one tensor's update, as plain numbers that survive JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from spectra import measures
from spectra.checkpoints import TensorInfo
from spectra.checkpoints.names import Pair, layer_and_role
from spectra.delta import AnyDelta, Delta, LowRankDelta, is_float, matrix_shape
from spectra.difference import Difference, RouteChoice, spectra_together
from spectra.envelopes import Bounds
from spectra.errors import (
    CheckpointError,
    IncompleteSpectrum,
    MatrixError,
    NonFiniteMatrix,
    OutOfMemory,
    UnsupportedFormat,
)
from spectra.theory.noise import finite_edge, gavish_donoho_unknown, noise_std
from spectra.values import Certificate, Spectrum

ERROR_RANKS = (1, 2, 4, 8, 16, 32, 64)
ENERGY_SHARES = (50, 90, 95, 99)

# Measures that a truncated spectrum gives as an interval, each with its twin.
_Measure = Callable[[Spectrum], float]
_Interval = Callable[[Spectrum], Bounds]
_BOUNDED: dict[str, tuple[_Measure, _Interval]] = {
    "spectral_norm": (measures.spectral_norm, measures.spectral_norm_bounds),
    "nuclear_norm": (measures.nuclear_norm, measures.nuclear_norm_bounds),
    "signal_rank": (measures.signal_rank, measures.signal_rank_bounds),
    "stable_rank": (measures.stable_rank, measures.stable_rank_bounds),
    "entropy_rank": (measures.entropy_rank, measures.entropy_rank_bounds),
    "entropy_rank_energy": (measures.entropy_rank_energy, measures.entropy_rank_energy_bounds),
    "participation_ratio": (measures.participation_ratio, measures.participation_ratio_bounds),
    "numerical_rank": (measures.numerical_rank, measures.numerical_rank_bounds),
    **{
        f"rank_{percent}": (
            partial(measures.energy_rank, share=percent / 100),
            partial(measures.energy_rank_bounds, share=percent / 100),
        )
        for percent in ENERGY_SHARES
    },
    **{
        f"error_r{rank}": (
            partial(measures.truncation_error, rank=rank),
            partial(measures.truncation_error_bounds, rank=rank),
        )
        for rank in ERROR_RANKS
    },
}

TEXT_COLUMNS = ("name", "role", "dtype_base", "dtype_tuned", "status", "reason", "route")
INTEGER_COLUMNS = (
    "layer",
    "rows",
    "cols",
    "signal_rank",
    "numerical_rank",
    *(f"rank_{percent}" for percent in ENERGY_SHARES),
    "mp_rank",
    "gd_rank",
)
COLUMNS = (
    "name",
    "layer",
    "role",
    "rows",
    "cols",
    "dtype_base",
    "dtype_tuned",
    "status",
    "reason",
    "route",
    "frobenius",
    "relative_frobenius",
    "base_frobenius",
    "spectral_norm",
    "nuclear_norm",
    "storage_floor",
    "storage_frobenius",
    "zero_fraction",
    "merge_loss",
    "quantization_frobenius",
    "quantization_projection",
    "quantization_cosine",
    "signal_rank",
    "stable_rank",
    "entropy_rank",
    "entropy_rank_energy",
    "participation_ratio",
    "numerical_rank",
    *(f"rank_{percent}" for percent in ENERGY_SHARES),
    *(f"error_r{rank}" for rank in ERROR_RANKS),
    "mp_edge",
    "mp_rank",
    "gd_rank",
    "decay_exponent",
    "gap",
    "tail_norm",
    "roundoff",
    "singular_values",
    "singular_values_high",
    *(f"{name}_{end}" for name in _BOUNDED for end in ("low", "high")),
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked of every update: how many values, by which route, from which seed, in how much memory."""

    rank: int | None = None
    route: RouteChoice = "auto"
    seed: int = 0
    max_bytes: float = math.inf
    device: str | None = None


def described(pair: Pair, base: TensorInfo | None, tuned: TensorInfo | None) -> Record:
    """Give the row of a pair before anything is read: names, shape, dtypes, status."""
    layer, role = layer_and_role(pair.name)
    shape = (base or tuned).shape if base or tuned else ()  # type: ignore[union-attr]  # one of them is there
    rows, cols = matrix_shape(shape)
    return {
        "name": pair.name,
        "layer": layer,
        "role": role,
        "rows": rows,
        "cols": cols,
        "dtype_base": base.dtype if base else None,
        "dtype_tuned": tuned.dtype if tuned else None,
        "status": pair.status,
        "reason": pair.reason,
    }


def measured(delta: AnyDelta, record: Record, question: Question) -> Record:
    """Complete a row: read the two tensors, subtract, measure. No deliberate error leaves it; it becomes the status.

    Parameters
    ----------
    delta : Delta, LowRankDelta or AdapterDelta
    record : dict
        The row as `described`.
    question : Question

    Returns
    -------
    dict
        JSON-able but for ``singular_values`` and ``singular_values_high``, float64 arrays.
    """
    row = _sized(delta, record)
    with failing_into(row):
        row |= _finished(*_read(delta, question), question)
    return without_gaps(row)


def measured_together(deltas: Sequence[AnyDelta], records: Sequence[Record], question: Question) -> list[Record]:
    """`measured` for updates of one shape, their singular values taken as one batch where that is possible."""
    rows = [_sized(delta, record) for delta, record in zip(deltas, records, strict=True)]
    waiting: list[tuple[Record, Record, Difference]] = []
    for row, delta in zip(rows, deltas, strict=True):
        with failing_into(row):
            read, found = _read(delta, question)
            if isinstance(found, Difference):
                waiting.append((row, read, found))
            else:
                row |= _finished(read, found, question)
    batch: Sequence[Spectrum | Difference] = [found for *_, found in waiting]
    if len(waiting) > 1:
        # What is not one for a batch is taken one at a time, so that only those fail that must.
        with suppress(MatrixError, OutOfMemory, torch.OutOfMemoryError):
            batch = spectra_together(
                [found for *_, found in waiting],
                rank=question.rank,
                max_bytes=question.max_bytes,
                device=question.device,
            )
    for (row, read, found), spectrum in zip(waiting, batch, strict=True):
        with failing_into(row):
            row |= _finished(read, spectrum, question, found)
    return [without_gaps(row) for row in rows]


def _sized(delta: AnyDelta, record: Record) -> Record:
    rows, cols = delta.shape
    return {**record, "rows": rows, "cols": cols}


@contextmanager
def failing_into(row: Record) -> Iterator[None]:
    """Turn a deliberate error into the row's status and reason."""
    try:
        yield
    except NonFiniteMatrix as error:
        row |= {"status": "nonfinite", "reason": str(error)}
    except UnsupportedFormat as error:
        row |= {"status": "unsupported_dtype", "reason": str(error)}
    except (MatrixError, CheckpointError, OutOfMemory, OSError) as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def without_gaps(record: Record) -> Record:
    """Leave out what is not a number, so that a row is the same before and after it has been through the journal."""
    return {k: v for k, v in record.items() if not (isinstance(v, float) and not math.isfinite(v))}


def _read(delta: AnyDelta, question: Question) -> tuple[Record, Spectrum | Difference | None]:
    """Read and subtract: what is known then, and the spectrum, or the matrix to take it of, or None where none is."""
    rows, cols = delta.shape
    if rows * cols == 0:
        return {"status": "empty", "reason": f"shape {delta.base_info.shape} holds no entries"}, None
    dtypes = delta.base_info.dtype, delta.tuned_info.dtype
    if not all(is_float(dtype) for dtype in dtypes):
        return _counted(delta, dtypes), None
    refuse_scaled(delta)
    found = delta.difference()
    row: Record = {
        "frobenius": found.frobenius,
        "relative_frobenius": found.frobenius / found.base_frobenius if found.base_frobenius > 0 else math.nan,
        "base_frobenius": found.base_frobenius,
        "storage_floor": found.floor.spectral,
        "storage_frobenius": found.floor.frobenius,
        "zero_fraction": found.zero_fraction,
        "merge_loss": found.merge_loss,
        **found.more,
    }
    if min(rows, cols) == 1:
        return {**row, "status": "vector"}, None
    if found.frobenius == 0.0:
        return {**row, "status": "unchanged"}, _zero_spectrum((rows, cols), found)
    if isinstance(delta, LowRankDelta):
        return row, delta.spectrum()
    return row, found


def _finished(
    read: Record, found: Spectrum | Difference | None, question: Question, matrix: Difference | None = None
) -> Record:
    """Complete what `_read` gave by the measures of the spectrum; `matrix` is what a batch took the spectrum of."""
    if found is None:
        return read
    if isinstance(found, Difference):
        matrix = found
        found = found.spectrum(
            rank=question.rank,
            route=question.route,
            seed=question.seed,
            max_bytes=question.max_bytes,
            device=question.device,
        )
    if matrix is None:  # an adapter's factors, or nothing changed
        return {**read, **_spectral(found, random=False)}
    return {**read, "storage_frobenius": rounding_norm(matrix, found), **_spectral(found, random=True)}


def rounding_norm(found: Difference, spectrum: Spectrum) -> float:
    """Predicted ‖E‖_F of the rounding, but no more than what the directions above the floor leave of the update.

    The prediction counts a full grid cell for every entry of both sides. Where the base lies on its grid, or the update
    is finer than a cell, less is rounded; and what stands above the floor is not rounding.
    """
    below = spectrum.values[spectrum.values <= found.floor.spectral]
    return min(found.floor.frobenius, math.hypot(float(np.linalg.norm(below)), spectrum.certificate.gap))


# Names under which 8-bit checkpoints keep the scale of a weight (compressed-tensors, DeepSeek, transformers' FP8).
_SCALE_NAMES = ("{}_scale", "{}_scale_inv", "{}_scale_2")


def refuse_scaled(delta: AnyDelta) -> None:
    """Refuse 8-bit floats that mean something only with a scale stored beside them."""
    for info, checkpoint in ((delta.base_info, delta.base), (delta.tuned_info, delta.tuned)):
        scale = next((s for s in (t.format(info.name) for t in _SCALE_NAMES) if s in checkpoint), None)
        if info.dtype.startswith("F8") and scale is not None:
            raise UnsupportedFormat(f"{info.name} is {info.dtype} times {scale}; dequantize it first, and compare that")


def _zero_spectrum(shape: tuple[int, int], found: Difference) -> Spectrum:
    return Spectrum(
        np.zeros(min(shape)), shape, 0.0, Certificate("no entry changed", storage_floor=found.floor.spectral)
    )


def _counted(delta: AnyDelta, dtypes: tuple[str, str]) -> Record:
    """Row of a tensor that is not floating point: whether it is the same, entry by entry."""
    if not isinstance(delta, Delta) or any(dtype.startswith(("F", "C")) for dtype in dtypes):
        raise UnsupportedFormat(f"{delta.name}: {' and '.join(dict.fromkeys(dtypes))} cannot be upcast exactly here")
    base, tuned = delta.base[delta.base_name], delta.tuned[delta.tuned_name]
    if base.shape != tuned.shape:
        raise MatrixError(f"{delta.name}: base is {tuple(base.shape)} but tuned is {tuple(tuned.shape)}")
    differing = int(torch.count_nonzero(base != tuned))
    return {
        "status": "integer",
        "reason": f"{differing} of {base.numel()} entries differ" if differing else "every entry is the same",
        "zero_fraction": 1.0 - differing / base.numel(),
    }


def _spectral(spectrum: Spectrum, *, random: bool) -> Record:
    certificate = spectrum.certificate
    row: Record = {
        "route": certificate.method + (f" ({certificate.note})" if certificate.note else ""),
        "gap": certificate.gap,
        "tail_norm": certificate.tail_norm,
        "roundoff": certificate.roundoff + certificate.squared_roundoff,
        "singular_values": spectrum.values,
        "singular_values_high": np.empty(0) if spectrum.complete else spectrum.interval()[1],
    }
    for name, (measure, interval) in _BOUNDED.items():
        row |= _with_bounds(spectrum, name, measure, interval)
    if spectrum.complete and random:
        row |= _against_noise(spectrum)
    return row


def _with_bounds(spectrum: Spectrum, name: str, measure: _Measure, interval: _Interval) -> Record:
    """Value of a measure; on a truncated spectrum its certified interval too, and the value only where it is known."""
    if spectrum.complete:
        return {name: measure(spectrum)}
    low, high = interval(spectrum)
    row: Record = {f"{name}_low": low, f"{name}_high": high}
    try:
        row[name] = int(low) if name in INTEGER_COLUMNS and low == high else measure(spectrum)
    except IncompleteSpectrum:
        return row
    if name in INTEGER_COLUMNS and low != high:
        del row[name]
    return row


def _against_noise(spectrum: Spectrum) -> Record:
    """Random-matrix edges with the noise level matched to the median of the whole spectrum.

    Rounding noise is not of one variance: where most entries did not change its few steps stand above the edge of even
    noise. So what lies below the storage floor is not counted by either rank.
    """
    median = float(np.median(spectrum.values))
    if median <= 0.0:
        return {}
    certificate = spectrum.certificate
    floor = max(certificate.storage_floor, certificate.roundoff, certificate.squared_roundoff)
    beta = min(spectrum.shape) / max(spectrum.shape)
    edge = finite_edge(spectrum.shape, noise_std(median, spectrum.shape))
    row: Record = {
        "mp_edge": edge,
        "mp_rank": measures.rank_above(spectrum, max(edge, floor)),
        "gd_rank": measures.rank_above(spectrum, max(gavish_donoho_unknown(beta) * median, floor)),
    }
    try:
        row["decay_exponent"] = measures.decay_exponent(spectrum)
    except IncompleteSpectrum:
        return row
    return row
