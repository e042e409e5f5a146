"""`ImportanceRecorder`: every score of every direction that trains, recorded from each step's gradients.

The gradient is taken between the backward pass and the optimizer's step, with the parameters that it was taken at. It
is the one that the optimizer is about to use: of all accumulated batches and of all processes, the method's penalty
included, without float16's loss scale, and clipped, since that is what AdaLoRA's own scores see. The factor by which
clipping shortened it stands beside the scores. A step that an overflow skips is not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.errors import MismatchError
from spectra.importance.journal import JOURNAL, ImportanceJournal
from spectra.importance.recorded import NAME, Layout, Tracked
from spectra.importance.scores import SCORES, Factor, Smoothed, Triplets, fisher, sensitivity, smooth
from spectra.methods.injection import injections

# Names that low-rank parts give their left and right factors.
_FACTORS = (("lora_B", "lora_A"), ("lora_embedding_B", "lora_embedding_A"))
_BETA = 0.85  # AdaLoRA's, for methods that set none
# Entries taken at a time on a CPU, so that the dozen passes over them stay in its cache: all weights of a model of 23
# million took 0.69 s of one core in one piece each, and 0.26 s in pieces.
_PIECE = 1 << 17
_GRADIENT = "complete, penalty included, unscaled, clipped"


@dataclass(frozen=True)
class _Source:
    """Where the scores of something tracked come from: P, λ and Q, or one parameter as a whole."""

    tracked: Tracked
    parameters: dict[str, nn.Parameter]  # by key of the recorder's state; left, (values,) right


class ImportanceRecorder:
    """Keeps averages of every trained entry, and writes the scores of the directions that they make up.

    Parameters
    ----------
    model : Module
        Its parameters that require gradients are recorded: by direction where a low-rank part holds them, as a whole
        tensor otherwise.
    folder : Path
        Where ``importance.parquet`` goes.
    every : int
        Steps from one record to the next, the last step's included; averages take up every step.
    total : int
        Steps of the training.
    """

    def __init__(self, model: nn.Module, folder: Path, *, every: int, total: int) -> None:
        self.folder, self.every, self.total = folder, every, total
        self._sources = list(_sources(model))
        info = {"total": total, "every": every, "gradient": _GRADIENT, **_method_info(model, total)}
        self.layout = Layout(tuple(source.tracked for source in self._sources), info)
        self._smoothed: dict[str, Smoothed] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._journal: ImportanceJournal | None = None

    def begin(self, done: int, state: Mapping[str, Any] | None) -> None:
        """Open the journal, behind a step of an earlier part of the training or anew.

        Parameters
        ----------
        done : int
            Steps done.
        state : mapping or None
            `state_dict` at that step; None where nothing was recorded then.

        Raises
        ------
        MismatchError
            If steps were done of which nothing was recorded, or other things were.
        """
        if done == 0:
            self._journal = ImportanceJournal(self.folder, self.layout)
            return
        if done >= self.total and (self.folder / NAME).exists() and not (self.folder / JOURNAL).exists():
            return  # the record of a whole training stands already
        if state is None:
            raise MismatchError(
                f"{self.folder}: the first {done} steps were trained without --record-importance, and averages go over "
                "all steps: go on without it, or begin anew with --no-resume"
            )
        self._journal = ImportanceJournal(self.folder, self.layout, after=done, written=int(state["written"]))
        device = {key: p.device for source in self._sources for key, p in source.parameters.items()}
        self._smoothed = {
            key: Smoothed(*(tensor.to(device[key]) for tensor in pair)) for key, pair in state["smoothed"].items()
        }
        self._squares = {key: tensor.to(device[key]) for key, tensor in state["squares"].items()}

    @torch.no_grad()
    def on_gradients(self, number: int, clip: float) -> None:
        """Take up a step, between the backward pass and the optimizer.

        Parameters
        ----------
        number : int
            The step, from 1.
        clip : float
            Factor by which clipping has shortened the gradients.
        """
        due = number % self.every == 0 or number == self.total
        rows = []
        for source in self._sources:  # one at a time: what a step needs beside the averages is one matrix's
            factors = [self._factor(key, parameter) for key, parameter in source.parameters.items()]
            if due:
                rows.append(_scores(source.tracked, factors))
        if due and self._journal is not None:
            self._journal.append(number, clip, torch.cat(rows).float().cpu().numpy())  # the one wait for the device

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed training needs to record on."""
        return {
            "written": 0 if self._journal is None else self._journal.written,
            "smoothed": {key: list(pair) for key, pair in self._smoothed.items()},
            "squares": dict(self._squares),
        }

    def close(self, *, finished: bool) -> None:
        """Write the Parquet file; see `ImportanceJournal.close`."""
        if self._journal is not None:
            self._journal.close(finished=finished)

    def _factor(self, key: str, parameter: nn.Parameter) -> Factor:
        wide = torch.promote_types(parameter.dtype, torch.float32)  # a product of bfloat16 has three digits
        weight = parameter.detach().to(wide).contiguous()
        gradient = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.to(wide).contiguous()
        if key not in self._smoothed:
            self._smoothed[key] = Smoothed(torch.zeros_like(weight), torch.zeros_like(weight))
            self._squares[key] = torch.zeros_like(weight)
        factor = Factor(weight, torch.empty_like(weight), self._smoothed[key], self._squares[key])
        everything = (weight, gradient, factor.sensitivity, *factor.smoothed, factor.squares)
        size = _PIECE if weight.device.type == "cpu" else max(1, weight.numel())
        for piece in zip(*(torch.split(tensor.view(-1), size) for tensor in everything), strict=True):
            self._advance(*piece)
        return factor

    def _advance(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        now: torch.Tensor,
        mean: torch.Tensor,
        doubt: torch.Tensor,
        squares: torch.Tensor,
    ) -> None:
        """Take up a step in some entries' averages, in place."""
        now.copy_(sensitivity(weight, gradient))
        beta1, beta2 = self.layout.info["beta1"], self.layout.info["beta2"]
        smoothed = smooth(Smoothed(mean, doubt), now, beta1=beta1, beta2=beta2)
        mean.copy_(smoothed.sensitivity)
        doubt.copy_(smoothed.uncertainty)
        squares.copy_(fisher(squares, gradient))


def _scores(tracked: Tracked, factors: list[Factor]) -> torch.Tensor:
    """Every score, (directions, scores), or (1, scores) of a tensor as a whole."""
    if tracked.directions is None:
        return torch.stack([score.of_tensor(factors[0]) for score in SCORES.values()])[None]
    triplets = Triplets(factors[0], factors[1] if len(factors) == 3 else None, factors[-1])
    return torch.stack([score.of_triplets(triplets) for score in SCORES.values()], dim=1)


def _sources(model: nn.Module) -> Iterator[_Source]:
    """What trains: low-rank parts by direction, then every other parameter as a whole."""
    seen: set[nn.Parameter] = set()
    for injection in injections(model):
        for name, part in injection.parts.items():
            for left_name, right_name in _FACTORS:
                left, right = getattr(part, left_name, None), getattr(part, right_name, None)
                if left is None or right is None:
                    continue
                values = getattr(part, "lora_E", None)
                named = {left_name: left, **({} if values is None else {"lora_E": values}), right_name: right}
                seen.update(named.values())
                shape = (left.shape[0], right.shape[1])
                parameters = {f"{name}.{key}": parameter for key, parameter in named.items()}
                yield _Source(Tracked(name, left.shape[1], shape), parameters)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in seen:
            yield _Source(Tracked(name, None, tuple(parameter.shape)), {name: parameter})


def _method_info(model: nn.Module, total: int) -> dict[str, Any]:
    """The method's name, its weights of the past, and its own budget where it has one."""
    found = injections(model)
    method: Any = found[0].method if found else None
    told = {
        "method": None if method is None else method.name,
        "beta1": float(getattr(method, "beta1", _BETA)),
        "beta2": float(getattr(method, "beta2", _BETA)),
    }
    if hasattr(method, "schedule"):
        told |= {"rank": method.rank, "score": method.score, **method.schedule(total)._asdict()}
    return told
