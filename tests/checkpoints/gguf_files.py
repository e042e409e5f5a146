"""GGUF files for the tests, written by the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectra.checkpoints import Checkpoint, open_checkpoint

gguf = pytest.importorskip("gguf")

TYPES = gguf.GGMLQuantizationType
LLAMA = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}


def opened(ref: Path) -> Checkpoint:
    checkpoint = open_checkpoint(ref)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def write(
    path: Path,
    tensors: dict[str, Any],
    *,
    architecture: str = "example",
    metadata: dict[str, int] | None = None,
    more: Callable[[Any], object] = lambda writer: None,
    endianess: Any = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write arrays, or pairs of bytes and their type."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    more(writer)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
