"""`advise_model`: how many directions a whole model needs, and which matrices should have them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spectra.advice.criteria import CRITERIA, ENERGY_SHARES, LABELS
from spectra.advice.matrix import Advice, advise
from spectra.errors import UsageError
from spectra.notebook import inline_svg, new_axes
from spectra.theory.allocation import ErrorCurve, allocate, error_curve, for_energy, uniform_cost
from spectra.values import Spectrum, Vector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from spectra.run import Run

# Ranks that adapters are trained at: a budget is what one of them costs everywhere.
LADDER = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class ModelAdvice:
    """How many directions each matrix of a model needs, and what a budget of parameters buys over all of them.

    Parameters
    ----------
    spectra : mapping of str to Spectrum
        Of the updates, by name.
    matrices : mapping of str to Advice
        What every criterion says of each.
    curve : ErrorCurve
        Error at what the uniform ranks `ladder` cost, allocated at its best and equally.
    ladder : tuple of int
        Uniform ranks.
    """

    spectra: Mapping[str, Spectrum]
    matrices: Mapping[str, Advice]
    curve: ErrorCurve
    ladder: tuple[int, ...]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a matrix.

        ``name, rows, cols, cost`` (parameters of a direction), ``frobenius``; for every criterion its value, NaN where
        it is only bounded or does not apply, and ``…_low``, ``…_high``; ``global_r1`` …: its rank where the parameters
        of that uniform rank are allocated at their best.
        """
        rows = []
        for position, (name, advice) in enumerate(self.matrices.items()):
            row: dict[str, Any] = {"name": name, "rows": advice.shape[0], "cols": advice.shape[1]}
            row |= {"cost": sum(advice.shape), "frobenius": advice.frobenius}
            for criterion, band in advice.bands.items():
                row |= {criterion: band.value, f"{criterion}_low": band.low, f"{criterion}_high": band.high}
            row |= {f"global_r{rank}": int(self.curve.ranks[at, position]) for at, rank in enumerate(self.ladder)}
            rows.append(row)
        return _table(rows)

    @cached_property
    def budgets(self) -> pd.DataFrame:
        """One row a uniform rank: its parameters, and the relative error of the whole model.

        ``global_low, global_high``: allocated at its best; ``uniform_low, uniform_high``: equally; ``least``: no ranks
        have less at that budget, not even with directions past those known.
        """
        curve = self.curve
        return _table(
            {
                "uniform_rank": self.ladder,
                "parameters": curve.budgets,
                "global_low": curve.low,
                "global_high": curve.high,
                "uniform_low": curve.uniform_low,
                "uniform_high": curve.uniform_high,
                "least": curve.least,
            }
        )

    @cached_property
    def shares(self) -> pd.DataFrame:
        """One row a share of the energy: the least uniform rank and the fewest parameters that keep it.

        ``…_low`` and ``…_high`` contain the truth; ``high`` is infinite where the known directions do not hold it.
        """
        complete = all(found.complete for found in self.spectra.values())
        ends = {"high": self._known} if complete else {"low": self._most, "high": self._known}
        rows = []
        for share in ENERGY_SHARES:
            needs = {}
            for end, energies in ends.items():
                rank = self._uniform_for(energies, share)
                needs[end] = (rank, self._uniform_cost(rank), self._global_for(energies, share))
            row: dict[str, Any] = {"share": share}
            for i, name in enumerate(("uniform_rank", "uniform_parameters", "global_parameters")):
                row |= {f"{name}_{end}": needs.get(end, needs["high"])[i] for end in ("low", "high")}
            rows.append(row)
        return _table(rows)

    @cached_property
    def criteria(self) -> pd.DataFrame:
        """One row a criterion that applies everywhere: what its ranks cost, their error, the best at that cost.

        Ranks are those to be certain (`Band.rank`), as far as directions are known; errors are upper ends.
        """
        rows = []
        for criterion in CRITERIA:
            bands = [advice[criterion] for advice in self.matrices.values() if advice.frobenius > 0.0]
            if not bands or not all(band.applies for band in bands):
                continue
            ranks = self.by_criterion(criterion)
            parameters = sum(self._costs[m] * rank for m, rank in enumerate(ranks.values()))
            left = math.fsum(
                max(0.0, t - float(np.sum(k))) + float(np.sum(k[r:])) for t, k, r in self._held(ranks.values())
            )
            best = error_curve(self._known, self._costs, [parameters], totals=self._totals)
            row = {"criterion": criterion, "parameters": parameters, "error": _root(left, self._total)}
            rows.append(row | {"global_error": float(best.high[0])})
        return _table(rows, columns=["criterion", "parameters", "error", "global_error"])

    def allocate(self, parameters: int) -> dict[str, int]:
        """Ranks by name that lose least under a budget.

        Parameters
        ----------
        parameters : int
            Of all factors together: a direction costs rows + cols.
        """
        return self._named(allocate(self._known, self._costs, parameters))

    def for_energy(self, share: float) -> dict[str, int]:
        """Ranks by name that keep a share of the energy of the whole model with the fewest parameters.

        Parameters
        ----------
        share : float
            In (0, 1].

        Raises
        ------
        UsageError
            If the known directions do not hold that share.
        """
        return self._named(for_energy(self._known, self._costs, share, totals=self._totals))

    def by_criterion(self, criterion: str) -> dict[str, int]:
        """Ranks by name that one criterion asks for, to be certain, as far as directions are known.

        Parameters
        ----------
        criterion : str
            One of `spectra.advice.CRITERIA`.

        Raises
        ------
        UsageError
            If there is no such criterion, or it does not apply to a matrix.
        """
        if criterion not in CRITERIA:
            raise UsageError(f"criterion = {criterion!r}: it is one of {', '.join(CRITERIA)}")
        return {
            name: min(self.matrices[name][criterion].rank, len(found.values)) if found.frobenius > 0.0 else 0
            for name, found in self.spectra.items()
        }

    @property
    def verdict(self) -> str:
        """What allocating over the model buys, in one sentence."""
        row = self.shares[self.shares.share == 0.9].iloc[0]
        if self._total == 0.0:
            return "Nothing changed: no direction is needed."
        if math.isinf(row.global_parameters_high):
            return "The directions that are known hold less than 90\xa0% of the energy: ask for more of each spectrum."
        saved = 1.0 - row.global_parameters_high / row.uniform_parameters_high
        return (
            f"90\xa0% of the energy of the whole model takes rank {int(row.uniform_rank_high)} everywhere "
            f"({int(row.uniform_parameters_high):,} parameters), or {int(row.global_parameters_high):,} parameters "
            f"where they help most: {100 * saved:.0f}\xa0% fewer."
        )

    @property
    def plot(self) -> ModelAdvicePlots:
        """Plots: ``advice.plot.budgets()`` and ``advice.plot.criteria()``."""
        return ModelAdvicePlots(self)

    def _repr_html_(self) -> str:
        """Give a card: the verdict, errors by budget, what keeps each share, and a picture."""
        shown = (self.budgets, self.shares, self.criteria)
        tables = "".join(t.to_html(index=False, border=0, float_format=lambda v: f"{v:.4g}") for t in shown)
        picture = inline_svg(self.plot.budgets)
        return f"<h4>How many directions</h4><p>{html.escape(self.verdict)}</p>{tables}{picture}"

    # What is known of the energies -----------------------------------------------------------------------------

    @cached_property
    def _costs(self) -> list[int]:
        return [sum(found.shape) for found in self.spectra.values()]

    @cached_property
    def _known(self) -> list[Vector]:
        return [energies(found)[0] for found in self.spectra.values()]

    @cached_property
    def _most(self) -> list[Vector]:
        return [energies(found)[1] for found in self.spectra.values()]

    @cached_property
    def _totals(self) -> list[float]:
        return [energies(found)[2] for found in self.spectra.values()]

    @property
    def _total(self) -> float:
        return math.fsum(self._totals)

    def _held(self, ranks: Any) -> Any:
        return zip(self._totals, self._known, ranks, strict=True)

    def _named(self, ranks: NDArray[np.int64]) -> dict[str, int]:
        return {name: int(rank) for name, rank in zip(self.spectra, ranks, strict=True)}

    def _uniform_cost(self, rank: float) -> float:
        largest = [len(most) for most in self._most]
        return rank if math.isinf(rank) else float(uniform_cost(self._costs, int(rank), largest=largest))

    def _uniform_for(self, energies: Sequence[Vector], share: float) -> float:
        """Least equal rank whose directions hold a share, by these energies; infinite where none does."""
        longest = max(map(len, energies), default=0)
        padded = np.zeros(longest)
        for one in energies:
            padded[: len(one)] += one
        enough = share * self._total * (1.0 - 1e-12)  # a share that is kept exactly counts, though sums are rounded
        reached = np.flatnonzero(np.cumsum(np.append(0.0, padded)) >= enough)
        return float(reached[0]) if len(reached) else math.inf

    def _global_for(self, energies: Sequence[Vector], share: float) -> float:
        try:
            ranks = for_energy(energies, self._costs, share, totals=self._totals)
        except UsageError:
            return math.inf
        return float(np.dot(ranks, self._costs))


def advise_model(spectra: Mapping[str, Spectrum], *, ladder: Sequence[int] = LADDER) -> ModelAdvice:
    """Ask every criterion of every matrix, and allocate the parameters that uniform ranks cost.

    Parameters
    ----------
    spectra : mapping of str to Spectrum
        Of the updates, by name.
    ladder : sequence of int
        Uniform ranks whose cost is a budget. Those past every known spectrum are left out.

    Returns
    -------
    ModelAdvice

    Raises
    ------
    UsageError
        If there is no spectrum.

    Examples
    --------
    >>> from spectra import spectrum
    >>> spectra = {"a": spectrum(np.diag([4.0, 3.0, 2.0])), "b": spectrum(np.diag([1.0, 1.0, 1.0]))}
    >>> advice = advise_model(spectra, ladder=(1,))
    >>> advice.allocate(12), advice.frame.global_r1.tolist(), advice.budgets.round(3).uniform_high.tolist()
    ({'a': 2, 'b': 0}, [2, 0], [0.685])
    """
    if not spectra:
        raise UsageError("no spectra were given: nothing to advise on")
    parts = [energies(found) for found in spectra.values()]
    known, most, totals = zip(*parts, strict=True)
    costs = [sum(found.shape) for found in spectra.values()]
    longest = max(map(len, known))
    steps = tuple(rank for rank in ladder if rank <= longest) or (max(longest, 1),)
    limits = [len(one) for one in known]
    curve = error_curve(
        known,
        costs,
        [uniform_cost(costs, rank, largest=limits) for rank in steps],
        high=None if all(found.complete for found in spectra.values()) else most,
        totals=totals,
    )
    return ModelAdvice(dict(spectra), {name: advise(found) for name, found in spectra.items()}, curve, steps)


def advise_run(
    run: Run, *, include: str | None = None, exclude: str | None = None, ladder: Sequence[int] = LADDER
) -> ModelAdvice:
    """`advise_model` of the spectra of a saved comparison.

    Parameters
    ----------
    run : Run
    include, exclude : str, optional
        Regular expressions searched for in the names.
    ladder : sequence of int
        As in `advise_model`.

    Raises
    ------
    UsageError
        If no tensor of that name has a spectrum, or an expression is none.
    """
    chosen, refused = _pattern(include, "include"), _pattern(exclude, "exclude")
    frame = run.frame
    names = [str(name) for name in frame.name[frame.singular_values.map(len) > 0]]
    names = [n for n in names if (chosen is None or chosen.search(n)) and not (refused and refused.search(n))]
    if not names:
        raise UsageError(
            f"of {len(frame)} tensors none with a spectrum has a name that include = {include!r} and "
            f"exclude = {exclude!r} leave; run.frame.name lists them"
        )
    return advise_model({name: run.spectrum(name) for name in names}, ladder=ladder)


def _table(rows: Any, columns: list[str] | None = None) -> pd.DataFrame:
    import pandas as pd  # slow to load, and only tables need it

    table: pd.DataFrame = pd.DataFrame(rows, columns=columns)
    return table


def _pattern(expression: str | None, name: str) -> re.Pattern[str] | None:
    try:
        return None if expression is None else re.compile(expression)
    except re.error as error:
        raise UsageError(f"{name} = {expression!r} is no regular expression: {error}") from None


def energies(spectrum: Spectrum) -> tuple[Vector, Vector, float]:
    """σ² as known, upper bounds on all σ², and ‖A‖²_F.

    Parameters
    ----------
    spectrum : Spectrum

    Returns
    -------
    known : ndarray of shape (k,), float64
        Lower bounds on σ_1² …, descending; σ² themselves, but for zeros, where the spectrum is complete.
    most : ndarray of shape (≥ k,), float64
        Upper bounds, descending: what is left out packed into as few values as can hold it.
    total : float

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> vectors_known = Certificate("by hand", gap=2**0.5, tail_norm=1.0, upper=np.array([3.0]))
    >>> known, most, total = energies(Spectrum(np.array([3.0]), (4, 4), 11**0.5, vectors_known))
    >>> known.round(9).tolist(), most.round(9).tolist(), round(total, 9)
    ([9.0], [9.0, 1.0, 1.0, 0.0], 11.0)
    """
    if spectrum.complete:
        squares = (
            spectrum.values[spectrum.values > 0.0] ** 2
        )  # an adapter's: a direction that is not there costs nothing
        return squares, squares, float(np.sum(squares))
    low, high = spectrum.interval()
    # σ descend, so that a bound on one bounds all later ones from above, and all earlier ones from below.
    known: Vector = np.maximum.accumulate(low[::-1])[::-1] ** 2
    upper: Vector = np.minimum.accumulate(high) ** 2
    total = max(spectrum.frobenius**2, float(np.sum(known)))
    largest = min([(spectrum.tail_limit() + spectrum.certificate.roundoff) ** 2, *upper[-1:]])
    left = total - float(np.sum(known))
    if not largest > 0.0 or not left > 0.0:
        return known, upper, total
    whole = min(int(left / largest), spectrum.rank_limit - len(known))
    rest = [left - whole * largest] if whole < spectrum.rank_limit - len(known) else []
    return known, np.concatenate([upper, np.full(whole, largest), rest]), total


def _root(squared: float, total: float) -> float:
    return math.sqrt(min(1.0, max(0.0, squared / total))) if total > 0 else math.nan


@dataclass(frozen=True)
class ModelAdvicePlots:
    """Axes-level plots of a model's advice; each takes an optional ``ax`` and returns it."""

    advice: ModelAdvice

    def budgets(self, *, ax: Axes | None = None) -> Axes:
        """Error of the whole model against parameters, allocated at its best and equally."""
        from spectra.plot.advice import plot_budgets

        ax = new_axes() if ax is None else ax
        curve = self.advice.curve
        uniform = curve.uniform_low, curve.uniform_high
        least = None if all(found.complete for found in self.advice.spectra.values()) else curve.least
        plot_budgets(ax, curve.budgets, (curve.low, curve.high), uniform, ranks=self.advice.ladder, least=least)
        return ax

    def criteria(self, *, ax: Axes | None = None) -> Axes:
        """What every criterion says of every matrix."""
        from spectra.plot.advice import plot_criteria

        ax = new_axes() if ax is None else ax
        bands = [[advice[c] for advice in self.advice.matrices.values()] for c in CRITERIA]
        low, high = ([[getattr(band, end) for band in row] for row in bands] for end in ("low", "high"))
        plot_criteria(ax, [LABELS[c] for c in CRITERIA], low, high)
        return ax
