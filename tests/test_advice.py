"""Advice: criteria against closed forms and Kneedle, bands at every truncation, a model's tables by brute force."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import save_file

from spectra import compare, measures, product_spectrum
from spectra.advice import CRITERIA, LABELS, Band, advise, advise_model, advise_run
from spectra.advice.criteria import median_bounds
from spectra.advice.model import energies
from spectra.errors import UsageError
from spectra.plot.advice import plot_budgets, plot_criteria
from spectra.run import Run
from spectra.theory.allocation import for_energy
from spectra.values import Certificate, Spectrum
from tests.planted import planted

Vector = NDArray[np.float64]


def whole(values: Vector, shape: tuple[int, int] | None = None, **certificate: float) -> Spectrum:
    values = np.asarray(values, dtype=np.float64)
    return Spectrum(
        values,
        shape or (len(values), len(values)),
        float(np.linalg.norm(values)),
        Certificate("by hand", **certificate),  # type: ignore[arg-type]
    )


def cut(full: Spectrum, known: int, *, slack: float = 1.0, exact_vectors: bool = True) -> Spectrum:
    """The leading values of a spectrum, with a bound on the rest that is `slack` times what it need be."""
    s = full.values
    return Spectrum(
        s[:known],
        full.shape,
        full.frobenius,
        Certificate(
            "cut by hand",
            gap=math.sqrt(float(np.sum(s[known:] ** 2))) * (1 + 1e-12),
            tail_norm=slack * float(s[known]),
            storage_floor=full.certificate.storage_floor,
            upper=s[:known] * (1 + 1e-12) if exact_vectors else None,
        ),
    )


# The norm of the noise is 0.01 (√200 + √150) = 0.26; the floor is above it.
def noisy(rank: int, shape: tuple[int, int] = (200, 150), noise: float = 0.01, seed: int = 0) -> Spectrum:
    generator = np.random.default_rng(seed)
    matrix = planted(np.linspace(3.0, 1.0, rank), *shape) + noise * generator.standard_normal(shape)
    return whole(np.linalg.svd(matrix, compute_uv=False), shape, storage_floor=30 * noise)


def kneedle(full: Spectrum) -> int:
    """Satopää et al. 2011 on the curve of kept energy, scaled to the unit square."""
    curve = np.concatenate([[0.0], np.cumsum(full.values**2) / full.frobenius**2])
    return int(np.argmax(curve - np.linspace(0.0, 1.0, len(curve))))


# One matrix -------------------------------------------------------------------------------------------------------


def test_every_criterion_has_a_label() -> None:
    assert list(LABELS) == list(CRITERIA)


def test_criteria_of_a_small_spectrum() -> None:
    """σ² = 16, 9, 4, 1 of 30: shares 16/30, 25/30, 29/30; Σσ = 10."""
    advice = advise(whole(np.array([4.0, 3.0, 2.0, 1.0]), storage_floor=1.5))
    found = {name: advice[name].value for name in CRITERIA if not math.isnan(advice[name].value)}
    p = np.array([0.4, 0.3, 0.2, 0.1])
    assert found["entropy"] == pytest.approx(math.exp(-float(np.sum(p * np.log(p)))), rel=1e-12)
    assert found["stable"] == pytest.approx(30 / 16, rel=1e-12)
    counts = {name: found[name] for name in ("energy_50", "energy_90", "energy_95", "energy_99", "signal", "elbow")}
    assert counts == {"energy_50": 1, "energy_90": 3, "energy_95": 3, "energy_99": 4, "signal": 3, "elbow": 2}
    assert advice["entropy"].rank == 4
    assert advice["stable"].rank == 2
    assert advice.spread == (0, 4)  # nothing here passes the edge of noise


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_planted_directions_are_found(rank: int) -> None:
    advice = advise(noisy(rank))
    for name in ("signal", "marchenko_pastur", "gavish_donoho", "elbow"):
        assert advice[name].value == rank


def test_steps_of_rounding_are_not_taken_for_signal() -> None:
    """Seven values from 3 to 1 stand above even noise; a floor of 1.9 leaves four that rounding cannot make."""
    found = noisy(7)
    advice = advise(Spectrum(found.values, found.shape, found.frobenius, Certificate("by hand", storage_floor=1.9)))
    assert {advice[name].value for name in ("signal", "gavish_donoho", "marchenko_pastur")} == {4.0}


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40))
def test_elbow_is_where_kneedle_finds_it(values: list[float]) -> None:
    full = whole(np.sort(values)[::-1])
    average = full.frobenius**2 / len(values)
    clear = np.abs(full.values**2 / average - 1.0) > 1e-6  # a value that is the average may fall on either side
    if clear.all():
        assert advise(full)["elbow"].value == kneedle(full)


def test_a_straight_line_has_no_elbow() -> None:
    generator = np.random.default_rng(0)
    flat = np.sort(1.0 + 1e-12 * generator.standard_normal(64))[::-1]
    assert advise(whole(flat))["elbow"].value == 0


def test_zero_matrix() -> None:
    advice = advise(whole(np.zeros(8), storage_floor=0.1))
    assert {advice[name].value for name in CRITERIA if advice[name].applies} == {0.0}
    assert "Nothing changed" in advice.verdict


def test_noise_is_not_read_off_an_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(60, 4, generator=generator), torch.randn(4, 50, generator=generator)
    advice = advise(product_spectrum(b, a))
    assert not advice["gavish_donoho"].applies
    assert not advice["signal"].applies
    assert advice["energy_99"].high <= 4
    with pytest.raises(UsageError, match="thin factors"):
        _ = advice["marchenko_pastur"].rank
    with pytest.raises(UsageError, match="no storage floor"):
        _ = advice["signal"].rank
    assert "thin factors" in advice._repr_html_()
    assert "—" in str(advice)


def test_bands() -> None:
    assert Band(2.2, 3.4).rank == 4
    assert not Band(2.2, 3.4).known
    assert math.isnan(Band(2.2, 3.4).value)
    assert Band(3.0, 3.0).value == Band(3.0, 3.0).rank == 3


POWER = np.arange(1.0, 61) ** -0.8
GEOMETRIC = 0.9 ** np.arange(60)
STEP = np.concatenate([np.full(5, 3.0), np.full(55, 0.1)])
FLAT = np.ones(60)
SPECTRA = {
    "power": whole(POWER, (80, 60), storage_floor=0.1),
    "geometric": whole(GEOMETRIC, (60, 200), storage_floor=0.05),
    "step": whole(STEP, storage_floor=0.2),
    "flat": whole(FLAT, (90, 60), storage_floor=0.5),
    "noisy": noisy(5),
    "noise": noisy(1, (100, 99), noise=1.0),
}


@pytest.mark.parametrize("slack", [1.0, 1.3, 4.0])
@pytest.mark.parametrize("exact_vectors", [True, False])
@pytest.mark.parametrize("name", SPECTRA)
def test_bands_hold_the_truth_at_every_truncation(name: str, slack: float, exact_vectors: bool) -> None:
    full = SPECTRA[name]
    truth = advise(full)
    for known in (1, 2, 5, 10, 29, 30, 31, 45, 59):
        advice = advise(cut(full, known, slack=slack, exact_vectors=exact_vectors))
        for criterion, band in advice.bands.items():
            exact = truth[criterion].value
            # Real-valued ranks: the envelope and the value itself are rounded differently.
            room = 1e-6 if criterion in ("entropy", "stable") else 0.0
            assert band.low - room <= exact <= band.high + room, (known, criterion)
            assert truth[criterion].rank <= math.ceil(band.high + room)


@given(st.lists(st.floats(1e-2, 1e2), min_size=3, max_size=30), st.data())
def test_median_lies_within_its_bounds(values: list[float], data: st.DataObject) -> None:
    full = whole(np.sort(values)[::-1])
    known = data.draw(st.integers(1, len(values) - 1))
    slack = data.draw(st.sampled_from([1.0, 1.5, 10.0]))
    low, high = median_bounds(cut(full, known, slack=slack))
    median = float(np.median(full.values))
    assert low - 1e-6 * full.frobenius <= median <= high * (1 + 1e-9)  # low is √ of a difference


def test_a_truncated_flat_tail_still_gives_the_noise_level() -> None:
    """Its energy leaves no choice: all values that are left out are as large as they can be."""
    low, high = median_bounds(cut(SPECTRA["step"], 10))
    assert low == pytest.approx(0.1, rel=1e-6)
    assert high == pytest.approx(0.1, rel=1e-6)
    band = advise(cut(SPECTRA["step"], 10))["gavish_donoho"]
    assert band.known
    assert band.value == 5


def test_a_floor_not_reached_says_so() -> None:
    advice = advise(whole(POWER, storage_floor=float(POWER[6] + POWER[7]) / 2))
    assert advice["signal"].value == 7
    assert "only 7 stand above what rounding" in advice.verdict


def test_verdicts() -> None:
    assert "looks like noise" in advise(noisy(3, noise=0.05)).verdict or "rounding" in advise(noisy(3)).verdict
    noise = noisy(3, noise=0.05)
    tail = Spectrum(noise.values, noise.shape, noise.frobenius, Certificate("by hand", storage_floor=1e-6))
    assert "looks like noise" in advise(tail).verdict
    long = np.concatenate([[5.0], np.geomspace(1.0, 0.01, 99)])
    assert "long tail" in advise(whole(long, storage_floor=1e-9)).verdict
    few = np.concatenate([np.full(5, 1.0), np.geomspace(1e-3, 1e-6, 95)])
    assert "do not contradict the 5 directions" in advise(whole(few, storage_floor=1e-9)).verdict


# A model ----------------------------------------------------------------------------------------------------------

SHAPES = {"a": (9, 6), "b": (12, 8), "c": (8, 8)}


def model(seed: int = 0) -> dict[str, Spectrum]:
    generator = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        values = np.arange(1.0, min(shape) + 1) ** -generator.uniform(0.2, 2.0) * generator.uniform(0.5, 2.0)
        found[name] = whole(values, shape, storage_floor=1e-3)
    return found


COSTS = [sum(shape) for shape in SHAPES.values()]


def every_choice(spectra: dict[str, Spectrum]) -> list[tuple[tuple[int, ...], int, float]]:
    """Ranks, their cost, and the squared norm they leave."""
    found = []
    for ranks in itertools.product(*(range(len(one.values) + 1) for one in spectra.values())):
        left = sum(float(np.sum(one.values[r:] ** 2)) for one, r in zip(spectra.values(), ranks, strict=True))
        found.append((ranks, int(np.dot(ranks, COSTS)), left))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_model_tables_are_the_best_there_is(seed: int) -> None:
    spectra = model(seed)
    advice = advise_model(spectra, ladder=(1, 2, 4, 8))
    choices, total = every_choice(spectra), sum(one.frobenius**2 for one in spectra.values())
    for row in advice.budgets.itertuples():
        best = min(left for _, price, left in choices if price <= row.parameters)
        assert row.global_high == pytest.approx(math.sqrt(best / total), rel=1e-9, abs=1e-12)
        equal = tuple(min(row.uniform_rank, len(one.values)) for one in spectra.values())
        left, price = next((left, price) for ranks, price, left in choices if ranks == equal)
        assert row.uniform_high == pytest.approx(math.sqrt(left / total), rel=1e-9, abs=1e-12)
        assert row.parameters == price
        assert row.global_low == row.global_high
    for row in advice.shares.itertuples():
        fewest = min(price for _, price, left in choices if left <= (1 - row.share) * total * (1 + 1e-12))
        assert row.global_parameters_low == row.global_parameters_high == fewest
        rank = row.uniform_rank_high
        left = sum(float(np.sum(one.values[int(rank) :] ** 2)) for one in spectra.values())
        more = sum(float(np.sum(one.values[int(rank) - 1 :] ** 2)) for one in spectra.values())
        assert left <= (1 - row.share) * total * (1 + 1e-12) < more
        assert row.uniform_rank_low == rank


def test_model_ranks_stand_in_its_table() -> None:
    advice = advise_model(model(), ladder=(2,))
    budget = 2 * sum(COSTS)
    assert advice.allocate(budget) == dict(zip(advice.frame.name, advice.frame.global_r2, strict=True))
    assert sum(np.multiply(list(advice.allocate(budget).values()), COSTS)) <= budget
    row = advice.frame.iloc[1]
    assert (row.rows, row.cols, row.cost) == (12, 8, 20)
    assert row.energy_90 == row.energy_90_low == row.energy_90_high == advice.matrices["b"]["energy_90"].value
    assert advice.for_energy(0.9) == advise_model(model()).for_energy(0.9)


def test_complete_spectra_are_solved_once_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends are one number there; of truncated spectra each end is its own problem."""
    solved = []

    def counted(squares: object, costs: object, share: float, **rest: object) -> object:
        solved.append(share)
        return for_energy(squares, costs, share, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr("spectra.advice.model.for_energy", counted)
    table = advise_model(model()).shares
    assert solved == table.share.tolist()
    for name in ("uniform_rank", "uniform_parameters", "global_parameters"):
        assert table[f"{name}_low"].tolist() == table[f"{name}_high"].tolist()
    solved.clear()
    cut_short = {name: cut(one, 4, slack=1.2) for name, one in model().items()}
    assert len(advise_model(cut_short).shares) * 2 == len(solved)


def test_criteria_of_a_model_are_beaten_at_their_own_cost() -> None:
    spectra = model()
    advice = advise_model(spectra)
    table = advice.criteria.set_index("criterion")
    assert np.all(table.global_error <= table.error * (1 + 1e-12))
    ranks = advice.by_criterion("energy_90")
    assert table.parameters["energy_90"] == np.dot(list(ranks.values()), COSTS)
    left = sum(float(np.sum(spectra[name].values[r:] ** 2)) for name, r in ranks.items())
    total = sum(one.frobenius**2 for one in spectra.values())
    assert table.error["energy_90"] == pytest.approx(math.sqrt(left / total), rel=1e-9)
    assert table.error["energy_90"] <= math.sqrt(0.1)
    with pytest.raises(UsageError, match=r"'size'.*energy_50"):
        advice.by_criterion("size")


def test_bands_of_a_truncated_model_hold_the_truth() -> None:
    full = {name: whole(np.arange(1.0, 61) ** -a, (80, 60)) for name, a in (("a", 0.3), ("b", 0.8), ("c", 1.5))}
    truth = advise_model(full)
    for known in (8, 20, 45):
        advice = advise_model({name: cut(one, known, slack=1.2) for name, one in full.items()})
        for row, exact in zip(advice.budgets.itertuples(), truth.budgets.itertuples(), strict=False):
            if row.parameters != exact.parameters:
                continue
            assert row.least <= exact.global_high + 1e-9
            assert row.global_low <= row.global_high
            assert row.uniform_low - 1e-9 <= exact.uniform_high <= row.uniform_high + 1e-9
            assert exact.global_high <= row.global_high + 1e-9
        for row, exact in zip(advice.shares.itertuples(), truth.shares.itertuples(), strict=True):
            assert row.global_parameters_low <= exact.global_parameters_high <= row.global_parameters_high
            assert row.uniform_rank_low <= exact.uniform_rank_high <= row.uniform_rank_high
            assert row.uniform_parameters_low <= exact.uniform_parameters_low <= row.uniform_parameters_high
    assert math.isinf(advise_model({name: cut(one, 1) for name, one in full.items()}).shares.global_parameters_high[3])


@given(st.integers(1, 59), st.sampled_from([1.0, 1.3, 5.0]), st.booleans(), st.sampled_from(sorted(SPECTRA)))
@settings(deadline=None)
def test_bounded_energies_hold_the_truth(known: int, slack: float, exact_vectors: bool, name: str) -> None:
    full = SPECTRA[name]
    low, high, total = energies(cut(full, known, slack=slack, exact_vectors=exact_vectors))
    truth = np.cumsum(full.values**2)
    assert total == pytest.approx(truth[-1], rel=1e-12)
    assert np.all(np.diff(low) <= 0)
    assert np.all(np.diff(high) <= 0)
    assert len(high) <= full.rank_limit
    assert np.all(np.cumsum(low) <= truth[:known] * (1 + 1e-9))
    assert np.all(np.cumsum(high) >= truth[: len(high)] * (1 - 1e-9))
    assert float(np.sum(high)) >= total * (1 - 1e-9)


def test_an_adapter_costs_only_the_directions_it_has() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(60, 4, generator=generator), torch.randn(4, 50, generator=generator)
    advice = advise_model({"a": product_spectrum(b, a)})
    assert advice.ladder == (1, 2, 4)
    assert advice.budgets.parameters.tolist() == [110, 220, 440]
    assert advice.budgets.global_high.iloc[-1] == 0.0


def test_model_without_change() -> None:
    advice = advise_model({"a": whole(np.zeros(4)), "b": whole(np.zeros(3))})
    assert "Nothing changed" in advice.verdict
    assert advice.allocate(100) == {"a": 0, "b": 0}
    assert advice.criteria.empty
    assert "<table" in advice._repr_html_()
    with pytest.raises(UsageError, match="no spectra"):
        advise_model({})


def test_card_and_plots() -> None:
    advice = advise_model({"<b>": SPECTRA["power"], "c": cut(SPECTRA["power"], 10, exact_vectors=False)})
    card = advice._repr_html_()
    assert "<svg" in card
    assert "fewer" in card or "less than 90\xa0%" in card
    axes = Figure().subplots(1, 2)
    assert advice.plot.budgets(ax=axes[0]) is axes[0]
    assert advice.plot.criteria(ax=axes[1]) is axes[1]
    assert [line.get_label() for line in axes[0].lines] == ["equal ranks", "best ranks", "no ranks go below"]
    assert len(axes[0].collections) == 2  # both bands
    assert len(axes[1].get_yticklabels()) == len(CRITERIA)
    with pytest.raises(ValueError, match="1 labels"):
        plot_criteria(axes[1], ["a"], [[1.0], [2.0]], [[1.0], [2.0]])
    known = Figure().subplots()
    plot_budgets(known, [1, 2], ([0.5, 0.1], [0.5, 0.1]), ([0.6, 0.2], [0.6, 0.2]))
    assert not known.collections


# A saved comparison -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    base, tuned = {}, {}
    for k, (rows, cols) in enumerate([(96, 80), (80, 96), (160, 80)]):
        w = generator.standard_normal((rows, cols))
        change = planted(2.0 / np.arange(1.0, 7), rows, cols, seed=k) + 1e-3 * generator.standard_normal((rows, cols))
        base[f"layer.{k}.weight"] = torch.from_numpy(w).float()
        tuned[f"layer.{k}.weight"] = torch.from_numpy(w + change).float()
    base["same.weight"] = tuned["same.weight"] = torch.ones(20, 20)
    base["norm.weight"], tuned["norm.weight"] = torch.ones(20), torch.zeros(20)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, folder / f"{name}.safetensors")
    compare(folder / "base.safetensors", folder / "tuned.safetensors").save(folder)
    return Run.load(folder)


def test_a_saved_run_is_advised_on_as_its_table_says(run: Run) -> None:
    advice = advise_run(run)
    table = advice.frame.set_index("name")
    rows = run.frame.set_index("name")
    columns = {
        "energy_50": "rank_50",
        "energy_90": "rank_90",
        "energy_95": "rank_95",
        "energy_99": "rank_99",
        "entropy": "entropy_rank",
        "stable": "stable_rank",
        "signal": "signal_rank",
        "marchenko_pastur": "mp_rank",
        "gavish_donoho": "gd_rank",
    }
    assert list(table.index) == [f"layer.{k}.weight" for k in range(3)] + ["same.weight"]
    for name in table.index[:3]:
        for criterion, column in columns.items():
            assert table.loc[name, criterion] == pytest.approx(float(rows.loc[name, column]), rel=1e-12)
    assert table.loc["layer.0.weight", "gavish_donoho"] == 6
    assert measures.signal_rank(run.spectrum("same.weight")) == table.loc["same.weight", "signal"] == 0


def test_names_of_a_run_can_be_chosen(run: Run) -> None:
    assert list(advise_run(run, include=r"layer\.", exclude=r"\.1\.").matrices) == ["layer.0.weight", "layer.2.weight"]
    with pytest.raises(UsageError, match="include = 'norm'"):
        advise_run(run, include="norm")
    with pytest.raises(UsageError, match=r"exclude = '\('"):
        advise_run(run, exclude="(")


def test_advice_loads_neither_torch_nor_tables() -> None:
    import subprocess
    import sys

    heavy = "import sys, spectra.advice; print({'torch', 'pandas', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    from spectra.errors import SpectraError

    with pytest.raises(SpectraError):
        advise_run(Run.load(tmp_path))
