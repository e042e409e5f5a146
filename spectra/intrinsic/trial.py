"""`Ask` and `Trial`: one training that the search for an intrinsic dimension wants, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Kind = Literal["full", "head", "pilot", "subspace"]


@dataclass(frozen=True)
class Ask:
    """One training that the search wants.

    Parameters
    ----------
    kind : str
        ``"full"``: all weights train. ``"head"``: the fresh head alone, where it trains freely beside the subspace,
        so that it is what d = 0 comes to. ``"pilot"``: a short one in a subspace, to choose a learning rate.
        ``"subspace"``: d numbers train.
    dimension : int or None
        d; None for full and head.
    seed : int
        Of the projection, the head's start and the order of the batches.
    learning_rate : float or None
        None: the reference's own.
    steps : int
        Optimizer steps to do.
    schedule_steps : int
        Length of the schedule that they belong to; a pilot does the first `steps` of it.
    give_up_below : float or None
        With a held-out metric below this at three quarters of its steps a training stops: it is hopeless.

    Examples
    --------
    >>> Ask("subspace", 256, seed=0, learning_rate=0.01, steps=200, schedule_steps=200, give_up_below=0.6).dimension
    256
    """

    kind: Kind
    dimension: int | None
    seed: int
    learning_rate: float | None
    steps: int
    schedule_steps: int
    give_up_below: float | None


@dataclass(frozen=True)
class Trial:
    """What came of one training.

    Parameters
    ----------
    ask : Ask
        What was wanted.
    metric : float
        Held-out, higher is better: accuracy, or minus the loss for language models.
    loss : float
        Training loss, mean of the last ten steps; infinite where training failed.
    steps : int
        Steps done.
    stopped : bool
        Given up as hopeless.
    seconds : float
        Wall time.
    parameters : int
        Scalars that trained.

    Examples
    --------
    >>> ask = Ask("full", None, seed=0, learning_rate=None, steps=200, schedule_steps=200, give_up_below=None)
    >>> Trial(ask, metric=0.81, loss=0.3, steps=200, stopped=False, seconds=9.5, parameters=4_400_000).metric
    0.81
    """

    ask: Ask
    metric: float
    loss: float
    steps: int
    stopped: bool
    seconds: float
    parameters: int

    @property
    def given_up(self) -> bool:
        """Whether it was stopped as hopeless: its metric is that of three quarters of a training."""
        return self.stopped and not self.failed and self.ask.give_up_below is not None

    @property
    def failed(self) -> bool:
        """Whether it could not be finished, a loss that is NaN for instance."""
        return not math.isfinite(self.loss)

    def record(self) -> dict[str, Any]:
        """The trial as JSON, in which a number that is not finite is null."""
        record = asdict(self)
        return record | {key: record[key] if math.isfinite(record[key]) else None for key in ("metric", "loss")}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Trial:
        """Read a trial back.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the record is no trial's.

        Examples
        --------
        >>> ask = Ask("pilot", 64, seed=0, learning_rate=9.0, steps=40, schedule_steps=200, give_up_below=None)
        >>> trial = Trial(ask, metric=0.5, loss=math.inf, steps=0, stopped=True, seconds=0.1, parameters=0)
        >>> Trial.from_record(trial.record()) == trial
        True
        """
        ask = Ask(**record["ask"])
        if ask.kind not in get_args(Kind) or (ask.dimension is None) != (ask.kind in ("full", "head")):
            raise ValueError(f"kind {ask.kind!r} with dimension {ask.dimension!r}")
        if type(record["stopped"]) is not bool:
            raise TypeError(f"stopped = {record['stopped']!r}")
        whole = {"steps done": record["steps"], "parameters": record["parameters"]}
        whole |= {name: getattr(ask, name) for name in ("dimension", "seed", "steps", "schedule_steps")}
        real = {name: record[name] for name in (*_ABSENT, "seconds")}
        real |= {name: getattr(ask, name) for name in ("learning_rate", "give_up_below")}
        optional = ("dimension", "learning_rate", "give_up_below", *_ABSENT)
        for name, value in {**whole, **real}.items():
            if value is not None or name not in optional:
                _check(name, value, *([int] if name in whole else [int, float]))
        numbers = {name: absent if record[name] is None else float(record[name]) for name, absent in _ABSENT.items()}
        return cls(**{**record, **numbers, "ask": ask})


def _check(name: str, value: Any, *kinds: type) -> None:
    """Raise `TypeError` or `ValueError` unless a number is of one of the types, and between −2⁶³ and 2⁶³."""
    if type(value) not in kinds:
        raise TypeError(f"{name} = {value!r:.40}")
    if not -(2**63) < value < 2**63:
        raise ValueError(f"{name} is not between −2⁶³ and 2⁶³")


def subspace_trials(trials: Iterable[Trial]) -> dict[int, list[Trial]]:
    """Trainings in subspaces by dimension, ascending: one a seed, the finished one where another was given up.

    Examples
    --------
    >>> ask = Ask("subspace", 64, seed=0, learning_rate=0.1, steps=200, schedule_steps=200, give_up_below=0.6)
    >>> from dataclasses import replace
    >>> early = Trial(ask, metric=0.5, loss=0.7, steps=100, stopped=True, seconds=1.0, parameters=64)
    >>> whole = replace(early, ask=replace(ask, give_up_below=None), metric=0.7, steps=200, stopped=False)
    >>> subspace_trials([early, whole]) == {64: [whole]}
    True
    """
    found: dict[int, dict[int, Trial]] = {}
    for trial in trials:
        dimension, seed = trial.ask.dimension, trial.ask.seed
        if trial.ask.kind != "subspace" or dimension is None:
            continue
        before = found.setdefault(dimension, {}).get(seed)
        if before is None or before.given_up:
            found[dimension][seed] = trial
    return {d: [trial for _, trial in sorted(seeds.items())] for d, seeds in sorted(found.items())}


_ABSENT = {"metric": math.nan, "loss": math.inf}
