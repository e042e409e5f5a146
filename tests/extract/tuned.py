"""Fine-tunes of tiny random models whose updates are known: a power law in every matrix, a shift in all else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.planted import planted


def update(rows: int, cols: int, seed: int) -> torch.Tensor:
    """σ_i = i^-1.5, no two alike, so that the best factors of a rank are unique."""
    values = np.arange(1, min(rows, cols) + 1) ** -1.5
    return torch.from_numpy(planted(0.3 * values, rows, cols, seed=seed)).float()


def tune(model: Any, *, seed: int = 1) -> Any:
    """A copy whose every parameter moved; tied ones move together."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, parameter in enumerate(tuned.parameters()):
            if parameter.ndim == 2:
                parameter.add_(update(*parameter.shape, seed=seed + 2 * i))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tuned


def save(model: Any, folder: Path) -> Path:
    """A folder as transformers leaves it."""
    model.save_pretrained(folder)
    return folder


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], config: str = "{}") -> Path:
    """A folder with these tensors and a configuration."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return folder


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """Best approximation of a rank, by LAPACK in float64."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def tail(delta: torch.Tensor, rank: int) -> float:
    """Eckart and Young's error of that approximation."""
    return float(torch.linalg.svdvals(delta.double())[rank:].norm())
