"""`quantize`: a tensor in a few bits an entry, as a frozen value that knows what it takes and how to come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from spectra.errors import NonFiniteMatrix, UsageError
from spectra.linalg.threads import in_threads
from spectra.quantize import kernels, lloyd
from spectra.quantize.formats import Format, as_format
from spectra.quantize.packing import CODES_A_WORD, pack, packed_bytes
from spectra.quantize.rounding import decode, encoder
from spectra.quantize.scales import LEAST_SCALE, AffineScales, Scales, ScaleStorage, store, store_affine

Backend = Literal["auto", "torch", "bitsandbytes"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_STORAGES = get_args(ScaleStorage)

# Entries quantized at a time. 1536 × 1536 on two threads: 12.7 ms; pieces of an eighth, though they fit the cache of a
# core, take 17, since a piece is a dozen calls of torch that each want the interpreter.
_QUANTIZED_AT_ONCE = 1 << 18
_QUANTIZED_BY_A_THREAD = 1 << 16

# Entries dequantized at a time: what half-precision answers are rounded from stays small.
_DEQUANTIZED_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in blocks: packed codes, a scale a block.

    Attributes
    ----------
    format : Format
        Code book and scaling rule.
    shape : tuple of int
        Of the tensor that was quantized.
    dtype : torch.dtype
        Of the tensor that was quantized, and of `dequantize`'s answer unless told otherwise.
    block : int
        Entries a scale, in row-major order over the whole tensor; the last block may be shorter.
    codes : Tensor of shape (⌈n·bits/8⌉,), uint8
        Packed codes, the first in the upper bits.
    scales : PlainScales, DoubleScales or AffineScales
    book : Tensor of shape (2^bits,), float32, or None
        Levels by code where the format's are fitted.

    Raises
    ------
    UsageError
        If an affine format comes without minima, or a fitted one without a book.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    codes: torch.Tensor
    scales: Scales
    book: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.format.affine != isinstance(self.scales, AffineScales):
            needs = "needs a minimum beside each scale" if self.format.affine else "has no minima"
            raise UsageError(f"format {self.format.name!r} {needs}; quantize() gives what belongs together")
        if self.format.fitted != (self.book is not None):
            needs = "needs its fitted levels" if self.format.fitted else "has levels of its own, no fitted ones"
            raise UsageError(f"format {self.format.name!r} {needs}; quantize() gives what belongs together")

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def levels(self) -> torch.Tensor:
        """What codes stand for before they are scaled, (2^bits,) float32."""
        return torch.tensor(self.format.levels, dtype=torch.float32) if self.book is None else self.book

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and a fitted code book, what fills the last byte and the last block included.

        Code books that are shared by every tensor of a format count for none.
        """
        return self.codes.nbytes + self.scales.nbytes + (0 if self.book is None else self.book.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits an entry.

        Examples
        --------
        >>> quantize(torch.ones(384, 384), "nf4").bits_per_weight < 4.13
        True
        """
        return 8.0 * self.nbytes / self.count

    def dequantize(self, dtype: torch.dtype | None = None, *, backend: Backend = "auto") -> torch.Tensor:
        """Levels times scales, in float32, rounded to the dtype.

        Parameters
        ----------
        dtype : torch.dtype, optional
            Of the answer.
        backend : {"auto", "torch", "bitsandbytes"}
            Whose kernel multiplies. ``"auto"`` takes bitsandbytes' where it is installed and can: on 1536 × 1536 in
            float32 that took 1.5 ms against 1.6 ms on one core, and 0.8 ms against 0.9 ms on two. The answers are
            equal.

        Returns
        -------
        Tensor of the tensor's shape

        Raises
        ------
        UsageError
            If bitsandbytes was asked for and has no kernel for this tensor, or is not installed.
        """
        dtype = dtype or self.dtype
        if backend == "bitsandbytes" or (backend == "auto" and kernels.obstacle(self) is None):
            return kernels.dequantize(self, dtype)
        return _dequantize(self, dtype)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
        """The same value with every stored tensor changed, moved to a device for instance."""
        book = None if self.book is None else change(self.book)
        return replace(self, codes=change(self.codes), scales=self.scales.map(change), book=book)

    def __repr__(self) -> str:
        sides = " × ".join(str(side) for side in self.shape)
        return f"QuantizedTensor({self.format.name}, {sides}, {self.bits_per_weight:.3f} bits a weight)"


def quantize(
    tensor: torch.Tensor,
    format: str | Format = "nf4",
    *,
    block: int | None = 64,
    double: bool = True,
    scales: ScaleStorage | None = None,
) -> QuantizedTensor:
    """Round a tensor to a format's levels, block by block.

    Codes, scales and values are those of bitsandbytes' CPU build, bit for bit, for ``"nf4"`` and ``"fp4"`` at scales
    of ``"double"`` and ``"fp32"``. Every entry is off by half the widest gap between levels, times its scale, at most;
    double quantization adds what it does to the scale. A block of zeros comes back as zeros, and a constant one as it
    was, where 0 and ±1 are levels and scales are not quantized again. An entry count that no block divides leaves a
    last block that is shorter, with a scale of its own, which `QuantizedTensor.nbytes` counts.

    Parameters
    ----------
    tensor : Tensor
        float32, bfloat16, float16, or float64 (which is rounded to float32 first), of any shape, not empty.
    format : str or Format
        One of `FORMATS`, or a code book of one's own.
    block : int or None
        Entries a scale, row-major over the tensor; None: a scale for every row of the last axis.
    double : bool
        Whether the scales are themselves quantized, where `scales` does not say.
    scales : {"double", "fp32", "bf16"}, optional
        Eight bits a scale, themselves scaled in blocks of 256; float32; bfloat16.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    UsageError
        If the format or the storage is unknown, the block is not positive, or the tensor is empty or not of real
        numbers.
    NonFiniteMatrix
        If an entry is NaN or infinite, or beyond float32.

    References
    ----------
    .. [1] T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, sections 2 and 3.

    Examples
    --------
    >>> w = torch.tensor([[0.5, -1.0, 0.0, 0.3]])
    >>> quantize(w, "int4", block=4, scales="fp32").dequantize()
    tensor([[ 0.4286, -1.0000,  0.0000,  0.2857]])
    >>> quantize(w, "int4-affine", block=None, scales="fp32").dequantize()
    tensor([[ 0.5000, -1.0000,  0.0000,  0.3000]])
    """
    format = as_format(format)
    storage: ScaleStorage = scales or ("double" if double else "fp32")
    if storage not in _STORAGES:
        raise UsageError(f"unknown storage of scales {storage!r}; known are {', '.join(_STORAGES)}")
    if block is not None and block < 1:
        raise UsageError(f"a block of {block} entries; it needs at least one, and 64 is usual")
    if tensor.dtype not in _DTYPES:
        raise UsageError(f"cannot quantize {tensor.dtype}; cast the tensor to torch.float32 first")
    if tensor.numel() == 0:
        raise UsageError(f"cannot quantize an empty tensor, of shape {tuple(tensor.shape)}")
    if block is None:
        block = tensor.shape[-1] if tensor.ndim else 1
    flat = tensor.detach().reshape(-1)
    low, high = _extent(flat, format, block)
    if not bool(torch.isfinite(high).all() and torch.isfinite(low).all()):
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise NonFiniteMatrix(f"{bad} of {tensor.numel()} entries are NaN, infinite or beyond float32: no block scale")
    kept: Scales = store_affine(low, high, storage) if format.affine else store(high, storage)
    # bitsandbytes rounds entries by the scale that is not yet quantized; all absmax formats do.
    scale = high if storage == "double" and not format.affine else kept.values()
    book = lloyd.fitted(flat, scale, block, format.bits) if format.fitted else None
    codes = _encode(flat, format, block, (scale, kept.minima(), book))
    return QuantizedTensor(format, tuple(tensor.shape), tensor.dtype, block, codes, kept, book)


def _extent(flat: torch.Tensor, format: Format, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest entry of every block, (blocks,) float32 each; for absmax formats 0 and the largest absolute."""
    full = len(flat) // block * block
    high = torch.zeros(-(-len(flat) // block), dtype=torch.float32, device=flat.device)
    low = torch.zeros_like(high)

    def work(begin: int, end: int) -> None:
        blocks = flat[begin:end].view(-1, min(block, end - begin))
        of = slice(begin // block, begin // block + len(blocks))
        if format.affine:
            low[of], high[of] = blocks.amin(1), blocks.amax(1)
        else:
            high[of] = torch.maximum(blocks.amax(1).abs_(), blocks.amin(1).abs_())

    _in_pieces(work, full, block, flat.device)
    if full < len(flat):
        work(full, len(flat))
        if not format.affine:
            high[-1].clamp_min_(LEAST_SCALE)  # as bitsandbytes, where a block is shorter
    return low, high


def _encode(
    flat: torch.Tensor,
    format: Format,
    block: int,
    rule: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
) -> torch.Tensor:
    """Packed codes of (n,) entries, by scales and minima of their blocks and fitted levels.

    What fills the last byte is the code of zero, as in bitsandbytes.
    """
    scale, minimum, book = rule
    divisor = scale.clamp_min(LEAST_SCALE)
    inverse, bits, encode = 1.0 / divisor, format.bits, encoder(format, flat.device, book)
    packed = torch.empty(packed_bytes(len(flat), bits), dtype=torch.uint8, device=flat.device)
    unit = math.lcm(block, CODES_A_WORD)
    even, full = len(flat) // unit * unit, len(flat) // block * block

    def codes(begin: int, end: int) -> torch.Tensor:
        blocks = flat[begin:end].float().view(-1, min(block, max(1, end - begin)))
        of = slice(begin // block, begin // block + len(blocks))
        if minimum is not None:
            blocks = blocks - minimum[of, None]
        # bitsandbytes multiplies full blocks by the inverse, and divides one that is shorter.
        scaled = blocks * inverse[of, None] if begin < full else blocks / divisor[of, None]
        return encode(scaled.flatten())

    def work(begin: int, end: int) -> None:
        packed[begin * bits // 8 : end * bits // 8] = pack(codes(begin, end), bits)

    _in_pieces(work, even, unit, flat.device)
    if even < len(flat):
        zeros = encode(scale.new_zeros(CODES_A_WORD))
        last = torch.cat([codes(even, full), codes(full, len(flat)), zeros])
        packed[even * bits // 8 :] = pack(last, bits)[: len(packed) - even * bits // 8]
    return packed


def _in_pieces(work: Callable[[int, int], None], count: int, unit: int, device: torch.device) -> None:
    """Call ``work(start, stop)`` on pieces of ``range(count)``, which is a multiple of the unit, in threads."""
    stride = max(1, _QUANTIZED_AT_ONCE // unit) * unit

    def share(begin: int, end: int) -> None:
        for start in range(begin, end, stride):
            work(start, min(start + stride, end))

    in_threads(share, count, unit=unit, least=_QUANTIZED_BY_A_THREAD if device.type == "cpu" else max(1, count))


_LARGEST_HALF = torch.finfo(torch.float16).max


def _dequantize(quantized: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Levels times scales, and minima added, in float32, rounded to the dtype."""
    block, count, bits = quantized.block, quantized.count, quantized.format.bits
    unit = math.lcm(block, CODES_A_WORD)
    stride = max(1, _DEQUANTIZED_AT_ONCE // unit) * unit
    values = torch.empty(count, dtype=dtype, device=quantized.codes.device)
    room = None if dtype == torch.float32 else values.new_empty(min(stride, count), dtype=torch.float32)
    scales, minima = quantized.scales.values(), quantized.scales.minima()
    for start in range(0, count, stride):
        target = values[start : start + stride]
        part = target if room is None else room[: len(target)]
        codes = quantized.codes[start * bits // 8 : packed_bytes(start + len(target), bits)]
        decode(codes, quantized.format, part, quantized.book)
        for blocks, of in _blocks(part, start // block, block):
            blocks.mul_(scales[of, None])
            if minima is not None:
                blocks.add_(minima[of, None])
        if room is not None:
            if dtype == torch.float16:  # a level past the largest half is not infinite
                part.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
            target.copy_(part)
    return values.view(quantized.shape)


def _blocks(part: torch.Tensor, first: int, block: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Whole blocks of (n,) entries, then the shorter one if there is one, with the places of their scales."""
    whole = len(part) // block
    if whole:
        yield part[: whole * block].view(whole, block), slice(first, first + whole)
    if whole * block < len(part):
        yield part[None, whole * block :], slice(first + whole, first + whole + 1)
