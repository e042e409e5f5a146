"""Top-k singular values by randomized block Lanczos, with a certificate that nothing larger was missed.

Three parts, each a few passes over the matrix and all else small:

1. *Block Lanczos* (Golub, Luk and Overton, ACM TOMS 7, 1981; as a randomized method: Musco and Musco, NeurIPS 2015): an
   orthonormal basis Q of span{AΩ, (AAᵀ)AΩ, …} grown a block at a time, until the values that storage rounding does not
   hide are settled. AᵀQ and AAᵀQ fall out of the recurrence.
2. *Rayleigh–Ritz* values, and residuals AAᵀu_i − s_i²u_i: no further pass.
3. *Tail norm*: block Lanczos from a fresh random start on R = (I − UUᵀ)A. A start that is not chosen by looking at A
   cannot be blind to a direction except with a probability that Kuczyński and Woźniakowski bound for every matrix.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from spectra.linalg.dense import gram_roundoff
from spectra.linalg.matrix import Matrix
from spectra.theory.bounds import block_lanczos_factor, rayleigh_ritz_upper
from spectra.values import Certificate, Spectrum, Vector

# Width past the k values asked for, and number of blocks. On a 4096 × 4096 matrix with a power-law spectrum in noise
# and k = 64, four blocks of k + 16 find the 64th value to 1.3 % and certify the 32nd to about 8 %; three leave 6 % and
# 27 %.
OVERSAMPLE = 16
BLOCKS = 4

# The tail's own Lanczos run: at a failure probability of 1e-9 four blocks keep the bound within 1.23 of the truth on
# noise, power laws and a lone spike of 1024 to 2048 rows (five: 1.15; three: 1.43).
TAIL_WIDTH = 16
TAIL_BLOCKS = 4
FAILURE_PROBABILITY = 1e-9

# A column that projection leaves shorter than this many ε of the longest is rounding error.
_BREAKDOWN = 64.0
# Least pivot, against the longest column, that Cholesky QR is trusted with: its error goes with the square's inverse.
_CHOLESKY_LIMIT = 1e-6

# Residual, relative to s², below which a value is settled: its error is of second order, 10⁻⁶ of it.
_SETTLED = 1e-3

# Error of a value from float32 products, in units of ε·σ₁. The largest seen over planted spectra of 256 to 2048 rows
# was 1.3; the factor leaves room for longer inner products.
_ROUNDOFF = 8.0


def truncated(
    matrix: Matrix, rank: int, *, seed: int = 0, blocks: int = BLOCKS, storage_floor: float = math.nan
) -> Spectrum:
    """Top `rank` singular triplets with a certificate.

    Parameters
    ----------
    matrix : Matrix
        Validated (rows, cols) matrix of float32 or float64, on any device.
    rank : int
        k, 1 ≤ k < min(rows, cols).
    seed : int
        Seed of both random starts; the same seed gives the same bytes on one machine.
    blocks : int
        Blocks of the Krylov space at most; each costs two passes over the matrix.
    storage_floor : float
        Where known: refinement ends once the values above it are settled, since what lies below is rounding.

    Returns
    -------
    Spectrum
        k values with left and right vectors, deterministic `gap` and probabilistic `tail_norm`.
    """
    a = matrix.scaled
    width = min(rank + OVERSAMPLE, min(a.shape))
    generator = torch.Generator().manual_seed(seed)
    blocks = min(blocks, max(1, min(a.shape) // width))
    hidden = 0.0 if math.isnan(storage_floor) else (storage_floor / matrix.scale) ** 2
    q, w, image, squares, turn, taken = _krylov(a, width, blocks, generator, rank, hidden)
    left = q @ turn.to(q.dtype)  # (rows, rank)
    right = w @ turn.to(w.dtype)  # (cols, rank): Aᵀu_i = s_i v_i
    residuals = _residuals(image, left, squares, turn).cpu().numpy()
    tail = tail_norm(a, left, generator)

    values = np.minimum.accumulate(squares.sqrt().cpu().numpy())
    upper = rayleigh_ritz_upper(values, residuals, tail)
    roundoff = _ROUNDOFF * torch.finfo(a.dtype).eps * float(values[0])
    found = float(np.sum(np.maximum(values - roundoff, 0.0) ** 2))  # at least: what is left out must not be understated
    gap = math.sqrt(max(0.0, (matrix.frobenius / matrix.scale) ** 2 - found))
    signs = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))  # (1, rank): largest entry positive
    right = torch.nn.functional.normalize(right, dim=0, eps=torch.finfo(right.dtype).tiny)
    dtype = str(a.dtype).removeprefix("torch.")
    return Spectrum(
        values * matrix.scale,
        matrix.shape,
        matrix.frobenius,
        Certificate(
            method=f"block Lanczos in {dtype}, {w.shape[1]} columns in {taken} blocks",
            gap=gap * matrix.scale,
            tail_norm=(float(upper[-1]) + roundoff) * matrix.scale,
            roundoff=roundoff * matrix.scale,
            squared_roundoff=gram_roundoff(*w.shape) * float(values[0]) * matrix.scale,
            failure_probability=FAILURE_PROBABILITY,
            seed=seed,
            upper=upper[:-1] * matrix.scale,
            residuals=_of_triplets(residuals, values, float(upper[0])) * matrix.scale,
        ),
        left=(left * signs).cpu().numpy(),
        right=(right * signs).T.cpu().numpy(),
    )


def _krylov(
    a: torch.Tensor, width: int, blocks: int, generator: torch.Generator, rank: int, hidden: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Grow the block Krylov space of AAᵀ until the leading values are settled, or for so many blocks.

    Returns
    -------
    q, w, image : Tensor
        Orthonormal basis Q (rows, columns), W = AᵀQ (cols, columns) and AW (rows, columns).
    squares, turn : Tensor of shape (rank,) and (columns, rank), float64
        Ritz values s² and the vectors that turn Q into left singular vectors.
    taken : int
        Number of blocks.
    """
    start = torch.randn(a.shape[1], width, generator=generator, dtype=a.dtype).to(a.device)
    rows, cols = a.shape
    q, w, image = (a.new_empty(side, blocks * width) for side in (rows, cols, rows))
    new, columns = a @ start, 0
    for j in range(blocks):
        here = slice(columns, columns + new.shape[1])
        q[:, here] = _orthonormal_against(new, q[:, :columns], generator)
        w[:, here] = (q[:, here].T @ a).T  # a.T @ q costs a seventh more
        new = image[:, here] = a @ w[:, here]
        columns = here.stop
        if j == blocks - 1 or hidden > 0.0:
            squares, turn = _ritz(w[:, :columns], rank)
            seen = q[:, :columns], image[:, :columns], squares, turn
            if j == blocks - 1 or (j > 0 and _settled(*seen, hidden)):
                break
            new = _unsettled(*seen, hidden)
    return q[:, :columns], w[:, :columns], image[:, :columns], squares, turn, j + 1


def _ritz(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rayleigh–Ritz: QᵀA = Wᵀ, whose values and left vectors come from its small Gram matrix in float64."""
    w64 = w.double()
    squares, turn = torch.linalg.eigh(w64.T @ w64)
    return squares.flip(0)[:rank].clamp_min(0.0), turn.flip(1)[:, :rank]


def _residuals(image: torch.Tensor, left: torch.Tensor, squares: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """‖AAᵀu_i − s_i²u_i‖ of every left vector, from AAᵀQ = image."""
    off = (image @ turn.to(image.dtype)).double() - left.double() * squares
    residuals: torch.Tensor = torch.linalg.vector_norm(off, dim=0)
    return residuals


def _of_triplets(residuals: Vector, values: Vector, largest: float) -> Vector:
    """‖Av_i − s_iu_i‖ = ‖AAᵀu_i − s_i²u_i‖/s_i, since Aᵀu_i = s_iv_i; never more than ‖A‖₂ ≤ `largest`.

    u_iᵀAv_i = s_i, so that the square of the residual is ‖Av_i‖² − s_i².
    """
    quotients: Vector = np.divide(residuals, values, out=np.full(len(values), largest), where=values > 0.0)
    return np.minimum(quotients, largest)


def _settled(q: torch.Tensor, image: torch.Tensor, squares: torch.Tensor, turn: torch.Tensor, hidden: float) -> bool:
    """Whether every value that storage rounding does not hide has a small residual; finer ones would say nothing."""
    above = squares > hidden
    if not bool(above.any()):
        return True
    squares, turn = squares[above], turn[:, above]
    residuals = _residuals(image, q @ turn.to(q.dtype), squares, turn)
    return bool((residuals <= _SETTLED * squares).all())


def _unsettled(
    q: torch.Tensor, image: torch.Tensor, squares: torch.Tensor, turn: torch.Tensor, hidden: float
) -> torch.Tensor:
    """Next block where a floor is known: residuals of the Ritz vectors above it, and of a few more.

    They span what a whole block would add for those vectors, in as many columns as there are vectors to refine.
    """
    wanted = int((squares > hidden).sum()) + OVERSAMPLE // 2
    count = min(len(squares), -(-wanted // OVERSAMPLE) * OVERSAMPLE)
    squares, turn = squares[:count].to(q.dtype), turn[:, :count].to(q.dtype)
    return torch.nn.functional.normalize(image @ turn - (q @ turn) * squares, dim=0)


def _orthonormal_against(new: torch.Tensor, known: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns, orthogonal to the orthonormal known, whose span holds what new adds to it.

    Projected and factored twice: once is not enough, twice is (Parlett, "The Symmetric Eigenvalue Problem", 6.9).
    Where new adds nothing more its columns are rounding errors, or zeros, and would come out in the span of known:
    random ones take their place, which keeps the basis orthonormal and can only help it.
    """
    size = float(torch.linalg.vector_norm(new, dim=0).max())
    least = _BREAKDOWN * torch.finfo(new.dtype).eps * size
    new = _deflated(new, known)
    once = _cholesky_qr(new, max(least, _CHOLESKY_LIMIT * size))
    twice = None if once is None else _cholesky_qr(_deflated(once, known), 0.5)
    if twice is not None:
        return twice
    new, triangle = torch.linalg.qr(new)
    lost = triangle.diagonal().abs() <= least
    if bool(lost.any()):
        fresh = torch.randn(new.shape, generator=generator, dtype=new.dtype).to(new.device)
        new = torch.linalg.qr(_deflated(torch.where(lost, fresh, new), known))[0]
    basis: torch.Tensor = torch.linalg.qr(_deflated(new, known))[0]
    return basis


def _cholesky_qr(x: torch.Tensor, least: float) -> torch.Tensor | None:
    """Basis of x by the inverse Cholesky factor of its Gram matrix in float64; None below a pivot of `least`.

    A few matrix products (Yamamoto et al., ETNA 44, 2015) for conditions below 10⁶. The product with the inverse is
    taken in x's own precision: done twice, the second time to a basis that is nearly orthonormal, it leaves rounding
    errors alone.
    """
    x64 = x.double()
    factor, failed = torch.linalg.cholesky_ex(x64.T @ x64)
    if int(failed) or not bool((factor.diagonal() > least).all()):
        return None
    eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    basis: torch.Tensor = x @ torch.linalg.solve_triangular(factor.T, eye, upper=True).to(x.dtype)
    return basis


def tail_norm(a: torch.Tensor, left: torch.Tensor, generator: torch.Generator) -> float:
    """Upper bound on ‖(I − UUᵀ)A‖₂, U = left, that fails with probability at most `FAILURE_PROBABILITY`.

    The largest singular value seen by block Lanczos from a Gaussian start of its own, times `block_lanczos_factor`.
    """
    cols = a.shape[1]
    width = min(TAIL_WIDTH, min(a.shape))
    blocks = min(TAIL_BLOCKS, max(1, cols // width))
    start = torch.randn(cols, width, generator=generator, dtype=a.dtype).to(a.device)
    basis = _orthonormal_against(start, start[:, :0], generator)
    image = _deflated(a @ basis, left)
    images = [image]
    for _ in range(blocks - 1):
        new = _orthonormal_against((image.T @ a).T, basis, generator)
        basis = torch.cat([basis, new], dim=1)
        image = _deflated(a @ new, left)
        images.append(image)
    z = torch.cat(images, dim=1).double()
    largest = math.sqrt(float(torch.linalg.eigvalsh(z.T @ z)[-1].clamp_min(0.0)))
    if basis.shape[1] >= cols:
        return largest  # the Krylov space is the whole space
    return largest * block_lanczos_factor(cols, width, blocks, FAILURE_PROBABILITY)


def _deflated(vectors: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    return vectors - left @ (left.T @ vectors)
