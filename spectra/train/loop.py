"""`train`: the loop, a generator of steps.

One step is `_update`: gradients of so many batches, clipped; the method's own business; the optimizer. Around it stand
the checkpoint it may begin from, evaluation, the metrics file, and a bar. Learning rate, batches and random draws of a
step are functions of its number, so that a resumed run repeats, bit for bit, what an uninterrupted one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from spectra.errors import TrainingError
from spectra.train.config import Batch, Batches, TrainConfig
from spectra.train.interruption import HeldSignals
from spectra.train.metrics import NAME as METRICS
from spectra.train.metrics import MetricsFile
from spectra.train.objective import loss_of, on_device, targets
from spectra.train.setup import Run, begin, prepared, save

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Step:
    """One update of the parameters, as `train` yields it.

    Attributes
    ----------
    number : int
        Updates done with this one, from 1.
    loss : float
        Mean over all targets of the step's batches, before the update, the method's penalty aside.
    learning_rate : float
        Of groups whose factor is 1.
    gradient_norm : float
        Norm of the gradient of all trained parameters, before clipping.
    seconds : float
        Wall time of the update; evaluation and checkpoints aside.
    penalty : float
        What the method added to the loss.
    skipped : bool
        Whether an overflow in float16 kept the optimizer from moving.
    metrics : dict or None
        What `evaluate` returned, on the steps when it was called.
    """

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    penalty: float = 0.0
    skipped: bool = False
    metrics: Mapping[str, float] | None = None

    def record(self) -> dict[str, Any]:
        """The step as a line of ``metrics.jsonl``."""
        record: dict[str, Any] = {
            "step": self.number,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "seconds": round(self.seconds, 6),
        }
        if self.penalty:
            record["penalty"] = self.penalty
        if self.skipped:
            record["skipped"] = True
        if self.metrics is not None:
            record["metrics"] = dict(self.metrics)
        return record


def train(
    model: nn.Module, batches: Batches, config: TrainConfig, *, evaluate: Evaluate | None = None
) -> Iterator[Step]:
    """Train what a model's injected method trains, and yield every step.

    Nothing runs before the first step is asked for; leaving the ``for`` early ends training where it stands.

    Parameters
    ----------
    model : Module
        Changed in place, and moved to the device. Its parameters that require gradients train.
    batches : sequence, indexed or callable
        ``batches[n]`` or ``batches(n)`` is the n-th batch, always the same one; a list or tuple is taken round and
        round. Update i of p processes with accumulation a takes batches i·a·p to (i+1)·a·p − 1.
    config : TrainConfig
        How.
    evaluate : callable, optional
        Called with the model, on every process, as ``config.evaluate_every`` says and after the last step; what it
        returns stands in `Step.metrics`.

    Yields
    ------
    Step

    Raises
    ------
    UsageError
        If nothing trains, the device or precision is not here, or `out` holds a checkpoint and ``resume`` is off.
    MismatchError, CheckpointError
        If the checkpoint belongs to another run, or cannot be read.
    TrainingError
        If a loss or gradient is NaN or infinite. The parameters stay as they were before that step, and so does the
        last checkpoint.
    KeyboardInterrupt
        Ctrl-C: the step at hand is finished and saved first (SIGTERM: likewise, then the process ends).

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Linear(2, 1), torch.randn(32, 2)
    >>> batch = {"x": x, "y": x.sum(dim=1, keepdim=True)}
    >>> def squares(model, batch):
    ...     return (model(batch["x"]) - batch["y"]).square().mean()
    >>> steps = list(train(model, [batch], TrainConfig(steps=60, learning_rate=0.1, loss=squares, device="cpu")))
    >>> steps[-1].number, steps[-1].loss < 0.01 * steps[0].loss
    (60, True)
    """
    with prepared(model, batches, config) as run:
        done = begin(run)
        with closing(_metrics(run, done)) as metrics, closing(_bar(run, done)) as bar, _recording(run):
            for index in range(done, config.steps):
                with HeldSignals() as held:
                    step = _update(run, index)
                    if evaluate is not None and _due(step.number, config.evaluate_every or config.steps, config):
                        with run.draws(index):
                            step = replace(step, metrics=evaluate(model))
                    metrics.write(step.record())
                    stopping = run.agreed(held.received is not None)
                    kept = stopping or bool(config.save_every and _due(step.number, config.save_every, config))
                    if kept:
                        save(run, step.number)
                    # A signal that came after the question ends the process when the block is left: it is heard too.
                    if not kept and held.received is not None and run.accelerator.num_processes == 1:
                        save(run, step.number)
                    if stopping and held.received is None:  # another process was told to stop
                        raise KeyboardInterrupt
                bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
                bar.update()
                yield step


def _update(run: Run, index: int) -> Step:
    """One update: gradients of the step's batches, clipping, the method's hooks, the optimizer."""
    began, config, accelerator = time.perf_counter(), run.config, run.accelerator
    rate = config.learning_rate_at(index)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    run.bare.train()
    with run.draws(index):
        losses, penalty = _backward(run, index)
    parameters = list(run.parameters.values())
    norm = accelerator.clip_grad_norm_(parameters, math.inf if config.clip is None else config.clip)
    figures = torch.stack([*losses, penalty, norm.float()]).tolist()  # the step's one wait for the device
    *parts, penalty_value, norm_value = figures
    overflow = math.isinf(norm_value) or math.isnan(norm_value)
    if not all(map(math.isfinite, figures[:-1])) or (overflow and accelerator.scaler is None):
        run.optimizer.zero_grad()
        raise TrainingError(_why(run, index, parts, penalty_value, norm_value))
    for hook in run.hooks if not overflow else ():
        hook.on_gradients(index, config.steps)
    if run.recorder is not None and not overflow:
        run.recorder.on_gradients(index + 1, _shortened(config.clip, norm_value))
    run.optimizer.step()  # which the loss scale's overflow keeps from moving anything
    for hook in run.hooks if not overflow else ():
        hook.after_step(index, config.steps)
    run.optimizer.zero_grad()
    seconds = time.perf_counter() - began
    return Step(index + 1, math.fsum(parts), rate, norm_value, seconds, penalty_value, overflow)


def _shortened(clip: float | None, norm: float) -> float:
    """Factor that `torch.nn.utils.clip_grad_norm_` puts in front of a gradient of this norm."""
    return 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))


@contextmanager
def _recording(run: Run) -> Iterator[None]:
    """Importance is on disk as Parquet however the block ends."""
    ended = False
    try:
        yield
        ended = True
    finally:
        if run.recorder is not None:
            run.recorder.close(finished=ended)


def _backward(run: Run, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of an update.

    Returns
    -------
    losses : Tensor of shape (processes · accumulation,)
        By process and batch, each weighted by its share of the targets: they sum to the step's loss.
    penalty : Tensor of shape ()
        What the method added.
    """
    accelerator = run.accelerator
    numbers = run.numbers(index)
    batches = [run.batch(number) for number in numbers]
    losses, penalty = [], torch.zeros((), device=run.device)
    for turn, (batch, share) in enumerate(zip(batches, _shares(run, numbers, batches), strict=True), start=1):
        last = turn == len(batches)
        with nullcontext() if last else accelerator.no_sync(run.model):
            with accelerator.autocast():
                loss = loss_of(run.model, on_device(batch, run.device), run.config.loss) * share
            losses.append(loss.detach().float())
            if last:  # once an update, since it depends on the parameters alone
                for hook in run.hooks:
                    added = hook.penalty()
                    if added is not None:
                        loss, penalty = loss + added, penalty + added.detach().float()
            # Gradients of processes are averaged, and shares are of the total of all: hence the factor.
            accelerator.backward(loss)
    gathered: torch.Tensor = accelerator.gather(torch.stack(losses))
    return gathered / accelerator.num_processes, penalty


def _shares(run: Run, numbers: list[int], batches: list[Batch]) -> list[float]:
    """Each batch's share of the targets of the whole update, times the number of processes."""
    counts = [targets(run.bare, batch) for batch in batches]
    if 0 in counts:
        raise TrainingError(f"batch {numbers[counts.index(0)]} has no labelled target: its loss would be NaN")
    total, processes = float(sum(counts)), run.accelerator.num_processes
    if processes > 1:
        total = float(run.accelerator.reduce(torch.tensor(total, dtype=torch.float64, device=run.device), "sum"))
    return [count * processes / total for count in counts]


def _why(run: Run, index: int, parts: list[float], penalty: float, norm: float) -> str:
    a, processes = run.config.accumulation, run.accelerator.num_processes
    bad = [i for i, part in enumerate(parts) if not math.isfinite(part)]
    if bad:  # losses stand by process, then by turn
        batches = ", ".join(str((index * a + i % a) * processes + i // a) for i in bad)
        what = f"the loss is {parts[bad[0]]} on batch {batches}"
    elif not math.isfinite(penalty):
        what = f"the method's penalty is {penalty} after batch {run.numbers(index)[-1]}"
    else:
        first, last = index * a * processes, (index + 1) * a * processes - 1
        what = f"the gradient's norm is {norm} on batch {first}" + (f" to {last}" if last > first else "")
    kept = f"the last good checkpoint is {run.path} (step {run.saved})" if run.saved else "no checkpoint was written"
    return (
        f"step {index + 1}: {what}. The parameters stand as step {index} left them; {kept}. A lower learning rate than "
        f"{run.config.learning_rate:g}, a longer warm-up or clipping may help, or a look at that batch"
    )


def _metrics(run: Run, done: int) -> MetricsFile:
    writes = run.config.out is not None and run.accelerator.is_main_process
    return MetricsFile(run.config.out / METRICS if writes and run.config.out else None, after=done)


def _bar(run: Run, done: int) -> Any:
    hidden = not run.config.progress or not run.accelerator.is_main_process
    return tqdm(total=run.config.steps, initial=done, delay=2.0, disable=hidden, unit="step")


def _due(number: int, every: int, config: TrainConfig) -> bool:
    return number % every == 0 or number == config.steps
