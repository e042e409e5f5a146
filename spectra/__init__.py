"""What fine-tuning did to the weights, and how few directions would have been enough.

Everything public stands in `__all__`; names load on first use, so that ``import spectra`` is as cheap as its version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectra.version import __version__

if TYPE_CHECKING:
    from spectra.advice import Advice, ModelAdvice, advise, advise_model, advise_run
    from spectra.checkpoints import open_checkpoint
    from spectra.comparison import compare, plan
    from spectra.delta import Delta, LowRankDelta, deltas
    from spectra.errors import SpectraError
    from spectra.linalg.factored import product_spectrum
    from spectra.linalg.route import spectrum
    from spectra.measures import (
        decay_exponent,
        energy_rank,
        energy_rank_bounds,
        entropy_rank,
        entropy_rank_bounds,
        entropy_rank_energy,
        entropy_rank_energy_bounds,
        nuclear_norm,
        nuclear_norm_bounds,
        numerical_rank,
        numerical_rank_bounds,
        participation_ratio,
        participation_ratio_bounds,
        rank_above,
        rank_above_bounds,
        signal_rank,
        signal_rank_bounds,
        spectral_norm,
        spectral_norm_bounds,
        stable_rank,
        stable_rank_bounds,
        truncation_error,
        truncation_error_bounds,
    )
    from spectra.pairwise.plan import geometry
    from spectra.pairwise.result import Geometry
    from spectra.run import Run
    from spectra.values import Certificate, Spectrum

_HOME = {
    "Advice": "spectra.advice",
    "ModelAdvice": "spectra.advice",
    "advise": "spectra.advice",
    "advise_model": "spectra.advice",
    "advise_run": "spectra.advice",
    "open_checkpoint": "spectra.checkpoints",
    "Geometry": "spectra.pairwise.result",
    "Run": "spectra.run",
    "geometry": "spectra.pairwise.plan",
    "compare": "spectra.comparison",
    "plan": "spectra.comparison",
    "Delta": "spectra.delta",
    "LowRankDelta": "spectra.delta",
    "deltas": "spectra.delta",
    "SpectraError": "spectra.errors",
    "product_spectrum": "spectra.linalg.factored",
    "spectrum": "spectra.linalg.route",
    "decay_exponent": "spectra.measures",
    "energy_rank": "spectra.measures",
    "energy_rank_bounds": "spectra.measures",
    "entropy_rank": "spectra.measures",
    "entropy_rank_bounds": "spectra.measures",
    "entropy_rank_energy": "spectra.measures",
    "entropy_rank_energy_bounds": "spectra.measures",
    "nuclear_norm": "spectra.measures",
    "nuclear_norm_bounds": "spectra.measures",
    "numerical_rank": "spectra.measures",
    "numerical_rank_bounds": "spectra.measures",
    "participation_ratio": "spectra.measures",
    "participation_ratio_bounds": "spectra.measures",
    "rank_above": "spectra.measures",
    "rank_above_bounds": "spectra.measures",
    "signal_rank": "spectra.measures",
    "signal_rank_bounds": "spectra.measures",
    "spectral_norm": "spectra.measures",
    "spectral_norm_bounds": "spectra.measures",
    "stable_rank": "spectra.measures",
    "stable_rank_bounds": "spectra.measures",
    "truncation_error": "spectra.measures",
    "truncation_error_bounds": "spectra.measures",
    "Certificate": "spectra.values",
    "Spectrum": "spectra.values",
}

__all__ = [
    "Advice",
    "Certificate",
    "Delta",
    "Geometry",
    "LowRankDelta",
    "ModelAdvice",
    "Run",
    "SpectraError",
    "Spectrum",
    "__version__",
    "advise",
    "advise_model",
    "advise_run",
    "compare",
    "decay_exponent",
    "deltas",
    "energy_rank",
    "energy_rank_bounds",
    "entropy_rank",
    "entropy_rank_bounds",
    "entropy_rank_energy",
    "entropy_rank_energy_bounds",
    "geometry",
    "nuclear_norm",
    "nuclear_norm_bounds",
    "numerical_rank",
    "numerical_rank_bounds",
    "open_checkpoint",
    "participation_ratio",
    "participation_ratio_bounds",
    "plan",
    "product_spectrum",
    "rank_above",
    "rank_above_bounds",
    "signal_rank",
    "signal_rank_bounds",
    "spectral_norm",
    "spectral_norm_bounds",
    "spectrum",
    "stable_rank",
    "stable_rank_bounds",
    "truncation_error",
    "truncation_error_bounds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
