"""The content of a report on two updates: pooled numbers, ranks, flags and maps against what was planted."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from spectra.pairwise.pooled import rank_within
from spectra.pairwise.ranks import RANKS
from spectra.pairwise.rows import read_records
from spectra.report.pairs.build import PairsData, build_report, manifest, pair_numbers, summary
from spectra.report.text import dump
from tests.report.planted_pairs import (
    Update,
    dense,
    found,
    geometry_of,
    orthonormal,
    planted_geometry,
    record,
)

SHAPES = ((96, 96), (96, 160), (80, 96))


def two(angle: float = 0.5, *, size: float = 1.0, seed: int = 0, floor: float = 0.0) -> tuple[Any, list[Any]]:
    """Three matrices with a dense update each, and an adapter that found it; their records beside the updates."""
    rng = np.random.default_rng(seed)
    table, kept = [], []
    for i, shape in enumerate(SHAPES):
        full = dense(shape, rng, size=0.1 * (i + 1))
        low = found(full, rng, angle=angle, size=size)
        base = rng.standard_normal(shape) / 10
        table.append(record(f"w{i}", i, "query", base, [Update(full, floor=floor), Update(low, "factors")]))
        kept.append((base, full, low))
    return geometry_of(*table), kept


def kinds(data: PairsData) -> dict[str, str]:
    return {flag.kind: flag.level for flag in data.flags}


def test_pooled_numbers_are_those_of_all_matrices_as_one() -> None:
    geometry, kept = two()
    pair = build_report(geometry).pairs[0]
    one = np.concatenate([full.ravel() for _, full, _ in kept])
    other = np.concatenate([low.ravel() for _, _, low in kept])
    base = np.concatenate([w.ravel() for w, _, _ in kept])
    assert pair.cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-12)
    sizes = [np.linalg.norm(one) / np.linalg.norm(base), np.linalg.norm(other) / np.linalg.norm(base)]
    assert pair.relative == pytest.approx(sizes, rel=1e-12)
    inside = whole = random = 0.0
    for _, full, low in kept:
        u, _, vh = np.linalg.svd(low)
        inside += np.linalg.norm(u[:, :8].T @ full @ vh[:8].T) ** 2
        random += np.linalg.norm(full) ** 2 * 64 / full.size
        whole += np.linalg.norm(full) ** 2
    held = pair.captured["a_in_b"]
    assert held.ranks == (8, 8)
    assert held.share == pytest.approx(inside / whole, rel=1e-10)
    assert held.random == pytest.approx(random / whole, rel=1e-10)


def test_the_spread_of_a_pooled_cosine_is_that_of_random_updates() -> None:
    """Fifty pairs of random directions under the planted norms: their spread is the one that is told."""
    pair = build_report(two()[0]).pairs[0]
    _, kept = two()
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(200):
        inner = sum(
            float(np.sum(_turned(full, rng) * low)) for _, full, low in kept
        )  # fmt: skip
        norms = [math.sqrt(sum(np.linalg.norm(k[i]) ** 2 for k in kept)) for i in (1, 2)]
        drawn.append(inner / norms[0] / norms[1])
    # The standard error of a standard deviation from 200 draws is 5 %: three of them.
    assert np.std(drawn) == pytest.approx(pair.cosine_std, rel=0.15)


def _turned(matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, cols = matrix.shape
    return orthonormal(rows, rows, rng) @ matrix @ orthonormal(cols, cols, rng)


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.9])
def test_shared_directions_are_the_planted_angle(angle: float) -> None:
    """Every direction of the adapter stands at one angle to the leading 8: φ(8, 8) = cos² of it."""
    geometry, _ = two(angle)
    data = build_report(geometry)
    pair = data.pairs[0]
    assert pair.rank == 8
    for side in ("left", "right"):
        assert pair.shared(side) == pytest.approx(math.cos(angle) ** 2, abs=1e-10)
        row = data.rows[0]
        mean = 8 / row.dimension(side)
        told = row.above_chance(row.pairs[0, 1], side)[RANKS.index(8), RANKS.index(8)]
        assert told == pytest.approx((math.cos(angle) ** 2 - mean) / (1 - mean), abs=1e-10)


def test_nothing_is_held_better_than_by_its_own_directions() -> None:
    for update in ("a_in_b", "b_in_a"):
        held = build_report(two()[0]).pairs[0].captured[update]
        known = np.isfinite(held.both) & np.isfinite(held.optimum)
        assert np.all(held.both[known] <= held.optimum[known] + 1e-12)
        assert np.all(held.both[known] <= np.minimum(held.left, held.right)[known] + 1e-12)
    perfect = build_report(two(0.0)[0]).pairs[0].captured["a_in_b"]
    assert perfect.share == pytest.approx(perfect.best, rel=1e-10), "an adapter that found the leading 8 exactly"


def test_an_adapter_holds_no_more_past_its_rank() -> None:
    held = build_report(two()[0]).pairs[0].captured["a_in_b"]
    past = held.both[RANKS.index(8) :]
    assert np.all(np.isfinite(past))
    assert np.ptp(past) == pytest.approx(0.0, abs=1e-12)
    assert held.limit == 8


def test_an_odd_rank_is_told_at_that_rank() -> None:
    rng = np.random.default_rng(3)
    full = dense((96, 96), rng)
    u, s, vh = np.linalg.svd(full)
    held = record("w", 0, "q", np.eye(96), [Update(full), Update(found(full, rng, angle=0.1), "factors")])
    five = u[:, :5] * s[:5] @ vh[:5]
    for kind in ("left", "right", "both"):
        held["pairs"][0]["capture"]["a_in_b"]["held"] |= {"rank": 5, kind: 0.4}
    held["updates"][1] |= {"rank_limit": 5, "held": 5, "values": list(s[:5]), "frobenius": float(np.linalg.norm(five))}
    told = build_report(geometry_of(held)).pairs[0].captured["a_in_b"]
    assert told.ranks == (5, 5)
    assert told.share == 0.4
    assert told.best == pytest.approx(np.sum(s[:5] ** 2) / np.sum(s**2), rel=1e-10)


def test_a_small_head_does_not_set_the_rank_of_all() -> None:
    rng = np.random.default_rng(0)
    head = record("head", None, "head", rng.standard_normal((2, 96)),
                  [Update(rng.standard_normal((2, 96))), Update(rng.standard_normal((2, 96)))])  # fmt: skip
    pair = build_report(geometry_of(*two()[0].records, head)).pairs[0]
    assert pair.rank == 8
    assert pair.matrices == 4
    assert pair.counted == 3


def test_chance_stands_beside_random_updates() -> None:
    """Two random updates of one shape: shared directions above chance and cosines average to nothing."""
    rng = np.random.default_rng(5)
    rows = [
        record(f"w{i}", i, "q", np.eye(48, 64), [Update(rng.standard_normal((48, 64))) for _ in range(2)])
        for i in range(40)
    ]
    data = build_report(geometry_of(*rows))
    found = [pair_numbers(row, data.pairs[0]) for row in data.rows]
    for key in ("shared_left", "shared_right", "deviations"):
        values = np.array([numbers[key] for numbers in found])
        # Mean within four of its own standard errors of zero.
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values)), key
    assert abs(data.pairs[0].deviations) < 4
    assert data.pairs[0].captured["a_in_b"].ranks == (48, 48)


def test_several_updates_make_every_pair_in_order() -> None:
    data = build_report(planted_geometry(updates=4))
    assert [(p.a, p.b) for p in data.pairs] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert data.pairs[0].agreement > data.pairs[1].agreement > data.pairs[2].agreement
    assert set(data.maps) == set(data.by_role) == {(p.a, p.b) for p in data.pairs}


def test_an_update_that_leaves_matrices_alone() -> None:
    geometry = planted_geometry(updates=3)
    first = geometry.records[0]
    rows = ({**first, "updates": [*first["updates"][:2], {"kind": "none"}], "pairs": first["pairs"][:1]},)
    data = build_report(geometry_of(*rows, *geometry.records[1:], labels=geometry.labels))
    assert [p.matrices for p in data.pairs] == [9, 8, 8]
    assert kinds(data)["in_part"] == "note"


def test_groups_and_maps_hold_every_compared_matrix_once() -> None:
    data = build_report(planted_geometry())
    compared = sum(r.analysed for r in data.rows)
    for lines in (data.by_role[0, 1], data.by_layer[0, 1]):
        assert sum(pair.matrices for _, pair in lines) == compared
    assert [label for label, _ in data.by_layer[0, 1]] == ["0", "1", "2"]
    for heat_map in data.maps[0, 1]:
        assert sum(cell is not None for line in heat_map.cells for cell in line) == compared


def test_flags_for_what_can_go_wrong() -> None:
    rows = list(planted_geometry().records)
    one = json.loads(json.dumps(rows[0]))
    one["name"] = "drowned"
    one["updates"][0] |= {
        "storage_floor": 1e3,
        "storage_frobenius": 0.9 * one["updates"][0]["frobenius"],
        "resolved": 0,
    }
    big = json.loads(json.dumps(rows[2]))
    big |= {"name": "big", "base_frobenius": 1e-3}
    odd = [
        {**rows[1], "name": s, "status": s}
        for s in ("failed", "unsupported_dtype", "base_only", "tuned_only", "shape_mismatch")
    ]
    data = build_report(geometry_of(*rows, one, big, *odd, notes=["lora names other/base as its base"]))
    assert kinds(data) == dict.fromkeys(
        ["nonfinite", "failed", "unsupported_dtype", "drowned", "mostly_rounding", "unresolved", "inputs",
         "shape_mismatch"], "alarm"
    ) | dict.fromkeys(["one_sided", "base_only", "tuned_only", "adapters"], "note")  # fmt: skip
    assert data.failed
    assert [f.level for f in data.flags] == sorted((f.level for f in data.flags), key=lambda level: level != "alarm")
    assert "Lora names other/base as its base." in [f.text for f in data.flags]


def test_one_update_that_failed_is_told_by_name_and_fails_the_report() -> None:
    """Its matrix is compared for the others, and it is not said to leave that matrix as it is."""
    geometry = planted_geometry(updates=3)
    first, *others = [r for r in geometry.records if r["status"] == "ok"]
    for status, said in (("nonfinite", "NaN or infinite"), ("shape_mismatch", "not in shape")):
        lost = {"kind": "none", "status": status, "reason": "full: 1 NaN"}
        rows = ({**first, "updates": [lost, *first["updates"][1:]], "pairs": first["pairs"][2:]},)
        data = build_report(geometry_of(*rows, *others[:3], labels=geometry.labels))
        assert [p.matrices for p in data.pairs] == [3, 3, 4]
        flag = next(flag for flag in data.flags if flag.kind == status)
        assert flag.level == "alarm"
        assert flag.text.startswith("full has 1 tensor")
        assert said in flag.text
        assert flag.positions == (0,)
        assert "in_part" not in kinds(data)
        assert data.failed == (status == "nonfinite")


def test_updates_of_the_same_files_or_of_no_change_are_named() -> None:
    geometry = planted_geometry(updates=3)
    geometry.info["updates"][2]["digests"] = geometry.info["updates"][0]["digests"]
    rows = [r for r in geometry.records if r["status"] == "ok"]
    still = [
        r | {"updates": [r["updates"][0], {"kind": "none"}, r["updates"][2]], "pairs": r["pairs"][1:2]} for r in rows
    ]
    told = {
        flag.kind: flag.text
        for flag in build_report(geometry_of(*still, labels=geometry.labels, updates=geometry.info["updates"])).flags
    }
    assert told["same_files"] == "full and lora-seed-1 are the same files, by their digests."
    assert told["nothing_moved"] == "lora leaves every matrix as it is: was it trained?"


def test_a_matrix_of_two_rows_has_two_directions_to_match() -> None:
    rng = np.random.default_rng(0)
    small, large = (
        record(name, None, "q", rng.standard_normal(shape), [Update(rng.standard_normal(shape)) for _ in range(2)])
        for name, shape in (("types", (2, 96)), ("w", (96, 96)))
    )
    data = build_report(geometry_of(small, large))
    assert [u.directions for u in data.updates] == [12, 12]
    assert data.rows[0].leading == 2
    assert data.rows[0].chance_intruders(1.0) == 2.0
    assert all(u.intruders[-1] <= 6.0 for u in data.updates), "a mean of two matrices, of two and of ten"
    assert "of 12 in" in data.verdict[3]


def test_an_update_of_another_base_is_suspected() -> None:
    geometry, _ = two(size=60.0)
    flag = next(f for f in build_report(geometry).flags if f.kind == "large")
    assert flag.text.startswith("lora is ")
    assert "is this its base?" in flag.text
    assert len(flag.positions) == 3
    assert "large" not in kinds(build_report(two()[0]))


def test_adapters_that_share_their_start_are_told_apart() -> None:
    """One A kept by two adapters, on the input side alone; and two that share both sides, which is no such thing."""
    rng = np.random.default_rng(0)
    start, base = orthonormal(96, 8, rng), rng.standard_normal((96, 96)) / 10

    def flags(*lefts: np.ndarray) -> dict[str, str]:
        both = [Update(left * np.arange(9.0, 1.0, -1) @ start.T, "factors") for left in lefts]
        return kinds(build_report(geometry_of(record("w", 0, "q", base, both), labels=("one", "two"))))

    left = orthonormal(96, 8, rng)
    assert flags(left, orthonormal(96, 8, rng))["same_start"] == "note"
    assert "same_start" not in flags(left, left)


def test_a_clean_pair_has_no_alarm_and_does_not_fail() -> None:
    data = build_report(two()[0])
    assert not data.failed
    assert set(kinds(data)) == {"adapters"}


def test_summary_and_manifest_are_strict_json() -> None:
    data = build_report(planted_geometry(updates=3))
    told = json.loads(dump(summary(data)), parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert told["verdict"] == list(data.verdict)
    assert [pair["a"] for pair in told["pairs"]] == ["full", "full", "lora"]
    assert told["pairs"][0]["a_in_b"]["share"] == pytest.approx(data.pairs[0].captured["a_in_b"].share)
    assert told["ranks"] == list(RANKS)
    assert len(told["tensors"]) == len(data.rows)
    kept = json.loads(dump(manifest(data)))
    assert kept["updates"][1]["digests"][0]["sha256"] == f"{1:064x}"
    more = "--base models/minilm-base --also runs/lora-seed-1 --rank 64 --seed 0"
    assert kept["command"] == f"python -m spectra.report runs/full runs/lora {more}"


def test_unknown_fields_read_as_unknown() -> None:
    rows = read_records([{"name": "w", "status": "ok", "rows": 4, "cols": 4, "updates": [{"kind": "dense"}] * 2,
                          "pairs": [{"a": 0, "b": 1}]}])  # fmt: skip
    pair = rows[0].pairs[0, 1]
    assert math.isnan(pair.cosine)
    assert np.isnan(pair.left.overlap).all()
    assert rows[0].updates[0].cosines == ()
    assert math.isnan(rows[0].updates[0].intruders(0.5))


@pytest.mark.parametrize(("limit", "rank"), [(0.5, 0), (1, 1), (5, 4), (7.9, 6), (64, 64), (1000, 64)])
def test_ranks_within_a_limit(limit: float, rank: int) -> None:
    assert rank_within(limit) == rank
