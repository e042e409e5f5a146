"""AdaLoRA's scores and budget against sums written out entry by entry, and the laws that they obey."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from spectra.errors import UsageError
from spectra.importance import (
    SCORES,
    SHAPES,
    Smoothed,
    budget,
    entry_scores,
    fisher,
    keep_best,
    magnitude_scores,
    norm_scores,
    sensitivity,
    smooth,
    stretches,
    triplet_scores,
    value_scores,
)
from spectra.importance.scores import Factor, Triplets, score_of


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


def test_the_norm_of_a_triplet_is_the_norm_of_its_matrix() -> None:
    g = torch.Generator().manual_seed(4)
    left, values, right = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, 3), (3, 1), (3, 5)))
    triplets = [float(values[i]) * torch.outer(left[:, i], right[i]) for i in range(3)]
    wanted = torch.stack([torch.linalg.matrix_norm(triplet) for triplet in triplets])
    torch.testing.assert_close(norm_scores(left, values, right), wanted)
    # A matrix of rank one has one singular value, and it is that.
    largest = torch.stack([torch.linalg.svdvals(triplet)[0] for triplet in triplets])
    torch.testing.assert_close(norm_scores(left, values, right), largest)
    assert torch.equal(value_scores(values), values.abs().reshape(-1))


def test_fisher_sums_squares_over_steps() -> None:
    history = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    total: torch.Tensor | None = None
    for gradient in history:
        total = fisher(total, gradient)
    torch.testing.assert_close(total, (history**2).sum(dim=0))


def a_factor(*shape: int, seed: int) -> Factor:
    g = torch.Generator().manual_seed(seed)
    now, mean, doubt, squares = (torch.rand(*shape, generator=g, dtype=torch.float64) for _ in range(4))
    return Factor(torch.randn(*shape, generator=g, dtype=torch.float64), now, Smoothed(mean, doubt), squares)


ENTRIES = {
    "adalora": lambda f: f.smoothed.sensitivity * f.smoothed.uncertainty,
    "sensitivity": lambda f: f.sensitivity,
    "smoothed": lambda f: f.smoothed.sensitivity,
    "uncertainty": lambda f: f.smoothed.uncertainty,
    "fisher": lambda f: f.squares,
}


@pytest.mark.parametrize("name", SCORES)
def test_every_score_of_the_table_by_hand(name: str) -> None:
    left, values, right = a_factor(7, 3, seed=6), a_factor(3, 1, seed=7), a_factor(3, 5, seed=8)
    score = SCORES[name]
    assert (score.name, score_of(name)) == (name, score)
    with_values, without = (
        score.of_triplets(Triplets(left, values, right)),
        score.of_triplets(Triplets(left, None, right)),
    )
    assert with_values.shape == without.shape == (3,)
    for i in range(3):
        if name in ENTRIES:
            p, e, q = (ENTRIES[name](f) for f in (left, values, right))
            collected = p[:, i].sum() / 7 + q[i].sum() / 5
            torch.testing.assert_close(with_values[i], e[i, 0] + collected)
            torch.testing.assert_close(without[i], collected)
            continue
        p, q = left.weight[:, i].norm(), right.weight[i].norm()
        by_hand = {"value": torch.ones(()), "magnitude": (p + q) / 2, "norm": p * q}[name]
        torch.testing.assert_close(with_values[i], values.weight[i, 0].abs() * by_hand)
        if name == "value":  # no λ, no size of it
            assert without[i].isnan()
        else:
            torch.testing.assert_close(without[i], by_hand.to(torch.float64))
    tensor = score.of_tensor(left)
    assert tensor.shape == ()
    if name in ENTRIES:
        torch.testing.assert_close(tensor, ENTRIES[name](left).sum() / 21)
    elif name == "norm":
        torch.testing.assert_close(tensor, left.weight.square().sum().sqrt())
    else:
        assert tensor.isnan()


def test_an_unknown_score_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'taylor'.*adalora.*norm"):
        score_of("taylor")


def test_the_budget_falls_from_end_to_end_and_never_rises() -> None:
    steps = [budget(t, total=200, warmup=20, final=100, start=216, end=144) for t in range(200)]
    assert steps[:21] == [216] * 21
    assert steps[21] < 216
    assert steps[99] >= 144
    assert steps[100:] == [144] * 100
    assert all(later <= earlier for earlier, later in pairwise(steps))
    half_way = 144 + 72 / 8  # the cube of one half
    assert steps[60] == int(half_way)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_schedule_is_its_formula(shape: str) -> None:
    total, warmup, final, start, end = 90, 10, 30, 100, 40
    found = [
        budget(t, total=total, warmup=warmup, final=final, start=start, end=end, shape=shape) for t in range(total)
    ]
    assert found[: warmup + 1] == [start] * (warmup + 1)
    assert all(later <= earlier for earlier, later in pairwise(found))
    for t in range(warmup + 1, total - final):
        x = (t - warmup) / (total - warmup - final)
        wanted = {"cubic": 40 + 60 * (1 - x) ** 3, "linear": 100 - 60 * x, "step": 40, "none": 100}[shape]
        # Rounding may carry a whole number over the edge.
        assert found[t] in (int(wanted - 1e-9), int(wanted + 1e-9))
    assert found[total - final :] == [100 if shape == "none" else 40] * final


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'cosine'.*cubic, linear, step, none"):
        budget(0, total=10, warmup=2, final=2, start=4, end=2, shape="cosine")


@pytest.mark.parametrize("total", [2, 3, 7, 200, 50_000])
def test_stretches_leave_a_step_to_prune_in_and_one_with_the_last_budget(total: int) -> None:
    for warmup, final in ((0.0, 0.0), (0.1, 0.5), (0.5, 0.49), (0.0, 0.99)):
        found = stretches(total, warmup=warmup, final=final)
        assert found.warmup + found.final < total
        assert found.final >= 1
        assert found.interval >= 1


@pytest.mark.parametrize(("warmup", "final", "interval"), [(0.5, 0.5, 0.0), (-0.1, 0.2, 0.0), (0.1, 0.2, -1.0)])
def test_shares_without_room_are_refused(warmup: float, final: float, interval: float) -> None:
    with pytest.raises(UsageError, match=f"warmup = {warmup}"):
        stretches(100, warmup=warmup, final=final, interval=interval)


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
