"""A run's checkpoint: one file that is always whole, and the fingerprint that ties it to its run.

It holds what training changes (trained parameters, running statistics, optimizer, loss scale, the method's own state)
and the number of the step. Learning rate, batches and random draws are functions of that number and need no room.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.errors import CheckpointError, MismatchError
from spectra.methods.injection import injections
from spectra.methods.subspace import NAME as SUBSPACE
from spectra.train.config import Batch, TrainConfig
from spectra.train.optimizers import trained

NAME = "checkpoint.pt"
_FORMAT = 1

# Entries of a frozen tensor that its fingerprint reads: enough to tell two models apart, and no pass over the weights.
_SAMPLES = 16


def fingerprint(model: nn.Module, config: TrainConfig, first: Batch, processes: int) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it.

    Parameters
    ----------
    model : Module
        Frozen weights are sampled, since the checkpoint leaves them out; of trained ones names and shapes count.
    config : TrainConfig
        Its decisive fields.
    first : mapping
        The first batch, which stands for the data.
    processes : int
        Processes that train, each on batches of its own.

    Returns
    -------
    dict
        Strings, numbers and None.
    """
    parameters = trained(model)
    names = hashlib.sha256(repr([(name, tuple(p.shape), str(p.dtype)) for name, p in parameters.items()]).encode())
    numbers = sum(parameter.numel() for parameter in parameters.values())
    return {
        "model": type(model).__name__,
        "method": "; ".join(repr(injection.method) for injection in injections(model)) or None,
        "trained parameters": f"{numbers:,} in {len(parameters)} tensors ({names.hexdigest()[:12]})",
        "frozen weights": _digest(_frozen(model), _SAMPLES),
        "data": _digest(((name, value) for name, value in first.items() if isinstance(value, torch.Tensor)), None),
        "processes": processes,
        **config.decisive(),
    }


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a forward pass changes: the statistics of batch normalization."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for key, buffer in module.named_buffers(recurse=False)
    }


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint beside its place and rename it into it: whatever ends the process, one whole file stands.

    Parameters
    ----------
    path : Path
        Where it goes; its folder is there.
    state : mapping
        Tensors, numbers, strings and containers of them.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as stream:
            torch.save({"format": _FORMAT, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint and see that it belongs to this run.

    Parameters
    ----------
    path : Path
        What `save_checkpoint` wrote. No code in it is run.
    expected : mapping
        `fingerprint` of this run.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or is no checkpoint.
    MismatchError
        If another run wrote it; both sides are named.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}): remove it to begin anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this trainer: remove it, or name another folder")
    written: dict[str, Any] = state["fingerprint"]
    differing = [key for key in {**written, **expected} if written.get(key) != expected.get(key)]
    if differing:
        sides = "; ".join(f"{key}: {written.get(key)!r} there, {expected.get(key)!r} here" for key in differing)
        raise MismatchError(
            f"{path} (step {state['step']}) belongs to another run. {sides}. Go on with what it was begun with, or "
            "name another folder"
        )
    return state


def _frozen(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    for name, buffer in model.named_buffers():
        # Codes of quantized weights, and where the weights of a subspace started.
        if buffer.dtype in (torch.uint8, torch.int8) or name.startswith(f"{SUBSPACE}."):
            yield name, buffer


def _digest(tensors: Iterator[tuple[str, torch.Tensor]], samples: int | None) -> str:
    """Short digest of names, shapes, dtypes and entries: all, or at least so many evenly spaced ones."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        entries = tensor.detach().flatten()
        sample = entries[:: max(1, len(entries) // samples) if samples else 1].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
