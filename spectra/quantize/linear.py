"""`QuantizedLinear`: y = Wx + b with W in a few bits, dequantized on the fly in both passes and never kept dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spectra.quantize.formats import Format
from spectra.quantize.scales import ScaleStorage, from_tensors
from spectra.quantize.tensor import QuantizedTensor, quantize


class QuantizedLinear(nn.Module):
    """A frozen linear map whose weight is quantized.

    Codes and scales are buffers: they move with the module and stand in its state dict, and a change of the module's
    dtype leaves them alone. The weight takes the dtype of the input, or autocast's.

    Parameters
    ----------
    quantized : QuantizedTensor of shape (out, in)
    bias : Parameter of shape (out,), optional
    fan_in_fan_out : bool
        Whether the map that it stands for stored its weight as (in, out), as transformers' Conv1D does.

    Attributes
    ----------
    in_features, out_features : int
    dense : Tensor of shape (out, in), or None
        What `hold` was given.
    """

    bias: nn.Parameter | None
    dense: torch.Tensor | None

    def __init__(
        self, quantized: QuantizedTensor, bias: nn.Parameter | None = None, *, fan_in_fan_out: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.fan_in_fan_out = fan_in_fan_out
        self.format = quantized.format
        self.block = quantized.block
        self.dtype = quantized.dtype
        self.register_parameter("bias", bias)
        self.register_buffer("codes", quantized.codes)
        for name, tensor in quantized.scales.tensors().items():
            self.register_buffer(name, tensor)
        if quantized.book is not None:
            self.register_buffer("book", quantized.book)
        self.register_buffer("dense", None, persistent=False)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        format: str | Format = "nf4",
        *,
        block: int | None = 64,
        double: bool = True,
        scales: ScaleStorage | None = None,
    ) -> QuantizedLinear:
        """Quantize a Linear, or a Conv1D by its transpose; the bias is taken over as it is.

        Parameters
        ----------
        module : Module
            torch's Linear, or transformers' Conv1D.
        format, block, double, scales
            As `quantize`, whose errors this raises.

        Examples
        --------
        >>> layer = QuantizedLinear.of(nn.Linear(128, 64))
        >>> layer, layer(torch.ones(2, 128)).shape
        (QuantizedLinear(in_features=128, out_features=64, nf4, block=64, 4.133 bits a weight), torch.Size([2, 64]))
        """
        transposed = not isinstance(module, nn.Linear)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)  # for the type checker: linear maps hold one
        quantized = quantize(weight.t() if transposed else weight, format, block=block, double=double, scales=scales)
        bias = module.bias
        return cls(quantized, bias if isinstance(bias, nn.Parameter) else None, fan_in_fan_out=transposed)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a value; its tensors are this module's."""
        buffers: dict[str, Any] = self._buffers
        shape, scales, book = (self.out_features, self.in_features), from_tensors(buffers), buffers.get("book")
        return QuantizedTensor(self.format, shape, self.dtype, self.block, buffers["codes"], scales, book)

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out, in), dequantized each time it is asked for; what `hold` was given while it holds."""
        return self.quantized.dequantize() if self.dense is None else self.dense

    def hold(self, weight: torch.Tensor) -> None:
        """Compute with a dense weight (out, in) until `release`; the quantized one is kept."""
        self.dense = weight.detach()

    def release(self) -> None:
        """Compute with the quantized weight again."""
        self.dense = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dense is not None:
            return functional.linear(x, self.dense.to(x.dtype), bias)
        y: torch.Tensor = _Linear.apply(x, bias, self.quantized)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        """Shown by print."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.format.name}, "
            f"block={self.block}, {self.quantized.bits_per_weight:.4g} bits a weight"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = {name: b for name, b in self._buffers.items() if b is not None and name != "dense"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:  # a scale rounded to half a float is another scale
                self._buffers[name] = before.to(after.device)
        return self


class _Linear(torch.autograd.Function):
    """y = xWᵀ + b; what is kept for the backward pass is the quantized weight alone, not the input nor a dense W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, quantized: QuantizedTensor) -> torch.Tensor:
        ctx.quantized = quantized
        return functional.linear(x, quantized.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        to_x, to_bias, _ = ctx.needs_input_grad
        return (
            grad @ ctx.quantized.dequantize(grad.dtype) if to_x else None,
            grad.flatten(0, -2).sum(0) if to_bias else None,
            None,
        )
