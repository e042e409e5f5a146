"""Shares of an update in a subspace, against a dense projector and the distribution of chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.errors import UsageError
from spectra.intrinsic.capture import captured
from spectra.projections import PROJECTIONS, forward, make_projection

SHAPES = {"a": (30, 20), "b": (9,), "c": (8, 25)}


def some_update(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dimension", [2, 37])
def test_against_a_dense_projector(name: str, dimension: int) -> None:
    update, gradients = some_update(), some_update(1)
    found = captured(update, dimension=dimension, projection=name, seed=3, gradients=gradients)
    shapes, of = list(SHAPES.values()), dict(enumerate(gradients.values()))
    space = make_projection(name, shapes, dimension=dimension, seed=3, gradients=of)
    units = torch.eye(dimension, dtype=torch.float64)
    p = torch.stack([torch.cat([part.reshape(-1) for part in forward(space, unit)]) for unit in units], dim=1)
    basis = torch.linalg.qr(p).Q
    delta = torch.cat([tensor.reshape(-1).double() for tensor in update.values()])
    assert found.share == pytest.approx(float((basis.t() @ delta).square().sum() / delta.square().sum()), rel=1e-8)
    assert found.chance == dimension / 809


def test_an_update_inside_is_held_whole() -> None:
    space = make_projection("fastfood", list(SHAPES.values()), dimension=50, seed=7)
    inside = dict(zip(SHAPES, forward(space, torch.randn(50, dtype=torch.float64)), strict=True))
    assert captured(inside, dimension=50, seed=7).share == pytest.approx(1.0, rel=1e-9)
    assert captured(inside, dimension=50, seed=8).share < 0.2


def test_random_subspaces_hold_what_chance_says() -> None:
    """Of 200 seeds, those outside the 95 % interval number within four standard errors of 10; the mean is d/D."""
    found = [captured(some_update(), dimension=40, projection="dense", seed=seed) for seed in range(200)]
    outside = sum(not one.chance_low < one.share < one.chance_high for one in found)
    assert abs(outside - 10) <= 4 * np.sqrt(200 * 0.05 * 0.95)
    shares = [one.share for one in found]
    assert abs(np.mean(shares) - found[0].chance) < 4 * np.std(shares) / np.sqrt(200)


def test_a_gradient_that_is_the_update_holds_its_leading_directions() -> None:
    """One number along the leading singular pair: σ₁² of it."""
    update = {"a": torch.randn(12, 9, generator=torch.Generator().manual_seed(2))}
    values = torch.linalg.svdvals(update["a"].double())
    found = captured(update, dimension=1, projection="gradient", gradients=update)
    assert found.share == pytest.approx(float(values[0] ** 2 / values.square().sum()), rel=1e-6)
    assert found.times_chance == pytest.approx(found.share * 108)


@pytest.mark.parametrize("update", [{}, {"a": torch.zeros(4, 4)}, {"a": torch.full((4, 4), torch.nan)}])
def test_nothing_to_hold(update: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="no share"):
        captured(update, dimension=2)
