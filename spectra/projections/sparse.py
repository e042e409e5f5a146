"""Sparse signs: most entries of P are zero, and where the others stand is drawn again in each pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from spectra.projections.draws import random_bytes, stream
from spectra.projections.protocol import PieceByPiece, check_shapes

# Entries of P's table that are looked at together hold about so many that are not zero.
_TOGETHER = 1 << 19


class SparseProjection(PieceByPiece):
    r"""P whose entries are ±√s/√D with probability 1/(2s) each and 0 otherwise, independently, with s = √D.

    Achlioptas' projection at the density 1/√D of Li, Hastie and Church; a product costs d·√D additions.

    Parameters
    ----------
    shapes : sequence of sequence of int
        Of the tensors that P moves.
    dimension : int
        d.
    seed : int
        Of all entries.

    Raises
    ------
    UsageError
        If there is no parameter, or d is not between 1 and D.

    References
    ----------
    .. [1] D. Achlioptas, "Database-friendly random projections", JCSS 66, 2003, theorem 1.1.
    .. [2] P. Li, T. Hastie and K. Church, "Very Sparse Random Projections", KDD 2006, equation 4.

    Examples
    --------
    >>> projection = SparseProjection([(640, 480)], dimension=64, seed=0)
    >>> float(projection.squared_norms().mean()).__round__(1)
    1.0
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, dimension: int, seed: int) -> None:
        self.shapes, total = check_shapes(shapes, dimension)
        self.dimension = dimension
        self.seed = seed
        self._density = 1.0 / math.sqrt(total)
        self._size = total**-0.25  # √s/√D

    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add scale · P x to a tensor; see `Projection.add`."""
        flat = out.view(-1)
        for rows, columns, entries in self._entries(piece, x):
            flat.index_add_(0, rows, x[columns].mul_(entries), alpha=scale)

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """Pᵀ y of one piece; see `Projection.adjoint`."""
        flat, found = y.reshape(-1), y.new_zeros(self.dimension)
        for rows, columns, entries in self._entries(piece, y):
            found.index_add_(0, columns, flat[rows].mul_(entries))
        return found

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of the columns."""
        found, like = torch.zeros(self.dimension, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for piece in range(len(self.shapes)):
            for _, columns, entries in self._entries(piece, like):
                found.index_add_(0, columns, entries.square())
        return found

    def _entries(self, piece: int, like: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows, columns and values of the entries that are not zero, some rows of the piece at a time.

        Gaps between them are geometric, which is what independent coin tosses give.
        """
        entries = math.prod(self.shapes[piece])
        together = max(1, int(_TOGETHER / (self.dimension * self._density)))
        for number, first in enumerate(range(0, entries, together)):
            table = min(together, entries - first) * self.dimension
            generator = stream(self.seed, piece, number)
            places = self._places(generator, table)
            flips = np.unpackbits(random_bytes(generator, -(-len(places) // 8)), count=len(places))
            values = (1.0 - 2.0 * flips) * self._size
            yield (
                torch.from_numpy(places // self.dimension + first).to(like.device),
                torch.from_numpy(places % self.dimension).to(like.device),
                torch.from_numpy(values).to(device=like.device, dtype=like.dtype),
            )

    def _places(self, generator: np.random.Generator, table: int) -> np.ndarray:
        """Places below `table` at which independent tosses of probability `_density` come up."""
        expected = table * self._density
        ahead = int(expected + 6.0 * math.sqrt(expected)) + 8
        found = np.cumsum(generator.geometric(self._density, ahead)) - 1
        while found[-1] < table:
            more = np.cumsum(generator.geometric(self._density, ahead))
            found = np.concatenate([found, found[-1] + more])
        return found[found < table]
