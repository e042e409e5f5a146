"""A base, its full fine-tune, and two adapters: what the second found of the first is planted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.pairwise.small import SHAPES, base_tensors, update, write_checkpoint, write_lora

# A power law with a clear gap after the eighth value.
VALUES = np.concatenate([np.linspace(1.0, 0.6, 8), np.linspace(0.2, 0.05, 24)])


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Full: rank 32 in every matrix. Found: a LoRA of exactly full's leading eight. Other: a LoRA of its own."""
    folder = tmp_path_factory.mktemp("family")
    base = base_tensors()
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    found, other, deltas = {}, {}, {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        delta, u, v = update(shape, VALUES, seed=10 * i)
        tuned[name] = (base[name].double() + torch.from_numpy(delta)).float()
        deltas[name] = delta
        found[name] = (u[:, :8] * VALUES[:8], v[:, :8].T)
        if "query" in name:
            _, x, y = update(shape, np.ones(4), seed=500 + i)
            other[name] = (x * 0.5, y.T)
    tuned["encoder.layer.0.norm.weight"] = base["encoder.layer.0.norm.weight"] * 1.5
    base_folder = write_checkpoint(folder / "base", base)
    return SimpleNamespace(
        base=base_folder,
        full=write_checkpoint(folder / "full", tuned),
        found=write_lora(folder / "found", found, base=str(base_folder), rank=8),
        other=write_lora(folder / "other", other, base=str(base_folder), rank=4),
        deltas=deltas,
        tensors=base,
        tuned=tuned,
    )
