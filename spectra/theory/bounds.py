"""Perturbation bounds that turn residuals and norms of what was left out into intervals for singular values."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


def _two_by_two(head: ArrayLike, rest: ArrayLike, coupling: ArrayLike) -> Vector:
    """Largest eigenvalue of [[head, e], [e, rest]], with coupling = e²."""
    head, rest = np.asarray(head, dtype=np.float64), np.asarray(rest, dtype=np.float64)
    half = (head - rest) / 2.0
    return np.asarray((head + rest) / 2.0 + np.sqrt(half * half + coupling), dtype=np.float64)


def rayleigh_ritz_upper(values: ArrayLike, residuals: ArrayLike, tail: float) -> Vector:
    """Upper bounds on singular values from Rayleigh–Ritz values, residuals and the norm of what they leave.

    In the basis of the left vectors U and their complement, AAᵀ = [[Θ, Eᵀ], [E, C]] with Θ = diag(s²), ‖C‖₂ ≤ tail² and
    ‖E_:i‖ = residual_i. For μ > ‖C‖ the inertia of the Schur complement Θ − μ + Eᵀ(μ − C)⁻¹E gives

        λ_i(AAᵀ) ≤ ½(θ_i + c + √((θ_i − c)² + 4e²)),   c = ‖C‖₂, e = ‖E‖₂.

    The same holds with only the first j ≥ i vectors kept apart: then e shrinks to their residuals and c becomes a
    bound on all that remains, found by the same formula. The best j is taken, and never more than Weyl's θ_i + c.

    Parameters
    ----------
    values : array_like of shape (k,)
        s, descending, in the units of a singular value.
    residuals : array_like of shape (k,)
        ‖AAᵀu_i − s_i²u_i‖, in squared units.
    tail : float
        Upper bound on ‖(I − UUᵀ)A‖₂.

    Returns
    -------
    ndarray of shape (k + 1,)
        Upper bounds on σ_1…σ_k and, last, on σ_{k+1}.

    References
    ----------
    C.-K. Li and R.-C. Li, "A note on eigenvalues of perturbed Hermitian matrices", Linear Algebra Appl. 395 (2005).

    Examples
    --------
    Exact vectors have no residual, and the tail does not matter:

    >>> rayleigh_ritz_upper([3.0, 2.0], [0.0, 0.0], 1.0).tolist()
    [3.0, 2.0, 1.0]
    """
    theta = np.asarray(values, dtype=np.float64) ** 2
    coupling = np.asarray(residuals, dtype=np.float64) ** 2
    before = np.cumsum(coupling)  # e² of the first j vectors, as a Frobenius norm
    after = np.append(np.cumsum(coupling[::-1])[::-1][1:], 0.0)
    rest = np.full(len(theta), tail**2)  # c: norm of what the first j vectors leave
    rest[:-1] = np.minimum(_two_by_two(theta[1:], tail**2, after[:-1]), theta[1:] + tail**2)
    bound = theta + tail**2
    for j in range(len(theta)):
        bound[: j + 1] = np.minimum(bound[: j + 1], _two_by_two(theta[: j + 1], rest[j], before[j]))
    return np.asarray(np.sqrt(np.append(bound, tail**2)), dtype=np.float64)
