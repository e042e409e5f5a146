"""Axes-level plots: what they draw is what they were given."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra.plot import (
    SERIES,
    plot_capture,
    plot_heatmap,
    plot_intruders,
    plot_overlap,
    plot_spectrum,
    plot_truncation_error,
    power_of_ten,
    truncation_curve,
)
from spectra.values import Certificate, Spectrum

VALUES = np.array([8.0, 4.0, 2.0, 1.0, 0.5])


@pytest.fixture
def ax() -> Axes:
    return Figure().subplots()


def truncated() -> Spectrum:
    certificate = Certificate("by hand", gap=1.2, tail_norm=1.0, storage_floor=0.25)
    return Spectrum(VALUES[:3], (5, 9), float(np.linalg.norm(VALUES)), certificate)


def legend(ax: Axes) -> list[str]:
    return [str(label) for label in ax.get_legend_handles_labels()[1]]


def test_spectrum_draws_values_floor_and_edge(ax: Axes) -> None:
    plot_spectrum(ax, VALUES, floor=0.7, mp_edge=3.0, label="query")
    values, floor, edge = ax.lines
    np.testing.assert_array_equal(values.get_ydata(), VALUES)
    np.testing.assert_array_equal(values.get_xdata(), [1, 2, 3, 4, 5])
    assert list(floor.get_ydata()) == [0.7, 0.7]
    assert list(edge.get_ydata()) == [3.0, 3.0]
    assert legend(ax) == ["query", "storage rounding floor", "Marchenko–Pastur edge"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_zeros_have_no_place_on_a_logarithmic_axis(ax: Axes) -> None:
    plot_spectrum(ax, [2.0, 1.0, 0.0], log_index=False)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2.0, 1.0])
    assert ax.get_xscale() == "linear"


def test_a_truncated_spectrum_brings_floor_and_band(ax: Axes) -> None:
    spectrum = truncated()
    plot_spectrum(ax, spectrum)
    assert list(ax.lines[1].get_ydata()) == [0.25, 0.25]
    (band,) = ax.collections
    low, high = spectrum.interval()
    drawn = band.get_paths()[0].vertices[:, 1]
    assert drawn.max() == pytest.approx(high.max())
    assert drawn.min() == pytest.approx(low.min())
    assert "certified interval" in legend(ax)


def test_several_spectra_have_their_own_colours_and_one_floor_entry(ax: Axes) -> None:
    for name in "abc":
        plot_spectrum(ax, VALUES, floor=0.7, label=name)
    assert legend(ax) == ["a", "storage rounding floor", "b", "c"]
    named = [line.get_color() for line in ax.lines if line.get_label() in "abc"]
    assert named == list(SERIES[:3])


def test_truncation_error_is_eckart_young(ax: Axes) -> None:
    plot_truncation_error(ax, VALUES, marks=(2,))
    expected = [np.linalg.norm(VALUES[r:]) / np.linalg.norm(VALUES) for r in range(1, 6)]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected, rtol=1e-14)
    assert list(ax.lines[1].get_xdata()) == [2]


def test_truncated_error_band_contains_the_truth() -> None:
    spectrum = truncated()
    low, high = truncation_curve(spectrum.values, spectrum.frobenius, upper=spectrum.interval()[1])
    exact = [np.linalg.norm(VALUES[r:]) / np.linalg.norm(VALUES) for r in range(1, 4)]
    assert np.all(low <= exact)
    np.testing.assert_allclose(high, exact, rtol=1e-12)


def test_small_tails_are_summed_from_their_small_end() -> None:
    """1e-9 beside 1 is lost in ‖A‖² − σ₁², and is not in the tail itself."""
    _, high = truncation_curve([1.0, 1e-9])
    assert high[0] == pytest.approx(1e-9, rel=1e-12)
    assert high[1] == 0.0


def test_curve_of_nothing_is_nan() -> None:
    assert all(math.isnan(v) for v in truncation_curve([0.0, 0.0])[0])
    assert len(truncation_curve([])[0]) == 0


def test_heatmap_of_a_frame_is_labelled(ax: Axes) -> None:
    table = pd.DataFrame([[0.1, np.nan], [0.3, 0.4]], index=["query", "key"], columns=[0, 1])
    plot_heatmap(ax, table, label="share", texts=[["a", "b"], ["c", "d"]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["query", "key"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1"]
    assert [t.get_text() for t in ax.texts] == ["a", "c", "d"], "an empty cell has no text"
    assert ax.figure.axes[1].get_ylabel() == "share"


def test_labels_must_fit(ax: Axes) -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        plot_heatmap(ax, [[1.0, 2.0]], row_labels=["a", "b"], col_labels=["0", "1"], label="")


def test_values_must_be_a_vector(ax: Axes) -> None:
    with pytest.raises(ValueError, match="vector"):
        plot_spectrum(ax, np.eye(3))


def test_overlaps_are_cells_from_the_smallest_rank_down(ax: Axes) -> None:
    plot_overlap(ax, [[0.9, np.nan], [0.5, 0.25]], (1, 8), (2, 4), names=("full", "lora"), resolved=(1, 4))
    assert [t.get_text() for t in ax.texts] == ["90", "50", "25"], "a missing cell has no text"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "8"]
    assert ax.yaxis_inverted()
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("leading i of full", "leading j of lora")
    assert [patch.get_xy() for patch in ax.patches] == [(0, 1), (1, 1)], "rank 8 of full is hatched"
    mesh = ax.collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.0, 1.0), "colours mean the same on every plot"


def test_ranks_must_fit_the_table(ax: Axes) -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\) cells for 2 and 2 ranks"):
        plot_overlap(ax, [[1.0, 0.5]], (1, 2), (1, 2))


def test_two_captured_shares_have_one_key_for_what_is_possible(ax: Axes) -> None:
    for label in ("one", "two"):
        plot_capture(ax, (1, 2, 4), [0.1, 0.2, np.nan], optimum=[0.4, 0.6, 0.8], chance=[0.0, 0.01, 0.04], label=label)
    assert legend(ax) == ["one", "best possible", "random", "two"]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [0.4, 0.6, 0.8])
    assert ax.get_xscale() == "log"
    low, high = ax.get_ylim()
    assert low <= 0 < 1 <= high


def test_intruders_stand_beside_random_directions(ax: Axes) -> None:
    plot_intruders(ax, [0.0, 0.5, 1.0], [0, 2, 10], chance=[0, 9.9, 10], label="lora", linestyle="--")
    counts, chance = ax.lines
    assert list(counts.get_ydata()) == [0, 2, 10]
    assert counts.get_linestyle() == "--"
    assert list(chance.get_ydata()) == [0, 9.9, 10]
    assert legend(ax) == ["lora", "random directions"]


@pytest.mark.parametrize(("value", "text"), [(1e-7, "10⁻⁷"), (1000.0, "10³"), (5.0, "5"), (0.02, "0.02"), (0.0, "")])
def test_ticks(value: float, text: str) -> None:
    assert power_of_ten(value) == text


def test_plots_load_neither_torch_nor_pyplot() -> None:
    code = "import spectra.plot, sys; print({'torch', 'matplotlib.pyplot', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
