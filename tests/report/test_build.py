"""The content of a report: rows, aggregates, certified bounds and flags against what was planted."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from spectra.report import ReportData, build_report
from spectra.report.build import certificate_words, command_line, manifest, summary
from spectra.report.rows import PLOT_POINTS, Interval, grid, median, read_rows, thin
from spectra.report.tables import rounding_share
from spectra.report.text import dump
from tests.report.planted import PlantedRun, adapter_run, matrix_row, planted_run, row, run_of, spectrum

MATRIX = {"relative": 0.02, "floor": 0.001, "rounding": 0.01}


def planted(name: str = "w", layer: int | None = 0, *, seed: int = 0, **known: Any) -> dict[str, Any]:
    s = spectrum((48, 64), np.random.default_rng(seed), signal=5, noise=0.1, decay=0.5)
    return matrix_row(name, layer, known.pop("role", "attention"), (48, 64), s, **(MATRIX | known))


def kinds(data: ReportData) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {flag.kind: (flag.level, flag.positions) for flag in data.flags}


def test_every_row_of_the_run_is_a_row_of_the_report(run: PlantedRun, data: ReportData) -> None:
    assert [r.name for r in data.rows] == list(run.frame["name"])
    assert sum(data.statuses.values()) == len(run.frame)


def test_groups_are_medians_and_pooled_norms(run: PlantedRun, data: ReportData) -> None:
    frame = run.frame[(run.frame.status == "ok") & (run.frame.role == "output.dense")]
    group = next(g for g in data.by_role if g.label == "output.dense")
    assert group.entropy_rank.low == group.entropy_rank.high == frame.entropy_rank.median()
    assert group.matrices == len(frame) == 6
    pooled = math.sqrt((frame.frobenius**2).sum() / (frame.base_frobenius**2).sum())
    assert group.relative == pytest.approx(pooled, rel=1e-12)
    assert [g.label for g in data.by_layer] == ["0", "1", "2", "3", "4", "5", "outside layers"]


def test_a_truncated_spectrum_keeps_its_bounds(run: PlantedRun, data: ReportData) -> None:
    held = next(r for r in data.rows if r.truncated)
    source = run.frame.iloc[held.position]
    assert held.measures["entropy_rank"] == Interval(source.entropy_rank_low, source.entropy_rank_high)
    group = next(g for g in data.by_role if g.label == held.role)
    assert group.entropy_rank.low < group.entropy_rank.high
    told = next(t for t in summary(data)["tensors"] if t["name"] == held.name)
    assert told["entropy_rank"] == [pytest.approx(source.entropy_rank_low), pytest.approx(source.entropy_rank_high)]


def test_median_of_intervals_contains_the_median_of_any_values_inside() -> None:
    rng = np.random.default_rng(5)
    low = rng.uniform(0, 10, 31)
    high = low + rng.exponential(2, 31)
    bounds = median(Interval(a, b) for a, b in zip(low, high, strict=True))
    for _ in range(200):
        assert bounds.low <= np.median(rng.uniform(low, high)) <= bounds.high


def test_thinned_curves_keep_the_ends_and_the_ranks_people_ask_about() -> None:
    s = np.sort(np.random.default_rng(0).uniform(0.1, 1, 4096))[::-1]
    whole = float(np.linalg.norm(s))
    curve = thin(s, whole, np.empty(0))
    assert len(curve.index) <= PLOT_POINTS + 7
    assert {1, 8, 16, 64, 4096} <= set(curve.index)
    for i in (8, 64, 1000):
        at = min(curve.index, key=lambda j: abs(j - i))
        place = curve.index.index(at)
        assert curve.values[place] == pytest.approx(s[at - 1], rel=1e-3)  # four digits are kept
        assert curve.error[place] == pytest.approx(np.linalg.norm(s[at:]) / whole, rel=1e-3)
    assert all(np.diff(curve.index) > 0)


@pytest.mark.parametrize("count", [1, 2, 7, 159, 160, 161, 100_000])
def test_grid_is_ascending_and_within(count: int) -> None:
    at = grid(count)
    assert at[0] == 1
    assert at[-1] == count
    assert np.all(np.diff(at) > 0)


def test_rounding_is_flagged_where_it_is_most_of_the_energy(data: ReportData) -> None:
    level, positions = kinds(data)["mostly_rounding"]
    assert level == "alarm"
    assert [data.rows[i].name for i in positions] == ["encoder.layer.0.attention.self.key.weight"]


def test_rounding_share_just_below_and_above_half_of_the_energy() -> None:
    for share, noisy in ((0.70, False), (0.71, True)):  # √½ = 0.7071
        held = build_report(run_of(planted(rounding=share)))
        assert held.rows[0].mostly_rounding is noisy
        assert rounding_share(held.rows) == pytest.approx(share)


def test_flags_for_what_can_go_wrong() -> None:
    found = build_report(
        run_of(
            planted("plain"),
            planted("below", floor=99.0, layer=1),
            planted("dead", zero_fraction=0.9, layer=2),
            planted("part", reason="common 30522 rows of 30524"),
            planted("mixed", dtype_tuned="BF16"),
            planted("merged", merge_loss=0.4),
            row("nan", 0, "a", (3, 3), "nonfinite", reason="1 of 9"),
            row("fp4", 0, "a", (3, 3), "unsupported_dtype"),
            row("odd", 0, "a", (3, 3), "shape_mismatch", reason="(3, 3) against (4, 4)"),
            row("bad", 0, "a", (3, 3), "failed", reason="NoConvergence"),
            row("tied", 0, "a", (3, 3), "alias", reason="of plain"),
            row("old", 0, "a", (3, 3), "base_only"),
            row("new", 0, "a", (3, 3), "tuned_only"),
        )
    )
    assert found.failed
    levels = {kind: level for kind, (level, _) in kinds(found).items()}
    assert levels == dict.fromkeys(
        ["nonfinite", "unsupported_dtype", "failed", "shape_mismatch", "no_signal", "dead_zone"], "alarm"
    ) | dict.fromkeys(
        ["merge_loss", "base_only", "tuned_only", "compared_in_part", "alias", "dtype_changed", "names"], "note"
    )
    assert [f.level for f in found.flags] == sorted((f.level for f in found.flags), key=lambda level: level != "alarm")


def test_a_clean_run_has_no_alarm() -> None:
    found = build_report(run_of(planted("a"), planted("b", layer=1)))
    assert not found.failed
    assert not [f for f in found.flags if f.level == "alarm"]


def test_settings_and_samples_are_flagged() -> None:
    held = run_of(planted())
    held.info["settings"] |= {"include": "query\x1b[2J"}
    held.info["tuned"] = held.info["tuned"] | {"digests": [{"name": "a", "bytes": 1, "sha256": "0", "sampled": True}]}
    found = {f.kind: f.text for f in build_report(held).flags}
    assert "\\x1b[2J" in found["include"]
    assert "sample" in found["sampled_digests"]


def test_summary_and_manifest_are_strict_json(data: ReportData) -> None:
    told = json.loads(dump(summary(data)), parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert told["verdict"] == list(data.verdict)
    assert len(told["tensors"]) == len(data.rows)
    assert next(t for t in told["tensors"] if t["status"] == "nonfinite")["relative_frobenius"] is None
    kept = json.loads(dump(manifest(data)))
    assert kept["base"]["digests"][0]["sha256"] == "53aa51172d142c89" * 4
    assert kept["command"].startswith("python -m spectra.report models/minilm-base")


def test_manifest_takes_what_json_lacks() -> None:
    held = run_of(planted())
    held.info["settings"] |= {"limit": math.inf, "count": np.int64(3), "pair": (1, np.float64("nan"))}
    assert manifest(build_report(held))["settings"]["limit"] is None
    assert manifest(build_report(held))["settings"]["pair"] == [1, None]
    json.loads(dump(manifest(build_report(held))))


def test_unknown_and_missing_columns_read_as_unknown(run: PlantedRun) -> None:
    few = run.frame[["name", "status", "role", "layer"]].head(3)
    held = read_rows(few)
    assert not held[0].measures["entropy_rank"].known
    assert held[0].shape == ()


def test_the_command_that_reproduces_a_report_is_safe_in_a_shell() -> None:
    line = command_line("a; rm -rf /", "$(b)", {"seed": 3, "exact": True, "include": "a|b", "jobs": 4})
    assert line == "python -m spectra.report 'a; rm -rf /' '$(b)' --include 'a|b' --seed 3 --exact"


def test_certificates_in_words(data: ReportData) -> None:
    truncated = next(r for r in data.rows if r.truncated)
    words = certificate_words(truncated)
    assert f"leading {truncated.count} of {truncated.limit}" in words
    assert "no value beyond them exceeds" in words
    complete = next(r for r in data.rows if r.analysed and not r.truncated)
    assert f"All {complete.limit} singular values" in certificate_words(complete)
    assert "% of σ₁): values beneath" in certificate_words(complete)
    factored = build_report(adapter_run()).rows[0]
    assert "Exact from the two factors: the update has 8 singular values" in certificate_words(factored)
    unknown = build_report(run_of(planted(floor=math.nan, rounding=math.nan))).rows[0]
    assert "storage floor is unknown" in certificate_words(unknown)


def test_maps_hold_every_analysed_matrix_once(data: ReportData) -> None:
    for heat_map in data.maps:
        cells = [c for line in heat_map.cells for c in line if c]
        assert len(cells) == sum(r.analysed for r in data.rows)
        assert heat_map.layers[-1] is None
    rank = data.maps[1]
    noisy = rank.cells[rank.roles.index("attention.self.key")][0]
    assert noisy is not None
    assert int(noisy.small) < int(noisy.text) / 10, "the floor stands beside the entropy rank it contradicts"


def test_experts_share_a_cell() -> None:
    held = build_report(
        run_of(*(planted(f"e{i}", role="experts.*", seed=i, relative=0.01 * (i + 1)) for i in range(4)))
    )
    cell = held.maps[0].cells[0][0]
    assert cell is not None
    assert cell.position == 3
    assert "4 matrices together" in cell.spoken


def test_a_model_of_many_layers_builds() -> None:
    held = build_report(planted_run(layers=40))
    assert len(held.by_layer) == 41
