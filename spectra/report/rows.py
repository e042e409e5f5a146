"""Rows of a run's table as plain values: measures with their certified bounds, spectra thinned for plotting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectra.plot import truncation_curve
from spectra.values import Spectrum

# Measures of the spectrum: a truncated one has `<name>_low` and `<name>_high` in place of a value.
MEASURES = (
    "spectral_norm", "nuclear_norm", "signal_rank", "stable_rank", "entropy_rank", "entropy_rank_energy",
    "participation_ratio", "numerical_rank", "rank_50", "rank_90", "rank_95", "rank_99",
    "error_r1", "error_r2", "error_r4", "error_r8", "error_r16", "error_r32", "error_r64",
)  # fmt: skip
# Numbers that are known whatever the route, or not at all.
NUMBERS = (
    "frobenius", "relative_frobenius", "base_frobenius", "storage_floor", "storage_frobenius", "zero_fraction",
    "merge_loss", "quantization_frobenius", "quantization_projection", "quantization_cosine", "mp_edge", "mp_rank",
    "gd_rank", "decay_exponent", "gap", "tail_norm", "roundoff",
)  # fmt: skip
# Statuses after which a command ends with 1: a spectrum was due and could not be given.
FAILURES = ("nonfinite", "unsupported_dtype", "failed")
PLOT_POINTS = 160


class RunLike(Protocol):
    """What the report needs of a `spectra.Run`."""

    @property
    def frame(self) -> pd.DataFrame:
        """One row a tensor."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Inputs, matching, settings, versions."""

    def spectrum(self, name: str) -> Spectrum:
        """Singular values of one matrix's update, with their certificate."""

    def save(self, directory: Any) -> Any:
        """Write ``spectra.parquet`` and what goes with it."""


@dataclass(frozen=True)
class Interval:
    """A number known to lie in [low, high]; both ends are the same where it is exact, NaN where it is unknown."""

    low: float
    high: float

    @property
    def exact(self) -> bool:
        """Whether the two ends agree as far as anyone would print them."""
        return math.isclose(self.low, self.high, rel_tol=1e-3, abs_tol=1e-12)

    @property
    def known(self) -> bool:
        """Whether there is a number at all."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def middle(self) -> float:
        """Half-way between the ends: for a colour or an order, never for a claim."""
        return (self.low + self.high) / 2

    def over(self, divisor: float) -> Interval:
        """Both ends divided by a positive number."""
        return Interval(self.low / divisor, self.high / divisor)


UNKNOWN = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class Curve:
    """A spectrum at a few indices, and the error of keeping so many directions, both with upper bounds.

    `high` is empty where the values are exact, and `error_low` where the error is.
    """

    index: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    error: tuple[float, ...] = ()
    error_low: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.index)


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the run, as the report knows it."""

    position: int
    name: str
    layer: int | None
    role: str
    shape: tuple[int, ...]
    dtype_base: str
    dtype_tuned: str
    status: str
    reason: str
    route: str
    measures: Mapping[str, Interval]
    numbers: Mapping[str, float]
    curve: Curve
    count: int  # singular values that were computed and are not zero

    @property
    def analysed(self) -> bool:
        """Whether it is a matrix that changed and has a spectrum."""
        return self.status == "ok"

    @property
    def limit(self) -> int:
        """Singular values that the matrix has."""
        return min(self.shape) if self.shape else 0

    @property
    def truncated(self) -> bool:
        """Whether only the leading singular values are known."""
        return bool(self.curve.high)

    @property
    def factored(self) -> bool:
        """Whether it is a product of two thin factors, whose training limits its rank."""
        return self.analysed and self.route.startswith("factors")

    @property
    def rounding(self) -> float:
        """Share of ‖Δ‖_F that storage rounding alone would give; above 1 is possible in a dead zone."""
        whole = self.numbers["frobenius"]
        return self.numbers["storage_frobenius"] / whole if whole > 0 else math.nan

    @property
    def mostly_rounding(self) -> bool:
        """Whether rounding explains more than half of ‖Δ‖²_F."""
        return self.analysed and self.rounding**2 > 0.5

    @property
    def parameters(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape) if self.shape else 1


def read_rows(frame: pd.DataFrame) -> tuple[TensorRow, ...]:
    """Turn the run's table into rows, in its order.

    Parameters
    ----------
    frame : DataFrame
        `spectra.Run.frame`. Columns that are not there read as unknown.

    Returns
    -------
    tuple of TensorRow
    """
    records = frame.reset_index(drop=True).to_dict("records")
    return tuple(_read_row(i, {str(k): v for k, v in record.items()}) for i, record in enumerate(records))


def median(intervals: Iterable[Interval]) -> Interval:
    """Return bounds on the median of numbers known by intervals: the median is monotone in each of them.

    Parameters
    ----------
    intervals : iterable of Interval
        Unknown ones are left out.

    Examples
    --------
    >>> median([Interval(1, 1), Interval(2, 4), Interval(9, 9)])
    Interval(low=2.0, high=4.0)
    """
    known = [i for i in intervals if i.known]
    if not known:
        return UNKNOWN
    return Interval(float(np.median([i.low for i in known])), float(np.median([i.high for i in known])))


def pooled(rows: Iterable[TensorRow]) -> float:
    """Return ‖Δ‖/‖W‖ of several tensors taken as one: √ΣΔ² / √ΣW².

    Parameters
    ----------
    rows : iterable of TensorRow
        Those without a known norm are left out.
    """
    norms = [(row.numbers["frobenius"], row.numbers["base_frobenius"]) for row in rows]
    known = [(delta, base) for delta, base in norms if math.isfinite(delta) and math.isfinite(base)]
    above = sum(base**2 for _, base in known)
    return math.sqrt(sum(delta**2 for delta, _ in known) / above) if above > 0 else math.nan


def _read_row(position: int, record: Mapping[str, Any]) -> TensorRow:
    numbers = {name: _number(record.get(name)) for name in NUMBERS}
    values, high = (_vector(record.get(c)) for c in ("singular_values", "singular_values_high"))
    sides = [_number(record.get(c)) for c in ("rows", "cols")]
    layer = _number(record.get("layer"))
    return TensorRow(
        position=position,
        name=_text(record.get("name")),
        layer=None if math.isnan(layer) else int(layer),
        role=_text(record.get("role")),
        shape=_shape([int(s) for s in sides if not math.isnan(s)]),
        dtype_base=_text(record.get("dtype_base")),
        dtype_tuned=_text(record.get("dtype_tuned")),
        status=_text(record.get("status")),
        reason=_text(record.get("reason")),
        route=_text(record.get("route")),
        measures={name: _interval(record, name) for name in MEASURES},
        numbers=numbers,
        curve=thin(values[values > 0], numbers["frobenius"], high[: int(np.count_nonzero(values))]),
        count=int(np.count_nonzero(values)),
    )


def thin(values: NDArray[np.float64], frobenius: float, high: NDArray[np.float64]) -> Curve:
    """Keep at most `PLOT_POINTS` of a spectrum, even on a logarithmic index, with their truncation errors.

    Parameters
    ----------
    values : ndarray of shape (k,)
        Singular values, descending, none of them zero.
    frobenius : float
        Frobenius norm of the whole matrix.
    high : ndarray of shape (k,) or (0,)
        Upper bounds of a truncated spectrum, else empty.
    """
    if not len(values):
        return Curve()
    least, most = truncation_curve(values, frobenius, upper=high if len(high) else None)
    at = grid(len(values))
    picked = [_rounded(v[at - 1]) for v in (values, high if len(high) else values, most, least)]
    index = tuple(int(i) for i in at)
    if not len(high):
        return Curve(index, picked[0], (), picked[2], ())
    return Curve(index, *picked)


def grid(count: int, points: int = PLOT_POINTS) -> NDArray[np.int64]:
    """Return at most `points` indices of 1…count: evenly spaced on a logarithmic axis, with the ranks people ask about.

    Parameters
    ----------
    count : int
        Singular values there are.
    points : int
        Indices to keep, about.
    """
    if count <= points:
        return np.arange(1, count + 1)
    asked = [r for r in (1, 2, 4, 8, 16, 32, 64) if r <= count]
    spaced = np.unique(np.rint(np.geomspace(1, count, points)).astype(np.int64))
    return np.union1d(spaced, np.asarray(asked, dtype=np.int64))[: points + len(asked)]


def _shape(sides: Sequence[int]) -> tuple[int, ...]:
    """Return (n,) for what the run counts as an n × 1 or 1 × n matrix."""
    return (max(sides),) if len(sides) == 2 and min(sides) == 1 else tuple(sides)


def _rounded(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f"{v:.4g}") for v in values)


def _interval(record: Mapping[str, Any], name: str) -> Interval:
    value = _number(record.get(name))
    if not math.isnan(value):
        return Interval(value, value)
    return Interval(_number(record.get(f"{name}_low")), _number(record.get(f"{name}_high")))


def _number(value: Any) -> float:
    """Return a float, NaN for every way in which a table says that there is none."""
    try:
        return math.nan if value is None or value is pd.NA else float(value)
    except (TypeError, ValueError):
        return math.nan


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _vector(value: Any) -> NDArray[np.float64]:
    return np.asarray([] if value is None or np.ndim(value) == 0 else value, dtype=np.float64)
