"""The loss of a model on a batch, and how many targets it is a mean over."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.train.config import Batch, Loss

# Label of a position that has no target: torch's cross entropy and transformers' models agree on it.
IGNORED = -100


def loss_of(model: nn.Module, batch: Batch, loss: Loss | None = None) -> torch.Tensor:
    """Scalar loss: the callable's, or the one that the model returns.

    Parameters
    ----------
    model : Module
        Called as ``model(**batch)`` where no `loss` is given; returns ``.loss`` or ``["loss"]``.
    batch : mapping
        On the model's device.
    loss : callable, optional
        ``loss(model, batch)``.

    Raises
    ------
    UsageError
        If the model returns no loss, or what comes is no scalar.
    """
    value = loss(model, batch) if loss is not None else reported_loss(model(**batch), batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise UsageError(f"the loss must be one number as a tensor, not {_shown(value)}")
    return value.reshape(())


def reported_loss(output: Any, batch: Batch) -> torch.Tensor:
    """The loss in a model's output, as transformers' models return it.

    Raises
    ------
    UsageError
        If there is none.
    """
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None:
        raise UsageError(
            f"the model returned no loss for a batch of {', '.join(batch)}: give it labels, or "
            "TrainConfig(loss=...), a function of model and batch"
        )
    value: torch.Tensor = found
    return value


def targets(model: nn.Module, batch: Batch) -> int:
    """Number of targets that a batch's mean loss is taken over.

    A mean of means is not the mean where batches hold different numbers of targets; weighted by these it is.

    Parameters
    ----------
    model : Module
        A causal language model predicts the next token, so that the first label of a row is no target of it.
    batch : mapping
        ``labels`` of integers count unless they are -100; without such labels every row counts.

    Examples
    --------
    >>> targets(nn.Identity(), {"labels": torch.tensor([[5, -100], [-100, 7]])})
    2
    >>> targets(nn.Identity(), {"x": torch.zeros(4, 3)})
    4
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return next((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), 1)
    shifted = labels.dim() == 2 and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return int(((labels[:, 1:] if shifted else labels) != IGNORED).sum())


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The same batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _shown(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
