"""Many matrices as one: what a scheme loses of all of them, pooled by energy, as if they stood in one long vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from spectra.theory.quantization import lloyd_max, rate_distortion

_LARGEST_LLOYD_MAX = 10.0  # bits, the most that its levels are computed for


@dataclass(frozen=True)
class Pooled:
    """One scheme over several matrices.

    Attributes
    ----------
    scheme : str
    matrices, weights : int
        How many there are.
    bits : float
        A weight, everything stored counted.
    relative_mse : float
        Σ‖W − Ŵ‖² / Σ‖W‖².
    gaussian_mse : float
        The same of Gaussian weights of the same norms; NaN where the theory has no number for the scheme.
    noise_like : int
        Matrices of whose error no singular value stands above noise's, rows and columns divided by their sizes.
    edge : float
        Median of the largest singular value over the Marchenko–Pastur edge, rows and columns divided by their sizes.
    raw_edge : float
        The same as they are.
    absorbed, noise : dict of int to float
        Share of Σ‖W − Ŵ‖² that the best matrices of a rank hold, and that they hold of noise.
    held, held_noise : tuple of float
        The same at fixed r/p.
    weighted : float
        Relative error on the inputs, of the matrices whose moments are known; NaN where none are.
    weighted_optimal, weighted_plain : dict of int to float
        Share of it that the factors which are best on the inputs take back, and those of the plain SVD.
    captured, chance : dict of int to float
        Share of Σ‖W − Ŵ‖² in the r leading column or row directions of the update, and what chance gives; NaN without
        an update.
    repaired : float
        Σ⟨ΔW, W − Ŵ⟩ / Σ‖W − Ŵ‖²: how much of the error the update makes up for, where it is known.
    repaired_std : float
        Its standard deviation, about 0, for updates in random position.
    over_update : float
        √(Σ‖W − Ŵ‖² / Σ‖ΔW‖²), of the matrices with an update.
    """

    scheme: str
    matrices: int
    weights: int
    bits: float
    relative_mse: float
    gaussian_mse: float
    noise_like: int
    edge: float
    raw_edge: float
    absorbed: Mapping[int, float]
    noise: Mapping[int, float]
    held: tuple[float, ...]
    held_noise: tuple[float, ...]
    weighted: float = math.nan
    weighted_optimal: Mapping[int, float] = field(default_factory=dict)
    weighted_plain: Mapping[int, float] = field(default_factory=dict)
    captured: Mapping[int, float] = field(default_factory=dict)
    chance: Mapping[int, float] = field(default_factory=dict)
    repaired: float = math.nan
    repaired_std: float = math.nan
    over_update: float = math.nan

    @property
    def sqnr_db(self) -> float:
        """Signal over quantization noise, in decibels."""
        return decibels(self.relative_mse)

    @property
    def gaussian_db(self) -> float:
        """The same of Gaussian weights."""
        return decibels(self.gaussian_mse)

    @property
    def lloyd_max_db(self) -> float:
        """What the best scalar quantizer of Gaussian weights keeps, with as many levels as so many bits number."""
        return lloyd_max_db(self.bits)

    @property
    def shannon_db(self) -> float:
        """What no code for Gaussian weights surpasses at so many bits."""
        return decibels(rate_distortion(self.bits))

    @property
    def short_of_shannon(self) -> float:
        """Decibels below `shannon_db`; of weights that are far from Gaussian it may be negative."""
        return self.shannon_db - self.sqnr_db


def decibels(relative: float) -> float:
    """Signal over error, in decibels, of a relative squared error; infinite where nothing is lost.

    Examples
    --------
    >>> decibels(0.01), decibels(0.0)
    (20.0, inf)
    """
    if math.isnan(relative):
        return math.nan
    return -10.0 * math.log10(relative) if relative > 0.0 else math.inf


def lloyd_max_db(bits: float) -> float:
    """Signal over error of the optimal scalar quantizer of a normal law with ⌊2^bits⌋ levels.

    Examples
    --------
    >>> round(lloyd_max_db(4), 2), lloyd_max_db(16)
    (20.22, nan)
    """
    return decibels(lloyd_max(bits).mse) if 0.0 <= bits <= _LARGEST_LLOYD_MAX else math.nan


def pool(rows: Iterable[Mapping[str, Any]], ranks: Sequence[int]) -> list[Pooled]:
    """One `Pooled` a scheme, in the order of the rows' schemes.

    Parameters
    ----------
    rows : iterable of mapping
        Of `QuantizedRun.records`; those that were not measured are left out.
    ranks : sequence of int
        Of the run.
    """
    held: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for row in rows:
        for part in row.get("schemes", ()):
            held.setdefault(part["scheme"], []).append((row, part))
    return [_pooled(scheme, found, ranks) for scheme, found in held.items()]


def _pooled(scheme: str, found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], ranks: Sequence[int]) -> Pooled:
    energies = [row["norm"] ** 2 for row, _ in found]
    errors = [energy * part["relative_mse"] for energy, (_, part) in zip(energies, found, strict=True)]
    parts = [part for _, part in found]
    weights = [row["rows"] * row["cols"] for row, _ in found]
    edges = [part["edge_whitened"] for part in parts if "edge_whitened" in part]

    def by_rank(key: str, masses: Sequence[float]) -> dict[int, float]:
        return {rank: _mean([_at(part.get(key), i) for part in parts], masses) for i, rank in enumerate(ranks)}

    def by_fraction(key: str) -> tuple[float, ...]:
        count = max((len(part.get(key, ())) for part in parts), default=0)
        return tuple(_mean([_at(part.get(key), i) for part in parts], errors) for i in range(count))

    seen = [row.get("seen", math.nan) for row, _ in found]
    shares = [part.get("weighted_mse", math.nan) for part in parts]
    on_inputs = [mass * share for mass, share in zip(seen, shares, strict=True)]
    # Matrices that the update moves: those that it leaves alone say nothing of how the two meet.
    met = [(error, row, part) for error, (row, part) in zip(errors, found, strict=True) if "repaired" in part]
    moved = sum(row["update_norm"] ** 2 for _, row, _ in met)
    beside = sum(error for error, _, _ in met)
    strayed = sum(error * (row["update_norm"] * part["cosine_std"]) ** 2 for error, row, part in met)
    return Pooled(
        scheme=scheme,
        matrices=len(found),
        weights=sum(weights),
        bits=_mean([part["bits"] for part in parts], weights),
        relative_mse=sum(errors) / sum(energies) if sum(energies) > 0.0 else math.nan,
        gaussian_mse=_mean([part.get("gaussian_mse", math.nan) for part in parts], energies, whole=True),
        noise_like=sum(part.get("outliers") == 0 and "edge_whitened" in part for part in parts),
        edge=median(edges) if edges else math.nan,
        raw_edge=median([part["edge"] for part in parts if "edge" in part] or [math.nan]),
        absorbed=by_rank("absorbed", errors),
        noise=by_rank("absorbed_noise", errors),
        held=by_fraction("held"),
        held_noise=by_fraction("held_noise"),
        weighted=_mean(shares, seen),
        weighted_optimal=by_rank("weighted_optimal", on_inputs),
        weighted_plain=by_rank("weighted_plain", on_inputs),
        captured=by_rank("captured", errors),
        chance=by_rank("captured_chance", errors),
        repaired=_mean([part.get("repaired", math.nan) for part in parts], errors),
        repaired_std=math.sqrt(strayed) / beside if strayed > 0.0 else math.nan,
        over_update=math.sqrt(beside / moved) if moved > 0.0 else math.nan,
    )


def _at(values: Sequence[float | None] | None, place: int) -> float:
    value = values[place] if values is not None and place < len(values) else None
    return math.nan if value is None else value


def _mean(values: Sequence[float], masses: Sequence[float], *, whole: bool = False) -> float:
    """Mean by mass of the values that are numbers; NaN where none is, or with `whole` where one is not."""
    known = [(v, m) for v, m in zip(values, masses, strict=True) if math.isfinite(v) and math.isfinite(m)]
    total = sum(mass for _, mass in known)
    if not total > 0.0 or (whole and len(known) < len(values)):
        return math.nan
    return sum(value * mass for value, mass in known) / total
