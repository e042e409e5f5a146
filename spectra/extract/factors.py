"""From an update to two balanced factors of a given rank, and the error that the stored factors leave, measured.

Three ways to the leading singular vectors, as in `spectra.linalg`: the symmetric eigenproblem of the smaller Gram
matrix in float64, of which only the wanted vectors are found; bidiagonalization where the Gram matrix cannot resolve
what is stored; a certified sketch beyond `EXACT_BELOW`. An adapter's update goes by its own factors, never formed.

Whichever subspace U was found, the factors are B = U√σ and A = Uᵀ Δ/√σ, so that BA = UUᵀΔ is the best that this
subspace allows, and an error of the vectors shows in the error of the product only to second order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from spectra.errors import NoConvergence, OutOfMemory
from spectra.extract.eigenvectors import leading_eigenvectors
from spectra.inputs import EXACT_BELOW
from spectra.linalg.dense import by_bidiagonal
from spectra.linalg.factored import product_spectrum
from spectra.linalg.matrix import Matrix, row_blocks, too_large_for_lapack
from spectra.linalg.route import choose
from spectra.linalg.sketch import truncated

# Share of the eigenvectors from which on all of them cost no more than the wanted ones: LAPACK's dsyevr with 16 of 1024
# took a third of the time of all by divide and conquer, with a quarter of them about the same.
_FEW = 4


@dataclass(frozen=True)
class Factors:
    """Two factors of one update in float64, as the base stores its matrix: Δ ≈ B·A.

    Parameters
    ----------
    b : Tensor of shape (rows, r), float64
    a : Tensor of shape (r, cols), float64
        Row i of it and column i of `b` have the same norm, √σ_i.
    values : ndarray of shape (r,)
        σ_1 … σ_r, descending, none of them 0.
    captured_high : float
        Upper bound on σ_1² + … + σ_r² of the exact spectrum, so that no factors of this rank leave an error below
        √(‖Δ‖²_F − captured_high). Equal to Σ values² where the route is exact.
    frobenius : float
        ‖Δ‖_F.
    method : str
        Route that was taken, in words.
    """

    b: torch.Tensor
    a: torch.Tensor
    values: NDArray[np.float64]
    captured_high: float
    frobenius: float
    method: str

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.values)


def leading_factors(
    matrix: torch.Tensor,
    rank: int,
    *,
    frobenius: float,
    floor: float = math.nan,
    seed: int = 0,
    device: str | None = None,
    max_bytes: float = math.inf,
) -> Factors:
    """Best factors of a rank for a dense update.

    Parameters
    ----------
    matrix : Tensor of shape (rows, cols), float32 or float64
        Δ, finite.
    rank : int
        r, 1 ≤ r ≤ min(rows, cols); fewer come back where the update has fewer directions.
    frobenius : float
        ‖Δ‖_F, summed in float64.
    floor : float
        Spectral norm of what storage rounding adds; NaN where unknown.
    seed : int
        Seed of the sketch.
    device : str, optional
        Where to compute.
    max_bytes : float
        Memory allowed beside the matrix.

    Raises
    ------
    OutOfMemory
        If no route fits.
    NoConvergence
        If every driver fails.

    References
    ----------
    .. [1] C. Eckart and G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.

    Examples
    --------
    >>> found = leading_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2, frobenius=14**0.5)
    >>> found.values.round(12).tolist(), (found.b @ found.a).diagonal().round(decimals=12).abs().tolist()
    ([3.0, 2.0], [3.0, 2.0, 0.0])
    """
    scaled = Matrix.of(matrix.to(device) if device else matrix, frobenius)
    route = _route(scaled, rank, floor, max_bytes)
    if route == "gram":
        found = _by_gram(scaled, rank)
    elif route == "bidiagonal":
        spectrum = by_bidiagonal(scaled, vectors=True)
        assert spectrum.left is not None
        found = _projected(
            scaled, torch.from_numpy(np.ascontiguousarray(spectrum.left[:, :rank])), spectrum.certificate.method
        )
    else:
        found = _by_sketch(scaled, rank, seed, floor)
    return found


def _route(matrix: Matrix, rank: int, floor: float, max_bytes: float) -> str:
    rows, cols = matrix.shape
    share = floor / matrix.frobenius if matrix.frobenius > 0 else math.nan
    itemsize = matrix.scaled.element_size()
    asked = None if min(rows, cols) <= EXACT_BELOW else rank
    return choose(rows, cols, rank=asked, itemsize=itemsize, floor_share=share, max_bytes=max_bytes).name


def _by_gram(matrix: Matrix, rank: int) -> Factors:
    rows, cols = matrix.shape
    if too_large_for_lapack(rows, cols):
        raise OutOfMemory(f"the Gram matrix of {rows} × {cols} is past 32-bit LAPACK; ask for a lower rank")
    turn = _top_eigenvectors(_gram(matrix.scaled), rank)
    return _projected(matrix, turn, "Gram matrix in float64", right=rows > cols)


def _gram(a: torch.Tensor) -> torch.Tensor:
    """AAᵀ or AᵀA, the smaller, in float64, from blocks that are upcast one at a time."""
    tall = a.shape[0] > a.shape[1]
    p = min(a.shape)
    gram = torch.zeros(p, p, dtype=torch.float64, device=a.device)
    for block in row_blocks(a) if tall else row_blocks(a.T):
        wide = block.double()
        gram.addmm_(wide.T, wide)
    return gram


def _top_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors (p, rank) of the largest eigenvalues, largest first."""
    p = gram.shape[0]
    try:
        if gram.device.type == "cpu" and rank * _FEW <= p:
            return torch.from_numpy(leading_eigenvectors(gram.numpy(), rank))
        turn: torch.Tensor = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]
        return turn
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # not in its stubs
        raise NoConvergence(f"the eigenproblem of a {p} × {p} Gram matrix did not converge: {error}") from error


def _projected(matrix: Matrix, vectors: torch.Tensor, method: str, *, right: bool = False) -> Factors:
    """Factors from orthonormal left vectors (rows, r), or right ones (cols, r), by projecting the update on them."""
    a = matrix.scaled
    vectors = vectors.double().to(a.device)
    if right:
        image = torch.cat([block.double() @ vectors for block in row_blocks(a)])  # (rows, r)
    else:
        image = torch.cat([block.double() @ vectors for block in row_blocks(a.T)])  # (cols, r): Δᵀu_i = σ_i v_i
    values = torch.linalg.vector_norm(image, dim=0)
    order = torch.argsort(values, descending=True, stable=True)
    order = order[values[order] > 0]
    values, image, vectors = values[order], image[:, order], vectors[:, order]
    vectors, image = _signed(vectors, image)
    root = values.sqrt() * math.sqrt(matrix.scale)
    side, other = (image / values * root, vectors * root) if right else (vectors * root, image / values * root)
    found = values.cpu().numpy() * matrix.scale
    return Factors(side.cpu(), other.T.contiguous().cpu(), found, float(np.sum(found**2)), matrix.frobenius, method)


def _signed(vectors: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs by a rule, so that they do not depend on the driver: the largest entry of each vector is positive."""
    if not vectors.numel():
        return vectors, image
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
    return vectors * signs, image * signs


def _by_sketch(matrix: Matrix, rank: int, seed: int, floor: float) -> Factors:
    spectrum = truncated(matrix, rank, seed=seed, storage_floor=floor)
    assert spectrum.left is not None
    # float32 vectors are orthonormal to float32's ε; in float64 once more, so that the projection is one.
    left = torch.linalg.qr(torch.from_numpy(np.asarray(spectrum.left)).double())[0]
    found = _projected(matrix, left, spectrum.certificate.method)
    high = float(np.sum(spectrum.interval()[1][: found.rank] ** 2))
    return replace(found, captured_high=min(high, matrix.frobenius**2))


def reranked_factors(b: torch.Tensor, a: torch.Tensor, rank: int, *, scale: float, name: str = "the update") -> Factors:
    """Best factors of a lower rank for scale·B·A, from the factors alone: O((rows + cols) R²), nothing dense.

    Parameters
    ----------
    b : Tensor of shape (rows, R)
    a : Tensor of shape (R, cols)
    rank : int
        At most so many directions; those whose value is 0 to rounding are left out.
    scale : float
        γ of the adapter; the factors returned need none.
    name : str
        How errors call the update.

    Raises
    ------
    MatrixError, NonFiniteMatrix
        As `spectra.linalg.product_spectrum`.

    Examples
    --------
    >>> b, a = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    >>> found = reranked_factors(b, a, 1, scale=2.0)
    >>> (found.b @ found.a).round(decimals=12).tolist()
    [[6.0, 0.0], [0.0, 0.0]]
    """
    found = product_spectrum(b, a, scale=scale, vectors=True, name=name)
    assert found.left is not None
    assert found.right is not None
    kept = min(rank, int(np.sum(found.values > found.certificate.roundoff)))
    values = np.array(found.values[:kept])
    left, right = torch.from_numpy(found.left[:, :kept]), torch.from_numpy(found.right[:kept])
    left, turned = _signed(left, right.T)
    root = torch.from_numpy(np.sqrt(values))
    captured, method = float(np.sum(values**2)), found.certificate.method
    return Factors(left * root, (turned * root).T.contiguous(), values, captured, found.frobenius, method)


def dense_error(matrix: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float:
    """‖Δ − BA‖_F of factors as they are stored, summed in float64 a block of rows at a time.

    Parameters
    ----------
    matrix : Tensor of shape (rows, cols)
    b : Tensor of shape (rows, r)
        In the dtype it is stored in.
    a : Tensor of shape (r, cols)

    Examples
    --------
    >>> dense_error(torch.eye(2), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    1.0
    """
    blocks = row_blocks(matrix)
    wide = a.double()
    rows = torch.split(b.double(), blocks[0].shape[0])
    left = (float((block.double() - part @ wide).square_().sum()) for block, part in zip(blocks, rows, strict=True))
    return math.sqrt(math.fsum(left))


def factored_error(b: torch.Tensor, a: torch.Tensor, scale: float, new_b: torch.Tensor, new_a: torch.Tensor) -> float:
    """‖scale·BA − B'A'‖_F of two products, from the factors stacked: neither product is formed.

    Parameters
    ----------
    b, a : Tensor of shape (rows, R) and (R, cols)
    scale : float
    new_b, new_a : Tensor of shape (rows, r) and (r, cols)
        In the dtype they are stored in.

    Examples
    --------
    >>> one = torch.ones(1, 1)
    >>> factored_error(one, one, 3.0, 2 * one, one)
    1.0
    """
    left = torch.cat([b.double() * scale, -new_b.double()], dim=1)
    right = torch.cat([a.double(), new_a.double()])
    triangles = (torch.linalg.qr(left, mode="r")[1], torch.linalg.qr(right.T, mode="r")[1])
    return float(torch.linalg.vector_norm(triangles[0] @ triangles[1].T))
