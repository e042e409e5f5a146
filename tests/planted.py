"""Matrices whose singular values are known: planted ones, and the classical gallery with mpmath as the judge."""

from __future__ import annotations

from functools import cache

import mpmath
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def orthonormal(rows: int, cols: int, seed: int) -> Array:
    """Haar-distributed orthonormal columns (rows, cols)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, cols)))
    return q * np.sign(np.diag(r))


def planted(values: Array, rows: int, cols: int, *, seed: int = 0) -> Array:
    """A rows × cols matrix with these leading singular values and zeros beyond."""
    values = np.asarray(values, dtype=np.float64)
    k = len(values)
    return (orthonormal(rows, k, seed) * values) @ orthonormal(cols, k, seed + 1).T


def hilbert(n: int) -> Array:
    return 1.0 / (np.arange(n)[:, None] + np.arange(n)[None, :] + 1.0)


def kahan(n: int, angle: float = 1.2) -> Array:
    s, c = np.sin(angle), np.cos(angle)
    upper = np.eye(n) - c * np.triu(np.ones((n, n)), 1)
    return s ** np.arange(n)[:, None] * upper


def graded(n: int) -> Array:
    """Rows shrinking by a factor of ten each."""
    return np.random.default_rng(7).standard_normal((n, n)) * 10.0 ** -np.arange(n)[:, None]


def clustered(n: int) -> Array:
    values = np.where(np.arange(n) < n // 2, 1.0 + 1e-13 * np.arange(n), 1e-6)
    return planted(np.sort(values)[::-1], n, n, seed=3)


def golub_kahan(n: int) -> Array:
    """Upper bidiagonal, ones on both diagonals: ill-conditioned for its size."""
    return np.eye(n) + np.diag(np.ones(n - 1), 1)


def lapack_type(kind: int, n: int, condition: float = 1e8) -> Array:
    """Spectra of LAPACK's test generator DLATMS, modes 1 to 5."""
    i = np.arange(n)
    rng = np.random.default_rng(100 + kind)
    values = {
        1: np.where(i == 0, 1.0, 1.0 / condition),
        2: np.where(i == n - 1, 1.0 / condition, 1.0),
        3: condition ** (-i / (n - 1)),
        4: 1.0 - i / (n - 1) * (1.0 - 1.0 / condition),
        5: np.sort(condition ** -rng.uniform(size=n))[::-1],
    }[kind]
    return planted(values, n, n, seed=kind)


def tall(n: int) -> Array:
    return planted(0.5 ** np.arange(n), 3 * n, n, seed=11)


GALLERY = {
    "hilbert": hilbert(10),
    "kahan": kahan(12),
    "graded": graded(10),
    "clustered": clustered(12),
    "golub_kahan": golub_kahan(14),
    "tall": tall(9),
    "wide": tall(9).T.copy(),
    **{f"lapack_{kind}": lapack_type(kind, 12) for kind in range(1, 6)},
}


@cache
def exact_values(name: str) -> Array:
    """Singular values of a gallery matrix, from 80-digit arithmetic on its float64 entries."""
    with mpmath.workdps(80):
        matrix = mpmath.matrix(GALLERY[name].tolist())
        if matrix.rows < matrix.cols:
            matrix = matrix.T
        values = mpmath.svd_r(matrix, compute_uv=False)
        return np.array([float(v) for v in values])
