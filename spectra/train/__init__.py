"""A small trainer that makes the models to compare: one readable loop, data, and the command."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Step": "loop",
    "TrainConfig": "config",
    "train": "loop",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectra.train' has no attribute {name!r}")
    return getattr(import_module(f"spectra.train.{_HOME[name]}"), name)
