"""Scales of blocks: one float32 each, or eight bits each by double quantization.

Double quantization (Dettmers et al., "QLoRA", NeurIPS 2023, section 3) takes the scales' mean off, rounds what is
left to an 8-bit code book with blocks of 256, and keeps one float32 a block of scales: 8/64 + 32/(64·256) = 0.127
bits a weight at blocks of 64, in place of 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from spectra.quantize.formats import Format
from spectra.quantize.rounding import boundaries

SCALES_A_BLOCK = 256

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

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        ...

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Scales:
        """The same scales with every stored tensor changed, moved to a device for instance."""
        ...


@dataclass(frozen=True, eq=False)
class PlainScales:
    """One float32 a block.

    Attributes
    ----------
    absmax : Tensor of shape (blocks,), float32
    """

    absmax: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.absmax.nbytes

    def values(self) -> torch.Tensor:
        """Scales, (blocks,) float32."""
        return self.absmax

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
        offset = absmax.mean()
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

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        return {"absmax": self.absmax, "nested_absmax": self.nested_absmax, "offset": self.offset}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> DoubleScales:
        """The same scales with every stored tensor changed."""
        return DoubleScales(change(self.absmax), change(self.nested_absmax), change(self.offset))


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
    inverse = torch.where(largest == 0.0, 0.0, 1.0 / largest)
    step = ((blocks * inverse[:, None]).clamp_(-1.0, 1.0) + 1.0) * 0.5 * _STEPS + 0.5
    codes = _nearest(blocks.device).index_select(0, step.to(torch.int32).flatten()).view_as(blocks)
    return codes.masked_fill_(largest[:, None] == 0.0, 0), largest


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    """(n,) → (⌈n/256⌉, 256), the last block filled with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % SCALES_A_BLOCK)).view(-1, SCALES_A_BLOCK)
