"""`evaluate`: loss, and accuracy or perplexity, of a model over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.train.config import Batch
from spectra.train.objective import on_device, reported_loss, targets


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, precision: Literal["fp32", "bf16", "fp16"] = "fp32"
) -> dict[str, float]:
    """Measure a model on held-out batches, in evaluation mode; the mode it was in is put back.

    Parameters
    ----------
    model : Module
        Returns ``loss``, and ``logits`` where accuracy is asked for, as transformers' models do.
    batches : iterable of mapping
        Each of any size. Processes started together share the work; every one returns the same figures.
    precision : {"fp32", "bf16", "fp16"}
        Of the forward pass.

    Returns
    -------
    dict
        ``loss``, the mean over all targets. For one integer label a row ``accuracy``, the share of rows whose
        largest logit is the label's; for a row of them ``perplexity`` e^loss.

    Raises
    ------
    UsageError
        If there is no batch, no labelled target, or no loss in what the model returns.

    Examples
    --------
    >>> class Half(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.logits = nn.Parameter(torch.zeros(1, 2))
    ...     def forward(self, labels):
    ...         logits = self.logits.expand(len(labels), 2)
    ...         return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
    >>> {name: round(value, 3) for name, value in evaluate(Half(), [{"labels": torch.tensor([0, 1])}]).items()}
    {'loss': 0.693, 'accuracy': 0.5}
    """
    device = next(model.parameters()).device
    rank, world = _place()
    sums = torch.zeros(4, dtype=torch.float64)  # loss · targets, targets, rows right, rows with one label
    sequences = False
    mode = model.training
    model.eval()
    try:
        for number, batch in enumerate(batches):
            sequences = sequences or _labels_of(batch).dim() > 1
            if number % world == rank:
                sums += _sums(model, on_device(batch, device), precision)
    finally:
        model.train(mode)
    loss_sum, count, right, rows = _over_processes(sums, device)
    if not count:
        raise UsageError("there is nothing to evaluate on: no batch, or none with a labelled target")
    loss = loss_sum / count
    found = {"loss": loss}
    if rows:
        found["accuracy"] = right / rows
    if sequences:
        found["perplexity"] = math.exp(min(loss, 700.0))  # e^709 is the largest a float holds
    return found


def _sums(model: nn.Module, batch: dict[str, Any], precision: str) -> torch.Tensor:
    count = targets(model, batch)
    if not count:
        return torch.zeros(4, dtype=torch.float64)
    with _autocast(next(model.parameters()).device.type, precision):
        output = model(**batch)
    sums = [float(reported_loss(output, batch)) * count, float(count), 0.0, 0.0]
    labels = _labels_of(batch)
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is not None and labels.dim() == 1 and not labels.is_floating_point():
        sums[2:] = float((logits.argmax(-1) == labels).sum()), float(len(labels))
    return torch.tensor(sums, dtype=torch.float64)


def _labels_of(batch: Batch) -> torch.Tensor:
    labels = batch.get("labels")
    return labels if isinstance(labels, torch.Tensor) else torch.zeros(())


def _autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16 if precision == "bf16" else torch.float16)


def _place() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _over_processes(sums: torch.Tensor, device: torch.device) -> list[float]:
    if _place()[1] > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    values: list[float] = sums.tolist()
    return values
