"""Kronecker products: a matrix moves by L X Rᵀ with X a small table of coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spectra.projections.draws import normal, stream
from spectra.projections.protocol import PieceByPiece, check_shapes


class KroneckerProjection(PieceByPiece):
    r"""P whose piece for a tensor of shape (p, q) is L ⊗ R / √D, L of (p, a) and R of (q, b) standard normal numbers.

    The coordinates stand in a table X of (a, b), a = ⌈√d⌉ and b = ⌈d/a⌉, and the tensor moves by L X Rᵀ/√D: of
    every matrix no more than a directions on each side are reached. A tensor of one axis is folded to nearly a square,
    one of more is (first, rest). L and R are drawn again in each pass.

    Parameters
    ----------
    shapes : sequence of sequence of int
        Of the tensors that P moves.
    dimension : int
        d.
    seed : int
        Of all draws.

    Raises
    ------
    UsageError
        If there is no parameter, or d is not between 1 and D.

    Examples
    --------
    >>> from spectra.projections import forward
    >>> projection = KroneckerProjection([(64, 48)], dimension=9, seed=0)
    >>> int(torch.linalg.matrix_rank(forward(projection, torch.ones(9))[0]))
    1
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, dimension: int, seed: int) -> None:
        self.shapes, total = check_shapes(shapes, dimension)
        self.dimension = dimension
        self.seed = seed
        self._rows = math.isqrt(dimension - 1) + 1
        self._columns = -(-dimension // self._rows)
        self._factor = 1.0 / math.sqrt(total)

    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add scale · P x to a tensor; see `Projection.add`."""
        left, right = self._factors(piece, x)
        table = torch.nn.functional.pad(x, (0, self._rows * self._columns - self.dimension))
        grid = (left @ (table.view(self._rows, self._columns) @ right.t())).view(-1)
        out.view(-1).add_(grid[: out.numel()], alpha=scale * self._factor)

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """Pᵀ y of one piece; see `Projection.adjoint`."""
        left, right = self._factors(piece, y)
        grid = torch.nn.functional.pad(y.reshape(-1), (0, len(left) * len(right) - y.numel()))
        table = (left.t() @ grid.view(len(left), len(right))) @ right
        return table.reshape(-1)[: self.dimension] * self._factor

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of the columns."""
        found, like = torch.zeros(self.dimension, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for piece, shape in enumerate(self.shapes):
            left, right = (factor.square_() for factor in self._factors(piece, like))
            present = torch.ones(len(left) * len(right), dtype=torch.float64)
            present[math.prod(shape) :] = 0.0
            found += (left.t() @ present.view(len(left), len(right)) @ right).reshape(-1)[: self.dimension]
        return found * self._factor**2

    def _factors(self, piece: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shapes[piece]
        entries = math.prod(shape)
        rows = shape[0] if len(shape) > 1 else max(1, math.isqrt(entries))
        columns = -(-entries // rows) if rows else 0
        generator = stream(self.seed, piece)
        return (
            normal(generator, (rows, self._rows), like),
            normal(generator, (columns, self._columns), like),
        )
