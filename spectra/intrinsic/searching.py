"""`search`: finds the intrinsic dimension with as few trainings as it can.

Reference, then a bracket by factors of four, then bisection in log d with one seed a dimension; then more seeds at the
ends of the bracket, and on with their means where it moves. What is trained next depends on the trials so far alone, so
that a search resumed from its journal repeats, byte for byte, what an uninterrupted one finds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from spectra.errors import UsageError
from spectra.intrinsic.bench import Bench, Spent
from spectra.intrinsic.config import Room, SearchConfig
from spectra.intrinsic.crossing import Bracket, Crossing, bracket, crossing, levels, target_of
from spectra.intrinsic.journal import TrialJournal
from spectra.intrinsic.rates import RateLadder
from spectra.intrinsic.result import ACCURACY, NEGATIVE_LOSS, IntrinsicDimension, Verdict
from spectra.intrinsic.trial import Ask, Kind, Trial, subspace_trials

__all__ = ["SearchConfig", "search"]

_STRIDE = 4  # from a start that is wrong by a factor of 1 000 five trainings bracket; by twos it would be ten

# A training that has covered less than this share of the way to the target at three quarters of its steps is given up:
# it would have to gain three times as much in the last quarter as in the first three. Half of the steps would save
# more, but trainings that begin on a plateau know nothing then: MiniLM on rotten-tomatoes stood at .57 there and ended
# at .73. It is not lost for good either: the ends of the final bracket are trained to their end.
_HOPELESS = 0.25

# Seeds of a pilot. MiniLM on subjectivity, pilots of 20 steps of one seed: four times the rule's rate won at d = 256
# and 362, and in the trainings that followed seed 0 reached .84 and .87 and seed 1 diverged to .48 and .50.
_PILOTS = 2


def search(
    run: Callable[[Ask], Trial],
    config: SearchConfig,
    *,
    rate_rule: Callable[[int], float],
    baseline: float,
    held_out: int,
    total: int,
    smallest: int,
    metric_name: str = ACCURACY,
    told: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda line: None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = False,
) -> IntrinsicDimension:
    """Find the least dimension in which training reaches a share of full fine-tuning's metric.

    Parameters
    ----------
    run : callable
        Does one training. A `TrainingError` of a pilot counts as an infinite loss, one of a subspace as the baseline;
        one of the reference ends the search.
    config : SearchConfig
    rate_rule : callable
        Learning rate of a dimension, before its factor.
    baseline : float
        What is reached without training: accuracy of the majority class, or minus the loss of the untouched model.
    held_out : int
        Rows that every metric is a mean over.
    total, smallest : int
        D, and the least dimension that the structure allows.
    metric_name : str
        ``"accuracy"`` or ``"negative loss"``.
    told : mapping, optional
        What else a trial depends on, and the result is to tell; JSON-able.
    say : callable, optional
        Called with a line on every training.
    journal : path, optional
        Folder that keeps every finished training, so that a second call repeats none.
    resume : bool
        Take up what the journal holds; otherwise begin anew.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    IntrinsicDimension

    Raises
    ------
    UsageError
        If a dimension is out of range.
    MismatchError, JournalError
        If the journal is of another search, or cannot be used. Budgets may differ: a larger one goes on.
    TrainingError
        If the reference cannot be trained.
    KeyboardInterrupt
        As it comes; finished trainings are in the journal.

    References
    ----------
    C. Li, H. Farkhoor, R. Liu, J. Yosinski: *Measuring the Intrinsic Dimension of Objective Landscapes*, ICLR 2018.
    A. Aghajanyan, S. Gupta, L. Zettlemoyer: *Intrinsic Dimensionality Explains the Effectiveness of Language Model
    Fine-Tuning*, ACL 2021.

    Examples
    --------
    >>> def run(ask):
    ...     metric = 0.9 if ask.dimension is None else 0.9 * ask.dimension / (ask.dimension + 100)
    ...     return Trial(ask, metric, loss=1 - metric, steps=ask.steps, stopped=False, seconds=1.0, parameters=1)
    >>> found = search(run, SearchConfig(steps=100), rate_rule=lambda dimension: 0.01, baseline=0.0, held_out=1000,
    ...                total=100_000, smallest=1)
    >>> found.verdict, round(found.dimension / 900, 2)
    ('reached', 1.0)
    """
    if metric_name not in (ACCURACY, NEGATIVE_LOSS):
        raise UsageError(f"metric_name = {metric_name!r}: it is {ACCURACY!r} or {NEGATIVE_LOSS!r}")
    if not math.isfinite(baseline) or held_out < 1:
        raise UsageError(
            f"baseline = {baseline}, held_out = {held_out}: a finite metric over at least one row is needed"
        )
    room = Room.of(config, smallest=smallest, total=total)
    fingerprint = {"told": dict(told or {}), "metric": metric_name, "baseline": baseline, "held_out": held_out}
    fingerprint |= {"total": total, "smallest": smallest, "search": _settings(config)}
    with ExitStack() as stack:
        kept = stack.enter_context(TrialJournal(journal, fingerprint, resume=resume)) if journal is not None else None
        bar = stack.enter_context(tqdm(total=config.runs, delay=2.0, disable=not progress, unit=" trainings"))
        bench = Bench(run, config, baseline=baseline, journal=kept, say=say, bar=bar)
        hunt = _Hunt(
            config,
            room,
            bench,
            rate_rule=rate_rule,
            baseline=baseline,
            held_out=held_out,
            metric_name=metric_name,
        )
        spent: str | None = None
        try:
            hunt.reference()
            hunt.follow()
        except Spent as end:
            spent = end.budget
    known = {"total": total, "smallest": smallest, "seeds": config.seeds, "steps": config.steps}
    cost = {"runs": round(bench.runs, 6), "trainings": len(bench.trials), "seconds": bench.seconds, "spent": spent}
    settings = {"search": json.loads(json.dumps(asdict(config))), "learning_rate": config.learning_rate}
    return hunt.result({**(told or {}), **known, **settings, **cost})


class _Hunt:
    """What to train next."""

    def __init__(
        self,
        config: SearchConfig,
        room: Room,
        bench: Bench,
        *,
        rate_rule: Callable[[int], float],
        baseline: float,
        held_out: int,
        metric_name: str,
    ) -> None:
        self._config, self._room, self._bench, self._rate_rule = config, room, bench, rate_rule
        self._baseline, self._metric_name = baseline, metric_name
        self._above_chance = config.above_chance or metric_name == NEGATIVE_LOSS
        self._held_out, self._rows = held_out, held_out if metric_name == ACCURACY else None
        self._floor = baseline if self._above_chance else None
        self._rates = RateLadder(config.rates, self._pilot)
        self._target = math.nan

    def reference(self) -> None:
        """Train all weights, and the head alone where it trains freely, with every seed."""
        for kind in ("full", "head") if self._config.free_head else ("full",):
            for seed in self._seeds:
                self._bench.take(self._ask(kind, None, seed, self._config.learning_rate))
        self._target = float(target_of(np.mean(self._metrics("full")), share=self._config.share, floor=self._floor))

    def follow(self) -> None:
        """Train in subspaces until the crossing is known as well as was asked for."""
        if self._head_reaches:
            return
        if self._config.dimensions is not None:
            for seed in self._seeds:  # one seed everywhere first: a budget that ends early leaves a whole curve
                for dimension in self._config.dimensions:
                    self._train(dimension, seed, to_the_end=True)
            return
        while (following := self._next()) is not None:
            self._train(*following)

    def _next(self) -> tuple[int, int, bool] | None:
        """Dimension, seed, and whether it must not be given up; None when the search is done."""
        trials = subspace_trials(self._bench.trials)
        if not trials:
            return self._room.start, self._config.seed, False
        found = self._bracket()
        first, last = min(trials), max(trials)
        if found.high is None and last < self._room.largest:
            return min(last * _STRIDE, self._room.largest), self._config.seed, False
        if found.low is None and first > self._room.smallest:
            return max(first // _STRIDE, self._room.smallest), self._config.seed, False
        if found.low is not None and found.high is not None and found.high > self._config.ratio * found.low:
            middle = round(math.sqrt(found.low * found.high))
            if found.low < middle < found.high:
                return middle, self._config.seed, False
        return self._wanting(found, trials) or self._beyond(found, first, last)

    def _beyond(self, found: Bracket, first: int, last: int) -> tuple[int, int, bool] | None:
        """Past an end of the bracket where nothing as far as a stride was tried, if the interval is open there.

        Draws do not cross where the last dimension reaches the target only just, however well that is known: one seed
        further up closes the interval of most searches.
        """
        if found.low is None or found.high is None:
            return None
        at = self._crossing()
        if at.high is None and last < min(found.high * _STRIDE, self._room.largest):
            return min(last * _STRIDE, self._room.largest), self._config.seed, False
        if at.low is None and first > max(found.low // _STRIDE, self._room.smallest):
            return max(first // _STRIDE, self._room.smallest), self._config.seed, False
        return None

    def _wanting(self, found: Bracket, trials: Mapping[int, list[Trial]]) -> tuple[int, int, bool] | None:
        """The first seed that a deciding dimension lacks, of the dimension with the fewest."""
        lacking = []
        for dimension in found.disputed:
            finished = {trial.ask.seed for trial in trials[dimension] if not trial.given_up}
            missing = [seed for seed in self._seeds if seed not in finished]
            if missing:
                lacking.append((-len(missing), dimension, missing[0]))
        return (min(lacking)[1], min(lacking)[2], True) if lacking else None

    def _train(self, dimension: int, seed: int, to_the_end: bool) -> None:
        rate = self._rate_rule(dimension) * self._rates.factor(dimension)
        hopeless = self._baseline + _HOPELESS * (self._target - self._baseline)
        gives_up = not to_the_end and self._target > self._baseline
        ask = self._ask("subspace", dimension, seed, rate)
        self._bench.take(replace(ask, give_up_below=hopeless if gives_up else None))

    def _pilot(self, dimension: int, factor: float) -> float:
        """The worse loss of two seeds: one alone favours rates that are too hot for the next."""
        steps = max(1, round(self._config.pilot_share * self._config.steps))
        asks = (
            self._ask("pilot", dimension, seed, self._rate_rule(dimension) * factor) for seed in self._seeds[:_PILOTS]
        )
        return max(self._bench.take(replace(ask, steps=steps)).loss for ask in asks)

    def _ask(self, kind: Kind, dimension: int | None, seed: int, rate: float | None) -> Ask:
        steps = self._config.steps
        return Ask(kind, dimension, seed, rate, steps=steps, schedule_steps=steps, give_up_below=None)

    @property
    def _seeds(self) -> range:
        return range(self._config.seed, self._config.seed + self._config.seeds)

    def _metrics(self, kind: Kind) -> list[float]:
        return [trial.metric for trial in self._bench.trials if trial.ask.kind == kind]

    @property
    def _curve(self) -> dict[int, list[float]]:
        return {d: [t.metric for t in seeds] for d, seeds in subspace_trials(self._bench.trials).items()}

    def _bracket(self) -> Bracket:
        return bracket(self._curve, self._target)

    @property
    def _head_reaches(self) -> bool:
        return self._config.free_head and float(np.mean(self._metrics("head"))) >= self._target

    def _crossing(self) -> Crossing:
        return crossing(
            self._metrics("full"),
            self._curve,
            share=self._config.share,
            floor=self._floor,
            held_out=self._rows,
            seed=self._config.seed,
        )

    def result(self, config: dict[str, Any]) -> IntrinsicDimension:
        """What is known now."""
        full, heads, curve = self._metrics("full"), self._metrics("head"), self._curve
        reference = levels(full, curve, self._target, held_out=self._rows)[0]
        means = {d: float(np.mean(metrics)) for d, metrics in curve.items()}
        best = max(means, key=lambda d: (means[d], -d), default=0)
        verdict, dimension, low, high = self._found(config["spent"] is not None)
        return IntrinsicDimension(
            trials=tuple(self._bench.trials),
            metric_name=self._metric_name,
            share=self._config.share,
            above_chance=self._above_chance,
            baseline=self._baseline,
            full=reference.mean,
            full_low=reference.low,
            full_high=reference.high,
            target=self._target,
            dimension=dimension,
            low=low,
            high=high,
            verdict=verdict,
            best_metric=means[best] if means else float(np.mean(heads)) if heads else self._baseline,
            best_dimension=best,
            largest_dimension=max(means, default=0),
            head=float(np.mean(heads)) if heads else None,
            held_out=self._held_out,
            config=config,
        )

    def _found(self, spent: bool) -> tuple[Verdict, float | None, float | None, float | None]:
        if self._head_reaches:
            return "reached by the head alone", None, None, None
        if not self._curve:
            return "unfinished", None, None, None
        found = self._crossing()
        low, high, between = found.low, found.high, found.bracket
        if between.low is not None and between.high is not None:
            if spent:  # what is narrower than the bracket was never looked at with enough seeds
                low = None if low is None else min(low, float(between.low))
                high = None if high is None else max(high, float(between.high))
            return "reached", found.dimension, low, high
        if spent:
            return "unfinished", None, None, None
        return ("never reached" if between.high is None else "reached by the smallest"), None, low, high


def _settings(config: SearchConfig) -> dict[str, Any]:
    """What may not differ between the calls of one search: all but the budget."""
    return {key: value for key, value in asdict(config).items() if key not in ("runs", "minutes")}
