"""Intrinsic dimension: the fewest numbers that fine-tuning must train to reach a share of its full accuracy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Ask": "trial",
    "Captured": "capture",
    "IntrinsicDimension": "result",
    "Objective": "objective",
    "SearchConfig": "config",
    "Trial": "trial",
    "captured": "capture",
    "search": "searching",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectra.intrinsic' has no attribute {name!r}")
    return getattr(import_module(f"spectra.intrinsic.{_HOME[name]}"), name)
