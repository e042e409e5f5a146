"""Measures on planted spectra with known answers, and the edges."""

import math

import numpy as np
import pytest

from spectra import measures
from spectra.errors import IncompleteSpectrum
from spectra.linalg import spectrum
from spectra.values import Certificate, Spectrum
from tests.planted import planted


def of(values, shape=None, **certificate):
    values = np.asarray(values, dtype=float)
    shape = shape or (len(values), len(values))
    norm = float(np.sqrt(np.sum(values**2)))
    return Spectrum(values, shape, norm, Certificate("by hand", **certificate))


def truncated(values, k, shape=None):
    """The first k of a whole spectrum, with an exact certificate."""
    whole = of(values, shape)
    values = whole.values
    gap = float(np.sqrt(np.sum(values[k:] ** 2)))
    certificate = Certificate("cut", gap=gap, tail_norm=float(values[k]), upper=values[:k])
    return Spectrum(values[:k], whole.shape, whole.frobenius, certificate)


def test_equal_values_have_full_rank_by_every_measure():
    A = of(np.full(7, 2.5))
    for measure in (
        measures.stable_rank,
        measures.entropy_rank,
        measures.entropy_rank_energy,
        measures.participation_ratio,
        measures.numerical_rank,
    ):
        assert measure(A) == pytest.approx(7.0, rel=1e-14)
    assert measures.energy_rank(A, 0.9) == 7  # 6/7 = 0.857 is not enough
    assert measures.energy_rank(A, 6 / 7) == 6
    assert measures.nuclear_norm(A) == pytest.approx(17.5)


def test_rank_one_is_one_by_every_measure():
    A = of([3.0, 0.0, 0.0])
    assert measures.stable_rank(A) == measures.entropy_rank(A) == measures.participation_ratio(A) == 1.0
    assert measures.entropy_rank_energy(A) == 1.0
    assert measures.numerical_rank(A) == measures.energy_rank(A, 1.0) == 1
    assert measures.truncation_error(A, 1) == 0.0


def test_closed_forms():
    A = of([2.0, 1.0])
    p = np.array([2 / 3, 1 / 3])
    assert measures.entropy_rank(A) == pytest.approx(math.exp(-np.sum(p * np.log(p))), rel=1e-14)
    q = np.array([0.8, 0.2])  # σ², not σ: the two variants must differ
    assert measures.entropy_rank_energy(A) == pytest.approx(math.exp(-np.sum(q * np.log(q))), rel=1e-14)
    assert measures.participation_ratio(A) == pytest.approx(25 / 17, rel=1e-14)
    assert measures.stable_rank(A) == pytest.approx(1.25, rel=1e-14)
    assert measures.truncation_error(A, 1) == pytest.approx(math.sqrt(0.2), rel=1e-14)
    assert measures.truncation_error(A, 0) == 1.0


def test_energy_rank_is_of_squares_and_not_off_by_one():
    A = of([3.0, 1.0, 1.0])  # energies 9, 1, 1 of 11
    assert [measures.energy_rank(A, t) for t in (0.5, 9 / 11, 0.82, 10 / 11, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_tail_error_has_no_cancellation_on_a_complete_spectrum():
    A = of([1.0, 1e-9])
    assert measures.truncation_error(A, 1) == pytest.approx(1e-9, rel=1e-12)


def test_geometric_spectrum_in_closed_form():
    ratio, n = 0.8, 60
    A = of(ratio ** np.arange(n))
    assert measures.stable_rank(A) == pytest.approx((1 - ratio ** (2 * n)) / (1 - ratio**2), rel=1e-12)
    tail = math.sqrt((ratio**20 - ratio ** (2 * n)) / (1 - ratio ** (2 * n)))
    assert measures.truncation_error(A, 10) == pytest.approx(tail, rel=1e-12)


def test_zero_matrix():
    A = of([0.0, 0.0], (2, 5))
    for measure in (
        measures.stable_rank,
        measures.entropy_rank,
        measures.entropy_rank_energy,
        measures.participation_ratio,
        measures.numerical_rank,
        measures.nuclear_norm,
        measures.spectral_norm,
    ):
        assert measure(A) == 0
    for interval in (
        measures.stable_rank_bounds,
        measures.entropy_rank_bounds,
        measures.entropy_rank_energy_bounds,
        measures.participation_ratio_bounds,
        measures.numerical_rank_bounds,
        measures.nuclear_norm_bounds,
        measures.spectral_norm_bounds,
    ):
        assert interval(A) == (0, 0)
    assert measures.energy_rank(A, 0.9) == 0
    assert math.isnan(measures.truncation_error(A, 1))
    assert measures.rank_above_bounds(A, 0.0) == (0, 0)


def test_a_truncated_spectrum_refuses_and_names_the_twin():
    A = truncated(np.linspace(5, 1, 10), 4)
    for name in ("entropy_rank", "entropy_rank_energy", "participation_ratio", "nuclear_norm", "numerical_rank"):
        with pytest.raises(IncompleteSpectrum, match=f"{name}_bounds"):
            getattr(measures, name)(A)
    with pytest.raises(IncompleteSpectrum, match="energy_rank_bounds"):
        measures.energy_rank(A, 0.99)
    with pytest.raises(IncompleteSpectrum, match="truncation_error_bounds"):
        measures.truncation_error(A, 5)


def test_a_truncated_spectrum_still_answers_what_it_knows():
    values = np.linspace(5, 1, 10)
    A, whole = truncated(values, 6), of(values)
    assert measures.stable_rank(A) == pytest.approx(measures.stable_rank(whole))
    assert measures.energy_rank(A, 0.5) == measures.energy_rank(whole, 0.5)
    assert measures.truncation_error(A, 3) == pytest.approx(measures.truncation_error(whole, 3), rel=1e-12)
    assert measures.rank_above(A, 4.2) == 2
    with pytest.raises(IncompleteSpectrum):
        measures.rank_above(A, 0.5)


PAIRS = [
    (measures.entropy_rank, measures.entropy_rank_bounds),
    (measures.entropy_rank_energy, measures.entropy_rank_energy_bounds),
    (measures.participation_ratio, measures.participation_ratio_bounds),
    (measures.nuclear_norm, measures.nuclear_norm_bounds),
    (measures.stable_rank, measures.stable_rank_bounds),
    (measures.spectral_norm, measures.spectral_norm_bounds),
    (measures.numerical_rank, measures.numerical_rank_bounds),
    *(
        (lambda A, t=t: measures.energy_rank(A, t), lambda A, t=t: measures.energy_rank_bounds(A, t))
        for t in (0.5, 0.9, 1.0)
    ),
    *(
        (lambda A, r=r: measures.truncation_error(A, r), lambda A, r=r: measures.truncation_error_bounds(A, r))
        for r in (0, 1, 5, 40)
    ),
]


@pytest.mark.parametrize("pair", range(len(PAIRS)))
@pytest.mark.parametrize(
    "values",
    [
        0.7 ** np.arange(60),
        np.arange(1, 61) ** -0.5,
        np.ones(60),
        np.r_[10.0, np.full(59, 0.1)],
        np.r_[np.linspace(5, 4, 8), np.zeros(52)],
    ],
    ids=["geometric", "power", "flat", "spike", "low rank"],
)
def test_bounds_of_a_truncated_spectrum_contain_the_exact_value(pair, values):
    measure, interval = PAIRS[pair]
    exact = measure(of(values, (60, 90)))
    for k in (1, 8, 30, 59):
        low, high = interval(truncated(values, k, (60, 90)))
        assert low <= exact * (1 + 1e-9) + 1e-12
        assert exact <= high * (1 + 1e-9) + 1e-7  # √ε: the tail energy is a difference of two sums


def test_bounds_close_as_more_is_known():
    values = np.arange(1, 201) ** -0.7
    widths = []
    for k in (10, 40, 160):
        low, high = measures.entropy_rank_bounds(truncated(values, k))
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] < 0.03 * measures.entropy_rank(of(values))  # with 40 of 200 values unknown


def test_bounds_are_attained():
    """Of all spectra with one known value, an even tail and a packed one are the extremes: both ends are sharp."""
    even = np.r_[2.0, np.ones(8)]  # tail energy 8, largest 1
    low, high = measures.entropy_rank_energy_bounds(truncated(even, 1))
    assert high == pytest.approx(measures.entropy_rank_energy(of(even)), rel=1e-9)
    packed = np.r_[2.0, 1.0, 1.0, np.zeros(6)]
    low, _ = measures.entropy_rank_energy_bounds(truncated(packed, 1))
    assert low == pytest.approx(measures.entropy_rank_energy(of(packed)), rel=1e-9)


def test_signal_rank_needs_a_floor():
    A = of([3.0, 2.0, 0.1], storage_floor=0.5)
    assert measures.signal_rank(A) == 2
    assert measures.signal_rank_bounds(A) == (2, 2)
    with pytest.raises(ValueError, match="storage floor"):
        measures.signal_rank(of([3.0]))


def test_decay_exponent_finds_a_planted_power_law():
    rng = np.random.default_rng(0)
    energies = np.sort(rng.pareto(1.5, 4000) + 1.0)[::-1]  # density ~ λ^{-2.5}
    # 4000 samples: α̂ has standard error (α−1)/√n = .024; four of them
    assert measures.decay_exponent(of(np.sqrt(energies))) == pytest.approx(2.5, abs=0.1)


def test_decay_exponent_refuses_an_adapter():
    with pytest.raises(IncompleteSpectrum, match="this matrix has 8"):
        measures.decay_exponent(of(np.r_[np.linspace(2, 1, 8), np.zeros(100)]))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1])
def test_energy_share_outside_its_range(share):
    with pytest.raises(ValueError, match="outside"):
        measures.energy_rank(of([1.0]), share)
    with pytest.raises(ValueError, match="outside"):
        measures.energy_rank_bounds(of([1.0]), share)


def test_negative_rank():
    for f in (measures.truncation_error, measures.truncation_error_bounds):
        with pytest.raises(ValueError, match="negative"):
            f(of([1.0]), -1)


def test_through_the_engines():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    A = spectrum(planted(values, 200, 150))
    assert measures.entropy_rank(A) == pytest.approx(measures.entropy_rank(of(values)), rel=1e-6)
    assert measures.numerical_rank(A) == 4


def test_spectrum_refuses_nonsense():
    for values, shape in (([1.0, 2.0], (2, 2)), ([-1.0], (1, 1)), ([np.nan], (1, 1)), ([1.0, 1.0], (1, 5))):
        with pytest.raises(ValueError):
            Spectrum(np.array(values), shape, 1.0, Certificate("by hand"))


def test_spectrum_is_frozen_and_shows_itself():
    A = of([2.0, 1.0], storage_floor=0.5)
    with pytest.raises(ValueError):
        A.values[0] = 3.0
    assert "storage floor 0.5" in str(A.certificate)
    assert "2 × 2" in A._repr_html_()
