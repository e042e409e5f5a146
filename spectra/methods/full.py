"""Full fine-tuning as a method: every parameter of the matched modules trains, and the update is what it moved by.

Nothing is wrapped: the model stays what it was, name for name, so that transformers saves it as it would without us. A
part stands beside its module and remembers where the parameters started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from spectra.methods.injection import is_conv1d
from spectra.methods.parts import take

if TYPE_CHECKING:
    from spectra.methods.injection import Injection


@dataclass(frozen=True)
class FullFineTune:
    r"""Training of whole parameters: linear maps, embeddings, norms, experts, whatever holds any.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> injection = inject(model, "", FullFineTune())
    >>> injection
    full fine-tuning at 2 modules matching '', 1 of another kind ignored: 43 of 43 parameters train (100.00%)
    >>> with torch.no_grad():
    ...     _ = model[2].weight.add_(0.5)
    >>> injection.parts["2"].delta_weight()[0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    name: ClassVar[str] = "full fine-tuning"
    peft_type: ClassVar[str | None] = None

    def accepts(self, module: nn.Module) -> bool:
        """Every module that holds parameters of its own."""
        return any(parameter.is_floating_point() for parameter in module.parameters(recurse=False))

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Let every named module's own parameters train; see `Method.attach`. Nothing is random."""
        parts: dict[str, nn.Module] = {name: FullWeight(model.get_submodule(name)) for name in names}
        for name in names:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(parameter.is_floating_point())
        return parts

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """PEFT has no type for it: the modules alone."""
        return {"peft_type": self.peft_type, "target_modules": list(injection.parts)}


class FullWeight(nn.Module):
    """One module's own parameters, and where they started.

    Parameters
    ----------
    module : Module
        Whose parameters train; its submodules' are not meant.

    Attributes
    ----------
    merged : bool
        As `merge` and `unmerge` left it: the weight that trains holds the update always.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.merged = False
        self._holder = (module,)  # in a tuple, so that it is no submodule
        self._start = {name: parameter.detach().clone() for name, parameter in self._own().items()}

    def _own(self) -> dict[str, nn.Parameter]:
        """The module's parameters as they are now: moving a model may have exchanged them."""
        (module,) = self._holder
        return dict(module.named_parameters(recurse=False))

    def delta_weight(self) -> torch.Tensor:
        """W − W₀ of ``weight``, or of the largest parameter where none is called so; Conv1D's turned to (out, in)."""
        deltas = self.deltas()
        if "weight" not in deltas:
            return max(deltas.values(), key=torch.Tensor.numel)
        return deltas["weight"].t() if is_conv1d(self._holder[0]) else deltas["weight"]

    def deltas(self) -> dict[str, torch.Tensor]:
        """What every parameter moved by, as stored, subtracted in the wider dtype of start and now."""
        return {
            name: (parameter.detach() - self._start[name].to(parameter.device)).to(parameter.dtype)
            for name, parameter in self._own().items()
        }

    def merge(self) -> None:
        """Note it alone: the stored weight is the trained one."""
        self.merged = True

    def unmerge(self) -> None:
        """Note it alone."""
        self.merged = False

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """All of the module's own."""
        yield from self._own().values()

    def state(self) -> dict[str, torch.Tensor]:
        """The parameters by their names."""
        return {name: parameter.detach() for name, parameter in self._own().items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the parameters; where they started stays what it was. Raises `MismatchError`."""
        (module,) = self._holder
        take(self.state(), tensors, part=type(module).__name__)
