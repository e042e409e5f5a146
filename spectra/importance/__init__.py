"""Importance of an update's directions: scores, budgets, recorded trainings and the ranks that they would have kept.

`scores` says how important a direction is, `budgets` how many may stay after each step and which; `spectra.methods`
prunes by them. ``python -m spectra.train … --record-importance`` writes every score of every direction over a training,
`read_recorded` opens it, `replay` keeps the best of it by any score and schedule, and `agreement` compares the maps of
ranks that come out, with each other and with the one that singular values give in hindsight.
"""

from __future__ import annotations

from spectra.importance.agreement import Agreement, agreement, svd_rank_map
from spectra.importance.budgets import SHAPES, Stretches, budget, keep_best, stretches
from spectra.importance.rank_map import RankMap
from spectra.importance.recorded import Recorded, read_recorded
from spectra.importance.replay import replay
from spectra.importance.scores import (
    SCORES,
    Score,
    Smoothed,
    entry_scores,
    fisher,
    magnitude_scores,
    norm_scores,
    sensitivity,
    smooth,
    triplet_scores,
    value_scores,
)

__all__ = [
    "SCORES",
    "SHAPES",
    "Agreement",
    "RankMap",
    "Recorded",
    "Score",
    "Smoothed",
    "Stretches",
    "agreement",
    "budget",
    "entry_scores",
    "fisher",
    "keep_best",
    "magnitude_scores",
    "norm_scores",
    "read_recorded",
    "replay",
    "sensitivity",
    "smooth",
    "stretches",
    "svd_rank_map",
    "triplet_scores",
    "value_scores",
]
