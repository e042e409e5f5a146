"""bitsandbytes' dequantization kernels, where that package is installed; nothing here needs it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from spectra.errors import UsageError
from spectra.quantize.formats import FP4, NF4

if TYPE_CHECKING:
    from spectra.quantize.tensor import QuantizedTensor

_FORMATS = (NF4, FP4)
_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether bitsandbytes can be imported; importing it registers its kernels with torch."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def obstacle(quantized: QuantizedTensor) -> str | None:
    """Why bitsandbytes' kernel cannot take a tensor, or None."""
    if quantized.format not in _FORMATS:
        return f"it knows {' and '.join(f.name for f in _FORMATS)}, not {quantized.format.name}"
    if quantized.block not in _BLOCKS:
        return f"it knows blocks of {', '.join(map(str, _BLOCKS))} entries, not {quantized.block}"
    if quantized.count % 2:
        return "it takes an even number of entries"
    return None if installed() else "it is not installed: pip install bitsandbytes"


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Levels times scales by bitsandbytes' kernel.

    Raises
    ------
    UsageError
        If it cannot; the message says why.
    """
    reason = obstacle(quantized)
    if reason is not None:
        raise UsageError(f"bitsandbytes cannot dequantize this tensor: {reason}; take backend='torch'")
    values = torch.ops.bitsandbytes.dequantize_4bit(
        quantized.codes.unsqueeze(1),
        quantized.scales.values(),
        quantized.block,
        quantized.format.name,
        (quantized.count,),  # one row: its blocks then never straddle two
        dtype if dtype in _DTYPES else torch.float32,
    )
    return values.view(quantized.shape).to(dtype)  # type: ignore[no-any-return]
