"""`advise`: what every criterion says of one spectrum, where they disagree, and what that means."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from spectra.advice.criteria import CRITERIA, LABELS, Band
from spectra.values import Spectrum

# Two criteria are said to agree within this factor: ranks are chosen in steps of two.
AGREEMENT = 2.0


@dataclass(frozen=True)
class Advice:
    """How many directions one matrix needs, by every criterion.

    Parameters
    ----------
    shape : tuple of int
        (rows, cols).
    frobenius : float
        ‖Δ‖_F.
    bands : mapping of str to Band
        By name, as in `spectra.advice.CRITERIA`.

    Examples
    --------
    >>> import numpy as np
    >>> from spectra import spectrum
    >>> advice = advise(spectrum(np.diag([9.0, 8.0, 7.0] + [0.1] * 57)))
    >>> advice["energy_95"].rank, advice["elbow"].rank, str(advice["stable"])
    (3, 3, '2.4')
    """

    shape: tuple[int, int]
    frobenius: float
    bands: Mapping[str, Band]

    def __getitem__(self, criterion: str) -> Band:
        return self.bands[criterion]

    @property
    def spread(self) -> tuple[int, int]:
        """Fewest and most directions that any criterion asks for, each to be certain (`Band.rank`)."""
        ranks = [band.rank for band in self.bands.values() if band.applies]
        return min(ranks), max(ranks)

    @property
    def verdict(self) -> str:
        """Which criteria disagree most, and what that means, in one sentence."""
        return _verdict(self)

    def __str__(self) -> str:
        width = max(len(label) for label in LABELS.values())
        lines = [f"{LABELS[name]:<{width}}  {band}" for name, band in self.bands.items()]
        return "\n".join([*lines, self.verdict])

    def _repr_html_(self) -> str:
        """Give a table of the criteria, and the verdict below."""
        rows = "".join(
            f'<tr title="{html.escape(band.reason)}"><td>{html.escape(LABELS[name])}</td><td>{band}</td></tr>'
            for name, band in self.bands.items()
        )
        head = f"<b>How many directions</b> of a {self.shape[0]} × {self.shape[1]} matrix"
        return f"<div>{head}<table>{rows}</table><p>{html.escape(self.verdict)}</p></div>"


def advise(spectrum: Spectrum) -> Advice:
    """Ask every criterion how many directions a matrix needs.

    Parameters
    ----------
    spectrum : Spectrum
        Of an update. Where it is truncated, each answer is a band that holds the true one.

    Returns
    -------
    Advice

    Examples
    --------
    >>> from spectra import spectrum
    >>> import numpy as np
    >>> noise = np.random.default_rng(0).standard_normal((120, 80))
    >>> noise[0, 0] += 300.0
    >>> str(advise(spectrum(noise))["gavish_donoho"])
    '1'
    """
    bands = {name: criterion(spectrum) for name, criterion in CRITERIA.items()}
    return Advice(spectrum.shape, spectrum.frobenius, bands)


def _verdict(advice: Advice) -> str:
    """Name the disagreement that matters most: with rounding, with noise, with a long tail; or none."""
    if advice.frobenius == 0.0:
        return "Nothing changed: no direction is needed."
    wanted, signal, noise = advice["energy_90"], advice["signal"], advice["gavish_donoho"]
    if signal.applies and wanted.low > signal.high:
        return (
            f"90\xa0% of the energy takes {wanted} directions but only {signal} stand above what rounding to the "
            "stored dtype can make: the rest of that energy may be rounding, and keeping it may keep nothing of the "
            "training."
        )
    if noise.applies and wanted.low > AGREEMENT * max(noise.high, 1.0):
        return (
            f"90\xa0% of the energy takes {wanted} directions but only {noise} pass Gavish and Donoho's threshold: "
            "most of the energy lies in a tail that looks like noise, so a low rank loses much of the norm, and "
            "perhaps little of what was learned."
        )
    entropy, stable = advice["entropy"], advice["stable"]
    if entropy.low > AGREEMENT * stable.high and wanted.low > AGREEMENT * stable.high:
        return (
            f"A few directions dominate (stable rank {stable}) but 90\xa0% of the energy takes {wanted}: the spectrum "
            "has a long tail, and what is kept grows slowly with the rank."
        )
    return (
        f"The criteria that look at rounding, noise and tail do not contradict the {wanted} directions that hold "
        "90\xa0% of the energy."
    )
