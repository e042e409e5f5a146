"""How many directions: budgets, shares and advice against the planted spectra, by definition and by brute force."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from spectra.report import ReportData, build_report
from spectra.report.build import summary
from spectra.report.directions import Directions, at_least
from spectra.report.page import payload
from spectra.report.rows import Interval
from spectra.report.text import dump, grouped
from tests.report.planted import PlantedRun, adapter_run, matrix_row, row, run_of


def found(data: ReportData) -> Directions:
    assert data.directions is not None
    return data.directions


def three() -> tuple[PlantedRun, list[tuple[np.ndarray, tuple[int, int]]]]:
    """Three complete spectra of unlike shape and decay."""
    rng = np.random.default_rng(4)
    shapes = [(20, 30), (30, 24), (60, 20)]
    held = [(np.sort(rng.gamma(0.3, size=min(s)) + 1e-3)[::-1], s) for s in shapes]
    rows = [
        matrix_row(f"m{i}", i, "role", shape, s, relative=0.01, floor=1e-9, rounding=1e-9)
        for i, (s, shape) in enumerate(held)
    ]
    return run_of(*rows), held


def test_budgets_are_what_equal_ranks_cost_and_leave() -> None:
    held, spectra = three()
    budgets = found(build_report(held)).budgets
    total = sum(float(np.sum(s**2)) for s, _ in spectra)
    assert [budget.rank for budget in budgets] == [1, 2, 4, 8, 16]  # 32 is more than any of them has
    for budget in budgets:
        assert budget.parameters == sum(min(budget.rank, len(s)) * sum(shape) for s, shape in spectra)
        left = math.sqrt(sum(float(np.sum(s[budget.rank :] ** 2)) for s, _ in spectra) / total)
        # 1e-9: sums of 64 terms in float64.
        assert budget.uniform.low == pytest.approx(left, rel=1e-9)
        assert budget.uniform.high == pytest.approx(left, rel=1e-9)
        assert budget.uniform_energy.low == pytest.approx(1 - left**2, rel=1e-9)


def test_best_ranks_are_the_best_there_are() -> None:
    """Of all rank triples that cost no more, by trying every one."""
    held, spectra = three()
    kept = [np.append(0.0, np.cumsum(s**2)) for s, _ in spectra]
    costs = [sum(shape) for _, shape in spectra]
    ranks = np.meshgrid(*(np.arange(len(k)) for k in kept), indexing="ij")
    price = sum(c * r for c, r in zip(costs, ranks, strict=True))
    energy = sum(k[r] for k, r in zip(kept, ranks, strict=True))
    total = sum(float(k[-1]) for k in kept)
    directions = found(build_report(held))
    for budget in directions.budgets:
        best = float(energy[price <= budget.parameters].max())
        assert budget.allocated_energy.high == pytest.approx(best / total, rel=1e-9)
        assert budget.allocated.high <= budget.uniform.high
    for share in directions.shares:
        fewest = int(price[energy >= share.share * total].min())
        assert share.allocated == Interval(fewest, fewest)
        assert share.saved == pytest.approx(1 - fewest / share.uniform.high)
        rank = int(share.rank.high)
        held_energy = [sum(float(np.sum(s[:r] ** 2)) for s, _ in spectra) for r in (rank - 1, rank)]
        assert held_energy[0] < share.share * total <= held_energy[1]


def test_a_truncated_spectrum_gives_bands_that_hold_the_truth(run: PlantedRun, data: ReportData) -> None:
    """The same model with its one truncated spectrum known whole lies inside every band."""
    whole = PlantedRun(run.frame.copy(), run.info)
    place = int(whole.frame.index[whole.frame["name"] == "embeddings.word_embeddings.weight"][0])
    line = whole.frame.loc[place]
    # What is left out, spread so that no value passes the certified bound.
    rest = np.full(384 - 64, line.gap / math.sqrt(384 - 64))
    assert rest[0] < line.tail_norm
    whole.frame.at[place, "singular_values"] = np.concatenate([line.singular_values, rest])
    whole.frame.at[place, "singular_values_high"] = np.empty(0)
    truth, banded = found(build_report(whole)), found(data)
    assert [b.rank for b in banded.budgets] == [1, 2, 4, 8, 16, 32, 64]
    for exact, band in zip(truth.budgets, banded.budgets, strict=True):
        assert band.uniform.low < band.uniform.high
        assert band.uniform.low <= exact.uniform.low <= band.uniform.high
        assert exact.allocated.high <= band.allocated.high + 1e-12
    for exact, band in zip(truth.shares, banded.shares, strict=True):
        assert band.rank.low <= exact.rank.low <= band.rank.high
        assert band.allocated.low <= exact.allocated.low
        assert exact.allocated.high <= band.allocated.high
    assert math.isinf(banded.shares[-1].allocated.high)
    assert "the directions that are known hold less" in banded.said[0]


@pytest.mark.parametrize(("rank", "ladder"), [(8, [1, 2, 4, 8]), (6, [1, 2, 4, 6]), (1, [1])])
def test_the_ladder_of_an_adapter_ends_at_its_rank(rank: int, ladder: list[int]) -> None:
    directions = found(build_report(adapter_run(rank=rank)))
    assert directions.adapter_rank == rank
    assert [budget.rank for budget in directions.budgets] == ladder
    assert directions.budgets[-1].uniform.high == pytest.approx(0.0, abs=1e-6)
    assert len(directions.said) == (1 if rank == 1 else 2), "that all of it leaves nothing need not be said"


def test_advice_of_a_matrix_is_its_row_s_own_numbers(data: ReportData) -> None:
    directions = found(data)
    assert set(directions.matrices) == {r.position for r in data.rows if r.analysed}
    for held in (r for r in data.rows if r.analysed and not r.truncated):
        advice = directions.matrices[held.position]
        for ours, theirs in (("energy_90", "rank_90"), ("stable", "stable_rank"), ("signal", "signal_rank")):
            assert advice[ours].value == pytest.approx(held.measures[theirs].low)


def test_summary_has_the_budgets_and_the_advice(data: ReportData) -> None:
    told = json.loads(dump(summary(data)))
    directions = told["directions"]
    assert directions["said"] == list(found(data).said)
    assert [b["uniform_rank"] for b in directions["budgets"]] == [1, 2, 4, 8, 16, 32, 64]
    low, high = directions["budgets"][-1]["global_error"]
    assert low < high
    assert directions["shares"][-1]["global_parameters"][1] is None, "no upper end: null, not infinity"
    advice = {t["name"]: t.get("advice") for t in told["tensors"]}
    assert advice["pooler.dense.weight"] is None
    key = advice["encoder.layer.0.attention.self.key.weight"]
    assert key["signal"] < key["energy_90"]
    assert "may be rounding" in key["said"]


def test_a_run_without_a_change_has_no_section() -> None:
    held = build_report(run_of(row("a", 0, "a", (3, 3), "unchanged", frobenius=0.0)))
    assert held.directions is None
    assert summary(held)["directions"] is None


def test_the_page_says_why_a_criterion_is_silent() -> None:
    held = payload(build_report(adapter_run()))
    advice = held["rows"][0]["advice"]
    assert len(advice["bands"]) == len(held["criteria"])
    silent = [i for i, band in enumerate(advice["bands"]) if band is None]
    assert silent
    assert all(advice["lacking"][str(i)] for i in silent)


def test_counts_without_an_upper_end() -> None:
    assert at_least(Interval(1e6, math.inf)) == f"{grouped(10**6)} or more"
    assert at_least(Interval(math.inf, math.inf)) == at_least(Interval(math.nan, math.nan)) == "–"
