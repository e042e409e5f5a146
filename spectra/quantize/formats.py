"""`Format`: a code book and its scaling rule, as a value; the formats that are known by name.

A format says which numbers a code stands for, and what is done to a block of weights before its entries are rounded to
them. It says nothing about block sizes, packing or devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from spectra.errors import UsageError

_SCALINGS = ("absmax", "affine")
_WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Format:
    """A code book with its scaling rule.

    Attributes
    ----------
    name : str
        ``"nf4"``, for instance.
    bits : int
        Bits a code, 2 to 8.
    levels : tuple of float
        2^bits numbers, by code, in any order; equal ones may stand for one another. Empty: the code book is fitted to
        each tensor and kept with it.
    scaling : {"absmax", "affine"}
        ``"absmax"``: a block is divided by its largest absolute entry, and levels lie in [−1, 1]. ``"affine"``: its
        least entry is taken off and the rest is divided by its span, and levels lie in [0, 1].

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
            raise UsageError(f"format {self.name!r}: {self.bits} bits a code; codes take 2 to 8")
        if self.scaling not in _SCALINGS:
            raise UsageError(f"format {self.name!r}: scaling {self.scaling!r} is none of {', '.join(_SCALINGS)}")
        if len(self.levels) not in (0, 2**self.bits):
            raise UsageError(f"format {self.name!r}: {len(self.levels)} levels for {self.bits} bits")
        least = 0.0 if self.affine else -1.0
        if not all(least <= level <= 1.0 for level in self.levels):  # NaN is no number between
            raise UsageError(f"format {self.name!r}: levels are numbers in [{least:.0f}, 1]".replace("-", "−"))

    @property
    def affine(self) -> bool:
        """Whether a block keeps its least entry beside its scale."""
        return self.scaling == "affine"

    @property
    def fitted(self) -> bool:
        """Whether each tensor has a code book of its own."""
        return not self.levels

    @property
    def order(self) -> tuple[int, ...]:
        """Codes by ascending level; of equal levels the smaller code first."""
        return tuple(sorted(range(len(self.levels)), key=self.levels.__getitem__))


def normal_float(name: str, bits: int) -> Format:
    r"""Quantiles of the normal distribution: 2^{bits−1} negative levels, zero, and one fewer positive ones.

    The positive half takes the quantiles of 2^{bits−1} + 1 even steps of probability between δ and ½, the negative
    one those of 2^{bits−1}, less the ½ that both share and that is zero; all are divided by the largest. δ is the
    mean of 1/2^{bits+1} and 1/(2^{bits+1} − 2), so that the outermost of 2^bits, or of 2^bits − 1, equal shares of
    probability is halved (Dettmers et al. [1]_, equation 4, in its asymmetric form with an exact zero).

    References
    ----------
    .. [1] T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3, appendix E.

    Examples
    --------
    >>> [round(level, 4) for level in normal_float("nf3", 3).levels]
    [-1.0, -0.535, -0.2469, 0.0, 0.1833, 0.382, 0.623, 1.0]
    """
    half, outermost = 2 ** (bits - 1), (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    above = -ndtri(np.linspace(outermost, 0.5, half + 1)[:-1])
    below = ndtri(np.linspace(outermost, 0.5, half)[:-1])
    levels = np.concatenate([below, [0.0], above[::-1]]) / above[0]
    return Format(name, bits, tuple(levels.astype(np.float32).tolist()))


# As published (QLoRA, appendix E), the bits of float32: `normal_float` gives the same to 3e-7, for its quantiles are
# taken at probabilities that were not rounded to float32 on the way.
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
NF3 = normal_float("nf3", 3)
NF2 = normal_float("nf2", 2)

# Sign, two bits of exponent, one of mantissa, as bitsandbytes numbers them: code 8 is a zero with a sign.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = Format("fp4", 4, tuple(sign * m / 12.0 for sign in (1.0, -1.0) for m in _FP4_MAGNITUDES))

# AbnormalFloat for blocks of 64, as published (D. Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's
# Good)", 2023): −1, 0 and 1, and levels between them that are the medians of their cells where normal entries are
# divided by the largest of 64, which makes the absolute error least. Cells of the innermost levels begin at zero, as
# though it were none: it was put in afterwards.
AF4 = Format(
    "af4",
    4,
    (
        -1.0,
        -0.69441008,
        -0.51243739,
        -0.3736951,
        -0.25607552,
        -0.14982478,
        -0.04934812,
        0.0,
        0.04273164,
        0.12934483,
        0.21961274,
        0.31675666,
        0.42563882,
        0.55496234,
        0.72424863,
        1.0,
    ),
)


def symmetric(name: str, bits: int) -> Format:
    """Evenly spaced levels k/(2^{bits−1} − 1), zero among them; the last code repeats 1, so that ±1 are both levels.

    Examples
    --------
    >>> symmetric("int4", 4).levels[6:9], len(set(symmetric("int4", 4).levels))
    ((-0.14285714285714285, 0.0, 0.14285714285714285), 15)
    """
    top = 2 ** (bits - 1) - 1
    return Format(name, bits, (*(k / top for k in range(-top, top + 1)), 1.0))


def affine(name: str, bits: int) -> Format:
    """Evenly spaced levels k/(2^bits − 1) from a block's least entry to its largest.

    A block's step is its scale, which is its span, over 2^bits − 1; its zero point is its least entry.

    Examples
    --------
    >>> affine("int2-affine", 2).levels
    (0.0, 0.3333333333333333, 0.6666666666666666, 1.0)
    """
    top = 2**bits - 1
    return Format(name, bits, tuple(k / top for k in range(top + 1)), "affine")


INT4 = symmetric("int4", 4)
INT8 = symmetric("int8", 8)

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        NF4,
        NF3,
        NF2,
        FP4,
        AF4,
        *(symmetric(f"int{bits}", bits) for bits in (2, 3)),
        INT4,
        *(symmetric(f"int{bits}", bits) for bits in (5, 6, 7)),
        INT8,
        *(affine(f"int{bits}-affine", bits) for bits in _WIDTHS),
        *(Format(f"lloyd{bits}", bits, ()) for bits in (2, 3, 4)),
    )
}


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
