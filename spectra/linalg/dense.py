"""All singular values of a dense matrix: by its Gram matrix in float64, or by bidiagonalization in float64.

Gram: eigenvalues of the smaller of AAᵀ and AᵀA are squares of singular values. Products of float32 entries are exact in
float64, so the only errors are those of float64 sums and of the symmetric eigensolver, about ε·σ₁² on σ²: values are
right down to √ε σ₁ ≈ 10⁻⁷ σ₁, where stored weights are noise anyway, at about a quarter of the cost of a thin SVD.

Bidiagonal: LAPACK's own route, right to a few ε·σ₁, for float64 matrices and small ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.linalg import blas

from spectra.errors import MatrixError, NoConvergence
from spectra.linalg.matrix import Matrix, too_large_for_lapack
from spectra.values import Certificate, Spectrum, Vector

_EPSILON = float(np.finfo(np.float64).eps)

# Columns of A that are upcast at a time: 2048 columns of 4096 rows make a 64 MiB float64 block.
_GRAM_BLOCK = 2048

# SciPy's LAPACK wrappers hold Python's lock, torch's do not: up to this size, where matrices are measured side by side,
# torch does all.
SIDE_BY_SIDE_ROWS = 1024
_SCIPY_ROWS = 3072  # see _eigenvalues


def gram_roundoff(rows: int, cols: int) -> float:
    """√ of the error of σ²/σ₁² by the Gram route: (32 + 4√n)ε, n the larger dimension.

    On random matrices of 256 to 1600 rows this route and two LAPACK drivers differed by at most 62ε, a third of it.
    """
    return math.sqrt((32.0 + 4.0 * math.sqrt(max(rows, cols))) * _EPSILON)


def bidiagonal_roundoff(rows: int, cols: int) -> float:
    """Error of σ/σ₁ by the bidiagonal route in float64: (16 + 2√p)ε.

    Two LAPACK drivers differed by 8ε at 256 rows and by 32ε at 1600, a third of it; on the gallery of the tests the
    largest error was 2ε.
    """
    return (16.0 + 2.0 * math.sqrt(min(rows, cols))) * _EPSILON


def by_gram(matrix: Matrix, *, vectors: bool | Literal["left"] = False, keep: int | None = None) -> Spectrum:
    """All singular values from the eigenvalues of the smaller Gram matrix in float64.

    Parameters
    ----------
    matrix : Matrix
        Validated (rows, cols) matrix of float32 or float64, on any device.
    vectors : bool or "left"
        Also give left and right vectors, or left ones alone: in float64 up to a smaller dimension of
        `SIDE_BY_SIDE_ROWS`, beyond in the matrix's dtype. Orthonormal all; those of the larger dimension are arbitrary
        where values lie below √ε σ₁.
    keep : int, optional
        How many of the leading vectors; all by default.

    Raises
    ------
    MatrixError
        If the Gram matrix would not fit LAPACK's 32-bit integers.
    """
    rows, cols = matrix.shape
    if too_large_for_lapack(rows, cols):
        raise MatrixError(f"the Gram matrix of {rows} × {cols} is past 32-bit LAPACK; ask for the top values: rank=64")
    gram = _gram(matrix.scaled)
    if not vectors:
        squares = _eigenvalues(gram).flip(0)
        left = right = None
    else:
        squares, turn = (part.flip(-1) for part in _eigenvectors(gram))
        left, right = _vectors(matrix.scaled, turn[:, :keep], left_alone=vectors == "left")
    values = squares.clamp_min(0.0).sqrt().cpu().numpy() * matrix.scale
    return Spectrum(
        values,
        matrix.shape,
        matrix.frobenius,
        Certificate("Gram matrix in float64", squared_roundoff=gram_roundoff(rows, cols) * float(values[0])),
        left=left,
        right=right,
    )


def by_gram_together(matrices: Sequence[Matrix]) -> list[Spectrum]:
    """`by_gram` of matrices of one shape on one device, as one batched product and one batched eigenproblem.

    An accelerator is filled by many small matrices at once and left idle by one at a time.

    Raises
    ------
    MatrixError
        If their shapes differ, or the eigensolver does not converge for one of them.
    """
    if len({matrix.shape for matrix in matrices}) > 1:
        raise MatrixError(f"a batch takes matrices of one shape, not {sorted({matrix.shape for matrix in matrices})}")
    stack = torch.stack([matrix.scaled.double() for matrix in matrices])
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.mT
    try:
        squares = torch.linalg.eigvalsh(wide @ wide.mT).flip(-1)  # (batch, p)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch's stubs leave it out
        raise NoConvergence(f"a batch of {len(matrices)} eigenproblems did not converge: {error}") from error
    found = squares.clamp_min(0.0).sqrt().cpu().numpy()
    return [
        Spectrum(
            values := np.array(found[i]) * matrix.scale,
            matrix.shape,
            matrix.frobenius,
            Certificate(
                "Gram matrix in float64, batched",
                squared_roundoff=gram_roundoff(*matrix.shape) * float(values[0]),
            ),
        )
        for i, matrix in enumerate(matrices)
    ]


def _eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    """Ascending eigenvalues of a symmetric matrix of which the lower triangle is given.

    SciPy's OpenBLAS is faster than torch's MKL at a few thousand rows (2048: .42 s against .55 s on two cores);
    beyond, torch's divide and conquer is taken.
    """
    if gram.device.type == "cpu" and SIDE_BY_SIDE_ROWS < gram.shape[0] <= _SCIPY_ROWS:
        found = scipy.linalg.eigh(gram.numpy(), eigvals_only=True, driver="ev", overwrite_a=True, check_finite=False)
        return torch.from_numpy(found)
    values: torch.Tensor = torch.linalg.eigvalsh(gram)
    return values


def _eigenvectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending eigenvalues and eigenvectors of a symmetric matrix of which the lower triangle is given.

    Divide and conquer by SciPy's OpenBLAS or torch's MKL: at 2048 rows 2.3 s of one core against 3.2 s.
    """
    if gram.device.type == "cpu" and gram.shape[0] > SIDE_BY_SIDE_ROWS:
        values, turn = scipy.linalg.eigh(gram.numpy(), driver="evd", overwrite_a=True, check_finite=False)
        return torch.from_numpy(values), torch.from_numpy(turn)
    values, turn = torch.linalg.eigh(gram)
    return values, turn


def _vectors(
    a: torch.Tensor, turn: torch.Tensor, *, left_alone: bool = False
) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
    """U (rows, k) and Vᵀ (k, cols) from eigenvectors of the smaller Gram matrix; largest entry of each u positive."""
    wide = a.shape[0] <= a.shape[1]
    if turn.shape[0] > SIDE_BY_SIDE_ROWS:
        turn = turn.to(a.dtype)
    if wide and left_alone:
        return turn.cpu().numpy(), None
    other = _orthonormal(_image(a, turn, wide=wide))  # (larger dimension, k): columns s_i times the other vectors
    left, right = (turn, other.T) if wide else (other, turn.T)
    signs = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    signs[signs == 0] = 1.0
    return left.mul_(signs).cpu().numpy(), None if left_alone else right.mul_(signs.T).cpu().numpy()


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Unit columns near the directions of columns that are orthogonal to ε σ₁²/(s_i s_j); overwrites its argument.

    Cholesky QR, three times faster than Householder's, which is kept for columns that roundoff has made dependent:
    those of values below √ε σ₁.
    """
    columns /= torch.linalg.vector_norm(columns, dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(columns.T @ columns)
    if not int(failed) and bool((factor.diagonal() > 0.5).all()):
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        basis: torch.Tensor = columns @ inverse.T
        return basis
    basis, triangle = torch.linalg.qr(columns)
    basis *= torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return basis


def _image(a: torch.Tensor, turn: torch.Tensor, *, wide: bool) -> torch.Tensor:
    """Aᵀ·turn where `wide`, else A·turn, in the dtype of turn, a few rows of the answer at a time."""
    step = max(1, _GRAM_BLOCK * _GRAM_BLOCK // turn.shape[0])
    image = turn.new_empty(max(a.shape), turn.shape[1])
    for block, rows in zip(torch.split(a, step, dim=int(wide)), torch.split(image, step), strict=True):
        torch.mm((block.T if wide else block).to(turn.dtype), turn, out=rows)
    return image


def _gram(a: torch.Tensor) -> torch.Tensor:
    """AAᵀ or AᵀA, the smaller, in float64; only one triangle is meaningful on the CPU (the one torch.linalg reads)."""
    wide = a if a.shape[0] <= a.shape[1] else a.T
    if a.device.type != "cpu" or wide.shape[0] <= SIDE_BY_SIDE_ROWS:
        gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=a.device)
        for block in torch.split(wide, _GRAM_BLOCK, dim=1):
            block = block.double()
            gram.addmm_(block, block.T)
        return gram
    # SciPy's dsyrk does half the work of a product; torch has none.
    gram_f = np.zeros((wide.shape[0], wide.shape[0]), order="F")
    for block in torch.split(wide, _GRAM_BLOCK, dim=1):
        if wide is a:  # rows are contiguous: as Fortran sees it the block is its own transpose
            gram_f = blas.dsyrk(1.0, _float64(block).T, 1.0, gram_f, trans=1, lower=1, overwrite_c=1)
        else:
            gram_f = blas.dsyrk(1.0, _float64(block.T).T, 1.0, gram_f, trans=0, lower=1, overwrite_c=1)
    return torch.from_numpy(gram_f)


def _float64(block: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(block.to(torch.float64, memory_format=torch.contiguous_format).contiguous().numpy())


def by_bidiagonal(matrix: Matrix, *, vectors: bool = False) -> Spectrum:
    """All singular values by LAPACK's bidiagonalization in float64.

    Divide and conquer first; where it does not converge, QR iteration, and the certificate's method says so.

    Raises
    ------
    NoConvergence
        If both drivers fail.
    """
    a = matrix.scaled.double()
    try:
        values, left, right = _by_divide_and_conquer(a, vectors)
        driver = "divide and conquer"
    except torch.linalg.LinAlgError as first:  # type: ignore[attr-defined]  # torch's stubs leave it out
        values, left, right = _by_qr_iteration(a, vectors, str(first))
        driver = "QR iteration, since divide and conquer did not converge"
    values = np.sort(np.maximum(values, 0.0))[::-1] * matrix.scale
    return Spectrum(
        values,
        matrix.shape,
        matrix.frobenius,
        Certificate(
            f"bidiagonal in float64, {driver}",
            roundoff=bidiagonal_roundoff(*matrix.shape) * float(values[0]),
        ),
        left=left,
        right=right,
    )


_Triplet = tuple[Vector, Vector | None, Vector | None]


def _by_divide_and_conquer(a: torch.Tensor, vectors: bool) -> _Triplet:
    if not vectors:
        return torch.linalg.svdvals(a).cpu().numpy(), None, None
    left, values, right = torch.linalg.svd(a, full_matrices=False)
    return values.cpu().numpy(), left.cpu().numpy(), right.cpu().numpy()


def _by_qr_iteration(a: torch.Tensor, vectors: bool, first: str) -> _Triplet:
    try:
        found = scipy.linalg.svd(a.cpu().numpy(), full_matrices=False, compute_uv=vectors, lapack_driver="gesvd")
    except np.linalg.LinAlgError as second:
        shape = tuple(a.shape)
        raise NoConvergence(f"no singular value driver converged on a {shape} matrix: {first}; {second}") from second
    return (found[1], found[0], found[2]) if vectors else (found, None, None)
