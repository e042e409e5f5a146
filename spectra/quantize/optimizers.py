"""Optimizers whose states live in memory that CUDA moves to the host when a batch needs the room."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spectra.errors import UsageError
from spectra.quantize.kernels import installed


def paged_adamw(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bits: int = 32,
) -> torch.optim.Optimizer:
    """AdamW with paged states on CUDA, through bitsandbytes; torch's own where there is no device memory to page.

    Parameters
    ----------
    parameters : iterable of Parameter, or of parameter groups
        As any torch optimizer takes them.
    learning_rate, betas, eps, weight_decay
        As torch's AdamW.
    bits : {32, 8}
        Of the states on CUDA.

    Returns
    -------
    Optimizer

    Raises
    ------
    UsageError
        If the parameters are on CUDA and bitsandbytes is not installed, or bits is neither 32 nor 8.

    References
    ----------
    .. [1] T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3.
    """
    if bits not in (8, 32):
        raise UsageError(f"paged states have 32 or 8 bits, not {bits}")
    groups: list[Any] = list(parameters)
    flat = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    if not any(p.is_cuda for p in flat):
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
    if not installed():
        raise UsageError("paged optimizer states need bitsandbytes: pip install bitsandbytes, or take plain adamw")
    from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit

    kind = PagedAdamW32bit if bits == 32 else PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
    return optimizer
