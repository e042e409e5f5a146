"""LoftQ: a quantized weight and low-rank factors that begin where both together come nearest to the weight."""

from __future__ import annotations

import torch

from spectra.errors import UsageError
from spectra.quantize.formats import Format
from spectra.quantize.tensor import QuantizedTensor, quantize


def loftq(
    weight: torch.Tensor,
    rank: int,
    *,
    scale: float,
    format: str | Format = "nf4",
    block: int = 64,
    double: bool = True,
    iterations: int = 1,
) -> tuple[QuantizedTensor, torch.Tensor, torch.Tensor]:
    """Quantized weight Q and factors with Q + γBA ≈ W.

    Alternates Q = q(W − L) and L = SVD_r(W − Q), from L = 0 (Li et al. [1]_, algorithm 1). The last step is the
    truncated SVD, so that no other factors of this rank come nearer to W beside the Q that is returned. A LoRA part
    multiplies its factors by γ: they hold L/γ, without which an α of twice the rank would add 2L.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
    rank : int
        r.
    scale : float
        γ, what the factors' product will be multiplied by.
    format, block, double
        As `quantize`.
    iterations : int
        Alternations, at least 1.

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
    >>> w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> q, a, b = loftq(w, 8, scale=2.0)
    >>> plain = torch.linalg.norm(w - quantize(w).dequantize())
    >>> bool(torch.linalg.norm(w - q.dequantize() - 2.0 * b @ a) < plain)
    True
    """
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise UsageError(f"LoftQ of rank {rank} needs a matrix of at least that rank, not {tuple(weight.shape)}")
    if scale == 0.0 or iterations < 1:
        raise UsageError(f"LoftQ needs a scale that is not zero and an iteration, not {scale} and {iterations}")
    exact = weight.detach().float()
    low_rank = torch.zeros_like(exact)
    for _ in range(iterations):
        quantized = quantize((exact - low_rank).to(weight.dtype), format, block=block, double=double)
        u, s, vh = torch.linalg.svd(exact - quantized.dequantize(torch.float32), full_matrices=False)
        half = s[:rank].sqrt()
        b, a = u[:, :rank] * half, half[:, None] * vh[:rank]  # (out, rank), (rank, in)
        low_rank = b @ a
    share = abs(scale) ** -0.5
    return quantized, a * share, b * (share if scale > 0 else -share)
