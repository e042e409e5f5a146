"""Scales of blocks: one float32 or bfloat16 each, or eight bits each by double quantization; with a minimum beside.

Double quantization (Dettmers et al., "QLoRA", NeurIPS 2023, section 3) takes the scales' mean off, rounds what is
left to an 8-bit code book with blocks of 256, and keeps one float32 a block of scales: 8/64 + 32/(64·256) = 0.127
bits a weight at blocks of 64, in place of 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch

from spectra.errors import UsageError
from spectra.quantize.formats import Format
from spectra.quantize.rounding import boundaries

ScaleStorage = Literal["double", "fp32", "bf16"]

SCALES_A_BLOCK = 256

# Smallest scale that is divided by, as in bitsandbytes: a block of smaller numbers shrinks to zeros.
LEAST_SCALE = 1e-38

# Blocks rounded at a time: 24576 scales, which torch does not split over cores (see `spectra.linalg.threads`).
_BLOCKS_AT_ONCE = 96

# bitsandbytes' CPU build rounds to one of 65536 even steps first and then to the nearest level; so does this.
_STEPS = 65535


class Scales(Protocol):
    """What dequantization needs of a block's scale, however it is stored."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def values(self) -> torch.Tensor:
        """Scales, (blocks,) float32."""
        ...

    def minima(self) -> torch.Tensor | None:
        """What is added to a block's scaled levels, (blocks,) float32; None where nothing is."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        ...

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Scales:
        """The same scales with every stored tensor changed, moved to a device for instance."""
        ...


@dataclass(frozen=True, eq=False)
class PlainScales:
    """One float32 or bfloat16 a block.

    Attributes
    ----------
    absmax : Tensor of shape (blocks,), float32 or bfloat16
    """

    absmax: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.absmax.nbytes

    def values(self) -> torch.Tensor:
        """Scales, (blocks,) float32."""
        return self.absmax.float()

    def minima(self) -> None:
        """None: levels are scaled alone."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        return {"absmax": self.absmax}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PlainScales:
        """The same scales with every stored tensor changed."""
        return PlainScales(change(self.absmax))


@dataclass(frozen=True, eq=False)
class DoubleScales:
    """Eight bits a block, themselves scaled in blocks of 256 about their mean.

    Attributes
    ----------
    absmax : Tensor of shape (blocks,), uint8
        Codes of `dynamic_map`.
    nested_absmax : Tensor of shape (⌈blocks/256⌉,), float32
    offset : Tensor of shape (), float32
        Mean of the scales.
    """

    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, absmax: torch.Tensor) -> DoubleScales:
        """Quantize (blocks,) float32 scales."""
        offset = absmax.mean()  # in float32, as bitsandbytes has it; of enormous scales the sum overflows
        if not bool(torch.isfinite(offset)):
            offset = absmax.double().mean().float()
        pieces = [_rounded(blocks) for blocks in torch.split(_in_blocks(absmax - offset), _BLOCKS_AT_ONCE)]
        codes = torch.cat([codes for codes, _ in pieces]).flatten()[: len(absmax)]
        return cls(codes.clone(), torch.cat([largest for _, largest in pieces]), offset)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.absmax.nbytes + self.nested_absmax.nbytes + self.offset.nbytes

    def values(self) -> torch.Tensor:
        """Scales, (blocks,) float32."""
        levels = _levels(self.absmax.device).index_select(0, self.absmax.to(torch.int32))
        scaled = _in_blocks(levels) * self.nested_absmax[:, None]
        return scaled.flatten()[: len(self.absmax)] + self.offset

    def minima(self) -> None:
        """None: levels are scaled alone."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        return {"absmax": self.absmax, "nested_absmax": self.nested_absmax, "offset": self.offset}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> DoubleScales:
        """The same scales with every stored tensor changed."""
        return DoubleScales(change(self.absmax), change(self.nested_absmax), change(self.offset))


@dataclass(frozen=True, eq=False)
class AffineScales:
    """A span and a minimum a block, stored alike.

    Attributes
    ----------
    span : PlainScales or DoubleScales
        What a block's levels, 0 to 1, are multiplied by.
    minimum : PlainScales or DoubleScales
        What is added to them then.
    """

    span: PlainScales | DoubleScales
    minimum: PlainScales | DoubleScales

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.span.nbytes + self.minimum.nbytes

    def values(self) -> torch.Tensor:
        """Spans, (blocks,) float32, none negative."""
        return self.span.values().clamp_min(0.0)

    def minima(self) -> torch.Tensor:
        """Minima, (blocks,) float32."""
        return self.minimum.values()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        return self.span.tensors() | {_MINIMUM + name: t for name, t in self.minimum.tensors().items()}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AffineScales:
        """The same scales with every stored tensor changed."""
        return AffineScales(self.span.map(change), self.minimum.map(change))


_MINIMUM = "minimum_"


def store(values: torch.Tensor, storage: ScaleStorage) -> PlainScales | DoubleScales:
    """Keep the scales of absmax formats in a storage.

    bfloat16 takes the nearest. A block's largest entry may then stand out of its levels by 2⁻⁸ of the scale, and is
    rounded to the outermost one: half a gap of eight even bits is 1/254, so that no entry is further off than half a
    gap, in any format. Rounding up would let none stand out, and cost more than it saved: with normal entries and
    blocks of 64, 0.3 % of the squared error of NF4 and 2.5 % of INT8's, against 0.0001 % and 0.9 %.

    Parameters
    ----------
    values : Tensor of shape (blocks,), float32
        Finite and not negative.
    storage : {"double", "fp32", "bf16"}

    Examples
    --------
    >>> store(torch.tensor([1.0, 1.001]), "bf16").values()
    tensor([1., 1.])
    """
    if storage == "double":
        return DoubleScales.of(values)
    if storage == "fp32":
        return PlainScales(values)
    return PlainScales(values.clamp_max(torch.finfo(torch.bfloat16).max).to(torch.bfloat16))


def store_affine(low: torch.Tensor, high: torch.Tensor, storage: ScaleStorage) -> AffineScales:
    """Keep least and largest entries as minima and spans.

    In bfloat16 a minimum is rounded down, and a span, which reaches from there to the largest entry, up: what a
    minimum far from zero loses may be many gaps of a short span, and an entry left out of it would be as far off.

    Parameters
    ----------
    low, high : Tensor of shape (blocks,), float32
        Finite.
    storage : {"double", "fp32", "bf16"}

    Raises
    ------
    UsageError
        If a block's span is beyond float32.

    Examples
    --------
    >>> scales = store_affine(torch.tensor([-1.0]), torch.tensor([3.0]), "fp32")
    >>> scales.values(), scales.minima()
    (tensor([4.]), tensor([-1.]))
    """
    bf16 = storage == "bf16"
    minimum = PlainScales(_downwards(low)) if bf16 else store(low, storage)
    span = (high - minimum.values()).clamp_min_(0.0)
    if not bool(torch.isfinite(span).all()):
        raise UsageError("a block spans more than float32 holds: halve the tensor first, or take an absmax format")
    return AffineScales(PlainScales(-_downwards(-span)) if bf16 else store(span, storage), minimum)


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> PlainScales | DoubleScales | AffineScales:
    """Scales again from what `Scales.tensors` gave; other names are passed over.

    Examples
    --------
    >>> scales = store_affine(torch.tensor([-1.0]), torch.tensor([3.0]), "double")
    >>> from_tensors(scales.tensors()).tensors() == scales.tensors()
    True
    """
    found = (
        DoubleScales(tensors["absmax"], tensors["nested_absmax"], tensors["offset"])
        if "offset" in tensors
        else PlainScales(tensors["absmax"])
    )
    minimum = {name.removeprefix(_MINIMUM): t for name, t in tensors.items() if name.startswith(_MINIMUM)}
    if not minimum:
        return found
    beside = from_tensors(minimum)
    assert not isinstance(beside, AffineScales)  # for the type checker: no name has the prefix twice
    return AffineScales(found, beside)


def _downwards(values: torch.Tensor) -> torch.Tensor:
    """The largest bfloat16 not above each number, or the least there is."""
    bits = values.view(torch.int32)
    bits = torch.where(bits < 0, bits + 0xFFFF, bits) & ~0xFFFF  # the lower half of a negative number's size goes up
    return bits.view(torch.float32).clamp_min_(torch.finfo(torch.bfloat16).min).to(torch.bfloat16)


def dynamic_map() -> Format:
    """The 8-bit dynamic code book, signed: seven decades, each with twice the fractions of the one below.

    Below 10^{−6+i}, i = 0 … 6, stand the midpoints of 2^i equal parts of [0.1, 1], with both signs; 0 and 1 complete
    the 256 (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016).

    Examples
    --------
    >>> book = dynamic_map()
    >>> len(set(book.levels)), book.levels[-1], round(book.levels[0], 4)
    (256, 1.0, -0.993)
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2.0 * 10 ** (i - 6)).tolist()
        levels += middles + [-m for m in middles]
    return Format("dynamic8", 8, tuple(sorted(levels)))


@lru_cache(maxsize=8)
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(dynamic_map().levels, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _nearest(device: torch.device) -> torch.Tensor:
    """Code nearest to each of the 65536 even steps from −1 to 1, uint8."""
    steps = -1.0 + 2.0 * torch.arange(_STEPS + 1, dtype=torch.float32) / _STEPS
    return torch.bucketize(steps, boundaries(dynamic_map())).to(torch.uint8).to(device)


def _rounded(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (blocks, 256) and largest absolute entries (blocks,) of blocks of scales about their mean."""
    largest = blocks.abs().amax(1)
    inverse = torch.where(largest == 0.0, 0.0, 1.0 / largest.clamp_min(LEAST_SCALE))
    step = ((blocks * inverse[:, None]).clamp_(-1.0, 1.0) + 1.0) * 0.5 * _STEPS + 0.5
    codes = _nearest(blocks.device).index_select(0, step.to(torch.int32).flatten()).view_as(blocks)
    return codes.masked_fill_(largest[:, None] == 0.0, 0), largest


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    """(n,) → (⌈n/256⌉, 256), the last block filled with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % SCALES_A_BLOCK)).view(-1, SCALES_A_BLOCK)
