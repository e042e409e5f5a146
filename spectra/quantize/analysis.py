"""What quantizing a weight took away: how much, how it compares with the bounds, where it lies, what low rank can undo.

How quantization noise and low-rank adaptation meet is hardly analysed: a LoRA beside a quantized weight can undo the
error E = W − Ŵ only as far as r directions hold it. Of noise they hold what Marchenko–Pastur's law says, which depends
on the shape and r/p alone, p = min(out, in): rank 64 takes 6 % of a square error at p = 4096 and 47 % at p = 384.
Models of different widths are therefore compared at equal r/p (`QuantizationError.absorbed_at`), never at equal r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from spectra.errors import UsageError
from spectra.linalg import Matrix, as_matrix, by_gram
from spectra.linalg.dense import SIDE_BY_SIDE_ROWS
from spectra.linalg.threads import each_in_threads
from spectra.moments import Moments
from spectra.quantize.meeting import UpdateMeeting, meeting
from spectra.quantize.qera import leading_left, weighted
from spectra.quantize.scheme import Scheme
from spectra.quantize.tensor import QuantizedTensor
from spectra.quantize.whitening import NoiseFit, noise_fit, whitened_fit
from spectra.subspace import optimal_capture
from spectra.theory.quantization import best_rank_share, gaussian_block_mse, lloyd_max, rate_distortion
from spectra.values import Spectrum

RANKS = (4, 8, 16, 32, 64)
"""Ranks that shares are given for, unless told otherwise; one beyond p counts as p."""

# More levels than `spectra.theory.quantization.lloyd_max` numbers.
_LLOYD_MAX_BITS = 10.0

Status = Literal["ok", "exact", "zero"]


@dataclass(frozen=True)
class WeightedError:
    """The error where inputs are: ES for R = SSᵀ = E[xxᵀ], whose square is the mean squared error of an output.

    Attributes
    ----------
    relative : float
        ‖ES‖²_F/‖WS‖²_F; NaN where no output is ever other than 0.
    optimal : dict of int to float
        Share of ‖ES‖²_F that the best factors of rank r take away (`spectra.quantize.qera.qera`).
    diagonal : dict of int to float
        Share that those take away which know the diagonal of R alone.
    plain : dict of int to float
        Share that the truncated SVD of E takes away, LoftQ's first step.
    """

    relative: float
    optimal: dict[int, float]
    diagonal: dict[int, float]
    plain: dict[int, float]


@dataclass(frozen=True, eq=False)
class QuantizationError:
    """Error of one weight in one scheme.

    Attributes
    ----------
    shape : tuple of int
        (out, in).
    scheme : str
        Its name.
    bits_per_weight : float
        Everything stored, scales and all, over the number of entries: exact.
    code_bits : int
        Of a code alone.
    relative_mse : float
        ‖E‖²_F/‖W‖²_F; NaN for a weight of zeros.
    gaussian_mse : float or None
        What independent normal entries would have at the same levels and block, their scales exact: scales in eight
        bits add what shows at int8 (1 dB at blocks of 64), not at four bits. None where levels are fitted or blocks
        have a minimum.
    lloyd_max_mse : float or None
        Least of a normal entry rounded by itself, with as many levels as `bits_per_weight` (not `code_bits`) can
        number; None beyond 10 bits.
    shannon_mse : float
        Least of normal entries by any code of `bits_per_weight`.
    spectrum : Spectrum
        All singular values of E, without vectors.
    raw, whitened : NoiseFit
        E against Marchenko–Pastur's law, as it is and with rows and columns divided by their sizes.
    absorbed : dict of int to float
        Share of ‖E‖²_F in its r largest singular values: what no rank-r update beside Ŵ can take more than.
    absorbed_mp : dict of int to float
        The same of noise of this shape.
    weighted : WeightedError or None
        With the moments of inputs.
    meeting : UpdateMeeting or None
        With an update.
    """

    shape: tuple[int, int]
    scheme: str
    bits_per_weight: float
    code_bits: int
    relative_mse: float
    gaussian_mse: float | None
    lloyd_max_mse: float | None
    shannon_mse: float
    spectrum: Spectrum = field(repr=False)
    raw: NoiseFit
    whitened: NoiseFit
    absorbed: dict[int, float]
    absorbed_mp: dict[int, float]
    weighted: WeightedError | None = None
    meeting: UpdateMeeting | None = None

    @property
    def status(self) -> Status:
        """``"zero"``: a weight of zeros has no relative error. ``"exact"``: there is none, and no share of it."""
        if math.isnan(self.relative_mse):
            return "zero"
        return "ok" if self.relative_mse > 0.0 else "exact"

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, 10 log₁₀ ‖W‖²/‖E‖²; infinite where the error is 0."""
        return decibels(self.relative_mse)

    @property
    def gaussian_db(self) -> float | None:
        """`gaussian_mse` in decibels."""
        return None if self.gaussian_mse is None else decibels(self.gaussian_mse)

    @property
    def lloyd_max_db(self) -> float | None:
        """`lloyd_max_mse` in decibels."""
        return None if self.lloyd_max_mse is None else decibels(self.lloyd_max_mse)

    @property
    def shannon_db(self) -> float:
        """`shannon_mse` in decibels: 6.02 a bit."""
        return decibels(self.shannon_mse)

    def absorbed_at(self, fraction: float) -> float:
        """Share of ‖E‖²_F in the largest of its p singular values, at a fraction r/p instead of a rank.

        Between two ranks by a straight line. For noise it is `spectra.theory.quantization.best_rank_share`.

        Raises
        ------
        UsageError
            If the fraction is outside [0, 1].
        """
        if not 0.0 <= fraction <= 1.0:
            raise UsageError(f"fraction = {fraction} of the singular values; it lies between 0 and 1")
        shares = np.concatenate([[0.0], optimal_capture(self.spectrum)])
        return float(np.interp(fraction * (len(shares) - 1), np.arange(len(shares)), shares))


def decibels(relative_mse: float) -> float:
    """−10 log₁₀ of a relative squared error; infinite for none, NaN for NaN.

    Examples
    --------
    >>> decibels(0.01), decibels(0.0)
    (20.0, inf)
    """
    return math.inf if relative_mse == 0.0 else -10.0 * math.log10(relative_mse)


def quantization_error(
    weight: torch.Tensor,
    scheme: Scheme | str,
    *,
    ranks: Sequence[int] = RANKS,
    moments: Moments | None = None,
    update: torch.Tensor | None = None,
) -> QuantizationError:
    """Quantize a weight and say what was lost, whether it is noise, and what low rank can take of it.

    E's spectrum is by its Gram matrix in float64, of p = min(out, in) rows, that of E with its profile removed by one
    in float32; moments and an update take up to four more. One error is held at a time.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
        Of a map y = Wx: outputs by rows. Transpose what is stored by inputs (GPT-2's Conv1D).
    scheme : Scheme or str
        How it is quantized: ``"nf4"``, ``"int4/128"``.
    ranks : sequence of int
        Of the low-rank shares, each at least 1.
    moments : Moments, optional
        Of the map's inputs: what the error does to outputs.
    update : Tensor of shape (out, in), optional
        ΔW that fine-tuning made: whether it has anything to do with E.

    Returns
    -------
    QuantizationError

    Raises
    ------
    UsageError
        If the weight is no matrix of real numbers, a rank is below 1, moments or update do not fit, or the scheme says
        nothing that is known.
    NonFiniteMatrix
        If the weight or the update holds NaN or infinity.

    Examples
    --------
    >>> w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    >>> found = quantization_error(w, "nf4", ranks=[16])
    >>> round(found.sqnr_db, 1), round(found.gaussian_db, 1), round(found.shannon_db, 1)
    (20.7, 20.7, 24.8)
    >>> found.raw.outliers, round(found.absorbed[16], 2), round(found.absorbed_mp[16], 2)
    (0, 0.21, 0.21)
    """
    if weight.ndim != 2:
        raise UsageError(f"a weight of shape {tuple(weight.shape)} is no matrix; reshape it to (out, in)")
    if not ranks or min(ranks) < 1:
        raise UsageError(f"ranks = {list(ranks)}: give at least one, each at least 1")
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    quantized = scheme.quantize(weight)
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    error = exact - quantized.dequantize(exact.dtype)
    matrix, most = as_matrix(error, name="the quantization error"), min(max(ranks), *error.shape)
    whole = as_matrix(exact, name="the weight").frobenius
    found, white = _spectra(matrix, keep=0 if moments is None and update is None else most)
    beta = min(error.shape) / max(error.shape)
    fractions = {rank: min(rank / min(error.shape), 1.0) for rank in ranks}
    return QuantizationError(
        shape=(error.shape[0], error.shape[1]),
        scheme=scheme.name,
        bits_per_weight=quantized.bits_per_weight,
        code_bits=scheme.format.bits,
        relative_mse=_ratio(matrix.frobenius, whole),
        gaussian_mse=_gaussian_mse(scheme, error),
        lloyd_max_mse=_lloyd_max_mse(quantized),
        shannon_mse=rate_distortion(quantized.bits_per_weight),
        spectrum=replace(found, left=None, right=None),
        raw=noise_fit(found.values, found.shape),
        whitened=white,
        absorbed=_at(ranks, optimal_capture(found)),
        absorbed_mp={rank: best_rank_share(beta, fraction) for rank, fraction in fractions.items()},
        weighted=None if moments is None else _weighted_error(exact, error, found, moments, ranks),
        meeting=None if update is None else meeting(error, found, update, ranks),
    )


def _spectra(error: Matrix, *, keep: int) -> tuple[Spectrum, NoiseFit]:
    """Spectrum of an error, with its leading vectors, and its whitened fit: one a thread where the matrix is small."""
    found: list[Spectrum] = []
    white: list[NoiseFit] = []
    jobs: list[Callable[[], object]] = [
        lambda: found.append(by_gram(error, vectors=keep > 0, keep=keep)),
        lambda: white.append(whitened_fit(error)),
    ]
    if min(error.shape) <= SIDE_BY_SIDE_ROWS:
        each_in_threads(lambda job: job(), jobs)
    else:
        for job in jobs:
            job()
    return found[0], white[0]


def _ratio(part: float, whole: float) -> float:
    return (part / whole) ** 2 if whole > 0.0 else math.nan


def _gaussian_mse(scheme: Scheme, error: torch.Tensor) -> float | None:
    if scheme.format.fitted or scheme.format.affine:
        return None
    block = error.shape[1] if scheme.block is None else min(scheme.block, error.numel())
    return gaussian_block_mse(scheme.format.levels, block)


def _lloyd_max_mse(quantized: QuantizedTensor) -> float | None:
    return lloyd_max(quantized.bits_per_weight).mse if quantized.bits_per_weight <= _LLOYD_MAX_BITS else None


def _at(ranks: Sequence[int], shares: np.ndarray) -> dict[int, float]:
    """Cumulative shares of 1, 2, … directions at some ranks; there are no more directions than shares."""
    return {rank: float(shares[min(rank, len(shares)) - 1]) for rank in ranks}


def _weighted_error(
    weight: torch.Tensor, error: torch.Tensor, found: Spectrum, moments: Moments, ranks: Sequence[int]
) -> WeightedError:
    seen = weighted(error, moments)
    whole = float(torch.linalg.norm(weighted(weight, moments)))
    size = float(torch.linalg.norm(seen))
    if size == 0.0:  # nothing to take away
        nothing = dict.fromkeys(ranks, math.nan)
        return WeightedError(_ratio(size, whole), nothing, nothing, nothing)
    assert found.left is not None  # for the type checker: they were asked for
    known = leading_left(error, min(max(ranks), *error.shape), moments=moments, diagonal=True)
    return WeightedError(
        _ratio(size, whole),
        _at(ranks, optimal_capture(by_gram(as_matrix(seen)))),
        _at(ranks, _taken(known, seen)),
        _at(ranks, _taken(torch.from_numpy(found.left.copy()).to(seen), seen)),
    )


def _taken(left: torch.Tensor, seen: torch.Tensor) -> np.ndarray:
    """Share of ‖ES‖² that E's projection on the first 1, 2, … columns takes away: ‖UᵀES‖²/‖ES‖²."""
    squares = (left.T @ seen).square().sum(1)
    return np.asarray((squares.cumsum(0) / seen.square().sum()).clamp_max(1.0).cpu(), dtype=np.float64)
