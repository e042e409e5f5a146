"""Where a run computes: accelerate's view of devices and processes, and what a model is lent for the time of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.train.config import TrainConfig

_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(config: TrainConfig) -> Any:
    """An `accelerate.Accelerator` for the configured device and precision.

    Raises
    ------
    UsageError
        If accelerate is missing, the precision does not go with the device, or the launch shards parameters.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UsageError("training needs accelerate: pip install 'spectra-weights[train]'") from error
    # accelerate keeps one state a process and refuses another precision or device than the first Accelerator's; runs
    # that follow each other, in a notebook for instance, may differ. Processes launched together keep their group.
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    named = _named(config)
    cpu = named.type == "cpu" if named is not None else not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(mixed_precision=_MIXED[config.precision], cpu=cpu)
    except ValueError as error:
        raise UsageError(f"precision = {config.precision!r}: {error}") from error
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UsageError(
            f"{accelerator.distributed_type.value} shards parameters, which checkpoints here do not gather; launch "
            "with --multi_gpu or --multi_cpu"
        )
    accelerator.gradient_accumulation_steps = 1  # the loop weighs its losses itself, whatever the launcher was told
    return accelerator


def device_for(config: TrainConfig, accelerator: Any) -> torch.device:
    """The device that this process trains on.

    Raises
    ------
    UsageError
        If it is not here, or float16 is asked of a CPU.
    """
    named = _named(config)
    device: torch.device = accelerator.device if named is None or accelerator.num_processes > 1 else named
    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError('precision = "fp16" needs a GPU; on the CPU use "bf16" or "fp32"')
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device = {str(device)!r} is not here: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def recomputed_activations(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing for the time of a block, as transformers' models offer it.

    Raises
    ------
    UsageError
        If the model offers none.
    """
    if not wanted or any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"{type(model).__name__} offers no gradient checkpointing (transformers' models do): train without it"
        )
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in version 5
    # The re-entrant sort would need an input that requires gradients, and frozen embeddings give none.
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


@contextmanager
def shared_between_processes(model: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
    """The model whose gradients processes share, for the time of a block; the bare model where there is one process."""
    if accelerator.num_processes == 1:
        yield model
        return
    shared = accelerator.prepare_model(model, device_placement=False)
    try:
        yield shared
    finally:
        accelerator.unwrap_model(shared, keep_fp32_wrapper=False)


def _named(config: TrainConfig) -> torch.device | None:
    try:
        return None if config.device is None else torch.device(config.device)
    except RuntimeError as error:
        raise UsageError(f"device = {config.device!r}: {str(error).splitlines()[0]}") from error
