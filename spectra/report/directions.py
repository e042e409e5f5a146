"""How many directions: what budgets of parameters buy over the whole model, and what each matrix's criteria advise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from spectra.advice import CRITERIA, LADDER, Advice, ModelAdvice, advise_model
from spectra.report.rows import Interval, RunLike, TensorRow
from spectra.report.tables import share_span, span
from spectra.report.text import grouped, percent

# The rank and the share that the sentences name: a common rank of adapters, and that of LoRA's bet in the verdict.
SAID_RANK, SAID_SHARE = 16, 0.9
# An error below this is nothing: what rounding of the sums leaves where every direction is kept.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Budget:
    """What one uniform rank costs, and the relative error of all matrices together at that cost.

    `uniform` is the error of that rank everywhere, `allocated` that of the best ranks of no more parameters.
    """

    rank: int
    parameters: int
    uniform: Interval
    allocated: Interval

    @property
    def uniform_energy(self) -> Interval:
        """Share of ‖Δ‖² that the uniform rank keeps."""
        return _energy(self.uniform)

    @property
    def allocated_energy(self) -> Interval:
        """Share of ‖Δ‖² that the best ranks keep."""
        return _energy(self.allocated)


@dataclass(frozen=True)
class Share:
    """What keeping a share of the energy takes. An upper end is infinite where the known directions hold less."""

    share: float
    rank: Interval
    uniform: Interval
    allocated: Interval

    @property
    def saved(self) -> float:
        """Share of the uniform rank's parameters that the best ranks do without; NaN where it is only bounded."""
        known = self.uniform.exact and self.allocated.exact and self.uniform.high > 0
        return 1.0 - self.allocated.high / self.uniform.high if known else math.nan


@dataclass(frozen=True)
class Directions:
    """The advice on a model and on each of its matrices."""

    budgets: tuple[Budget, ...]
    shares: tuple[Share, ...]
    matrices: Mapping[int, Advice]  # by position of the row
    parameters: int  # entries of these matrices
    model: ModelAdvice
    adapter_rank: int  # rank of an adapter's update, at which the ladder ends; 0 of any other
    said: tuple[str, ...]


def find_directions(run: RunLike, rows: Sequence[TensorRow]) -> Directions | None:
    """Ask every criterion of every matrix that changed, and allocate what uniform ranks cost.

    Parameters
    ----------
    run : Run
        Gives the spectra.
    rows : sequence of TensorRow
        Every row of it.

    Returns
    -------
    Directions or None
        None without a matrix that changed.
    """
    held = [row for row in rows if row.analysed and row.curve]
    if not held:
        return None
    adapter_rank = max(row.count for row in held) if all(row.factored for row in held) else 0
    ladder = [rank for rank in LADDER if not adapter_rank or rank < adapter_rank]
    model = advise_model(
        {str(row.position): run.spectrum(row.name) for row in held},
        ladder=[*ladder, adapter_rank] if adapter_rank else ladder,
    )
    budgets = tuple(_budget(line) for line in _lines(model.budgets))
    shares = tuple(_share(line) for line in _lines(model.shares))
    return Directions(
        budgets,
        shares,
        {row.position: model.matrices[str(row.position)] for row in held},
        sum(row.parameters for row in held),
        model,
        adapter_rank,
        tuple(_sentences(budgets, shares)),
    )


def at_least(interval: Interval) -> str:
    """Return a count of directions or parameters; one without an upper end as so many *or more*.

    Parameters
    ----------
    interval : Interval
        Bounds, whole numbers.

    Examples
    --------
    >>> at_least(Interval(130, 130)), at_least(Interval(16, 48)), at_least(Interval(208, float("inf")))
    ('130', '16–48', '208 or more')
    """
    if not interval.known or math.isinf(interval.low):
        return span(Interval(math.nan, math.nan))
    low = grouped(round(interval.low))
    if math.isinf(interval.high):
        return f"{low} or more"
    high = grouped(round(interval.high))
    return low if low == high else f"{low}–{high}"


def bands(advice: Advice) -> dict[str, Interval]:
    """Return what each criterion says of a matrix, in the order of `spectra.advice.CRITERIA`; unknown where it is mute.

    Parameters
    ----------
    advice : Advice
        Of one matrix.
    """
    return {name: Interval(advice[name].low, advice[name].high) for name in CRITERIA}


def _lines(table: pd.DataFrame) -> list[dict[str, float]]:
    return [{str(key): float(value) for key, value in line.items()} for line in table.to_dict("records")]


def _budget(line: Mapping[str, float]) -> Budget:
    return Budget(
        int(line["uniform_rank"]), int(line["parameters"]), _interval(line, "uniform"), _interval(line, "global")
    )


def _share(line: Mapping[str, float]) -> Share:
    names = ("uniform_rank", "uniform_parameters", "global_parameters")
    return Share(line["share"], *(_interval(line, name) for name in names))


def _interval(line: Mapping[str, float], name: str) -> Interval:
    return Interval(line[f"{name}_low"], line[f"{name}_high"])


def _energy(error: Interval) -> Interval:
    return Interval(1.0 - error.high**2, 1.0 - error.low**2)


def _sentences(budgets: Sequence[Budget], shares: Sequence[Share]) -> list[str]:
    share = next(one for one in shares if one.share == SAID_SHARE)
    text = (
        f"{percent(share.share)} of the squared norm of all matrices together takes rank {at_least(share.rank)} "
        f"everywhere, {at_least(share.uniform)} parameters, or {at_least(share.allocated)} where they help most"
    )
    if math.isinf(share.allocated.high):
        said = [f"{text}: the directions that are known hold less than that."]
    else:
        said = [text + (f" ({percent(share.saved)} fewer)." if share.saved > 0 else ".")]
    lossy = [budget for budget in budgets if budget.rank <= SAID_RANK and budget.uniform.high > _NOTHING]
    if lossy:
        budget = lossy[-1]
        said.append(
            f"Rank {budget.rank} everywhere, {grouped(budget.parameters)} parameters, leaves "
            f"{share_span(budget.uniform)} of the norm; as many where they help most leave "
            f"{share_span(budget.allocated)}."
        )
    return said
