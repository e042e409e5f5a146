"""`Run`: what the steps of one call of `train` share, how it is set up, and how it is saved and taken up again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.injection import injections
from spectra.methods.protocol import TrainingHooks
from spectra.train import checkpoint
from spectra.train.config import Batch, Batches, TrainConfig
from spectra.train.devices import device_for, make_accelerator, recomputed_activations, shared_between_processes
from spectra.train.optimizers import make_optimizer, trained
from spectra.train.recorder import ImportanceRecorder


@dataclass
class Run:
    """What the steps of one call share."""

    model: nn.Module  # as processes share it: DistributedDataParallel, or the bare model
    bare: nn.Module
    batches: Batches
    config: TrainConfig
    accelerator: Any
    device: torch.device
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    hooks: list[TrainingHooks]
    recorder: ImportanceRecorder | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    saved: int | None = None  # step of the checkpoint that stands in `path`

    @property
    def path(self) -> Path | None:
        """Where the checkpoint goes."""
        return None if self.config.out is None else self.config.out / checkpoint.NAME

    def numbers(self, index: int) -> list[int]:
        """Numbers of the batches that this process takes in an update."""
        processes, a = self.accelerator.num_processes, self.config.accumulation
        return [(index * a + turn) * processes + self.accelerator.process_index for turn in range(a)]

    def batch(self, number: int) -> Batch:
        """The batch of a number."""
        if isinstance(self.batches, (list, tuple)):
            number %= len(self.batches)
        try:
            found = self.batches(number) if callable(self.batches) else self.batches[number]
        except IndexError as error:
            raise UsageError(
                f"there is no batch {number}: {error}; a list of batches is taken round and round"
            ) from error
        if not isinstance(found, Mapping):
            raise UsageError(f"batch {number} is a {type(found).__name__}, not a dict of tensors by argument name")
        return found

    @contextmanager
    def draws(self, index: int) -> Iterator[None]:
        """Torch's random numbers of one step and process, those of the caller put back afterwards."""
        state = np.random.SeedSequence([self.config.seed, index, self.accelerator.process_index]).generate_state(2)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(state[0]) << 32 | int(state[1]))
            yield

    def agreed(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum") > 0)


@contextmanager
def prepared(model: nn.Module, batches: Batches, config: TrainConfig) -> Iterator[Run]:
    """Everything that steps share, and the model as it was (but for what it learnt) when they are over."""
    trained(model)  # before anything is moved: a model that trains nothing is a mistake
    if not (callable(batches) or hasattr(batches, "__getitem__")) or (
        isinstance(batches, (list, tuple)) and not batches
    ):
        raise UsageError(
            f"batches of type {type(batches).__name__} cannot be asked for by number, or are none: give a list, a "
            "function of the number, or an object with __getitem__; list(loader) makes a list of a DataLoader"
        )
    accelerator = make_accelerator(config)
    device = device_for(config, accelerator)
    model.to(device)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config, device), device_placement=False)
    optimizer.zero_grad()  # what a caller's own backward pass left behind is no part of the first step
    hooks = [injection.hooks for injection in injections(model) if injection.hooks is not None]
    mode = model.training
    with (
        recomputed_activations(model, config.gradient_checkpointing),
        shared_between_processes(model, accelerator) as shared,
    ):
        try:
            recorder = _recorder(model, config, accelerator)
            yield Run(shared, model, batches, config, accelerator, device, trained(model), optimizer, hooks, recorder)
        finally:
            model.train(mode)


def begin(run: Run) -> int:
    """Steps done already: those of the checkpoint that the run goes on from."""
    if run.path is None:
        return 0
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with run.draws(0):
        first = run.batch(0)
    run.fingerprint = checkpoint.fingerprint(run.bare, run.config, first, run.accelerator.num_processes)
    if not run.path.exists():
        if run.recorder is not None:
            run.recorder.begin(0, None)
        return 0
    if not run.config.resume:
        raise UsageError(
            f"{run.path} holds a run that was begun: resume = True goes on with it; remove it to begin anew, or name "
            "another folder"
        )
    state = checkpoint.load_checkpoint(run.path, run.fingerprint)
    with torch.no_grad():
        for name, tensor in [*run.parameters.items(), *checkpoint.running_statistics(run.bare).items()]:
            tensor.copy_(state["tensors"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    for hook, saved in zip(run.hooks, state["hooks"], strict=True):
        hook.load_state_dict(saved)
    run.saved = int(state["step"])
    if run.recorder is not None:
        run.recorder.begin(run.saved, state.get("importance"))
    return run.saved


def save(run: Run, number: int) -> None:
    """Write the checkpoint of a step, by the first process; the others wait."""
    if run.path is None:
        return
    if run.accelerator.is_main_process:
        tensors = {**run.parameters, **checkpoint.running_statistics(run.bare)}
        scaler = run.accelerator.scaler
        state = {
            "step": number,
            "fingerprint": run.fingerprint,
            "tensors": {name: tensor.detach() for name, tensor in tensors.items()},
            "optimizer": run.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "hooks": [hook.state_dict() for hook in run.hooks],
            "importance": None if run.recorder is None else run.recorder.state_dict(),
        }
        checkpoint.save_checkpoint(run.path, state)
    run.accelerator.wait_for_everyone()
    run.saved = number


def _recorder(model: nn.Module, config: TrainConfig, accelerator: Any) -> ImportanceRecorder | None:
    """The recorder that was asked for, on the process that writes: gradients are the same on all."""
    if config.record_importance is None or config.out is None or not accelerator.is_main_process:
        return None
    return ImportanceRecorder(model, config.out, every=config.record_importance, total=config.steps)
