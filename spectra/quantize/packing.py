"""Codes of two to eight bits in bytes without a gap: the first code in the upper bits, eight codes in `bits` bytes.

Eight codes, a byte each, are one word of 64 bits: neighbours are joined to lanes of 16 bits, these to lanes of 32, and
those to one of 64, three steps for all eight codes at once. Words are read as torch's builds all are, the first byte
the lowest.
"""

from __future__ import annotations

import torch

CODES_A_WORD = 8

# By their width in bits, what reads lanes, and the lowest bit of every second one.
_LANES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_LOWEST = {8: 0x0001000100010001, 16: 0x0000000100000001, 32: 0x0000000000000001}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many codes take.

    Examples
    --------
    >>> packed_bytes(9, 3)
    4
    """
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in bytes; what is left of the last byte is zero.

    Parameters
    ----------
    codes : Tensor of shape (n,), uint8
        Below 2^bits.
    bits : int
        2 to 8.

    Returns
    -------
    Tensor of shape (⌈n·bits/8⌉,), uint8

    Examples
    --------
    >>> pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), 4)
    tensor([ 18, 240], dtype=torch.uint8)
    >>> pack(torch.tensor([1, 2, 7], dtype=torch.uint8), 3)  # 001 010 111
    tensor([ 43, 128], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    word = torch.nn.functional.pad(codes, (0, -len(codes) % CODES_A_WORD)).view(torch.int64)
    lane, width = 8, bits
    while lane < 64:
        mask = _LOWEST[lane] * ((1 << width) - 1)
        upper = word & mask
        upper <<= width
        word = word >> lane
        word &= mask
        word |= upper
        lane, width = 2 * lane, 2 * width
        if width == 8:  # every lane is a byte already
            return word.view(_LANES[lane]).to(torch.uint8)[: packed_bytes(len(codes), bits)]
    octets = word.view(torch.uint8).view(-1, 8)
    groups = codes.new_empty(len(word), bits)
    for place in range(bits):
        groups[:, place] = octets[:, bits - 1 - place]
    return groups.flatten()[: packed_bytes(len(codes), bits)]


def joined(packed: torch.Tensor, bits: int, together: int) -> torch.Tensor:
    """Numbers that runs of codes make, the first code in the upper bits.

    Parameters
    ----------
    packed : Tensor of shape (n,), uint8
        As `pack` makes it.
    bits : int
        2 to 8.
    together : {1, 2, 4}
        Codes a run; 1 where a code fills a byte.

    Returns
    -------
    Tensor, int32
        One number a run, what fills the last bytes included.

    Examples
    --------
    >>> joined(torch.tensor([43, 128, 0], dtype=torch.uint8), 3, 2)  # 001010 111000 000000 000000
    tensor([10, 56,  0,  0], dtype=torch.int32)
    """
    if bits * together == 8:
        return packed.to(torch.int32)
    groups = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    octets = packed.new_zeros(len(groups), 8)
    for place in range(bits):  # column by column: a flip takes three times as long
        octets[:, bits - 1 - place] = groups[:, place]
    word = octets.view(torch.int64)
    lane = 64
    while lane > 8 * together:
        lane //= 2
        width = bits * lane // 8
        mask = _LOWEST[lane] * ((1 << width) - 1)
        lower = word & mask
        lower <<= lane
        word = word >> width
        word &= mask
        word |= lower
    return word.view(_LANES[lane]).flatten().to(torch.int32)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of `pack`, one a byte, what fills the last byte included.

    Examples
    --------
    >>> unpack(torch.tensor([18, 240], dtype=torch.uint8), 4)
    tensor([ 1,  2, 15,  0], dtype=torch.uint8)
    """
    return joined(packed, bits, 1).to(torch.uint8)[: 8 * len(packed) // bits]
