"""Vectors that an operand holds: orthonormal in float64, and no better known than the float32 they came from."""

import numpy as np
import pytest
import torch

from spectra.linalg.dense import by_gram
from spectra.linalg.matrix import Matrix
from spectra.pairwise.operand import _orthonormal, leading, vectors
from spectra.subspace import direction_sines, subspace_sines
from spectra.subspace.resolution import vector_roundoff


@pytest.fixture(scope="module")
def weights():
    """Past the size up to which vectors are found in float64."""
    return torch.randn(1100, 1060, generator=torch.Generator().manual_seed(0)) * 0.1


def test_float32_vectors_are_not_better_known_for_being_cast(weights):
    found = by_gram(Matrix.of(weights), vectors=True, keep=12)
    assert found.left.dtype == np.float32
    assert vector_roundoff(found) > 0
    cast = _orthonormal(found)
    assert vector_roundoff(cast) == 0
    for sines in (subspace_sines, direction_sines):
        before, after = sines(found)[:12], sines(cast)[:12]
        assert 0 < before.min() < 1
        # The term stands above the fraction bar alone, and once for every direction: a little more or less.
        assert np.all(after >= 0.99 * before)


@pytest.mark.parametrize(
    "route", [lambda w: _orthonormal(by_gram(Matrix.of(w), vectors=True, keep=10)), lambda w: leading(w, 10)]
)
def test_residuals_in_the_certificate_are_those_of_the_vectors(weights, route):
    found = route(weights)
    left, right = vectors(found)
    left, right = left[:, :10], right[:10]
    assert np.abs(left.T @ left - np.eye(10)).max() < 1e-14
    wide = weights.double().numpy()
    values = found.values[:10]
    off = np.linalg.norm(wide @ right.T - left * values, axis=0)
    assert np.all(off <= found.certificate.residuals[:10])
    assert off.max() > 1e-9 * values[0], "float32 leaves something to certify"


def test_vectors_in_float64_stay_as_they_are():
    found = by_gram(Matrix.of(torch.randn(60, 40, generator=torch.Generator().manual_seed(1))), vectors=True)
    assert _orthonormal(found) is found


def test_the_last_directions_asked_for_are_not_lost_to_the_tail():
    """A power law, whose gaps are wide: what is beyond the ten must be found too, or the last of them have no gap."""
    u, _, v = torch.linalg.svd(torch.randn(640, 600, generator=torch.Generator().manual_seed(2)), full_matrices=False)
    law = torch.arange(1, 601) ** -0.3
    found = leading((u * law) @ v, 10)
    assert (direction_sines(found)[:10] <= 0.5).all()
    # True, too: float64 finds the same directions.
    assert (np.abs(np.sum(vectors(found)[0][:, :10] * u[:, :10].numpy(), axis=0)) > 0.99).all()
