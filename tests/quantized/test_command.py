"""The command: its files, its exit codes, what it prints where, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from spectra.__main__ import VERBS
from spectra.__main__ import main as spectra
from spectra.quantized import QuantizedRun
from spectra.quantized.command import main
from tests.quantized.conftest import noise, saved


def test_files_and_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([model, "--formats", "nf4,int8", "--ranks", "4,16", "--out", str(out), "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((out / "quantized.json").read_text())
    assert "all matrices together" in said.err
    result = QuantizedRun.load(out)
    assert result.ranks == (4, 16)
    for name in ("quantized.html", "figures/ladder.svg"):
        assert (out / name).stat().st_size > 0
        assert str(out / name) in said.err
    assert main([model, "--formats", "nf4,int8", "--ranks", "4,16", "--out", str(out), "-q"]) == 0
    assert capsys.readouterr().out.startswith(result.sentences[0][1])
    assert main([model, "--formats", "nf4", "--out", str(out), "-q"]) == 2, "another run's folder"
    assert "begun with other inputs or flags" in capsys.readouterr().err


def test_dry_run_writes_nothing(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "--formats", "nf4,int4/row", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "3 matrices of 69,632 weights, each in nf4, int4/row" in told
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_fails_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = noise(64, 64, 0)
    bad[0, 0] = math.inf
    ref = saved(tmp_path / "m", {"bad.weight": bad})
    assert main([ref, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "No matrix could be quantized" in said.out
    assert "error: some matrices could not be quantized" in said.err
    assert (tmp_path / "out" / "quantized.html").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--formats", "nf5"], 2, "unknown format 'nf5'"),
        (["--formats", ","], 2, "no scheme is given"),
        (["--ranks", "8,x"], 2, "positive whole numbers"),
        (["--tuned", "a", "--base", "b"], 2, "give one of them"),
        (["--json", "file"], 2, "--json takes only -"),
        (["--json", "-", "--dry-run"], 2, "no result for --json"),
        (["--calibration", "nowhere.safetensors"], 2, "nowhere.safetensors is no file"),
        (["--tuned", "nowhere/"], 2, "does not exist"),
        (["--include", "("], 2, "no regular expression"),
    ],
)
def test_refused(flags: list[str], code: int, words: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "--dry-run", *flags] if "--json" not in flags else [model, *flags]) == code
    assert words in capsys.readouterr().err


def test_another_architecture_ends_with_three(model: str, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", {"conv.weight": noise(8, 8, 0)})
    assert main([model, "--tuned", other, "--dry-run"]) == 3


def test_it_is_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "quantize" in VERBS
    assert spectra(["quantize", "--help"]) == 0
    told = capsys.readouterr().out
    assert "int8/row/fp32" in told
    assert "Formats" in told
