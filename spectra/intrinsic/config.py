"""`SearchConfig`: how to search for an intrinsic dimension; `Room`: the dimensions that a model leaves it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.errors import UsageError

START = 256


@dataclass(frozen=True)
class SearchConfig:
    """How to search.

    Parameters
    ----------
    steps : int
        Of one training.
    learning_rate : float, optional
        Of the reference and of the head alone; the trainer's own where not given.
    share : float
        Of the full metric that is to be reached: 0.9 for d90.
    above_chance : bool
        Reach that share of what full fine-tuning adds to the baseline, rather than of its metric. Of a negative loss,
        which has no zero to take a share from, it always is.
    seeds : int
        Trainings of the reference, and of the dimensions that decide.
    seed : int
        The first seed.
    start : int, optional
        First dimension; 256, or the nearest that the model allows, where not given.
    largest : int, optional
        No dimension is larger; all parameters where not given.
    ratio : float
        The bracket is narrowed until its ends are no further apart.
    rates : tuple of float
        Factors of the rule's learning rate, tried by pilots of two seeds, of which the worse counts; one alone is taken
        without any.
    pilot_share : float
        Part of its steps that a pilot does.
    runs, minutes : float, optional
        Budget: whole trainings (a pilot counts as the part it does), and minutes of them. The reference is made in any
        case.
    dimensions : tuple of int, optional
        Train all seeds at exactly these, and search for nothing.
    free_head : bool
        Whether a fresh head trains freely beside the subspace; it is then tried alone, too.

    Raises
    ------
    UsageError
        If a value is out of range.

    Examples
    --------
    >>> SearchConfig(steps=200).share
    0.9
    >>> SearchConfig(steps=200, share=1.5)
    Traceback (most recent call last):
    spectra.errors.UsageError: share = 1.5: it is above 0 and at most 1
    """

    steps: int
    learning_rate: float | None = None
    share: float = 0.9
    above_chance: bool = False
    seeds: int = 3
    seed: int = 0
    start: int | None = None
    largest: int | None = None
    ratio: float = math.sqrt(2.0)
    rates: tuple[float, ...] = (0.25, 1.0, 4.0)
    pilot_share: float = 0.2
    runs: float | None = None
    minutes: float | None = None
    dimensions: tuple[int, ...] | None = None
    free_head: bool = False

    def __post_init__(self) -> None:
        _in_range("share", self.share, 0.0 < self.share <= 1.0, "it is above 0 and at most 1")
        _in_range("pilot_share", self.pilot_share, 0.0 < self.pilot_share <= 1.0, "it is above 0 and at most 1")
        _in_range("ratio", self.ratio, 1.0 < self.ratio < math.inf, "it is above 1")
        _in_range("rates", self.rates, bool(self.rates) and all(0 < r < math.inf for r in self.rates), "all above 0")
        _in_range("rates", self.rates, len(set(self.rates)) == len(self.rates), "one stands there twice")
        for name in ("steps", "seeds"):
            _in_range(name, getattr(self, name), getattr(self, name) >= 1, "it is at least 1")
        for name in ("learning_rate", "minutes"):
            value = getattr(self, name)
            _in_range(name, value, value is None or 0.0 < value < math.inf, "it is above 0")
        for name in ("start", "largest"):
            value = getattr(self, name)
            _in_range(name, value, value is None or value >= 1, "a subspace has at least one dimension")
        if self.dimensions is not None:
            ascending = list(self.dimensions) == sorted(set(self.dimensions))
            _in_range("dimensions", self.dimensions, bool(self.dimensions) and ascending, "ascending, none twice")
            _in_range("dimensions", self.dimensions, self.dimensions[0] >= 1, "a subspace has at least one dimension")
        if self.runs is not None:
            least = self.seeds * (2 if self.free_head else 1) + 1
            why = f"the reference alone takes {least - 1}, so it is at least {least}"
            _in_range("runs", self.runs, self.runs >= least, why)


@dataclass(frozen=True)
class Room:
    """Dimensions that a model and the settings allow, and where to begin.

    Examples
    --------
    >>> Room.of(SearchConfig(steps=200), smallest=1, total=100)
    Room(smallest=1, largest=100, start=100)
    """

    smallest: int
    largest: int
    start: int

    @classmethod
    def of(cls, config: SearchConfig, *, smallest: int, total: int) -> Room:
        """Find it.

        Raises
        ------
        UsageError
            If a dimension of the settings is not there.
        """
        if not 1 <= smallest <= total:
            raise UsageError(f"no subspace fits: the smallest has d = {smallest}, all parameters are {total}")
        asked = [("start", config.start), ("largest", config.largest)]
        asked += [("dimensions", dimension) for dimension in config.dimensions or ()]
        for name, value in asked:
            allowed = f"dimensions go from {smallest}, the least of this structure, to {total}, all parameters"
            _in_range(name, value, value is None or smallest <= value <= total, allowed)
        largest = total if config.largest is None else config.largest
        start = max(smallest, min(START, largest)) if config.start is None else config.start
        _in_range("start", start, start <= largest, f"the largest allowed is {largest}")
        return cls(smallest, largest, start)


def _in_range(name: str, value: object, fits: bool, why: str) -> None:
    if not fits:
        raise UsageError(f"{name} = {value}: {why}")
