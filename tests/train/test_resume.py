"""A run that is cut off, in whatever way, and taken up again gives the losses and weights of one that was not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spectra.errors import TrainingError
from spectra.methods import AdaLoRA, LoRA
from spectra.train import TrainConfig, train
from spectra.train.setup import Run
from tests.train.killed import run
from tests.train.tiny import Line, lora_bert, points, squares, texts

METHODS = {
    "lora": LoRA(rank=2, alpha=4.0, dropout=0.1),
    "adalora": AdaLoRA(rank=1, init_rank=2, warmup=0.1, final=0.2, interval=1),
}


def config(out=None, **fields):
    return TrainConfig(**{"steps": 8, "learning_rate": 0.01, "device": "cpu", "progress": False, "out": out, **fields})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [(line["step"], line["loss"], line["gradient_norm"], line.get("penalty")) for line in lines(out)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "fields", [{}, {"optimizer": "sgd", "momentum": 0.9, "accumulation": 2}, {"precision": "bf16"}]
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, method, fields):
    """Dropout in the model and the method, the optimizer's moments, the method's own state."""
    whole, first, second = (lora_bert(METHODS[method]) for _ in range(3))
    expected = [(s.loss, s.gradient_norm, s.penalty) for s in train(whole, texts, config(**fields))]
    begun = train(first, texts, config(tmp_path, save_every=3, **fields))
    for _ in range(5):  # two steps past the checkpoint of step 3: they are to be taken again
        next(begun)
    begun.close()
    steps = list(train(second, texts, config(tmp_path, save_every=3, resume=True, **fields)))
    assert [s.number for s in steps] == [4, 5, 6, 7, 8]
    assert [(s.loss, s.gradient_norm, s.penalty) for s in steps] == expected[3:]
    assert_same(weights(whole), weights(second))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9)), "no step twice"
    assert [line["loss"] for line in lines(tmp_path)] == [loss for loss, _, _ in expected]


@pytest.mark.parametrize("method", METHODS)
def test_a_notebook_goes_on_with_the_very_model_it_was_interrupted_in(tmp_path, method):
    whole, model = lora_bert(METHODS[method]), lora_bert(METHODS[method])
    expected = [s.loss for s in train(whole, texts, config())]
    begun = train(model, texts, config(tmp_path, save_every=3))
    for _ in range(4):
        next(begun)
    begun.close()
    assert [s.loss for s in train(model, texts, config(tmp_path, save_every=3, resume=True))] == expected[3:]
    assert_same(weights(whole), weights(model))


def test_running_statistics_are_taken_up(tmp_path):
    def final(model):
        return model(points(99)["x"]).detach()

    whole, first, second = Line(True), Line(True), Line(True)
    list(train(whole, points, config(loss=squares)))
    begun = train(first, points, config(tmp_path, loss=squares, save_every=3))
    for _ in range(3):
        next(begun)
    begun.close()
    list(train(second, points, config(tmp_path, loss=squares, save_every=3, resume=True)))
    for model in (whole, second):
        model.eval()
    assert torch.equal(final(whole), final(second))


def test_a_finished_run_has_nothing_left_and_a_new_one_nothing_to_take_up(tmp_path):
    assert len(list(train(lora_bert(), texts, config(tmp_path, save_every=8, resume=True)))) == 8
    assert list(train(lora_bert(), texts, config(tmp_path, save_every=8, resume=True))) == []
    assert len(lines(tmp_path)) == 8


def test_a_nan_leaves_a_run_that_goes_on_once_the_batch_is_mended(tmp_path):
    def poisoned(number):
        batch = points(number)
        if number == 5:
            batch["y"][0] = float("nan")
        return batch

    fields = {"loss": squares, "save_every": 2}
    with pytest.raises(TrainingError, match=r"batch 5.*\(step 4\)"):
        list(train(Line(), poisoned, config(tmp_path, **fields)))
    list(train(Line(), points, config(tmp_path, resume=True, **fields)))
    whole = [s.loss for s in train(Line(), points, config(loss=squares))]
    assert [line["loss"] for line in lines(tmp_path)] == whole


def test_the_line_that_was_cut_short_is_dropped(tmp_path):
    begun = train(lora_bert(), texts, config(tmp_path, save_every=2))
    for _ in range(2):
        next(begun)
    begun.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')
    list(train(lora_bert(), texts, config(tmp_path, save_every=2, resume=True)))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


def test_a_signal_after_the_question_is_heard_too(tmp_path, monkeypatch):
    """It comes when a step has asked whether to stop, and before the step has ended: the step is saved all the same."""
    asked = Run.agreed

    def agreed(self, flag):
        found = asked(self, flag)
        if len(lines(tmp_path)) == 3:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(Run, "agreed", agreed)
    with pytest.raises(KeyboardInterrupt):
        list(train(lora_bert(), texts, config(tmp_path, save_every=8)))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == len(lines(tmp_path)) == 3


# --- another process is killed --------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """As the other process: a sum over another number of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", -15), ("SIGINT", -2)])
def test_killed_and_resumed_to_identical_losses(tmp_path, one_thread, name, code):
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "tests.train.killed", str(out), "0.05"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= 6:
            break
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 4 <= saved < 40, "the run was to be caught in the middle"
    if name != "SIGKILL":
        assert saved == len(lines(out)), "the step at hand was to be finished and saved"
    assert [step.number for step in run(out, 0.0)] == list(range(saved + 1, 41))
    run(whole, 0.0)
    assert losses(out) == losses(whole)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]
