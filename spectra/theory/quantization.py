"""What rounding to a few levels costs Gaussian weights, the bounds it is held to, and what low rank can take back.

Errors are relative: ‖W − Ŵ‖²_F/‖W‖²_F in the limit of many entries, which for entries of variance 1 is the mean squared
error of one. The error matrix of independent weights has entries that are as good as independent: its squared singular
values follow Marchenko and Pastur's law, and the share of ‖E‖²_F in its r largest depends on the shape and on r/p
alone. Models of different widths are compared at equal r/p, not at equal r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize, special

Vector = NDArray[np.float64]

# Probability that a block's largest entry is left out on either side of the quadrature: below float64's resolution.
_LEFT_OUT = 1e-18

# Gauss–Legendre nodes over the largest entry. The integrand is analytic: between 128 and 512 nodes the error moves by
# less than 1e-11 of itself for blocks of 1 to 10⁶ entries and up to 256 levels.
_NODES = 256

# 1024 levels: Newton's steps stay right to 1e-10 of the error, and no code book here is larger than 256.
_MOST_BITS = 10.0

# Lloyd's own steps before Newton's: from fewer than five Newton's does not settle at 64 levels.
_LLOYD_STEPS = 20


@dataclass(frozen=True)
class ScalarQuantizer:
    """Levels for a unit normal, and the mean squared error of rounding to the nearest.

    Attributes
    ----------
    levels : tuple of float
        Ascending.
    mse : float
        Of a variance of 1, so that it is relative too.
    """

    levels: tuple[float, ...]
    mse: float


def gaussian_block_mse(levels: ArrayLike, block: int) -> float:
    """Relative squared error of independent normal weights that are divided by their block's largest and rounded.

    Of a block of B normal entries M is the largest absolute one, with the density 2Bφ(m)(2Φ(m) − 1)^{B−1}. Given M,
    the other entries are normal and cut off at ±M, independent of each other; they are rounded to M·l where l is the
    level nearest to w/M. The largest itself is rounded from ±1 and costs nothing where ±1 are levels. Hence

        MSE = ∫ [(1 − 1/B)·Σ_l ∫_{cell of l} (w − m l)² φ(w) dw / (2Φ(m) − 1) + d·m²/B] dF(m),

    d the mean of (1 − l(1))² and (1 + l(−1))². The inner integrals have closed forms in Φ and φ; the outer one is a
    quadrature in one variable, right to about 1e-15.

    Parameters
    ----------
    levels : array_like
        Numbers in [−1, 1], in any order, at least one.
    block : int
        B, entries a scale. Scales are taken as exact: to store them in eight bits costs a little more.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there is no level, one lies outside [−1, 1], or the block is not positive.

    References
    ----------
    The law of the block's maximum as the key to block formats: D. Yoshida, "NF4 Isn't Information Theoretically Optimal
    (and that's Good)", arXiv:2306.06965, 2023.

    Examples
    --------
    >>> ternary = gaussian_block_mse([-1.0, 0.0, 1.0], 64)
    >>> round(ternary, 4), gaussian_block_mse([-1.0, 1.0], 1)
    (0.5148, 0.0)
    """
    found = np.unique(np.asarray(levels, dtype=np.float64))
    if found.size == 0 or not np.all(np.abs(found) <= 1.0):
        raise ValueError(f"levels are numbers in [−1, 1], at least one, not {found.tolist()[:8]}")
    if block < 1:
        raise ValueError(f"a block of {block} entries has no largest")
    return _gaussian_block_mse(tuple(found.tolist()), int(block))


@lru_cache(maxsize=256)
def _gaussian_block_mse(levels: tuple[float, ...], block: int) -> float:
    nodes, weights = special.roots_legendre(_NODES)
    low, high = _largest_quantiles(block)
    m = (low + high) / 2.0 + (high - low) / 2.0 * nodes  # (nodes,)
    inside = special.erf(m / math.sqrt(2.0))  # 2Φ(m) − 1
    log_density = math.log(2.0 * block) - m**2 / 2.0 - math.log(math.sqrt(2.0 * math.pi))
    if block > 1:
        log_density += (block - 1) * np.log1p(-special.erfc(m / math.sqrt(2.0)))
    density = (high - low) / 2.0 * weights * np.exp(log_density)
    ends = (1.0 - max(levels)) ** 2 / 2.0 + (1.0 + min(levels)) ** 2 / 2.0
    error = ends * m**2 / block
    if block > 1:
        error += (1.0 - 1.0 / block) * _cell_errors(np.array(levels), m) / inside
    return float(density @ error)


def _largest_quantiles(block: int) -> tuple[float, float]:
    """Between which the largest of B absolute normal entries lies but for `_LEFT_OUT` on either side."""
    low = math.sqrt(2.0) * float(special.erfinv(math.exp(math.log(_LEFT_OUT) / block)))
    return low, -float(special.ndtri(_LEFT_OUT / (2.0 * block)))


def _cell_errors(levels: Vector, m: Vector) -> Vector:
    """Σ_l ∫_{cell of l} (w − m l)² φ(w) dw over [−m, m], for each m; levels ascending."""
    edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2.0, [1.0]])
    ends = m[:, None] * edges  # (nodes, cells + 1)
    heights = _density(ends)
    mass, moment = np.diff(special.ndtr(ends)), -np.diff(heights)  # ∫φ, ∫wφ
    square = mass - np.diff(ends * heights)  # ∫w²φ
    targets = m[:, None] * levels
    return np.asarray((square - 2.0 * targets * moment + targets**2 * mass).sum(axis=1), dtype=np.float64)


@lru_cache(maxsize=64)
def lloyd_max(bits: float) -> ScalarQuantizer:
    """Levels that round a unit normal with the least mean squared error.

    Each level is the mean of its cell, each cell ends midway between two levels [1]_: necessary anywhere, and for the
    normal law, whose logarithm is concave, sufficient [2]_. Solved by a few of Lloyd's own steps from the asymptotic
    levels of many bits, quantiles of a normal law of three times the variance, and then by Newton's method, whose
    Jacobian is tridiagonal.

    Parameters
    ----------
    bits : float
        From 0 to 10. There are ⌊2^bits⌋ levels, as many as so many bits can number: 17 for 4.127.

    Returns
    -------
    ScalarQuantizer

    Raises
    ------
    ValueError
        If bits is outside 0…10.

    References
    ----------
    .. [1] J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I, whose error at 4
       bits is .009497; S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982).
    .. [2] P. Fleischer, "Sufficient conditions for achieving minimum distortion in a quantizer", IEEE Int. Conv. Rec.
       (1964).

    Examples
    --------
    >>> [round(lloyd_max(bits).mse, 6) for bits in (1, 2, 3, 4)]
    [0.36338, 0.117482, 0.034548, 0.009501]
    >>> [round(level, 4) for level in lloyd_max(2).levels]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    if not 0.0 <= bits <= _MOST_BITS:
        raise ValueError(f"bits = {bits} is outside 0…{_MOST_BITS:g}")
    count = math.floor(2.0**bits)
    levels = math.sqrt(3.0) * special.ndtri((np.arange(count) + 0.5) / count)
    for _ in range(_LLOYD_STEPS):
        mass, moment, _ = _cells(levels)
        levels = moment / mass
    for _ in range(50):
        step = _newton_step(levels)
        while not np.all(np.diff(levels + step) > 0.0):
            step = step / 2.0
        levels = levels + step
        if float(np.abs(step).max()) < 1e-12 * (1.0 + float(levels[-1])):
            break
    levels = (levels - levels[::-1]) / 2.0  # the law is symmetric, and so is its optimum
    mass, moment, _ = _cells(levels)
    return ScalarQuantizer(tuple(levels.tolist()), float(1.0 - 2.0 * levels @ moment + levels**2 @ mass))


def _cells(levels: Vector) -> tuple[Vector, Vector, Vector]:
    """Mass and first moment of each cell, and the ends between cells."""
    ends = (levels[1:] + levels[:-1]) / 2.0
    outer = np.concatenate([[-math.inf], ends, [math.inf]])
    # Masses of cells right of 0 from the right: Φ itself would round them off.
    left, right = np.diff(special.ndtr(outer)), -np.diff(special.ndtr(-outer))
    return np.where(levels > 0.0, right, left), -np.diff(_density(outer)), ends


def _newton_step(levels: Vector) -> Vector:
    """Newton's step towards G_i = x_i·∫φ − ∫wφ = 0, half of the gradient of the error by the levels."""
    mass, moment, ends = _cells(levels)
    height = _density(ends) / 2.0
    below, above = height * (ends - levels[1:]), height * (levels[:-1] - ends)  # by the left and right neighbour: < 0
    diagonal = mass.copy()
    diagonal[1:] += below
    diagonal[:-1] += above
    banded = np.zeros((3, len(levels)))
    banded[0, 1:], banded[1], banded[2, :-1] = above, diagonal, below
    return np.asarray(linalg.solve_banded((1, 1), banded, moment - levels * mass), dtype=np.float64)


def _density(x: Vector) -> Vector:
    return np.asarray(np.exp(-(x**2) / 2.0) / math.sqrt(2.0 * math.pi), dtype=np.float64)


def rate_distortion(bits: float) -> float:
    """Least relative squared error of independent normal weights at so many bits each, by any code at all: 2^(−2·bits).

    Parameters
    ----------
    bits : float
        Not negative; everything stored, over the number of weights.

    Raises
    ------
    ValueError
        If bits is negative.

    References
    ----------
    C. Shannon, "Coding theorems for a discrete source with a fidelity criterion" (1959); T. Cover and J. Thomas,
    "Elements of Information Theory" (2006), theorem 10.3.2.

    Examples
    --------
    >>> rate_distortion(1), round(rate_distortion(4.127), 5)
    (0.25, 0.00328)
    """
    if not bits >= 0.0:
        raise ValueError(f"bits = {bits} is negative")
    return float(2.0 ** (-2.0 * bits))


def marchenko_pastur_tail(value: ArrayLike, beta: float) -> tuple[Vector, Vector]:
    """Mass of the Marchenko–Pastur law above a value, and the share of its mean that this mass holds.

    The law of λ = σ²/(s²n) for n × βn matrices of independent entries of standard deviation s. With
    λ = 1 + β + 2√β cos θ the density's square roots are sines, and both integrals have closed forms:

        mass  = [(1 + β)θ − 2√β sin θ − 2(1 − β) arctan((1 − √β)/(1 + √β)·tan(θ/2))]/(2πβ)
        share = (θ − sin θ cos θ)/π.

    Parameters
    ----------
    value : array_like
        Of λ; below the law's support everything is above it.
    beta : float
        min(shape)/max(shape), in (0, 1].

    Returns
    -------
    mass, share : ndarray
        In [0, 1], shaped as `value`.

    Raises
    ------
    ValueError
        If β is outside (0, 1].

    References
    ----------
    V. Marchenko and L. Pastur, "Distribution of eigenvalues for some sets of random matrices", Math. USSR Sb. 1 (1967).

    Examples
    --------
    >>> mass, share = marchenko_pastur_tail(2.0, 1.0)
    >>> round(float(mass), 4), float(share)
    (0.1817, 0.5)
    """
    _check_beta(beta)
    middle = (np.asarray(value, dtype=np.float64) - 1.0 - beta) / (2.0 * math.sqrt(beta))
    angle = np.arccos(np.clip(middle, -1.0, 1.0))
    return _mass(angle, beta), _share(angle)


def best_rank_share(beta: float, fraction: float) -> float:
    """Share of ‖E‖²_F in the largest singular values of a matrix of independent entries: what low rank can take back.

    Parameters
    ----------
    beta : float
        min(shape)/max(shape), in (0, 1].
    fraction : float
        r/p: which fraction of the p = min(shape) singular values, in [0, 1].

    Returns
    -------
    float
        Of the limit of large matrices, the entries of any law with four moments; at p = 384 random matrices are
        within 1 % of it for r = 1 and within 0.1 % from r = 16.

    Raises
    ------
    ValueError
        If β is outside (0, 1], or the fraction outside [0, 1].

    Examples
    --------
    Rank 64 of square matrices takes back eight times as much at 384 rows as at 4096, and as much at equal r/p:

    >>> round(best_rank_share(1.0, 64 / 4096), 3), round(best_rank_share(1.0, 64 / 384), 3)
    (0.058, 0.469)
    """
    _check_beta(beta)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"a fraction of {fraction} of the singular values is outside [0, 1]")
    if fraction in (0.0, 1.0):
        return float(fraction)
    angle = optimize.brentq(lambda at: float(_mass(np.asarray(at), beta)) - fraction, 0.0, math.pi, xtol=1e-14)
    return float(_share(np.asarray(angle)))


def _mass(angle: Vector, beta: float) -> Vector:
    root = math.sqrt(beta)
    turn = np.arctan2((1.0 - root) * np.sin(angle / 2.0), (1.0 + root) * np.cos(angle / 2.0))
    whole = (1.0 + beta) * angle - 2.0 * root * np.sin(angle) - 2.0 * (1.0 - beta) * turn
    return np.asarray(np.clip(whole / (2.0 * math.pi * beta), 0.0, 1.0), dtype=np.float64)


def _share(angle: Vector) -> Vector:
    return np.asarray((angle - np.sin(angle) * np.cos(angle)) / math.pi, dtype=np.float64)


def _check_beta(beta: float) -> None:
    if not 0.0 < beta <= 1.0:
        raise ValueError(f"beta = {beta} is outside (0, 1]")
