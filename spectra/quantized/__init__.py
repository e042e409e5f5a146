"""What quantizing a whole model does to its matrices: every scheme on every matrix, as a result, a page and a command.

`quantization` streams a checkpoint through `spectra.quantize.quantization_error` one matrix at a time; ``python -m
spectra.quantize`` does so from a terminal and leaves a page.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Plan": "planning",
    "QuantizedRun": "result",
    "execute": "running",
    "plan": "planning",
    "quantization": "running",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectra.quantized' has no attribute {name!r}")
    return getattr(import_module(f"spectra.quantized.{_HOME[name]}"), name)
