"""The journal and the Parquet file of recorded importance: round trips, torn ends, and files of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spectra.errors import CheckpointNotFound, MismatchError, UnsafeCheckpoint, UsageError
from spectra.importance import SCORES, read_recorded
from spectra.importance.journal import JOURNAL, ImportanceJournal, read_journal
from spectra.importance.recorded import NAME, Layout, Tracked

LAYOUT = Layout(
    (Tracked("layer.0.query", 2, (4, 3)), Tracked("head.weight", None, (2, 4)), Tracked("layer.1.query", 3, (4, 3))),
    {"method": "LoRA", "total": 9, "every": 1, "beta1": 0.85, "beta2": 0.85},
)


def scores(step: int) -> np.ndarray:
    return np.random.default_rng(step).random((LAYOUT.rows, len(SCORES))).astype(np.float32)


def written(folder: Path, steps: range, *, finished: bool = True) -> Path:
    journal = ImportanceJournal(folder, LAYOUT)
    for step in steps:
        journal.append(step, 1.0 / step, scores(step))
    if finished:
        journal.close(finished=True)
    return folder


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    found = read_recorded(written(tmp_path, range(1, 10)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]
    assert found.layout == LAYOUT
    assert found.steps.tolist() == list(range(1, 10))
    assert found.clip.tolist() == [1.0 / step for step in range(1, 10)]
    assert np.array_equal(found.values, np.stack([scores(step) for step in range(1, 10)]))
    assert [entry.name for entry in found.matrices] == ["layer.0.query", "layer.1.query"]
    for i, name in enumerate(SCORES):
        by_name = found.of(name)
        assert np.array_equal(by_name["layer.0.query"], found.values[:, :2, i])
        assert np.array_equal(by_name["head.weight"], found.values[:, 2:3, i])
        assert np.array_equal(by_name["layer.1.query"], found.values[:, 3:, i])
    with pytest.raises(UsageError, match="taylor"):
        found.of("taylor")


def test_the_file_is_a_table_that_anything_reads(tmp_path: Path) -> None:
    frame = pd.read_parquet(written(tmp_path, range(1, 4)) / NAME)
    assert list(frame) == ["step", "module", "direction", "clip", *SCORES]
    own = read_recorded(tmp_path).frame
    assert own.module.tolist() == frame.module.astype(str).tolist()
    row = frame[(frame.step == 2) & (frame.module == "layer.1.query") & (frame.direction == 1)]
    assert row[list(SCORES)].to_numpy().tolist() == [scores(2)[4].tolist()]
    assert frame[frame.module == "head.weight"].direction.isna().all()
    assert own.direction.isna().tolist() == frame.direction.isna().tolist()
    assert np.array_equal(own[list(SCORES)].to_numpy(), frame[list(SCORES)].to_numpy())


def test_the_same_steps_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    assert (written(one, range(1, 10)) / NAME).read_bytes() == (written(two, range(1, 10)) / NAME).read_bytes()


def test_many_steps_are_written_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectra.importance.recorded._GROUP", 3 * LAYOUT.rows + 1)
    found = read_recorded(written(tmp_path, range(1, 9)))
    assert pq.ParquetFile(tmp_path / NAME).num_row_groups == 3
    assert np.array_equal(found.values, np.stack([scores(step) for step in range(1, 9)]))
    assert set(found.frame.module) == {entry.name for entry in LAYOUT.tracked}


@pytest.mark.parametrize("lost", [1, 7, 8 * LAYOUT.rows])
def test_a_killed_training_is_read_up_to_its_last_whole_step(tmp_path: Path, lost: int) -> None:
    written(tmp_path, range(1, 6), finished=False)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-lost])
    found = read_recorded(tmp_path)
    assert found.steps.tolist() == [1, 2, 3, 4]
    assert np.array_equal(found.values[-1], scores(4))


def test_a_resumed_training_takes_steps_again_and_ends_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    written(whole, range(1, 10))
    written(cut, range(1, 8), finished=False)
    with (cut / JOURNAL).open("ab") as stream:
        stream.write(b"half a record")
    journal = ImportanceJournal(cut, LAYOUT, after=4, written=4)
    for step in range(5, 10):
        journal.append(step, 1.0 / step, scores(step))
    journal.close(finished=True)
    assert (cut / NAME).read_bytes() == (whole / NAME).read_bytes()


def test_an_interrupted_training_leaves_both_files_and_the_journal_counts(tmp_path: Path) -> None:
    journal = ImportanceJournal(tmp_path, LAYOUT)
    journal.append(1, 1.0, scores(1))
    journal.close(finished=False)
    journal.close(finished=True)  # closed once
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL, NAME]
    later = ImportanceJournal(tmp_path, LAYOUT, after=1, written=1)
    later.append(2, 1.0, scores(2))
    assert read_recorded(tmp_path).steps.tolist() == [1, 2]
    assert read_recorded(tmp_path / NAME).steps.tolist() == [1]


def test_a_journal_that_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4), finished=False)
    with pytest.raises(MismatchError, match="holds 3 steps up to step 5, the checkpoint knows of 5"):
        ImportanceJournal(tmp_path, LAYOUT, after=5, written=5)
    other = Layout(LAYOUT.tracked, {**LAYOUT.info, "every": 3})
    with pytest.raises(MismatchError, match=r"6 rows every 1 of 9 steps.*6 rows every 3 of 9"):
        ImportanceJournal(tmp_path, other, after=3, written=1)
    (tmp_path / JOURNAL).unlink()
    with pytest.raises(MismatchError, match=r"gone.*--no-resume"):
        ImportanceJournal(tmp_path, LAYOUT, after=3, written=3)


def test_a_new_training_takes_nothing_of_an_old_one(tmp_path: Path) -> None:
    written(tmp_path, range(1, 10))
    ImportanceJournal(tmp_path, LAYOUT)
    assert read_recorded(tmp_path).steps.size == 0
    assert not (tmp_path / NAME).exists()


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="--record-importance records it"):
        read_recorded(tmp_path)
    path = tmp_path / NAME
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UnsafeCheckpoint, match="no record of importance"):
        read_recorded(path)
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(UnsafeCheckpoint, match="no record of importance"):
        read_recorded(path)
    written(tmp_path, range(1, 4))
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 5), path)
    with pytest.raises(UnsafeCheckpoint, match="5 rows are no whole steps of 6"):
        read_recorded(path)
    pq.write_table(table.replace_schema_metadata({b"spectra": b'{"kind": "importance", "scores": []}'}), path)
    with pytest.raises(UnsafeCheckpoint, match="other scores"):
        read_recorded(path)
    for text in (b"", b"no end of line", b"[]\n", b"{}\n"):
        (tmp_path / JOURNAL).write_bytes(text)
        with pytest.raises(UnsafeCheckpoint, match="importance"):
            read_journal(tmp_path / JOURNAL)
