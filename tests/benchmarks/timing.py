"""How a ratio is taken: both sides in turn, several times, best against best."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Best seconds of several runs, and what the last one returned."""

    seconds: float
    result: Any


def in_turn(*sides: Callable[[], Any], rounds: int = 3) -> list[Timing]:
    """Time every side once a round, in turn; the best of each stands for what the machine can do undisturbed."""
    best = [float("inf")] * len(sides)
    results: list[Any] = [None] * len(sides)
    for _ in range(rounds):
        for i, side in enumerate(sides):
            gc.collect()
            start = time.perf_counter()
            results[i] = side()
            best[i] = min(best[i], time.perf_counter() - start)
    return [Timing(seconds, result) for seconds, result in zip(best, results, strict=True)]


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, ours and the rival's time, the aim, the accuracy."""

    work: str
    ours: float
    rival: str
    theirs: float
    aim: str
    reached: bool
    accuracy: str

    @property
    def ratio(self) -> float:
        """How many of ours fit in the rival's."""
        return self.theirs / self.ours

    def markdown(self) -> str:
        """The line as Markdown."""
        ratio = f"{self.ratio:,.0f}×" if self.ratio >= 100 else f"{self.ratio:.2f}×"
        mark = "" if self.reached else " **missed**"
        return (
            f"| {self.work} | {_seconds(self.ours)} | {self.rival} {_seconds(self.theirs)} | {ratio} "
            f"| {self.aim}{mark} | {self.accuracy} |"
        )


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


HEADER = "| work | spectra | rival | rival / spectra | aim | accuracy |\n|---|---|---|---|---|---|"
