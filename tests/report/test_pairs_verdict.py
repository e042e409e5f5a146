"""The verdict on two updates: four sentences, each with its chance, whatever the geometry holds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from spectra.report.pairs.build import build_report
from tests.report.planted_pairs import Update, dense, found, geometry_of, planted_geometry, record


def said(*updates: Update, **changes: Any) -> tuple[str, ...]:
    rng = np.random.default_rng(1)
    row = record("layer.0.query.weight", 0, "query", rng.standard_normal((96, 128)) / 10, updates)
    return build_report(geometry_of(row | changes, labels=("full", "lora", "third")[: len(updates)])).verdict


def pair(angle: float, size: float = 1.0, *, floor: float = 0.0) -> tuple[Update, Update]:
    rng = np.random.default_rng(2)
    full = dense((96, 128), rng, size=0.1)
    return Update(full, floor=floor), Update(found(full, rng, angle=angle, size=size), "factors")


def test_the_planted_geometry() -> None:
    first, second, third, fourth = build_report(planted_geometry()).verdict
    assert first.startswith("The 8 leading directions of lora hold")
    assert "where the best 8 would hold" in first
    assert "random ones" in first
    assert "the other way round, the 8 leading directions of full hold" in first
    assert "point largely the same way: cosine 0.61" in second
    assert "standard deviations above random updates" in second
    assert "full moved the weights 1.2 times as far as lora" in second
    assert third.startswith("Of their 8 leading directions, the median matrix shares 6.2 on the output side")
    assert "random ones would share 0.67" in third
    assert "in every matrix" in third
    assert "none in full and lora" in fourth
    assert "where nearly every random direction would" in fourth


def test_an_adapter_that_found_it_exactly() -> None:
    first, second, third, _ = said(*pair(0.0))
    assert "of lora hold 43\xa0%" in first
    assert "the best 8 would hold 43\xa0%" in first
    assert "largely the same way: cosine 0.66" in second  # √0.43: the rest of the update is orthogonal to it
    assert "shares 8 on the output side and 8 on the input side" in third
    assert "(above chance: 100\xa0%)" in third


def test_updates_that_went_elsewhere() -> None:
    rng = np.random.default_rng(0)
    one, other = (Update(dense((96, 128), rng, size=0.1)) for _ in range(2))
    _, second, third, _ = said(one, other)
    assert "no more the same way than random ones" in second
    assert "within what random updates give" in second
    assert "both moved the weights about as far" in second
    assert "(above chance: " in third


def test_updates_against_each_other() -> None:
    full, low = pair(0.1)
    assert "point against each other" in said(full, Update(-low.delta, "factors"))[1]
    assert "standard deviations below random updates" in said(full, Update(-low.delta, "factors"))[1]


def test_what_is_not_resolved_is_said() -> None:
    third = said(*pair(0.3, floor=0.05))[2]
    assert "not resolve their subspaces, so the overlap is uncertain" in third
    rows = [json.loads(json.dumps(r)) for r in planted_geometry().records]
    for row in rows:
        for update in row["updates"][:1]:
            update["resolved"] = 3
    assert "in no matrix are those subspaces resolved" in build_report(geometry_of(*rows)).verdict[2]
    rows[0]["updates"][0]["resolved"] = 8
    assert "in 1 of 9 matrices" in build_report(geometry_of(*rows)).verdict[2]


def test_intruders_are_counted_or_said_not_to_be_known() -> None:
    assert "8 directions of 10 in lora" in said(*pair(0.1, size=60.0))[3]
    row = record("w", 0, "q", np.eye(96, 128), pair(0.1))
    for update in row["updates"]:
        del update["intruder_cosines"], update["intruder_resolved"]
    del row["basis"]
    determined = build_report(planted_geometry()).verdict[3]
    assert "of those directions 72 of 90 in full and 72 of 90 in lora are resolved" in determined
    assert "were not looked for" in build_report(geometry_of(row)).verdict[3]


def test_several_updates_are_told_by_their_extremes() -> None:
    first, second, third, fourth = build_report(planted_geometry(updates=4)).verdict
    assert first.startswith("Most was found where the 8 leading directions of lora")
    assert "least where" in first
    assert second.startswith("Closest in direction are full and lora (cosine 0.61")
    assert "elsewhere moved the weights most" in second
    assert "Of the leading 8 directions of full and lora" in third
    assert "in all 54 comparisons" in third
    assert "43 directions of 90 in elsewhere and none in full, lora and lora-seed-1" in fourth


def test_sizes_that_are_alike_make_no_most_and_least() -> None:
    rng = np.random.default_rng(0)
    same = [Update(0.1 * rng.standard_normal((96, 128))) for _ in range(3)]
    assert "all moved the weights about as far" in said(*same)[1]


def every_kind() -> dict[str, Any]:
    bare = {"rows": 4, "cols": 4, "layer": 0, "role": "q", "updates": [], "pairs": []}
    thin = {"name": "w", "status": "ok", **bare, "updates": [{"kind": "dense", "frobenius": 1.0}] * 2,
            "pairs": [{"a": 0, "b": 1, "cosine": 0.5, "cosine_std": 0.25}]}  # fmt: skip
    return {
        "nothing": (),
        "unchanged": ({"name": "w", "status": "unchanged", **bare},),
        "broken": ({"name": "w", "status": "nonfinite", **bare},),
        "numbers missing": (thin,),
        "one direction": (record("w", 0, "q", np.eye(3), [Update(np.outer([1.0, 0, 0], [0, 1.0, 0]))] * 2),),
        "same twice": (record("w", 0, "q", np.eye(12), [Update(np.diag(np.arange(1.0, 13)))] * 2),),
        "planted": planted_geometry().records,
    }


@pytest.mark.parametrize("kind", list(every_kind()))
def test_sentences_whatever_happens(kind: str) -> None:
    data = build_report(geometry_of(*every_kind()[kind]))
    assert len(data.verdict) == len(data.about) == (4 if data.pairs else 1)
    for sentence in data.verdict:
        assert sentence.endswith(".")
        assert sentence[0].isupper()
        assert ". " not in sentence, "one sentence each"
        assert "nan" not in sentence.lower()
        assert "inf" not in sentence.lower()


def test_hostile_labels_are_shown_not_obeyed() -> None:
    labels = ("evil\x1b[2J\u202e", "<script>" + "x" * 500)
    for sentence in build_report(geometry_of(*planted_geometry().records, labels=labels)).verdict:
        assert "\x1b" not in sentence
        assert "\u202e" not in sentence
        assert len(sentence) < 1200
