"""`Rule`: how many directions each matrix keeps, by itself or by one budget over the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spectra.advice import criteria
from spectra.errors import IncompleteSpectrum, UsageError
from spectra.extract.places import Place
from spectra.measures import energy_rank
from spectra.theory.allocation import allocate, for_energy, uniform_cost, uniform_rank
from spectra.values import Spectrum

# Names of the command's criteria, and those of `spectra.advice`.
CRITERIA = {
    "signal": "signal",
    "gavish-donoho": "gavish_donoho",
    "marchenko-pastur": "marchenko_pastur",
    "entropy": "entropy",
    "stable": "stable",
    "elbow": "elbow",
}
ALLOCATIONS = ("uniform", "global")

# A share that is kept exactly counts as kept, though both sums of up to 10⁵ terms were rounded.
_SUM_ERROR = 1e-12

Squares = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    r"""How many directions each matrix keeps; exactly one of the first four fields is given.

    Parameters
    ----------
    rank : int, optional
        So many in every matrix; with a global allocation, as many parameters as that takes, where they help most.
    energy : float, optional
        Share of ‖Δ‖²_F that every matrix keeps; with a global allocation, that the model as a whole keeps.
    parameters : int, optional
        Parameters that all factors may take together.
    criterion : str, optional
        One of `CRITERIA`, for each matrix by itself.
    allocation : {"uniform", "global"}, optional
        By default global for `parameters` and uniform otherwise.

    Raises
    ------
    UsageError
        If a field is out of range, none or several are given, or the allocation does not go with them.

    Examples
    --------
    >>> str(Rule(rank=8)), str(Rule(energy=0.9, allocation="global")), Rule(parameters=1000).whole_model
    ('rank 8 everywhere', 'the fewest parameters that keep 90\xa0% of the energy of the whole model', True)
    """

    rank: int | None = None
    energy: float | None = None
    parameters: int | None = None
    criterion: str | None = None
    allocation: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "parameters", "criterion") if getattr(self, name) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "none of them"
            raise UsageError(f"give one of rank, energy, parameters and criterion, not {told}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank = {self.rank}: a matrix keeps at least one direction")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise UsageError(f"energy = {self.energy}: it is a share, above 0 and at most 1 (0.9 keeps nine tenths)")
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise UsageError(f"criterion = {self.criterion!r}: it is one of {', '.join(CRITERIA)}")
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise UsageError(f"allocation = {self.allocation!r}: it is one of {', '.join(ALLOCATIONS)}")
        if self.criterion is not None and self.allocation == "global":
            raise UsageError(
                f"criterion = {self.criterion!r} looks at one matrix at a time and has no global allocation; give "
                "energy or parameters for that"
            )

    @property
    def whole_model(self) -> bool:
        """Whether the ranks of all matrices hang together, so that every spectrum is needed before any factor."""
        return self.allocation == "global" or self.parameters is not None

    @property
    def needs_values(self) -> bool:
        """Whether a matrix's own spectrum decides its rank."""
        return self.rank is None or self.whole_model

    def __str__(self) -> str:
        if self.rank is not None:
            even = f"rank {self.rank} everywhere"
            return f"the parameters of {even}, allocated globally" if self.whole_model else even
        if self.energy is not None:
            share = f"{self.energy:.10g}" if self.energy > 0.999 else f"{100 * self.energy:.4g}\xa0%"
            if self.whole_model:
                return f"the fewest parameters that keep {share} of the energy of the whole model"
            return f"{share} of the energy of every matrix"
        if self.parameters is not None:
            how = "the largest uniform rank" if self.allocation == "uniform" else "allocated globally"
            return f"{self.parameters:,} parameters, {how}"
        return f"criterion {self.criterion}"

    def words(self) -> list[str]:
        """The flags that ask for this rule."""
        name = next(n for n in ("rank", "energy", "parameters", "criterion") if getattr(self, n) is not None)
        return [f"--{name}", str(getattr(self, name)), *([f"--{self.allocation}"] if self.allocation else [])]

    def check(self, places: Sequence[Place]) -> None:
        """Refuse a budget that pays for no direction.

        Raises
        ------
        UsageError
            If `parameters` is below one direction of the cheapest matrix, or of every matrix where it is uniform.
        """
        if self.parameters is None:
            return
        cheapest = min(places, key=lambda place: place.cost)
        if self.parameters < cheapest.cost:
            raise UsageError(
                f"parameters = {self.parameters}: one direction of the cheapest matrix, {cheapest.name}, takes "
                f"{cheapest.cost}"
            )
        every = sum(place.cost for place in places)
        if self.allocation == "uniform" and self.parameters < every:
            raise UsageError(
                f"parameters = {self.parameters}: one direction of each of {len(places)} matrices takes {every}; leave "
                "uniform out, so that those that need it most get one"
            )

    def parameters_of(self, places: Sequence[Place]) -> int | None:
        """Parameters of the factors at most, where that is known before anything is read."""
        if self.parameters is not None:
            return self.parameters
        return None if self.rank is None else uniform_cost(_costs(places), self.rank, largest=_limits(places))

    def of_matrix(self, spectrum: Spectrum) -> int:
        """Rank that a matrix keeps by its own spectrum alone: `energy` or `criterion`.

        Parameters
        ----------
        spectrum : Spectrum
            Of its update.
        """
        if self.rank is not None:
            return min(self.rank, spectrum.rank_limit)
        return (
            by_energy(spectrum, self.energy)
            if self.energy is not None
            else by_criterion(spectrum, self.criterion or "")
        )

    def of_model(self, places: Sequence[Place], squares: Sequence[Squares], missing: Sequence[float]) -> list[int]:
        """Ranks of all matrices by one budget.

        Parameters
        ----------
        places : sequence of Place
        squares : sequence of ndarray
            σ² of each, descending, as far as they are known.
        missing : sequence of float
            Energy of each that lies in values past those known.
        """
        costs, limits = _costs(places), [len(known) for known in squares]
        if self.allocation == "uniform":
            rank = uniform_rank(costs, self.parameters or 0, largest=limits)
            return [min(rank, limit) for limit in limits]
        if self.energy is not None:
            totals = [float(np.sum(known)) + rest for known, rest in zip(squares, missing, strict=True)]
            held = 1.0 - math.fsum(missing) / math.fsum(totals)
            if self.energy > held + _SUM_ERROR:
                raise UsageError(
                    f"energy = {self.energy}: the directions that were found hold {held:.6f} of the energy of the "
                    "whole model; ask for less, or for each matrix by itself"
                )
            return [int(rank) for rank in for_energy(squares, costs, self.energy, totals=totals)]
        budget = self.parameters if self.parameters is not None else uniform_cost(costs, self.rank or 1, largest=limits)
        return [int(rank) for rank in allocate(squares, costs, budget)]


def by_energy(spectrum: Spectrum, share: float) -> int:
    """Least rank that keeps a share of ‖A‖²_F; all values known where even they do not.

    Parameters
    ----------
    spectrum : Spectrum
    share : float
        0 < share ≤ 1.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> by_energy(Spectrum(np.array([3.0, 1.0]), (2, 2), 10**0.5, Certificate("by hand")), 0.9)
    1
    """
    known = int(np.count_nonzero(spectrum.values))
    try:
        return min(energy_rank(spectrum, share), known)
    except IncompleteSpectrum:
        return known


def by_criterion(spectrum: Spectrum, criterion: str) -> int:
    """Rank by one of `CRITERIA`, rounded up; where the spectrum is truncated, the upper end of its band.

    Parameters
    ----------
    spectrum : Spectrum
    criterion : str

    Raises
    ------
    UsageError
        If the criterion says nothing of this spectrum: one of thin factors has no tail of noise, for instance.

    Examples
    --------
    >>> from spectra.values import Certificate
    >>> by_criterion(Spectrum(np.array([2.0, 1.0, 1.0]), (3, 3), 6**0.5, Certificate("by hand")), "stable")
    2
    """
    rank = criteria.CRITERIA[CRITERIA[criterion]](spectrum).rank
    return min(rank, int(np.count_nonzero(spectrum.values)))


def uniform_error(rank: int, squares: Sequence[Squares], missing: Sequence[float]) -> float:
    """Error of the best factors of one rank everywhere: √ of all energy past it.

    Parameters
    ----------
    rank : int
    squares : sequence of ndarray
        σ² of each matrix, descending.
    missing : sequence of float
        Energy of each past the values known.

    Examples
    --------
    >>> uniform_error(1, [np.array([9.0, 4.0]), np.array([1.0])], [0.0, 0.0])
    2.0
    """
    return math.sqrt(math.fsum(float(np.sum(known[rank:])) for known in squares) + math.fsum(missing))


def _costs(places: Sequence[Place]) -> list[int]:
    return [place.cost for place in places]


def _limits(places: Sequence[Place]) -> list[int]:
    return [min(place.delta.shape) for place in places if place.delta is not None]
