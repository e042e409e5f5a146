"""`TrainConfig`: what `spectra.train.train` is to do, checked when it is made; `Batches`: what it is fed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import nn

from spectra.errors import UsageError

Batch: TypeAlias = Mapping[str, Any]
"""Keyword arguments of the model's forward pass: tensors by name, ``labels`` among them."""

Loss: TypeAlias = Callable[[nn.Module, Batch], torch.Tensor]
"""A scalar loss of a model on a batch, a mean over its labelled targets."""


class IndexedBatches(Protocol):
    """Batches by number: ``batches[n]`` answers every n ≥ 0, always with the same batch."""

    def __getitem__(self, index: int, /) -> Batch: ...


Batches: TypeAlias = IndexedBatches | Callable[[int], Batch]
"""A list or tuple of batches (taken round and round), an `IndexedBatches`, or a function of the batch's number."""

_CHOICES = {
    "optimizer": ("adamw", "sgd", "paged_adamw"),
    "schedule": ("linear", "cosine", "constant"),
    "precision": ("fp32", "bf16", "fp16"),
}
# Fields that change how a run is watched or where it stands, and not one of its losses.
_OUTWARD = ("device", "evaluate_every", "save_every", "record_importance", "out", "resume", "progress", "loss")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes
    ----------
    steps : int
        Updates of the parameters in all, those before a resumption included.
    learning_rate : float
        At the top of the schedule.
    optimizer : {"adamw", "sgd", "paged_adamw"}
        ``"paged_adamw"`` keeps its states in memory that CUDA pages out, through bitsandbytes; it needs CUDA.
    weight_decay : float
        Decoupled decay of matrices; biases, norms and other vectors are left alone.
    momentum : float
        Of ``"sgd"``.
    warmup : float
        Share of the steps over which the learning rate rises from 0.
    schedule : {"linear", "cosine", "constant"}
        What follows the warm-up: down to 0 in a line or half a cosine, or level.
    accumulation : int
        Batches an update, on each process.
    clip : float or None
        Largest norm of the gradient of all trained parameters; None leaves it as it is.
    precision : {"fp32", "bf16", "fp16"}
        Of the forward pass; parameters and optimizer keep the dtype they have.
    gradient_checkpointing : bool
        Recompute activations in the backward pass in place of keeping them (transformers models).
    seed : int
        Of dropout and whatever else draws from torch's generators within a step.
    device : str or None
        ``"cpu"``, ``"cuda"``, …; the best there is when None.
    evaluate_every : int or None
        Steps between evaluations; None evaluates after the last step only.
    save_every : int or None
        Steps between checkpoints, the last step's included; None writes one only when the run is interrupted.
    record_importance : int or None
        Steps from one record of every direction's importance to the next, the last step's included, in
        ``importance.parquet``; None records none. See `spectra.train.recorder`.
    out : Path or None
        Folder of ``metrics.jsonl`` and ``checkpoint.pt``; None writes nothing.
    resume : bool
        Go on from the checkpoint in `out`, if there is one.
    loss : callable or None
        ``loss(model, batch)``; None asks the model itself, as transformers' models answer with ``.loss``.
    progress : bool
        Show a bar where training takes more than two seconds.

    Raises
    ------
    UsageError
        If a field is out of its range.

    Examples
    --------
    >>> TrainConfig(steps=100, warmup=0.1).warmup_steps
    10
    >>> TrainConfig(schedule="polynomial")
    Traceback (most recent call last):
        ...
    spectra.errors.UsageError: schedule = 'polynomial' is none of linear, cosine, constant
    """

    steps: int = 200
    learning_rate: float = 1e-3
    optimizer: Literal["adamw", "sgd", "paged_adamw"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    accumulation: int = 1
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    record_importance: int | None = None
    out: Path | None = None
    resume: bool = False
    loss: Loss | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} = {getattr(self, name)!r} is none of {', '.join(choices)}")
        for name in ("steps", "accumulation", "evaluate_every", "save_every", "record_importance"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} = {value!r} must be an integer of at least 1")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed = {self.seed!r} must be an integer of at least 0")
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("momentum", 0.0, 1.0),
            ("warmup", 0.0, 1.0),
        ):
            if not low <= getattr(self, name) <= high or math.isinf(getattr(self, name)):
                raise UsageError(f"{name} = {getattr(self, name)!r} must lie between {low:g} and {high:g}")
        if self.clip is not None and not self.clip > 0.0:
            raise UsageError(f"clip = {self.clip!r} must be above 0; None leaves gradients as they are")
        if self.resume and self.out is None:
            raise UsageError("resume = True needs out, the folder whose checkpoint the run is to go on from")
        if self.save_every is not None and self.out is None:
            raise UsageError(f"save_every = {self.save_every} needs out, a folder to write checkpoints to")
        if self.record_importance is not None and self.out is None:
            raise UsageError(f"record_importance = {self.record_importance} needs out, a folder to write the record to")
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return round(self.warmup * self.steps)

    def learning_rate_at(self, index: int) -> float:
        """Learning rate of the update after `index` others, groups' own factors aside.

        Examples
        --------
        >>> config = TrainConfig(steps=10, learning_rate=1.0, warmup=0.2)
        >>> [config.learning_rate_at(index) for index in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
        """
        rising = self.warmup_steps
        if index < rising:
            return self.learning_rate * (index + 1) / rising
        left = (self.steps - index) / max(1, self.steps - rising)  # 1 at the first step after the warm-up
        if self.schedule == "linear":
            return self.learning_rate * left
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1.0 - math.cos(math.pi * left))
        return self.learning_rate

    def decisive(self) -> dict[str, Any]:
        """Fields that decide a run's losses, as JSON takes them; where, and how it is watched, is left out."""
        record = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OUTWARD}
        record["loss"] = None if self.loss is None else getattr(self.loss, "__qualname__", type(self.loss).__name__)
        return record
