r"""IA3: learned vectors that rescale keys, values and the feed-forward network's inner activation.

A part at a projection to keys or values multiplies its output, y = l ⊙ (Wx + b); one at the feed-forward network's
second matrix multiplies its input, y = W(l ⊙ x) + b (Liu et al. [1]_, section 3.3). Both are the same as a rescaled
weight, by rows or by columns, so that they merge exactly. Vectors begin at one: training starts from the frozen model.

References
----------
.. [1] H. Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
   NeurIPS 2022.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.injection import features, is_conv1d, is_linear, replace_module
from spectra.methods.parts import WeightSwap, adapter_dtype, device_of, take
from spectra.methods.targets import module_names, shortest_endings

if TYPE_CHECKING:
    from spectra.methods.injection import Injection

# Second matrices of feed-forward networks, by the names that transformers' architectures give them.
FEEDFORWARD = r"(^|\.)(output\.dense|down_proj|mlp\.c_proj|fc2|fc_out|wo|w2|dense_4h_to_h)$"


@dataclass(frozen=True)
class IA3:
    r"""Rescaling vectors on linear maps.

    Parameters
    ----------
    feedforward : str
        Regular expression searched in the names of the modules that are matched: those it finds are rescaled at their
        input, in columns, all others at their output, in rows. The default finds the second matrix of the
        feed-forward networks of BERT, Llama, GPT-2, OPT, T5 and their relatives.

    Raises
    ------
    UsageError
        If `feedforward` is not a regular expression.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> inject(model, "0|2", IA3(feedforward="2"))
    IA3 at 2 modules matching '0|2': 8 of 51 parameters train (15.69%)
    """

    name: ClassVar[str] = "IA3"
    peft_type: ClassVar[str | None] = "IA3"

    feedforward: str = FEEDFORWARD

    def __post_init__(self) -> None:
        try:
            re.compile(self.feedforward)
        except re.error as error:
            raise UsageError(f"IA3's feedforward is no regular expression: {self.feedforward!r}: {error}") from error

    def accepts(self, module: nn.Module) -> bool:
        """Linear, and transformers' Conv1D."""
        return is_linear(module)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap every named module; see `Method.attach`. Nothing is random."""
        parts: dict[str, nn.Module] = {}
        for name in names:
            columns = re.search(self.feedforward, name) is not None
            parts[name] = IA3Linear(model.get_submodule(name), columns=columns)
            replace_module(model, name, parts[name])
        return parts

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields of PEFT's IA3Config."""
        parts = {name: cast(IA3Linear, part) for name, part in injection.parts.items()}
        columns = [name for name, part in parts.items() if part.columns]
        rows = [name for name in parts if name not in columns]
        modules = module_names(injection)
        return {
            "peft_type": self.peft_type,
            **_patterns(rows, columns, modules),
            "fan_in_fan_out": any(is_conv1d(part.base) for part in parts.values()),
            "init_ia3_weights": True,
        }


class IA3Linear(nn.Module):
    """A linear map whose output, or input, is rescaled entry by entry.

    Parameters
    ----------
    base : Module
        The frozen map, Linear or Conv1D.
    columns : bool
        Whether the input is rescaled, the columns of W, rather than the output, its rows.

    Attributes
    ----------
    ia3_l : Parameter of shape (1, in) or (out, 1)
        l, as PEFT shapes it: (1, in) where it rescales the input. In the base's dtype, in float32 where that is
        narrower.
    merged : bool
        Whether the base holds the rescaled weight at present.
    """

    def __init__(self, base: nn.Module, *, columns: bool) -> None:
        super().__init__()
        rows, cols = features(base)
        self.base = base
        self.columns = columns
        self._weight, self._bias = WeightSwap(), WeightSwap()
        self._frozen: tuple[torch.Tensor, ...] = ()  # while merged: W, which the update is a multiple of
        shape = (1, cols) if columns else (rows, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=adapter_dtype(base), device=device_of(base)))

    @property
    def merged(self) -> bool:
        """Whether the base holds the rescaled weight at present."""
        return self._weight.holds

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return cast(torch.Tensor, self.base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give l ⊙ (Wx + b), or W(l ⊙ x) + b; (…, in) → (…, out)."""
        if self.merged:
            return cast(torch.Tensor, self.base(x))
        scale = self.ia3_l.flatten()
        if self.columns:
            return cast(torch.Tensor, self.base(x * scale.to(x.dtype)))
        y = cast(torch.Tensor, self.base(x))
        return y * scale.to(y.dtype)

    def delta_weight(self) -> torch.Tensor:
        """W ⊙ (l − 1), (out, in), in the dtype of l; from the unmerged W."""
        weight = self._frozen[0] if self._frozen else self.weight
        weight = weight.detach().to(self.ia3_l)
        return (weight.t() if is_conv1d(self.base) else weight) * (self.ia3_l.detach() - 1)

    def merge(self) -> None:
        """Rescale the stored weight, and the bias where rows are rescaled; see `WeightMethod.merge`."""
        if self.merged:
            return
        update = self.delta_weight()
        bias = getattr(self.base, "bias", None)
        if bias is not None and not self.columns:
            self._bias.put(self.base, bias.detach() * (self.ia3_l.detach().flatten() - 1), name="bias")
        self._frozen = (self.weight,)
        self._weight.put(self.base, update.t() if is_conv1d(self.base) else update)

    def unmerge(self) -> None:
        """Put weight and bias back, bit for bit."""
        self._weight.restore(self.base)
        self._frozen = ()
        self._bias.restore(self.base, name="bias")

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The vector."""
        yield self.ia3_l

    def state(self) -> dict[str, torch.Tensor]:
        """PEFT's name and shape: ``ia3_l``."""
        return {"ia3_l": self.ia3_l.detach()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the vector; see `ActivationMethod.load_state`."""
        take(self.state(), tensors, part="an IA3 vector over " + ("inputs" if self.columns else "outputs"))

    def extra_repr(self) -> str:
        """What is rescaled."""
        return "input rescaled" if self.columns else "output rescaled"


def _patterns(rows: list[str], columns: list[str], modules: list[str]) -> dict[str, list[str] | str]:
    """PEFT's two fields of names: endings, where they tell the modules apart, or else regular expressions of all names.

    PEFT takes an ending of ``feedforward_modules`` for one of letters, not of names between dots, and wants each to
    stand in ``target_modules`` as well.
    """
    by_rows, by_columns = shortest_endings(rows, modules), shortest_endings(columns, modules)
    if by_rows is None or by_columns is None or any(name.endswith(tuple(by_columns)) for name in rows):
        every = ("|".join(map(re.escape, names)) for names in (rows + columns, columns))
        return dict(zip(("target_modules", "feedforward_modules"), every, strict=True))
    return {"target_modules": by_rows + by_columns, "feedforward_modules": by_columns}
