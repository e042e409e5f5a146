"""Checkpoints as lazy, picklable mappings from tensor name to tensor, one format a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectra.checkpoints.checkpoint import Checkpoint, TensorInfo
from spectra.checkpoints.digests import FileDigest
from spectra.checkpoints.opening import open_checkpoint

if TYPE_CHECKING:
    from spectra.checkpoints.adapter import Adapter

__all__ = ["Adapter", "Checkpoint", "FileDigest", "TensorInfo", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name == "Adapter":
        from spectra.checkpoints.adapter import Adapter

        return Adapter
    raise AttributeError(name)
