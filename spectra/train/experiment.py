"""One training of the command, from a plan to a finished folder: inject, train, test, save, record."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from spectra.errors import JournalBusy, MismatchError, UsageError
from spectra.importance import journal, recorded
from spectra.methods.injection import Injection, inject
from spectra.theory import counts
from spectra.train import checkpoint, metrics, output
from spectra.train.batches import batches, held_out
from spectra.train.config import TrainConfig
from spectra.train.data import Task
from spectra.train.evaluate import evaluate
from spectra.train.loop import train
from spectra.train.methods import build_method, spec_of, target_pattern
from spectra.train.models import LoadedModel

__all__ = ["Plan", "finished", "owned", "predicted_activations", "put_method", "run_plan"]

SCHEMA = 1
# Windows of text that a language model is tested on, unless told otherwise.
WINDOWS = 200
# Steps at each end whose mean loss is told: one batch's loss says little.
_ENDS = 10
_LOW_RANK = ("lora", "rslora", "lora-plus", "qlora", "adalora")


@dataclass(frozen=True)
class Plan:
    """One training, as it was asked for.

    Attributes
    ----------
    method : str
        A key of `spectra.train.methods.METHODS`.
    settings : mapping
        Fields of the method that were given.
    model, task : str
        References, as given.
    config : TrainConfig
        Its learning rate is the method's own where none was given; ``out`` is the run's folder.
    batch, length : int
        Texts a batch, and tokens a text.
    held_out : int or None
        Texts or windows to test on at most; None takes all texts, and `WINDOWS` windows.
    target, also : str or None
        Patterns of the modules that get the method, and of more that are trained whole.
    merged : bool
        Save the merged model beside an adapter.
    data : mapping
        How the task was read.
    """

    method: str
    settings: Mapping[str, Any]
    model: str
    task: str
    config: TrainConfig
    batch: int = 32
    length: int = 64
    held_out: int | None = None
    target: str | None = None
    also: str | None = None
    merged: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON takes it."""
        told = asdict(replace(self, config=TrainConfig()))
        del told["config"]
        return {**told, **self.config.decisive()}


def put_method(plan: Plan, loaded: LoadedModel) -> Injection:
    """Put a plan's method into a loaded model.

    Raises
    ------
    UsageError
        If the method does not fit the model.
    """
    method = build_method(plan.method, plan.settings)
    pattern = plan.target or target_pattern(plan.method, loaded.family, loaded.model)
    whole = [f"^{re.escape(name)}$" for name in loaded.fresh] + ([plan.also] if plan.also else [])
    if spec_of(plan.method).place == "everything" and getattr(method, "head", None) != "free":
        whole = []  # the head is among everything
    return inject(loaded.model, pattern, method, also="|".join(whole) or None, seed=plan.config.seed)


def run_plan(plan: Plan, loaded: LoadedModel, task: Task, say: Callable[[str], None]) -> dict[str, Any]:
    """Train as a plan says, and leave the finished folder.

    Parameters
    ----------
    plan : Plan
        Its ``config.out`` is the folder.
    loaded : LoadedModel
        Changed in place.
    task : Task
        What to learn.
    say : callable
        Gets lines for a person.

    Returns
    -------
    dict
        What ``training.json`` holds.

    Raises
    ------
    SpectraError
        As `inject`, `spectra.train.train` and `spectra.methods.save_adapter`.
    """
    out = plan.config.out
    if out is None:
        raise UsageError("a run needs a folder to leave its result in")
    injection = put_method(plan, loaded)
    say(repr(injection))
    stream = batches(task, loaded.tokenizer, size=plan.batch, length=plan.length, seed=plan.config.seed)
    limit = WINDOWS if plan.held_out is None and task.kind == "language" else plan.held_out
    tests = held_out(task, loaded.tokenizer, size=plan.batch, length=plan.length, limit=limit)

    def measure(model: nn.Module) -> dict[str, float]:
        return evaluate(model, tests.once(), precision=plan.config.precision)

    began = time.perf_counter()
    last: Mapping[str, float] = {}
    for step in train(loaded.model, stream, plan.config, evaluate=measure):
        if step.metrics is not None:
            last = step.metrics
            say(f"step {step.number} of {plan.config.steps}: {_told(last)}, loss in training {step.loss:.4f}")
    seconds = time.perf_counter() - began
    if not last:  # every step stood in the checkpoint, whose result was never saved
        last = measure(loaded.model)
    if not output.is_first_process():
        return {}
    size = output.save_result(loaded, injection, out, merged=plan.merged)
    record = _record(plan, loaded, task, injection, last, size, seconds)
    output.write_record(out, record)
    (out / checkpoint.NAME).unlink(missing_ok=True)  # the result stands; nothing is to be gone on with
    return record


def finished(plan: Plan) -> dict[str, Any] | None:
    """The record of a plan that ran to its end before; None where it did not.

    Raises
    ------
    MismatchError
        If another training ran in the folder, or its importance is asked for and was not recorded.
    """
    out = plan.config.out
    record = None if out is None else output.read_record(out)
    if record is None:
        return None
    asked, before = json.loads(json.dumps(plan.asked(), default=str)), record.get("asked", {})
    changed = sorted(key for key in asked.keys() | before.keys() if asked.get(key) != before.get(key))
    if changed:
        shown = ", ".join(f"{key} {before.get(key)!r} then, {asked.get(key)!r} now" for key in changed[:3])
        raise MismatchError(
            f"{out}: holds the result of another training ({shown}); name another folder, or give --no-resume to "
            "train anew in this one"
        )
    if plan.config.record_importance is not None and out is not None and not (out / recorded.NAME).exists():
        raise MismatchError(
            f"{out}: holds a finished training whose importance was not recorded; name another folder, give "
            "--no-resume to train anew in this one, or leave --record-importance away"
        )
    return record


@contextmanager
def owned(out: Path, *, anew: bool) -> Iterator[None]:
    """Keep other runs out of a folder for the time of a block.

    Parameters
    ----------
    out : Path
        The folder; it is made.
    anew : bool
        Remove what an earlier run in it would be gone on with.

    Raises
    ------
    JournalBusy
        If another run is in it.
    """
    if not output.is_first_process():
        yield
        return
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: not a folder of its own; name another one")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise JournalBusy(f"{out}: another run is training in it; wait for it, or name another folder") from error
    try:
        if anew:
            for name in (checkpoint.NAME, metrics.NAME, output.RECORD, recorded.NAME, journal.JOURNAL):
                (out / name).unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def predicted_activations(plan: Plan, loaded: LoadedModel, task: Task) -> int | None:
    """Bytes of activations that a step keeps, by `spectra.theory.counts`; None where it knows no formula.

    Full fine-tuning and low-rank methods on every linear map, of BERT, Llama, Mistral and GPT-2, in float32.
    """
    config: Any = loaded.model.config
    full = plan.method == "full"
    if plan.target or plan.config.precision != "fp32" or not (full or plan.method in _LOW_RANK):
        return None
    try:
        shapes = counts.Architecture.from_config(config.to_dict())
    except UsageError:
        return None
    settings = {**spec_of(plan.method).fields(), **plan.settings}
    rank = (
        0
        if full
        else int(settings.get("init_rank") or math.ceil(settings["rank"] * (1.5 if "init_rank" in settings else 1)))
    )
    return counts.activations(
        shapes,
        batch=plan.batch,
        length=plan.length,
        language=task.kind == "language",
        rank=rank,
        trained=[] if full else [linear.role for linear in shapes.linears()],
        whole=full,
        checkpointing=plan.config.gradient_checkpointing,
    )


def _record(
    plan: Plan,
    loaded: LoadedModel,
    task: Task,
    injection: Injection,
    last: Mapping[str, float],
    size: int,
    seconds: float,
) -> dict[str, Any]:
    lines = [json.loads(line) for line in (Path(str(plan.config.out)) / metrics.NAME).read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    total = injection.total
    states = counts.OPTIMIZER_BYTES["sgd_momentum" if plan.config.momentum else plan.config.optimizer]
    return {
        "schema": SCHEMA,
        "method": plan.method,
        "settings": _scalars(injection.method),
        "base_model": loaded.reference,
        "family": loaded.family,
        "task": {
            "name": task.name,
            "kind": task.kind,
            "labels": list(task.label_names),
            "trained_on": len(task.train),
            "held_out": len(task.test),
            "majority": task.majority if task.kind == "classification" else None,
            "notes": list(task.notes),
        },
        "target": injection.pattern,
        "modules": injection.matched,
        "trained_whole": list(injection.also),
        "parameters": {
            "trainable": injection.trainable,
            "total": total,
            "share": injection.trainable / total,
        },
        "bytes": {
            "result": size,
            "model": output.held_bytes(loaded.model),
            "gradients": 4 * injection.trainable,
            "optimizer": states * injection.trainable,
        },
        "metrics": dict(last),
        "training_loss": {"first": _mean(losses[:_ENDS]), "last": _mean(losses[-_ENDS:])},
        "step_seconds": median(line["seconds"] for line in lines),
        "seconds": round(seconds, 3),
        "asked": plan.asked(),
        "versions": output.versions(),
    }


def _scalars(method: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(method).items() if not isinstance(value, Mapping) or value}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _told(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items()) + " on the held-out texts"
