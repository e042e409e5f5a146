"""Second moments R = E[xxᵀ] of what linear maps read: taken from a model and batches, saved, and opened again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from spectra.errors import CheckpointNotFound, NonFiniteMatrix, UnsafeCheckpoint, UsageError

_RECORD = "spectra.moments"
# Products of float32 may differ so much from their transposes, as shares of the largest.
_ASYMMETRY = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the inputs of one linear map.

    Parameters
    ----------
    total : Tensor of shape (k, k), float64
        Σ xxᵀ.
    count : int
        Inputs that were summed.

    Raises
    ------
    UsageError
        If the matrix is not square or not symmetric, or nothing was counted.
    NonFiniteMatrix
        If it holds NaN or infinity.

    Examples
    --------
    >>> Moments(torch.tensor([[8.0, 0.0], [0.0, 2.0]]), 2).matrix.tolist()
    [[4.0, 0.0], [0.0, 1.0]]
    """

    total: torch.Tensor
    count: int

    def __post_init__(self) -> None:
        total = torch.as_tensor(self.total).detach().to("cpu", torch.float64)
        if total.ndim != 2 or total.shape[0] != total.shape[1] or self.count < 1:
            raise UsageError(
                f"moments are a square matrix summed over inputs, not {tuple(total.shape)} of {self.count}"
            )
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteMatrix("the second moments hold NaN or infinity: some input of the map does")
        if not torch.allclose(total, total.T, rtol=0.0, atol=_ASYMMETRY * float(total.abs().max())):
            raise UsageError("second moments are symmetric, and this matrix is not")
        object.__setattr__(self, "total", (total + total.T) / 2.0)

    @property
    def matrix(self) -> torch.Tensor:
        """R = E[xxᵀ], (k, k), float64."""
        return self.total / self.count

    @cached_property
    def root(self) -> torch.Tensor:
        """S of shape (k, rank of R), float64, with SSᵀ = R, its columns orthogonal."""
        values, vectors = torch.linalg.eigh(self.matrix)
        # What eigh itself rounds 0 to. Not more: rounding of the sums scales with each entry, and inputs a thousandth
        # as large as the largest are common and matter.
        seen = values > len(values) * torch.finfo(torch.float64).eps * float(values[-1].clamp(min=0.0))
        root: torch.Tensor = vectors[:, seen] * values[seen].sqrt()
        return root


def second_moments(
    model: nn.Module,
    batches: Iterable[Any],
    modules: str | Iterable[str],
    *,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Moments]:
    """Second moments of what linear maps read, over batches that the model is run on.

    Products are of float32 (float64 where the inputs are), sums in float64. The model runs in evaluation mode, without
    gradients, and is left as it was. Where a batch brings an ``attention_mask``, padded places are left out.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of mapping, tuple or Tensor
        What the model is called with: ``model(**batch)``, ``model(*batch)`` or ``model(batch)``. Tensors are moved to
        the device of the model.
    modules : str or iterable of str
        Names of linear maps, or one regular expression searched for in the names of all.
    progress : callable, optional
        Called with the number of batches done.

    Returns
    -------
    dict of str to Moments
        By name, in the model's order. k² float64 entries each.

    Raises
    ------
    UsageError
        If there are no batches or no such modules, or one does not read vectors: an embedding, a convolution.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> inputs = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    >>> found = second_moments(model, [inputs], "0")["0"]
    >>> found.count, found.matrix.tolist()
    (2, [[5.0, 1.0], [1.0, 2.0]])
    """
    chosen = _chosen(model, modules)
    running = _Running({})
    handles = [
        module.register_forward_pre_hook(running.hook(name), with_kwargs=True) for name, module in chosen.items()
    ]
    mode = model.training
    model.eval()
    done = 0
    try:
        with torch.no_grad():
            for done, batch in enumerate(batches, 1):
                running.run(model, batch)
                if progress is not None:
                    progress(done)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    if not done:
        raise UsageError("no batches were given: there is nothing to take moments of")
    silent = [name for name in chosen if name not in running.sums]
    if silent:
        raise UsageError(f"the model never called {', '.join(silent[:5])} on these batches; leave them out")
    return {name: Moments(*running.sums[name]) for name in chosen}


def _chosen(model: nn.Module, modules: str | Iterable[str]) -> dict[str, nn.Module]:
    known = {name: module for name, module in model.named_modules() if name}
    if isinstance(modules, str):
        try:
            pattern = re.compile(modules)
        except re.error as error:
            raise UsageError(f"modules = {modules!r} is no regular expression: {error}") from None
        # Maps have a matrix of their own; blocks that hold such maps do not.
        found = {
            name: module
            for name, module in known.items()
            if pattern.search(name) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        }
        if not found:
            raise UsageError(f"modules = {modules!r} is found in no name of a module with a weight matrix")
        return found
    names = set(modules)
    if not names <= known.keys():
        raise UsageError(f"the model has no module {', '.join(sorted(names - known.keys())[:5])}")
    if not names:
        raise UsageError("modules names none")
    return {name: module for name, module in known.items() if name in names}


@dataclass
class _Running:
    """Sums so far by name, and what the batch at hand shares: its mask, and the product of the last input."""

    sums: dict[str, tuple[torch.Tensor, int]]
    mask: torch.Tensor | None = None
    last: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def run(self, model: nn.Module, batch: Any) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batch = _moved(batch, device)
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        try:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
        finally:
            self.mask = self.last = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            # Queries, keys and values read one tensor: its product is taken once.
            if self.last is None or self.last[0] is not inputs:
                self.last = (inputs, *self.product(name, module, inputs))
            _, product, count = self.last
            total, before = self.sums.get(name, (torch.zeros_like(product), 0))
            self.sums[name] = (total.add_(product), before + count)

        return add

    def product(self, name: str, module: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Σ xxᵀ of one batch, float64, and how many x."""
        weight = getattr(module, "weight", None)
        if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
            raise UsageError(f"{name} reads no vectors (an embedding?): it has no second moments")
        if weight is not None and (weight.ndim != 2 or inputs.shape[-1] not in weight.shape):
            raise UsageError(
                f"{name} has a weight of shape {tuple(weight.shape)} and reads {tuple(inputs.shape)}: it is no map of "
                "its inputs' last axis"
            )
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.mask is not None and self.mask.numel() == len(rows):
            rows = rows[self.mask.reshape(-1).bool()]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        product = rows.T @ rows
        if product.device.type == "mps":  # which has no float64
            product = product.cpu()
        return product.double(), len(rows)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(value, device) for value in batch)
    return batch


def save_moments(moments: Mapping[str, Moments], path: str | os.PathLike[str]) -> Path:
    """Write moments into one safetensors file, atomically; the same moments give the same bytes.

    Parameters
    ----------
    moments : mapping of str to Moments
    path : path
        Of the file.
    """
    target = Path(path)
    counts = json.dumps({name: found.count for name, found in sorted(moments.items())})
    content = save({name: found.total.contiguous() for name, found in moments.items()}, {_RECORD: counts})
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def load_moments(path: str | os.PathLike[str]) -> Mapping[str, Moments]:
    """Open moments that `save_moments` wrote; each is read when it is asked for, and not kept.

    Parameters
    ----------
    path : path

    Returns
    -------
    mapping of str to Moments
        By name. Memory is that of those which the caller keeps; one that is no moments raises `UnsafeCheckpoint` when
        it is read.

    Raises
    ------
    CheckpointNotFound
        If there is no such file.
    UnsafeCheckpoint
        If the file is not one of `save_moments`.
    """
    source = Path(path)
    if not source.is_file():
        raise CheckpointNotFound(f"{source} is no file; spectra.moments.save_moments writes one")
    with _said_of(source), safe_open(source, "pt") as file:
        told = json.loads((file.metadata() or {})[_RECORD])
        counts = {name: int(told[name]) for name in file.keys()}  # noqa: SIM118
        for name in counts:
            shape = file.get_slice(name).get_shape()
            if len(shape) != 2 or shape[0] != shape[1]:
                raise UsageError(f"{name} is {tuple(shape)}, and moments are square")
    return _Stored(source, counts)


@dataclass(frozen=True, eq=False)
class _Stored(Mapping[str, Moments]):
    """Moments in a file, read one at a time."""

    source: Path
    counts: Mapping[str, int]

    def __getitem__(self, name: str) -> Moments:
        count = self.counts[name]
        with _said_of(self.source), safe_open(self.source, "pt") as file:
            return Moments(file.get_tensor(name), count)

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


@contextmanager
def _said_of(source: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
        raise UnsafeCheckpoint(f"{source} does not hold moments of this program: {error!r}") from error
