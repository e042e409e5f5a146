"""Weights in two to eight bits: code books, block scales, and the linear map that dequantizes on the fly."""

from spectra.quantize.formats import FORMATS, FP4, INT4, INT8, NF4, Format, as_format
from spectra.quantize.linear import QuantizedLinear
from spectra.quantize.loftq import loftq
from spectra.quantize.optimizers import paged_adamw
from spectra.quantize.scheme import Scheme
from spectra.quantize.tensor import QuantizedTensor, quantize

__all__ = [
    "FORMATS",
    "FP4",
    "INT4",
    "INT8",
    "NF4",
    "Format",
    "QuantizedLinear",
    "QuantizedTensor",
    "Scheme",
    "as_format",
    "loftq",
    "paged_adamw",
    "quantize",
]
