"""From numbers to codes and back by table: the nearest level's code, and the levels that packed codes stand for.

A binary search an entry is the slow part of quantizing. The upper sixteen bits of a float32 name one of 65536 cells,
and a cell holds one boundary between levels at most: one look-up finds it, one comparison settles the code. Going
back, two or four codes find all of their levels in one look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from spectra.errors import UsageError
from spectra.linalg.threads import in_threads
from spectra.quantize.formats import Format
from spectra.quantize.packing import joined

# Codes that are looked up together, by bits: as many as a table of at most 2¹⁴ rows allows. All their levels move as
# one element, and a look-up of 16 bytes costs little more than one of 4.
_TOGETHER = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}
_ROW_DTYPE = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}

_CELLS = 1 << 16

Encoder = Callable[[torch.Tensor], torch.Tensor]

# torch looks up on one core however many there are. Two threads take 0.24 ms to come and go, these look-ups 0.34 ms.
_LOOKED_UP_BY_A_THREAD = 1 << 19


def boundaries(format: Format) -> torch.Tensor:
    """Midpoints of neighbouring levels in ascending order, (2^bits − 1,) float32."""
    levels = torch.tensor([format.levels[code] for code in format.order], dtype=torch.float32)
    return (levels[:-1] + levels[1:]) / 2


def encode(scaled: torch.Tensor, format: Format, book: torch.Tensor | None = None) -> torch.Tensor:
    """Code of the level nearest to every entry; halfway between two the lower one.

    Parameters
    ----------
    scaled : Tensor of shape (n,), float32
        Not NaN; beyond the outermost levels these stand.
    book : Tensor of shape (2^bits,), float32, optional
        Levels in ascending order where the format's are fitted.

    Returns
    -------
    Tensor of shape (n,), uint8
        One code an element.

    Raises
    ------
    UsageError
        If two boundaries of the format's levels share a cell.

    Examples
    --------
    >>> from spectra.quantize.formats import NF4
    >>> encode(torch.tensor([-1.0, 0.0, 0.039, 0.04, 2.0]), NF4)
    tensor([ 0,  7,  7,  8, 15], dtype=torch.uint8)
    """
    return encoder(format, scaled.device, book)(scaled)


def encoder(format: Format, device: torch.device, book: torch.Tensor | None = None) -> Encoder:
    """`encode` for many calls: its table is made once, and kept where it is the format's own.

    Examples
    --------
    >>> from spectra.quantize.formats import NF4
    >>> encoder(NF4, torch.device("cpu"))(torch.tensor([0.5]))
    tensor([12], dtype=torch.uint8)
    """
    if book is None:
        return _encoder(format, device)
    bounds = (book[:-1] + book[1:]) / 2
    cells = _cells(bounds.cpu(), torch.arange(len(book), dtype=torch.uint8))
    if cells is None:
        return lambda scaled: torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return _by_table(*(part.to(device) for part in cells))


@lru_cache(maxsize=64)
def _encoder(format: Format, device: torch.device) -> Encoder:
    cells = _cells(boundaries(format), torch.tensor(format.order, dtype=torch.uint8))
    if cells is None:
        raise UsageError(
            f"format {format.name!r} has levels closer than 2⁻⁸ of their size; float32's upper half cannot tell them"
        )
    return _by_table(*(part.to(device) for part in cells))


def _by_table(limits: torch.Tensor, codes: torch.Tensor) -> Encoder:
    def look_up(scaled: torch.Tensor) -> torch.Tensor:
        index = scaled.view(torch.int32) >> 15
        index &= 0x1FFFE  # twice the cell
        index += scaled > limits.index_select(0, index)
        return codes.index_select(0, index)

    return look_up


def _cells(bounds: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Boundary inside each cell, and the code on either side of it; None if a cell holds two boundaries.

    Returns
    -------
    limits : Tensor of shape (131072,), float32
        Two entries a cell, equal; ∞ where the cell holds no boundary.
    codes : Tensor of shape (131072,), uint8
        Two entries a cell: the code up to the boundary, and above it.
    """
    places = torch.arange(_CELLS)
    places = torch.where(places < _CELLS // 2, places + _CELLS // 2, _CELLS - 1 - places)  # cells by ascending numbers
    held = torch.bincount(places[(bounds.view(torch.int32) >> 16).long() & _CELLS - 1], minlength=_CELLS)
    if int(held.max()) > 1:
        return None
    below = (held.cumsum(0) - held)[places]
    inside = held[places]
    limits = torch.where(inside > 0, bounds[below.clamp_max(len(bounds) - 1)], torch.inf)
    codes = torch.stack([order[below], order[below + inside]], dim=1).flatten()
    return limits.repeat_interleave(2), codes


def decode(packed: torch.Tensor, format: Format, out: torch.Tensor, book: torch.Tensor | None = None) -> None:
    """Write the levels that packed codes stand for.

    Parameters
    ----------
    packed : Tensor of shape (⌈n·bits/8⌉,), uint8
        As `pack` makes it.
    out : Tensor of shape (n,), float32
        Contiguous; written.
    book : Tensor of shape (2^bits,), float32, optional
        Levels by code where the format's are fitted.
    """
    bits, together = format.bits, _TOGETHER[format.bits]
    table = _decoder(format, packed.device) if book is None else _rows(book, bits)
    index = joined(packed, bits, together)  # (≥ n/together,), int32
    whole = len(out) // together
    rows = out[: whole * together].view(table.dtype)
    in_threads(
        lambda start, stop: torch.index_select(table, 0, index[start:stop], out=rows[start:stop]),
        whole,
        least=_LOOKED_UP_BY_A_THREAD if packed.device.type == "cpu" else max(1, whole),
    )
    if whole * together < len(out):
        out[whole * together :] = table[index[whole]].reshape(1).view(torch.float32)[: len(out) - whole * together]


@lru_cache(maxsize=64)
def _decoder(format: Format, device: torch.device) -> torch.Tensor:
    """Rows of the format's own levels."""
    return _rows(torch.tensor(format.levels, dtype=torch.float32), format.bits).to(device)


def _rows(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels of every run of codes that is looked up together, one element a run; the first code in the upper bits."""
    together = _TOGETHER[bits]
    places = torch.arange(together - 1, -1, -1, device=levels.device) * bits
    codes = torch.arange(1 << bits * together, device=levels.device)[:, None] >> places & (1 << bits) - 1
    return levels[codes].view(_ROW_DTYPE[together]).flatten()
