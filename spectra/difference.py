"""tuned − base in one blocked pass: the matrix, its norms, and what storage rounding adds to it."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from spectra.errors import MatrixError, NonFiniteMatrix
from spectra.linalg.dense import by_gram_together
from spectra.linalg.matrix import Matrix, row_blocks
from spectra.linalg.route import choose, matrix_spectrum
from spectra.theory.noise import FRACTION_BITS, LEAST_EXPONENT, StorageFloor, storage_floor
from spectra.values import Spectrum

RouteChoice = Literal["auto", "gram", "bidiagonal", "sketch"]

# Outside this range squares of float32 entries leave float32's own; such tensors are summed in float64.
_SAFE_RANGE = (1e-15, 1e15)


@dataclass(frozen=True)
class Difference:
    """tuned − base as a matrix, and what one pass over the entries told about it.

    Parameters
    ----------
    matrix : Tensor of shape (rows, cols), float32 or float64
        The update. Kernels are flattened to (out, rest), vectors to (n, 1).
    frobenius, base_frobenius : float
        ‖tuned − base‖_F and ‖base‖_F, summed in float64.
    floor : StorageFloor
        What rounding to the two stored dtypes adds to the update. Rows that no entry of which changed carry none:
        where both sides round the same number the errors cancel.
    zero_fraction : float
        Share of entries that are exactly equal on both sides.
    merge_loss : float
        For an adapter, ‖round(W + Δ) − (W + Δ)‖_F / ‖Δ‖_F on the grid of the base's dtype; NaN otherwise.
    more : mapping of str to float
        Further columns of its row, of updates that know more (`spectra.requantized`).
    """

    matrix: torch.Tensor
    frobenius: float
    base_frobenius: float
    floor: StorageFloor
    zero_fraction: float
    merge_loss: float = math.nan
    more: Mapping[str, float] = field(default_factory=dict)

    def spectrum(
        self,
        *,
        rank: int | None = None,
        route: RouteChoice = "auto",
        vectors: bool = False,
        keep: int | None = None,
        seed: int = 0,
        max_bytes: float = math.inf,
        device: str | None = None,
    ) -> Spectrum:
        """Singular values of the update, and its `keep` leading vectors; see `spectra.spectrum` for the parameters."""
        found = matrix_spectrum(
            Matrix.of(self.matrix.to(device) if device else self.matrix, self.frobenius),
            rank=rank,
            route=route,
            vectors=vectors,
            keep=keep,
            seed=seed,
            storage_floor=self.floor.spectral,
            max_bytes=max_bytes,
        )
        return self._certified(found)

    def _certified(self, found: Spectrum) -> Spectrum:
        # Where two float32 numbers differ in size their difference is rounded once, by at most half an ulp of itself.
        subtraction = torch.finfo(self.matrix.dtype).eps / 2.0 * self.frobenius
        certificate = replace(found.certificate, roundoff=found.certificate.roundoff + subtraction)
        return replace(found, certificate=certificate)


def spectra_together(
    differences: Sequence[Difference], *, rank: int | None, max_bytes: float, device: str | None
) -> list[Spectrum]:
    """All singular values of updates of one shape, as one batch; `Difference.spectrum` for one at a time.

    Raises
    ------
    MatrixError
        If another route than Gram's is due for one of them, or the batch fails: take them one at a time.
    """
    matrices = [Matrix.of(d.matrix.to(device) if device else d.matrix, d.frobenius) for d in differences]
    notes = []
    for d, matrix in zip(differences, matrices, strict=True):
        share = d.floor.spectral / d.frobenius
        chosen = choose(*matrix.shape, rank=rank, itemsize=matrix.scaled.element_size(), floor_share=share)
        if chosen.name != "gram" or chosen.bytes * len(matrices) > max_bytes:
            raise MatrixError(f"a {matrix.shape} matrix is not one for a batch: {chosen.name}, {chosen.reason}")
        notes.append((d.floor.spectral, chosen.reason))
    return [
        d._certified(replace(found, certificate=replace(found.certificate, storage_floor=floor, note=reason)))
        for d, found, (floor, reason) in zip(differences, by_gram_together(matrices), notes, strict=True)
    ]


def difference(
    base: torch.Tensor, tuned: torch.Tensor, base_dtype: str, tuned_dtype: str, *, name: str = "the delta"
) -> Difference:
    """Subtract base from tuned, with the norms and the rounding of the result, in one blocked pass.

    Parameters
    ----------
    base, tuned : Tensor of shape (rows, cols)
        As stored, of any floating dtype. The tuned one may be overwritten.
    base_dtype, tuned_dtype : str
        Safetensors' names of the dtypes they were stored in, which decide the rounding.
    name : str
        How errors call it.

    Raises
    ------
    NonFiniteMatrix
        If either side holds NaN or infinity.
    """
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    out = tuned if tuned.dtype == wide and tuned.is_contiguous() else _fresh(tuned.shape, wide)
    profile = _Profile(base.shape[1])
    frobenius: list[float] = []
    base_frobenius: list[float] = []
    changed = 0.0
    flags = torch.empty_like(row_blocks(out)[0])  # 1.0 where an entry changed: many times faster than count_nonzero
    for b, t, d in zip(row_blocks(base), row_blocks(tuned), row_blocks(out), strict=True):
        b_wide, t_wide = b.to(wide), t.to(wide, copy=out is tuned)
        energy, base_energy = _squares(torch.sub(t_wide, b_wide, out=d)), _squares(b_wide)  # (block rows,)
        frobenius.append(float(energy.sum()))
        base_frobenius.append(float(base_energy.sum()))
        changed += float(torch.ne(d, 0.0, out=flags[: len(d)]).sum(1).double().sum())
        norms = math.sqrt(frobenius[-1]), math.sqrt(base_frobenius[-1])
        if not (_SAFE_RANGE[0] * math.sqrt(d.numel()) < max(norms) and sum(norms) < _SAFE_RANGE[1]):
            b_wide, t_wide = b_wide.double(), t_wide.double()
        profile.add(energy > 0, rounding_variance(b_wide, base_dtype).add_(rounding_variance(t_wide, tuned_dtype)))
    total = math.fsum(frobenius)
    if not math.isfinite(total):
        raise NonFiniteMatrix(_nonfinite_message(name, base, out))
    return Difference(
        out,
        math.sqrt(total),
        math.sqrt(math.fsum(base_frobenius)),
        profile.floor(),
        (out.numel() - changed) / max(1, out.numel()),
    )


class _Kept(threading.local):
    """A worker thread's memory for differences, which it has one of at a time."""

    memory: NDArray[np.uint8] | None = None


_KEPT = _Kept()


def _fresh(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory; in a worker thread that of its last difference, once nothing holds it.

    The first touch of new pages costs as much as all else that is done to them here. NumPy asks for huge ones, where
    that is cheaper, but a machine whose memory is full of cached files has few. A main thread lives on after the work
    and keeps nothing.
    """
    kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    need = math.prod(shape) * kind.itemsize
    memory = _KEPT.memory
    if memory is None or memory.nbytes < need or sys.getrefcount(memory) > 3:  # _KEPT, this function and the call
        memory = np.empty(need, np.uint8)
        if threading.current_thread() is not threading.main_thread():
            _KEPT.memory = memory
    return torch.from_numpy(memory[:need].view(kind).reshape(shape))


def _squares(block: torch.Tensor) -> torch.Tensor:
    """Σ a² of every row, with every square and sum in float64."""
    return block.to(torch.float64, copy=True).square_().sum(1)


def _nonfinite_message(name: str, base: torch.Tensor, delta: torch.Tensor) -> str:
    def count(tensor: torch.Tensor) -> int:
        return sum(int((~torch.isfinite(rows)).sum()) for rows in row_blocks(tensor))

    return f"{name}: {count(base)} NaN or infinite entries in base, {count(delta)} in the difference, of {base.numel()}"


class _Profile:
    """Row and column sums of the variance of storage rounding, gathered block by block."""

    def __init__(self, cols: int) -> None:
        self._rows: list[torch.Tensor] = []
        self._cols = torch.zeros(cols, dtype=torch.float64)

    def add(self, touched: torch.Tensor, variance: torch.Tensor) -> None:
        if not bool(touched.all()):
            variance *= touched[:, None]
        self._rows.append(variance.sum(1).double())
        self._cols += variance.sum(0)

    def floor(self) -> StorageFloor:
        return storage_floor(torch.cat(self._rows).numpy(), self._cols.numpy())


def rounding_variance(weights: torch.Tensor, dtype: str) -> torch.Tensor:
    """ulp²/12 of every weight on the grid of a stored dtype, by the bits of its exponent; 0 for zeros.

    In the weights' own dtype, whose range must hold their squares.
    """
    if dtype not in FRACTION_BITS:
        return torch.zeros_like(weights)
    integer, mask = (torch.int32, 0x7F800000) if weights.dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    power = (weights.contiguous().view(integer) & mask).view(weights.dtype)  # 2^⌊log₂|w|⌋
    least = 2.0 ** LEAST_EXPONENT[dtype]
    if least > 1e-30:  # a subnormal of a short dtype is a normal float32: its ulp stops shrinking
        power = torch.where(weights == 0, 0.0, power.clamp_min(least))
    return power.mul_(power).mul_(4.0 ** -FRACTION_BITS[dtype] / 12.0)
