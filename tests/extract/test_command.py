"""The command: what it prints, what it ends with, what it leaves."""

from __future__ import annotations

import gc
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectra.__main__ import main as spectra
from spectra.extract.__main__ import CRITERIA, main
from spectra.extract.ranks import CRITERIA as KNOWN
from tests.extract.tuned import save_tensors, update


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    base = {"h.0.q.weight": torch.zeros(12, 9), "h.0.norm.weight": torch.ones(9)}
    tuned = {"h.0.q.weight": update(12, 9, seed=0), "h.0.norm.weight": torch.full((9,), 1.5)}
    return str(save_tensors(tmp_path / "base", base)), str(save_tensors(tmp_path / "tuned", tuned))


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "adapter")


def test_verdict_and_files(pair: tuple[str, str], out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, "--out", out, "--rank", "2"]) == 0
    told = capsys.readouterr()
    assert "1 of 1 matrices as factors of rank 2: 42 parameters, 51 with all that is stored" in told.out
    assert "keeps" in told.out
    assert all(str(path) in told.out for path in Path(out).iterdir())
    assert "error" not in told.err


def test_a_program_that_has_torch_keeps_its_garbage_collector(pair: tuple[str, str], out: str) -> None:
    """A process of the command's own takes its modules out of the collector's sight; any other is left as it is."""
    before = gc.get_freeze_count()
    assert main([*pair, "--out", out, "--rank", "2"]) == 0
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, before)
    told = (
        "import gc, sys; from spectra.extract.__main__ import main; main(sys.argv[1:]); "
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    words = [sys.executable, "-c", told, *pair, "--out", out, "--rank", "2"]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.endswith("True True\n")


def test_the_card_tells_the_command_that_made_it(pair: tuple[str, str], out: str, tmp_path: Path) -> None:
    """The command in the card, run again, leaves the same bytes."""
    words = [*pair, "--out", out, "--energy", "0.9", "--embeddings", "list", "--dtype", "bf16", "--exclude", "a b"]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in Path(out).iterdir()}
    card = before["README.md"].decode()
    line = next(line for line in card.splitlines() if line.startswith("python -m spectra.extract"))
    assert main(shlex.split(line)[3:]) == 0
    assert {path.name: path.read_bytes() for path in Path(out).iterdir()} == before
    assert card.startswith("---\nbase_model: ")
    assert "library_name: peft" in card


def test_json_is_all_that_stdout_holds(pair: tuple[str, str], out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, "--out", out, "--rank", "1", "--json", "-"]) == 0
    told = capsys.readouterr()
    record = json.loads(told.out)
    assert record == json.loads(Path(out, "extraction.json").read_text())
    assert "keeps" in told.err


def test_dry_run_writes_nothing(pair: tuple[str, str], out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, "--out", out, "--rank", "2", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "42 parameters in factors at most" in told
    assert "rank 2 everywhere" in told
    assert not Path(out).exists()


def test_dry_run_reads_no_tensor(pair: tuple[str, str], out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectra.checkpoints.checkpoint.Checkpoint.__getitem__", lambda *_: pytest.fail("read"))
    assert main([*pair, "--out", out, "--energy", "0.9", "--global", "--dry-run"]) == 0


def test_quiet(pair: tuple[str, str], out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, "--out", out, "--rank", "2", "-q"]) == 0
    assert "plan" not in capsys.readouterr().out


def test_not_finite_ends_with_one(
    pair: tuple[str, str], out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4)}
    tuned = {"a.weight": torch.full((4, 4), math.nan), "b.weight": torch.ones(4, 4)}
    sides = [str(save_tensors(tmp_path / name, side)) for name, side in (("x", base), ("y", tuned))]
    assert main([*sides, "--out", out, "--rank", "1"]) == 1
    assert "error: a.weight: 0 NaN or infinite entries in base, 16 in the difference" in capsys.readouterr().err
    assert Path(out, "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "give one of rank, energy, parameters and criterion"),
        (["--rank", "1", "--energy", "0.5"], 2, "not rank and energy"),
        (["--energy", "1.5"], 2, "at most 1"),
        (["--parameters", "3"], 2, "one direction of the cheapest matrix"),
        (["--criterion", "vibes"], 2, "signal, gavish-donoho"),
        (["--rank", "1", "--include", "("], 2, "not a regular expression"),
        (["--rank", "1", "--json", "file"], 2, "takes only -"),
        (["--rank", "1", "--json", "-", "--dry-run"], 2, "computes nothing"),
        (["--rank", "1", "--dtype", "fp64"], 2, "fp64"),
    ],
)
def test_bad_input(
    pair: tuple[str, str], out: str, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pair, "--out", out, *words]) == code
    assert told in capsys.readouterr().err
    assert not Path(out).exists()


def test_other_models_end_with_three(pair: tuple[str, str], out: str, tmp_path: Path) -> None:
    other = save_tensors(tmp_path / "other", {"z.weight": torch.zeros(3, 3)})
    assert main([pair[0], str(other), "--out", out, "--rank", "1"]) == 3


def test_criteria_of_the_help_are_those_there_are() -> None:
    assert tuple(KNOWN) == CRITERIA


def test_the_verb_is_in_the_group(pair: tuple[str, str], out: str) -> None:
    assert spectra(["extract", *pair, "--out", out, "--rank", "1", "-q"]) == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('spectra.extract', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_killed_while_it_computes_leaves_no_folder(
    pair: tuple[str, str], out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectra.extract.extraction.measure_model", interrupted)
    assert main([*pair, "--out", out, "--rank", "1"]) == 130
    assert "written whole or not at all; the same command begins anew" in capsys.readouterr().err
    assert not Path(out).exists()


def test_hostile_names_stay_text(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a|b`<script>\x1b[2J[x](y)"
    base = {"q.weight": torch.zeros(4, 4), f"{name}.weight": torch.zeros(4, 4), f"{name}.odd": torch.zeros(2)}
    tuned = {key: tensor + 1 for key, tensor in base.items()}
    sides = [str(save_tensors(tmp_path / side, held)) for side, held in (("x", base), ("y", tuned))]
    assert main([*sides, "--out", out, "--rank", "1"]) == 0
    told = capsys.readouterr()
    card = Path(out, "README.md").read_text()
    assert "\x1b" not in told.out + told.err + card
    assert "<script>" not in card
    assert all(line.count("|") - line.count("\\|") == 8 for line in card.splitlines() if line.startswith("| "))
