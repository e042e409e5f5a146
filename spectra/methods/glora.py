"""GLoRA: scales, shifts and low-rank updates of a weight, its bias and its input, each module with its own structure.

The forward pass is (W + W⊙A + B)x + b + b⊙D + E + Wc with five support tensors (Chavan et al. [1]_, section 3). A and
B, of W's shape, are low-rank products, vectors with an entry a row, scalars or absent; c, of the input's shape, a
product, a vector or absent; D and E, of the bias's, vectors, scalars or absent. The update is zero at the start, and
all of it folds into one weight and one bias, so that a merged module costs what the plain one does.
`spectra.methods.glora_search` finds a structure for each module.

The paper writes A beside W without saying how they multiply; the authors' code, and this, multiply entry by entry.

References
----------
.. [1] A. Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv:2306.07967, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional

from spectra.errors import UsageError
from spectra.methods.injection import features, is_conv1d, is_linear, replace_module
from spectra.methods.parts import WeightSwap, adapter_dtype, device_of, take
from spectra.methods.targets import target_modules

if TYPE_CHECKING:
    from spectra.methods.injection import Injection

CHOICES = {
    "a": ("lora", "vector", "scalar", "none"),
    "b": ("lora", "vector", "scalar", "none"),
    "c": ("lora", "vector", "none"),
    "d": ("vector", "scalar", "none"),
    "e": ("vector", "scalar", "none"),
}
"""What each support tensor may be."""


@dataclass(frozen=True)
class Structure:
    """What the five support tensors of one module are.

    Parameters
    ----------
    a, b : {"lora", "vector", "scalar", "none"}
        Scale and shift of the weight.
    c : {"lora", "vector", "none"}
        Shift of the input.
    d, e : {"vector", "scalar", "none"}
        Scale and shift of the bias.
    rank : int
        Of the products.

    Raises
    ------
    UsageError
        If a tensor cannot be what it is said to be.

    Examples
    --------
    >>> Structure(a="vector", b="lora", c="none", d="none", e="vector", rank=2).parameters(10, 20)
    80
    """

    a: str = "lora"
    b: str = "lora"
    c: str = "lora"
    d: str = "vector"
    e: str = "vector"
    rank: int = 4

    def __post_init__(self) -> None:
        for letter, choices in CHOICES.items():
            if getattr(self, letter) not in choices:
                raise UsageError(f"GLoRA's {letter} is one of {', '.join(choices)}, not {getattr(self, letter)!r}")
        if self.rank < 1:
            raise UsageError(f"GLoRA needs a rank of at least 1, not {self.rank}")

    def shapes(self, out: int, inner: int, *, bias: bool = True) -> dict[str, tuple[int, int]]:
        """Shapes of the tensors that a module of (out, in) needs, by name; without a bias there is no D."""
        rows = {"a": (out, inner), "b": (out, inner), "c": (inner, 1), "d": (out, 1), "e": (out, 1)}
        shapes = {}
        for letter, (high, wide) in rows.items():
            kind = getattr(self, letter)
            if kind == "none" or (letter == "d" and not bias):
                continue
            if kind == "lora":
                shapes[f"glora_{letter}_left"] = (high, self.rank)
                shapes[f"glora_{letter}_right"] = (self.rank, wide)
            else:
                shapes[f"glora_{letter}"] = (high if kind == "vector" else 1, 1)
        return shapes

    def parameters(self, out: int, inner: int, *, bias: bool = True) -> int:
        """Number of scalars that a module of (out, in) trains."""
        return sum(rows * cols for rows, cols in self.shapes(out, inner, bias=bias).values())

    def __str__(self) -> str:
        return "/".join(getattr(self, letter) for letter in CHOICES) + f"@{self.rank}"


@dataclass(frozen=True)
class GLoRA:
    """Generalized LoRA with one structure for all modules, or with a structure for some by name.

    Parameters
    ----------
    rank, a, b, c, d, e
        As `Structure`.
    structures : mapping of str to Structure
        Structures of single modules, by their names in the model: what a search has found.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> inject(model, "^0$", GLoRA(rank=1, a="vector", c="none"))
    GLoRA at 1 modules matching '^0$': 22 of 65 parameters train (33.85%)
    """

    name: ClassVar[str] = "GLoRA"
    peft_type: ClassVar[str | None] = None

    rank: int = 4
    a: str = "lora"
    b: str = "lora"
    c: str = "lora"
    d: str = "vector"
    e: str = "vector"
    structures: Mapping[str, Structure] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self.structure()

    def structure(self, module: str | None = None) -> Structure:
        """The structure of a named module, or of those that none is given for."""
        common = Structure(self.a, self.b, self.c, self.d, self.e, self.rank)
        return common if module is None else self.structures.get(module, common)

    def accepts(self, module: nn.Module) -> bool:
        """Linear, and transformers' Conv1D."""
        return is_linear(module)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap every named module; see `Method.attach`.

        Raises
        ------
        UsageError
            If a rank is above min(out, in) of its module, or a structure is given for a module that gets no part.
        """
        foreign = sorted(self.structures.keys() - set(names))
        if foreign:
            raise UsageError(f"GLoRA has structures for modules that the pattern does not match: {', '.join(foreign)}")
        plan = {name: (model.get_submodule(name), self.structure(name)) for name in names}
        for name, (module, structure) in plan.items():
            check_rank(name, module, structure)
        parts: dict[str, nn.Module] = {}
        for name, (module, structure) in plan.items():
            parts[name] = GLoRALinear(module, structure, generator)
            replace_module(model, name, parts[name])
        return parts

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields in the shape of PEFT's, which knows no GLoRA: `from_peft_config` reads them back."""
        parts = cast("dict[str, GLoRALinear]", injection.parts)
        return {
            "peft_type": self.peft_type,
            "r": self.rank,
            "structure": {letter: getattr(self, letter) for letter in CHOICES},
            "structures": {name: asdict(part.structure) for name, part in parts.items() if name in self.structures},
            "target_modules": target_modules(injection),
            "fan_in_fan_out": any(is_conv1d(part.base) for part in parts.values()),
            "bias": "none",
        }

    @classmethod
    def from_peft_config(cls, fields: Mapping[str, Any]) -> GLoRA:
        """The method that `peft_config` described."""
        structures = {name: Structure(**kinds) for name, kinds in (fields.get("structures") or {}).items()}
        return cls(rank=int(fields["r"]), structures=structures, **fields["structure"])


class GLoRALinear(nn.Module):
    """A linear map whose weight, bias and input carry support tensors.

    Parameters
    ----------
    base : Module
        The frozen map, Linear or Conv1D.
    structure : Structure
        What the support tensors are.
    generator : Generator
        Source of the right factors' start (uniform, Glorot's width), on the CPU. All else starts at zero.

    Attributes
    ----------
    structure : Structure
        May be set to any that fits in the one that tensors were made for: a smaller rank takes the first columns, a
        vector the first column, a scalar the first entry ([1]_, weight entanglement).
    merged : bool
        Whether the base's weight and bias hold the update at present.
    """

    def __init__(self, base: nn.Module, structure: Structure, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.structure = structure
        self._weight_swap = WeightSwap()
        self._bias_swap = WeightSwap()
        self._before: tuple[torch.Tensor, torch.Tensor | None] | None = None  # weight and bias, while merged
        out, inner = features(base)
        for name, shape in structure.shapes(out, inner, bias=base.bias is not None).items():
            start = torch.zeros(shape)
            if name.endswith("_right"):
                start.uniform_(-1.0, 1.0, generator=generator).mul_(math.sqrt(6.0 / sum(shape)))
            self.register_parameter(name, nn.Parameter(start.to(device_of(base), adapter_dtype(base))))

    @property
    def merged(self) -> bool:
        """Whether the base's weight and bias hold the update at present."""
        return self._weight_swap.holds

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return cast(torch.Tensor, self.base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(W + W⊙A + B)x + b + b⊙D + E + Wc, (…, in) → (…, out); the weight is folded first, for one product."""
        if self.merged:
            return cast(torch.Tensor, self.base(x))
        update, shift = self._weight_update(), self._bias_update()
        if update is None:
            h = cast(torch.Tensor, self.base(x))
            return h if shift is None else h + shift.to(h.dtype)
        weight, bias = self._plain()
        if weight.dtype != update.dtype:  # a half-precision base: small updates would vanish in a folded weight
            h = cast(torch.Tensor, self.base(x))
            return h + functional.linear(x.to(update.dtype), update, shift).to(h.dtype)
        if bias is not None:
            shift = bias if shift is None else bias + shift
        return functional.linear(x, weight + update, shift)

    def delta_weight(self) -> torch.Tensor:
        """W⊙A + B, (out, in)."""
        update = self._weight_update()
        return torch.zeros(features(self.base), **self._like()) if update is None else update.detach()

    def delta_bias(self) -> torch.Tensor:
        """b⊙D + E + Wc, (out,)."""
        shift = self._bias_update()
        return torch.zeros(features(self.base)[0], **self._like()) if shift is None else shift.detach()

    def merge(self) -> None:
        """Exchange the base's weight and bias for the changed ones; a base without bias gets one meanwhile."""
        if self.merged:
            return
        update, shift = self.delta_weight(), self._bias_update()
        bias = cast("torch.Tensor | None", self.base.bias)
        before = self.weight, bias
        if shift is not None:
            if bias is None:
                self.base.bias = nn.Parameter(torch.zeros_like(shift, dtype=self.weight.dtype), requires_grad=False)
            self._bias_swap.put(self.base, shift.detach(), name="bias")
        self._weight_swap.put(self.base, update.t() if is_conv1d(self.base) else update)
        self._before = before

    def unmerge(self) -> None:
        """Put weight and bias back, bit for bit."""
        if self._before is None:
            return
        self._weight_swap.restore(self.base)
        self._bias_swap.restore(self.base, name="bias")
        if self._before[1] is None:
            self.base.register_parameter("bias", None)
        self._before = None

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The support tensors, those that the structure at present leaves out included."""
        yield from (parameter for name, parameter in self.named_parameters() if name.startswith("glora_"))

    def state(self) -> dict[str, torch.Tensor]:
        """The support tensors of the structure at present, cut to its size."""
        out, inner = features(self.base)
        shapes = self.structure.shapes(out, inner, bias=self.plain_bias is not None)
        return {name: self._cut(name, shape).detach() for name, shape in shapes.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the support tensors of the structure at present; raises `MismatchError`."""
        take(self.state(), tensors, part=f"GLoRA of structure {self.structure}")

    def _like(self) -> dict[str, Any]:
        return {"dtype": adapter_dtype(self.base), "device": device_of(self.base)}

    def _plain(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (out, in) and b as they are without the support tensors, merged or not."""
        weight, bias = self._before or (self.weight, cast("torch.Tensor | None", self.base.bias))
        return (weight.t() if is_conv1d(self.base) else weight), bias

    @property
    def plain_bias(self) -> torch.Tensor | None:
        """The bias as it is without the support tensors, merged or not; None where there is none."""
        return self._plain()[1]

    def _cut(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """The leading rows and columns of an allocated tensor; vectors and scalars may lie in a left factor."""
        tensor = cast(torch.Tensor, getattr(self, name if hasattr(self, name) else f"{name}_left"))
        return tensor[: shape[0], : shape[1]]

    def _support(self, letter: str) -> torch.Tensor | None:
        """A support tensor, of its own shape or of one that broadcasts to it; None where it is absent."""
        out, inner = features(self.base)
        shapes = self.structure.shapes(out, inner, bias=self.plain_bias is not None)
        name = f"glora_{letter}"
        if name in shapes:
            return self._cut(name, shapes[name])
        if f"{name}_left" not in shapes:
            return None
        left, right = (self._cut(f"{name}_{side}", shapes[f"{name}_{side}"]) for side in ("left", "right"))
        return left @ right

    def _weight_update(self) -> torch.Tensor | None:
        weight, _ = self._plain()
        scale, shift = self._support("a"), self._support("b")
        update = None if scale is None else weight * scale
        if shift is None:
            return update
        return shift.expand(weight.shape) if update is None else update + shift

    def _bias_update(self) -> torch.Tensor | None:
        weight, bias = self._plain()
        scale, shift, prompt = self._support("d"), self._support("e"), self._support("c")
        terms = []
        if bias is not None and scale is not None:
            terms.append(bias * scale.reshape(-1))
        if shift is not None:
            terms.append(shift.reshape(-1).expand(len(weight)))
        if prompt is not None:
            terms.append(weight.to(prompt.dtype) @ prompt.reshape(-1))
        return torch.stack(terms).sum(dim=0) if terms else None


def check_rank(name: str, module: nn.Module, structure: Structure) -> None:
    """Raise `UsageError` where a structure's products cannot have their rank."""
    out, inner = features(module)
    if "lora" in (structure.a, structure.b) and structure.rank > min(out, inner):
        raise UsageError(
            f"{name} is {out} × {inner}: GLoRA cannot have rank {structure.rank} there; lower it to {min(out, inner)}"
        )
