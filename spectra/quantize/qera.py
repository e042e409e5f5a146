"""QERA: the low-rank factors that take back most of a quantization error where inputs are, in closed form.

A map y = Wx keeps Q, its weight in a few bits, and gets L = γBA of rank r beside it. With E = W − Q and R = E[xxᵀ] of
its inputs, what is left costs E‖(E − L)x‖² = ‖(E − L)S‖²_F for any S with SSᵀ = R. Nothing of rank r comes below
Σ_{i>r} σ_i(ES)² (Eckart and Young 1936), and

    L = U_r U_rᵀ E,   U_r the r leading left singular vectors of ES,                                            (1)

attains it, since LS = U_rU_rᵀ(ES) is the best of rank r. On the range of R this is the article's SVD_r(ER^½)R^{−½},
without the inverse, so that a singular R is no special case. Outside the range, in directions that no input takes,
where the pseudo-inverse would put 0 and the error does not count, (1) takes back what lies in U_r's span: of all optima
with these columns it is the nearest to E. S = 1 gives the plain truncated SVD, S = diag(√E[x_i²]) the article's
approximation for inputs whose entries are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectra.errors import UsageError
from spectra.linalg import as_matrix, by_gram
from spectra.moments import Moments
from spectra.quantize.formats import Format
from spectra.quantize.scheme import Scheme
from spectra.quantize.tensor import QuantizedTensor, quantize


def qera(
    weight: torch.Tensor,
    rank: int,
    *,
    scale: float,
    moments: Moments | None,
    diagonal: bool = False,
    scheme: Scheme | str | None = None,
    format: str | Format = "nf4",
    block: int = 64,
    double: bool = True,
) -> tuple[QuantizedTensor, torch.Tensor, torch.Tensor]:
    """Quantized weight Q and factors with (Q + γBA)x ≈ Wx for the inputs that the moments are of.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
    rank : int
        r.
    scale : float
        γ, what the factors' product will be multiplied by; they are divided by it.
    moments : Moments or None
        Of the map's inputs; None: all directions count alike, and the factors are the truncated SVD of the error.
    diagonal : bool
        Use the diagonal of the moments alone, as if inputs' entries were uncorrelated.
    scheme : Scheme or str, optional
        How the weight is quantized; in place of the next three.
    format, block, double
        As `quantize`.

    Returns
    -------
    quantized : QuantizedTensor
    a : Tensor of shape (rank, in), float32
    b : Tensor of shape (out, rank), float32
        Balanced: AAᵀ = BᵀB, diagonal.

    Raises
    ------
    UsageError
        If rank is not between 1 and min(out, in), the scale is zero, or the moments are of another number of inputs;
        and as `quantize`.

    References
    ----------
    C. Zhang, J. Cheng, G. Constantinides and Y. Zhao, "QERA: an Analytical Framework for Quantization Error
    Reconstruction", ICLR 2025, theorem 1 (exact) and theorem 2 (diagonal).

    Examples
    --------
    Inputs that mostly take one direction lose less along it than the plain factors would lose:

    >>> w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments(torch.diag(torch.tensor([400.0] + 63 * [1.0])), 1)
    >>> for known in (moments, None):
    ...     q, a, b = qera(w, 4, scale=2.0, moments=known)
    ...     left = (w - q.dequantize() - 2.0 * b @ a).double() @ moments.root
    ...     print(round(float(torch.linalg.norm(left)), 2))
    3.67
    8.28
    """
    check_start("QERA", weight, rank, scale)
    quantized = quantizer(scheme, format, block, double)(weight)
    error = weight.detach().double() - quantized.dequantize(torch.float32)
    a, b = error_factors(error, rank, moments=moments, diagonal=diagonal)
    return quantized, *divided(a, b, scale)


def error_factors(
    error: torch.Tensor, rank: int, *, moments: Moments | None = None, diagonal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A, B whose product is nearest to an error on the inputs: equation (1) at the head of this file.

    Where inputs take fewer than r directions, what is left of the rank goes to the plain SVD of the rest.

    Parameters
    ----------
    error : Tensor of shape (out, in)
        E.
    rank : int
        r, from 1 to min(out, in).
    moments, diagonal
        As `qera`.

    Returns
    -------
    a : Tensor of shape (rank, in), float64
    b : Tensor of shape (out, rank), float64

    Raises
    ------
    UsageError
        If the rank or the number of inputs does not fit.
    NonFiniteMatrix
        If E holds NaN or infinity.

    Examples
    --------
    >>> a, b = error_factors(torch.diag(torch.tensor([4.0, 1.0])), 1)
    >>> (b @ a).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    _check_rank("the error's factors", error, rank)
    wide = error.detach().double()
    left = leading_left(wide, rank, moments=moments, diagonal=diagonal)
    if left.shape[1] < rank:
        rest = wide - left @ (left.T @ wide)
        left = torch.cat([left, leading_left(rest, rank - left.shape[1])], dim=1)
        left = torch.linalg.qr(left)[0]
    turn, s, a = torch.linalg.svd(left.T @ wide, full_matrices=False)
    half = s.sqrt()
    return half[:, None] * a, left @ turn * half


def leading_left(
    error: torch.Tensor, rank: int, *, moments: Moments | None = None, diagonal: bool = False
) -> torch.Tensor:
    """U_r of ES, (out, r) float64: fewer columns where inputs take fewer directions.

    Raises
    ------
    UsageError
        If the number of inputs does not fit.
    """
    seen = weighted(error, moments, diagonal=diagonal)
    count = min(rank, *seen.shape)
    if count == 0:  # no input was ever other than 0
        return seen.new_zeros(len(seen), 0)
    left = by_gram(as_matrix(seen, name="the error"), vectors="left", keep=count).left
    assert left is not None  # for the type checker: they were asked for
    return torch.from_numpy(left.copy()).to(seen)


def weighted(error: torch.Tensor, moments: Moments | None, *, diagonal: bool = False) -> torch.Tensor:
    """ES, (out, directions that inputs take) float64, SSᵀ = R or its diagonal; E itself without moments.

    Raises
    ------
    UsageError
        If the number of inputs does not fit.
    """
    wide = error.double()
    if moments is None:
        return wide
    if len(moments.total) != error.shape[1]:
        raise UsageError(
            f"the weight is {tuple(error.shape)} and the moments are of {len(moments.total)} inputs; give the weight "
            "as (out, in), transposed where it is stored by inputs, or moments of this map"
        )
    if diagonal:
        sizes = moments.matrix.diagonal().clamp_min(0.0).sqrt()
        return wide[:, (sizes > 0.0).to(wide.device)] * sizes[sizes > 0.0].to(wide)
    return wide @ moments.root.to(wide)


def quantizer(
    scheme: Scheme | str | None, format: str | Format, block: int, double: bool
) -> Callable[[torch.Tensor], QuantizedTensor]:
    """What quantizes a tensor: a scheme, or its name, or a format with its block and scales."""
    if scheme is None:
        return lambda tensor: quantize(tensor, format, block=block, double=double)

    return (Scheme.parse(scheme) if isinstance(scheme, str) else scheme).quantize


def check_start(method: str, weight: torch.Tensor, rank: int, scale: float) -> None:
    """Refuse what no factors can begin from.

    Raises
    ------
    UsageError
        If the weight is no matrix of the rank, or the scale is zero.
    """
    _check_rank(method, weight, rank)
    if scale == 0.0:
        raise UsageError(f"{method} needs a scale that is not zero: its factors are divided by it")


def divided(a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors in float32 whose product, multiplied by γ, is that of the ones given."""
    share = abs(scale) ** -0.5
    return (a * share).float(), (b * (share if scale > 0 else -share)).float()


def _check_rank(name: str, weight: torch.Tensor, rank: int) -> None:
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise UsageError(f"{name} of rank {rank} needs a matrix of at least that rank, not {tuple(weight.shape)}")
