r"""What a projection is: P of shape (D, d), known by its products with vectors, one parameter's rows at a time.

A model's D parameters stand in tensors; the rows of P that belong to one of them are a *piece*. Entries are scaled so
that a column has expected squared norm 1, hence E‖Px‖² = ‖x‖² over draws of P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def adjoint(self, y: torch.Tensor, piece: int) -> torch.Tensor:
        """The piece's share Pᵀy of the adjoint, (d,) of y's dtype."""
        ...

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of P's columns, (d,) float64, exact to rounding."""
        ...


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
    found = []
    for piece, shape in enumerate(projection.shapes):
        out = x.new_zeros(shape)
        projection.add(x, piece, out)
        found.append(out)
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
    found = projection.adjoint(tensors[0], 0)
    for piece, tensor in enumerate(tensors[1:], start=1):
        found += projection.adjoint(tensor, piece)
    return found


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
    found: torch.Tensor = _Moved.apply(start, x, scale, projection, piece)  # type: ignore[no-untyped-call]
    return found


class _Moved(torch.autograd.Function):
    """Nothing of P is kept between the passes: both make its entries again from the seed."""

    @staticmethod
    def forward(
        ctx: Any, start: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, projection: Projection, piece: int
    ) -> torch.Tensor:
        ctx.projection, ctx.piece = projection, piece
        ctx.save_for_backward(x, scale)
        found = start.detach().to(dtype=x.dtype, copy=True, memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False):  # P is one matrix in training, evaluation and merging
            projection.add(x.detach(), piece, found, scale=1.0 if scale is None else float(scale))
        return found.to(start.dtype)

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
