"""Measures of one spectrum: effective ranks, truncation error, decay. Pure functions of a `Spectrum`.

Every measure of the whole spectrum raises `IncompleteSpectrum` on a truncated one; its ``…_bounds`` twin works on any
spectrum and returns (low, high) that contain the exact value, from the exact Frobenius norm and the certificate.

How the bounds are found stands in `spectra.envelopes`.

Edges. A zero matrix has every rank 0 and every ratio NaN. Terms of value 0 contribute 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from spectra.envelopes import Bounds, envelopes, head_and_tail, schur_bounds
from spectra.errors import IncompleteSpectrum
from spectra.values import Spectrum, Vector


def _complete(spectrum: Spectrum, measure: str) -> Vector:
    if not spectrum.complete:
        raise IncompleteSpectrum(
            f"{measure} needs all {spectrum.rank_limit} singular values of the {spectrum.shape[0]} × "
            f"{spectrum.shape[1]} matrix, but only the top {len(spectrum.values)} are known; "
            f"use {measure}_bounds, or ask for the whole spectrum (rank=None)"
        )
    return spectrum.values


def _weights(values: Vector, power: int) -> Vector:
    scaled = values / values[0] if len(values) and values[0] > 0 else values  # keeps squares from under- or overflow
    powered = scaled**power
    total = powered.sum()
    return powered / total if total > 0 else powered


def _exp_entropy(weights: Vector) -> float:
    positive = weights[weights > 0]
    return float(np.exp(-np.sum(positive * np.log(positive)))) if len(positive) else 0.0


def _participation(weights: Vector) -> float:
    total = float(np.sum(weights**2))
    return 1.0 / total if total > 0 else 0.0


# Norms ------------------------------------------------------------------------------------------------------------


def spectral_norm(spectrum: Spectrum) -> float:
    """σ₁, in the units of the entries; 0 for a zero matrix."""
    return float(spectrum.values[0]) if len(spectrum.values) else 0.0


def spectral_norm_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain σ₁."""
    low, high = spectrum.interval()
    return (float(low[0]), min(float(high[0]), spectrum.frobenius)) if len(low) else (0.0, spectrum.frobenius)


def nuclear_norm(spectrum: Spectrum) -> float:
    """Σσ, in the units of the entries.

    Raises
    ------
    IncompleteSpectrum
        On a truncated spectrum: see `nuclear_norm_bounds`.
    """
    return float(np.sum(_complete(spectrum, "nuclear_norm")))


def nuclear_norm_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain Σσ: the left-out energy packed into as few values as can hold it, or spread evenly."""
    if spectrum.frobenius == 0.0:
        return 0.0, 0.0
    low, high, (energy_low, energy_high), largest, others = head_and_tail(spectrum)
    least = float(np.sum(low)) + (energy_low / largest if largest > 0 else 0.0)
    most = float(np.sum(high)) + math.sqrt(others * energy_high)
    return least * spectrum.frobenius, most * spectrum.frobenius


# Effective ranks --------------------------------------------------------------------------------------------------


def stable_rank(spectrum: Spectrum) -> float:
    """‖A‖²_F / σ₁², between 1 and the rank; 0 for a zero matrix. Needs σ₁ alone.

    References
    ----------
    M. Rudelson and R. Vershynin, J. ACM 54 (2007), section 1.

    Examples
    --------
    >>> import numpy as np
    >>> from spectra import spectrum
    >>> round(stable_rank(spectrum(np.diag([2.0, 1.0, 1.0]))), 6)
    1.5
    """
    top = spectral_norm(spectrum)
    return (spectrum.frobenius / top) ** 2 if top > 0 else 0.0


def stable_rank_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain ‖A‖²_F / σ₁²."""
    low, high = spectral_norm_bounds(spectrum)
    if spectrum.frobenius == 0.0:
        return 0.0, 0.0
    limit = float(spectrum.rank_limit)
    return (
        max(1.0, (spectrum.frobenius / high) ** 2),
        min(limit, (spectrum.frobenius / low) ** 2) if low > 0 else limit,
    )


def entropy_rank(spectrum: Spectrum) -> float:
    """Exponential of H(p) with p_i = σ_i/Σσ: the effective rank of Roy and Vetterli.

    Raises
    ------
    IncompleteSpectrum
        On a truncated spectrum: see `entropy_rank_bounds`.

    References
    ----------
    O. Roy and M. Vetterli, EUSIPCO 2007, eq. 3 (of σ, not of σ²).

    Examples
    --------
    >>> import numpy as np
    >>> from spectra import spectrum
    >>> round(entropy_rank(spectrum(np.eye(7))), 6)
    7.0
    """
    return _exp_entropy(_weights(_complete(spectrum, "entropy_rank"), 1))


def entropy_rank_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain `entropy_rank`."""
    return schur_bounds(spectrum, 1, _exp_entropy)


def entropy_rank_energy(spectrum: Spectrum) -> float:
    """Exponential of H(p) with p_i = σ_i²/Σσ²: a common variant of `entropy_rank`, never to be mixed with it.

    Raises
    ------
    IncompleteSpectrum
        On a truncated spectrum: see `entropy_rank_energy_bounds`.
    """
    return _exp_entropy(_weights(_complete(spectrum, "entropy_rank_energy"), 2))


def entropy_rank_energy_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain `entropy_rank_energy`."""
    return schur_bounds(spectrum, 2, _exp_entropy)


def participation_ratio(spectrum: Spectrum) -> float:
    """(Σσ²)² / Σσ⁴.

    Raises
    ------
    IncompleteSpectrum
        On a truncated spectrum: see `participation_ratio_bounds`.
    """
    return _participation(_weights(_complete(spectrum, "participation_ratio"), 2))


def participation_ratio_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain `participation_ratio`."""
    return schur_bounds(spectrum, 2, _participation)


def numerical_rank(spectrum: Spectrum, *, epsilon: float = float(np.finfo(np.float32).eps)) -> int:
    """Number of singular values above max(d, k)·ε·σ₁, LAPACK's and NumPy's rule.

    Parameters
    ----------
    spectrum : Spectrum
    epsilon : float
        Unit roundoff of the precision the matrix was given in; float32's by default.

    Raises
    ------
    IncompleteSpectrum
        On a truncated spectrum: see `numerical_rank_bounds`.
    """
    values = _complete(spectrum, "numerical_rank")
    return int(np.sum(values > max(spectrum.shape) * epsilon * spectral_norm(spectrum)))


def numerical_rank_bounds(spectrum: Spectrum, *, epsilon: float = float(np.finfo(np.float32).eps)) -> Bounds:
    """(low, high) that contain `numerical_rank`."""
    low, high = spectral_norm_bounds(spectrum)
    factor = max(spectrum.shape) * epsilon
    return rank_above_bounds(spectrum, factor * high)[0], rank_above_bounds(spectrum, factor * low)[1]


def rank_above(spectrum: Spectrum, threshold: float) -> int:
    """Number of singular values above a threshold in the units of the entries.

    With `Certificate.storage_floor` this is the signal rank; with an edge of `spectra.theory.noise`, the
    Marchenko–Pastur or Gavish–Donoho rank.

    Raises
    ------
    IncompleteSpectrum
        Where the last known value is still above the threshold: see `rank_above_bounds`.
    """
    count = int(np.sum(spectrum.values > threshold))
    if count == len(spectrum.values) and not spectrum.complete:
        _complete(spectrum, "rank_above")
    return count


def rank_above_bounds(spectrum: Spectrum, threshold: float) -> Bounds:
    """(low, high) that contain the number of singular values above a threshold."""
    if spectrum.frobenius == 0.0:
        count = float(spectrum.rank_limit) if threshold < 0 else 0.0
        return count, count
    low, high, (_, energy_high), largest, others = head_and_tail(spectrum)
    threshold = threshold / spectrum.frobenius
    hidden = 0
    if largest > threshold:
        hidden = others if threshold <= 0 else min(others, int(energy_high / threshold**2))
    return float(np.sum(low > threshold)), float(np.sum(high > threshold)) + hidden


def signal_rank(spectrum: Spectrum) -> int:
    """Number of singular values above the storage-rounding floor of the certificate, and above its roundoff.

    By Weyl's inequality no more values than the true update has can stand above the norm of the rounding error, so
    this is a count of directions that rounding cannot have made.

    Raises
    ------
    ValueError
        If the certificate carries no floor (NaN): the matrix did not come from a pair of checkpoints.
    IncompleteSpectrum
        On a truncated spectrum that is still above the floor: see `signal_rank_bounds`.
    """
    return rank_above(spectrum, _floor(spectrum))


def signal_rank_bounds(spectrum: Spectrum) -> Bounds:
    """(low, high) that contain `signal_rank`."""
    return rank_above_bounds(spectrum, _floor(spectrum))


def _floor(spectrum: Spectrum) -> float:
    floor = spectrum.certificate.storage_floor
    if math.isnan(floor):
        raise ValueError("this spectrum carries no storage floor: take it from a delta of two checkpoints")
    return max(floor, spectrum.certificate.roundoff, spectrum.certificate.squared_roundoff)


# Truncation (Eckart–Young–Mirsky) ---------------------------------------------------------------------------------


def energy_curve(spectrum: Spectrum) -> NDArray[np.float64]:
    """Share of ‖A‖²_F that the best rank-r approximation holds, r = 0…k; NaN for a zero matrix.

    Returns
    -------
    ndarray of shape (k + 1,)
    """
    if spectrum.frobenius == 0.0:
        return np.full(len(spectrum.values) + 1, np.nan)
    squares = np.concatenate([[0.0], np.cumsum((spectrum.values / spectrum.frobenius) ** 2)])
    # The curve of a complete spectrum ends in exactly 1.
    return np.asarray(squares / squares[-1] if spectrum.complete else np.minimum(squares, 1.0), dtype=np.float64)


def truncation_error(spectrum: Spectrum, rank: int) -> float:
    """Relative Frobenius error of the best rank-r approximation, √(Σ_{i>r}σ²)/‖A‖_F; NaN for a zero matrix.

    Parameters
    ----------
    spectrum : Spectrum
    rank : int
        r ≥ 0. Past the known values of a truncated spectrum the error is not known.

    Raises
    ------
    ValueError
        If rank is negative.
    IncompleteSpectrum
        If rank is past the known values: see `truncation_error_bounds`.

    References
    ----------
    C. Eckart and G. Young, Psychometrika 1 (1936); L. Mirsky, Q. J. Math. 11 (1960).

    Examples
    --------
    >>> import numpy as np
    >>> from spectra import spectrum
    >>> round(truncation_error(spectrum(np.diag([4.0, 3.0])), 1), 6)
    0.6
    """
    if rank < 0:
        raise ValueError(f"rank = {rank} is negative")
    rank = min(rank, spectrum.rank_limit)
    if rank > len(spectrum.values):
        _complete(spectrum, "truncation_error")
    if spectrum.frobenius == 0.0:
        return math.nan
    if spectrum.complete:  # summing the tail itself loses nothing to cancellation
        tail = spectrum.values[rank:] / spectrum.values[0]
        whole = spectrum.values / spectrum.values[0]
        return math.sqrt(float(np.sum(tail**2)) / float(np.sum(whole**2)))
    return math.sqrt(max(0.0, 1.0 - float(energy_curve(spectrum)[rank])))


def truncation_error_bounds(spectrum: Spectrum, rank: int) -> Bounds:
    """(low, high) that contain `truncation_error` at any rank."""
    if rank < 0:
        raise ValueError(f"rank = {rank} is negative")
    if spectrum.frobenius == 0.0:
        return math.nan, math.nan
    low, high = envelopes(spectrum, 2)
    rank = min(rank, spectrum.rank_limit)
    return math.sqrt(max(0.0, 1.0 - float(high[rank]))), math.sqrt(max(0.0, 1.0 - float(low[rank])))


def energy_rank(spectrum: Spectrum, share: float) -> int:
    """Least k with Σ_{i≤k}σ² ≥ share·‖A‖²_F; 0 for a zero matrix.

    Parameters
    ----------
    spectrum : Spectrum
    share : float
        Share of the energy (of σ², not of σ), in (0, 1].

    Raises
    ------
    ValueError
        If share is outside (0, 1].
    IncompleteSpectrum
        If the known values hold less than that share: see `energy_rank_bounds`.

    Examples
    --------
    >>> import numpy as np
    >>> from spectra import spectrum
    >>> A = spectrum(np.diag([3.0, 1.0, 1.0]))
    >>> energy_rank(A, 0.8), energy_rank(A, 0.9), energy_rank(A, 1.0)
    (1, 2, 3)
    """
    _check_share(share)
    if spectrum.frobenius == 0.0:
        return 0
    reached = np.flatnonzero(energy_curve(spectrum) >= share * (1 - 4 * np.finfo(np.float64).eps))
    if not len(reached):
        _complete(spectrum, "energy_rank")
    return int(reached[0])


def energy_rank_bounds(spectrum: Spectrum, share: float) -> Bounds:
    """(low, high) that contain `energy_rank`."""
    _check_share(share)
    if spectrum.frobenius == 0.0:
        return 0.0, 0.0
    low, high = envelopes(spectrum, 2)
    target = share * (1 - 4 * np.finfo(np.float64).eps)
    return float(np.flatnonzero(high >= target)[0]), float(np.flatnonzero(low >= target)[0])


def _check_share(share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share = {share} is outside (0, 1]; 0.9 means nine tenths of the energy")


# Decay ------------------------------------------------------------------------------------------------------------

MIN_POWER_LAW_TAIL = 50  # below this Clauset, Shalizi and Newman call the fit unreliable (their section 3.3)
_POWER_LAW_STARTS = 96  # candidates for the start of the tail, log-spaced: within 3 % of a full scan on real updates


def decay_exponent(spectrum: Spectrum) -> float:
    """Exponent α of a power law λ^{−α} fitted to the density of λ = σ², its start chosen by Kolmogorov–Smirnov.

    α = 1 + n/Σ ln(λ_i/λ_min), with λ_min the value whose tail is nearest to its own fitted law.

    Raises
    ------
    IncompleteSpectrum
        On a truncated spectrum, or on one with fewer than 50 non-zero values: an adapter's spectrum has no tail.

    References
    ----------
    A. Clauset, C. Shalizi and M. Newman, SIAM Review 51 (2009), eq. 3.1 and section 3.3.
    """
    values = _complete(spectrum, "decay_exponent")
    tail = values[values > max(spectrum.shape) * np.finfo(np.float64).eps * spectral_norm(spectrum)]
    if len(tail) < MIN_POWER_LAW_TAIL:
        raise IncompleteSpectrum(
            f"a power law needs at least {MIN_POWER_LAW_TAIL} non-zero singular values; this matrix has {len(tail)}"
        )
    logs = 2.0 * np.log(tail)  # descending: the first m are the tail that starts at the m-th
    excess = np.cumsum(logs) - np.arange(1, len(logs) + 1) * logs
    starts = np.unique(np.geomspace(MIN_POWER_LAW_TAIL, len(logs), _POWER_LAW_STARTS).astype(int))
    best = (math.inf, math.nan)
    for size in starts[excess[starts - 1] > 0.0]:
        alpha = 1.0 + size / excess[size - 1]
        fitted = np.exp((1.0 - alpha) * (logs[:size] - logs[size - 1]))  # survival function at each value
        above = fitted - np.arange(1, size + 1) / size
        distance = max(-float(above.min()), float(above.max()) + 1.0 / size)  # Kolmogorov–Smirnov, both sides of a step
        best = min(best, (distance, float(alpha)))
    return best[1]
