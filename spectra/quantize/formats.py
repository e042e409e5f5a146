"""`Format`: a code book and its scaling rule, as a value; the formats that are known by name.

A format says which numbers in [−1, 1] a code stands for, and what a block of weights is divided by before its entries
are rounded to them. It says nothing about block sizes, packing or devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.errors import UsageError

_SCALINGS = ("absmax",)
_WIDTHS = (4, 8)


@dataclass(frozen=True)
class Format:
    """A code book with its scaling rule.

    Attributes
    ----------
    name : str
        ``"nf4"``, for instance.
    bits : int
        Bits a code: 4 or 8, so that whole codes fill a byte.
    levels : tuple of float
        2^bits numbers in [−1, 1], by code, in any order; equal ones may stand for one another.
    scaling : {"absmax"}
        What a block is divided by: its largest absolute entry.

    Raises
    ------
    UsageError
        If the levels do not fit the bits or the interval, or a rule is unknown.

    Examples
    --------
    >>> NF4.bits, NF4.levels[0], NF4.levels[7], NF4.levels[15]
    (4, -1.0, 0.0, 1.0)
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    scaling: str = "absmax"

    def __post_init__(self) -> None:
        if self.bits not in _WIDTHS:
            raise UsageError(f"format {self.name!r}: {self.bits} bits a code; whole codes must fill a byte: 4 or 8")
        if len(self.levels) != 2**self.bits:
            raise UsageError(f"format {self.name!r}: {len(self.levels)} levels for {self.bits} bits")
        if not all(math.isfinite(level) and abs(level) <= 1.0 for level in self.levels):
            raise UsageError(f"format {self.name!r}: levels are numbers in [−1, 1]")
        if self.scaling not in _SCALINGS:
            raise UsageError(f"format {self.name!r}: scaling {self.scaling!r} is none of {', '.join(_SCALINGS)}")

    @property
    def order(self) -> tuple[int, ...]:
        """Codes by ascending level; of equal levels the smaller code first."""
        return tuple(sorted(range(len(self.levels)), key=self.levels.__getitem__))


# Quantiles of the normal distribution (Dettmers et al., "QLoRA", NeurIPS 2023, eq. 4 and appendix E), in float32.
NF4 = Format(
    "nf4",
    4,
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# Sign, two bits of exponent, one of mantissa, as bitsandbytes numbers them: code 8 is a zero with a sign.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = Format("fp4", 4, tuple(sign * m / 12.0 for sign in (1.0, -1.0) for m in _FP4_MAGNITUDES))


def symmetric(name: str, bits: int) -> Format:
    """Evenly spaced levels k/(2^{bits−1} − 1), zero among them; the last code repeats 1, so that ±1 are both levels.

    Examples
    --------
    >>> symmetric("int4", 4).levels[6:9], len(set(symmetric("int4", 4).levels))
    ((-0.14285714285714285, 0.0, 0.14285714285714285), 15)
    """
    top = 2 ** (bits - 1) - 1
    return Format(name, bits, (*(k / top for k in range(-top, top + 1)), 1.0))


INT4 = symmetric("int4", 4)
INT8 = symmetric("int8", 8)

FORMATS: dict[str, Format] = {f.name: f for f in (NF4, FP4, INT4, INT8)}


def as_format(format: str | Format) -> Format:
    """A format by its name, or itself.

    Raises
    ------
    UsageError
        If no format has the name; the message lists those there are.

    Examples
    --------
    >>> as_format("fp4") is FP4
    True
    """
    if isinstance(format, Format):
        return format
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    return FORMATS[format]
