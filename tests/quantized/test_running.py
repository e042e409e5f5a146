"""A run against what its numbers must be: sums taken by hand, noise's own law, planted updates and inputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from spectra.errors import (
    CheckpointNotFound,
    JournalMismatch,
    MismatchError,
    UnsafeCheckpoint,
    UsageError,
)
from spectra.moments import Moments, save_moments
from spectra.quantize.scheme import Scheme
from spectra.quantized import QuantizedRun, quantization, running
from tests.quantized.conftest import FORMATS, noise, saved, weights


def error_of(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    return weight.double() - Scheme.parse(scheme).quantize(weight).dequantize(torch.float32).double()


def test_totals_are_sums_over_the_matrices(run: QuantizedRun) -> None:
    """Against squared norms that are added up here, not against the run's own rows."""
    matrices = [tensor for name, tensor in weights().items() if name.endswith("weight")]
    for scheme, found in zip(FORMATS, run.pooled, strict=True):
        lost = sum(float(error_of(w, scheme).square().sum()) for w in matrices)
        whole = sum(float(w.double().square().sum()) for w in matrices)
        assert found.scheme == scheme
        assert found.relative_mse == pytest.approx(lost / whole, rel=1e-9)  # float64 sums in another order
        stored = sum(8 * Scheme.parse(scheme).quantize(w).nbytes for w in matrices)
        assert found.bits == pytest.approx(stored / sum(w.numel() for w in matrices), rel=1e-12)
    row = run.overall.set_index("scheme").loc["nf4"]
    assert row.sqnr_db == pytest.approx(-10 * math.log10(row.relative_mse))
    assert row.shannon_db == pytest.approx(20 * math.log10(2) * row.bits_per_weight)


def test_gaussian_weights_are_what_theory_says(run: QuantizedRun) -> None:
    frame = run.frame.set_index(["name", "scheme"])
    for name in ("layer.0.query.weight", "layer.1.query.weight"):
        row = frame.loc[name, "nf4"]
        # 24 576 squared errors and 384 largest entries: the relative mean strays by about 2 %.
        assert row.relative_mse == pytest.approx(row.gaussian_mse, rel=0.06)
        assert row.absorbed_r16 == pytest.approx(row.absorbed_noise_r16, rel=0.03)  # at p = 128
        assert row.outliers == 0
        assert row.edge == pytest.approx(1.0, abs=0.05)


def test_a_profile_is_told_from_directions(run: QuantizedRun) -> None:
    """Rows of very different sizes lift the spectrum above noise's; with their sizes divided out nothing is left."""
    row = run.frame.set_index(["name", "scheme"]).loc["layer.1.uneven.weight", "nf4"]
    assert row.edge > 1.5
    assert row.edge_whitened == pytest.approx(1.0, abs=0.05)
    assert row.absorbed_r4 > 1.5 * row.absorbed_noise_r4
    assert all(found.noise_like == 3 for found in run.pooled[:1])


def test_every_tensor_has_a_row(run: QuantizedRun) -> None:
    status = {row["name"]: (row["status"], row["reason"]) for row in run.records}
    assert status["layer.0.query.weight"] == ("ok", "")
    assert status["layer.0.query.bias"] == ("kept", "no matrix")
    assert status["position_ids"] == ("kept", "stored as I64")
    assert len(run.frame) == 3 * len(FORMATS) + 2


def test_jobs_and_the_journal_change_no_byte(run: QuantizedRun, model: str, tmp_path: Path) -> None:
    first = run.save(tmp_path / "a").read_bytes()
    other = quantization(model, FORMATS, ranks=(4, 16), jobs=1, out=tmp_path / "b", progress=False)
    assert other.save(tmp_path / "b").read_bytes() == first
    loaded = QuantizedRun.load(tmp_path / "b")
    assert loaded.records == run.records
    assert loaded.info == run.info
    assert loaded.sentences == run.sentences


def test_going_on_measures_nothing_twice(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = running.quantization_error, []

    def failing(*args: object, **more: object) -> object:
        asked.append(args)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "quantization_error", failing)
    with pytest.raises(KeyboardInterrupt):
        quantization(model, ["nf4"], out=tmp_path, jobs=1, progress=False)
    asked.clear()
    monkeypatch.setattr(running, "quantization_error", lambda *a, **k: asked.append(a) or real(*a, **k))
    found = quantization(model, ["nf4"], out=tmp_path, jobs=1, progress=False)
    assert len(asked) == 1, "two of three matrices stood in the journal"
    assert found.records == quantization(model, ["nf4"], progress=False).records
    with pytest.raises(JournalMismatch, match="formats"):
        quantization(model, ["int8"], out=tmp_path, progress=False)


def test_nan_and_zeros(tmp_path: Path) -> None:
    bad = noise(64, 64, 0)
    bad[3, 3] = math.nan
    ref = saved(
        tmp_path / "m", {"bad.weight": bad, "zero.weight": torch.zeros(64, 64), "good.weight": noise(64, 64, 1)}
    )
    found = quantization(ref, progress=False)
    status = {row["name"]: row["status"] for row in found.records}
    assert status == {"bad.weight": "nonfinite", "zero.weight": "zero", "good.weight": "ok"}
    assert found.pooled[0].matrices == 1


def test_gpt2_is_turned(tmp_path: Path) -> None:
    """A Conv1D stores (in, out): its blocks run along the inputs, as of the same map stored the other way."""
    up, mix = noise(256, 64, 0), noise(64, 64, 1)
    bias = {"h.0.up.bias": torch.zeros(256), "h.0.mix.bias": torch.zeros(64)}
    ours = saved(tmp_path / "a", {"h.0.up.weight": up, "h.0.mix.weight": mix, **bias})
    theirs = saved(tmp_path / "b", {"h.0.up.weight": up.T, "h.0.mix.weight": mix.T, **bias})
    plain, turned = (quantization(ref, progress=False) for ref in (ours, theirs))
    assert [row["turned"] for row in turned.records if "schemes" in row] == [True, True]
    by_name = {row["name"]: row["schemes"] for row in plain.records if "schemes" in row}
    assert {row["name"]: row["schemes"] for row in turned.records if "schemes" in row} == by_name


def test_an_update_that_is_the_error_repairs_all_of_it(model: str, tmp_path: Path) -> None:
    tuned = {
        name: (tensor + error_of(tensor, "nf4").float()) if name.endswith("weight") else tensor
        for name, tensor in weights().items()
    }
    ref = saved(tmp_path / "tuned", tuned)
    found = quantization(model, ["nf4"], tuned=ref, ranks=(4, 16), progress=False).pooled[0]
    assert found.repaired == pytest.approx(1.0, abs=1e-5)  # sums of float32 weights
    assert found.over_update == pytest.approx(1.0, abs=1e-5)
    assert found.captured[16] > 1.2 * found.chance[16], "its leading directions are the error's own"
    random = {n: t + 0.1 * noise(*t.shape, 9) if n.endswith("weight") else t for n, t in weights().items()}
    found = quantization(
        model, ["nf4"], tuned=saved(tmp_path / "random", random), ranks=(4, 16), progress=False
    ).pooled[0]
    assert abs(found.repaired) < 4.0 * found.repaired_std
    assert found.captured[16] == pytest.approx(found.chance[16], rel=0.05)


def test_the_other_way_round(model: str, tmp_path: Path) -> None:
    """With the base beside it a model is quantized as it is, and its own update is what the error takes back."""
    moved = {n: t + 0.1 * noise(*t.shape, 9) if n.endswith("weight") else t for n, t in weights().items()}
    ref = saved(tmp_path / "tuned", moved)
    run = quantization(ref, ["nf4"], base=model, progress=False)
    alone = quantization(ref, ["nf4"], progress=False)
    assert [r["schemes"][0]["relative_mse"] for r in run.records if "schemes" in r] == [
        r["schemes"][0]["relative_mse"] for r in alone.records if "schemes" in r
    ]
    moved_by = [row["update_norm"] for row in run.records if "schemes" in row]
    assert moved_by == pytest.approx(
        [0.1 * float(noise(*s, 9).norm()) for s in ((192, 128), (192, 128), (160, 128))], rel=1e-4
    )
    assert "of the update back" in dict(run.sentences)["update"]


def test_matrices_that_an_update_leaves_alone_do_not_count(model: str, tmp_path: Path) -> None:
    """Of three matrices one moves, by its own error: all of that is made up for, whatever the others lost."""
    name = next(name for name, tensor in weights().items() if tensor.dim() == 2)
    tuned = {n: t + error_of(t, "nf4").float() if n == name else t for n, t in weights().items()}
    run = quantization(model, ["nf4"], tuned=saved(tmp_path / "tuned", tuned), ranks=(4, 16), progress=False)
    found, entries = run.pooled[0], weights()[name].numel()
    assert found.matrices == 3
    assert found.repaired == pytest.approx(1.0, abs=1e-5)
    assert found.over_update == pytest.approx(1.0, abs=1e-5)
    assert found.repaired_std == pytest.approx(entries**-0.5, rel=1e-3)


def test_calibration(model: str, tmp_path: Path) -> None:
    """Inputs alike in every direction weigh nothing; inputs of one direction are one that rank 4 takes back whole."""
    name = "bert.layer.0.query"
    file = save_moments({name: Moments(10 * torch.eye(128), 10)}, tmp_path / "even.safetensors")
    found = quantization(model, ["nf4"], calibration=file, ranks=(4,), progress=False)
    row = next(row for row in found.records if row["name"] == "layer.0.query.weight")
    part = row["schemes"][0]
    assert part["weighted_mse"] == pytest.approx(part["relative_mse"], rel=1e-9)
    assert part["weighted_optimal"][0] == pytest.approx(part["absorbed"][0], rel=1e-6)
    assert "weighted_mse" not in found.records[-1].get("schemes", [{}])[0]
    assert found.pooled[0].weighted == pytest.approx(part["relative_mse"], rel=1e-9)
    x = noise(128, 2, 5).double()
    flat = quantization(model, ["nf4"], calibration={name: Moments(x @ x.T, 2)}, ranks=(4,), progress=False)
    assert flat.pooled[0].weighted_optimal[4] == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(UsageError, match="of 5 inputs"):
        quantization(model, calibration={name: Moments(torch.eye(5), 5)}, progress=False)
    with pytest.raises(UsageError, match="none of the moments"):
        quantization(model, calibration={"elsewhere": Moments(torch.eye(5), 5)}, progress=False)


def test_curves_end_where_they_must(run: QuantizedRun) -> None:
    for row in run.records:
        for part in row.get("schemes", ()):
            held = np.array(part["held"])
            assert held[-1] == pytest.approx(1.0)
            assert (np.diff(held) > 0.0).all()
            assert len(part["curve"]) == 65
            assert part["curve"][0] == max(part["curve"])


def test_what_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'nf5'"):
        quantization(model, ["nf5"])
    with pytest.raises(UsageError, match="no scheme"):
        quantization(model, [])
    with pytest.raises(UsageError, match="ranks"):
        quantization(model, ranks=(0,))
    with pytest.raises(UsageError, match="both given"):
        quantization(model, tuned=model, base=model)
    with pytest.raises(UsageError, match="has no matrix to quantize among the names"):
        quantization(model, include="nothing")
    with pytest.raises(UsageError, match="jobs = 0"):
        quantization(model, jobs=0)
    with pytest.raises(UsageError, match="a folder of its own"):
        quantization(model, out=model)
    stranger = saved(tmp_path / "other", {"conv.weight": noise(8, 8, 0)})
    with pytest.raises(MismatchError, match="one architecture"):
        quantization(model, tuned=stranger)


def test_what_is_no_run_is_refused(run: QuantizedRun, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"spectra\.quantize"):
        QuantizedRun.load(tmp_path)
    (tmp_path / "quantized.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UnsafeCheckpoint):
        QuantizedRun.load(tmp_path)
    with pytest.raises(KeyError, match="no tensor is called"):
        run.record("nothing")
