"""What the parts of several methods share: swapping a weight in and out, a part's dtype and device, taking tensors."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn

from spectra.errors import MismatchError


class WeightSwap:
    """A module's parameter, exchanged for a changed one and back.

    The parameter itself is kept and put back, so what comes back is the same bit for bit, and a weight that another
    module shares (an embedding tied to a language model's head) is shared again; meanwhile the other one is unchanged.
    """

    def __init__(self) -> None:
        self._kept: nn.Parameter | None = None

    @property
    def holds(self) -> bool:
        """Whether a changed parameter stands in the module."""
        return self._kept is not None

    def put(self, module: nn.Module, update: torch.Tensor, *, name: str = "weight") -> None:
        """Exchange the parameter for itself plus an update, added in the wider dtype of the two.

        Parameters
        ----------
        module : Module
            Whose parameter it is.
        update : Tensor
            Of the stored shape.
        name : str
            Attribute that holds it.
        """
        if self._kept is None:
            kept = getattr(module, name)
            assert isinstance(kept, nn.Parameter)  # for the type checker: methods accept modules that have one
            with torch.no_grad():
                changed = (kept + update).to(kept.dtype)
            self._kept = kept
            setattr(module, name, nn.Parameter(changed, requires_grad=False))

    def restore(self, module: nn.Module, *, name: str = "weight") -> None:
        """Put the kept parameter back, on the device and in the dtype that the module has by now."""
        if self._kept is not None:
            kept, now = self._kept, getattr(module, name)
            if (kept.dtype, kept.device) != (now.dtype, now.device):
                kept = nn.Parameter(kept.detach().to(dtype=now.dtype, device=now.device), requires_grad=False)
            setattr(module, name, kept)
            self._kept = None


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """Dtype of a part's parameters: the base weight's, or float32 where small steps would vanish in that.

    Examples
    --------
    >>> adapter_dtype(nn.Linear(2, 2, dtype=torch.bfloat16)), adapter_dtype(nn.Linear(2, 2, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    weight = getattr(base, "weight", None)
    wide = isinstance(weight, torch.Tensor) and weight.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter or buffer."""
    return next(chain(module.parameters(), module.buffers())).device


def take(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], *, part: str) -> None:
    """Copy tensors into the parameters of the same names.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        What a part's `state` gives; changed in place.
    tensors : mapping of str to Tensor
        What to take.
    part : str
        What the part is, for messages.

    Raises
    ------
    MismatchError
        If a name is missing or foreign, or a shape differs; nothing is copied then.
    """
    missing, foreign = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or foreign:
        raise MismatchError(
            f"{part} holds {', '.join(sorted(parameters))}; "
            + "; ".join(
                f"{words}: {', '.join(names)}"
                for words, names in (("missing", missing), ("not its own", foreign))
                if names
            )
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise MismatchError(
                f"{part}: {name} is {tuple(tensors[name].shape)} in what was given and {tuple(parameter.shape)} here"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
