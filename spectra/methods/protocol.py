"""What a fine-tuning method is: a configuration that puts parts into a model, and the two kinds of parts.

A *method* (`LoRA(rank=8)`) is a frozen value. `inject` asks it for one *part* per matching module. A part of the first
kind changes the weight by a matrix that can be named, merged and taken out again; one of the second kind acts on
activations alone, and has no such matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

if TYPE_CHECKING:
    from spectra.methods.injection import Injection


@runtime_checkable
class ActivationMethod(Protocol):
    """A part that acts on activations: adapters, prefixes, prompts."""

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that this part trains, and no other."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Trained tensors by the suffix that PEFT's format gives them after the module's name (``lora_A.weight``)."""
        ...

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors as `state` gave them; raises `MismatchError` naming what is missing, foreign or misshapen."""
        ...


@runtime_checkable
class WeightMethod(ActivationMethod, Protocol):
    """A part that adds a matrix to one module's weight: LoRA, AdaLoRA, GLoRA, IA3, a full update."""

    merged: bool

    def delta_weight(self) -> torch.Tensor:
        """The update ΔW, (out, in) = (d, k) whatever way round the module stores its weight, in the part's dtype."""
        ...

    def merge(self) -> None:
        """Add the update to the stored weight; the forward pass is then the plain module's. Twice is once."""
        ...

    def unmerge(self) -> None:
        """Put back the weight that stood there before `merge`, bit for bit."""
        ...


class Method(Protocol):
    """A frozen configuration: what to put into a model, and how PEFT's format calls it."""

    name: ClassVar[str]
    peft_type: ClassVar[str | None]

    def accepts(self, module: nn.Module) -> bool:
        """Whether the method can be put at a module of this kind."""
        ...

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Put one part at each named module and return the parts by module name.

        Every parameter of the model is frozen already. Every random start is drawn from the generator (on the CPU),
        in the order of names, so that one seed gives one start on any device.
        """
        ...

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields of PEFT's ``adapter_config.json`` that this method decides, ``peft_type`` and patterns among them."""
        ...


class TrainingHooks(Protocol):
    """What a method may add to training; an `Injection` carries it where its method has a ``hooks`` method."""

    def penalty(self) -> torch.Tensor | None:
        """Term added to the loss of every step, or None."""
        ...

    def on_gradients(self, step: int, total: int) -> None:
        """Called after the backward pass and before the optimizer moves anything; step counts from 0."""
        ...

    def after_step(self, step: int, total: int) -> None:
        """Called after the optimizer has moved the parameters."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the parameters."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        ...
