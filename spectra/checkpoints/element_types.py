"""Element types: safetensors' spelling, size in bits, and the torch dtype where torch has one."""

from __future__ import annotations

import torch

# Every type that safetensors 0.8 knows; the sub-byte ones pack their elements without padding between them.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

_SPELLING = {dtype: spelling for spelling, dtype in TORCH.items()}


def spelling(dtype: torch.dtype) -> str:
    """How safetensors spells a torch dtype; one it has no word for keeps torch's, in capitals.

    Examples
    --------
    >>> spelling(torch.bfloat16), spelling(torch.complex128)
    ('BF16', 'COMPLEX128')
    """
    return _SPELLING.get(dtype) or str(dtype).removeprefix("torch.").upper()
