"""The two values everything here passes along: a `Spectrum` and its `Certificate`. No algorithms, no torch."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """How far the values of a `Spectrum` may be from the exact singular values.

    Parameters
    ----------
    method : str
        The route that was taken, in words: ``"gram float64"``, ``"bidiagonal float64"``, ``"factors"``,
        ``"block Krylov, 80 columns, 2 iterations"``.
    gap : float
        √(‖A‖²_F − Σs²), in the units of a singular value: the norm of what the values leave out.
        Deterministic; 0 for a complete spectrum.
    tail_norm : float
        Upper bound on ‖(I − UUᵀ)A‖₂, U the left vectors of the values, that fails with at most
        `failure_probability`; 0 for a complete spectrum, ``inf`` where none was computed.
    roundoff : float
        Additive error of a value from floating point, C·ε·σ₁ of the route.
    squared_roundoff : float
        Square root of the additive error of a squared value, for the routes that find σ² (Gram): it bounds the
        error of σ near zero, and shrinks like 1/σ above.
    storage_floor : float
        Spectral norm of what rounding to the stored dtype adds to the matrix (`spectra.theory.noise`);
        NaN where the matrix did not come from a checkpoint.
    failure_probability : float
        Probability, over the random start alone, that `tail_norm` is too small.
    seed : int or None
        Seed of the random start.
    upper : ndarray of shape (k,), float64, or None
        Upper bounds on σ_1…σ_k from residuals (`spectra.theory.bounds.rayleigh_ritz_upper`), far closer than
        √(s² + tail_norm²); they hold with `tail_norm`.
    residuals : ndarray of shape (k,), float64, or None
        ‖A v_i − s_i u_i‖ of every triplet, in the units of a singular value, where Aᵀu_i = s_i v_i holds to roundoff:
        what turning the vectors to the exact ones still has to remove. None where nothing but roundoff is left.
    note : str
        Why this route was taken, or what had to be tried.
    """

    method: str
    gap: float = 0.0
    tail_norm: float = 0.0
    roundoff: float = 0.0
    squared_roundoff: float = 0.0
    storage_floor: float = math.nan
    failure_probability: float = 0.0
    seed: int | None = None
    upper: Vector | None = field(default=None, repr=False)
    residuals: Vector | None = field(default=None, repr=False)
    note: str = ""

    def __str__(self) -> str:
        parts = [self.method]
        if self.gap:
            parts.append(f"gap {self.gap:.3g}")
        if self.tail_norm:
            parts.append(f"tail ≤ {self.tail_norm:.3g} (fails with probability ≤ {self.failure_probability:.0e})")
        parts.append(f"roundoff ≤ {max(self.roundoff, self.squared_roundoff):.1g}")
        if not math.isnan(self.storage_floor):
            parts.append(f"storage floor {self.storage_floor:.3g}")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)  # two spectra are equal only if they are one: arrays have no single truth
class Spectrum:
    """Singular values of one matrix, with what is known about their errors.

    Parameters
    ----------
    values : ndarray of shape (k,), float64
        Singular values, descending, in the units of the matrix entries.
    shape : tuple of int
        (rows, cols) of the matrix.
    frobenius : float
        ‖A‖_F, summed from the entries in float64, independently of `values`.
    certificate : Certificate
        How far `values` may be from the truth.
    left : ndarray of shape (rows, k) or None
        Left singular vectors U, by column.
    right : ndarray of shape (k, cols) or None
        Right singular vectors Vᵀ, by row: A ≈ left @ diag(values) @ right.

    Raises
    ------
    ValueError
        If values are negative, not finite, not descending or more than min(shape).

    Examples
    --------
    >>> import numpy as np
    >>> A = Spectrum(np.array([3.0, 1.0]), (2, 5), 10**0.5, Certificate("by hand"))
    >>> A.complete, A.rank_limit
    (True, 2)
    """

    values: Vector
    shape: tuple[int, int]
    frobenius: float
    certificate: Certificate
    left: NDArray[np.floating] | None = field(default=None, repr=False)
    right: NDArray[np.floating] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 1 or len(values) > min(self.shape):
            raise ValueError(f"values of shape {values.shape} cannot be the spectrum of a {self.shape} matrix")
        if not np.all(np.isfinite(values)) or np.any(values < 0) or np.any(np.diff(values) > 0):
            raise ValueError("singular values must be finite, non-negative and descending")
        values.flags.writeable = False
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(self, "frobenius", float(self.frobenius))

    @property
    def rank_limit(self) -> int:
        """Number of singular values the matrix has: min(rows, cols)."""
        return min(self.shape)

    @property
    def complete(self) -> bool:
        """Whether every singular value is here."""
        return len(self.values) == self.rank_limit

    def interval(self, *, deterministic: bool = False) -> tuple[Vector, Vector]:
        """Lower and upper bounds on the exact σ_1…σ_k.

        Parameters
        ----------
        deterministic : bool
            Use `Certificate.gap` alone, which holds without any probability, in place of `tail_norm`.

        Returns
        -------
        low, high : ndarray of shape (k,)
            low_i ≤ σ_i ≤ high_i.

        References
        ----------
        Lower: Cauchy interlacing. Upper: Weyl's inequality, or `spectra.theory.bounds.rayleigh_ritz_upper`.
        """
        certificate, values = self.certificate, self.values
        if self.complete:
            high = values
        elif certificate.upper is None or deterministic:
            high = np.hypot(values, self.tail_limit(deterministic=deterministic))
        else:
            high = np.minimum(certificate.upper, np.hypot(values, certificate.gap))
        squared = certificate.squared_roundoff
        low = np.sqrt(np.maximum(values - squared, 0.0)) * np.sqrt(values + squared) - certificate.roundoff
        return np.maximum(low, 0.0), np.hypot(high, squared) + certificate.roundoff

    def tail_limit(self, *, deterministic: bool = False) -> float:
        """Upper bound on σ_{k+1}; 0 for a complete spectrum."""
        if self.complete:
            return 0.0
        gap = self.certificate.gap
        return gap if deterministic else min(gap, self.certificate.tail_norm)

    def _repr_html_(self) -> str:
        """Give a small card: shape, leading values, certificate."""
        head = ", ".join(f"{v:.4g}" for v in self.values[:6]) + (" …" if len(self.values) > 6 else "")
        count = "all" if self.complete else f"top {len(self.values)} of"
        return (
            f"<div><b>Spectrum</b> of a {self.shape[0]} × {self.shape[1]} matrix, {count} {self.rank_limit} values"
            f"<br>σ = {head}<br>‖A‖<sub>F</sub> = {self.frobenius:.6g}"
            f"<br><small>{html.escape(str(self.certificate))}</small></div>"
        )
