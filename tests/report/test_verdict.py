"""The verdict: three sentences, whatever the run holds, and never a rank without its floor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from spectra.report import ReportData, build_report
from tests.report.planted import adapter_run, matrix_row, planted_run, row, run_of, spectrum


def said(*rows: dict[str, Any]) -> tuple[str, str, str]:
    return build_report(run_of(*rows)).verdict


def low_rank(name: str, layer: int, *, signal: int, noise: float, floor: float, rounding: float) -> dict[str, Any]:
    s = spectrum((384, 384), np.random.default_rng(layer), signal=signal, noise=noise, decay=0.1)
    return matrix_row(name, layer, "query", (384, 384), s, relative=0.002 * (layer + 1), floor=floor, rounding=rounding)


def test_the_planted_run(data: ReportData) -> None:
    how_much, how_many, how_sure = data.verdict
    assert "37 of 38 matrices changed, each by 0.40\xa0% to 2.6\xa0% of its norm" in how_much
    assert "most in output.dense" in how_much
    assert "in layer 5" in how_much
    assert "382 singular values stand above the storage floor" in how_many
    assert "rank 8, 16 or 64" in how_many
    assert "does not hold for this update up to rank 64" in how_many
    assert "1 of 37 matrices is mostly rounding (encoder.layer.0.attention.self.key.weight)" in how_sure
    assert "36 spectra are complete and 1 is truncated" in how_sure


def every_kind() -> dict[str, tuple[dict[str, Any], ...]]:
    flat = low_rank("w", 0, signal=4, noise=0.2, floor=0.01, rounding=0.02)
    return {
        "none matched": (row("a", 0, "a", (3, 3), "base_only"), row("b", 0, "b", (3, 3), "tuned_only")),
        "shapes": (row("a", 0, "a", (3, 3), "shape_mismatch"),),
        "same": (row("a", 0, "a", (3, 3), "unchanged", frobenius=0.0),),
        "vectors": (row("a", 0, "a", (3,), "vector", frobenius=1.0, relative_frobenius=0.1, base_frobenius=10.0),),
        "broken": (row("a", 0, "a", (3, 3), "nonfinite"),),
        "empty": (row("a", 0, "a", (0, 3), "empty"),),
        "one": (flat,),
        "one and a vector": (flat, row("b", 0, "b", (3,), "vector", frobenius=1.0, relative_frobenius=0.1)),
        "unknown floor": (flat | {"storage_floor": math.nan, "storage_frobenius": math.nan, "signal_rank": math.nan},),
        "zero base": (flat | {"relative_frobenius": math.nan, "base_frobenius": 0.0},),
    }


@pytest.mark.parametrize("kind", list(every_kind()))
def test_three_sentences_whatever_happens(kind: str) -> None:
    sentences = said(*every_kind()[kind])
    assert len(sentences) == 3
    for sentence in sentences:
        assert sentence.endswith(".")
        assert sentence[0].isupper() or sentence[0].isdigit()
        assert ". " not in sentence, "one sentence each"
        assert "nan" not in sentence.lower().replace("nan or", "")


def test_same_weights_are_said_to_be_the_same() -> None:
    assert said(*every_kind()["same"])[0].startswith("The two checkpoints hold the same weights")


def test_nothing_matched_is_said() -> None:
    assert said(*every_kind()["none matched"])[0].startswith("None of 2 tensors could be matched")


def test_no_effective_rank_without_its_floor() -> None:
    for rows in every_kind().values():
        for sentence in said(*rows):
            assert "entropy rank" not in sentence or "storage floor" in sentence


def test_the_bet_holds_on_a_low_rank_update() -> None:
    rows = [low_rank(f"w{i}", i, signal=6, noise=0.005, floor=1e-4, rounding=0.001) for i in range(4)]
    assert "holds for this update from rank 8" in said(*rows)[1]


def test_the_bet_is_not_refuted_by_rounding() -> None:
    """The bf16 trap: a rank-8 update under full-rank rounding has a high entropy rank, and eight directions above."""
    rows = [low_rank(f"w{i}", i, signal=8, noise=0.2, floor=0.25, rounding=0.85) for i in range(4)]
    _, how_many, how_sure = said(*rows)
    assert "8 singular values stand above the storage floor" in how_many
    assert "is not refuted" in how_many
    assert "does not hold" not in how_many
    assert "4 of 4 matrices are mostly rounding" in how_sure


def test_bounds_that_do_not_settle_the_bet_are_said_not_to() -> None:
    s = spectrum((4096, 4096), np.random.default_rng(0), signal=40, noise=0.02, decay=0.1)
    held = matrix_row("w", 0, "q", (4096, 4096), s, relative=0.01, floor=1e-3, rounding=0.01, keep=64)
    held |= {"error_r64_low": 0.2, "error_r64_high": 0.5}
    assert "do not settle" in said(held)[1]


def test_an_adapter_is_not_asked_whether_its_rank_was_enough() -> None:
    _, how_many, how_sure = build_report(adapter_run(rank=8)).verdict
    assert "at most 8 directions" in how_many
    assert "nothing on whether a low rank was enough" in how_many
    assert "does not hold" not in how_many
    assert "all 8 spectra are complete" in how_sure


def test_truncated_medians_are_given_as_ranges() -> None:
    rows = []
    for i in range(3):
        s = spectrum((3000, 4096), np.random.default_rng(i), signal=40, noise=0.2, decay=0.2)
        rows.append(matrix_row(f"w{i}", i, "q", (3000, 4096), s, relative=0.01, floor=1e-3, rounding=0.01, keep=64))
    _, how_many, how_sure = said(*rows)
    assert "–" in how_many
    assert "all 3 spectra are truncated, each number given with certified bounds" in how_sure


def test_hostile_names_are_shown_not_obeyed() -> None:
    for sentence in build_report(planted_run(hostile=True)).verdict:
        assert sentence.isprintable() or "\xa0" in sentence
        assert "\x1b" not in sentence
        assert "\u202e" not in sentence
        assert len(sentence) < 1200
