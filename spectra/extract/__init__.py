"""From a fine-tune to a PEFT adapter on disk: the best factors of given ranks, with every error measured.

`extract` is the one call a library user needs. All is loaded on first use, so that ``python -m spectra.extract --help``
does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectra.extract.extraction import Extraction, execute, extract
    from spectra.extract.planning import Plan, plan

__all__ = ["Extraction", "Plan", "execute", "extract", "plan"]

_HOME = {
    "Extraction": "extraction",
    "Plan": "planning",
    "execute": "extraction",
    "extract": "extraction",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
