"""How many directions: what every criterion says of a matrix, and where a budget of parameters helps a model most."""

from __future__ import annotations

from spectra.advice.criteria import CRITERIA, ENERGY_SHARES, LABELS, Band
from spectra.advice.matrix import Advice, advise
from spectra.advice.model import LADDER, ModelAdvice, advise_model, advise_run

__all__ = [
    "CRITERIA",
    "ENERGY_SHARES",
    "LABELS",
    "LADDER",
    "Advice",
    "Band",
    "ModelAdvice",
    "advise",
    "advise_model",
    "advise_run",
]
