"""An update as an operator: what it does to a few vectors, dense or by its factors, and its leading singular triplets.

An adapter stays its factors: its singular vectors cost O((rows + cols) r²), and every product with them as little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spectra.delta import AnyDelta, LowRankDelta
from spectra.linalg.dense import by_bidiagonal, by_gram
from spectra.linalg.matrix import Matrix
from spectra.linalg.route import SMALL, matrix_spectrum
from spectra.linalg.sketch import truncated
from spectra.record import rounding_norm
from spectra.subspace.resolution import vector_roundoff
from spectra.values import Spectrum

Array = NDArray[np.float64]

# Smaller dimension up to which the leading vectors of a weight matrix cost no more by its whole spectrum.
_WHOLE_BELOW = 512

# Blocks of the Krylov space beyond. Weights are nearly noise, whose leading values lie close: at 2048 × 2048 sixteen
# blocks find the ten leading vectors of pure Gaussian noise to 1 − |cos| = 1e-6, eight to .1.
_BLOCKS = 24

# Triplets found beyond those asked for. What is not found has only the bound on the tail, up to a quarter too high, and
# takes the gap from the last that are: of ten directions of a power law i^-0.3 (1024 to 2048 rows) five count as
# resolved without, eight to nine with six, all with twelve.
_SPARE = 12

# Entries that are upcast at a time: large enough for a product at full speed, 32 MiB in float64.
_BLOCK = 1 << 22


class Operand(Protocol):
    """An update Δ of one matrix."""

    @property
    def kind(self) -> Literal["dense", "factors"]:
        """How it is stored."""
        ...

    @property
    def spectrum(self) -> Spectrum:
        """Singular values, the leading vectors (float64, orthonormal), ‖Δ‖_F, and how far all may be wrong."""
        ...

    @property
    def rounding(self) -> float:
        """Predicted norm ‖E‖_F of what rounding to the stored dtypes adds; NaN where none is."""
        ...

    @property
    def rank_limit(self) -> int:
        """Rank that it cannot have more than."""
        ...

    def times(self, v: Array) -> Array:
        """ΔV, (rows, j), of V (cols, j)."""
        ...

    def against(self, u: Array) -> Array:
        """UᵀΔ, (j, cols), of U (rows, j)."""
        ...

    def added_to(self, weights: torch.Tensor) -> torch.Tensor:
        """W + Δ, (rows, cols), in the dtype of W, in memory of its own."""
        ...


@dataclass(frozen=True)
class Dense:
    """An update as a matrix.

    Parameters
    ----------
    matrix : Tensor of shape (rows, cols), float32 or float64
        On any device.
    spectrum : Spectrum
        With leading vectors.
    rounding : float
        ‖E‖_F of storage rounding.
    """

    matrix: torch.Tensor
    spectrum: Spectrum
    rounding: float
    kind: Literal["dense"] = "dense"

    @property
    def rank_limit(self) -> int:
        """min(rows, cols)."""
        return self.spectrum.rank_limit

    def times(self, v: Array) -> Array:
        """ΔV."""
        return times(self.matrix, v)

    def against(self, u: Array) -> Array:
        """UᵀΔ."""
        return against(self.matrix, u)

    def added_to(self, weights: torch.Tensor) -> torch.Tensor:
        """W + Δ."""
        return weights + self.matrix.to(weights)


@dataclass(frozen=True)
class Factors:
    """An update as its thin singular value decomposition, all of it.

    Parameters
    ----------
    spectrum : Spectrum
        Every value that is not zero, with its vectors.
    """

    spectrum: Spectrum
    rounding: float = math.nan
    kind: Literal["factors"] = "factors"

    @property
    def rank_limit(self) -> int:
        """Rank of the factors."""
        return len(self.spectrum.values)

    @property
    def right(self) -> Array:
        """Vᵀ (r, cols)."""
        return vectors(self.spectrum)[1]

    @property
    def scaled(self) -> Array:
        """U·diag(s) (rows, r)."""
        return np.asarray(vectors(self.spectrum)[0] * self.spectrum.values)

    def times(self, v: Array) -> Array:
        """ΔV."""
        return np.asarray(self.scaled @ (self.right @ v))

    def against(self, u: Array) -> Array:
        """UᵀΔ."""
        return np.asarray((u.T @ self.scaled) @ self.right)

    def added_to(self, weights: torch.Tensor) -> torch.Tensor:
        """W + Δ, the product added where it is formed: Δ itself never stands alone."""
        left, right = (torch.from_numpy(part).to(weights) for part in (self.scaled, self.right))
        return torch.addmm(weights, left, right)


def read(delta: AnyDelta, *, rank: int, whole: bool, seed: int = 0, device: str | None = None) -> Operand | None:
    """Read an update and decompose it.

    Parameters
    ----------
    delta : Delta, LowRankDelta or AdapterDelta
    rank : int
        Leading vectors to hold.
    whole : bool
        Take every singular value of a dense update; otherwise certify the leading `rank`.
    seed : int
        Of the sketch.
    device : str, optional
        Where to compute.

    Returns
    -------
    Operand or None
        None for an update that leaves the tensor as it is.

    Raises
    ------
    NonFiniteMatrix, CheckpointError
        As reading and decomposing do.
    """
    if isinstance(delta, LowRankDelta):
        found = delta.spectrum(vectors=True)
        return Factors(found) if found.frobenius > 0.0 else None
    difference = delta.difference()
    if difference.frobenius == 0.0:
        return None
    if device is not None:
        difference = replace(difference, matrix=difference.matrix.to(device))
    found = difference.spectrum(rank=None if whole else rank, vectors=True, keep=rank, seed=seed)
    return Dense(difference.matrix, _orthonormal(found), rounding_norm(difference, found))


def decomposed(weights: torch.Tensor) -> Spectrum:
    """Every singular value of a weight matrix, and its left vectors."""
    matrix = Matrix.of(weights)
    return by_gram(matrix, vectors="left") if min(matrix.shape) > SMALL else by_bidiagonal(matrix, vectors=True)


def leading(weights: torch.Tensor, count: int, *, seed: int = 0) -> Spectrum:
    """The leading singular triplets of a weight matrix, and maybe a few more, as well as float32 tells them apart."""
    matrix = Matrix.of(weights)
    if min(weights.shape) <= _WHOLE_BELOW:
        return _orthonormal(matrix_spectrum(matrix, vectors=True, keep=count))
    return _orthonormal(truncated(matrix, count + _SPARE, seed=seed, blocks=_BLOCKS))


def vectors(spectrum: Spectrum) -> tuple[Array, Array]:
    """U (rows, k) and Vᵀ (k, cols) of a spectrum that has them."""
    if spectrum.left is None or spectrum.right is None:
        raise ValueError("this spectrum was taken without vectors")
    return np.asarray(spectrum.left, dtype=np.float64), np.asarray(spectrum.right, dtype=np.float64)


def inner(a: Operand, b: Operand) -> float:
    """⟨Δ_a, Δ_b⟩ = tr(Δ_aᵀΔ_b), every product and sum in float64."""
    if isinstance(a, Dense) and isinstance(b, Dense):
        blocks = zip(_blocks(a.matrix), _blocks(b.matrix.to(a.matrix.device)), strict=True)
        return float(sum(float(torch.vdot(x.double().flatten(), y.double().flatten())) for x, y in blocks))
    factored, other = (a, b) if isinstance(a, Factors) else (b, a)
    left, right = vectors(factored.spectrum)
    return float(factored.spectrum.values @ (other.against(left) * right).sum(1))


def times(matrix: torch.Tensor, v: Array) -> Array:
    """A·V in float64, a few rows of A upcast at a time."""
    wide = torch.from_numpy(v).to(matrix.device)
    return np.asarray(torch.cat([block.double() @ wide for block in _blocks(matrix)]).cpu().numpy())


def against(matrix: torch.Tensor, u: Array) -> Array:
    """Uᵀ·A in float64, a few rows of A upcast at a time."""
    wide = torch.from_numpy(np.ascontiguousarray(u)).to(matrix.device)
    total = torch.zeros(u.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block, rows in zip(_blocks(matrix), torch.split(wide, _rows(matrix)), strict=True):
        total.addmm_(rows.T, block.double())
    return np.asarray(total.cpu().numpy())


def _rows(matrix: torch.Tensor) -> int:
    return max(1, _BLOCK // matrix.shape[1])


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(matrix, _rows(matrix))


def _orthonormal(spectrum: Spectrum) -> Spectrum:
    """The same with float64 vectors; those of a float32 route are made orthonormal to float64's precision.

    That does not make them right to it: what float32 left of Av_i = s_iu_i goes into the certificate.
    """
    left, right = spectrum.left, spectrum.right
    if left is None or right is None or left.dtype == right.dtype == np.float64:
        return spectrum
    certificate = spectrum.certificate
    residuals = vector_roundoff(spectrum) + (0.0 if certificate.residuals is None else certificate.residuals)
    return replace(
        spectrum,
        certificate=replace(certificate, residuals=np.broadcast_to(residuals, spectrum.values.shape)),
        left=_straight(left),
        right=_straight(right.T).T,
    )


def _straight(columns: NDArray[np.floating]) -> Array:
    basis, triangle = np.linalg.qr(np.asarray(columns, dtype=np.float64))
    return np.asarray(basis * np.where(np.diag(triangle) < 0, -1.0, 1.0))
