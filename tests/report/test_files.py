"""Files: whole or absent, inside the folder only, and the same bytes every time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from spectra.errors import JournalError
from spectra.report import write_report
from spectra.report.files import write_atomically
from tests.report.planted import PlantedRun, row, run_of

EXPECTED = {
    "report.html", "spectra.parquet", "summary.json", "manifest.json", "figures/spectra.svg", "figures/truncation.svg",
    "figures/budgets.svg", "figures/relative_change.svg", "figures/effective_rank.svg",
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_is_what_is_said(run: PlantedRun, tmp_path: Path) -> None:
    written = write_report(run, tmp_path / "out")
    assert {str(p.relative_to(tmp_path / "out")) for p in written} == EXPECTED
    assert set(contents(tmp_path / "out")) == EXPECTED
    assert written[0].name == "report.html"
    for name in ("summary.json", "manifest.json"):
        json.loads((tmp_path / "out" / name).read_text())


def test_the_same_run_gives_the_same_bytes(run: PlantedRun, tmp_path: Path) -> None:
    write_report(run, tmp_path / "a")
    write_report(run, tmp_path / "b")
    write_report(run, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_report_without_a_matrix_is_still_a_report(tmp_path: Path) -> None:
    held = run_of(row("a", 0, "a", (3, 3), "unchanged", frobenius=0.0))
    assert {p.name for p in write_report(held, tmp_path)} == {
        "report.html",
        "spectra.parquet",
        "summary.json",
        "manifest.json",
    }
    assert "hold the same weights" in (tmp_path / "report.html").read_text()


def test_links_are_not_followed(run: PlantedRun, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (out / "report.html").symlink_to(elsewhere / "kept")
    (out / ".summary.json.part").symlink_to(elsewhere / "kept")
    write_report(run, out)
    assert (elsewhere / "kept").read_text() == "kept"
    assert not (out / "report.html").is_symlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "figures").symlink_to(elsewhere)
    with pytest.raises(JournalError, match="symbolic link"):
        write_report(run, other)
    assert [p.name for p in elsewhere.iterdir()] == ["kept"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_file_whole(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")

    def fail(handle: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_atomically(path, b"new")
    assert contents(tmp_path) == {"summary.json": b"old"}


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert write_atomically(tmp_path / "a", b"").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
