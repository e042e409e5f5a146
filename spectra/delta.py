"""The update of one tensor: `Delta` subtracts two stored tensors, `LowRankDelta` holds an adapter's factors.

Both hold references (checkpoint, name), never matrices, so that they are cheap to list and to send; both upcast before
they subtract or multiply. Along with the difference one pass over the entries sums what the report needs: norms, the
share of untouched entries, and the variance profile of the storage rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from spectra.checkpoints import Adapter, Checkpoint, TensorInfo, open_checkpoint
from spectra.checkpoints.adapter import LowRankUpdate, ReplacementUpdate, ShiftUpdate, Update
from spectra.checkpoints.names import Pair, Pairing, pair_names
from spectra.errors import MatrixError, NonFiniteMatrix, UsageError
from spectra.linalg.factored import product_spectrum
from spectra.linalg.matrix import Matrix, row_blocks
from spectra.linalg.route import matrix_spectrum
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
    """

    matrix: torch.Tensor
    frobenius: float
    base_frobenius: float
    floor: StorageFloor
    zero_fraction: float
    merge_loss: float = math.nan

    def spectrum(
        self,
        *,
        rank: int | None = None,
        route: RouteChoice = "auto",
        seed: int = 0,
        max_bytes: float = math.inf,
        device: str | None = None,
    ) -> Spectrum:
        """Singular values of the update; see `spectra.spectrum` for the parameters."""
        found = matrix_spectrum(
            Matrix.of(self.matrix.to(device) if device else self.matrix, self.frobenius),
            rank=rank,
            route=route,
            seed=seed,
            storage_floor=self.floor.spectral,
            max_bytes=max_bytes,
        )
        # Where two float32 numbers differ in size their difference is rounded once, by at most half an ulp of itself.
        subtraction = torch.finfo(self.matrix.dtype).eps / 2.0 * self.frobenius
        certificate = replace(found.certificate, roundoff=found.certificate.roundoff + subtraction)
        return replace(found, certificate=certificate)


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
    out = tuned if tuned.dtype == wide and tuned.is_contiguous() else torch.empty(tuned.shape, dtype=wide)
    profile = _Profile(base.shape[1])
    frobenius: list[float] = []
    base_frobenius: list[float] = []
    zeros = 0
    for b, t, d in zip(row_blocks(base), row_blocks(tuned), row_blocks(out), strict=True):
        b_wide, t_wide = b.to(wide), t.to(wide)
        delta = t_wide - b_wide
        energy = delta.to(torch.float64, copy=True).square_().sum(1)  # (block rows,)
        touched = energy > 0
        profile.add(touched, (b_wide, base_dtype), (t_wide, tuned_dtype))
        frobenius.append(float(energy.sum()))
        base_frobenius.append(float(b_wide.to(torch.float64, copy=True).square_().sum()))
        zeros += delta.numel() - int(torch.count_nonzero(delta))
        d.copy_(delta)
    total = math.fsum(frobenius)
    if not math.isfinite(total):
        raise NonFiniteMatrix(_nonfinite_message(name, base, out))
    return Difference(
        out, math.sqrt(total), math.sqrt(math.fsum(base_frobenius)), profile.floor(), zeros / max(1, out.numel())
    )


def _nonfinite_message(name: str, base: torch.Tensor, delta: torch.Tensor) -> str:
    def count(tensor: torch.Tensor) -> int:
        return sum(int((~torch.isfinite(rows.float())).sum()) for rows in row_blocks(tensor))

    return f"{name}: {count(base)} NaN or infinite entries in base, {count(delta)} in the difference, of {base.numel()}"


class _Profile:
    """Row and column sums of the variance of storage rounding, gathered block by block."""

    def __init__(self, cols: int) -> None:
        self._rows: list[torch.Tensor] = []
        self._cols = torch.zeros(cols, dtype=torch.float64)

    def add(self, touched: torch.Tensor, *sides: tuple[torch.Tensor, str]) -> None:
        rows = torch.zeros(touched.shape[0], dtype=torch.float64)
        for weights, dtype in sides:
            variance = _rounding_variance(weights, dtype)
            if not bool(touched.all()):
                variance *= touched[:, None]
            rows += variance.sum(1)
            self._cols += variance.sum(0)
        self._rows.append(rows)

    def floor(self) -> StorageFloor:
        return storage_floor(torch.cat(self._rows).numpy(), self._cols.numpy())


def _rounding_variance(weights: torch.Tensor, dtype: str) -> torch.Tensor:
    """ulp²/12 of every weight on the grid of a stored dtype, by the bits of its exponent; 0 for zeros."""
    if dtype not in FRACTION_BITS:
        return torch.zeros_like(weights)
    low, high = torch.aminmax(weights)
    size = max(abs(float(low)), abs(float(high)))
    if weights.dtype == torch.float32 and not _SAFE_RANGE[0] < size < _SAFE_RANGE[1]:
        weights = weights.double()
    integer, mask = (torch.int32, 0x7F800000) if weights.dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    power = (weights.contiguous().view(integer) & mask).view(weights.dtype)  # 2^⌊log₂|w|⌋
    least = 2.0 ** LEAST_EXPONENT[dtype]
    if least > 1e-30:  # a subnormal of a short dtype is a normal float32: its ulp stops shrinking
        power = torch.where(weights == 0, 0.0, power.clamp_min(least))
    return power.mul_(power).mul_(4.0 ** -FRACTION_BITS[dtype] / 12.0)


@dataclass(frozen=True)
class Delta:
    """tuned − base of one tensor, by reference.

    Parameters
    ----------
    name : str
        Canonical name.
    base, tuned : mapping of str to Tensor
        Lazy checkpoints.
    base_name, tuned_name : str
        Names as stored.
    view : str
        What to take of the stored tensors (`spectra.checkpoints.names.Pair`).
    """

    name: str
    base: Checkpoint
    tuned: Checkpoint | Adapter
    base_name: str
    tuned_name: str
    view: str = ""

    @property
    def base_info(self) -> TensorInfo:
        """What is stored on the base's side."""
        return self.base.info(self.base_name)

    @property
    def tuned_info(self) -> TensorInfo:
        """What is stored on the tuned side."""
        return self.tuned.info(self.tuned_name)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the update as a matrix."""
        return matrix_shape(viewed_shape(self.base_info.shape, self.view, "base"))

    def difference(self) -> Difference:
        """Read both tensors and subtract."""
        base = _matrix(_viewed(self.base[self.base_name], self.view, "base"))
        tuned = _matrix(_viewed(self.tuned[self.tuned_name], self.view, "tuned"))
        if base.shape != tuned.shape:
            raise MatrixError(f"{self.name}: base is {tuple(base.shape)} but tuned is {tuple(tuned.shape)}")
        return difference(base, tuned, self.base_info.dtype, self.tuned_info.dtype, name=self.name)

    def dense(self) -> torch.Tensor:
        """Give the update itself, (rows, cols), float32 or float64."""
        return self.difference().matrix

    def spectrum(self, *, rank: int | None = None, route: RouteChoice = "auto", seed: int = 0) -> Spectrum:
        """Singular values of the update, with the storage floor in the certificate."""
        return self.difference().spectrum(rank=rank, route=route, seed=seed)


@dataclass(frozen=True)
class LowRankDelta:
    """Update scale·B·A of one tensor by an adapter, by reference; never formed for its spectrum."""

    name: str
    base: Checkpoint
    tuned: Adapter
    update: LowRankUpdate

    @property
    def base_info(self) -> TensorInfo:
        """What is stored on the base's side."""
        return self.base.info(self.update.name)

    @property
    def tuned_info(self) -> TensorInfo:
        """What is stored of factor A."""
        return self.tuned.info(self.update.a)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the update as a matrix."""
        return matrix_shape(self.base_info.shape)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (rows, r) and A (r, cols) in their stored dtype, oriented as the base is."""
        return self.tuned.factors(self.update)

    def difference(self) -> Difference:
        """Norms, rounding and merge loss, the update formed a block of rows at a time; `matrix` is (B, 0)-shaped.

        The base is read once for its norm and for what merging into its dtype would lose.
        """
        b, a = (factor.double() for factor in self.factors())
        b = b * self.update.scale
        stored = self.base[self.update.name]
        base = _matrix(stored)
        energy, base_energy, lost, zeros = [], [], [], 0
        for w, rows in zip(row_blocks(base), torch.split(b, row_blocks(base)[0].shape[0]), strict=True):
            delta = (rows @ a).to(torch.float32 if w.dtype != torch.float64 else torch.float64)
            wide = w.to(delta.dtype)
            merged = wide + delta
            energy.append(float(delta.to(torch.float64, copy=True).square_().sum()))
            base_energy.append(float(wide.to(torch.float64, copy=True).square_().sum()))
            exact = wide.double() + delta.double()
            lost.append(float((merged.to(w.dtype).double() - exact).square_().sum()))
            zeros += delta.numel() - int(torch.count_nonzero(delta))
        norm = math.sqrt(math.fsum(energy))
        if not math.isfinite(norm):
            raise NonFiniteMatrix(f"{self.name}: NaN or infinite entries in the factors or in base")
        return Difference(
            torch.empty(0, 0),
            norm,
            math.sqrt(math.fsum(base_energy)),
            self._floor(b, a),
            zeros / base.numel(),
            merge_loss=math.sqrt(math.fsum(lost)) / norm if norm > 0 else math.nan,
        )

    def _floor(self, b: torch.Tensor, a: torch.Tensor) -> StorageFloor:
        """Rounding of the stored factors: E = δB·A + B·δA to first order."""
        b_dtype, a_dtype = self.tuned.info(self.update.b).dtype, self.tuned.info(self.update.a).dtype
        noise_b, noise_a = _rounding_variance(b, b_dtype), _rounding_variance(a, a_dtype)
        floor_b = storage_floor(noise_b.sum(1).numpy(), noise_b.sum(0).numpy())
        floor_a = storage_floor(noise_a.sum(1).numpy(), noise_a.sum(0).numpy())
        norm_b, norm_a = (float(torch.linalg.matrix_norm(factor, 2)) for factor in (b, a))
        energy = float((noise_b.sum(0) * a.square().sum(1)).sum() + (noise_a.sum(1) * b.square().sum(0)).sum())
        return StorageFloor(floor_b.spectral * norm_a + norm_b * floor_a.spectral, math.sqrt(energy))

    def dense(self) -> torch.Tensor:
        """Form the update, (rows, cols), float32."""
        b, a = (factor.double() for factor in self.factors())
        return ((b * self.update.scale) @ a).float()

    def spectrum(self, *, rank: int | None = None, route: RouteChoice = "auto", seed: int = 0) -> Spectrum:
        """All singular values, exactly, from the factors; `rank`, `route` and `seed` change nothing."""
        b, a = self.factors()
        floor = self._floor(b.double() * self.update.scale, a.double())
        found = product_spectrum(b, a, scale=self.update.scale, name=self.name)
        return replace(found, certificate=replace(found.certificate, storage_floor=floor.spectral))


@dataclass(frozen=True)
class AdapterDelta:
    """Update of one tensor by an adapter that is not low rank (DoRA, a shifted bias), by reference."""

    name: str
    base: Checkpoint
    tuned: Adapter
    update: Update

    @property
    def base_info(self) -> TensorInfo:
        """What is stored on the base's side."""
        return self.base.info(self.update.name)

    @property
    def tuned_info(self) -> TensorInfo:
        """What is stored of the adapter's first tensor for this update."""
        source = self.update.source if isinstance(self.update, ShiftUpdate | ReplacementUpdate) else self.update.a
        return self.tuned.info(source)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the update as a matrix."""
        return matrix_shape(self.base_info.shape)

    def difference(self) -> Difference:
        """Form the update and sum its norms; the adapter's own rounding is far below, only the base's dtype counts."""
        base = self.base[self.update.name]
        delta = _matrix(self.tuned.delta(self.update, base))
        wide = _matrix(base).to(delta.dtype)
        found = difference(wide, wide + delta, self.base_info.dtype, "", name=self.name)
        exact = math.sqrt(math.fsum(float(rows.double().square().sum()) for rows in row_blocks(delta)))
        return replace(found, matrix=delta, frobenius=exact, floor=StorageFloor(0.0, 0.0))

    def dense(self) -> torch.Tensor:
        """Give the update itself."""
        return self.difference().matrix

    def spectrum(self, *, rank: int | None = None, route: RouteChoice = "auto", seed: int = 0) -> Spectrum:
        """Singular values of the update."""
        return self.difference().spectrum(rank=rank, route=route, seed=seed)


AnyDelta = Delta | LowRankDelta | AdapterDelta


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) of a tensor read as a matrix: kernels are (out, rest), vectors (n, 1), scalars (1, 1)."""
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(matrix_shape(tuple(tensor.shape)))


def _steps(view: str, side: str) -> Iterator[tuple[str, int]]:
    """Steps of a view that act on one side: ("expert", i), ("transpose", 0), ("rows", n)."""
    for step in filter(None, view.split("|")):
        kind, *rest = step.split(":")
        if kind == "expert" and rest[1] in (side, "both"):
            yield "expert", int(rest[0])
        elif kind == "transpose_tuned" and side == "tuned":
            yield "transpose", 0
        elif kind == "rows":
            yield "rows", int(rest[0])


def _viewed(tensor: torch.Tensor, view: str, side: str) -> torch.Tensor:
    for kind, number in _steps(view, side):
        tensor = {"expert": lambda t, n: t[n], "transpose": lambda t, _: t.T, "rows": lambda t, n: t[:n]}[kind](
            tensor, number
        )
    return tensor


def viewed_shape(shape: tuple[int, ...], view: str, side: str) -> tuple[int, ...]:
    """Shape of what a view takes of a stored tensor."""
    for kind, number in _steps(view, side):
        shape = {"expert": shape[1:], "transpose": shape[::-1], "rows": (number, *shape[1:])}[kind]
    return shape


def pair_checkpoints(base: Checkpoint, tuned: Checkpoint | Adapter) -> tuple[Pairing, dict[str, AnyDelta]]:
    """Pair two checkpoints, or a checkpoint and an adapter of it.

    Returns
    -------
    pairing : Pairing
        Every tensor of both, with its status.
    found : dict of str to delta
        The pairs that can be subtracted, by name.
    """
    if isinstance(tuned, Adapter):
        return _pair_adapter(base, tuned)
    pairing = pair_names(
        dict(base.infos()), dict(tuned.infos()), base_aliases=base.aliases, tuned_aliases=tuned.aliases
    )
    found: dict[str, AnyDelta] = {
        pair.name: Delta(pair.name, base, tuned, pair.base, pair.tuned, pair.view)
        for pair in pairing.pairs
        if pair.status == "ok" and pair.base is not None and pair.tuned is not None
    }
    return pairing, found


def _pair_adapter(base: Checkpoint, tuned: Adapter) -> tuple[Pairing, dict[str, AnyDelta]]:
    """Pair an adapter's updates with the tensors they act on; the rest of the base is left as it is."""
    updates = tuned.updates(base.infos())
    pairs: list[Pair] = []
    found: dict[str, AnyDelta] = {}
    by_name = {update.name: update for update in updates}
    for name in base:
        update = by_name.get(name)
        if update is None:
            pairs.append(Pair(name, name, None, "unchanged", "the adapter leaves it as it is", ""))
            continue
        pairs.append(Pair(name, name, name, "ok", "", ""))
        if isinstance(update, LowRankUpdate):
            found[name] = LowRankDelta(name, base, tuned, update)
        elif isinstance(update, ReplacementUpdate):
            found[name] = Delta(name, base, tuned, name, update.source)
        else:
            found[name] = AdapterDelta(name, base, tuned, update)
    new = [update for update in updates if update.name not in base]
    pairs += [
        Pair(update.name, None, update.name, "tuned_only", "no tensor of that name in base", "") for update in new
    ]
    matched = len(found)
    return Pairing(tuple(pairs), (), matched, matched + len(new), matched / max(1, matched + len(new))), found


def deltas(
    base: Any,
    tuned: Any,
    *,
    include: str | None = None,
    exclude: str | None = None,
    trust_pickle: bool = False,
    offline: bool = False,
) -> Iterator[AnyDelta]:
    """Updates of every matrix that two checkpoints share, in the base's stored order, nothing read yet.

    Parameters
    ----------
    base, tuned : path, hub id, Checkpoint or Adapter
    include, exclude : str, optional
        Regular expressions searched in the canonical name.
    trust_pickle, offline : bool
        As in `spectra.open_checkpoint`.

    Yields
    ------
    Delta, LowRankDelta or AdapterDelta
        Each with ``name``, ``shape``, ``dense()`` and ``spectrum()``.

    Raises
    ------
    CheckpointError, MismatchError
        If a checkpoint cannot be opened or names collide.
    UsageError
        If the base is an adapter or an expression is malformed.
    """
    options = {"trust_pickle": trust_pickle, "offline": offline}
    opened_base, opened_tuned = opened(base, **options), opened(tuned, **options)
    wanted = name_filter(include, exclude)
    _, found = pair_checkpoints(as_base(opened_base), opened_tuned)
    for delta in found.values():
        if min(delta.shape) > 1 and wanted(delta.name) and is_float(delta.base_info.dtype):
            yield delta


def opened(ref: Any, **options: Any) -> Checkpoint | Adapter:
    """Give the checkpoint itself, or open what names one."""
    return ref if isinstance(ref, Checkpoint | Adapter) else open_checkpoint(ref, **options)


def as_base(checkpoint: Checkpoint | Adapter) -> Checkpoint:
    """Refuse an adapter as the base of a comparison."""
    if isinstance(checkpoint, Adapter):
        raise UsageError(
            f"{checkpoint.ref} is an adapter: it holds an update, not a model. Give the model it was trained on first "
            f"(its adapter_config.json names {checkpoint.config.base_model_name_or_path!r}), then the adapter"
        )
    return checkpoint


def is_float(dtype: str) -> bool:
    """Whether a stored dtype is a real floating type that can be subtracted exactly after upcasting."""
    return dtype in FRACTION_BITS


def name_filter(include: str | None, exclude: str | None) -> Callable[[str], bool]:
    """Predicate on names from two regular expressions."""
    try:
        wanted = re.compile(include) if include else None
        unwanted = re.compile(exclude) if exclude else None
    except re.error as error:
        raise UsageError(f"not a regular expression: {error.pattern!r}: {error}") from error

    def keep(name: str) -> bool:
        return (wanted is None or wanted.search(name) is not None) and (
            unwanted is None or unwanted.search(name) is None
        )

    return keep
