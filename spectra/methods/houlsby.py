r"""Houlsby's adapters: a bottleneck with a skip connection behind the projections that end a layer's two halves.

A part stands behind the projection that ends the attention (``attention.output.dense``, ``o_proj``) or the
feed-forward network (``output.dense``, ``down_proj``), before the layer adds its residual: h + W_up f(W_down h)
(Houlsby et al. [1]_, section 2.1 and figure 2). Its weights begin so small that it is nearly the identity. The authors
train the layer norms as well: name them in `inject`'s ``also``.

References
----------
.. [1] N. Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional

from spectra.errors import UsageError
from spectra.methods.injection import features, is_linear, replace_module
from spectra.methods.parts import adapter_dtype, device_of, take
from spectra.methods.targets import target_modules

if TYPE_CHECKING:
    from spectra.methods.injection import Injection

# Standard deviation of the start, cut at two of them; larger ones hurt in the authors' figure 6.
_STD = 1e-2

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Houlsby:
    r"""Bottleneck adapters behind linear maps.

    Parameters
    ----------
    bottleneck : int
        m, the width between W_down (m, out) and W_up (out, m); the paper sweeps 8, 64 and 256. A part trains
        2·m·out + m + out scalars.
    activation : {"gelu", "relu", "silu", "tanh"}
        f.

    Raises
    ------
    UsageError
        If a field is out of range.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> inject(model, "^0$", Houlsby(bottleneck=2))
    Houlsby adapter at 1 modules matching '^0$': 22 of 65 parameters train (33.85%)
    """

    name: ClassVar[str] = "Houlsby adapter"
    peft_type: ClassVar[str | None] = None

    bottleneck: int = 64
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise UsageError(f"an adapter's bottleneck is at least 1 wide, not {self.bottleneck}")
        if self.activation not in _ACTIVATIONS:
            raise UsageError(f"an adapter's activation is {', '.join(_ACTIVATIONS)}, not {self.activation!r}")

    def accepts(self, module: nn.Module) -> bool:
        """Linear, and transformers' Conv1D."""
        return is_linear(module)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap every named module; see `Method.attach`."""
        parts: dict[str, nn.Module] = {}
        for name in names:
            parts[name] = Bottleneck(model.get_submodule(name), self.bottleneck, generator, activation=self.activation)
            replace_module(model, name, parts[name])
        return parts

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """What the parts need to be built again; PEFT has no type for them."""
        return {
            "peft_type": self.peft_type,
            "bottleneck": self.bottleneck,
            "activation": self.activation,
            "target_modules": target_modules(injection),
        }


class Bottleneck(nn.Module):
    """A linear map with a bottleneck adapter behind it.

    Parameters
    ----------
    base : Module
        The frozen map, Linear or Conv1D.
    bottleneck : int
        m.
    generator : Generator
        Source of the weights' start, on the CPU.
    activation : str
        As `Houlsby`.

    Attributes
    ----------
    adapter_down, adapter_up : Linear
        W_down (m, out) and W_up (out, m) with their biases, which start at zero. In the base's dtype, in float32
        where that is narrower.
    """

    def __init__(
        self, base: nn.Module, bottleneck: int, generator: torch.Generator, *, activation: str = "gelu"
    ) -> None:
        super().__init__()
        width, _ = features(base)
        self.base = base
        self.activation = activation
        dtype, device = adapter_dtype(base), device_of(base)
        self.adapter_down = _near_zero(width, bottleneck, generator).to(dtype=dtype, device=device)
        self.adapter_up = _near_zero(bottleneck, width, generator).to(dtype=dtype, device=device)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return cast(torch.Tensor, self.base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give h + W_up f(W_down h) with h = Wx + b; (…, in) → (…, out)."""
        h = cast(torch.Tensor, self.base(x))
        narrow = _ACTIVATIONS[self.activation](self.adapter_down(h.to(self.adapter_down.weight.dtype)))  # (…, m)
        return h + cast(torch.Tensor, self.adapter_up(narrow)).to(h.dtype)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Both maps' weights and biases."""
        yield from self.adapter_down.parameters()
        yield from self.adapter_up.parameters()

    def state(self) -> dict[str, torch.Tensor]:
        """``adapter_down.weight``, ``adapter_down.bias``, ``adapter_up.weight`` and ``adapter_up.bias``."""
        maps = {"adapter_down": self.adapter_down, "adapter_up": self.adapter_up}
        return {f"{name}.{key}": value.detach() for name, map in maps.items() for key, value in map.named_parameters()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take both maps; see `ActivationMethod.load_state`."""
        take(self.state(), tensors, part=f"an adapter with a bottleneck of {self.adapter_down.out_features}")


def _near_zero(cols: int, rows: int, generator: torch.Generator) -> nn.Linear:
    """A linear map drawn from a normal of standard deviation 1e-2 cut at two of them, with no bias yet."""
    linear = nn.Linear(cols, rows, device="meta").to_empty(device="cpu")  # no draw from the global generator
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)
        linear.bias.zero_()
    return linear
