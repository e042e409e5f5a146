"""`quantize`: a tensor in a few bits an entry, as a frozen value that knows what it takes and how to come back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from spectra.errors import NonFiniteMatrix, UsageError
from spectra.linalg.threads import in_threads
from spectra.quantize import kernels
from spectra.quantize.formats import Format, as_format
from spectra.quantize.rounding import decode, encode, pack
from spectra.quantize.scales import DoubleScales, PlainScales, Scales

Backend = Literal["auto", "torch", "bitsandbytes"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Smallest scale that is divided by, as in bitsandbytes: a block of smaller numbers shrinks to zeros.
_LEAST = 1e-38

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
    scales : PlainScales or DoubleScales
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    codes: torch.Tensor
    scales: Scales

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, what fills the last byte and the last block of scales included.

        Code books are shared by every tensor of a format and count for none.
        """
        return self.codes.nbytes + self.scales.nbytes

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
        return replace(self, codes=change(self.codes), scales=self.scales.map(change))

    def __repr__(self) -> str:
        sides = " × ".join(str(side) for side in self.shape)
        return f"QuantizedTensor({self.format.name}, {sides}, {self.bits_per_weight:.3f} bits a weight)"


def quantize(
    tensor: torch.Tensor, format: str | Format = "nf4", *, block: int = 64, double: bool = True
) -> QuantizedTensor:
    """Round a tensor to a format's levels, block by block.

    Codes, scales and values are those of bitsandbytes' CPU build, bit for bit, for ``"nf4"`` and ``"fp4"``. A block of
    zeros has the scale 0 and comes back as zeros; a constant block comes back as it was where ±1 are levels and its
    scale is not quantized again. An entry count that no block divides leaves a last block that is shorter, with a
    scale of its own, which `QuantizedTensor.nbytes` counts.

    Parameters
    ----------
    tensor : Tensor
        float32, bfloat16, float16, or float64 (which is rounded to float32 first), of any shape, not empty.
    format : str or Format
        One of `FORMATS`, or a code book of one's own.
    block : int
        Entries a scale.
    double : bool
        Whether the scales are themselves quantized.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    UsageError
        If the format is unknown, the block is not positive, or the tensor is empty or not of real numbers.
    NonFiniteMatrix
        If an entry is NaN or infinite, or beyond float32.

    References
    ----------
    .. [1] T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, sections 2 and 3.

    Examples
    --------
    >>> w = torch.tensor([[0.5, -1.0, 0.0, 0.3]])
    >>> quantize(w, "int4", block=4, double=False).dequantize()
    tensor([[ 0.4286, -1.0000,  0.0000,  0.2857]])
    """
    format = as_format(format)
    if block < 1:
        raise UsageError(f"a block of {block} entries; it needs at least one, and 64 is usual")
    if tensor.dtype not in _DTYPES:
        raise UsageError(f"cannot quantize {tensor.dtype}; cast the tensor to torch.float32 first")
    if tensor.numel() == 0:
        raise UsageError(f"cannot quantize an empty tensor, of shape {tuple(tensor.shape)}")
    codes, absmax = _quantize(tensor.detach().reshape(-1), format, block)
    if not bool(torch.isfinite(absmax).all()):
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise NonFiniteMatrix(f"{bad} of {tensor.numel()} entries are NaN, infinite or beyond float32: no block scale")
    scales = DoubleScales.of(absmax) if double else PlainScales(absmax)
    return QuantizedTensor(format, tuple(tensor.shape), tensor.dtype, block, codes, scales)


def _quantize(flat: torch.Tensor, format: Format, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales of (n,) entries; what fills the last byte is the code of zero, as in bitsandbytes."""
    full = len(flat) // block * block
    codes = torch.empty(len(flat) + len(flat) % 2, dtype=torch.uint8, device=flat.device)
    codes[len(flat) :] = int(encode(flat.new_zeros(1, dtype=torch.float32), format))
    absmax = torch.empty(-(-len(flat) // block), dtype=torch.float32, device=flat.device)
    stride = max(1, _QUANTIZED_AT_ONCE // block) * block

    def work(begin: int, end: int) -> None:
        for start in range(begin, end, stride):
            part = flat[start : min(start + stride, end)].float().view(-1, block)
            scale = absmax[start // block : start // block + len(part)]
            torch.amax(part.abs(), 1, out=scale)
            scaled = part * (1.0 / scale.clamp_min(_LEAST))[:, None]
            codes[start : start + part.numel()] = encode(scaled.flatten(), format)

    in_threads(work, full, unit=block, least=_QUANTIZED_BY_A_THREAD if flat.device.type == "cpu" else max(1, full))
    if full < len(flat):  # bitsandbytes divides the shorter block, where it multiplies full ones by the inverse
        rest = flat[full:].float()
        absmax[-1] = rest.abs().amax().clamp_min(_LEAST)
        codes[full : len(flat)] = encode(rest / absmax[-1], format)
    return pack(codes if format.bits < 8 else codes[: len(flat)], format.bits), absmax


def _dequantize(quantized: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Levels times scales in float32, rounded to the dtype."""
    codes, block, count = quantized.codes, quantized.block, quantized.count
    per_byte = 8 // quantized.format.bits
    stride = max(1, _DEQUANTIZED_AT_ONCE // (per_byte * block)) * per_byte * block  # whole blocks and whole bytes
    values = torch.empty(len(codes) * per_byte, dtype=dtype, device=codes.device)
    room = None if dtype == torch.float32 else values.new_empty(min(stride, len(values)), dtype=torch.float32)
    scales = quantized.scales.values()
    for start in range(0, count, stride):
        target = values[start : start + stride]
        part = target if room is None else room[: len(target)]
        decode(codes[start // per_byte : (start + stride) // per_byte], quantized.format, part)
        _multiply(part[: count - start], scales[start // block :], block)
        if room is not None:
            target.copy_(part)
    return values[:count].view(quantized.shape)


def _multiply(levels: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """Multiply levels by their blocks' scales in place; the last block may be shorter."""
    full = len(levels) // block * block
    levels[:full].view(-1, block).mul_(scales[: full // block, None])
    if full < len(levels):
        levels[full:].mul_(scales[full // block])
