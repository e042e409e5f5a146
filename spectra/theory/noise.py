"""Noise floors: what rounding to a stored dtype adds to a delta, and what random matrices look like.

Storage rounding. A weight w stored with p fraction bits carries an error of at most half a unit in the last place,
ulp(w) = 2^(⌊log₂|w|⌋ − p), and, where the update is large against ulp, an error that is uniform in that cell: variance
ulp²/12. Those variances S_ij come from the weights alone; nothing is fitted.

Random matrices. Marchenko–Pastur's law for the singular values of an n × βn matrix of independent entries, its edge
and median, the Baik–Ben Arous–Péché transition, Gavish–Donoho's thresholds. Here n is the larger dimension, 0 < β ≤ 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Fraction bits and least normal exponent of the stored dtypes (safetensors' names). IEEE 754 and OCP 8-bit formats.
FRACTION_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
LEAST_EXPONENT = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126, "F8_E4M3": -6, "F8_E5M2": -14}

# 99.9 % quantile of the Tracy–Widom law of order 1 (real entries; Comm. Math. Phys. 177, 1996), which the tests
# recompute from the Painlevé II equation: noise alone passes the edge raised by it once in a thousand matrices.
TRACY_WIDOM_999 = 3.2724


@dataclass(frozen=True)
class StorageFloor:
    """What rounding adds to a delta, in units of the weights: `spectral` bounds ‖E‖₂, `frobenius` predicts ‖E‖_F."""

    spectral: float
    frobenius: float


def storage_floor(row_variance: ArrayLike, col_variance: ArrayLike) -> StorageFloor:
    """Size of a rounding error E from the row and column sums of its variance profile S.

    ‖E‖_F ≈ √ΣS and ‖E‖₂ ≲ √max_i Σ_j S_ij + √max_j Σ_i S_ij.

    Parameters
    ----------
    row_variance : array_like of shape (rows,)
        Σ_j S_ij, in squared units of the weights.
    col_variance : array_like of shape (cols,)
        Σ_i S_ij.

    Returns
    -------
    StorageFloor

    Raises
    ------
    ValueError
        If the two profiles do not sum to the same total within 1e-3: they are not of one matrix.

    References
    ----------
    A. Bandeira and R. van Handel, "Sharp nonasymptotic bounds on the norm of random matrices with independent entries",
    Ann. Probab. 44 (2016), thm 1.1: the leading term for independent, bounded entries.

    Examples
    --------
    >>> floor = storage_floor([4.0, 4.0], [2.0, 2.0, 2.0, 2.0])
    >>> floor.frobenius == 8**0.5, floor.spectral == 2 + 2**0.5
    (True, True)
    """
    rows = np.asarray(row_variance, dtype=np.float64)
    cols = np.asarray(col_variance, dtype=np.float64)
    total = float(rows.sum())
    if not math.isclose(total, float(cols.sum()), rel_tol=1e-3, abs_tol=1e-300):
        raise ValueError(f"row profile sums to {total:.6g} but column profile to {float(cols.sum()):.6g}")
    if total == 0.0:
        return StorageFloor(0.0, 0.0)
    return StorageFloor(math.sqrt(float(rows.max())) + math.sqrt(float(cols.max())), math.sqrt(total))


def ulp(weights: ArrayLike, dtype: str) -> NDArray[np.float64]:
    """Unit in the last place of every weight on the grid of a stored dtype; 0 where the weight is 0.

    Parameters
    ----------
    weights : array_like
        Stored values.
    dtype : str
        Safetensors' name: ``"F64"``, ``"F32"``, ``"F16"``, ``"BF16"``, ``"F8_E4M3"`` or ``"F8_E5M2"``.

    Raises
    ------
    KeyError
        For a dtype that is not floating point.

    Examples
    --------
    >>> ulp([1.0, 1.5, 2.0, 0.0], "BF16").tolist()
    [0.0078125, 0.0078125, 0.015625, 0.0]
    """
    w = np.abs(np.asarray(weights, dtype=np.float64))
    _, exponent = np.frexp(w)  # w = m·2^e with m in [½, 1): ⌊log₂ w⌋ = e − 1
    exponent = np.maximum(exponent - 1, LEAST_EXPONENT[dtype])
    return np.where(w == 0.0, 0.0, np.ldexp(1.0, exponent - FRACTION_BITS[dtype]))


def _sides(shape: tuple[int, int]) -> tuple[int, float]:
    n, p = max(shape), min(shape)
    if p < 1:
        raise ValueError(f"a {shape} matrix has no singular values")
    return n, p / n


def marchenko_pastur_edge(shape: tuple[int, int], std: float = 1.0) -> float:
    """Largest singular value of pure noise in the limit: s√n(1 + √β).

    Parameters
    ----------
    shape : tuple of int
        (rows, cols).
    std : float
        Standard deviation s of an entry.

    Raises
    ------
    ValueError
        If a dimension is 0.

    References
    ----------
    V. Marchenko and L. Pastur, Math. USSR Sb. 1 (1967).

    Examples
    --------
    >>> marchenko_pastur_edge((400, 100), 0.1)
    3.0
    """
    n, beta = _sides(shape)
    return std * math.sqrt(n) * (1.0 + math.sqrt(beta))


def finite_edge(shape: tuple[int, int], std: float = 1.0) -> float:
    """Marchenko–Pastur edge raised by its finite-size fluctuation: noise passes it once in a thousand matrices.

    √(μ + 3.27·τ) with Johnstone's centring μ = (√(n−½) + √(p−½))² and scale τ = √μ·(1/√(n−½) + 1/√(p−½))^{1/3}.

    References
    ----------
    I. Johnstone, Ann. Statist. 29 (2001), thm 1.1; the ½ is Ma's (Bernoulli 18, 2012) second-order correction.
    """
    n, beta = _sides(shape)
    large, small = math.sqrt(n - 0.5), math.sqrt(beta * n - 0.5)
    scale = (large + small) * (1.0 / large + 1.0 / small) ** (1.0 / 3.0)
    return std * math.sqrt((large + small) ** 2 + TRACY_WIDOM_999 * scale)


def _mp_mass_above(x: float, beta: float) -> float:
    """Mass of the law of λ = σ²/(s²n) above x, by quadrature in an angle that removes both square-root ends."""
    from scipy import integrate  # here and below: their import takes .4 s, and few commands come to need them

    low, high = (1.0 - math.sqrt(beta)) ** 2, (1.0 + math.sqrt(beta)) ** 2
    middle, radius = (high + low) / 2.0, (high - low) / 2.0

    def density(angle: float) -> float:
        value = middle + radius * math.cos(angle)
        return (
            (radius * math.sin(angle)) ** 2 / (2.0 * math.pi * beta * value)
            if value > 0.0
            else radius / (math.pi * beta)
        )

    angle = math.acos(min(1.0, max(-1.0, (x - middle) / radius)))
    return float(integrate.quad(density, 0.0, angle, epsabs=1e-12, epsrel=1e-12)[0])


@lru_cache(maxsize=256)
def mp_median(beta: float) -> float:
    """Median μ_β of the Marchenko–Pastur law of λ = σ²/(s²n), 0 < β ≤ 1.

    Parameters
    ----------
    beta : float
        min(shape)/max(shape).

    Raises
    ------
    ValueError
        If β is outside (0, 1].

    References
    ----------
    M. Gavish and D. Donoho, "The optimal hard threshold for singular values is 4/√3", IEEE Trans. Inf. Theory 60, 2014.

    Examples
    --------
    >>> round(mp_median(1.0), 5), round(mp_median(0.5), 5)
    (0.65278, 0.83047)
    """
    if not 0.0 < beta <= 1.0:
        raise ValueError(f"beta = {beta} is outside (0, 1]")
    from scipy import optimize

    low, high = (1.0 - math.sqrt(beta)) ** 2, (1.0 + math.sqrt(beta)) ** 2
    return float(optimize.brentq(lambda x: _mp_mass_above(x, beta) - 0.5, low, high, xtol=1e-13))


def noise_std(median: float, shape: tuple[int, int]) -> float:
    """Standard deviation of the entries of the noise whose singular values have this median: median/√(n μ_β).

    Parameters
    ----------
    median : float
        Median of ALL singular values of the matrix: not of a truncated spectrum, nor of a rank-r adapter.
    shape : tuple of int
        (rows, cols).

    Examples
    --------
    >>> round(noise_std(0.80795 * 10, (100, 100)), 3)
    1.0
    """
    n, beta = _sides(shape)
    return median / math.sqrt(n * mp_median(beta))


def gavish_donoho(beta: float) -> float:
    """Optimal hard threshold λ*(β) for singular values under known noise, in units of s√n.

    λ* = √(2(β+1) + 8β/((β+1) + √(β²+14β+1))).

    References
    ----------
    Gavish and Donoho 2014, eq. 11.

    Examples
    --------
    >>> round(gavish_donoho(1.0), 4)
    2.3094
    """
    return math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta * beta + 14 * beta + 1)))


def gavish_donoho_unknown(beta: float) -> float:
    """Optimal hard threshold ω(β) = λ*(β)/√μ_β under unknown noise, in units of the median singular value.

    References
    ----------
    Gavish and Donoho 2014, eq. 4.

    Examples
    --------
    >>> round(gavish_donoho_unknown(1.0), 4), round(gavish_donoho_unknown(0.25), 4)
    (2.8584, 1.8369)
    """
    return gavish_donoho(beta) / math.sqrt(mp_median(beta))


def bbp_image(theta: float, beta: float) -> float:
    """Where a planted singular value θ appears in noise, both in units of s√n: at the edge 1 + √β unless θ > β^¼.

    √((θ + 1/θ)(θ + β/θ)) above the transition.

    References
    ----------
    F. Benaych-Georges and R. Nadakuditi, J. Multivariate Anal. 111 (2012), section 3.1; Baik, Ben Arous, Péché (2005).

    Examples
    --------
    >>> bbp_image(0.5, 1.0), bbp_image(2.0, 1.0)
    (2.0, 2.5)
    """
    if theta <= beta**0.25:
        return 1.0 + math.sqrt(beta)
    return math.sqrt((theta + 1.0 / theta) * (theta + beta / theta))
