"""Fine-tuning methods, one file each, and `inject`, which puts one into any torch model."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AdaLoRA": "adalora",
    "FullFineTune": "full",
    "GLoRA": "glora",
    "Houlsby": "houlsby",
    "IA3": "ia3",
    "Injection": "injection",
    "LoRA": "lora",
    "Prefix": "prefix",
    "Prompt": "prompt",
    "QLoRA": "qlora",
    "Subspace": "subspace",
    "inject": "injection",
    "injections": "injection",
    "load_adapter": "folder",
    "save_adapter": "folder",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectra.methods' has no attribute {name!r}")
    return getattr(import_module(f"spectra.methods.{_HOME[name]}"), name)
