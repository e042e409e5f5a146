"""Structured subspaces: every matrix moves by B C A with fixed orthonormal B and A, and only the small C is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from spectra.errors import UsageError
from spectra.projections.draws import normal, stream
from spectra.projections.protocol import PieceByPiece, check_shapes


class LowRankProjection(PieceByPiece):
    r"""P whose piece for a matrix of shape (p, q) is vec(C) ↦ B C A, B of (p, r) and A of (r, q) orthonormal.

    The d coordinates are dealt evenly to the matrices, and fill C from its leading corner outward, so that d need not
    be a sum of squares; tensors that are no matrices stay. P's columns are orthonormal: ‖Px‖ = ‖x‖.

    Parameters
    ----------
    shapes : sequence of sequence of int
        Of the tensors that P may move.
    dimension : int
        d, at least one for every matrix.
    seed : int
        Of the bases, where they are drawn.
    gradients : mapping of int to Tensor, optional
        By piece, a matrix of its shape whose leading singular vectors are the bases in place of random ones: LoRA's
        first step goes where the loss falls fastest.

    Raises
    ------
    UsageError
        If there is no matrix, d is too small or too large for them, or a gradient is missing, misshapen or not finite.

    References
    ----------
    .. [1] K. Bałazy, M. Banaei, K. Aberer and J. Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
       Parameters", 2024, equation 2.

    Examples
    --------
    >>> from spectra.projections import forward
    >>> projection = LowRankProjection([(64, 48), (48,)], dimension=7, seed=0)
    >>> moved = forward(projection, torch.arange(1.0, 8.0))
    >>> int(torch.linalg.matrix_rank(moved[0])), float(moved[0].square().sum()).__round__(2), float(moved[1].sum())
    (3, 140.0, 0.0)
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        *,
        dimension: int,
        seed: int,
        gradients: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self.shapes, _ = check_shapes(shapes, dimension)
        self.dimension = dimension
        self.seed = seed
        self._matrices = [piece for piece, shape in enumerate(self.shapes) if len(shape) == 2 and min(shape) > 0]
        self._places = self._deal()
        self._bases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if gradients is not None:
            for piece in self._matrices:
                self._bases[piece] = _leading(self.shapes[piece], gradients, piece, self._rank(piece))

    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add scale · P x to a tensor; see `Projection.add`."""
        if piece in self._places:
            left, right = self._basis(piece, x)
            out.addmm_(left @ self._core(x, piece), right, alpha=scale)

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """Pᵀ y of one piece; see `Projection.adjoint`."""
        found = y.new_zeros(self.dimension)
        if piece in self._places:
            left, right = self._basis(piece, y)
            core = left.t() @ y @ right.t()
            first, rows, columns = self._places[piece]
            found[first : first + len(rows)] = core[rows, columns]
        return found

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of the columns: 1, by orthonormal bases."""
        return torch.ones(self.dimension, dtype=torch.float64)

    def _deal(self) -> dict[int, tuple[int, torch.Tensor, torch.Tensor]]:
        """Of each matrix, its first coordinate and where in C its coordinates stand."""
        count = len(self._matrices)
        if not count:
            raise UsageError("a low-rank subspace needs matrices, and none of the parameters is one")
        room = {piece: min(self.shapes[piece]) ** 2 for piece in self._matrices}
        if not count <= self.dimension <= sum(room.values()):
            raise UsageError(
                f"dimension = {self.dimension:,}: a low-rank subspace of these {count} matrices has between {count} "
                f"and {sum(room.values()):,}"
            )
        shares = dict.fromkeys(self._matrices, 0)
        left, open_ = self.dimension, list(self._matrices)
        while left:  # evenly, and what a small matrix cannot take goes to the others
            each, over = divmod(left, len(open_))
            for number, piece in enumerate(open_):
                taken = min(room[piece] - shares[piece], each + (number < over))
                shares[piece] += taken
                left -= taken
            open_ = [piece for piece in open_ if shares[piece] < room[piece]]
        found, first = {}, 0
        for piece in self._matrices:
            rows, columns = _corner(shares[piece])
            found[piece] = (first, rows, columns)
            first += shares[piece]
        return found

    def _rank(self, piece: int) -> int:
        return math.isqrt(len(self._places[piece][1]) - 1) + 1

    def _core(self, x: torch.Tensor, piece: int) -> torch.Tensor:
        first, rows, columns = self._places[piece]
        core = x.new_zeros(self._rank(piece), self._rank(piece))
        core[rows, columns] = x[first : first + len(rows)]
        return core

    def _basis(self, piece: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A in the dtype and on the device of another tensor; random ones are made once, they are small."""
        if piece not in self._bases:
            generator, rank = stream(self.seed, piece), self._rank(piece)
            double = torch.zeros((), dtype=torch.float64)
            sides = [normal(generator, (size, rank), double) for size in self.shapes[piece]]
            left, right = (torch.linalg.qr(side).Q for side in sides)
            self._bases[piece] = left, right.t().contiguous()
        left, right = self._bases[piece]
        return left.to(device=like.device, dtype=like.dtype), right.to(device=like.device, dtype=like.dtype)


def _corner(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` places of a table in shells around its corner: (0,0), (0,1), (1,0), (1,1), (0,2), …"""
    rank = math.isqrt(count - 1) + 1
    table = ((row, column) for row in range(rank) for column in range(rank))
    places = sorted(table, key=lambda place: (max(place), sum(place), place))
    rows, columns = zip(*places[:count], strict=True)
    return torch.tensor(rows), torch.tensor(columns)


def _leading(
    shape: tuple[int, ...], gradients: Mapping[int, torch.Tensor], piece: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    gradient = gradients.get(piece)
    if gradient is None or tuple(gradient.shape) != shape:
        got = "none" if gradient is None else f"one of shape {tuple(gradient.shape)}"
        raise UsageError(f"piece {piece} of shape {shape} needs a gradient of that shape; there is {got}")
    if not bool(torch.isfinite(gradient).all()):
        raise UsageError(f"the gradient of piece {piece} holds NaN or infinity")
    left, _, right = torch.linalg.svd(gradient.detach().double().cpu(), full_matrices=False)
    return left[:, :rank].contiguous(), right[:rank].contiguous()
