"""Trainings whose curve is known: a logistic rise in log d, seeds that scatter, and what may go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from spectra.errors import TrainingError
from spectra.intrinsic.result import IntrinsicDimension
from spectra.intrinsic.searching import SearchConfig, search
from spectra.intrinsic.trial import Ask, Trial


@dataclass
class Synthetic:
    """`run` of a search. Every ask draws its noise from itself, so that it is answered alike whenever it comes."""

    base: float = 0.5
    top: float = 0.8
    middle: float = 300.0  # dimension half-way up
    width: float = 1.0  # of the logistic, in log d
    noise: float = 0.01
    full_noise: float = 0.01
    best_rate: float = 0.02
    draw: int = 0
    dents: dict[int, float] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)
    fails_after: int | None = None
    late: bool = False  # nothing is learnt in the first half

    def metric(self, dimension: float) -> float:
        return self.base + (self.top - self.base) / (1.0 + (self.middle / dimension) ** (1.0 / self.width))

    def dimension(self, target: float) -> float:
        x = (target - self.base) / (self.top - self.base)
        return self.middle * (x / (1.0 - x)) ** self.width

    def __call__(self, ask: Ask) -> Trial:
        if self.fails_after is not None and len(self.asks) >= self.fails_after:
            raise KeyboardInterrupt
        self.asks.append(ask)
        kind = ("full", "head", "pilot", "subspace").index(ask.kind)
        random = np.random.default_rng([self.draw, kind, ask.dimension or 0, ask.seed, ask.give_up_below is None])
        seconds = float(random.uniform(1, 2))
        if ask.kind == "pilot":
            assert ask.learning_rate is not None
            return Trial(ask, math.nan, abs(math.log(ask.learning_rate / self.best_rate)), ask.steps, False, seconds, 1)
        if ask.dimension is None:
            mean = self.top if ask.kind == "full" else self.base + 0.1
        else:
            mean = self.metric(ask.dimension) + self.dents.get(ask.dimension, 0.0)
        metric = mean + float(random.normal()) * (self.noise if ask.kind == "subspace" else self.full_noise)
        half = self.base if self.late else self.base + 0.6 * (metric - self.base)
        if ask.give_up_below is not None and half < ask.give_up_below:
            return Trial(ask, half, 0.5, ask.steps * 3 // 4, True, 0.75 * seconds, 1)
        return Trial(ask, metric, 1.0 - metric, ask.steps, False, seconds, 1)


def found(run: Callable[[Ask], Trial], config: SearchConfig | None = None, **flags: object) -> IntrinsicDimension:
    """A search among a million parameters, the baseline 0.5."""
    given = {"rate_rule": lambda dimension: 0.01, "baseline": 0.5, "held_out": 1000, "total": 1_000_000, "smallest": 4}
    return search(run, config or SearchConfig(steps=100), **{**given, **flags})  # type: ignore[arg-type]


def failing(run: Callable[[Ask], Trial], when: Callable[[Ask], bool]) -> Callable[[Ask], Trial]:
    """The same, but some trainings cannot go on."""

    def wrapped(ask: Ask) -> Trial:
        if when(ask):
            raise TrainingError("step 3: the loss is nan")
        return run(ask)

    return wrapped
