"""How much of an update lies inside leading directions: captured shares, the best that can be, amplification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectra.errors import UsageError
from spectra.values import Spectrum, Vector


@dataclass(frozen=True, eq=False)
class Capture:
    """Share of ‖Δ‖²_F inside the r leading directions of another update, r = 1, 2, …

    Parameters
    ----------
    left, right : ndarray of shape (r,)
        ‖U_rᵀΔ‖²_F/‖Δ‖²_F and ‖ΔV_r‖²_F/‖Δ‖²_F: inside the column and the row space.
    both : ndarray of shape (r,)
        ‖U_rᵀΔV_r‖²_F/‖Δ‖²_F: inside both at once. Never more than either, nor than `optimal_capture`.
    """

    left: Vector
    right: Vector
    both: Vector


def capture_curve(left_image: ArrayLike, right_image: ArrayLike, core: ArrayLike, frobenius: float) -> Capture:
    """Share of an update's energy inside the leading directions of another, from what it does to them.

    Parameters
    ----------
    left_image : array_like of shape (r, cols)
        UᵀΔ, U (rows, r) the orthonormal left vectors of the other, leading first.
    right_image : array_like of shape (rows, r)
        ΔV, V (cols, r) its right vectors.
    core : array_like of shape (r, r)
        UᵀΔV.
    frobenius : float
        ‖Δ‖_F.

    Returns
    -------
    Capture
        NaN for a zero update.

    Raises
    ------
    UsageError
        If the three are not of one rank r.

    Examples
    --------
    >>> delta = np.diag([2.0, 1.0, 2.0])
    >>> capture_curve(delta[:2], delta[:, :2], delta[:2, :2], 3.0).both.round(3).tolist()
    [0.444, 0.556]
    """
    left_image, right_image, core = (np.asarray(a, dtype=np.float64) for a in (left_image, right_image, core))
    rank = len(left_image)
    if left_image.ndim != 2 or right_image.ndim != 2 or right_image.shape[1] != rank or core.shape != (rank, rank):
        raise UsageError(
            f"images of shapes {left_image.shape} and {right_image.shape} and a core of shape {core.shape} do not "
            "belong together: for r directions they are (r, cols), (rows, r) and (r, r)"
        )
    return Capture(
        left=_shares(np.cumsum(_squares(left_image, frobenius).sum(axis=1)), frobenius),
        right=_shares(np.cumsum(_squares(right_image, frobenius).sum(axis=0)), frobenius),
        both=_shares(_leading_blocks(_squares(core, frobenius)), frobenius),
    )


def optimal_capture(a: Spectrum) -> Vector:
    """Share of ‖A‖²_F that the best subspaces of dimension r hold, r = 1…k: Σ_{i≤r} σ_i²/‖A‖²_F.

    Parameters
    ----------
    a : Spectrum

    Returns
    -------
    ndarray of shape (k,)
        NaN for a zero matrix.

    References
    ----------
    C. Eckart and G. Young, Psychometrika 1 (1936).

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> optimal_capture(Spectrum(np.array([2.0, 1.0]), (3, 2), 5**0.5, Certificate("by hand"))).round(3).tolist()
    [0.8, 1.0]
    """
    return _shares(np.cumsum(_squares(a.values, a.frobenius)), a.frobenius)


def amplification(frobenius: float, core: ArrayLike) -> Vector:
    """‖ΔW‖_F/‖U_rᵀWV_r‖_F: how much larger an update is than what the base had in its r leading directions.

    Parameters
    ----------
    frobenius : float
        ‖ΔW‖_F.
    core : array_like of shape (r, r)
        UᵀWV, U and V the leading singular vectors of ΔW. By Hu et al. V is written as Vᵀ.

    Returns
    -------
    ndarray of shape (r,)
        For 1…r directions; inf where the base has nothing in them. For random directions the root mean square of the
        denominator is that of `spectra.theory.chance.amplification_mean_square`.

    Raises
    ------
    UsageError
        If the core is not square.

    References
    ----------
    E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 7.3 and table 7.

    Examples
    --------
    >>> amplification(6.0, [[3.0, 0.0], [0.0, 4.0]]).tolist()
    [2.0, 1.2]
    """
    core = np.asarray(core, dtype=np.float64)
    if core.ndim != 2 or core.shape[0] != core.shape[1]:
        raise UsageError(f"a core of shape {core.shape} is not UᵀWV for as many left directions as right ones")
    scale = float(np.abs(core).max(initial=0.0)) or 1.0
    size = scale * np.sqrt(_leading_blocks(_squares(core, scale)))
    nothing = np.full(len(core), math.inf if frobenius > 0.0 else math.nan)
    return np.asarray(np.divide(frobenius, size, out=nothing, where=size > 0.0), dtype=np.float64)


def _squares(a: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """(a/scale)², which neither over- nor underflows; 0 for a zero scale."""
    return np.square(a / scale) if scale > 0.0 else np.zeros_like(a)


def _leading_blocks(squares: NDArray[np.float64]) -> Vector:
    """Sums of the leading 1 × 1, 2 × 2, … blocks."""
    return np.asarray(np.diagonal(np.cumsum(np.cumsum(squares, axis=0), axis=1)), dtype=np.float64)


def _shares(sums: Vector, frobenius: float) -> Vector:
    return np.minimum(sums, 1.0) if frobenius > 0.0 else np.full(len(sums), math.nan)
