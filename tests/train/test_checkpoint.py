"""A checkpoint is whole or not there, small, and refused by every run but its own."""

import os
import pickle

import pytest
import torch
from torch import nn

from spectra.errors import CheckpointError, MismatchError, UsageError
from spectra.methods import FullFineTune, LoRA, inject
from spectra.train import TrainConfig, train
from spectra.train.checkpoint import save_checkpoint
from tests.train.tiny import bert, lora_bert, texts


def config(out, **fields):
    return TrainConfig(**{"steps": 6, "device": "cpu", "progress": False, "out": out, "save_every": 3, **fields})


@pytest.fixture
def begun(tmp_path):
    """A folder whose run was left after three steps of six."""
    steps = train(lora_bert(), texts, config(tmp_path))
    for _ in range(3):
        next(steps)
    steps.close()
    return tmp_path


def test_it_holds_what_trains_and_nothing_frozen(begun):
    state = torch.load(begun / "checkpoint.pt", weights_only=True)
    model = lora_bert()
    assert set(state["tensors"]) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert state["step"] == 3
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # parameters and two moments of each, in float32; the archive's own bookkeeping is under 1 KiB a tensor
    tensors = len(state["tensors"])
    assert (begun / "checkpoint.pt").stat().st_size < 12 * trained + 4 * 1024 * tensors + 8192


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(begun):
    before = (begun / "checkpoint.pt").read_bytes()
    with pytest.raises(UsageError, match="resume = True goes on with it"):
        next(train(lora_bert(), texts, config(begun)))
    assert (begun / "checkpoint.pt").read_bytes() == before


def other_rank():
    return lora_bert(LoRA(rank=4, alpha=4.0, dropout=0.1))


def other_method():
    model = bert()
    inject(model, r"\.(query|value)$", FullFineTune(), also="classifier", seed=1)
    return model


@pytest.mark.parametrize(
    ("make", "batches", "fields", "said"),
    [
        (other_rank, texts, {}, [r"rank=2.*there", r"rank=4.*here"]),
        (other_method, texts, {}, [r'method: "LoRA\(.*there', "'FullFineTune.*here"]),
        (lambda: lora_bert(seed=5), texts, {}, ["frozen weights: '[0-9a-f]{12}' there, '[0-9a-f]{12}' here"]),
        (lora_bert, lambda n: texts(n + 1), {}, ["data: "]),
        (lora_bert, texts, {"learning_rate": 0.5}, ["learning_rate: 0.001 there, 0.5 here"]),
        (lora_bert, texts, {"steps": 7}, ["steps: 6 there, 7 here"]),
        (lora_bert, texts, {"seed": 3, "clip": None}, ["seed: 0 there, 3 here", "clip: 1.0 there, None here"]),
    ],
)
def test_another_runs_checkpoint_is_refused_with_both_sides(begun, make, batches, fields, said):
    with pytest.raises(MismatchError) as caught:
        next(train(make(), batches, config(begun, resume=True, **fields)))
    assert str(begun / "checkpoint.pt") in str(caught.value)
    for words in said:
        assert caught.match(words)


def test_only_what_differs_is_named(begun):
    with pytest.raises(MismatchError) as caught:
        next(train(lora_bert(), texts, config(begun, resume=True, seed=3)))
    assert str(caught.value).count(" there, ") == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "code"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(begun, damage):
    path = begun / "checkpoint.pt"
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint")
        case "foreign":
            torch.save({"weight": torch.zeros(2)}, path)
        case "code":
            torch.save({"format": 1, "run": _Planted()}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt.*remove it"):
        next(train(lora_bert(), texts, config(begun, resume=True)))
    assert not (begun / "planted").exists()


class _Planted:
    """An object that a careless reader would run."""

    def __reduce__(self):
        return (os.mkdir, ("planted",))


class _Unpicklable:
    def __reduce__(self):
        raise pickle.PicklingError("half-way")


def test_a_write_that_fails_leaves_the_last_one_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "weight": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(pickle.PicklingError):
        save_checkpoint(path, {"step": 2, "weight": torch.ones(3), "bad": _Unpicklable()})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_parameter_that_trains_is_found_by_name_whatever_the_model(tmp_path):
    model = nn.Linear(2, 2)
    run = config(tmp_path, steps=1, loss=lambda m, b: m(b["x"]).square().mean())
    (step,) = train(model, [{"x": torch.ones(1, 2)}], run)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert step.number == state["step"] == 1
    assert torch.equal(state["tensors"]["weight"], model.weight)
