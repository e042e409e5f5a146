"""Factors weighted by inputs: the optimum of ‖(Δ − BA)R^½‖ whatever R, however the base stores, from factors too."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectra.errors import UsageError
from spectra.extract import extract
from spectra.extract.__main__ import main
from spectra.extract.weighting import aligned
from spectra.moments import Moments, save_moments
from spectra.weighted import weighted_truncation
from tests.extract.tuned import save_tensors, tail, update

SHAPES = {"h.0.q": (24, 24), "h.0.up": (40, 24), "h.0.down": (24, 40)}
RANK = 3


def moments_of(inputs: int, *, seed: int, rank: int | None = None) -> Moments:
    """Of inputs whose directions differ a thousandfold in size; of fewer directions than entries where asked for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, rank or inputs, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -3, x.shape[1], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64))[0]
    x = x @ turn[: x.shape[1]]
    return Moments(x.T @ x, len(x))


@pytest.fixture(scope="module")
def moments() -> dict[str, Moments]:
    found = {module: moments_of(shape[1], seed=i) for i, (module, shape) in enumerate(SHAPES.items())}
    return found | {"h.0.down": moments_of(40, seed=9, rank=17)}  # a singular one


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()} | {
        "wte.weight": torch.zeros(50, 24)
    }
    tuned = {
        name: update(*tensor.shape, seed=2 * i) if not name.startswith("wte") else tensor
        for i, (name, tensor) in enumerate(base.items())
    }
    return save_tensors(folder / "base", base), save_tensors(folder / "tuned", tuned)


@pytest.fixture
def file(moments: dict[str, Moments], tmp_path: Path) -> Path:
    return save_moments(moments, tmp_path / "moments.safetensors")


def stored(folder: Path, module: str) -> torch.Tensor:
    """The product as the module multiplies, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    b, a = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
    return b @ a


def on_inputs(left_out: torch.Tensor, moments: Moments) -> float:
    """√tr(D R Dᵀ): no root of R is taken."""
    return math.sqrt(float((left_out @ moments.matrix * left_out).sum().clamp(min=0.0)))


def deltas(tuned: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(tuned / "model.safetensors")
    return {name.removesuffix(".weight"): tensor.double() for name, tensor in tensors.items()}


def test_errors_are_the_least_there_are_and_measured(
    pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    found = extract(*pair, out=tmp_path / "out", rank=RANK, moments=moments)
    rows = {row["module"]: row for row in found.tensors}
    for module, delta in deltas(pair[1]).items():
        if module not in SHAPES:
            continue
        row, of = rows[module], moments[module]
        whole = on_inputs(delta, of)
        optimum = weighted_truncation(delta, of, RANK).error * whole
        left_out = delta - stored(found.out, module)
        # 1e-6: factors are stored in float32, whose rounding adds in quadrature.
        assert row["weighted_error"] == pytest.approx(on_inputs(left_out, of), rel=1e-6)
        assert row["weighted_error"] == pytest.approx(optimum, rel=1e-6)
        assert row["weighted_optimum"] == pytest.approx(optimum, rel=1e-6)
        assert row["weighted_norm"] == pytest.approx(whole, rel=1e-9)
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        plain = on_inputs(delta - (u[:, :RANK] * s[:RANK]) @ vh[:RANK], of)
        assert row["weighted_error_of_plain"] == pytest.approx(plain, rel=1e-5)  # Δ is stored in float32
        assert row["weighted_error"] < 0.9 * plain, "what the weighting is for"
        assert row["error"] == pytest.approx(float(left_out.norm()), rel=1e-6)
        assert row["optimum"] == pytest.approx(tail(delta, RANK), rel=1e-6)
        assert row["error"] > row["optimum"]
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
    totals = found.totals
    held = [rows[module] for module in SHAPES]
    for name in ("norm", "error", "optimum", "error_of_plain"):
        whole = math.sqrt(sum(row[f"weighted_{name}"] ** 2 for row in held))
        assert totals[f"weighted_{name}"] == pytest.approx(whole, rel=1e-12)
    assert totals["weighted_energy_kept"] == pytest.approx(
        1 - (totals["weighted_error"] / totals["weighted_norm"]) ** 2
    )
    assert totals["weighted_matrices"] == 3


def test_factors_are_balanced(pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path) -> None:
    extract(*pair, out=tmp_path / "out", rank=RANK, moments=moments)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in SHAPES:
        b, a = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
        assert b.norm(dim=0) == pytest.approx(a.norm(dim=1), rel=1e-5)


def test_inputs_alike_in_every_direction_give_the_plain_optimum(pair: tuple[Path, Path], tmp_path: Path) -> None:
    same = {module: Moments(torch.eye(shape[1]), 1) for module, shape in SHAPES.items()}
    plain = extract(*pair, out=tmp_path / "plain", rank=RANK)
    found = extract(*pair, out=tmp_path / "found", rank=RANK, moments=same)
    for row, other in zip(found.tensors, plain.tensors, strict=True):
        if row["rank"]:
            assert row["error"] == pytest.approx(other["error"], rel=1e-6)
            assert row["weighted_error"] == pytest.approx(row["error"], rel=1e-6)


def test_a_base_that_stores_inputs_by_rows(moments: dict[str, Moments], tmp_path: Path) -> None:
    """GPT-2's Conv1D: the same update, transposed, with the same errors."""
    sides = {}
    for kind in ("linear", "conv1d"):
        base, tuned = {}, {}
        for i, (module, (rows, cols)) in enumerate(SHAPES.items()):
            delta = update(rows, cols, seed=i)
            stored_delta = delta.T.contiguous() if kind == "conv1d" else delta
            base |= {f"{module}.weight": torch.zeros_like(stored_delta), f"{module}.bias": torch.zeros(rows)}
            tuned |= {f"{module}.weight": stored_delta, f"{module}.bias": torch.zeros(rows)}
        config = '{"model_type": "gpt2"}' if kind == "conv1d" else "{}"
        pair = [save_tensors(tmp_path / kind / side, held, config) for side, held in (("b", base), ("t", tuned))]
        found = extract(*pair, out=tmp_path / kind / "out", rank=RANK, moments=moments)
        assert found.config["fan_in_fan_out"] is (kind == "conv1d")
        sides[kind] = found
    for module in SHAPES:
        one, other = (next(r for r in found.tensors if r["name"] == f"{module}.weight") for found in sides.values())
        assert one["weighted_error"] == pytest.approx(other["weighted_error"], rel=1e-6)
        products = [stored(found.out, module) for found in sides.values()]
        assert torch.allclose(*products, atol=1e-6 * float(products[0].norm()))


def test_an_adapter_is_reranked_for_its_inputs(
    pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    """Through its factors it comes to what its dense product comes to."""
    wide = extract(*pair, out=tmp_path / "wide", rank=8)
    found = extract(pair[0], wide.out, out=tmp_path / "found", rank=RANK, moments=moments)
    for module in SHAPES:
        delta, row = stored(wide.out, module), next(r for r in found.tensors if r["name"] == f"{module}.weight")
        whole = on_inputs(delta, moments[module])
        assert row["weighted_norm"] == pytest.approx(whole, rel=1e-9)
        assert row["weighted_error"] == pytest.approx(
            weighted_truncation(delta, moments[module], RANK).error * whole, rel=1e-6
        )
        left_out = delta - stored(found.out, module)
        assert row["weighted_error"] == pytest.approx(on_inputs(left_out, moments[module]), rel=1e-6)
        assert row["error"] == pytest.approx(float(left_out.norm()), rel=1e-6)
        assert row["weighted_error"] < row["weighted_error_of_plain"]
        assert row["route"].startswith("factors of rank 8")


def test_every_matrix_keeps_its_share_of_what_it_does(
    pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    found = extract(*pair, out=tmp_path / "out", energy=0.8, moments=moments)
    for module, delta in deltas(pair[1]).items():
        if module in SHAPES:
            rank = next(r["rank"] for r in found.tensors if r["name"] == f"{module}.weight")
            kept = [1 - weighted_truncation(delta, moments[module], r).error ** 2 for r in (rank - 1, rank)]
            assert kept[0] < 0.8 <= kept[1] + 1e-9


def test_the_whole_model_on_its_inputs(pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path) -> None:
    """A global budget against equal ranks, both weighted; the embedding has no moments and stays out."""
    flags = {"moments": moments, "embeddings": "save"}
    found = extract(*pair, out=tmp_path / "out", rank=2, allocation="global", **flags)
    equal = extract(*pair, out=tmp_path / "equal", rank=2, **flags)
    assert found.totals["factor_parameters"] <= equal.totals["factor_parameters"]
    assert found.totals["weighted_error"] < equal.totals["weighted_error"]
    assert found.totals["uniform_error"] == pytest.approx(equal.totals["weighted_error"], rel=1e-6)
    assert any("on their inputs" in sentence for sentence in found.verdict)


def test_a_matrix_without_moments_is_cut_plainly(
    pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    some = {"h.0.q": moments["h.0.q"]}
    found = extract(*pair, out=tmp_path / "out", rank=RANK, moments=some)
    row = next(r for r in found.tensors if r["module"] == "h.0.up")
    assert row["weighted_error"] is None
    assert row["error"] == pytest.approx(row["optimum"], rel=1e-6)
    assert set(found.info["moments"]["plain"]) == {"h.0.up.weight", "h.0.down.weight", "wte.weight"}
    assert found.totals["weighted_matrices"] == 1


def test_without_moments_nothing_is_told_of_inputs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, out=tmp_path / "out", rank=RANK)
    record = found.record
    held = [*record, *record["settings"], *record["totals"], *(key for row in record["tensors"] for key in row)]
    assert not [key for key in held if "moments" in key or "weighted" in key]


def test_same_bytes_twice_and_at_any_number_of_jobs(
    pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    seen = []
    for jobs in (1, 3):
        extract(*pair, out=tmp_path / "out", rank=RANK, moments=moments, jobs=jobs)
        seen.append({path.name: path.read_bytes() for path in sorted((tmp_path / "out").iterdir())})
    assert seen[0] == seen[1]


def test_the_command(pair: tuple[Path, Path], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record says where the moments came from, its card how it was made, and that again gives the same bytes."""
    out = tmp_path / "out"
    assert main([*map(str, pair), "--out", str(out), "--rank", "2", "--moments", str(file)]) == 0
    text = capsys.readouterr().out
    assert "3 of 4 matrices as best on their inputs" in text
    assert "each matrix's own leading directions, as many, would leave" in text
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    record = json.loads(before["extraction.json"])
    assert record["moments"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["moments"]["inputs"] == 500
    card = before["README.md"].decode()
    assert "on its inputs |" in card
    line = next(line for line in card.splitlines() if line.startswith("python -m spectra.extract"))
    assert f"--moments {file}" in line
    assert main(shlex.split(line)[3:]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"criterion": "signal"}, "moments weight"),
        ({"criterion": "gavish-donoho"}, "moments weight"),
        ({"energy": 0.9, "allocation": "global"}, "cannot be allocated together"),
        ({"parameters": 400}, "cannot be allocated together"),
    ],
)
def test_rules_that_do_not_go_with_moments(
    flags: dict[str, object], told: str, pair: tuple[Path, Path], moments: dict[str, Moments], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        extract(*pair, out=tmp_path / "out", moments=moments, **flags)  # type: ignore[arg-type]


def test_moments_of_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for given, told in (
        ({"z.k": Moments(torch.eye(24), 1)}, "none of the moments of 'z.k' belongs"),
        ({"h.0.q": Moments(torch.eye(16), 1)}, "are of 16 inputs and h.0.q.weight reads 24"),
        ({"h.0.q": Moments(torch.zeros(24, 24), 1)}, "all 0"),
        ({"wte": Moments(torch.eye(24), 1)}, "belongs to a matrix"),
    ):
        with pytest.raises(UsageError, match=told):
            extract(*pair, out=tmp_path / "out", rank=1, moments=given)


def test_a_file_that_holds_no_moments(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*map(str, pair), "--out", str(tmp_path / "out"), "--rank", "1", "--moments"]
    assert main([*words, str(tmp_path / "none")]) == 2
    assert "is no file" in capsys.readouterr().err
    assert main([*words, str(pair[0] / "model.safetensors")]) == 4
    assert "does not hold moments" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "bert.", "model.decoder."])
def test_names_that_differ_by_a_prefix(prefix: str) -> None:
    modules = [f"layer.{i}.{role}" for i in (1, 11) for role in ("q", "output.dense")]
    known = [*(prefix + module for module in modules), "pooler.dense"]
    assert aligned(known, modules) == {module: prefix + module for module in modules}
    assert aligned(modules, [prefix + module for module in modules]) == {prefix + m: m for m in modules}
    assert aligned(["a.b"], ["c.d"]) == {}
