"""Rules: least ranks that keep a share, budgets that are kept to, global never worse than uniform."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectra.difference import difference
from spectra.errors import UsageError
from spectra.extract import Extraction, extract
from spectra.extract.ranks import CRITERIA, Rule, by_criterion, by_energy, uniform_error
from spectra.theory.allocation import uniform_rank
from spectra.values import Certificate, Spectrum
from tests.extract.tuned import save_tensors
from tests.planted import planted


def spectrum(values: list[float], *, missing: float = 0.0, limit: int | None = None) -> Spectrum:
    s = np.array(values)
    shape = (len(s) if limit is None else limit,) * 2
    return Spectrum(s, shape, math.sqrt(float(np.sum(s**2)) + missing), Certificate("by hand", gap=math.sqrt(missing)))


def test_energy_is_the_least_rank_that_keeps_it() -> None:
    """Shares of 4, 3, 2, 1 squared: 16/30, 25/30, 29/30, 1."""
    found = spectrum([4.0, 3.0, 2.0, 1.0])
    shares = {16 / 30: 1, 16 / 30 + 1e-9: 2, 25 / 30: 2, 0.9: 3, 29 / 30: 3, 29 / 30 + 1e-9: 4, 1.0: 4}
    assert {share: by_energy(found, share) for share in shares} == shares


def test_energy_counts_no_direction_that_is_not_there() -> None:
    assert by_energy(spectrum([2.0, 0.0, 0.0]), 1.0) == 1
    assert by_energy(spectrum([0.0, 0.0]), 0.5) == 0
    assert by_energy(spectrum([2.0, 1.0], missing=4.0, limit=9), 0.9) == 2  # all that are known


def test_uniform_error_is_the_energy_past_the_rank() -> None:
    assert uniform_error(1, [np.array([9.0, 4.0]), np.array([1.0])], [0.0, 5.0]) == 3.0


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(rank=4), ["--rank", "4"]),
        (Rule(rank=4, allocation="global"), ["--rank", "4", "--global"]),
        (Rule(parameters=900, allocation="uniform"), ["--parameters", "900", "--uniform"]),
        (Rule(criterion="signal"), ["--criterion", "signal"]),
    ],
)
def test_words_ask_for_the_rule(rule: Rule, words: list[str]) -> None:
    assert rule.words() == words


# Two shapes, so two costs; decays so unlike that uniform ranks waste directions.
DECAYS = {"a": ((30, 20), 0.2), "b": ((30, 20), 1.5), "c": ((20, 16), 0.6), "d": ((20, 16), 3.0)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = {f"{name}.weight": torch.zeros(shape) for name, (shape, _) in DECAYS.items()}
    tuned = {
        f"{name}.weight": torch.from_numpy(planted(np.arange(1.0, min(shape) + 1) ** -decay, *shape, seed=i)).float()
        for i, (name, (shape, decay)) in enumerate(DECAYS.items())
    }
    return save_tensors(folder / "base", base), save_tensors(folder / "tuned", tuned)


def ranks(found: Extraction) -> dict[str, int]:
    return {row["module"]: row["rank"] for row in found.tensors}


def squared(pair: tuple[Path, Path]) -> dict[str, np.ndarray]:
    return {name: np.arange(1.0, min(shape) + 1) ** (-2 * decay) for name, (shape, decay) in DECAYS.items()}


@pytest.mark.parametrize("budget", [36, 50, 86, 172, 400, 1000, 2500])
def test_global_allocation_is_never_worse_than_uniform(pair: tuple[Path, Path], tmp_path: Path, budget: int) -> None:
    found = extract(*pair, out=tmp_path / "out", parameters=budget)
    assert found.totals["factor_parameters"] <= budget
    assert found.totals["matrices_error"] <= found.totals["uniform_error"] * (1 + 1e-6)  # float32 factors
    costs, limits = [sum(shape) for shape, _ in DECAYS.values()], [min(shape) for shape, _ in DECAYS.values()]
    rank = uniform_rank(costs, budget, largest=limits)
    told = uniform_error(rank, list(squared(pair).values()), [0.0] * 4)
    assert found.totals["matrices_error"] <= told * (1 + 1e-6)


@pytest.mark.parametrize("budget", [36, 86, 172, 300])
def test_global_allocation_is_the_best_there_is(pair: tuple[Path, Path], tmp_path: Path, budget: int) -> None:
    """By brute force over all ranks that the budget pays for."""
    found = extract(*pair, out=tmp_path / "out", parameters=budget)
    costs = [sum(shape) for shape, _ in DECAYS.values()]
    tails = [np.concatenate([np.cumsum(known[::-1])[::-1], [0.0]]) for known in squared(pair).values()]
    choices = itertools.product(
        *(range(min(len(tail) - 1, budget // cost) + 1) for tail, cost in zip(tails, costs, strict=True))
    )
    best = min(
        sum(tail[rank] for tail, rank in zip(tails, choice, strict=True))
        for choice in choices
        if sum(rank * cost for rank, cost in zip(choice, costs, strict=True)) <= budget
    )
    assert found.totals["matrices_error"] ** 2 == pytest.approx(best, rel=1e-5)


def test_a_rank_allocated_globally_spends_no_more_than_uniform(pair: tuple[Path, Path], tmp_path: Path) -> None:
    even = extract(*pair, out=tmp_path / "even", rank=4)
    found = extract(*pair, out=tmp_path / "out", rank=4, allocation="global")
    assert found.totals["factor_parameters"] <= even.totals["factor_parameters"] == 4 * 172
    assert found.totals["matrices_error"] <= even.totals["matrices_error"] * (1 + 1e-6)
    assert len(set(ranks(found).values())) > 1
    assert set(ranks(even).values()) == {4}


def test_a_uniform_budget(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, out=tmp_path / "out", parameters=5 * 172 + 171, allocation="uniform")
    assert set(ranks(found).values()) == {5}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_the_whole_model_keeps_its_share_for_the_fewest_parameters(
    pair: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    found = extract(*pair, out=tmp_path / "out", energy=share, allocation="global")
    each = extract(*pair, out=tmp_path / "each", energy=share)
    assert found.totals["matrices_energy_kept"] >= share - 1e-6
    assert found.totals["factor_parameters"] <= each.totals["factor_parameters"]


def test_matrices_without_a_direction_are_told_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, out=tmp_path / "out", parameters=36)
    dropped = [row for row in found.tensors if row["treatment"] == "dropped"]
    assert len(dropped) == 3
    assert all(row["error"] == row["norm"] and row["rank"] == 0 for row in dropped)
    assert list(json.loads((found.out / "adapter_config.json").read_text())["rank_pattern"]) == []


def test_global_goes_over_adapters_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = extract(*pair, out=tmp_path / "wide", rank=10)
    found = extract(pair[0], wide.out, out=tmp_path / "out", parameters=400)
    direct = extract(*pair, out=tmp_path / "direct", parameters=400)
    assert ranks(found) == ranks(direct)


def planted_noise(rank: int, rows: int = 200, cols: int = 150, noise: float = 1e-3) -> Spectrum:
    generator = np.random.default_rng(0)
    matrix = planted(np.full(rank, 1.0), rows, cols) + noise * generator.standard_normal((rows, cols))
    values = np.linalg.svd(matrix, compute_uv=False)
    return Spectrum(values, (rows, cols), float(np.linalg.norm(matrix)), Certificate("svd", storage_floor=0.1))


@pytest.mark.parametrize("criterion", ["signal", "gavish-donoho", "marchenko-pastur", "elbow"])
def test_criteria_find_planted_directions(criterion: str) -> None:
    assert by_criterion(planted_noise(7), criterion) == 7


def test_effective_ranks_are_rounded_up() -> None:
    """Stable rank of σ² = 4, 1, 1: 1.5."""
    assert by_criterion(spectrum([2.0, 1.0, 1.0]), "stable") == 2


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_makes_an_adapter(pair: tuple[Path, Path], tmp_path: Path, criterion: str) -> None:
    found = extract(*pair, out=tmp_path / "out", criterion=criterion)
    for row in found.tensors:
        delta = load_file(pair[1] / "model.safetensors")[row["name"]]
        assert row["rank"] == by_criterion(exactly(delta), criterion)


def exactly(delta: torch.Tensor) -> Spectrum:
    """The spectrum by LAPACK, with the storage floor that the package finds for float32."""
    values = torch.linalg.svdvals(delta.double()).numpy()
    floor = difference(torch.zeros_like(delta), delta.clone(), "F32", "F32").floor.spectral
    return Spectrum(values, tuple(delta.shape), float(delta.double().norm()), Certificate("svd", storage_floor=floor))


def test_criterion_that_says_nothing_of_factors_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = extract(*pair, out=tmp_path / "wide", rank=6)
    with pytest.raises(UsageError, match="no tail of noise"):
        extract(pair[0], wide.out, out=tmp_path / "out", criterion="gavish-donoho")
    assert not (tmp_path / "out").exists()
