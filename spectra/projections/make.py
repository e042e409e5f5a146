"""Projections by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spectra.errors import UsageError
from spectra.projections.dense import DenseProjection
from spectra.projections.fastfood import FastfoodProjection
from spectra.projections.kronecker import KroneckerProjection
from spectra.projections.low_rank import LowRankProjection
from spectra.projections.protocol import Projection
from spectra.projections.sparse import SparseProjection

PROJECTIONS: dict[str, str] = {
    "fastfood": "Gaussian-like, by Walsh–Hadamard transforms (Le 2013)",
    "dense": "Gaussian, every entry kept (Li 2018)",
    "sparse": "random signs, one in √D (Li 2006)",
    "kronecker": "Kronecker product of two Gaussian factors",
    "lora": "a small core between random orthonormal factors, in every matrix (Bałazy 2024)",
    "gradient": "the same between leading singular vectors of the first gradient",
}
"""Every projection by name, with one line on it."""


def make_projection(
    name: str,
    shapes: Sequence[Sequence[int]],
    *,
    dimension: int,
    seed: int,
    gradients: Mapping[int, torch.Tensor] | None = None,
) -> Projection:
    """A projection by its name.

    Parameters
    ----------
    name : str
        A key of `PROJECTIONS`.
    shapes : sequence of sequence of int
        Of the tensors that P moves.
    dimension : int
        d.
    seed : int
        Of all draws.
    gradients : mapping of int to Tensor, optional
        By index into `shapes`, for ``"gradient"``.

    Raises
    ------
    UsageError
        If there is none of that name, gradients are missing, or the projection refuses the dimension.

    Examples
    --------
    >>> make_projection("fastfood", [(4, 4)], dimension=3, seed=0).dimension
    3
    """
    if name == "fastfood":
        return FastfoodProjection(shapes, dimension=dimension, seed=seed)
    if name == "dense":
        return DenseProjection(shapes, dimension=dimension, seed=seed)
    if name == "sparse":
        return SparseProjection(shapes, dimension=dimension, seed=seed)
    if name == "kronecker":
        return KroneckerProjection(shapes, dimension=dimension, seed=seed)
    if name == "lora":
        return LowRankProjection(shapes, dimension=dimension, seed=seed)
    if name == "gradient":
        if gradients is None:
            raise UsageError("projection = 'gradient' needs gradients, of the first batches' loss for instance")
        return LowRankProjection(shapes, dimension=dimension, seed=seed, gradients=gradients)
    raise UsageError(f"no projection is called {name!r}; there are {', '.join(PROJECTIONS)}")


def smallest_dimension(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Least d that a projection takes: one number a matrix for the low-rank ones, 1 for the others."""
    return max(1, sum(len(shape) == 2 for shape in shapes)) if name in ("lora", "gradient") else 1
