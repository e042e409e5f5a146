"""LoftQ: a quantized weight and low-rank factors that begin where both together come nearest to the weight."""

from __future__ import annotations

import math

import torch

from spectra.errors import UsageError
from spectra.quantize.formats import Format
from spectra.quantize.qera import check_start, divided, error_factors, quantizer
from spectra.quantize.scheme import Scheme
from spectra.quantize.tensor import QuantizedTensor


def loftq(
    weight: torch.Tensor,
    rank: int,
    *,
    scale: float,
    scheme: Scheme | str | None = None,
    format: str | Format = "nf4",
    block: int = 64,
    double: bool = True,
    iterations: int = 1,
) -> tuple[QuantizedTensor, torch.Tensor, torch.Tensor]:
    """Quantized weight Q and factors with Q + γBA ≈ W.

    Alternates Q = q(W − L) and L = SVD_r(W − Q), from L = 0 (Li et al. [1]_, algorithm 1). Each step ends in the
    truncated SVD, so that no other factors of this rank come nearer to W beside its Q. But q is no projection: W − L
    may have blocks of larger entries, and a step may lead away from W again. The nearest of all steps is what is
    returned, so that more iterations never give less. A LoRA part multiplies its factors by γ: they hold L/γ, without
    which an α of twice the rank would add 2L, and gain nothing.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
    rank : int
        r.
    scale : float
        γ, what the factors' product will be multiplied by.
    scheme : Scheme or str, optional
        How the weight is quantized; in place of the next three.
    format, block, double
        As `quantize`.
    iterations : int
        Alternations, at least 1, which is `spectra.quantize.qera.qera` without moments.

    Returns
    -------
    quantized : QuantizedTensor
    a : Tensor of shape (rank, in), float32
    b : Tensor of shape (out, rank), float32
        Each with half of the singular values' weight.

    Raises
    ------
    UsageError
        If rank is not between 1 and min(out, in), scale is zero, or there is no iteration; and as `quantize`.

    References
    ----------
    .. [1] Y. Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024.

    Examples
    --------
    >>> from spectra.quantize.tensor import quantize
    >>> w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> q, a, b = loftq(w, 8, scale=2.0)
    >>> plain = torch.linalg.norm(w - quantize(w).dequantize())
    >>> bool(torch.linalg.norm(w - q.dequantize() - 2.0 * b @ a) < plain)
    True
    """
    check_start("LoftQ", weight, rank, scale)
    if iterations < 1:
        raise UsageError(f"LoftQ needs at least one iteration, not {iterations}")
    rounded = quantizer(scheme, format, block, double)
    exact = weight.detach().double()
    low_rank, nearest = torch.zeros_like(exact), math.inf
    for _ in range(iterations):
        quantized = rounded((exact - low_rank).to(weight.dtype))
        error = exact - quantized.dequantize(torch.float32)
        a, b = error_factors(error, rank)
        low_rank = b @ a
        distance = float(torch.linalg.norm(error - low_rank))
        if distance < nearest:
            nearest, best = distance, (quantized, a, b)
    quantized, a, b = best
    return quantized, *divided(a, b, scale)
