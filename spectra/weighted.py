"""Errors that count where inputs are: ‖(Δ − B)R^½‖_F for R = E[xxᵀ], and its optimum.

A linear map W + Δ is used on inputs x, so that what a truncation B of Δ costs is E‖(Δ − B)x‖² = tr((Δ − B)R(Δ − B)ᵀ) =
‖(Δ − B)S‖²_F for any S with SSᵀ = R. Directions that no input takes cost nothing.

The optimum. Let M = ΔS = UΣVᵀ. For B of rank ≤ r, BS has rank ≤ r too, so ‖ΔS − BS‖²_F ≥ Σ_{i>r} σ_i(M)² (Eckart and
Young 1936). Equality needs BS = M_r = U_rU_rᵀM, which

    B = U_r U_rᵀ Δ                                                                                             (1)

gives, whatever S and however singular R: nothing is inverted. Where R is singular there are other optima, B + C with
CS = 0, M_rS⁺ among them (the form of C. Zhang et al., "QERA", ICLR 2025, theorem 1). Of all whose columns lie in the
span of U_r, (1) is also nearest to Δ in the plain norm. U_r are eigenvectors of ΔRΔᵀ, and M's singular values are a
spectrum like any other: allocation and advice apply to them as they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from spectra.errors import UsageError
from spectra.linalg.route import spectrum
from spectra.moments import Moments
from spectra.values import Spectrum


@dataclass(frozen=True, eq=False)
class WeightedTruncation:
    """Matrix of rank r that is nearest to Δ on the inputs: ``left @ right``.

    Parameters
    ----------
    left : Tensor of shape (d, r), float64
        Orthonormal columns.
    right : Tensor of shape (r, k), float64
    error : float
        Relative: ‖(Δ − B)R^½‖_F / ‖ΔR^½‖_F; NaN where that is 0.
    """

    left: torch.Tensor
    right: torch.Tensor
    error: float


def weighted_spectrum(delta: torch.Tensor, moments: Moments, *, vectors: bool = False) -> Spectrum:
    """Singular values of ΔR^½: what each direction of an update does to the inputs.

    Parameters
    ----------
    delta : Tensor of shape (d, k)
        Update of a map y = (W + Δ)x: outputs by rows. Transpose what is stored by inputs (GPT-2's Conv1D).
    moments : Moments
        Of its inputs.
    vectors : bool
        Keep the left vectors.

    Returns
    -------
    Spectrum
        All min(d, k) values, for `spectra.advice` and `spectra.theory.allocation`.

    Raises
    ------
    UsageError
        If the shapes do not match.
    NonFiniteMatrix
        If Δ holds NaN or infinity.

    Examples
    --------
    >>> moments = Moments(torch.diag(torch.tensor([4.0, 1.0])), 1)
    >>> weighted_spectrum(torch.diag(torch.tensor([1.0, 3.0])), moments).values.round(9).tolist()
    [3.0, 2.0]
    """
    wide = _matching(delta, moments)
    found = spectrum(_padded(wide @ moments.root, wide.shape[1]), vectors=vectors, name="ΔR^½")
    return replace(found, shape=(wide.shape[0], wide.shape[1]), right=None)


def weighted_error(delta: torch.Tensor, approximation: torch.Tensor, moments: Moments) -> float:
    """‖(Δ − B)R^½‖_F, in the units of an output.

    Parameters
    ----------
    delta, approximation : Tensor of shape (d, k)
        Δ and B, outputs by rows.
    moments : Moments
        Of the inputs.

    Raises
    ------
    UsageError
        If the shapes do not match.

    Examples
    --------
    >>> moments = Moments(torch.diag(torch.tensor([4.0, 1.0])), 1)
    >>> weighted_error(torch.eye(2), torch.diag(torch.tensor([0.0, 1.0])), moments)
    2.0
    """
    if delta.shape != approximation.shape:
        raise UsageError(f"Δ is {tuple(delta.shape)} and its approximation {tuple(approximation.shape)}")
    left_out = _matching(delta, moments) - approximation.detach().to("cpu", torch.float64)
    return float(torch.linalg.norm(left_out @ moments.root))


def weighted_truncation(delta: torch.Tensor, moments: Moments, rank: int) -> WeightedTruncation:
    """Matrix of rank at most r with the least ‖(Δ − B)R^½‖_F: equation (1) at the head of this file.

    Parameters
    ----------
    delta : Tensor of shape (d, k)
        Δ, outputs by rows.
    moments : Moments
        Of the inputs.
    rank : int
        r ≥ 0.

    Returns
    -------
    WeightedTruncation
        Of fewer directions where fewer lose nothing.

    Raises
    ------
    UsageError
        If the shapes do not match or the rank is negative.

    Examples
    --------
    The larger direction is hardly used, and goes:

    >>> moments = Moments(torch.diag(torch.tensor([4.0, 0.01])), 1)
    >>> found = weighted_truncation(torch.diag(torch.tensor([1.0, 3.0])), moments, 1)
    >>> (found.left @ found.right).round(decimals=9).abs().tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    if rank < 0:
        raise UsageError(f"rank = {rank} is negative")
    wide = _matching(delta, moments)
    u, s, _ = torch.linalg.svd(wide @ moments.root, full_matrices=False)
    there = s > max(wide.shape) * torch.finfo(torch.float64).eps * (float(s[0]) if len(s) else 0.0)
    left = u[:, : min(rank, int(there.sum()))]
    lost, whole = (float(torch.linalg.norm(part)) for part in (s[left.shape[1] :], s))
    return WeightedTruncation(left, left.T @ wide, lost / whole if whole > 0 else math.nan)


def _matching(delta: torch.Tensor, moments: Moments) -> torch.Tensor:
    if delta.ndim != 2 or delta.shape[1] != len(moments.total):
        raise UsageError(
            f"Δ is {tuple(delta.shape)} and its inputs have {len(moments.total)} entries; give it with one column for "
            "each, transposed where it is stored by inputs"
        )
    return delta.detach().to("cpu", torch.float64)


def _padded(matrix: torch.Tensor, cols: int) -> torch.Tensor:
    """Add columns of zeros, which add no singular value but 0, so that the spectrum has its min(d, k) values."""
    return torch.nn.functional.pad(matrix, (0, cols - matrix.shape[1]))
