"""The update of one tensor by reference: `Delta` of two stored tensors, `LowRankDelta` of an adapter's factors.

Deltas hold (checkpoint, name), never matrices, so that they are cheap to list and to send; all upcast before they
subtract or multiply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from spectra.checkpoints import Adapter, Checkpoint, TensorInfo, open_checkpoint
from spectra.checkpoints.adapter import (
    DoraUpdate,
    LowRankUpdate,
    RebasedUpdate,
    ReplacementUpdate,
    RescaleUpdate,
    ShiftUpdate,
)
from spectra.checkpoints.names import Pair, Pairing, pair_names
from spectra.difference import Difference, RouteChoice, difference, rounding_variance
from spectra.errors import MatrixError, NonFiniteMatrix, UsageError
from spectra.linalg.factored import product_spectrum
from spectra.linalg.matrix import row_blocks, sum_of_squares
from spectra.theory.noise import FRACTION_BITS, StorageFloor, storage_floor
from spectra.values import Spectrum


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

    def weights(self) -> torch.Tensor:
        """Read W, (rows, cols), in its stored dtype, as the update sees it."""
        return as_rows(viewed(self.base[self.base_name], self.view, "base"))

    def tuned_weights(self) -> torch.Tensor:
        """Read the tuned matrix, (rows, cols), in its stored dtype, as the update sees it."""
        return as_rows(viewed(self.tuned[self.tuned_name], self.view, "tuned"))

    def difference(self) -> Difference:
        """Read both tensors and subtract."""
        return self.between(self.weights(), self.tuned_weights())

    def between(self, base: torch.Tensor, tuned: torch.Tensor) -> Difference:
        """Subtract matrices that have been read."""
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
    """Update scale·B·A (AdaLoRA: scale·B·diag(E)·A) of one tensor by an adapter, by reference.

    It is never formed for its spectrum.
    """

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

    def weights(self) -> torch.Tensor:
        """Read W, (rows, cols), in its stored dtype."""
        return as_rows(self.base[self.update.name])

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (rows, r) and A (r, cols) in their stored dtype, oriented as the base is; of AdaLoRA E is folded in."""
        return self.tuned.factors(self.update)

    def difference(self) -> Difference:
        """Norms, rounding and merge loss, the update formed a block of rows at a time; `matrix` is (B, 0)-shaped.

        The base is read once for its norm and for what merging into its dtype would lose.
        """
        return self.beside(self.weights())

    def beside(self, base: torch.Tensor) -> Difference:
        """`difference` where the base has been read."""
        b, a = (factor.double() for factor in self.factors())
        b = b * self.update.scale
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
        """Rounding of the stored factors: δB·A + B·δA to first order, and that of AdaLoRA's diagonal."""
        b_dtype, a_dtype = self.tuned.info(self.update.b).dtype, self.tuned.info(self.update.a).dtype
        noise_b, noise_a = rounding_variance(b, b_dtype), rounding_variance(a, a_dtype)
        if self.update.e is not None:
            e = self.tuned[self.update.e].double().flatten()
            relative = rounding_variance(e, self.tuned.info(self.update.e).dtype) / e.square().clamp_min(1e-300)
            if self.update.transposed:  # the factor that E is folded into stands on the left
                noise_b = noise_b + b.square() * relative
            else:
                noise_a = noise_a + a.square() * relative[:, None]
        floor_b = storage_floor(noise_b.sum(1).numpy(), noise_b.sum(0).numpy())
        floor_a = storage_floor(noise_a.sum(1).numpy(), noise_a.sum(0).numpy())
        norm_b, norm_a = (float(torch.linalg.matrix_norm(factor, 2)) for factor in (b, a))
        energy = float((noise_b.sum(0) * a.square().sum(1)).sum() + (noise_a.sum(1) * b.square().sum(0)).sum())
        return StorageFloor(floor_b.spectral * norm_a + norm_b * floor_a.spectral, math.sqrt(energy))

    def dense(self) -> torch.Tensor:
        """Form the update, (rows, cols), float32."""
        b, a = (factor.double() for factor in self.factors())
        return ((b * self.update.scale) @ a).float()

    def spectrum(
        self, *, rank: int | None = None, route: RouteChoice = "auto", seed: int = 0, vectors: bool = False
    ) -> Spectrum:
        """All singular values, exactly, from the factors; `rank`, `route` and `seed` change nothing.

        With `vectors` those of the factors' rank alone, and their vectors.
        """
        b, a = self.factors()
        floor = self._floor(b.double() * self.update.scale, a.double())
        found = product_spectrum(b, a, scale=self.update.scale, vectors=vectors, name=self.name)
        return replace(found, certificate=replace(found.certificate, storage_floor=floor.spectral))


@dataclass(frozen=True)
class AdapterDelta:
    """Update of one tensor by an adapter that is not low rank (DoRA, IA3, a shifted bias), by reference."""

    name: str
    base: Checkpoint
    tuned: Adapter
    update: DoraUpdate | ShiftUpdate | RescaleUpdate | RebasedUpdate

    @property
    def base_info(self) -> TensorInfo:
        """What is stored on the base's side."""
        return self.base.info(self.update.name)

    @property
    def tuned_info(self) -> TensorInfo:
        """What is stored of the adapter's first tensor for this update."""
        source = self.update.a if isinstance(self.update, DoraUpdate) else self.update.source
        return self.tuned.info(source)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the update as a matrix."""
        return matrix_shape(self.base_info.shape)

    def weights(self) -> torch.Tensor:
        """Read W, (rows, cols), in its stored dtype."""
        return as_rows(self.base[self.update.name])

    def difference(self) -> Difference:
        """Form the update and sum its norms. It is exact to float32: only the base's norm knows of stored rounding."""
        base = self.base[self.update.name]
        delta = self.tuned.delta(self.update, base)
        wide = as_rows(base)[: len(delta)].to(delta.dtype)
        found = difference(torch.zeros_like(wide), as_rows(delta), "", "", name=self.name)
        return replace(found, base_frobenius=math.sqrt(sum_of_squares(wide)))

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


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Read a tensor as a matrix, without copying where it is contiguous."""
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


def viewed(tensor: torch.Tensor, view: str, side: str) -> torch.Tensor:
    """What a view takes of one side's stored tensor."""
    for kind, number in _steps(view, side):
        tensor = tensor[number] if kind == "expert" else tensor.T if kind == "transpose" else tensor[:number]
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
            # Two tensors of one name: resized or transposed ones are told apart as in any two checkpoints.
            (pairs[-1],) = pair_names({name: base.info(name)}, {name: tuned.info(update.source)}).pairs
            if pairs[-1].status == "ok":
                found[name] = Delta(name, base, tuned, name, update.source, pairs[-1].view)
        else:
            found[name] = AdapterDelta(name, base, tuned, update)
    new = [update for update in updates if update.name not in base]
    pairs += [
        Pair(update.name, None, update.name, "tuned_only", "no tensor of that name in base", "") for update in new
    ]
    # A module saved whole that the base lacks is new on purpose, a classifier's head for instance; any other tensor
    # that finds no place in the base says that the adapter is another model's.
    matched = len(found)
    total = matched + sum(not isinstance(update, ReplacementUpdate) for update in new)
    return Pairing(tuple(pairs), (), matched, total, matched / max(1, total)), found


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
            f"{checkpoint.ref} is an adapter: it holds an update, not a model. Give the model it was trained on first"
            + (
                f" (its adapter_config.json names {checkpoint.config.base_model!r})"
                if checkpoint.config.base_model
                else ""
            )
            + ", then the adapter"
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
