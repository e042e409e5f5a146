"""What an extraction tells is what it wrote: errors, counts, lists, bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectra.errors import MismatchError, UsageError
from spectra.extract import extract
from tests.extract.tuned import save_tensors, tail, update
from tests.planted import planted

SHAPES = {"h.0.q": (24, 24), "h.0.up": (40, 24), "h.1.q": (24, 24), "h.1.up": (40, 24)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return tensors | {
        "h.0.norm.weight": torch.ones(24),
        "h.0.norm.bias": torch.zeros(24),
        "wte.weight": torch.randn(50, 24),
    }


def fine_tuned(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Updates of unlike size and decay, so that a global allocation differs from a uniform one."""
    tuned = dict(base)
    for i, (name, shape) in enumerate(SHAPES.items()):
        values = (i + 1) * np.arange(1.0, 25.0) ** -(0.3 + 0.6 * i)
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + torch.from_numpy(planted(values, *shape, seed=3 * i)).float()
    return tuned


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = weights(0)
    config = '{"architectures": ["LlamaModel"]}'
    return save_tensors(folder / "base", base, config), save_tensors(folder / "tuned", fine_tuned(base), config)


def differences(pair: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    base, tuned = (load_file(folder / "model.safetensors") for folder in pair)
    return {name: tuned[name].double() - base[name].double() for name in base}


def product(folder: Path, module: str) -> torch.Tensor:
    stored = load_file(folder / "adapter_model.safetensors")
    b, a = (stored[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
    return b @ a


def test_errors_are_eckart_and_youngs_and_measured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, out=tmp_path / "out", rank=3)
    deltas = differences(pair)
    rows = {row["name"]: row for row in found.tensors}
    for module in SHAPES:
        row, delta = rows[f"{module}.weight"], deltas[f"{module}.weight"]
        assert row["error"] == pytest.approx(tail(delta, 3), rel=1e-6)
        assert row["error"] == pytest.approx(float((delta - product(found.out, module)).norm()), rel=1e-6)
        assert row["optimum"] == pytest.approx(tail(delta, 3), rel=1e-6)
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
        assert row["rank"] == 3
    whole = math.sqrt(sum(row["error"] ** 2 for row in rows.values()))
    norm = math.sqrt(sum(float(delta.norm()) ** 2 for delta in deltas.values()))
    assert found.totals["error"] == pytest.approx(whole, rel=1e-12)
    assert found.totals["energy_kept"] == pytest.approx(1 - (whole / norm) ** 2, rel=1e-9)
    assert found.totals["factor_parameters"] == 3 * sum(map(sum, SHAPES.values()))


def test_record_on_disk_is_the_record(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, out=tmp_path / "out", rank=2)
    text = (tmp_path / "out" / "extraction.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(found.record))
    assert found.record["command"].endswith("--rank 2")
    assert set(found.frame.treatment) == {"factors", "unchanged"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == found.config
    assert "Adapter" in found._repr_html_()


def test_every_matrix_keeps_its_share(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, out=tmp_path / "out", energy=0.8)
    deltas = differences(pair)
    for row in found.tensors:
        if row["treatment"] != "factors":
            continue
        values = torch.linalg.svdvals(deltas[row["name"]]) ** 2
        kept = torch.cumsum(values, 0) / values.sum()
        assert kept[row["rank"] - 1] >= 0.8 - 1e-9
        assert row["rank"] == 1 or kept[row["rank"] - 2] < 0.8
    assert found.totals["matrices_energy_kept"] >= 0.8


def test_all_the_energy_is_all_of_the_update(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, out=tmp_path / "out", energy=1.0)
    assert found.totals["error"] <= 1e-6 * found.totals["norm"]  # float32 factors


def test_same_bytes_twice_and_at_any_number_of_jobs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen = []
    for jobs in (1, 3):
        extract(*pair, out=out, rank=3, jobs=jobs)
        seen.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert seen[0] == seen[1]
    assert set(seen[0]) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "extraction.json"}


def test_norms_that_changed_are_saved_with_all_of_their_module(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = load_file(pair[0] / "model.safetensors")
    tuned = fine_tuned(base) | {"h.0.norm.bias": torch.full((24,), 0.5)}
    found = extract(pair[0], save_tensors(tmp_path / "t", tuned), out=tmp_path / "out", rank=1)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.config["modules_to_save"] == ["h.0.norm"]
    assert torch.equal(stored["base_model.model.h.0.norm.bias"], tuned["h.0.norm.bias"])
    assert torch.equal(stored["base_model.model.h.0.norm.weight"], base["h.0.norm.weight"])
    assert found.config["task_type"] is None


def test_what_cannot_be_expressed_is_listed_with_its_norm(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = load_file(pair[0] / "model.safetensors") | {"h.0.gate": torch.zeros(24, 24)}
    tuned = fine_tuned(base) | {"h.0.gate": torch.full((24, 24), 0.25)}
    one, two = save_tensors(tmp_path / "b", base), save_tensors(tmp_path / "t", tuned)
    found = extract(one, two, out=tmp_path / "out", rank=24)
    row = next(row for row in found.tensors if row["name"] == "h.0.gate")
    assert row["treatment"] == "listed"
    assert row["error"] == row["norm"] == pytest.approx(6.0)
    assert found.totals["error"] == pytest.approx(6.0, rel=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "h.0.gate (‖Δ‖ = 6)" in card


def test_not_finite_is_listed_and_the_others_go_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = load_file(pair[0] / "model.safetensors")
    tuned = fine_tuned(base)
    tuned["h.0.q.weight"] = tuned["h.0.q.weight"].clone().index_fill_(0, torch.tensor([0]), math.nan)
    tuned["h.0.norm.weight"] = torch.full((24,), math.inf)
    tuned["h.0.norm.bias"] = torch.ones(24)
    for options in ({"rank": 2}, {"energy": 0.5}):
        found = extract(pair[0], save_tensors(tmp_path / f"t{options}", tuned), out=tmp_path / "out", **options)
        assert {row["name"] for row in found.failed} == {"h.0.q.weight", "h.0.norm.weight"}
        assert {row["name"] for row in found.tensors if row["treatment"] == "listed"} == {"h.0.norm.bias"}
        assert found.totals["factored"] == 3
        stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())


def test_fp16_that_overflows_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = load_file(pair[0] / "model.safetensors")
    tuned = fine_tuned(base) | {"h.0.q.weight": torch.full((24, 24), 1e12)}
    found = extract(pair[0], save_tensors(tmp_path / "t", tuned), out=tmp_path / "out", rank=1, dtype="fp16")
    (row,) = found.failed
    assert "fp16" in row["reason"]
    assert row["name"] == "h.0.q.weight"


def test_reranking_keeps_the_best_of_the_factors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Down from rank 8 to 3: what comes out is what a direct extraction of rank 3 gives."""
    wide = extract(*pair, out=tmp_path / "wide", rank=8)
    narrow = extract(pair[0], wide.out, out=tmp_path / "narrow", rank=3)
    direct = extract(*pair, out=tmp_path / "direct", rank=3)
    for module in SHAPES:
        torch.testing.assert_close(product(narrow.out, module), product(direct.out, module), rtol=0, atol=1e-5)
    rows = {row["module"]: row for row in narrow.tensors}
    for module in SHAPES:
        delta = product(wide.out, module)
        assert rows[module]["error"] == pytest.approx(tail(delta, 3), rel=1e-6)
        assert rows[module]["norm"] == pytest.approx(float(delta.norm()), rel=1e-9)


def test_reranking_reads_no_base_tensor(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing dense is formed: the base's weights are not even looked at."""
    from spectra.checkpoints.checkpoint import Checkpoint

    wide = extract(*pair, out=tmp_path / "wide", rank=8)
    read = Checkpoint.__getitem__

    def only_factors(self: Checkpoint, name: str) -> torch.Tensor:
        assert "lora_" in name
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", only_factors)
    extract(pair[0], wide.out, out=tmp_path / "narrow", energy=0.5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "give one of rank, energy, parameters and criterion, not none"),
    ({"rank": 2, "energy": 0.5}, "not rank and energy"),
    ({"rank": 0}, "at least one direction"),
    ({"energy": 0.0}, "above 0 and at most 1"),
    ({"energy": 1.01}, "above 0 and at most 1"),
    ({"energy": math.nan}, "above 0 and at most 1"),
    ({"parameters": 47}, "one direction of the cheapest matrix"),
    ({"parameters": 200, "allocation": "uniform"}, "one direction of each of 5 matrices takes 298"),
    ({"criterion": "vibes"}, "signal, gavish-donoho, marchenko-pastur, entropy, stable, elbow"),
    ({"criterion": "signal", "allocation": "global"}, "one matrix at a time"),
    ({"rank": 1, "embeddings": "drop"}, "'lora', 'save', 'list'"),
    ({"rank": 1, "rest": "drop"}, "'save', 'list'"),
    ({"rank": 1, "dtype": "int8"}, "'fp32', 'bf16', 'fp16'"),
    ({"rank": 1, "include": "nothing like it"}, "no matrix"),
    ({"rank": 1, "include": "("}, "not a regular expression"),
    ({"rank": 1, "device": "abacus"}, "abacus"),
    ({"rank": 1, "jobs": 0}, "jobs = 0"),
]


@pytest.mark.parametrize(("options", "told"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_arguments_are_told_before_anything_is_written(
    pair: tuple[Path, Path], options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told.replace("(", r"\(")):
        extract(*pair, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_equal_models_have_nothing_to_extract(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are one checkpoint"):
        extract(pair[0], pair[0], out=tmp_path / "out", rank=1)
    copy = save_tensors(tmp_path / "copy", load_file(pair[0] / "model.safetensors"))
    for options in ({"rank": 1}, {"energy": 0.9}):
        with pytest.raises(UsageError, match="nothing to extract"):
            extract(pair[0], copy, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_match(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_tensors(tmp_path / "other", {"h.0.q.weight": torch.zeros(7, 5), "x.weight": torch.zeros(3, 3)})
    with pytest.raises(MismatchError):
        extract(*pair[:1], other, out=tmp_path / "out", rank=1)


def test_output_is_not_an_input(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError):
        extract(*pair, out=pair[1], rank=1)


def test_bf16_pair(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Upcast before subtracting: the truncation is of the stored weights' exact difference."""
    base, tuned = (load_file(folder / "model.safetensors") for folder in pair)
    one, two = ({name: tensor.bfloat16() for name, tensor in side.items()} for side in (base, tuned))
    found = extract(save_tensors(tmp_path / "b", one), save_tensors(tmp_path / "t", two), out=tmp_path / "out", rank=4)
    for row in found.tensors:
        if row["treatment"] == "factors":
            assert row["error"] == pytest.approx(
                tail(two[row["name"]].double() - one[row["name"]].double(), 4), rel=1e-6
            )


def test_large_update_goes_in_one_pass(tmp_path: Path) -> None:
    """More than one block of rows, more columns than rows."""
    base = {"q.weight": torch.zeros(150, 4000)}
    tuned = {"q.weight": update(150, 4000, seed=9)}
    found = extract(
        save_tensors(tmp_path / "b", base), save_tensors(tmp_path / "t", tuned), out=tmp_path / "out", rank=5
    )
    assert found.tensors[0]["error"] == pytest.approx(tail(tuned["q.weight"], 5), rel=1e-6)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Matrices past the sizes up to which all values and vectors are found, as those sizes are set here."""
    monkeypatch.setattr("spectra.extract.measure.VALUES_BELOW", 64)
    monkeypatch.setattr("spectra.extract.measure.FIRST_VALUES", 2)
    monkeypatch.setattr("spectra.extract.measure.MOST_VALUES", 12)
    monkeypatch.setattr("spectra.extract.factors.EXACT_BELOW", 64)
    names = ("a.weight", "b.weight")
    tuned = {
        name: torch.from_numpy(planted(0.7 ** np.arange(200.0), 260, 200, seed=i)).float()
        for i, name in enumerate(names)
    }
    base = {name: torch.zeros(260, 200) for name in names}
    return save_tensors(tmp_path / "b", base), save_tensors(tmp_path / "t", tuned)


# Energies fall by .49 a direction: 7 directions keep 1 − .49^7 = .9932, 6 keep .9862.
@pytest.mark.parametrize("options", [{"energy": 0.99}, {"energy": 0.99, "allocation": "global"}, {"rank": 7}])
def test_sketches_of_very_large_matrices(large: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    found = extract(*large, out=tmp_path / "out", **options)
    for row in found.tensors:
        assert "Lanczos" in row["route"]
        best = math.sqrt(0.49 ** row["rank"] / (1 - 0.49))
        assert row["optimum"] <= best * (1 + 1e-6)
        assert best * (1 - 1e-6) <= row["error"] <= best * 1.001  # a decay this steep is resolved at once
    assert found.totals["matrices_energy_kept"] >= 0.99
    assert all(6 <= row["rank"] <= 7 for row in found.tensors)


def test_energy_that_no_known_direction_holds(large: tuple[Path, Path], tmp_path: Path) -> None:
    """Twelve directions hold 1 − .49^12 of it: more is refused for the whole model, and found one by one."""
    with pytest.raises(UsageError, match="each matrix by itself"):
        extract(*large, out=tmp_path / "out", energy=0.99999, allocation="global")
    assert {row["rank"] for row in extract(*large, out=tmp_path / "out", energy=0.99999).tensors} == {17}


def test_head_of_other_labels_is_saved(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Two labels in the base, three in the fine-tune, and in an adapter of it: the fine-tune's head comes along."""
    config = '{"architectures": ["LlamaForSequenceClassification"]}'
    base = load_file(pair[0] / "model.safetensors")
    tuned = fine_tuned(base) | {"score.weight": torch.full((3, 24), 0.5)}
    one = save_tensors(tmp_path / "b", base | {"score.weight": torch.zeros(2, 24)}, config)
    found = extract(one, save_tensors(tmp_path / "t", tuned, config), out=tmp_path / "out", rank=4, allow_partial=True)
    again = extract(one, found.out, out=tmp_path / "again", rank=2)
    for adapter in (found, again):
        assert adapter.config["modules_to_save"] == ["score"]
        assert adapter.config["task_type"] == "SEQ_CLS"
        stored = load_file(adapter.out / "adapter_model.safetensors")
        assert torch.equal(stored["base_model.model.score.weight"], tuned["score.weight"])
        row = next(row for row in adapter.tensors if row["name"] == "score.weight")
        assert (row["treatment"], row["norm"], row["parameters"]) == ("whole", None, 72)


def test_norms_of_what_is_saved_whole(tmp_path: Path) -> None:
    """‖Δ‖ from blocks, in float64 where either side is; a NaN keeps its tensor out and is told."""
    dtypes = {"n0": (torch.bfloat16, torch.float32), "n1": (torch.float64, torch.float32), "n2": (torch.float32,) * 2}
    base, tuned = {"q.weight": torch.zeros(6, 4)}, {"q.weight": torch.ones(6, 4)}
    for i, (name, (old, new)) in enumerate(dtypes.items()):
        generator = torch.Generator().manual_seed(i)
        base[f"{name}.weight"] = torch.randn(50, generator=generator).to(old)
        tuned[f"{name}.weight"] = torch.randn(50, generator=generator).to(new)
    base["bad.weight"], tuned["bad.weight"] = torch.ones(5), torch.full((5,), math.nan)
    found = extract(save_tensors(tmp_path / "b", base), save_tensors(tmp_path / "t", tuned), out=tmp_path / "o", rank=1)
    rows = {row["module"]: row for row in found.tensors}
    for name in dtypes:
        exact = float((tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()).norm())
        # A difference in float32 is rounded by half an ulp of itself.
        assert rows[name]["norm"] == pytest.approx(exact, rel=1e-7 if name != "n1" else 1e-14)
        assert rows[name]["treatment"] == "whole"
    assert rows["bad"]["treatment"] == "nonfinite"
