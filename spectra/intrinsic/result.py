"""`IntrinsicDimension`: what a search found, as a sentence, a curve and a table; JSON and CSV keep it."""

from __future__ import annotations

import html
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from spectra.errors import MismatchError, UsageError
from spectra.intrinsic.crossing import levels
from spectra.intrinsic.trial import Trial, subspace_trials
from spectra.notebook import inline_svg
from spectra.report.text import counted, grouped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

JSON, CSV = "intrinsic.json", "trials.csv"
SCHEMA = 1
ACCURACY, NEGATIVE_LOSS = "accuracy", "negative loss"

Verdict = Literal["reached", "never reached", "reached by the smallest", "reached by the head alone", "unfinished"]
_TYPES: dict[str, type] = {"bool": bool, "int": int, "str": str, "Mapping[str, Any]": dict}
_INTEGERS = ("dimension", "seed", "steps", "schedule_steps", "steps_done", "parameters")


class Point(NamedTuple):
    """One dimension of the curve: the mean over its seeds with its 95 % interval."""

    dimension: int
    mean: float
    low: float
    high: float
    seeds: int
    learning_rate: float | None


@dataclass(frozen=True)
class IntrinsicDimension:
    """The least dimension of a random subspace in which fine-tuning reaches a share of its full metric.

    Parameters
    ----------
    trials : tuple of Trial
        Every training, in the order in which the search wanted them.
    metric_name : str
        ``"accuracy"`` or ``"negative loss"``; higher is better.
    share : float
        Of the full metric, 0.9 for d90.
    above_chance : bool
        Whether the share is of what full fine-tuning adds to the baseline; of a loss it always is.
    baseline : float
        Accuracy of the majority class, or minus the loss of the untouched model.
    full, full_low, full_high : float
        Metric of full fine-tuning: mean over seeds and 95 % interval. The ends equal the mean where one seed of a loss
        tells no spread.
    target : float
        The metric to reach.
    dimension : float or None
        d90, interpolated; None where `verdict` is not ``"reached"``.
    low, high : float or None
        Its 95 % interval, None where open on that side; where trainings ran out before the search was done, the
        dimensions between which the crossing lies at least. Where the target was not reached, `low` is what d90
        exceeds; where the smallest dimension reaches it, `high` is what it does not exceed.
    verdict : str
        ``"reached"``, ``"never reached"``, ``"reached by the smallest"`` dimension tried, ``"reached by the head
        alone"`` or ``"unfinished"``.
    best_metric : float
        Highest mean metric of a dimension; the head's, or the baseline, where none was tried.
    best_dimension, largest_dimension : int
        Where that was, and the largest tried; 0 where none was.
    head : float or None
        Metric of the head alone, mean over seeds, where it trains freely.
    held_out : int
        Rows that every metric is a mean over.
    config : mapping
        What was trained on what and how, as the caller told; ``total`` D, ``smallest``, ``seeds``, ``steps``,
        ``learning_rate`` of full fine-tuning, ``search`` (every setting of the search), ``runs`` (trainings made,
        parts of one as parts), ``trainings`` (their number), ``seconds``, and ``spent`` (``"runs"`` or ``"minutes"``,
        the budget that ended the search, else None). JSON-able.
    """

    trials: tuple[Trial, ...]
    metric_name: str
    share: float
    above_chance: bool
    baseline: float
    full: float
    full_low: float
    full_high: float
    target: float
    dimension: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    best_metric: float
    best_dimension: int
    largest_dimension: int
    head: float | None
    held_out: int
    config: Mapping[str, Any]

    @cached_property
    def curve(self) -> list[Point]:
        """Mean metric of every dimension, ascending; a training that was given up counts as the metric it had."""
        trials = subspace_trials(self.trials)
        metrics = {d: [trial.metric for trial in seeds] for d, seeds in trials.items()}
        full = [trial.metric for trial in self.trials if trial.ask.kind == "full"]
        found = levels(full, metrics, self.target, held_out=self.held_out if self.metric_name == ACCURACY else None)[1]
        return [
            Point(d, level.mean, level.low, level.high, level.count, trials[d][0].ask.learning_rate)
            for d, level in found.items()
        ]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a training (pandas): what was asked, then what came of it."""
        import pandas as pd

        rows = []
        for trial in self.trials:
            row = asdict(trial)
            ask = row.pop("ask")
            rows.append(ask | {"steps_done" if key == "steps" else key: value for key, value in row.items()})
        kinds = dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(("learning_rate", "give_up_below"), "float64")
        frame: pd.DataFrame = pd.DataFrame(rows).astype(kinds)
        return frame

    @property
    def name(self) -> str:
        """``"d90"`` for a share of 0.9."""
        return f"d{100 * self.share:.10g}"

    def sentence(self) -> str:
        """What was found, in plain words."""
        said = self._said()
        if self.baseline < self.target:
            return said
        known = f"the baseline, {_metric(self.baseline)}"
        if self.full > self.baseline:
            return f"{said} But {known}, reaches that untrained: ask for the share of what full fine-tuning adds to it."
        return f"{said} But full fine-tuning is no better than {known}: there is nothing to reach a share of."

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``intrinsic.json`` and ``trials.csv`` into a folder; the same result gives the same bytes.

        Returns
        -------
        Path
            The JSON file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        record |= {"schema": SCHEMA, "trials": [trial.record() for trial in self.trials]}
        text = json.dumps(record, sort_keys=True, allow_nan=False, indent=1, ensure_ascii=False)
        _write(folder / CSV, self.frame.to_csv(index=False, lineterminator="\n"))
        return _write(folder / JSON, text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> IntrinsicDimension:
        """Read a result back from its folder, or from its JSON file.

        Raises
        ------
        UsageError
            If there is none, or the file is damaged.
        MismatchError
            If it was written with another schema.
        """
        path = Path(folder) / JSON if Path(folder).is_dir() else Path(folder)
        try:
            record = json.loads(path.read_bytes())
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read: {error.strerror}; give the folder of a finished search"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is damaged, it is no JSON: {error}") from error
        if not isinstance(record, dict) or "schema" not in record:
            raise UsageError(f"{path} is no intrinsic dimension: it has no schema")
        if record["schema"] != SCHEMA:
            raise MismatchError(f"{path} has schema {record['schema']!r}, this release reads {SCHEMA}: search again")
        try:
            trials = tuple(Trial.from_record(trial) for trial in record["trials"])
            found = cls(**{field.name: record[field.name] for field in fields(cls)} | {"trials": trials})
            found._check()
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UsageError(f"{path} is damaged: {type(error).__name__} {error}") from error
        return found

    def _repr_html_(self) -> str:
        """Give a card: the sentence, the curve as a picture and as a table."""
        import pandas as pd

        from spectra.intrinsic.plot import accuracy_against_dimension

        def draw(ax: Axes) -> None:
            accuracy_against_dimension(ax, self)

        card = f"<h4>Intrinsic dimension</h4><p>{html.escape(self.sentence())}</p>"
        if not self.curve:
            return card
        table: str = pd.DataFrame(self.curve).to_html(index=False, border=0, float_format="{:.4g}".format)
        return card + inline_svg(draw) + table

    def _check(self) -> None:
        """Raise what damage raises: of a field's type or range, of a result without a reference."""
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if "float" in kind and not (value is None and "None" in kind):
                if isinstance(value, bool) or not math.isfinite(value):
                    raise ValueError(f"{field.name} = {value!r}")
            elif kind in _TYPES and type(value) is not _TYPES[kind]:
                raise TypeError(f"{field.name} = {value!r:.40}")
        if self.verdict not in get_args(Verdict) or self.metric_name not in (ACCURACY, NEGATIVE_LOSS):
            raise ValueError(f"verdict {self.verdict!r} of {self.metric_name!r}")
        if not any(trial.ask.kind == "full" for trial in self.trials) or self.held_out < 1:
            raise ValueError("no training of the reference, or no rows that it was measured on")
        if any(point.dimension < 1 for point in self.curve):
            raise ValueError("a dimension below 1")
        self.sentence()

    # Parts of the sentence -------------------------------------------------------------------------------------

    def _said(self) -> str:
        if self.verdict == "reached":
            return self._reached()
        if self.verdict == "never reached":
            return self._never()
        if self.verdict == "reached by the smallest":
            return self._smallest()
        return self._by_head() if self.verdict == "reached by the head alone" else self._unfinished()

    def _goal(self) -> str:
        spread = f" ± {self.full_high - self.full:.3f}" if self.full_high > self.full else ""
        full = f"full fine-tuning's {self.metric_name} {_metric(self.full)}{spread}"
        way = f"the way from the baseline {_metric(self.baseline)} to {full}" if self.above_chance else full
        return f"{100 * self.share:.10g} % of {way} is {_metric(self.target)}"

    def _reached(self) -> str:
        interval = f"95 % interval {_interval(self.low, self.high)}"
        if self.config.get("spent"):
            interval += f", the {self.config['spent']} allowed ran out before it was narrowed"
        return f"{self.name} = {_dimension(self.dimension)} ({interval}): {self._goal()}."

    def _never(self) -> str:
        largest = grouped(self.largest_dimension)
        if self.largest_dimension == self.config.get("total"):
            largest += ", which is every parameter"
        return (
            f"{self.name} was not reached: the best {self.metric_name} is {_metric(self.best_metric)}, at d = "
            f"{grouped(self.best_dimension)}, and the largest d tried is {largest}; {self._goal()}."
        )

    def _smallest(self) -> str:
        first = self.curve[0]
        return (
            f"{self.name} is at most {grouped(first.dimension)}, the smallest d tried: its {self.metric_name} is "
            f"{_metric(first.mean)}; {self._goal()}."
        )

    def _by_head(self) -> str:
        return (
            f"{self.name} is nothing beside the head: trained alone it has {self.metric_name} "
            f"{_metric(self.best_metric if self.head is None else self.head)}; {self._goal()}."
        )

    def _unfinished(self) -> str:
        tried = ", ".join(f"{_metric(p.mean)} at d = {grouped(p.dimension)}" for p in self.curve)
        done = f"{counted(len(self.curve), 'dimension')} tried" + (f" ({self.metric_name} {tried})" if tried else "")
        return (
            f"{self.name} is unknown yet: the {self.config.get('spent') or 'trainings'} allowed ran out with {done}; "
            f"{self._goal()}."
        )


def _metric(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _dimension(value: float | None) -> str:
    """A dimension to three digits: its interval is never so narrow that a fourth would say something."""
    return "–" if value is None else grouped(round(float(f"{value:.3g}")))


def _interval(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "open on both sides"
    if high is None:
        return f"from {_dimension(low)}, open above"
    return f"up to {_dimension(high)}, open below" if low is None else f"{_dimension(low)} – {_dimension(high)}"


def _write(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".spectra-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
