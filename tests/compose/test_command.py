"""The command: what it writes, what it says, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectra.compose.__main__ import main
from spectra.compose.pairs import Interference


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(6, 5, generator=generator)}
    for name in ("base", "one", "two"):
        moved = 0.0 if name == "base" else 0.1 * torch.randn(6, 5, generator=generator)
        save_file({"a.weight": base["a.weight"] + moved}, tmp_path / f"{name}.safetensors")
    return [str(tmp_path / f"{name}.safetensors") for name in ("base", "one", "two")]


def test_merge(tmp_path: Path, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*models, "--out", str(tmp_path / "m"), "--coefficients", "1,-0.5", "--interference", "-q"]) == 0
    w, one, two = (load_file(path)["a.weight"] for path in models)
    out = load_file(tmp_path / "m" / "base.safetensors")["a.weight"]
    assert torch.allclose(out, w + (one - w) - 0.5 * (two - w), atol=1e-6)
    assert Interference.load(tmp_path / "m").labels == ("one.safetensors", "two.safetensors")
    assert "1 of 1 tensors merged" in capsys.readouterr().out


def test_interference_alone(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A line a pair, each number beside chance; nothing is written."""
    assert main(models) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:2] == ["pair", "cosine"]
    assert said[1].startswith("one.safetensors × two.safetensors")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "fisher", "--out", "m"], "sum, ties"),
        (["--coefficients", "1,x", "--out", "m"], "numbers between commas"),
        (["--coefficients", "1", "--out", "m"], "1 coefficients for 2 updates"),
        (["--density", "0", "--out", "m"], "density"),
        (["--method", "svd", "--out", "m"], "needs a rank"),
        (["--include", "nothing"], "nothing can interfere"),
    ],
)
def test_bad_input(
    flags: list[str], told: str, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(tmp_path / "m") if flag == "m" else flag for flag in flags]
    assert main([*models, *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_one_update_needs_a_place(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(models[:2]) == 2
    assert "--out DIR" in capsys.readouterr().err
