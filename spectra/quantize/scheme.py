"""`Scheme`: how a tensor is quantized, as one value with one name: format, entries a scale, how scales are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from spectra.errors import UsageError
from spectra.quantize.formats import FORMATS, Format, as_format
from spectra.quantize.scales import ScaleStorage
from spectra.quantize.tensor import QuantizedTensor, quantize

_STORAGES = get_args(ScaleStorage)
_BLOCK, _STORAGE = 64, "double"  # QLoRA's; a name leaves them out
_SHAPE = "a scheme reads FORMAT, FORMAT/BLOCK or FORMAT/BLOCK/SCALES, as nf4, int4/128 or int8/row/fp32"


@dataclass(frozen=True)
class Scheme:
    """A format, the entries that share a scale, and how scales are stored.

    Attributes
    ----------
    format : Format
        Code book and scaling rule, or one that is fitted to each tensor.
    block : int or None
        Entries a scale, row-major over the tensor; None: a scale for every row of the last axis.
    scales : {"double", "fp32", "bf16"}
        Eight bits a scale, themselves scaled in blocks of 256; float32; bfloat16.

    Raises
    ------
    UsageError
        If the block is not positive or the storage unknown.

    Examples
    --------
    >>> scheme = Scheme.parse("int4/128/bf16")
    >>> scheme.name, scheme.quantize(torch.ones(64, 128)).bits_per_weight
    ('int4/128/bf16', 4.125)
    """

    format: Format
    block: int | None = _BLOCK
    scales: ScaleStorage = "double"

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise UsageError(f"a block of {self.block} entries; it needs at least one, and {_BLOCK} is usual")
        if self.scales not in _STORAGES:
            raise UsageError(f"unknown storage of scales {self.scales!r}; known are {', '.join(_STORAGES)}")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """A scheme by its name; what is left out is a block of 64 and double-quantized scales.

        Parameters
        ----------
        text : str
            ``"nf4"``, ``"int4/128"``, ``"int8/row/fp32"``, ``"nf4/64/bf16"``.

        Raises
        ------
        UsageError
            If a part of the name says nothing that is known; the message lists what is.

        Examples
        --------
        >>> Scheme.parse("nf4") == Scheme.parse("nf4/64/double")
        True
        >>> Scheme.parse("int8/row/fp32").block is None
        True
        """
        parts = text.strip().split("/")
        if parts[0] not in FORMATS:
            raise UsageError(f"scheme {text!r}: unknown format {parts[0]!r}; known are {', '.join(FORMATS)}")
        if len(parts) > 3:
            raise UsageError(f"scheme {text!r} has {len(parts)} parts; {_SHAPE}")
        block, storage = (parts[1:] + [str(_BLOCK), _STORAGE][len(parts) - 1 :])[:2]
        if block != "row" and not (block.isascii() and block.isdigit() and int(block) > 0):
            raise UsageError(f"scheme {text!r}: {block!r} is neither a number of entries nor row; {_SHAPE}")
        for known in _STORAGES:
            if storage == known:
                return cls(as_format(parts[0]), None if block == "row" else int(block), known)
        raise UsageError(f"scheme {text!r}: unknown storage of scales {storage!r}; known are {', '.join(_STORAGES)}")

    @property
    def name(self) -> str:
        """The shortest text that `parse` reads as this scheme.

        Examples
        --------
        >>> [Scheme.parse(text).name for text in ("nf4/64/double", "int4/128/double", "fp4/row/fp32")]
        ['nf4', 'int4/128', 'fp4/row/fp32']
        """
        block = "row" if self.block is None else str(self.block)
        if self.scales != _STORAGE:
            return f"{self.format.name}/{block}/{self.scales}"
        return self.format.name if self.block == _BLOCK else f"{self.format.name}/{block}"

    def quantize(self, tensor: torch.Tensor) -> QuantizedTensor:
        """The tensor in this scheme; `spectra.quantize.quantize` tells what is refused."""
        return quantize(tensor, self.format, block=self.block, scales=self.scales)

    def __str__(self) -> str:
        return self.name
