"""A matrix on its way into an engine: validated, upcast, scaled by a power of two, its Frobenius norm summed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spectra.errors import MatrixError, NonFiniteMatrix, UnsupportedFormat

# Entries a block of rows may hold: a float64 copy of 2¹⁸ entries stays in a core's L2/L3 cache, which makes float64
# sums of float32 entries as cheap as reading them (10 ms against 84 ms for 16.8 million entries).
BLOCK_ENTRIES = 1 << 18

_LAPACK_LIMIT = 2**31 - 1  # 32-bit LAPACK counts entries of one operand in an int


@dataclass(frozen=True)
class Matrix:
    """A finite matrix as `scale` · `scaled`, with max |scaled| in [½, 1) unless the matrix is zero.

    The scale is a power of two, so that `scaled` is exact and neither squares nor fourth powers leave the range of
    its dtype.
    """

    scaled: torch.Tensor  # (rows, cols) float32 or float64
    scale: float
    frobenius: float  # of the matrix itself, not of scaled

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return int(self.scaled.shape[0]), int(self.scaled.shape[1])


def as_matrix(array: Any, *, name: str = "the matrix", device: str | torch.device | None = None) -> Matrix:
    """Validate and scale a torch tensor or anything NumPy reads as an array.

    Parameters
    ----------
    array : Tensor or array_like of shape (rows, cols)
        Floating point or integer. bfloat16, float16 and 8-bit floats are upcast to float32, integers to float64.
    name : str
        How errors call it.
    device : str or torch.device, optional
        Where to compute; by default where the tensor is.

    Raises
    ------
    MatrixError
        If it is not two-dimensional, or has a dimension of 0.
    NonFiniteMatrix
        If it holds NaN or infinity; the message counts them.
    UnsupportedFormat
        If its entries are complex or not numbers.
    """
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise MatrixError(f"{name} has shape {tuple(tensor.shape)}; a spectrum needs two dimensions, neither of them 0")
    if tensor.is_complex():
        raise UnsupportedFormat(f"{name} holds complex numbers; take its real and imaginary parts apart")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.float64)
    if device is not None:
        tensor = tensor.to(device)
    tensor = tensor.detach()
    low, high = torch.aminmax(tensor)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        count = sum(int((~torch.isfinite(rows)).sum()) for rows in row_blocks(tensor))
        raise NonFiniteMatrix(f"{name} holds {count} NaN or infinite entries of {tensor.numel()}")
    scale = 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
    # Leave matrices of ordinary size where they lie: a copy costs memory, and squares are safe for them.
    if 2.0**-24 <= scale <= 2.0**24:
        return Matrix(tensor, 1.0, math.sqrt(sum_of_squares(tensor)))
    scaled = torch.ldexp(tensor.double(), torch.tensor(-math.frexp(largest)[1])).to(tensor.dtype)
    return Matrix(scaled, scale, math.sqrt(sum_of_squares(scaled)) * scale)


def row_blocks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of consecutive rows, each of about `BLOCK_ENTRIES` entries."""
    rows = max(1, BLOCK_ENTRIES // max(1, tensor.shape[1]))
    return list(torch.split(tensor, rows))


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Σ a² with every square and sum in float64."""
    return math.fsum(float(torch.linalg.vecdot(r, r).sum()) for r in (b.double() for b in row_blocks(tensor)))


def too_large_for_lapack(rows: int, cols: int) -> bool:
    """Whether a dense driver with 32-bit integers would overflow on an operand of this size."""
    return min(rows, cols) ** 2 > _LAPACK_LIMIT or max(rows, cols) > _LAPACK_LIMIT
