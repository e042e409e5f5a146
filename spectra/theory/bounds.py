"""Perturbation bounds: from residuals, and norms of what was left out or added, to intervals of values and angles."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Vector = NDArray[np.float64]

# A subspace or vector counts as resolved where the bound on its sine is at most this: nothing turned it by over 30°,
# three quarters of its energy (cos²) are where they seem to be.
RESOLVED = 0.5


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
    # P(χ²_{n−1}/χ²_b > t) = I_{1/(1 + t)}(b/2, (n−1)/2); `scipy.stats` has it too, and takes .7 s to import.
    share = float(special.betaincinv(width / 2.0, (dimension - 1) / 2.0, failure_probability))
    ratio = (1.0 - share) / share
    return math.cosh(math.asinh(math.sqrt(ratio)) / (2 * blocks - 1))


def weyl(values: ArrayLike, perturbation: ArrayLike) -> tuple[Vector, Vector]:
    """Intervals for the singular values of A − E from those of A and a bound on ‖E‖₂: no value moves by more.

    Parameters
    ----------
    values : array_like of shape (k,)
        σ of A, descending.
    perturbation : array_like
        Bound on ‖E‖₂, in the units of a singular value.

    Returns
    -------
    low, high : ndarray of shape (k,)
        max(σ − ‖E‖, 0) and σ + ‖E‖.

    Raises
    ------
    ValueError
        If the perturbation is negative.

    References
    ----------
    H. Weyl, Math. Ann. 71 (1912); for singular values G. W. Stewart and J. Sun, "Matrix Perturbation Theory" (1990),
    thm IV.4.11.

    Examples
    --------
    >>> low, high = weyl([3.0, 1.0], 2.0)
    >>> low.tolist(), high.tolist()
    ([1.0, 0.0], [5.0, 3.0])
    """
    sigma, size = _observed(values, perturbation)
    return np.maximum(sigma - size, 0.0), sigma + size


def wedin_sines(
    values: ArrayLike,
    perturbation: ArrayLike,
    *,
    next_value: float = 0.0,
    upper: ArrayLike | None = None,
    residuals: ArrayLike = 0.0,
) -> Vector:
    """How far the leading singular subspaces of A may be turned against those of A₀ = A − E.

    Let U, S, V hold the leading i triplets of A, s = σ_i the least of them, and Ũ₂, Ṽ₂ all left and right singular
    vectors of A₀ but its leading i, with values Σ̃₂, the largest of them σ̃ = σ_{i+1}(A₀). The sines of the principal
    angles between U and the leading left vectors of A₀ are the singular values of X = Ũ₂ᵀU; on the right Y = Ṽ₂ᵀV.
    A₀V = US − EV times Ũ₂ᵀ, and A₀ᵀU = VS − EᵀU times Ṽ₂ᵀ, are

        XS = Σ̃₂Y + Ũ₂ᵀEV,    YS = Σ̃₂ᵀX + Ṽ₂ᵀEᵀU,

    hence s‖X‖ ≤ σ̃‖Y‖ + ‖E‖ and s‖Y‖ ≤ σ̃‖X‖ + ‖E‖, and for the larger of the two (s − σ̃)·max(‖X‖, ‖Y‖) ≤ ‖E‖. Weyl
    says σ̃ ≤ σ_{i+1} + ‖E‖:

        max(sin∠(U, Ũ), sin∠(V, Ṽ)) ≤ ‖E‖ / (σ_i − σ_{i+1} − ‖E‖)    where that is in [0, 1), and else 1.

    For vectors that are only nearly those of A, AV = US + R and AᵀU = VS, the same lines give ‖E‖ + ‖R‖ above the
    fraction bar. There the s are Ritz values, which may lie below what is not found yet: then σ_{i+1} has to be an
    upper bound on the value of A.

    Parameters
    ----------
    values : array_like of shape (k,)
        σ_1…σ_k of A, descending.
    perturbation : array_like, a number or of shape (k,)
        Bound on ‖E‖₂, in the units of a singular value; for every i its own, if so given. NaN: nothing is known.
    next_value : float
        Upper bound on σ_{k+1}: 0 for a matrix that has no more.
    upper : array_like of shape (k,), optional
        Upper bounds on σ_1…σ_k of A, where `values` are from below; `values` themselves by default.
    residuals : array_like, a number or of shape (k,)
        Bound on ‖R‖₂ of the leading i triplets.

    Returns
    -------
    ndarray of shape (k,)
        For i = 1…k a bound on the sine of the largest principal angle, left and right. 1: not determined, as where
        σ_i = σ_{i+1}.

    Raises
    ------
    ValueError
        If perturbation, residuals or next_value are negative, or shapes do not fit.

    References
    ----------
    P.-Å. Wedin, "Perturbation bounds in connection with singular value decomposition", BIT 12 (1972), eq. 3.1;
    Stewart and Sun 1990, thm V.4.4.

    Examples
    --------
    >>> wedin_sines([5.0, 4.0, 1.0], 0.5).tolist()
    [1.0, 0.2, 1.0]
    """
    sigma, size = _observed(values, perturbation)
    _, off = _observed(values, residuals, "residuals")
    after = np.append(_above(sigma, upper), _next_value(next_value))[1:]
    return _quotient(size + off, sigma - after - size)


def vector_sines(
    values: ArrayLike,
    perturbation: ArrayLike,
    *,
    next_value: float = 0.0,
    upper: ArrayLike | None = None,
    residuals: ArrayLike = 0.0,
) -> Vector:
    """How far every single singular vector of A may be turned against that of A₀ = A − E.

    With u, v the pair of σ_i, and σ̃_j, ũ_j, ṽ_j all other triplets of A₀, x_j = ũ_jᵀu and y_j = ṽ_jᵀv fulfil

        σ_i x_j − σ̃_j y_j = a_j = ũ_jᵀEv,    σ_i y_j − σ̃_j x_j = b_j = ṽ_jᵀEᵀu.

    Their sum and difference give x_j² + y_j² = ½(a_j + b_j)²/(σ_i − σ̃_j)² + ½(a_j − b_j)²/(σ_i + σ̃_j)², at most
    (a_j² + b_j²)/(σ_i − σ̃_j)². Summed over j, with ‖a‖, ‖b‖ ≤ ‖E‖ and Weyl for the neighbours σ̃_{i±1}:

        √(sin²∠(u, ũ_i) + sin²∠(v, ṽ_i)) ≤ √2 ‖E‖ / (min(σ_{i−1} − σ_i, σ_i − σ_{i+1}) − ‖E‖),

    Wedin's theorem in the Frobenius norm for a subspace of one dimension. It bounds either sine. Without a partner of
    its own, as in a matrix that is not square, a ũ_j has σ̃_j = 0, which is no closer than the last gap.

    Parameters
    ----------
    values, perturbation, next_value, upper
        As of `wedin_sines`.
    residuals : array_like, a number or of shape (k,)
        ‖Av_i − σ_iu_i‖ of every pair, where Aᵀu_i = σ_iv_i.

    Returns
    -------
    ndarray of shape (k,)
        A bound on the sine of the angle of the i-th left and right vector; 1 where they are not determined.

    Raises
    ------
    ValueError
        As `wedin_sines`.

    References
    ----------
    Wedin 1972, eq. 3.1 in the Frobenius norm; Stewart and Sun 1990, thm V.4.1.

    Examples
    --------
    >>> vector_sines([9.0, 4.0, 3.5], 0.5).round(3).tolist()
    [0.157, 1.0, 1.0]
    """
    sigma, size = _observed(values, perturbation)
    _, off = _observed(values, residuals, "residuals")
    high = _above(sigma, upper)
    below = sigma - np.append(high, _next_value(next_value))[1:]
    above = np.append(math.inf, sigma[:-1])[: len(sigma)] - sigma
    return _quotient(math.sqrt(2.0) * (size + off), np.minimum(above, below) - size)


def _observed(values: ArrayLike, amount: ArrayLike, name: str = "perturbation") -> tuple[Vector, Vector]:
    """Both as float64 of one shape, checked."""
    sigma = np.asarray(values, dtype=np.float64)
    size = np.asarray(amount, dtype=np.float64)
    if sigma.ndim != 1 or size.shape not in ((), sigma.shape):
        raise ValueError(f"{name} of shape {size.shape} does not go with values of shape {sigma.shape}")
    if np.any(size < 0.0):
        raise ValueError(f"{name} = {size} is negative; it is the bound on a norm")
    return sigma, np.broadcast_to(size, sigma.shape)


def _above(sigma: Vector, upper: ArrayLike | None) -> Vector:
    """Upper bounds on the values: never below them, and descending, since no value exceeds one before it."""
    if upper is None:
        return sigma
    high = np.asarray(upper, dtype=np.float64)
    if high.shape != sigma.shape:
        raise ValueError(f"upper of shape {high.shape} does not go with values of shape {sigma.shape}")
    return np.maximum(np.minimum.accumulate(high), sigma)


def _next_value(value: float) -> float:
    if not value >= 0.0:
        raise ValueError(f"next_value = {value} is no bound on a singular value")
    return value


def _quotient(above: Vector, below: Vector) -> Vector:
    """Return above/below where that is in [0, 1), and 1 elsewhere, NaN included."""
    small = above < below  # false for NaN, and for 0/0: without a gap no subspace is determined
    return np.divide(above, below, out=np.ones(len(above)), where=small)
