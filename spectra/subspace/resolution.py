"""Which leading singular subspaces are determined: how far storage, roundoff and iteration can have turned them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from spectra.theory import bounds
from spectra.values import Spectrum, Vector

# Float32 vectors: rounded, and found by float32 products before that; as for the values (`linalg.sketch`), 8 ε σ₁.
_FLOAT32 = 8.0 * float(np.finfo(np.float32).eps)


def vector_roundoff(a: Spectrum) -> float:
    """Bound on ‖Av_i − s_iu_i‖ and ‖Aᵀu_i − s_iv_i‖ that is left by vectors held in float32; 0 for float64.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> A = Spectrum(np.array([2.0]), (3, 1), 2.0, Certificate("by hand"), left=np.eye(3, 1, dtype=np.float32))
    >>> vector_roundoff(A) / 2.0**-23
    16.0
    """
    held = any(vectors is not None and vectors.dtype == np.float32 for vectors in (a.left, a.right))
    return _FLOAT32 * float(a.values[0]) if held else 0.0


def subspace_sines(a: Spectrum) -> Vector:
    """Bounds on the sines of the angles that all known errors can have turned the leading subspaces by.

    The error is the storage floor (where the certificate has one) and roundoff, and to the vectors of a sketch also
    the residuals of the leading i, √Σ_{j≤i} residual_j². A route that finds σ², with an error of q², has residuals of
    q²/σ_i: AAᵀu = σ²u + e leaves Av = σu + e/σ.

    Parameters
    ----------
    a : Spectrum
        Vectors are not looked at, but for their element type.

    Returns
    -------
    ndarray of shape (k,)
        For i = 1…k: at most this, left and right; 1 where nothing is known. With the `failure_probability` of the
        certificate.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> A = Spectrum(np.array([5.0, 4.0, 1.0]), (3, 9), 42**0.5, Certificate("by hand", storage_floor=0.5))
    >>> subspace_sines(A).tolist()
    [1.0, 0.2, 1.0]
    """
    residuals = a.certificate.residuals
    gathered = 0.0 if residuals is None else np.sqrt(np.cumsum(np.square(residuals)))
    sines = bounds.wedin_sines(
        a.values, _perturbation(a), next_value=a.tail_limit(), upper=a.interval()[1], residuals=gathered
    )
    if a.shape[0] == a.shape[1] and a.complete:
        sines[-1:] = 0.0  # the whole space, on both sides
    return sines


def direction_sines(a: Spectrum) -> Vector:
    """Bounds on the sines of the angles that all known errors can have turned every single vector by.

    Parameters
    ----------
    a : Spectrum

    Returns
    -------
    ndarray of shape (k,)
        For the i-th left and right vector; 1 where nothing is known.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> A = Spectrum(np.array([9.0, 4.0, 3.5]), (3, 9), 1e3, Certificate("by hand", storage_floor=0.5))
    >>> direction_sines(A).round(3).tolist()
    [0.157, 1.0, 1.0]
    """
    residuals = a.certificate.residuals
    return bounds.vector_sines(
        a.values,
        _perturbation(a),
        next_value=a.tail_limit(),
        upper=a.interval()[1],
        residuals=0.0 if residuals is None else residuals,
    )


def resolved_ranks(a: Spectrum) -> NDArray[np.bool_]:
    """Which leading subspaces no known error can have turned by more than 30°.

    Returns
    -------
    ndarray of shape (k,), bool

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> A = Spectrum(np.array([5.0, 4.0, 1.0]), (3, 9), 42**0.5, Certificate("by hand", storage_floor=0.5))
    >>> resolved_ranks(A).tolist()
    [False, True, False]
    """
    return np.asarray(subspace_sines(a) <= bounds.RESOLVED)


def _perturbation(a: Spectrum) -> Vector:
    certificate = a.certificate
    floor = 0.0 if math.isnan(certificate.storage_floor) else certificate.storage_floor
    size = np.full(len(a.values), floor + certificate.roundoff)
    squared = np.full(len(a.values), certificate.squared_roundoff)
    size += squared * np.divide(squared, a.values, out=np.ones_like(squared), where=a.values > squared)
    return size + vector_roundoff(a)
