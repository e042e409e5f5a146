"""From numbers to codes and back by table: the nearest level's code, and the levels that packed codes stand for.

A binary search an entry is the slow part of quantizing. The upper sixteen bits of a float32 name one of 65536 cells,
and a cell holds one boundary between levels at most: one look-up finds it, one comparison settles the code. Going
back, a byte of packed codes finds all of its levels in one look-up.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from spectra.errors import UsageError
from spectra.linalg.threads import in_threads
from spectra.quantize.formats import Format

# Type that moves all levels of a byte as one element: a look-up costs the same for 4 and for 8 bytes.
_BYTE_DTYPE = {1: torch.float32, 2: torch.complex64}

# torch looks up on one core however many there are. Two threads take 0.24 ms to come and go, these look-ups 0.34 ms.
_LOOKED_UP_BY_A_THREAD = 1 << 19


def boundaries(format: Format) -> torch.Tensor:
    """Midpoints of neighbouring levels in ascending order, (2^bits − 1,) float32."""
    levels = torch.tensor([format.levels[code] for code in format.order], dtype=torch.float32)
    return (levels[:-1] + levels[1:]) / 2


def encode(scaled: torch.Tensor, format: Format) -> torch.Tensor:
    """Code of the level nearest to every entry; halfway between two the lower one.

    Parameters
    ----------
    scaled : Tensor of shape (n,), float32
        Finite; beyond ±1 the outermost levels stand.

    Returns
    -------
    Tensor of shape (n,), uint8
        One code an element.

    Examples
    --------
    >>> from spectra.quantize.formats import NF4
    >>> encode(torch.tensor([-1.0, 0.0, 0.039, 0.04, 2.0]), NF4)
    tensor([ 0,  7,  7,  8, 15], dtype=torch.uint8)
    """
    limits, codes = _encoder(format, scaled.device)
    index = scaled.view(torch.int32) >> 15
    index &= 0x1FFFE  # twice the cell
    index += scaled > limits.index_select(0, index)
    return codes.index_select(0, index)


@lru_cache(maxsize=64)
def _encoder(format: Format, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundary inside each cell, and the code on either side of it.

    Returns
    -------
    limits : Tensor of shape (131072,), float32
        Two entries a cell, equal; ∞ where the cell holds no boundary.
    codes : Tensor of shape (131072,), uint8
        Two entries a cell: the code up to the boundary, and above it.
    """
    bounds = boundaries(format)
    cells = torch.arange(65536, dtype=torch.int64) << 16
    ends = torch.stack([_as_float(cells), _as_float(cells | 0xFFFF)])
    ends = torch.where(ends.isnan(), ends.flip(0), ends)  # infinity's cell runs into the NaNs
    low, high = (torch.bucketize(end, bounds) for end in (ends.amin(0), ends.amax(0)))
    if bool((high - low > 1).any()):
        raise UsageError(
            f"format {format.name!r} has levels closer than 2⁻⁸ of their size; float32's upper half cannot tell them"
        )
    inside = high > low
    limits = torch.where(inside, bounds[low.clamp_max(len(bounds) - 1)], torch.inf)
    order = torch.tensor(format.order, dtype=torch.uint8)
    codes = torch.stack([order[low], order[high]], dim=1).flatten()
    return limits.repeat_interleave(2).to(device), codes.to(device)


def _as_float(bits: torch.Tensor) -> torch.Tensor:
    """The float32 numbers that have these bits, given as int64."""
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


def decode(packed: torch.Tensor, format: Format, out: torch.Tensor) -> None:
    """Write the levels that packed codes stand for.

    Parameters
    ----------
    packed : Tensor of shape (n,), uint8
        As `pack` makes it.
    out : Tensor of shape (n·8/bits,), float32
        Contiguous; written.
    """
    table = _decoder(format, packed.device)
    index, rows = packed.to(torch.int32), out.view(table.dtype)
    in_threads(
        lambda start, stop: torch.index_select(table, 0, index[start:stop], out=rows[start:stop]),
        len(index),
        least=_LOOKED_UP_BY_A_THREAD if packed.device.type == "cpu" else len(index),
    )


@lru_cache(maxsize=64)
def _decoder(format: Format, device: torch.device) -> torch.Tensor:
    """Levels of every byte of packed codes, (256,), a complex number where a byte holds two."""
    codes = unpack(torch.arange(256, dtype=torch.uint8), format.bits)
    levels = torch.tensor(format.levels, dtype=torch.float32)[codes.long()]
    return levels.view(_BYTE_DTYPE[8 // format.bits]).to(device)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in bytes, the first in the upper bits.

    Parameters
    ----------
    codes : Tensor of shape (n,), uint8
        As many as fill whole bytes.

    Examples
    --------
    >>> pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), 4)
    tensor([ 18, 240], dtype=torch.uint8)
    """
    return codes if bits == 8 else (codes[::2] << 4) | codes[1::2]


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of `pack`, one a byte, what fills the last byte included.

    Examples
    --------
    >>> unpack(torch.tensor([18, 240], dtype=torch.uint8), 4)
    tensor([ 1,  2, 15,  0], dtype=torch.uint8)
    """
    return packed if bits == 8 else torch.stack([packed >> 4, packed & 15], dim=1).flatten()
