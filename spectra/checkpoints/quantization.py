"""`Quantization`: how a stored tensor was rounded to a few bits an entry before this package saw it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a tensor that is read dequantized was stored as.

    The dtype of such a tensor says what its values are rounded to when they are read; how far they lie from the
    weights that were quantized is decided by this.

    Attributes
    ----------
    format : str
        Code book or type: ``"nf4"``, ``"fp4"``, ``"int8"``, or GGUF's name in small letters, ``"q4_1"``, ``"q6_k"``.
    block : int or None
        Entries a scale, in row-major order; None for one scale a row. Of GGUF's K types the entries of a whole block,
        256, in which groups of 16 or 32 have scales of their own.
    double : bool
        Whether the scales are quantized too.

    Examples
    --------
    >>> str(Quantization("nf4", 64, double=True)), str(Quantization("int8", None))
    ('nf4 in blocks of 64 with quantized scales', 'int8 with a scale a row')
    """

    format: str
    block: int | None
    double: bool = False

    def __str__(self) -> str:
        where = "with a scale a row" if self.block is None else f"in blocks of {self.block}"
        return f"{self.format} {where}" + (" with quantized scales" if self.double else "")


def quantization_notes(file: str, found: Iterable[Quantization | None]) -> tuple[str, ...]:
    """One sentence on a file's quantized tensors; none where it has none.

    Parameters
    ----------
    file : str
        Its name.
    found : iterable of Quantization or None
        Of every tensor in it.

    Examples
    --------
    >>> quantization_notes("model.gguf", [None, Quantization("q8_0", 32), Quantization("q8_0", 32)])
    ('model.gguf: 2 of 3 tensors are quantized (q8_0 in blocks of 32: 2) and are read dequantized: ...',)
    """
    counts = Counter(found)
    plain = counts.pop(None, 0)
    if not counts:
        return ()
    kinds = ", ".join(f"{quantization}: {count}" for quantization, count in counts.most_common())
    total = counts.total()
    return (
        f"{file}: {total} of {total + plain} tensors are quantized ({kinds}) and are read dequantized: "
        "what rounding them did is part of every update that is measured from them",
    )
