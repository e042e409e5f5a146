"""AdaLoRA's scores and budget against sums written out entry by entry, and the laws that they obey."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from spectra.errors import UsageError
from spectra.importance import (
    Smoothed,
    budget,
    entry_scores,
    keep_best,
    magnitude_scores,
    sensitivity,
    smooth,
    triplet_scores,
)


def test_sensitivity_is_the_first_order_change_of_the_loss() -> None:
    weight = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slope = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    (weight @ slope).backward()
    without = torch.stack([(weight.detach() * (torch.arange(5) != i)) @ slope for i in range(5)])
    assert weight.grad is not None
    found = sensitivity(weight, weight.grad)
    # A linear loss has no second order: what is left is rounding of sums of order 5.
    torch.testing.assert_close(found, (without - weight.detach() @ slope).abs(), rtol=0, atol=1e-14)
    assert not found.requires_grad


def test_averages_are_the_weighted_sums_of_all_steps() -> None:
    beta1, beta2, steps = 0.8, 0.6, 7
    history = torch.rand(steps, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    smoothed: Smoothed | None = None
    for now in history:
        smoothed = smooth(smoothed, now, beta1=beta1, beta2=beta2)
    means = [
        sum((1 - beta1) * beta1 ** (t - u) * history[u] for u in range(t + 1)) for t in range(steps)
    ]  # Ī at every step
    doubts = sum((1 - beta2) * beta2 ** (steps - 1 - t) * (history[t] - means[t]).abs() for t in range(steps))
    assert smoothed is not None
    torch.testing.assert_close(smoothed.sensitivity, means[-1])
    torch.testing.assert_close(smoothed.uncertainty, doubts)
    torch.testing.assert_close(entry_scores(smoothed), means[-1] * doubts)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_a_weight_of_the_past_outside_its_range_is_refused(beta: float) -> None:
    with pytest.raises(UsageError, match="beta2"):
        smooth(None, torch.ones(1), beta2=beta)


def test_a_triplet_collects_its_entries() -> None:
    g = torch.Generator().manual_seed(2)
    left, values, right = torch.rand(7, 3, generator=g), torch.rand(3, 1, generator=g), torch.rand(3, 5, generator=g)
    by_hand = [
        float(values[i]) + sum(float(left[j, i]) for j in range(7)) / 7 + sum(float(right[i, j]) for j in range(5)) / 5
        for i in range(3)
    ]
    torch.testing.assert_close(triplet_scores(left, values, right), torch.tensor(by_hand))
    torch.testing.assert_close(triplet_scores(left, values.reshape(-1), right), torch.tensor(by_hand))


def test_magnitude_is_lambda_for_orthonormal_factors() -> None:
    g = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(8, 3, generator=g, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(6, 3, generator=g, dtype=torch.float64)).Q.T
    values = torch.tensor([[2.0], [-3.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(magnitude_scores(left, values, right), values.abs().reshape(-1))
    torch.testing.assert_close(magnitude_scores(left * 3, values, right), values.abs().reshape(-1) * 2)


def test_the_budget_falls_from_end_to_end_and_never_rises() -> None:
    steps = [budget(t, total=200, warmup=20, final=100, start=216, end=144) for t in range(200)]
    assert steps[:21] == [216] * 21
    assert steps[21] < 216
    assert steps[99] >= 144
    assert steps[100:] == [144] * 100
    assert all(later <= earlier for earlier, later in pairwise(steps))
    half_way = 144 + 72 / 8  # the cube of one half
    assert steps[60] == int(half_way)


@pytest.mark.parametrize(
    ("warmup", "final", "start", "end", "words"),
    [(5, 5, 4, 2, "leave none"), (-1, 2, 4, 2, "leave none"), (2, 2, 4, 5, "shrinks"), (2, 2, 4, -1, "shrinks")],
)
def test_a_schedule_without_room_is_refused(warmup: int, final: int, start: int, end: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        budget(0, total=10, warmup=warmup, final=final, start=start, end=end)


@pytest.mark.parametrize("kept", range(8))
def test_exactly_the_budget_stays_with_ties_and_without(kept: int) -> None:
    distinct = [torch.tensor([0.3, 0.9, 0.1]), torch.tensor([]), torch.tensor([0.7, 0.2, 0.8, 0.0])]
    masks = keep_best(distinct, kept)
    assert [len(m) for m in masks] == [3, 0, 4]
    chosen = torch.cat(distinct)[torch.cat(masks)]
    assert sorted(chosen.tolist()) == sorted(torch.cat(distinct).tolist())[7 - kept :]
    tied = keep_best([torch.zeros(3), torch.zeros(4)], kept)
    assert torch.cat(tied).tolist() == [True] * kept + [False] * (7 - kept)


def test_more_budget_than_triplets_keeps_all() -> None:
    assert torch.cat(keep_best([torch.zeros(3)], 10)).all()
