"""Checkpoints as lazy, picklable mappings from tensor name to tensor, one format a file."""

from __future__ import annotations

from spectra.checkpoints.adapter import Adapter
from spectra.checkpoints.checkpoint import Checkpoint, TensorInfo
from spectra.checkpoints.digests import FileDigest
from spectra.checkpoints.opening import open_checkpoint
from spectra.checkpoints.quantization import Quantization

__all__ = ["Adapter", "Checkpoint", "FileDigest", "Quantization", "TensorInfo", "open_checkpoint"]
