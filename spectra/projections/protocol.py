r"""What a projection is: P of shape (D, d), known by its products with vectors, one parameter's rows at a time.

A model's D parameters stand in tensors; the rows of P that belong to one of them are a *piece*. Entries are scaled so
that a column has expected squared norm 1, hence E‖Px‖² = ‖x‖² over draws of P.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from spectra.errors import UsageError


class Projection(Protocol):
    """A linear map from d coordinates to the tensors of a model.

    Attributes
    ----------
    shapes : tuple of tuple of int
        Of the tensors, in order; their entries number D in all.
    dimension : int
        d.
    """

    shapes: tuple[tuple[int, ...], ...]
    dimension: int

    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add ``scale · P x``, the rows of one piece, to `out` in place.

        Parameters
        ----------
        x : Tensor of shape (d,)
            float32 or float64.
        piece : int
            Index into `shapes`.
        out : Tensor
            Of that shape and x's dtype, contiguous.
        scale : float
            Factor.
        """
        ...

    def add_all(self, x: torch.Tensor, outs: Mapping[int, torch.Tensor], scales: Mapping[int, float]) -> None:
        """`add` for several pieces; those without a scale have 1."""
        ...

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """The piece's share Pᵀy of the adjoint, (d,) of y's dtype."""
        ...

    def adjoint_all(self, ys: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Sum of `adjoint` over several pieces, at least one."""
        ...

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of P's columns, (d,) float64, exact to rounding."""
        ...


class PieceByPiece(ABC):
    """A projection that takes one piece after the other."""

    @abstractmethod
    def add(self, x: torch.Tensor, piece: int, out: torch.Tensor, *, scale: float = 1.0) -> None:
        """See `Projection.add`."""

    @abstractmethod
    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """See `Projection.adjoint`."""

    def add_all(self, x: torch.Tensor, outs: Mapping[int, torch.Tensor], scales: Mapping[int, float]) -> None:
        """See `Projection.add_all`."""
        for piece, out in outs.items():
            self.add(x, piece, out, scale=scales.get(piece, 1.0))

    def adjoint_all(self, ys: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """See `Projection.adjoint_all`."""
        return torch.stack([self.adjoint(y, piece) for piece, y in ys.items()]).sum(dim=0)


def forward(projection: Projection, x: torch.Tensor) -> list[torch.Tensor]:
    """P x, as tensors of the projection's shapes.

    Raises
    ------
    UsageError
        If x is not (d,), float32 or float64.

    Examples
    --------
    >>> from spectra.projections import FastfoodProjection
    >>> projection = FastfoodProjection([(8, 4), (8,)], dimension=5, seed=0)
    >>> [tuple(part.shape) for part in forward(projection, torch.ones(5))]
    [(8, 4), (8,)]
    """
    check_vector(projection, x)
    found = [x.new_zeros(shape) for shape in projection.shapes]
    projection.add_all(x, dict(enumerate(found)), {})
    return found


def adjoint(projection: Projection, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pᵀ y for y given as tensors of the projection's shapes; (d,).

    Raises
    ------
    UsageError
        If number or shapes are others.

    Examples
    --------
    >>> from spectra.projections import FastfoodProjection
    >>> projection = FastfoodProjection([(8, 4), (8,)], dimension=5, seed=0)
    >>> x, y = torch.arange(5.0), [torch.ones(8, 4), torch.ones(8)]
    >>> through = sum(float((a * b).sum()) for a, b in zip(forward(projection, x), y))
    >>> abs(through - float(x @ adjoint(projection, y))) < 1e-5
    True
    """
    got = tuple(tuple(tensor.shape) for tensor in tensors)
    if got != projection.shapes:
        raise UsageError(f"tensors of shapes {got} where the projection has {projection.shapes}")
    return projection.adjoint_all(dict(enumerate(tensors)))


def moved(
    start: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, projection: Projection, piece: int
) -> torch.Tensor:
    """θ₀ + λ·P x for one piece, differentiable in x and λ (equations 2 and 3 of Aghajanyan et al. 2021).

    Parameters
    ----------
    start : Tensor
        θ₀, of the piece's shape; no gradient reaches it.
    x : Tensor of shape (d,)
        Coordinates; sums are in their dtype.
    scale : Tensor of shape ()
        λ, or None for 1.
    projection : Projection
        Its ``shapes[piece]`` is start's.
    piece : int
        Which.

    Returns
    -------
    Tensor
        Of start's shape and dtype.
    """
    return moved_all([start], x, [scale], projection, first=piece)[0]


def moved_all(
    starts: Sequence[torch.Tensor],
    x: torch.Tensor,
    scales: Sequence[torch.Tensor | None],
    projection: Projection,
    *,
    first: int = 0,
) -> list[torch.Tensor]:
    """`moved` for as many pieces from `first` on, made together; gradients are pulled back one by one as they come.

    So no gradient of the model's size is held, as one function of all pieces would.
    """
    pieces = range(first, first + len(starts))
    outs = {
        piece: start.detach().to(dtype=x.dtype, copy=True, memory_format=torch.contiguous_format)
        for piece, start in zip(pieces, starts, strict=True)
    }
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # one P in training, evaluation and merging
        factors = {piece: float(scale) for piece, scale in zip(pieces, scales, strict=True) if scale is not None}
        projection.add_all(x.detach(), outs, factors)
    return [
        _Moved.apply(outs.pop(piece).to(start.dtype), x, scale, projection, piece)  # type: ignore[no-untyped-call]
        for piece, start, scale in zip(pieces, starts, scales, strict=True)
    ]


class _Moved(torch.autograd.Function):
    """Nothing of P is kept between the passes: both make its entries again from the seed."""

    @staticmethod
    def forward(
        ctx: Any, image: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, projection: Projection, piece: int
    ) -> torch.Tensor:
        ctx.projection, ctx.piece = projection, piece
        ctx.save_for_backward(x, scale)
        return image

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            pulled = ctx.projection.adjoint(gradient.to(x.dtype).contiguous(), ctx.piece)
        if scale is None:
            return None, pulled, None, None, None
        return None, pulled * scale, (pulled @ x).reshape(scale.shape).to(scale.dtype), None, None


def check_vector(projection: Projection, x: torch.Tensor) -> None:
    """Raise `UsageError` unless x is a vector of d coordinates in float32 or float64."""
    if tuple(x.shape) != (projection.dimension,) or x.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"coordinates of shape {tuple(x.shape)} in {x.dtype}, where float32 or float64 of shape "
            f"({projection.dimension},) is needed"
        )


def check_shapes(shapes: Sequence[Sequence[int]], dimension: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Shapes as tuples and D, or `UsageError`: no parameters, d below 1, or d above D."""
    found = tuple(tuple(int(size) for size in shape) for shape in shapes)
    total = sum(math.prod(shape) for shape in found)
    if not total:
        raise UsageError("there are no parameters to project to: no tensor was given, or none has an entry")
    if type(dimension) is not int or dimension < 1:
        raise UsageError(f"dimension = {dimension!r} must be an integer of at least 1")
    if dimension > total:
        raise UsageError(f"dimension = {dimension:,} is above the {total:,} parameters themselves: nothing is reduced")
    return found, total
