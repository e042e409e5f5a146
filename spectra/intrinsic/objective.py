"""`Objective`: the trainings that a search for an intrinsic dimension asks for, done for real."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.intrinsic.trial import Ask, Trial
from spectra.methods.full import FullFineTune
from spectra.methods.injection import Injection, inject
from spectra.methods.protocol import Method
from spectra.methods.subspace import Subspace, layer_of
from spectra.projections import smallest_dimension
from spectra.train.batches import batches, held_out
from spectra.train.config import TrainConfig
from spectra.train.data import Task
from spectra.train.evaluate import evaluate
from spectra.train.loop import Step, train
from spectra.train.models import LoadedModel, load_model
from spectra.train.objective import loss_of, on_device
from spectra.train.output import save_result, versions

# Batches whose mean gradient gives the bases of the gradient's subspace.
_FIRST = 8
# Steps at the end whose mean loss is told.
_LAST = 10
# Coordinates begin at so many times full fine-tuning's rate, and the search's pilots look around it. With SAID on
# MiniLM and rotten-tomatoes pilots took it for every d that was tried from 256 to 4096, over a quarter of it, and over
# four times at 256; on subjectivity they took four times at 256 and 362, where another seed then diverged.
_RATE = 20.0


class Objective:
    """One model and task, to be trained in full, by its head alone, or in a subspace of any dimension.

    Parameters
    ----------
    model : str
        Reference; it is loaded afresh for each training, so that none begins where another ended.
    task : Task
        To learn.
    config : TrainConfig
        Of full fine-tuning; rate, steps and seed are each ask's, and nothing is written.
    batch, length : int
        Texts a batch, tokens a text.
    limit : int, optional
        Texts or windows to test on at most.
    structure, projection, head : str
        Fields of `Subspace`.
    offline : bool
        Fetch nothing.

    Attributes
    ----------
    total : int
        D, the parameters that a subspace moves.
    layers : int
        Scales that SAID trains; 0 for DID.
    smallest : int
        Least dimension that works.
    baseline : float
        Metric of knowing nothing: of the most frequent label, or of the untouched language model.
    held_out : int
        Texts, or windows, that the metric is a mean over.
    metric_name : str
        ``"accuracy"`` or ``"negative loss"``.

    Raises
    ------
    SpectraError
        As `load_model`; `UsageError` if there is no head to train freely, or nothing left beside it.
    """

    def __init__(
        self,
        *,
        model: str,
        task: Task,
        config: TrainConfig,
        batch: int = 32,
        length: int = 64,
        limit: int | None = None,
        structure: str = "did",
        projection: str = "fastfood",
        head: str = "subspace",
        offline: bool = False,
    ) -> None:
        self._model, self._task, self._config, self._offline = model, task, config, offline
        self._batch, self._length = batch, length
        self._method = Subspace(structure=structure, projection=projection, head=head)
        loaded = self._load(config.seed)
        self._reference = loaded.reference
        if head == "free" and not loaded.fresh:
            raise UsageError(f"{model}: a {task.kind} task has no fresh head that could train freely")
        shapes, names = [], []
        for name, parameter in loaded.model.named_parameters():
            module = name.rpartition(".")[0]
            moves = module and self._method.accepts(loaded.model.get_submodule(module))
            if moves and parameter.is_floating_point() and not self._is_free(name, loaded):
                shapes.append(tuple(parameter.shape))
                names.append(module)
        self.total = sum(math.prod(shape) for shape in shapes)
        self.layers = len({layer_of(name) for name in names}) if structure == "said" else 0
        self.smallest = smallest_dimension(projection, shapes) + self.layers
        self._tests = held_out(task, loaded.tokenizer, size=batch, length=length, limit=limit)
        self._stream_of: dict[int, Any] = {}
        classification = task.kind == "classification"
        self.metric_name = "accuracy" if classification else "negative loss"
        self.held_out = sum(len(one["labels"]) for one in self._tests.once())
        self.baseline = task.majority if classification else self._measure(loaded.model)

    def rate_rule(self, dimension: int) -> float:
        """Learning rate to begin the search for one with: the method's unit makes it the same for every dimension."""
        return _RATE * self._config.learning_rate

    def __call__(self, ask: Ask) -> Trial:
        """Train as asked.

        Raises
        ------
        TrainingError
            If a loss is not finite.
        """
        trial, _, _ = self._train(ask)
        return trial

    def save(self, dimension: int, *, seed: int, learning_rate: float, steps: int, folder: Path) -> None:
        """Train a subspace again and leave the model in ``folder/model``, its d numbers in ``folder/subspace``.

        The projection of a gradient has no seed to be drawn from, so that the model alone is left.
        """
        ask = Ask("subspace", dimension, seed, learning_rate, steps, steps, None)
        _, loaded, injection = self._train(ask)
        if self._method.projection == "gradient":
            injection.method = FullFineTune()  # saved as if every weight had been trained
            save_result(loaded, injection, folder / "model", merged=False)
            return
        save_result(loaded, injection, folder / "subspace", merged=True)
        target = folder / "model"
        for file in sorted((folder / "subspace" / "merged").iterdir()):
            target.mkdir(parents=True, exist_ok=True)
            file.replace(target / file.name)
        (folder / "subspace" / "merged").rmdir()

    def describe(self) -> dict[str, Any]:
        """What decides the figures, as JSON takes it."""
        return {
            "model": self._reference,
            "task": self._task.name,
            "trained_on": len(self._task.train),
            "held_out": self.held_out,
            "structure": self._method.structure,
            "projection": self._method.projection,
            "head": self._method.head,
            "batch": self._batch,
            "length": self._length,
            "parameters": self.total,
            "layers": self.layers,
            "training": {
                key: value
                for key, value in self._config.decisive().items()
                if key not in ("steps", "learning_rate", "seed", "loss")
            },
            "versions": versions(),
        }

    def _load(self, seed: int) -> LoadedModel:
        return load_model(self._model, self._task, seed=seed, offline=self._offline)

    def _is_free(self, name: str, loaded: LoadedModel) -> bool:
        return self._method.head == "free" and any(name.startswith(f"{head}.") for head in loaded.fresh)

    def _measure(self, model: nn.Module) -> float:
        found = evaluate(model, self._tests.once(), precision=self._config.precision)
        return found["accuracy"] if self._task.kind == "classification" else -found["loss"]

    def _inject(self, ask: Ask, loaded: LoadedModel) -> Injection:
        heads = "|".join(f"^{re.escape(name)}$" for name in loaded.fresh)
        if ask.kind == "full":
            return inject(loaded.model, ".", FullFineTune(), seed=ask.seed)
        if ask.kind == "head":
            inside = "|".join(rf"^{re.escape(name)}(\.|$)" for name in loaded.fresh)
            return inject(loaded.model, inside, FullFineTune(), seed=ask.seed)
        assert ask.dimension is not None  # for the type checker: the search asks for a subspace of some dimension
        method: Method = replace(self._method, dimension=ask.dimension, gradients=self._gradients(ask, loaded))
        also = heads if self._method.head == "free" else None
        return inject(loaded.model, ".", method, also=also or None, seed=ask.seed)

    def _train(self, ask: Ask) -> tuple[Trial, LoadedModel, Injection]:
        began = time.perf_counter()
        gc.collect()  # a model and its injection hold each other: without this the last trainings' models pile up
        loaded = self._load(ask.seed)
        injection = self._inject(ask, loaded)
        config = replace(
            self._config,
            steps=ask.schedule_steps,
            seed=ask.seed,
            learning_rate=self._config.learning_rate if ask.learning_rate is None else ask.learning_rate,
        )
        losses: list[float] = []
        metric, stopped = math.nan, False
        steps = cast(Generator[Step, None, None], train(loaded.model, self._stream(ask.seed, loaded), config))
        with closing(steps):
            for step in steps:
                losses.append(step.loss)
                if ask.give_up_below is not None and step.number == ask.steps * 3 // 4:
                    metric = self._measure(loaded.model)
                    stopped = metric < ask.give_up_below
                if stopped or step.number == ask.steps:
                    break
        loss = math.fsum(losses[-_LAST:]) / len(losses[-_LAST:])
        if ask.kind == "pilot":
            metric = -loss  # pilots are compared by their loss alone
        elif not stopped:
            metric = self._measure(loaded.model)
        seconds = time.perf_counter() - began
        trial = Trial(ask, metric, loss, len(losses), stopped, round(seconds, 3), injection.trainable)
        return trial, loaded, injection

    def _stream(self, seed: int, loaded: LoadedModel) -> Any:
        """The seed's batches; texts are cut into tokens once a seed."""
        if seed not in self._stream_of:
            self._stream_of = {
                seed: batches(self._task, loaded.tokenizer, size=self._batch, length=self._length, seed=seed)
            }
        return self._stream_of[seed]

    def first_gradients(self, loaded: LoadedModel, *, seed: int) -> dict[str, torch.Tensor]:
        """Mean gradient of a seed's first batches at a model's weights as they are, by parameter.

        Parameters
        ----------
        loaded : LoadedModel
            Left as it was.
        seed : int
            Of the order of texts.
        """
        model, stream = loaded.model, self._stream(seed, loaded)
        mode = model.training
        model.eval()  # without dropout: the gradient of the loss itself
        for number in range(_FIRST):
            batch = on_device(stream[number], next(model.parameters()).device)
            torch.autograd.backward(loss_of(model, batch, self._config.loss) / _FIRST)
        found = dict(_taken(model))
        model.train(mode)
        return found

    def _gradients(self, ask: Ask, loaded: LoadedModel) -> dict[str, torch.Tensor] | None:
        return self.first_gradients(loaded, seed=ask.seed) if self._method.projection == "gradient" else None


def _taken(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients by name, taken off the parameters; zero where none came."""
    for name, parameter in model.named_parameters():
        yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
