"""Replays against a plain loop over the rule, rank maps on paper and in files, and agreement against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save_file
from scipy.stats import spearmanr

import spectra
from spectra.errors import CheckpointNotFound, MismatchError, UnsafeCheckpoint, UsageError
from spectra.importance import (
    SCORES,
    RankMap,
    Recorded,
    Stretches,
    agreement,
    budget,
    read_recorded,
    replay,
    svd_rank_map,
)
from spectra.importance.__main__ import main
from spectra.importance.journal import ImportanceJournal
from spectra.importance.recorded import Layout, Tracked

NAMES = ["encoder.layer.0.query", "encoder.layer.0.value", "encoder.layer.11.query", "pooler"]
COUNTS = [3, 4, 2, 3]
SHAPES = [(8, 6), (8, 6), (8, 6), (10, 8)]
TOTAL = 24


def a_layout(**info: Any) -> Layout:
    told = {"method": "LoRA", "total": TOTAL, "every": 1, "beta1": 0.85, "beta2": 0.85, **info}
    matrices = [Tracked(n, c, s) for n, c, s in zip(NAMES, COUNTS, SHAPES, strict=True)]
    return Layout((*matrices, Tracked("head.weight", None, (2, 8))), told)


def recorded(steps: list[int] | None = None, seed: int = 0, **info: Any) -> Recorded:
    """Random scores, and no λ."""
    layout = a_layout(**info)
    numbers = np.array(steps or range(1, TOTAL + 1), dtype=np.int64)
    rng = np.random.default_rng(seed)
    values = rng.random((len(numbers), layout.rows, len(SCORES))).astype(np.float32)
    values[:, :, list(SCORES).index("value")] = np.nan
    return Recorded(layout, numbers, np.ones(len(numbers)), values)


def by_the_rule(
    record: Recorded, score: str, kept: int, schedule: Stretches, shape: str = "cubic"
) -> dict[int, list[set[int]]]:
    """What is kept after every step, by sorting: the rule as its docstring tells it."""
    table = {int(n): row for n, row in zip(record.steps, record.values[:, :, list(SCORES).index(score)], strict=True)}
    ends = np.cumsum(COUNTS)
    chosen, settled, history = set(range(ends[-1])), False, {}
    for t in range(TOTAL):
        last = t >= TOTAL - schedule.final
        if not settled and (last or (t > schedule.warmup and t % schedule.interval == 0)):
            moments = [n for n in table if n <= t + 1]
            if last and len(moments) > 1 and moments[-1] == t + 1:
                moments.pop()
            if moments:
                scores = table[moments[-1]][: ends[-1]]
                now = budget(
                    t,
                    total=TOTAL,
                    warmup=schedule.warmup,
                    final=schedule.final,
                    start=int(ends[-1]),
                    end=kept,
                    shape=shape,
                )
                chosen = set(sorted(range(ends[-1]), key=lambda i: (-scores[i], i))[:now])
                settled = last
        history[t + 1] = [
            {i - int(end) + count for i in chosen if end - count <= i < end}
            for end, count in zip(ends, COUNTS, strict=True)
        ]
    return history


@pytest.mark.parametrize("shape", ["cubic", "linear", "step", "none"])
@pytest.mark.parametrize("schedule", [Stretches(3, 8, 1), Stretches(0, 1, 1), Stretches(5, 10, 4), Stretches(2, 21, 3)])
@pytest.mark.parametrize("steps", [None, list(range(3, TOTAL + 1, 3)), [2, 7, 9, 23, 24], [1, 2, 4, 5, 13, 14, 15, 24]])
def test_a_replay_keeps_what_the_rule_keeps(shape: str, schedule: Stretches, steps: list[int] | None) -> None:
    record = recorded(steps)
    for score in ("adalora", "norm"):
        found = replay(record, score=score, kept=5, schedule=schedule, shape=shape)
        wanted = by_the_rule(record, score, 5, schedule, shape)
        for number, row in zip(found.steps, found.ranks, strict=True):
            assert row.tolist() == [len(kept) for kept in wanted[int(number)]], number
        assert found.kept is not None
        assert [set(np.flatnonzero(mask)) for mask in found.kept] == wanted[int(found.steps[-1])]
    assert found.total == (12 if shape == "none" else 5)


def test_a_training_that_was_cut_short_is_replayed_as_far_as_it_went() -> None:
    found = replay(recorded(list(range(1, 8))), kept=5, schedule=Stretches(3, 8, 1))
    assert found.total == budget(6, total=TOTAL, warmup=3, final=8, start=12, end=5)
    assert "up to its step 7 of 24" in found.words


def test_the_schedule_is_the_trainings_own_where_it_had_one() -> None:
    own = replay(recorded(warmup=4, final=6, interval=2), kept=5)
    assert {key: own.rule[key] for key in ("warmup", "final", "interval")} == {"warmup": 4, "final": 6, "interval": 2}
    usual = replay(recorded(), kept=5)
    assert {key: usual.rule[key] for key in ("warmup", "final", "interval")} == {
        "warmup": 2,
        "final": 12,
        "interval": 1,
    }
    assert "on the trajectory of this training (LoRA); the training itself went on under its own rule" in usual.words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kept": 0}, "budget of 0 directions: the training has 12"),
        ({"kept": 13}, "budget of 13"),
        ({"kept": 5, "score": "value"}, r"no λ; there are adalora, .*magnitude, norm"),
        ({"kept": 5, "score": "taylor"}, "taylor"),
        ({"kept": 5, "shape": "cosine"}, "cosine"),
        ({"kept": 5, "schedule": Stretches(12, 12, 1)}, "leave none"),
        ({"kept": 5, "schedule": Stretches(2, 4, 0)}, "interval of 0"),
    ],
)
def test_a_replay_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replay(recorded(), **fields)


def test_a_training_without_directions_has_nothing_to_rank() -> None:
    layout = Layout((Tracked("head.weight", None, (2, 8)),), {"method": "full fine-tuning", "total": 4})
    whole = Recorded(layout, np.arange(1, 5), np.ones(4), np.zeros((4, 1, len(SCORES)), np.float32))
    with pytest.raises(UsageError, match="full fine-tuning has no directions"):
        replay(whole, kept=1)
    assert whole.of("norm")["head.weight"].shape == (4, 1)


# --- rank maps ------------------------------------------------------------------------------------------------------


def a_map(*ranks: int, names: list[str] = NAMES) -> RankMap:
    return RankMap.of(dict(zip(names, ranks, strict=True)), shapes=dict(zip(names, SHAPES, strict=False)))


def test_a_map_says_what_an_adapters_configuration_takes() -> None:
    found = a_map(3, 0, 2, 1)
    assert found.rank_pattern == {NAMES[0]: 3, NAMES[2]: 2, NAMES[3]: 1}
    assert found.dropped == (NAMES[1],)
    assert found.parameters == 3 * 14 + 2 * 14 + 18
    # PEFT takes the first pattern that fits a name's end: the name within the other must not come first.
    nested = a_map(1, 2, names=["query", "layer.query"])
    assert list(nested.rank_pattern) == ["layer.query", "query"]


def test_the_table_has_layers_in_rows_and_roles_in_columns() -> None:
    table = a_map(3, 0, 2, 1).table
    assert table.loc["0", "query"] == 3
    assert table.loc["0", "value"] == 0
    assert table.loc["11", "query"] == 2
    assert math.isnan(table.loc["11", "value"])
    assert table.loc["", "pooler"] == 1


def test_a_map_is_drawn_with_its_ranks_in_the_cells() -> None:
    axes = a_map(3, 0, 2, 1).plot(Figure().subplots())
    assert sorted(text.get_text() for text in axes.texts) == ["0", "1", "2", "3"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["query", "value", "pooler"]
    assert a_map(3, 0, 2, 1).plot().figure is not None


def test_a_map_is_read_back_as_it_was(tmp_path: Path) -> None:
    found = replay(recorded(), kept=5)
    again = RankMap.from_json(found.save(tmp_path / "maps" / "ranks.json"))
    assert again.final == found.final
    assert (again.modules, again.shapes, again.rule, again.words) == (
        found.modules,
        found.shapes,
        found.rule,
        found.words,
    )
    assert again.kept is not None
    assert found.kept is not None
    assert all(np.array_equal(a, b) for a, b in zip(again.kept, found.kept, strict=True))
    told = json.loads((tmp_path / "maps" / "ranks.json").read_text())
    assert told["rank_pattern"] == found.rank_pattern
    assert told["exclude_modules"] == list(found.dropped)
    frame = pd.read_parquet(found.save(tmp_path / "ranks.parquet"))
    assert frame.step.nunique() == TOTAL
    last = frame[frame.step == TOTAL]
    assert dict(zip(last.module, last["rank"], strict=True)) == found.final
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps", "ranks.parquet"]


def test_a_file_that_is_no_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"nothing\.json"):
        RankMap.from_json(tmp_path / "nothing.json")
    for text in ("{", "[]", '{"kind": "rank map"}', '{"kind": "else"}', '{"kind": "rank map", "shapes": 3}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UnsafeCheckpoint, match="no rank map"):
            RankMap.from_json(tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"ranks\.csv"):
        a_map(3, 0, 2, 1).save(tmp_path / "ranks.csv")
    with pytest.raises(UsageError, match="a column a matrix"):
        RankMap(("a",), np.zeros((1, 2), np.int64), ((1, 1),), np.zeros(1, np.int64))


# --- agreement ------------------------------------------------------------------------------------------------------


def test_agreement_of_a_map_with_itself_and_with_a_multiple() -> None:
    found = agreement(a_map(3, 0, 2, 1), a_map(6, 0, 4, 2))
    assert found.spearman == pytest.approx(1.0)
    assert found.overlap == pytest.approx(1.0)
    # Equal ranks put a quarter into each: 1/4 + 0 + 1/4 + 1/6.
    assert found.uniform_overlaps == pytest.approx((2 / 3, 2 / 3))
    assert found.common_directions is None


def test_agreement_of_opposite_maps() -> None:
    found = agreement(a_map(4, 0, 0, 0), a_map(0, 1, 2, 3))
    assert found.overlap == 0.0
    assert found.spearman < -0.7
    assert math.isnan(agreement(a_map(2, 2, 2, 2), a_map(0, 1, 2, 3)).spearman)


def test_spearman_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, size=(2, 4))
        a[0], b[0] = 5, 5  # neither is constant or empty
        found = agreement(a_map(*a), a_map(*b)).spearman
        assert found == pytest.approx(spearmanr(a, b).statistic)


def test_common_directions_against_chance() -> None:
    record = recorded()
    first, second = replay(record, kept=5), replay(record, kept=8, score="norm")
    found = agreement(first, second)
    assert first.kept is not None
    assert second.kept is not None
    common = sum(int((a & b).sum()) for a, b in zip(first.kept, second.kept, strict=True))
    assert found.common_directions == pytest.approx(common / 5)
    assert found.chance_common == pytest.approx(8 / 12)
    same = agreement(first, first)
    assert (same.common_directions, same.overlap) == (1.0, pytest.approx(1.0))
    assert "Spearman +1.000; 100.0% of the budget" in str(same)
    assert "common (at random 41.7%)" in str(same)


def test_directions_drawn_at_random_reach_chance() -> None:
    """The mean of 400 draws, whose standard error is about 0.01."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(400):
        maps = []
        for kept in (5, 8):
            mask = np.zeros(12, dtype=bool)
            mask[rng.choice(12, size=kept, replace=False)] = True
            parts = np.split(mask, np.cumsum(COUNTS)[:-1])
            ranks = np.array([[part.sum() for part in parts]])
            maps.append(RankMap(tuple(NAMES), ranks, tuple(SHAPES), np.zeros(1, np.int64), tuple(parts)))
        found = agreement(*maps)
        shares.append(found.common_directions)
    assert found.chance_common is not None
    assert np.mean(np.array(shares, dtype=float)) == pytest.approx(found.chance_common, abs=0.04)


def test_maps_without_a_matrix_in_common_or_without_ranks_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"encoder\.layer\.0\.query … here, a … there"):
        agreement(a_map(3, 0, 2, 1), RankMap.of({"a": 1}))
    with pytest.raises(MismatchError, match="second map keeps nothing"):
        agreement(a_map(3, 0, 2, 1), a_map(0, 0, 0, 0))
    with pytest.raises(UsageError, match="rows"):
        svd_rank_map({"a": [1.0]}, 1, shapes={"a": (2, 2)}, by="rows")


def test_the_svds_map_keeps_the_largest_values_of_all() -> None:
    rng = np.random.default_rng(2)
    squares = {name: np.sort(rng.random(6))[::-1] ** 2 for name in NAMES}
    shapes = dict(zip(NAMES, SHAPES, strict=True))
    found = svd_rank_map(squares, 9, shapes=shapes)
    everything = sorted(((value, name) for name, values in squares.items() for value in values), reverse=True)[:9]
    assert found.final == {name: sum(1 for _, owner in everything if owner == name) for name in NAMES}
    assert "9 directions" in found.words
    dear = svd_rank_map(squares, 100, shapes=shapes, by="parameters")
    assert dear.parameters <= 100 < dear.parameters + 14


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A folder as a training leaves it."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    record = recorded()
    journal = ImportanceJournal(folder, record.layout)
    for number, values in zip(record.steps, record.values, strict=True):
        journal.append(int(number), 1.0, values)
    journal.close(finished=True)
    return folder


def test_the_command_prints_the_map_and_writes_it(
    training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"ranks.{ending}" for ending in ("json", "parquet", "svg")]
    outs = [word for file in files for word in ("--out", str(file))]
    assert main([str(training), "--rank", "1.25", "--schedule", "linear", *outs]) == 0
    wanted = replay(read_recorded(training), kept=5, shape="linear")
    said = capsys.readouterr().out
    assert "5 directions in 4 matrices" in said
    assert wanted.words in said
    assert RankMap.from_json(files[0]).final == wanted.final
    assert all(file.stat().st_size for file in files)
    assert main([str(training), "--rank", "1.25", "--warmup", "0.25", "--final", "0.25", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {key: told["rule"][key] for key in ("warmup", "final", "score")} == {
        "warmup": 6,
        "final": 6,
        "score": "adalora",
    }


def test_the_command_compares_maps(training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ranks.json"
    assert main([str(training), "--rank", "1", "--score", "norm", "--out", str(file)]) == 0
    capsys.readouterr()
    assert main([str(training), "--rank", "1", "--against", str(file), "--against", str(training)]) == 0
    record = read_recorded(training)
    wanted = agreement(replay(record, kept=4), replay(record, kept=4, score="norm"))
    said = capsys.readouterr().out
    assert f"against {file}, {wanted}" in said
    assert f"against {training}, over 4 matrices: Spearman +1.000" in said


def a_report(folder: Path, prefix: str = "") -> Path:
    """The comparison of a model with itself plus planted singular values: 9, 8, 7, … in turn over the matrices."""
    rng = np.random.default_rng(3)
    base, tuned, folder = {}, {}, folder / "models"
    for i, (name, (rows, cols)) in enumerate(zip(NAMES, SHAPES, strict=True)):
        left, right = (np.linalg.qr(rng.standard_normal((size, 5)))[0] for size in (rows, cols))
        weight = rng.standard_normal((rows, cols)).astype(np.float32)
        values = 9.0 - (i + 4 * np.arange(5)) / 2.2
        base[f"{prefix}{name}.weight"] = weight
        tuned[f"{prefix}{name}.weight"] = (weight + (left * values) @ right.T).astype(np.float32)
    for side, tensors in (("base", base), ("tuned", tuned)):
        (folder / side).mkdir(parents=True)
        save_file(tensors, folder / side / "model.safetensors")
    spectra.compare(folder / "base", folder / "tuned", jobs=1).save(folder / "report")
    return folder / "report"


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_the_command_compares_with_the_singular_values_of_a_report(
    prefix: str, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = a_report(tmp_path, prefix)
    assert main([str(training), "--rank", "1.5", "--against", str(report)]) == 0
    # Six of the planted values, in turn: two of the first two matrices, one of the others.
    hindsight = a_map(2, 2, 1, 1)
    wanted = agreement(replay(read_recorded(training), kept=6), hindsight)
    assert f"against {report}, {wanted}" in capsys.readouterr().out


def test_a_report_that_holds_too_few_values_is_told(
    training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = spectra.Run.load(a_report(tmp_path))
    records = [{**r, "singular_values": r["singular_values"][:1], "gap": 20.0} for r in whole.records]
    report = spectra.Run(tuple(records), whole.info).save(tmp_path / "truncated")
    assert main([str(training), "--rank", "1.5", "--against", str(report)]) == 0
    assert "first 1 singular values of encoder.layer.0.query and 3 more" in capsys.readouterr().err


def test_a_report_on_other_matrices_is_refused(
    training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = a_report(tmp_path, "other_")
    assert main([str(training), "--rank", "1.5", "--against", str(report)]) == 3
    assert "holds no spectrum of encoder.layer.0.query" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{training}"], 2, "LoRA has no budget of its own: give --rank"),
        (["{training}", "--rank", "1", "--score", "value"], 2, "no λ"),
        (["{training}", "--rank", "9"], 2, "budget of 36 directions"),
        (["{training}", "--rank", "1", "--out", "ranks.csv"], 2, "ranks.csv"),
        (["{training}", "--rank", "1", "--json", "a"], 2, "--out FILE.json"),
        (["{training}", "--rank", "1", "--warmup", "0.7", "--final", "0.7"], 2, "warmup = 0.7"),
        (["{training}", "--rank", "1", "--against", "{empty}"], 2, "no run is saved there"),
        (["{empty}", "--rank", "1"], 2, "--record-importance records it"),
    ],
)
def test_what_the_command_cannot_do_is_told(
    words: list[str], code: int, said: str, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([word.format(training=training, empty=empty) for word in words]) == code
    assert said in capsys.readouterr().err
