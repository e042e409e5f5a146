"""The command on two updates: which of the two uses was meant, exit codes, files, resuming to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra.pairwise
from spectra.errors import MismatchError
from spectra.report.__main__ import main

SHAPE = (24, 16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small base, a full fine-tune of it, one with a NaN, and two adapters that name the base."""
    folder = tmp_path_factory.mktemp("models")
    draw = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.query.weight": torch.randn(SHAPE, generator=draw) for i in range(3)}
    base["layer.0.query.bias"] = torch.randn(24, generator=draw)
    tuned = {name: t + 0.01 * torch.randn(t.shape, generator=draw) for name, t in base.items()}
    broken = {name: t.clone() for name, t in tuned.items()}
    broken["layer.1.query.weight"][0, 0] = float("nan")
    found = {}
    for name, tensors in (("base", base), ("tuned", tuned), ("broken", broken)):
        found[name] = str(folder / f"{name}.safetensors")
        save_file(tensors, found[name])
    for name in ("lora", "lora-2"):
        found[name] = str(adapter(folder / name, found["base"], draw))
    return found


def adapter(folder: Path, base: str, draw: torch.Generator) -> Path:
    """A PEFT folder of rank 2 on every query."""
    folder.mkdir()
    tensors = {}
    for i in range(3):
        module = f"base_model.model.layer.{i}.query"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, 16, generator=draw)
        tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(24, 2, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query"],
        "base_model_name_or_path": base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    kept = (".html", ".json", ".svg", ".parquet")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in kept}


def test_two_updates_of_a_base(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([models["tuned"], models["lora"], "--base", models["base"], "--out", str(tmp_path)]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert "by role" in text
    assert "The 2 leading directions of lora hold" in " ".join(text.split())
    assert {"report.html", "geometry.parquet", "summary.json", "manifest.json"} <= set(contents(tmp_path))
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["statuses"] == {"ok": 3, "vector": 1}
    assert [u["kind"] for u in told["updates"]] == ["dense", "adapter"]
    # The captured share against the same from dense matrices.
    inside = whole = 0.0
    base, tuned = load_file(models["base"]), load_file(models["tuned"])
    low = load_file(f"{models['lora']}/adapter_model.safetensors")
    for i in range(3):
        name = f"layer.{i}.query.weight"
        delta = tuned[name].double() - base[name].double()
        a, b = (low[f"base_model.model.layer.{i}.query.lora_{part}.weight"].double() for part in "AB")
        left, right = torch.linalg.qr(b)[0], torch.linalg.qr(a.T)[0]
        inside += float(torch.linalg.norm(left.T @ delta @ right) ** 2)
        whole += float(torch.linalg.norm(delta) ** 2)
    assert told["pairs"][0]["a_in_b"]["share"] == pytest.approx(inside / whole, rel=1e-6)  # factors in float32


def test_two_adapters_name_their_base(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([models["lora"], models["lora-2"], "--out", str(tmp_path), "--quiet"]) == 0
    assert "The two updates point" in capsys.readouterr().out
    assert json.loads((tmp_path / "manifest.json").read_text())["base"]["ref"] == models["base"]


def test_an_adapter_first_says_how_to_compare_two(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([models["lora"], models["tuned"]]) == 2
    told = capsys.readouterr().err
    assert "is an adapter: it holds an update" in told
    assert "--base REF" in told


def test_more_than_two(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [models["tuned"], models["lora"], "--also", models["lora-2"], "--base", models["base"]]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "pairs" in capsys.readouterr().out
    told = json.loads((tmp_path / "summary.json").read_text())
    assert len(told["pairs"]) == 3
    assert "--also" in json.loads((tmp_path / "manifest.json").read_text())["command"]


def test_a_second_run_goes_on_and_gives_the_same_bytes(models: dict[str, str], tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        assert main([models["tuned"], models["lora"], "--base", models["base"], "--out", str(tmp_path), "-q"]) == 0
        kept.append(contents(tmp_path))
    assert kept[0] == kept[1]


def test_json_alone_goes_to_stdout(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path), "--json", "-"]
    assert main([models["lora"], models["lora-2"], *out]) == 0
    text, errors = capsys.readouterr()
    assert text == (tmp_path / "summary.json").read_text()
    assert "verdict" in errors


def test_a_nan_ends_with_one_and_a_report(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([models["broken"], models["lora"], "--base", models["base"], "--out", str(tmp_path)]) == 1
    assert "could not be analysed" in capsys.readouterr().err
    assert "nonfinite" in (tmp_path / "report.html").read_text()


def test_a_nan_in_one_of_three_ends_with_one_and_compares_the_others(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [models["tuned"], models["broken"], "--also", models["lora"], "--base", models["base"]]
    assert main([*sides, "--out", str(tmp_path)]) == 1
    text, errors = capsys.readouterr()
    assert "could not be analysed" in errors
    assert "broken.safetensors has 1 tensor with NaN or infinite entries" in " ".join(text.split())
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["statuses"] == {"ok": 3, "vector": 1}
    assert [pair["matrices"] for pair in told["pairs"]] == [2, 3, 2]
    reason = next(t["reason"] for t in told["tensors"] if t["name"] == "layer.1.query.weight")
    assert reason.startswith("broken.safetensors: ")
    assert "broken.safetensors: " in (tmp_path / "report.html").read_text()


def test_one_path_given_twice_is_said(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [models["tuned"], models["lora"], "--also", models["lora"], "--base", models["base"]]
    assert main([*sides, "--out", str(tmp_path)]) == 0
    assert "lora and lora (2) are the same files" in " ".join(capsys.readouterr().out.split())


def test_an_update_that_changes_nothing_is_named(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [models["tuned"], models["base"], "--also", models["lora"], "--base", models["base"]]
    assert main([*sides, "--out", str(tmp_path)]) == 0
    assert "base.safetensors leaves every matrix as it is" in " ".join(capsys.readouterr().out.split())


def test_the_folder_of_another_report_is_kept(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([models["base"], models["tuned"], "--out", str(tmp_path), "-q"]) == 0
    before = contents(tmp_path)
    assert main([models["tuned"], models["lora"], "--base", models["base"], "--out", str(tmp_path), "-q"]) == 2
    assert "Give another --out, or --no-resume" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_dry_run_writes_nothing(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([models["tuned"], models["lora"], "--base", models["base"], "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "adapter factors" in text
    assert "the report would go to spectra-tuned-and-lora" in text
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def plan(a: str, b: str, base: str, **options: Any) -> None:
        seen.update(options, a=a, b=b, base=base)
        raise MismatchError("stop here")

    monkeypatch.setattr(spectra.pairwise, "plan_geometry", plan)
    flags = ["--base", "w", "--also", "c", "--also", "d", "--rank", "7", "--exact", "--include", "a|b", "--seed", "5"]
    assert main(["a", "b", *flags, "--max-memory", "1GB", "--offline"]) == 3
    assert seen == {
        "a": "a", "b": "b", "base": "w", "also": ("c", "d"), "rank": 7, "exact": True, "include": "a|b",
        "exclude": None, "device": None, "max_memory": 10**9, "seed": 5, "trust_pickle": False, "offline": True,
        "allow_partial": False,
    }  # fmt: skip
    seen.clear()
    assert main(["a", "b", "--base", "w"]) == 3
    assert "rank" not in seen, "the engine's own default"
