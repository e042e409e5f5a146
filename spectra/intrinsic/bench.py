"""`Bench`: makes the trainings that a search asks for, or takes them from its journal, and keeps to the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from spectra.errors import TrainingError
from spectra.intrinsic.config import SearchConfig
from spectra.intrinsic.journal import TrialJournal
from spectra.intrinsic.trial import Ask, Trial


class Spent(Exception):
    """The budget does not allow the next training; a search that hears it tells what it has."""

    def __init__(self, budget: Literal["runs", "minutes"]) -> None:
        super().__init__(budget)
        self.budget = budget


class Bench:
    """Makes trainings, or takes them from the journal, and counts what they cost.

    Parameters
    ----------
    run : callable
        Does one training.
    config : SearchConfig
        Its budget.
    baseline : float
        The metric of a training that failed.
    journal : TrialJournal or None
    say : callable
        Told a line on every training.
    bar : tqdm

    Attributes
    ----------
    trials : list of Trial
        In the order of their asks.
    runs, seconds : float
        What they cost: whole trainings, and their time.
    """

    def __init__(
        self,
        run: Callable[[Ask], Trial],
        config: SearchConfig,
        *,
        baseline: float,
        journal: TrialJournal | None,
        say: Callable[[str], object],
        bar: Any,
    ) -> None:
        self._run, self._config, self._baseline = run, config, baseline
        self._journal, self._say, self._bar = journal, say, bar
        self.trials: list[Trial] = []
        self.runs, self.seconds = 0.0, 0.0

    def take(self, ask: Ask) -> Trial:
        """Give what comes of a training.

        Raises
        ------
        Spent
            If the budget does not allow it; the reference is made in any case.
        TrainingError
            If it is of the reference, and fails.
        """
        if ask.kind in ("pilot", "subspace"):
            self._check_budget(ask)
        trial = self._journal.find(ask) if self._journal is not None else None
        known = trial is not None
        if trial is None:
            trial = self._made(ask)
            if self._journal is not None:
                self._journal.write(trial)
        self.trials.append(trial)
        self.runs += trial.steps / ask.schedule_steps
        self.seconds += trial.seconds
        self._bar.update(trial.steps / ask.schedule_steps)
        with self._bar.external_write_mode():
            self._say(_told(trial, known))
        return trial

    def _check_budget(self, ask: Ask) -> None:
        """Refuse what goes beyond the budget. Time is that of the trials, so that a resumed search decides alike."""
        runs, minutes = self._config.runs, self._config.minutes
        if runs is not None and self.runs + ask.steps / ask.schedule_steps > runs + 1e-9:  # sums of fifths are rounded
            raise Spent("runs")
        if minutes is not None and self.seconds >= 60.0 * minutes:
            raise Spent("minutes")

    def _made(self, ask: Ask) -> Trial:
        began = time.perf_counter()
        try:
            trial = self._run(ask)
        except TrainingError as error:
            if ask.kind == "full":
                raise
            self._say(str(error))
            return Trial(ask, self._baseline, math.inf, 0, True, round(time.perf_counter() - began, 3), 0)
        metric, loss = float(trial.metric), float(trial.loss)
        if not math.isfinite(metric) and ask.kind != "pilot":  # of a pilot only the loss is wanted
            if ask.kind == "full":
                raise TrainingError(f"full fine-tuning, seed {ask.seed}: the held-out metric is {metric}")
            metric, loss = self._baseline, math.inf
        return replace(
            trial,
            ask=ask,
            metric=metric,
            loss=loss if math.isfinite(loss) else math.inf,
            seconds=float(trial.seconds),
        )


def _told(trial: Trial, known: bool) -> str:
    ask = trial.ask
    what = {"full": "full fine-tuning", "head": "head alone"}.get(ask.kind, f"{ask.kind}, d = {ask.dimension}")
    rate = "" if ask.dimension is None or ask.learning_rate is None else f", learning rate {ask.learning_rate:.3g}"
    came = "failed" if trial.failed else f"loss {trial.loss:.4g}" if ask.kind == "pilot" else f"{trial.metric:.4f}"
    end = " (in the journal)" if known else f", given up after {trial.steps} steps" if trial.given_up else ""
    return f"{what}, seed {ask.seed}{rate}: {came}{end}"
