"""Importance recorded beside a training: what it holds, that it changes nothing, and that no interruption harms it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spectra.errors import MismatchError, UsageError
from spectra.importance import SCORES, read_recorded, replay
from spectra.importance.journal import JOURNAL
from spectra.importance.recorded import NAME
from spectra.methods import IA3, AdaLoRA, FullFineTune, LoRA, inject, injections
from spectra.train import TrainConfig, train
from spectra.train.__main__ import main
from tests.train import killed
from tests.train.saved import save_model, save_reviews
from tests.train.tiny import Line, bert, lora_bert, points, squares, texts

METHODS = {
    "lora": LoRA(rank=2, alpha=4.0, dropout=0.1),
    "adalora": AdaLoRA(rank=1, init_rank=2, warmup=0.1, final=0.2, interval=1),
}


def config(out=None, **fields):
    return TrainConfig(**{"steps": 8, "learning_rate": 0.01, "device": "cpu", "progress": False, "out": out, **fields})


def recording(out, **fields):
    return config(out, record_importance=fields.pop("every", 1), **fields)


def column(recorded, name):
    return recorded.values[:, :, list(SCORES).index(name)]


class Spy:
    """Parameters and gradients as they stand when the optimizer is called."""

    def __init__(self, model, monkeypatch):
        self.moments = []
        plain = torch.optim.AdamW.step

        def step(optimizer, *args, **kwargs):
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.moments.append({name: (p.detach().clone(), p.grad.clone()) for name, p in named.items()})
            return plain(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)


def by_hand(moments, of_entries, suffixes):
    """Scores of one module's directions, from entries' averages over all steps up to each."""
    history = []
    for t in range(len(moments)):
        total = 0.0
        for name, axis in suffixes:
            sensitivities = [(w * g).abs().double() for w, g in (moment[name] for moment in moments[: t + 1])]
            gradients = [moment[name][1].double() for moment in moments[: t + 1]]
            total = total + of_entries(sensitivities, gradients).mean(dim=axis)
        history.append(total.reshape(-1))
    return torch.stack(history).numpy()


def smoothed(sensitivities):
    beta, mean, doubt = 0.85, 0.0, 0.0
    for now in sensitivities:
        mean = beta * mean + (1 - beta) * now
        doubt = beta * doubt + (1 - beta) * (now - mean).abs()
    return mean, doubt


ENTRIES = {
    "sensitivity": lambda s, g: s[-1],
    "smoothed": lambda s, g: smoothed(s)[0],
    "uncertainty": lambda s, g: smoothed(s)[1],
    "adalora": lambda s, g: smoothed(s)[0] * smoothed(s)[1],
    "fisher": lambda s, g: sum(entry**2 for entry in g),
}
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("method", METHODS)
def test_every_score_is_of_the_gradient_and_the_weights_that_it_was_taken_at(tmp_path, method, monkeypatch):
    model = lora_bert(METHODS[method])
    spy = Spy(model, monkeypatch)
    list(train(model, texts, recording(tmp_path)))
    recorded = read_recorded(tmp_path)
    assert recorded.steps.tolist() == list(range(1, 9))
    assert len(spy.moments) == 8
    suffixes = [(f"{QUERY}.lora_B", 0), (f"{QUERY}.lora_A", 1)]
    suffixes += [(f"{QUERY}.lora_E", 1)] if method == "adalora" else []
    for name, of_entries in ENTRIES.items():
        # Eight sums of float32, and their products with gradients down to 1e-6.
        wanted = by_hand(spy.moments, of_entries, suffixes)
        np.testing.assert_allclose(recorded.of(name)[QUERY], wanted, rtol=2e-5, atol=1e-14, err_msg=name)
    for t, moment in enumerate(spy.moments):
        left, right = moment[f"{QUERY}.lora_B"][0], moment[f"{QUERY}.lora_A"][0]
        value = moment[f"{QUERY}.lora_E"][0].reshape(-1).abs() if method == "adalora" else torch.ones(2)
        lengths = left.norm(dim=0), right.norm(dim=1)
        np.testing.assert_allclose(recorded.of("norm")[QUERY][t], value * lengths[0] * lengths[1], rtol=1e-5)
        np.testing.assert_allclose(recorded.of("magnitude")[QUERY][t], value * sum(lengths) / 2, rtol=1e-5)
        if method == "adalora":
            np.testing.assert_array_equal(recorded.of("value")[QUERY][t], value)
    assert (method == "adalora") != np.isnan(recorded.of("value")[QUERY]).all()


def test_what_has_no_directions_has_one_row_a_tensor(tmp_path, monkeypatch):
    model = lora_bert()
    spy = Spy(model, monkeypatch)
    list(train(model, texts, recording(tmp_path)))
    recorded = read_recorded(tmp_path)
    whole = {entry.name: entry.shape for entry in recorded.layout.tracked if entry.directions is None}
    assert whole == {"classifier.weight": (2, 32), "classifier.bias": (2,)}
    weight, gradient = spy.moments[-1]["classifier.weight"]
    found = {name: float(recorded.of(name)["classifier.weight"][-1, 0]) for name in SCORES}
    assert found["sensitivity"] == pytest.approx(float((weight * gradient).abs().mean()), rel=1e-5)
    assert found["norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert np.isnan(found["value"])
    assert np.isnan(found["magnitude"])


@pytest.mark.parametrize("method", [FullFineTune(), IA3()])
def test_any_method_is_recorded(tmp_path, method):
    model = bert()
    where = "." if isinstance(method, FullFineTune) else r"\.(key|value)$"
    inject(model, where, method)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    list(train(model, texts, recording(tmp_path, steps=3)))
    recorded = read_recorded(tmp_path)
    assert {entry.name: entry.shape for entry in recorded.layout.tracked} == trained
    assert all(entry.directions is None for entry in recorded.layout.tracked)
    assert np.isfinite(column(recorded, "adalora")).all()
    with pytest.raises(UsageError, match="no directions"):
        replay(recorded, kept=1)


def test_embeddings_have_directions_too(tmp_path):
    model = bert()
    inject(model, r"word_embeddings$|\.query$", LoRA(rank=2))
    list(train(model, texts, recording(tmp_path, steps=2)))
    matrices = {entry.name: (entry.directions, entry.shape) for entry in read_recorded(tmp_path).matrices}
    assert matrices["bert.embeddings.word_embeddings"] == (2, (32, 100))
    assert matrices[QUERY] == (2, (32, 32))


def test_a_model_of_ones_own_without_a_method_is_recorded(tmp_path):
    list(train(Line(), points, recording(tmp_path, steps=2, loss=squares)))
    recorded = read_recorded(tmp_path)
    assert [entry.name for entry in recorded.layout.tracked] == ["line.weight", "line.bias"]
    assert recorded.info["method"] is None


@pytest.mark.parametrize("method", METHODS)
def test_recording_changes_nothing_that_is_learnt(tmp_path, method):
    plain, watched = lora_bert(METHODS[method]), lora_bert(METHODS[method])
    expected = [(s.loss, s.gradient_norm, s.penalty) for s in train(plain, texts, config())]
    found = [(s.loss, s.gradient_norm, s.penalty) for s in train(watched, texts, recording(tmp_path, every=3))]
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    # Averages take up every step, written or not.
    list(train(lora_bert(METHODS[method]), texts, recording(tmp_path / "all")))
    some, every = read_recorded(tmp_path), read_recorded(tmp_path / "all")
    assert some.steps.tolist() == [3, 6, 8]
    assert np.array_equal(some.values, every.values[[2, 5, 7]], equal_nan=True)


def test_accumulated_gradients_are_complete_and_clipping_is_told(tmp_path):
    """Two batches of eight are one of sixteen, and half the norm is half the gradient."""

    def joined(number):
        halves = [texts(2 * number), texts(2 * number + 1)]
        return {key: torch.cat([half[key] for half in halves]) for key in halves[0]}

    fields = {"steps": 1, "clip": None}
    list(train(lora_bert(dropout=0.0), texts, recording(tmp_path / "two", accumulation=2, **fields)))
    (step,) = train(lora_bert(dropout=0.0), joined, recording(tmp_path / "one", **fields))
    one, two = read_recorded(tmp_path / "one"), read_recorded(tmp_path / "two")
    assert one.clip.tolist() == two.clip.tolist() == [1.0]
    for name in ("sensitivity", "fisher"):
        # Sums of float32 in another order, of entries that nearly cancel.
        np.testing.assert_allclose(column(two, name), column(one, name), rtol=1e-3, atol=1e-12)
    clip = step.gradient_norm / 2
    list(train(lora_bert(dropout=0.0), joined, recording(tmp_path / "cut", steps=1, clip=clip)))
    cut = read_recorded(tmp_path / "cut")
    assert cut.clip[0] == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_allclose(column(cut, "sensitivity"), column(one, "sensitivity") * cut.clip[0], rtol=1e-5)
    np.testing.assert_allclose(column(cut, "fisher"), column(one, "fisher") * cut.clip[0] ** 2, rtol=1e-5)


def test_large_tensors_taken_in_pieces_are_recorded_the_same(tmp_path, monkeypatch):
    for name, piece in (("whole", 1 << 17), ("pieces", 7)):  # 7 divides none of the tensors
        monkeypatch.setattr("spectra.train.recorder._PIECE", piece)
        list(train(lora_bert(), texts, recording(tmp_path / name, steps=3)))
    whole, pieces = (read_recorded(tmp_path / name) for name in ("whole", "pieces"))
    # Entry by entry the arithmetic is the same; a product may be fused with a sum in one length of vector and not in
    # another.
    np.testing.assert_allclose(pieces.values, whole.values, rtol=1e-6, atol=1e-20)


def test_bfloat16_weights_are_scored_in_float32(tmp_path):
    model = Line(dtype=torch.bfloat16)

    def narrow(number):
        return points(number, dtype=torch.bfloat16)

    list(train(model, narrow, recording(tmp_path, steps=3, loss=squares)))
    found = column(read_recorded(tmp_path), "smoothed")
    assert not np.array_equal(found, torch.from_numpy(found.copy()).bfloat16().float().numpy())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_replay_under_its_own_rule_is_what_adalora_kept(tmp_path, seed):
    method = AdaLoRA(rank=2, init_rank=4, warmup=0.1, final=0.3, interval=0.1)
    model = bert(seed=seed)
    injection = inject(model, r"\.(query|value|dense)$", method, also="^classifier$", seed=seed)
    ranks = []
    for step in train(model, texts, recording(tmp_path, steps=30)):
        ranks.append([part.rank for part in injection.parts.values()])
        assert step.number == len(ranks)
    found = replay(read_recorded(tmp_path), kept=2 * len(injection.parts))
    assert found.modules == tuple(injection.parts)
    assert found.ranks[-1].tolist() == ranks[-1]
    assert len(set(ranks[-1])) > 1
    assert [mask.tolist() for mask in found.kept] == [part.kept.tolist() for part in injection.parts.values()]
    # Between two prunings what was pruned grows again: after a pruning the ranks are those of the rule.
    pruned = [t for t in range(30) if t >= 21 or (t > 3 and t % 3 == 0)]
    assert found.ranks[pruned].tolist() == [ranks[t] for t in pruned]


# --- cut off and taken up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_record_is_the_uninterrupted_one_byte_for_byte(tmp_path, method):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    list(train(lora_bert(METHODS[method]), texts, recording(whole)))
    begun = train(lora_bert(METHODS[method]), texts, recording(cut, save_every=3))
    for _ in range(5):  # two steps past the checkpoint: they are to be taken again
        next(begun)
    begun.close()
    assert read_recorded(cut).steps.tolist() == [1, 2, 3, 4, 5]
    assert (cut / NAME).exists()
    list(train(lora_bert(METHODS[method]), texts, recording(cut, save_every=3, resume=True)))
    assert (cut / NAME).read_bytes() == (whole / NAME).read_bytes()
    assert not (cut / JOURNAL).exists()
    # All steps done: nothing is recorded anew, and nothing lost.
    assert list(train(lora_bert(METHODS[method]), texts, recording(cut, save_every=3, resume=True))) == []
    assert (cut / NAME).read_bytes() == (whole / NAME).read_bytes()


def test_a_resumption_that_would_lack_steps_is_refused(tmp_path):
    begun = train(lora_bert(), texts, config(tmp_path, save_every=3))
    for _ in range(3):
        next(begun)
    begun.close()
    with pytest.raises(MismatchError, match="first 3 steps were trained without --record-importance"):
        list(train(lora_bert(), texts, recording(tmp_path, save_every=3, resume=True)))
    assert len(list(train(lora_bert(), texts, config(tmp_path, save_every=3, resume=True)))) == 5


def test_a_recorded_training_goes_on_without_its_record(tmp_path):
    begun = train(lora_bert(), texts, recording(tmp_path, save_every=3))
    for _ in range(3):
        next(begun)
    begun.close()
    with pytest.raises(MismatchError, match="every 1 of 8 steps"):
        list(train(lora_bert(), texts, recording(tmp_path, every=2, save_every=3, resume=True)))
    assert len(list(train(lora_bert(), texts, config(tmp_path, save_every=3, resume=True)))) == 5
    assert read_recorded(tmp_path).steps.tolist() == [1, 2, 3]


def test_a_killed_process_leaves_a_record_and_its_successor_ends_it(tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    code = (
        "import sys, torch; torch.set_num_threads(1); from tests.train import killed; import spectra.train.config as c;"
        "plain = killed.TrainConfig; killed.TrainConfig = lambda **f: plain(**f, record_importance=1);"
        "killed.run(sys.argv[1], 0.05)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=Path(killed.__file__).parents[2])
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 6:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    found = read_recorded(out)
    assert 5 <= len(found.steps) < 40
    assert found.steps.tolist() == list(range(1, len(found.steps) + 1))
    assert not (out / NAME).exists()
    for folder in (out, whole):
        subprocess.run(
            [sys.executable, "-c", code.replace("0.05", "0.0"), str(folder)],
            cwd=Path(killed.__file__).parents[2],
            check=True,
        )
    assert (out / NAME).read_bytes() == (whole / NAME).read_bytes()


def test_a_disk_that_is_full_keeps_what_was_recorded(tmp_path, monkeypatch):
    begun = train(lora_bert(), texts, recording(tmp_path, save_every=2))
    for _ in range(3):
        next(begun)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spectra.importance.journal.write_recorded", full)
    with pytest.raises(OSError, match="No space left"):
        begun.close()
    monkeypatch.undo()
    assert read_recorded(tmp_path).steps.tolist() == [1, 2, 3]
    list(train(lora_bert(), texts, recording(tmp_path, save_every=2, resume=True)))
    assert read_recorded(tmp_path).steps.tolist() == list(range(1, 9))


def test_a_record_needs_a_folder_and_a_number():
    with pytest.raises(UsageError, match="record_importance = 1 needs out"):
        config(record_importance=1)
    with pytest.raises(UsageError, match="record_importance = 0"):
        config(record_importance=0)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    base = save_model(tmp_path_factory.mktemp("base") / "bert")
    reviews = save_reviews(tmp_path_factory.mktemp("texts") / "reviews.csv")
    words = ["--model", str(base), "--task", str(reviews), "--steps", "6", "--batch", "8", "--length", "16"]
    return [*words, "--device", "cpu", "--quiet"]


def test_the_command_records_beside_the_metrics(flags, tmp_path, capsys):
    out = str(tmp_path)
    assert main([*flags, "--method", "adalora", "--record-importance", "2", "--lr", "0.05", "--out", out]) == 0
    assert f"{tmp_path / NAME}" in capsys.readouterr().out
    found = read_recorded(tmp_path)
    assert found.steps.tolist() == [2, 4, 6]
    assert {key: found.info[key] for key in ("method", "rank", "score")} == {
        "method": "AdaLoRA",
        "rank": 4,
        "score": "sensitivity",
    }
    assert not (tmp_path / JOURNAL).exists()
    assert "record_importance" not in json.loads((tmp_path / "training.json").read_text())["asked"]
    # The same result serves who asks for the record and who does not.
    assert main([*flags, "--method", "adalora", "--lr", "0.05", "--out", out]) == 0
    assert main([*flags, "--method", "adalora", "--lr", "0.05", "--record-importance", "--out", out]) == 0
    assert main([*flags, "--method", "adalora", "--lr", "0.05", "--no-resume", "--out", out]) == 0
    assert not (tmp_path / NAME).exists()


def test_several_methods_are_recorded_each_in_its_folder(flags, tmp_path):
    words = ["--methods", "lora,full", "--set", "lora.rank=2", "--record-importance", "--out", str(tmp_path)]
    assert main([*flags, *words]) == 0
    assert read_recorded(tmp_path / "lora").matrices[0].directions == 2
    assert not read_recorded(tmp_path / "full").matrices


def test_a_finished_training_without_a_record_cannot_give_one(flags, tmp_path, capsys):
    words = [*flags, "--method", "lora", "--out", str(tmp_path)]
    assert main(words) == 0
    assert main([*words, "--record-importance"]) == 3
    assert "importance was not recorded" in capsys.readouterr().err
    assert main([*words, "--record-importance", "--no-resume"]) == 0
    assert read_recorded(tmp_path).steps.tolist() == list(range(1, 7))


def test_nothing_is_left_of_the_recorder_in_a_model(tmp_path):
    model = lora_bert()
    before = {name: type(module) for name, module in model.named_modules()}
    list(train(model, texts, recording(tmp_path, steps=2)))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert injections(model)[0].hooks is None
    assert isinstance(model, nn.Module)
    assert all(not module._forward_hooks and not module._backward_hooks for module in model.modules())
