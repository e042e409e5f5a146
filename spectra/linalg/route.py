"""Which engine a matrix goes through, and why: its size, how many values are wanted, where the storage floor lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from spectra.errors import OutOfMemory, UsageError
from spectra.linalg.dense import by_bidiagonal, by_gram, gram_roundoff
from spectra.linalg.matrix import Matrix, as_matrix, too_large_for_lapack
from spectra.linalg.sketch import BLOCKS, OVERSAMPLE, TAIL_BLOCKS, TAIL_WIDTH, truncated
from spectra.values import Spectrum

RouteName = Literal["gram", "bidiagonal", "sketch"]
ROUTES: tuple[RouteName, ...] = ("gram", "bidiagonal", "sketch")

# Below this the bidiagonal route costs milliseconds whatever the precision.
SMALL = 128

# A sketch of k + 16 columns, its residuals and its tail cost about as much as the whole spectrum does where
# p = min(rows, cols) is below 6 (k + 16); at 2048 × 5632 and k = 64 it took a third of the time.
SKETCH_ADVANTAGE = 6


@dataclass(frozen=True)
class Route:
    """An engine for one matrix: `bytes` is the most memory it needs beside the matrix itself."""

    name: RouteName
    rank: int | None
    reason: str
    bytes: int


def gram_bytes(rows: int, cols: int) -> int:
    """Memory of the Gram route beside the matrix: Gram matrix, LAPACK's copy of it, one upcast block."""
    p = min(rows, cols)
    return 8 * (2 * p * p + 2048 * p)


def bidiagonal_bytes(rows: int, cols: int) -> int:
    """Memory of the bidiagonal route beside the matrix: a float64 copy, LAPACK's own copy, workspace."""
    return 8 * (2 * rows * cols + 8 * min(rows, cols))


def sketch_bytes(rows: int, cols: int, rank: int, itemsize: int) -> int:
    """Memory of the sketch beside the matrix: both bases, the float64 copy of one, the tail's bases."""
    basis = BLOCKS * (rank + OVERSAMPLE)
    tail = TAIL_BLOCKS * TAIL_WIDTH
    return itemsize * (2 * rows + cols) * (basis + tail) + 8 * (cols * basis + rows * tail)


def choose(
    rows: int,
    cols: int,
    *,
    rank: int | None = None,
    itemsize: int = 4,
    floor_share: float = math.nan,
    max_bytes: float = math.inf,
) -> Route:
    """Pick the cheapest route that answers the question.

    Parameters
    ----------
    rows, cols : int
        Shape of the matrix.
    rank : int, optional
        How many values are wanted at least; None for all.
    itemsize : int
        4 for float32, 8 for float64.
    floor_share : float
        Storage floor over ‖A‖_F, NaN where unknown. The Gram route resolves values down to about 10⁻⁷ σ₁; where the
        floor lies above that nothing is lost.
    max_bytes : float
        Memory allowed beside the matrix.

    Raises
    ------
    OutOfMemory
        If no route fits in `max_bytes`; the message says what the smallest needs.

    Examples
    --------
    >>> choose(384, 1536).name, choose(4096, 4096, rank=64).name
    ('gram', 'sketch')
    """
    p = min(rows, cols)
    whole = rank is None or rank >= p or p < SKETCH_ADVANTAGE * (rank + OVERSAMPLE)
    exact = _exact_route(rows, cols, itemsize, floor_share)
    if whole and exact.bytes <= max_bytes and not too_large_for_lapack(rows, cols):
        if rank is not None and rank < p:
            return replace(exact, reason=f"all {p} values cost no more than the top {rank} here; {exact.reason}")
        return exact
    count = min(p - 1, 64 if rank is None else rank)
    sketch = Route("sketch", count, f"top {count} of {p}, certified", sketch_bytes(rows, cols, max(count, 1), itemsize))
    if whole:
        cause = "past 32-bit LAPACK" if too_large_for_lapack(rows, cols) else "past the memory allowed"
        sketch = replace(sketch, reason=f"{cause} for all values: {sketch.reason}")
    if count < 1 or sketch.bytes > max_bytes:
        least = min(sketch.bytes, exact.bytes)
        raise OutOfMemory(
            f"a {rows} × {cols} matrix needs {least / 1e6:,.3g} MB beside itself by its leanest route, "
            f"but {max(max_bytes, 0) / 1e6:,.3g} MB are left for it; allow more memory or ask for fewer values"
        )
    return sketch


def _exact_route(rows: int, cols: int, itemsize: int, floor_share: float) -> Route:
    bidiagonal = Route("bidiagonal", None, "small", bidiagonal_bytes(rows, cols))
    if min(rows, cols) <= SMALL:
        return bidiagonal
    resolution = gram_roundoff(rows, cols)
    if math.isnan(floor_share):
        if itemsize == 8:
            return replace(bidiagonal, reason="float64 entries: the Gram route would lose half their digits")
        return Route("gram", None, "float32 entries", gram_bytes(rows, cols))
    if floor_share < resolution / 4 and itemsize == 8:
        return replace(
            bidiagonal, reason=f"the storage floor is {floor_share:.0e} of ‖A‖, below the Gram route's sight"
        )
    return Route("gram", None, f"the storage floor, {floor_share:.0e} of ‖A‖, hides more", gram_bytes(rows, cols))


def spectrum(
    array: Any,
    *,
    rank: int | None = None,
    route: Literal["auto", "gram", "bidiagonal", "sketch"] = "auto",
    vectors: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    storage_floor: float = math.nan,
    max_bytes: float = math.inf,
    name: str = "the matrix",
) -> Spectrum:
    """Singular values of a matrix, each with a certificate of how far it may be wrong.

    Parameters
    ----------
    array : Tensor or array_like of shape (rows, cols)
        bfloat16, float16 and 8-bit floats are upcast to float32; integers to float64.
    rank : int, optional
        How many of the largest values are wanted at least. All by default; all, too, where that costs no more.
    route : {"auto", "gram", "bidiagonal", "sketch"}
        ``gram``: all values, right down to 10⁻⁷ σ₁. ``bidiagonal``: all values, right to a few ε σ₁. ``sketch``: the
        top `rank` by randomized block Lanczos, with intervals. ``auto`` takes the cheapest that answers; the
        certificate's note says why.
    vectors : bool
        Also give singular vectors. A sketch has them in any case.
    seed : int
        Seed of the sketch's random starts.
    device : str or torch.device, optional
        Where to compute; by default where the tensor is.
    storage_floor : float
        Spectral norm of the rounding error of the entries, where known (`spectra.theory.noise`).
    max_bytes : float
        Memory allowed beside the matrix.
    name : str
        How errors call the matrix.

    Returns
    -------
    Spectrum

    Raises
    ------
    MatrixError, NonFiniteMatrix, UnsupportedFormat
        If the array is no finite real matrix.
    UsageError
        If rank is not positive, or the sketch is asked for every value.
    OutOfMemory
        If no route fits in `max_bytes`.

    Examples
    --------
    >>> import numpy as np
    >>> A = spectrum(np.diag([3.0, 2.0, 1.0]))
    >>> A.values.round(12).tolist(), A.complete
    ([3.0, 2.0, 1.0], True)
    """
    if rank is not None and rank < 1:
        raise UsageError(f"rank = {rank}: ask for at least one singular value")
    return matrix_spectrum(
        as_matrix(array, name=name, device=device),
        rank=rank,
        route=route,
        vectors=vectors,
        seed=seed,
        storage_floor=storage_floor,
        max_bytes=max_bytes,
    )


def matrix_spectrum(
    matrix: Matrix,
    *,
    rank: int | None = None,
    route: Literal["auto", "gram", "bidiagonal", "sketch"] = "auto",
    vectors: bool = False,
    keep: int | None = None,
    seed: int = 0,
    storage_floor: float = math.nan,
    max_bytes: float = math.inf,
) -> Spectrum:
    """`spectrum` of a matrix that is already validated; `keep`: how many leading vectors, all by default."""
    rows, cols = matrix.shape
    if route == "auto":
        share = storage_floor / matrix.frobenius if matrix.frobenius > 0 else math.nan
        itemsize = matrix.scaled.element_size()
        chosen = choose(rows, cols, rank=rank, itemsize=itemsize, floor_share=share, max_bytes=max_bytes)
    else:
        chosen = Route(route, rank, "asked for", 0)
    if chosen.name == "sketch":
        if chosen.rank is None or chosen.rank >= min(rows, cols):
            raise UsageError(
                f"a sketch gives fewer values than the {min(rows, cols)} of a {rows} × {cols} matrix: set rank"
            )
        found = truncated(matrix, chosen.rank, seed=seed, storage_floor=storage_floor)
    elif chosen.name == "gram":
        found = by_gram(matrix, vectors=vectors, keep=keep)
    else:
        found = by_bidiagonal(matrix, vectors=vectors)
    certificate = replace(found.certificate, storage_floor=storage_floor, note=chosen.reason)
    if keep is not None and found.left is not None and found.right is not None:
        found = replace(found, left=found.left[:, :keep], right=found.right[:keep])
    return replace(found, certificate=certificate)
