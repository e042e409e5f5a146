"""A small checkpoint whose quantization errors are known for what they are, and one run over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectra.quantized import QuantizedRun, quantization

FORMATS = ("nf4", "int4", "int8")


def noise(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, torch.Tensor]:
    """Gaussian matrices of two sizes, one of rows that shrink, and what is no matrix."""
    return {
        "layer.0.query.weight": noise(192, 128, 0),
        "layer.0.query.bias": noise(1, 192, 1)[0],
        "layer.1.query.weight": 3.0 * noise(192, 128, 2),
        "layer.1.uneven.weight": torch.logspace(-2, 0, 160)[:, None] * noise(160, 128, 3),
        "position_ids": torch.arange(12).view(2, 6),
    }


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("quantized") / "model", weights())


@pytest.fixture(scope="session")
def run(model: str) -> QuantizedRun:
    return quantization(model, FORMATS, ranks=(4, 16), progress=False)
