"""`Product`: one matrix's update as B·A, kept in factors, so that what is asked of pairs never forms a d × k matrix.

A dense update is one too, with the identity on its shorter side; what it is asked of then knows that it is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from spectra.errors import MatrixError, NonFiniteMatrix


@dataclass(frozen=True, eq=False)
class Product:
    """Update Δ = B·A of a weight that multiplies columns, y = (W + Δ)x.

    Attributes
    ----------
    b : Tensor of shape (rows, r), float64
        With the adapter's scale.
    a : Tensor of shape (r, cols), float64
    identity : {"", "left", "right"}
        Which factor is the identity, B or A; none of an adapter's.

    Raises
    ------
    MatrixError
        If the factors do not fit.
    NonFiniteMatrix
        If an entry is NaN or infinite.

    Examples
    --------
    >>> update = Product(torch.ones(3, 1), torch.ones(1, 2))
    >>> update.shape, round(update.norm**2)
    ((3, 2), 6)
    """

    b: torch.Tensor
    a: torch.Tensor
    identity: Literal["", "left", "right"] = ""

    def __post_init__(self) -> None:
        if self.b.dim() != 2 or self.a.dim() != 2 or self.b.shape[1] != self.a.shape[0]:
            raise MatrixError(f"factors of shapes {tuple(self.b.shape)} and {tuple(self.a.shape)} have no product")
        for name in ("b", "a"):
            factor = getattr(self, name).detach().double()
            if not bool(torch.isfinite(factor).all()):
                raise NonFiniteMatrix("NaN or infinite entries in an update")
            object.__setattr__(self, name, factor)

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Product:
        """A dense update, with the identity beside it on its shorter side.

        Examples
        --------
        >>> Product.of(torch.zeros(5, 2)).a.shape
        torch.Size([2, 2])
        """
        rows, cols = matrix.shape
        unit = torch.eye(min(rows, cols), dtype=torch.float64)
        return cls(unit, matrix, "left") if rows <= cols else cls(matrix, unit, "right")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of B: the rank is no larger."""
        return self.b.shape[1]

    @property
    def is_dense(self) -> bool:
        """Whether a factor is the identity."""
        return bool(self.identity)

    def times(self, factor: float) -> Product:
        """The update multiplied by a number."""
        if self.identity == "left":
            return Product(self.b, factor * self.a, "left")
        return Product(factor * self.b, self.a, self.identity)

    @cached_property
    def left_triangle(self) -> torch.Tensor:
        """R, (r', r), with ‖BX‖ = ‖RX‖ for every X: of a QR decomposition of B."""
        return self.b if self.identity == "left" else torch.linalg.qr(self.b, mode="r")[1]

    @cached_property
    def right_triangle(self) -> torch.Tensor:
        """R, (r', r), with ‖XA‖ = ‖XRᵀ‖ for every X: of a QR decomposition of Aᵀ."""
        return self.a if self.identity == "right" else torch.linalg.qr(self.a.t(), mode="r")[1]

    @cached_property
    def norm(self) -> float:
        """‖Δ‖_F."""
        if self.is_dense:
            return float(torch.linalg.matrix_norm(self.dense()))
        return float(torch.linalg.matrix_norm(self.left_triangle @ self.right_triangle.t()))

    @cached_property
    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (rows, r), σ (r,), Vᵀ (r, cols) of the directions that are not rounding: σ above ε·max(rows, cols)·σ₁."""
        if self.is_dense:
            u, s, vh = torch.linalg.svd(self.dense(), full_matrices=False)
        else:
            q_left, r_left = torch.linalg.qr(self.b)
            q_right, r_right = torch.linalg.qr(self.a.t())
            u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
            u, vh = q_left @ u, vh @ q_right.t()
        kept = s > max(self.shape) * torch.finfo(torch.float64).eps * (s[0] if len(s) else 0.0)
        return u[:, kept], s[kept], vh[kept]

    def dense(self) -> torch.Tensor:
        """Δ, (rows, cols), float64."""
        return self.a if self.identity == "left" else self.b if self.identity == "right" else self.b @ self.a
