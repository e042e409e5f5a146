"""The report on two or more updates of one base: build (data) → page and terminal (rendering) → files.

`write_report` is the one call a library user needs; `build_report` gives the same content as plain values.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectra.report.pairs.build import PairsData, build_report
    from spectra.report.pairs.files import write_report

__all__ = ["PairsData", "build_report", "write_report"]

_HOME = {"PairsData": "build", "build_report": "build", "write_report": "files"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
