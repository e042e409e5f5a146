"""Perturbation bounds that turn residuals and norms of what was left out into intervals for singular values."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

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


def block_lanczos_factor(dimension: int, width: int, blocks: int, failure_probability: float) -> float:
    """Factor by which block Lanczos' estimate of ‖R‖₂ can fall short of it, except with a given probability.

    Let v₁ … v_n be the right singular vectors of R, its norm scaled to 1, and Ω the Gaussian start, n × b. The start
    x = Ωc with c along Ωᵀv₁ has ⟨x, v₁⟩² ~ χ²_b and, independently, N(0, 1) along every other v_i: the squared tangent
    of its angle to v₁ is a ratio of χ²_{n−1} to χ²_b. Its Krylov space lies in the block's. For every polynomial p of
    degree k − 1, an estimate λ̂ < 1 − ε of λ₁(RᵀR) = 1 would mean Σ (λ_i − 1 + ε) p(λ_i)² x_i² < 0, hence

        ε p(1)² x₁² < max over λ in [0, 1 − ε] of (1 − ε − λ) p(λ)² · Σ_{i>1} x_i².

    p((1 − ε)t²) = U_{2k−2}(t), Chebyshev's of the second kind, makes that maximum 1 − ε, and leaves
    sinh((2k − 1) artanh √ε) < tan∠(x, v₁). Solved for ε, with τ a quantile of the tangent:

        ‖R‖₂ ≤ σ̂ · cosh(arsinh(τ) / (2k − 1)).

    J. Kuczyński and H. Woźniakowski (SIAM J. Matrix Anal. Appl. 13, 1992, thm 4.2) have the same for a single start.

    Parameters
    ----------
    dimension : int
        n, length of the start's columns.
    width : int
        b, columns of the start.
    blocks : int
        k, blocks of the Krylov space.
    failure_probability : float
        In (0, 1).

    Returns
    -------
    float
        At least 1.

    Examples
    --------
    >>> round(block_lanczos_factor(2048, 16, 4, 1e-9), 3)
    1.242
    """
    ratio = float(stats.f.isf(failure_probability, dimension - 1, width)) * (dimension - 1) / width
    return math.cosh(math.asinh(math.sqrt(ratio)) / (2 * blocks - 1))
