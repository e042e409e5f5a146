"""Updates of a model that was trained in a few bits: told apart from the error, recognised, left alone elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.comparison import plan
from spectra.errors import UsageError
from spectra.quantize.scheme import Scheme
from spectra.report.build import build_report

SIDES = {
    "model.layers.0.a.weight": (96, 128),
    "model.layers.1.a.weight": (128, 96),
    "model.layers.2.a.weight": (96, 96),
}
RANK = 3


def model(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SIDES.items()}
    tensors["model.norm.weight"] = torch.ones(96, dtype=dtype)
    path = tmp_path / "base.safetensors"
    save_file(tensors, path)
    return path, tensors


def updates(size: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: size * torch.randn(rows, RANK, generator=generator) @ torch.randn(RANK, cols, generator=generator)
        for name, (rows, cols) in SIDES.items()
    }


def merged(tmp_path: Path, tensors: dict[str, torch.Tensor], scheme: str | None, size: float = 0.01) -> Path:
    """What QLoRA's merged model is: dequantized weights plus BA."""
    found = dict(tensors)
    for name, update in updates(size).items():
        base = tensors[name] if scheme is None else Scheme.parse(scheme).quantize(tensors[name]).dequantize()
        found[name] = (base.float() + update).to(base.dtype)
    path = tmp_path / f"tuned-{(scheme or 'plain').replace('/', '-')}.safetensors"
    save_file(found, path)
    return path


@pytest.mark.parametrize("scheme", ["nf4", "nf4/64/fp32", "fp4", "fp4/64/fp32", "int8/row/fp32"])
def test_adaptation_is_told_from_the_error(tmp_path: Path, scheme: str) -> None:
    """Against W the update has full rank; against Ŵ it has the adapter's, and the error is told beside it."""
    base, tensors = model(tmp_path)
    tuned = merged(tmp_path, tensors, scheme)
    plain = spectra.compare(base, tuned, progress=False).frame.set_index("name")
    apart = spectra.compare(base, tuned, quantized="auto", progress=False)
    assert apart.info["settings"]["quantized"] == scheme
    rows = apart.frame.set_index("name")
    for name, update in updates(0.01).items():
        assert plain.loc[name].rank_99 > 10 * RANK or scheme.startswith("int8")
        assert rows.loc[name].rank_99 <= RANK
        assert rows.loc[name].frobenius == pytest.approx(float(update.norm()), rel=1e-4)
        error = Scheme.parse(scheme).quantize(tensors[name]).dequantize() - tensors[name]
        assert rows.loc[name].quantization_frobenius == pytest.approx(float(error.norm()), rel=1e-6)
        inner = float((update.double() * error.double()).sum())
        assert rows.loc[name].quantization_projection == pytest.approx(
            -inner / float(error.double().square().sum()), abs=1e-4
        )
        assert rows.loc[name].quantization_cosine == pytest.approx(
            -inner / float(error.norm() * update.norm()), abs=1e-4
        )
    assert "model.norm.weight" in rows.index


def test_in_half_precision(tmp_path: Path) -> None:
    """Weights that are dequantized to bfloat16, as bitsandbytes does, are recognised too."""
    base, tensors = model(tmp_path, torch.bfloat16)
    todo = plan(base, merged(tmp_path, tensors, "nf4"), quantized="auto")
    assert todo.settings["quantized"] == "nf4"
    assert any("the base stood in nf4" in line for line in todo.lines())


@pytest.mark.parametrize("size", [1e-4, 0.01, 0.3])
def test_a_base_that_was_not_quantized(tmp_path: Path, size: float) -> None:
    """Neither small nor large updates are taken for one; asked for in vain, a format changes nothing."""
    base, tensors = model(tmp_path)
    tuned = merged(tmp_path, tensors, None, size)
    assert plan(base, tuned, quantized="auto").settings["quantized"] is None
    plain = spectra.compare(base, tuned, progress=False).frame
    asked = spectra.compare(base, tuned, quantized="nf4", progress=False).frame
    assert asked.frobenius.tolist() == plain.frobenius.tolist()
    assert asked.quantization_frobenius.isna().all()


def test_some_matrices_only(tmp_path: Path) -> None:
    """What was left out of quantization is compared as it is stored."""
    base, tensors = model(tmp_path)
    found = dict(tensors)
    for name, update in updates(0.01).items():
        rounded = Scheme.parse("nf4").quantize(tensors[name]).dequantize()
        found[name] = (tensors[name] if "layers.1" in name else rounded) + update
    save_file(found, tmp_path / "t.safetensors")
    rows = spectra.compare(base, tmp_path / "t.safetensors", quantized="nf4", progress=False).frame.set_index("name")
    assert rows.quantization_frobenius.isna()["model.layers.1.a.weight"]
    assert (rows.rank_99.loc[list(SIDES)] <= RANK).all()


def test_an_adapter_that_makes_up_for_the_error(tmp_path: Path) -> None:
    """The error's leading directions, as an adapter: it undoes their share of ‖E‖²; the record names the format."""
    base, tensors = model(tmp_path)
    folder = tmp_path / "adapter"
    folder.mkdir()
    state, shares = {}, {}
    for name in SIDES:
        error = Scheme.parse("nf4").quantize(tensors[name]).dequantize() - tensors[name]
        u, s, vh = torch.linalg.svd(-error)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        state[f"{module}.lora_A.weight"] = (0.5 * s[:RANK, None] * vh[:RANK]).contiguous()
        state[f"{module}.lora_B.weight"] = u[:, :RANK].contiguous()
        shares[name] = float(s[:RANK].square().sum() / s.square().sum())
    save_file(state, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["a"],
        "base_model_name_or_path": "x",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert plan(base, folder, quantized="auto").settings["quantized"] is None
    record = {"method": "qlora", "settings": {"format": "nf4", "block": 64, "double": True}}
    (folder / "training.json").write_text(json.dumps(record))
    run = spectra.compare(base, folder, quantized="auto", progress=False)
    assert run.info["settings"]["quantized"] == "nf4"
    rows = run.frame.set_index("name")
    for name, share in shares.items():
        assert rows.loc[name].quantization_projection == pytest.approx(share, rel=1e-4)
        assert rows.loc[name].quantization_cosine == pytest.approx(share**0.5, rel=1e-4)
    record["method"] = "lora"
    (folder / "training.json").write_text(json.dumps(record))
    assert plan(base, folder, quantized="auto").settings["quantized"] is None
    (folder / "training.json").write_text("{")
    assert plan(base, folder, quantized="auto").settings["quantized"] is None


def test_unknown_format(tmp_path: Path) -> None:
    base, tensors = model(tmp_path)
    with pytest.raises(UsageError, match=r"nf5.*nf4"):
        plan(base, merged(tmp_path, tensors, None), quantized="nf5")


def test_a_matrix_that_cannot_be_quantized_keeps_its_row(tmp_path: Path) -> None:
    base, tensors = model(tmp_path)
    tensors = dict(tensors) | {"model.layers.0.a.weight": torch.full((96, 128), torch.nan)}
    save_file(tensors, base)
    rows = spectra.compare(
        base,
        merged(tmp_path, tensors | {"model.layers.0.a.weight": torch.ones(96, 128)}, None),
        quantized="nf4",
        progress=False,
    ).frame
    assert rows.set_index("name").status["model.layers.0.a.weight"] == "nonfinite"


def test_a_base_that_is_quantized_and_not_trained(tmp_path: Path) -> None:
    """Dequantized weights alone: the report does not say that nothing differs."""
    base, tensors = model(tmp_path)
    run = spectra.compare(base, merged(tmp_path, tensors, "nf4", size=0.0), quantized="auto", progress=False)
    assert "the base's, quantized: 3 matrices" in build_report(run).verdict[0]
    plain = spectra.compare(base, base, quantized="auto", progress=False)
    assert "same weights" in build_report(plain).verdict[0]


def test_what_is_stored_quantized_is_not_quantized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tensors = model(tmp_path)
    tuned = merged(tmp_path, tensors, "nf4")
    assert plan(base, tuned, quantized="auto").settings["quantized"] == "nf4"
    monkeypatch.setattr("spectra.requantized._stored_quantized", lambda delta: True)
    todo = plan(base, tuned, quantized="auto")
    assert todo.settings["quantized"] is None
    assert {type(delta).__name__ for delta in plan(base, tuned, quantized="nf4").deltas.values()} == {"Delta"}


def test_weights_that_are_stored_turned(tmp_path: Path) -> None:
    """Conv1D's (in, out): quantizers turn it first, and so does this."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "h.0.up.weight": torch.randn(96, 192, generator=generator),
        "h.0.up.bias": torch.zeros(192),
        "h.0.down.weight": torch.randn(192, 96, generator=generator),
        "h.0.down.bias": torch.zeros(96),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    tuned, update = dict(tensors), 0.01 * torch.randn(96, 1, generator=generator) * torch.ones(1, 192)
    for name in ("h.0.up.weight", "h.0.down.weight"):
        moved = update if name == "h.0.up.weight" else update.t()
        rounded = Scheme.parse("nf4").quantize(tensors[name].t().contiguous()).dequantize().t()
        tuned[name] = (rounded + moved).contiguous()
    save_file(tuned, tmp_path / "t.safetensors")
    run = spectra.compare(tmp_path / "base.safetensors", tmp_path / "t.safetensors", quantized="auto", progress=False)
    assert run.info["settings"]["quantized"] == "nf4"
    for name in ("h.0.up.weight", "h.0.down.weight"):
        assert run.frame.set_index("name").loc[name].frobenius == pytest.approx(float(update.norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("asked", ["auto", "nf4"])
def test_other_dtypes_keep_their_rows(tmp_path: Path, dtype: torch.dtype, asked: str) -> None:
    weights = (4.0 * torch.randn(96, 96, generator=torch.Generator().manual_seed(0))).to(dtype)
    for name in ("base", "t"):
        save_file({"a.weight": weights, "b.weight": torch.ones(96, 96)}, tmp_path / f"{name}.safetensors")
    run = spectra.compare(tmp_path / "base.safetensors", tmp_path / "t.safetensors", quantized=asked, progress=False)
    assert set(run.frame.status) <= {"unchanged", "integer", "unsupported_dtype"}
