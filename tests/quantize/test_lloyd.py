"""Lloyd's iteration: its fixed point, against an exhaustive search, and what it does with little or nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from spectra.quantize import quantize
from spectra.quantize.lloyd import fitted


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_level_is_the_mean_of_its_entries_by_squared_scale(bits):
    w = normal(1000, 64) * torch.linspace(0.1, 3.0, 1000)[:, None]
    scales = w.abs().amax(1)
    book = fitted(w.flatten(), scales, 64, bits)
    assert torch.equal(book, book.sort().values)
    scaled, weight = (w / scales[:, None]).double().flatten(), scales.double().square().repeat_interleave(64)
    nearest = torch.bucketize(scaled, (book[:-1] + book[1:]).double() / 2)
    means = [float((scaled * weight)[nearest == k].sum() / weight[nearest == k].sum()) for k in range(2**bits)]
    # Cells are 1/4096 wide, and an entry or two lie in the wrong one's half: some tenths of a cell.
    np.testing.assert_allclose(book, means, atol=2e-4)


def test_no_other_four_levels_of_six_values_are_better():
    values = np.array([-1.0, -0.8, -0.1, 0.0, 0.3, 1.0])
    best = min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts))
        for cuts in itertools.combinations(range(1, 6), 3)
    )
    book = fitted(torch.from_numpy(values), torch.ones(1), 6, 2).numpy()
    error = (np.abs(values[:, None] - book).min(1) ** 2).sum()
    assert error == pytest.approx(best, abs=1e-3)  # an entry is counted up to half a cell, 1/8192, from its place


def test_fewer_values_than_levels_are_met_exactly():
    w = torch.tensor([-2.0, 0.0, 2.0, 1.0] * 16)
    assert torch.equal(quantize(w, "lloyd2", scales="fp32").dequantize(), w)
    assert torch.equal(quantize(torch.full((5,), -3.0), "lloyd4", scales="fp32").dequantize(), torch.full((5,), -3.0))
    zeros = quantize(torch.zeros(70), "lloyd3", scales="fp32")
    assert bool(zeros.book.isfinite().all())
    assert bool((zeros.dequantize() == 0.0).all())


def test_blocks_of_any_size_of_scale_count_by_its_square():
    """Scales whose squares leave float32; a tiny block says nothing about the levels."""
    large = normal(64, 64)
    alone = fitted(large.flatten(), large.abs().amax(1), 64, 3)
    for size in (1e30, 1e-30):
        w = torch.cat([large, torch.full((64, 64), 1e-8)]) * size
        both = fitted(w.flatten(), w.abs().amax(1), 64, 3)
        torch.testing.assert_close(both, alone, atol=2e-4, rtol=0.0)  # entries on an edge between cells may change it


def test_threads_do_not_show():
    w = normal(300_000)
    answers, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            answers.append(quantize(w, "lloyd4"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(answers[0].book, answers[1].book)
    assert torch.equal(answers[0].codes, answers[1].codes)
