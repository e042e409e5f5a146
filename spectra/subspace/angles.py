"""Principal angles between two subspaces, right to rounding for small angles too, and distances made of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spectra.errors import UsageError
from spectra.subspace.bases import Array, deviation, orthonormal
from spectra.values import Vector

# How far columns may be from orthonormal to be taken as a basis: float32 engines leave 1e-5, a forgotten
# orthonormalization leaves of the order of 1.
_ORTHONORMAL = 1e-3


def principal_angles(x: ArrayLike, y: ArrayLike) -> Vector:
    """Principal angles between the spans of two orthonormal bases.

    Cosines are the singular values of XᵀY; near 1 they say nothing of the angle below √ε ≈ 10⁻⁸. Sines are those of
    (1 − XXᵀ)Y, Y the smaller basis, and say as little near 90°. Each is taken on its side of 45°.

    Parameters
    ----------
    x : array_like of shape (D, i)
        Orthonormal columns, float32 or float64.
    y : array_like of shape (D, j)

    Returns
    -------
    ndarray of shape (min(i, j),)
        Radians, ascending, in [0, π/2]; right to a few ε for float64 bases.

    Raises
    ------
    UsageError
        If the lengths differ, or columns are not orthonormal.

    References
    ----------
    Å. Björck and G. Golub, "Numerical methods for computing angles between linear subspaces", Math. Comp. 27 (1973);
    A. Knyazev and M. Argentati, SIAM J. Sci. Comput. 23 (2002), alg. 3.1.

    Examples
    --------
    >>> turned = np.array([[np.cos(1e-9)], [np.sin(1e-9)], [0.0]])
    >>> print(principal_angles(np.eye(3)[:, :2], turned), principal_angles(np.eye(3)[:, :1], turned))
    [0.] [1.e-09]
    """
    x, y = _as_basis(x, "x"), _as_basis(y, "y")
    if len(x) != len(y):
        raise UsageError(f"x is in {len(x)} dimensions and y in {len(y)}; subspaces of different spaces have no angle")
    large, small = (x, y) if x.shape[1] >= y.shape[1] else (y, x)
    cross = large.T @ small
    cosines = np.clip(np.linalg.svd(cross, compute_uv=False), 0.0, 1.0)
    sines = np.clip(np.linalg.svd(small - large @ cross, compute_uv=False)[::-1], 0.0, 1.0)
    return np.sort(np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines)))


def _as_basis(columns: ArrayLike, name: str) -> Array:
    held = np.asarray(columns)
    if held.ndim != 2 or held.shape[0] < held.shape[1]:
        raise UsageError(f"{name} of shape {held.shape} is no basis; a subspace is given by orthonormal columns (D, i)")
    off = deviation(held)
    if not off <= _ORTHONORMAL:
        raise UsageError(
            f"the columns of {name} are not orthonormal (off by {off:.2g}); np.linalg.qr({name})[0] makes them so"
        )
    return orthonormal(held)


def chordal_distance(angles: ArrayLike) -> float:
    """‖sin θ‖, between 0 and √min(i, j): ‖P − Q‖_F/√2 for subspaces of one dimension.

    Parameters
    ----------
    angles : array_like of shape (r,)
        Radians, of `principal_angles`.

    References
    ----------
    A. Edelman, T. Arias and S. Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3.

    Examples
    --------
    >>> chordal_distance([0.0, np.pi / 2])
    1.0
    """
    return float(np.linalg.norm(np.sin(np.asarray(angles, dtype=np.float64))))


def geodesic_distance(angles: ArrayLike) -> float:
    """‖θ‖ in radians: length of the shortest way between two subspaces of one dimension.

    Parameters
    ----------
    angles : array_like of shape (r,)
        Radians, of `principal_angles`.

    References
    ----------
    Edelman, Arias and Smith 1998, section 4.3.

    Examples
    --------
    >>> geodesic_distance([3.0, 4.0])
    5.0
    """
    return float(np.linalg.norm(np.asarray(angles, dtype=np.float64)))
