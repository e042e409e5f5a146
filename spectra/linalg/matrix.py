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
    """A finite matrix as `scale` · `scaled`, the scale a power of two that keeps squares in the range of the dtype."""

    scaled: torch.Tensor  # (rows, cols) float32 or float64
    scale: float
    frobenius: float  # of the matrix itself, not of scaled

    @classmethod
    def of(cls, tensor: torch.Tensor, frobenius: float | None = None, *, largest: float | None = None) -> Matrix:
        """Scale a finite float32 or float64 matrix whose norm or largest entry may already be known."""
        if largest is None:
            low, high = torch.aminmax(tensor)
            largest = max(-float(low), float(high))
        exponent = math.frexp(largest)[1]
        # Matrices of ordinary size stay where they lie: a copy costs memory, and their squares are safe.
        if largest == 0.0 or abs(exponent) <= 24:
            return cls(tensor, 1.0, math.sqrt(sum_of_squares(tensor)) if frobenius is None else frobenius)
        # In two steps, since 2^1074 is past float64.
        half = exponent // 2
        scaled = (tensor.double() * 2.0**-half * 2.0 ** (half - exponent)).to(tensor.dtype)
        return cls(scaled, 2.0**exponent, math.sqrt(sum_of_squares(scaled)) * 2.0**exponent)

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
    return Matrix.of(tensor, largest=largest)


def row_blocks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of consecutive rows, each of about `BLOCK_ENTRIES` entries."""
    rows = max(1, BLOCK_ENTRIES // max(1, tensor.shape[1]))
    return list(torch.split(tensor, rows))


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Σ a² with every square and sum in float64."""
    blocks = (rows.to(torch.float64, copy=True).square_() for rows in row_blocks(tensor))
    return math.fsum(float(squares.sum()) for squares in blocks)


def too_large_for_lapack(rows: int, cols: int) -> bool:
    """Whether a dense driver with 32-bit integers would overflow on an operand of this size."""
    return min(rows, cols) ** 2 > _LAPACK_LIMIT or max(rows, cols) > _LAPACK_LIMIT
