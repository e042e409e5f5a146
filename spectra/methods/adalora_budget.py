"""What AdaLoRA adds to training: the penalty, importance scores, and pruning to the budget.

The arithmetic is `spectra.importance`; here it meets the steps of a training, in the order of algorithm 1 of
Zhang et al. [1]_: gradients, scores, the optimizer's step, then the mask on Λ.

References
----------
.. [1] Q. Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from spectra.errors import MismatchError
from spectra.importance import (
    Smoothed,
    budget,
    entry_scores,
    keep_best,
    magnitude_scores,
    sensitivity,
    smooth,
    triplet_scores,
)

if TYPE_CHECKING:
    from spectra.methods.adalora import AdaLoRA, AdaLoRALinear

_LEFT_VALUES_RIGHT = ("lora_B", "lora_E", "lora_A")


class AdaLoRAHooks:
    """What AdaLoRA adds to training: the penalty, scores between backward pass and step, pruning after the step.

    Parameters
    ----------
    method : AdaLoRA
        Weights and schedule.
    parts : dict of str to AdaLoRALinear
        What was injected, by module name.

    Attributes
    ----------
    smoothed : dict of str to Smoothed
        Averages by ``<module>.<parameter>``; empty once the budget is settled.
    settled : bool
        Whether the last budget has been spent for good.
    total : int or None
        Steps of the training, once it has begun.
    """

    def __init__(self, method: AdaLoRA, parts: dict[str, AdaLoRALinear]) -> None:
        self.method = method
        self.parts = parts
        self.smoothed: dict[str, Smoothed] = {}
        self.total: int | None = None
        self.settled = False

    def penalty(self) -> torch.Tensor | None:
        """γ Σ (‖PᵀP − I‖_F² + ‖QQᵀ − I‖_F²) over the modules ([1]_, below eq. 4)."""
        if not self.method.regularizer:
            return None
        return self.method.regularizer * torch.stack([part.penalty() for part in self.parts.values()]).sum()

    def on_gradients(self, step: int, total: int) -> None:
        """Score every entry from its gradient, up to the step before the budget is final."""
        self.total = total
        late = step >= total - self.method.schedule(total).final and bool(self.smoothed)
        if self.settled or late or self.method.score == "magnitude":
            return
        for name, part in self.parts.items():
            for suffix in _LEFT_VALUES_RIGHT:
                parameter = cast(nn.Parameter, getattr(part, suffix))
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.smoothed[f"{name}.{suffix}"] = smooth(
                    self.smoothed.get(f"{name}.{suffix}"),
                    sensitivity(parameter, gradient),
                    beta1=self.method.beta1,
                    beta2=self.method.beta2,
                )

    def after_step(self, step: int, total: int) -> None:
        """Prune to the budget of this step; once the last one is reached, hold its choice.

        A loop that leaves out a step (one whose half-precision gradients overflowed) settles at the next.
        """
        warmup, final, interval = self.method.schedule(total)
        if self.settled:
            for part in self.parts.values():
                part.prune(part.kept)
            return
        self.settled = final > 0 and step >= total - final
        if self.settled or (step > warmup and step % interval == 0):
            for part, keep in zip(self.parts.values(), self._choice(step, total), strict=True):
                part.prune(keep)
                if self.settled:
                    part.kept = keep
        if self.settled:
            self.smoothed.clear()

    def scores(self) -> list[torch.Tensor]:
        """Triplet scores at present, one tensor of shape (r,) a module."""
        if self.method.score == "magnitude":
            return [magnitude_scores(part.lora_B, part.lora_E, part.lora_A) for part in self.parts.values()]
        return [
            triplet_scores(*(entry_scores(self.smoothed[f"{name}.{suffix}"]) for suffix in _LEFT_VALUES_RIGHT))
            for name in self.parts
        ]

    def _choice(self, step: int, total: int) -> list[torch.Tensor]:
        warmup, final, _ = self.method.schedule(total)
        start = sum(len(part.lora_E) for part in self.parts.values())
        end = min(start, self.method.rank * len(self.parts))
        now = budget(step, total=total, warmup=warmup, final=final, start=start, end=end)
        return keep_best(self.scores(), now)

    def state_dict(self) -> dict[str, Any]:
        """Averages, the final choice and the number of steps."""
        return {
            "total": self.total,
            "settled": self.settled,
            "smoothed": {name: [s.clone() for s in pair] for name, pair in self.smoothed.items()},
            "kept": {name: part.kept.clone() for name, part in self.parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave.

        Raises
        ------
        MismatchError
            If it is of other modules.
        """
        if state["kept"].keys() != self.parts.keys():
            other = sorted(state["kept"].keys() ^ self.parts.keys())
            raise MismatchError(f"AdaLoRA's state is of other modules than the model's: {', '.join(other[:6])}")
        self.total, self.settled = state["total"], state["settled"]
        device = {name: part.lora_E.device for name, part in self.parts.items()}
        self.smoothed = {
            name: Smoothed(*(s.to(device[name.rpartition(".")[0]]) for s in pair))
            for name, pair in state["smoothed"].items()
        }
        for name, part in self.parts.items():
            part.kept = state["kept"][name].to(device[name])
