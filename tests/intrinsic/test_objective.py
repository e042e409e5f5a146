"""Trainings that a search asks for, on a tiny BERT and a tiny Llama: what trains, what is measured, what is left."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from spectra.errors import UsageError
from spectra.intrinsic.objective import Objective
from spectra.intrinsic.searching import SearchConfig, search
from spectra.intrinsic.trial import Ask
from spectra.methods import load_adapter
from spectra.train.config import TrainConfig
from spectra.train.data import Task, load_task
from spectra.train.evaluate import evaluate
from tests.train.saved import save_model, save_reviews


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("base") / "bert"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(str(save_reviews(tmp_path_factory.mktemp("texts") / "reviews.csv")))


def objective(base: str, task: Task, **settings: Any) -> Objective:
    config = TrainConfig(learning_rate=1e-2, progress=False, device="cpu")
    return Objective(model=base, task=task, config=config, batch=8, length=16, **settings)


def ask(kind: Any, dimension: int | None = None, *, steps: int = 6, rate: float | None = None, **more: Any) -> Ask:
    fields = {"seed": 0, "schedule_steps": steps, "give_up_below": None, **more}
    return Ask(kind, dimension, learning_rate=rate, steps=steps, **fields)


def test_what_trains(base: str, task: Task) -> None:
    inside, free = objective(base, task), objective(base, task, head="free")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    head = sum(p.numel() for p in model.classifier.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert (inside.total, free.total) == (whole, whole - head)
    assert inside(ask("full")).parameters == whole
    assert inside(ask("subspace", 20, rate=0.1)).parameters == 20
    assert free(ask("subspace", 20, rate=0.1)).parameters == 20 + head
    assert free(ask("head")).parameters == head


def test_the_untouched_model_knows_nothing(base: str, task: Task) -> None:
    found = objective(base, task)
    assert found.baseline == task.majority
    assert found.held_out == len(task.test)
    assert found.metric_name == "accuracy"
    assert found.smallest == 1
    assert objective(base, task, structure="said").smallest == 1 + objective(base, task, structure="said").layers
    matrices = objective(base, task, projection="lora").smallest
    assert matrices > 10, "one number a matrix"


def test_the_rule_is_twenty_times_the_full_rate_at_every_dimension(base: str, task: Task) -> None:
    found = objective(base, task)
    assert found.rate_rule(3) == found.rate_rule(3000) == pytest.approx(20 * 1e-2)


def test_full_training_learns_and_repeats(base: str, task: Task) -> None:
    found = objective(base, task)
    first = found(ask("full", steps=60))
    assert first.metric > found.baseline + 0.2
    assert found(ask("full", steps=60)) == replace(first, seconds=pytest.approx(first.seconds, rel=10))
    assert found(ask("full", steps=10, seed=1)).loss != found(ask("full", steps=10)).loss


def test_a_subspace_learns(base: str, task: Task) -> None:
    """Along the first gradient's singular vectors, where so small a model learns within a minute."""
    found = objective(base, task, projection="gradient")
    trial = found(ask("subspace", 4000, steps=60, rate=1e-2))
    assert trial.metric > found.baseline + 0.2
    assert (trial.stopped, trial.steps, trial.parameters) == (False, 60, 4000)


@pytest.mark.parametrize("projection", ["fastfood", "sparse", "kronecker", "lora"])
def test_every_projection_trains_and_repeats(base: str, task: Task, projection: str) -> None:
    found = objective(base, task, projection=projection)
    first, again, other = (found(ask("subspace", 200, steps=3, rate=1e-2, seed=seed)) for seed in (0, 0, 1))
    assert first.loss == again.loss != other.loss
    assert first.metric == again.metric


def test_pilots_and_giving_up(base: str, task: Task) -> None:
    """A pilot is the first steps of a longer schedule; a hopeless training ends at three quarters with what it had."""
    found = objective(base, task)
    pilot = found(ask("pilot", 20, steps=4, rate=0.1, schedule_steps=20))
    assert pilot.steps == 4
    assert pilot.metric == -pilot.loss
    hopeless = found(ask("subspace", 20, steps=8, rate=1e-9, give_up_below=0.99))
    assert (hopeless.steps, hopeless.stopped) == (6, True)
    hopeful = found(ask("subspace", 20, steps=8, rate=1e-9, give_up_below=0.01))
    assert (hopeful.steps, hopeful.stopped) == (8, False)


def test_saved(base: str, task: Task, tmp_path: Path) -> None:
    """The model and the d numbers that are left are the trained ones: the metric says so."""
    found = objective(base, task, structure="said")
    trial = found(ask("subspace", 50, steps=10, rate=2e-2))
    found.save(50, seed=0, learning_rate=2e-2, steps=10, folder=tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert evaluate(model, found._tests.once())["accuracy"] == trial.metric
    torch.manual_seed(123)  # another random head: the folder holds where it started
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    injection = load_adapter(fresh, tmp_path / "subspace")
    assert "50 of" in repr(injection) or injection.method.dimension == 50  # type: ignore[attr-defined]
    assert evaluate(fresh, found._tests.once())["accuracy"] == trial.metric


def test_saved_from_a_gradient(base: str, task: Task, tmp_path: Path) -> None:
    found = objective(base, task, projection="gradient")
    trial = found(ask("subspace", 50, steps=10, rate=2e-2))
    found.save(50, seed=0, learning_rate=2e-2, steps=10, folder=tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert evaluate(model, found._tests.once())["accuracy"] == trial.metric
    assert not (tmp_path / "subspace").exists()


def test_a_language_model(tmp_path: Path) -> None:
    """Its metric is minus the loss, and knowing nothing is the untouched model; there is no head to train freely."""
    base = str(save_model(tmp_path / "base", "llama"))
    (tmp_path / "a.txt").write_text("the film was good and the plot was bright . " * 200)
    task = load_task(str(tmp_path / "a.txt"))
    found = objective(base, task)
    assert found.metric_name == "negative loss"
    assert found.baseline == pytest.approx(-math.log(60), rel=0.2)
    assert found(ask("full", steps=20)).metric > found.baseline
    with pytest.raises(UsageError, match="no fresh head"):
        objective(base, task, head="free")


def test_a_search_from_end_to_end(base: str, task: Task, tmp_path: Path) -> None:
    """The search on real trainings, twice: the second time from its journal alone."""
    found = objective(base, task, projection="gradient")
    asked: list[Ask] = []

    def run(wanted: Ask) -> Any:
        asked.append(wanted)
        return found(wanted)

    def once() -> Any:
        return search(
            run,
            SearchConfig(steps=60, seeds=1, start=4000, rates=(1.0,), largest=4000, ratio=8.0),
            rate_rule=lambda dimension: 1e-2,
            baseline=found.baseline,
            held_out=found.held_out,
            total=found.total,
            smallest=found.smallest,
            told=found.describe(),
            journal=tmp_path,
        )

    first = once()
    count = len(asked)
    assert first.full > found.baseline
    assert first.verdict in ("reached", "reached by the smallest")
    assert first.dimension is not None
    assert first.dimension <= 4000
    assert once().trials == first.trials
    assert len(asked) == count
