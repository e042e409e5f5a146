"""The plainest projection: independent normal entries, kept in memory, so for small d·D alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spectra.errors import UsageError
from spectra.projections.draws import normal, stream
from spectra.projections.protocol import PieceByPiece, check_shapes

LIMIT = 2 << 30
"""Bytes that a dense projection may take unless told otherwise."""


class DenseProjection(PieceByPiece):
    """P of independent N(0, 1/D) entries (Li et al. 2018, section 2), in float32.

    Parameters
    ----------
    shapes : sequence of sequence of int
        Of the tensors that P moves.
    dimension : int
        d.
    seed : int
        Of all entries.
    limit : int
        Bytes that it may take.

    Raises
    ------
    UsageError
        If there is no parameter, d is not between 1 and D, or P would take more than `limit`.

    Examples
    --------
    >>> DenseProjection([(30522, 384)], dimension=1024, seed=0)
    Traceback (most recent call last):
        ...
    spectra.errors.UsageError: a dense projection of 1,024 x 11,720,448 takes 48.0 GB, above the limit of 2.1 GB: \
take fastfood, or fewer dimensions
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, dimension: int, seed: int, limit: int = LIMIT) -> None:
        self.shapes, total = check_shapes(shapes, dimension)
        self.dimension = dimension
        if 4 * dimension * total > limit:
            raise UsageError(
                f"a dense projection of {dimension:,} x {total:,} takes {4 * dimension * total / 1e9:.1f} GB, above "
                f"the limit of {limit / 1e9:.1f} GB: take fastfood, or fewer dimensions"
            )
        like = torch.zeros((), dtype=torch.float32)
        self._pieces = [
            normal(stream(seed, piece), (math.prod(shape), dimension), like).div_(math.sqrt(total))
            for piece, shape in enumerate(self.shapes)
        ]

    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add scale · P x to a tensor; see `Projection.add`."""
        out.view(-1).addmv_(self._of(piece, x), x, alpha=scale)

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """Pᵀ y of one piece; see `Projection.adjoint`."""
        return self._of(piece, y).t() @ y.reshape(-1)

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of the columns."""
        return sum((part.double().square().sum(dim=0) for part in self._pieces), torch.zeros(1, dtype=torch.float64))

    def _of(self, piece: int, like: torch.Tensor) -> torch.Tensor:
        part = self._pieces[piece]
        if part.device != like.device:
            part = self._pieces[piece] = part.to(like.device)
        return part.to(like.dtype)
