"""The folder of an adapter is whole or no adapter, and nothing else's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectra.errors import CheckpointError, UsageError
from spectra.extract import extract
from spectra.extract.adapter_folder import CARD, CONFIG, RECORD, TENSORS
from tests.extract.tuned import save_tensors, update

FILES = {CONFIG, TENSORS, CARD, RECORD}


@pytest.fixture
def again(tmp_path: Path) -> Callable[[int], Path]:
    """Extract one matrix at a rank into one folder."""
    base = save_tensors(tmp_path / "base", {"q.weight": torch.zeros(12, 9)})
    tuned = save_tensors(tmp_path / "tuned", {"q.weight": update(12, 9, seed=0)})
    return lambda rank: extract(base, tuned, out=tmp_path / "out", rank=rank).out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_earlier_extraction_is_replaced(again: Callable[[int], Path]) -> None:
    first = contents(again(1))
    second = contents(again(2))
    assert set(first) == set(second) == FILES
    assert first != second
    assert contents(again(1)) == first


@pytest.mark.parametrize("stranger", ["notes.txt", "model.safetensors", ".git"])
def test_a_folder_with_anything_else_is_refused(again: Callable[[int], Path], stranger: str, tmp_path: Path) -> None:
    out = again(1)
    (out / stranger).write_text("mine")
    before = contents(out)
    with pytest.raises(UsageError, match=stranger.replace(".", r"\.")):
        again(2)
    assert contents(out) == before


def test_anothers_adapter_is_refused(again: Callable[[int], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CONFIG).write_text("{}")
    with pytest.raises(UsageError, match="no extraction wrote"):
        again(1)


def test_a_file_is_refused(again: Callable[[int], Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        again(1)


@pytest.mark.parametrize("fails", range(4))
def test_an_interrupted_write_leaves_nothing_half(
    again: Callable[[int], Path], fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file cannot be put in its place: no configuration, so no adapter; the next run goes through."""
    want = contents(again(2))
    out = again(1)
    replace, calls = Path.replace, iter(range(100))

    def broken(self: Path, target: Path) -> Path:
        if next(calls) == fails:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(CheckpointError, match="No space left"):
        again(2)
    monkeypatch.undo()
    assert CONFIG not in contents(out)
    assert set(contents(out)) <= FILES
    assert contents(again(2)) == want


def test_a_full_disk_keeps_the_earlier_adapter(
    again: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(again(1))

    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spectra.extract.adapter_folder.save_file", full)
    with pytest.raises(CheckpointError):
        again(2)
    assert contents(tmp_path / "out") == before


def test_what_a_killed_run_left_is_cleared(again: Callable[[int], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{TENSORS}.part").write_text("half")
    assert set(contents(again(1))) == FILES


def test_files_are_readable_by_all_alike(again: Callable[[int], Path]) -> None:
    assert len({path.stat().st_mode for path in again(1).iterdir()}) == 1
