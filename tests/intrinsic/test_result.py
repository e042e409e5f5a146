"""The result's sentence of every verdict, and that saving and loading changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest

from spectra.errors import MismatchError, UsageError
from spectra.intrinsic.result import CSV, JSON, IntrinsicDimension, Verdict
from spectra.intrinsic.searching import SearchConfig
from tests.intrinsic.synthetic import Synthetic, failing, found


@pytest.fixture(scope="module")
def result() -> IntrinsicDimension:
    return found(Synthetic(draw=1), SearchConfig(steps=100, free_head=True), told={"model": "tiny"})


PLAIN: dict[str, Any] = {
    "full": 0.807, "full_low": 0.803, "full_high": 0.811, "target": 0.726,
    "dimension": 1240.4, "low": 903.0, "high": 1698.0, "best_metric": 0.781, "best_dimension": 4096,
    "largest_dimension": 16_384,
}  # fmt: skip
GOAL = "90 % of full fine-tuning's accuracy 0.807 ± 0.004 is 0.726."


def said(result: IntrinsicDimension, **changes: Any) -> str:
    return replace(result, **{**PLAIN, **changes}).sentence().replace("\u202f", " ")


def test_sentence_of_what_was_reached(result: IntrinsicDimension) -> None:
    assert said(result) == f"d90 = 1 240 (95 % interval 903 – 1 700): {GOAL}"
    assert said(result, low=None) == f"d90 = 1 240 (95 % interval up to 1 700, open below): {GOAL}"
    assert said(result, high=None) == f"d90 = 1 240 (95 % interval from 903, open above): {GOAL}"
    assert "open on both sides" in said(result, low=None, high=None)
    assert "the runs allowed ran out" in said(result, config={"spent": "runs"})
    assert said(result, share=0.5).startswith("d50 = ")
    assert said(result, share=0.999).startswith("d99.9 = ")
    assert "90 % of the way from the baseline 0.500 to full" in said(result, above_chance=True)
    assert "± " not in said(result, full_high=0.807)


def test_sentences_of_the_other_verdicts(result: IntrinsicDimension) -> None:
    never = said(result, verdict="never reached", best_metric=0.7, best_dimension=4096)
    assert never == (
        f"d90 was not reached: the best accuracy is 0.700, at d = 4 096, and the largest d tried is 16 384; {GOAL}"
    )
    whole = said(result, verdict="never reached", config={"total": 16_384})
    assert "16 384, which is every parameter" in whole
    smallest = said(result, verdict="reached by the smallest")
    assert smallest.startswith(f"d90 is at most {result.curve[0].dimension}, the smallest d tried")
    head = said(result, verdict="reached by the head alone", head=0.73)
    assert "trained alone it has accuracy 0.730" in head
    unfinished = said(result, verdict="unfinished", trials=result.trials[:6], config={"spent": "minutes"})
    assert unfinished == f"d90 is unknown yet: the minutes allowed ran out with 0 dimensions tried; {GOAL}"


def test_sentence_of_a_reference_that_learnt_nothing(result: IntrinsicDimension) -> None:
    assert "no better than the baseline" in said(result, baseline=0.81)
    assert "reaches that untrained" in said(result, baseline=0.75)


def test_minus_is_a_minus(result: IntrinsicDimension) -> None:
    assert "negative loss −2.000" in said(result, metric_name="negative loss", full=-2.0, baseline=-4.0, target=-2.2)


def test_saved_and_loaded_is_the_same(result: IntrinsicDimension, tmp_path: Path) -> None:
    path = result.save(tmp_path / "a")
    loaded = IntrinsicDimension.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert path.read_bytes() == (tmp_path / "b" / JSON).read_bytes()
    assert (tmp_path / "a" / CSV).read_bytes() == (tmp_path / "b" / CSV).read_bytes()
    assert loaded.curve == result.curve
    assert loaded.sentence() == result.sentence()
    assert IntrinsicDimension.load(path).dimension == result.dimension
    assert json.loads(path.read_bytes())["schema"] == 1
    assert b"NaN" not in path.read_bytes()  # pilots have no metric: null


def test_failed_trainings_survive_saving(tmp_path: Path) -> None:
    run = failing(Synthetic(), lambda ask: ask.kind == "pilot" and (ask.learning_rate or 0) > 0.03)
    result = found(run)
    result.save(tmp_path)
    loaded = IntrinsicDimension.load(tmp_path)
    assert [t.loss for t in loaded.trials] == [t.loss for t in result.trials]
    assert math.inf in [t.loss for t in loaded.trials]


def test_frame_and_csv(result: IntrinsicDimension, tmp_path: Path) -> None:
    frame = result.frame
    assert len(frame) == len(result.trials)
    assert list(frame.kind[:6]) == ["full"] * 3 + ["head"] * 3
    assert (frame.steps_done[frame.kind == "pilot"] == 20).all()
    result.save(tmp_path)
    read = pd.read_csv(tmp_path / CSV)
    assert list(read.columns) == list(frame.columns)
    assert read.metric[0] == frame.metric[0]


def test_curve_ascends_and_holds_its_means(result: IntrinsicDimension) -> None:
    dimensions = [point.dimension for point in result.curve]
    assert dimensions == sorted(set(dimensions))
    assert all(point.low <= point.mean <= point.high for point in result.curve)
    assert all(len(point) == 6 for point in result.curve)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda text: text[: len(text) // 2], UsageError),
        (lambda text: "[]", UsageError),
        (lambda text: "{}", UsageError),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), MismatchError),
        (lambda text: text.replace('"target"', '"goal"'), UsageError),
        (lambda text: text.replace('"verdict": "reached"', '"verdict": "guessed"'), UsageError),
        (lambda text: text.replace('"learning_rate"', '"rate"'), UsageError),
        (lambda text: text.replace('"full_high": 0', '"full_high": "x"'), UsageError),
    ],
)
def test_damaged_files(result: IntrinsicDimension, tmp_path: Path, damage: Any, error: type[Exception]) -> None:
    path = result.save(tmp_path)
    text = path.read_text("utf-8")
    path.write_text(damage(text), "utf-8")
    assert path.read_text("utf-8") != text
    with pytest.raises(error, match=JSON.replace(".", r"\.")):
        IntrinsicDimension.load(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        IntrinsicDimension.load(tmp_path)


def test_card(result: IntrinsicDimension) -> None:
    card = result._repr_html_()
    assert "d90 = " in card
    assert "<svg" in card
    assert card.count("<tr") == len(result.curve) + 1


HOSTILE: list[Any] = [None, "x", [], {}, -1, 0, True, 10**400, 1e400, math.nan, [1], {"a": 1}]


def test_hostile_fields(result: IntrinsicDimension, tmp_path: Path) -> None:
    """Every field of the result, a trial and its ask in turn: an error of ours, or a result that can be shown."""
    base = json.loads(result.save(tmp_path).read_bytes())
    at = next(i for i, trial in enumerate(base["trials"]) if trial["ask"]["kind"] == "subspace")
    damaged = [{**base, key: value} for key in base for value in HOSTILE]
    damaged += [{**base, "trials": [], "verdict": verdict} for verdict in get_args(Verdict)]
    for key in base["trials"][at]:
        damaged += [{**base, "trials": changed(base["trials"], at, {key: value})} for value in HOSTILE]
    for key in base["trials"][at]["ask"]:
        asks = [{"ask": {**base["trials"][at]["ask"], key: value}} for value in HOSTILE]
        damaged += [{**base, "trials": changed(base["trials"], at, ask)} for ask in asks]
    refused = 0
    for record in damaged:
        (tmp_path / JSON).write_text(json.dumps(record))
        try:
            loaded = IntrinsicDimension.load(tmp_path)
        except (UsageError, MismatchError):
            refused += 1
        else:
            assert loaded.sentence()
            assert loaded.curve is not None
            assert len(loaded.frame) == len(loaded.trials)
    assert refused > 0.7 * len(damaged)


def changed(trials: list[dict[str, Any]], at: int, fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [*trials[:at], {**trials[at], **fields}, *trials[at + 1 :]]


def test_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / JSON).write_text("[" * 100_000)
    with pytest.raises(UsageError, match="damaged"):
        IntrinsicDimension.load(tmp_path)
