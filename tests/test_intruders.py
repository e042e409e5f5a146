"""Intruder directions against the published algorithm, turned clusters, null spaces, and what is not determined."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg

from spectra.linalg import as_matrix, by_bidiagonal, by_gram
from spectra.subspace import intruders
from spectra.theory import chance
from tests.planted import orthonormal, planted
from tests.test_subspace import dense, with_floor


def published(base, tuned, top, epsilon):
    """Algorithm 1 of Shuttleworth et al. 2024, |cos| for cos: singular vectors come with either sign."""
    u0, _, _ = np.linalg.svd(base, full_matrices=False)
    u, _, _ = np.linalg.svd(tuned, full_matrices=False)
    count = 0
    for j in range(top):
        is_intruder = True
        for i in range(u0.shape[1]):
            if abs(u0[:, i] @ u[:, j]) / (np.linalg.norm(u0[:, i]) * np.linalg.norm(u[:, j])) > epsilon:
                is_intruder = False
        count += is_intruder
    return count


@pytest.mark.parametrize("shape", [(40, 40), (50, 30), (30, 50)])
def test_intruders_are_those_of_the_published_algorithm(shape):
    rng = np.random.default_rng(11)
    w = rng.standard_normal(shape) / math.sqrt(shape[0])
    tuned = w + planted([3.0, 2.5, 1.5, 0.3], *shape, seed=5)
    found = intruders(dense(w), dense(tuned), top=10)
    epsilons = np.linspace(0.05, 0.95, 19)
    assert found.sweep(epsilons).tolist() == [published(w, tuned, 10, epsilon) for epsilon in epsilons]
    assert found.count(0.6) == found.sweep([0.6])[0] >= 2, "directions were planted"
    assert intruders(dense(w), dense(w)).count(0.999) == 0
    assert found.basis == min(shape)
    assert found.dim == shape[0]
    assert np.all(found.resolved)
    # a planted direction is as random as any: its match is what chance gives
    assert found.cosines.min() <= 2 * chance.match_mean(found.basis, found.dim)
    turned_over = intruders(dense(w.T), dense(tuned.T), top=10, side="right")
    assert np.allclose(turned_over.cosines, found.cosines, atol=1e-12)
    signs = rng.choice([-1.0, 1.0], min(shape))
    flipped = dense(w)
    flipped = replace(flipped, left=flipped.left * signs, right=flipped.right * signs[:, None])
    assert np.allclose(intruders(flipped, dense(-tuned)).cosines, found.cosines, atol=1e-12)


@pytest.mark.parametrize("route", [by_bidiagonal, by_gram])
def test_a_turn_within_a_cluster_changes_nothing(route):
    values = np.array([5.0, 3.0, 3.0, 3.0, 2.0, 1.0, 1.0, 0.5])
    u, v = orthonormal(12, 8, 0), orthonormal(8, 8, 1)
    tuned = dense((u * values) @ v.T + planted([4.0, 2.9], 12, 8, seed=3))
    found = []
    for seed in range(4):
        turn = scipy.linalg.block_diag(
            np.eye(1), orthonormal(3, 3, seed), np.eye(1), orthonormal(2, 2, seed), np.eye(1)
        )
        known = route(as_matrix((u * values) @ v.T))
        held = replace(known, left=u @ turn, right=(v @ turn).T)
        found.append(intruders(held, tuned, top=8).cosines)
    assert np.allclose(found, found[0], atol=1e-12)
    inside = [u[:, :1], u[:, 1:4], u[:, 4:5], u[:, 5:7], u[:, 7:]]
    expected = np.max([np.linalg.norm(part.T @ tuned.left, axis=0) for part in inside], axis=0)
    assert np.allclose(found[0], expected, atol=1e-12)
    assert not np.allclose(np.abs(u.T @ tuned.left).max(0), expected, atol=0.01), "the cluster matters here"


def test_directions_in_which_the_base_does_nothing_are_none_of_its_own():
    u, v = orthonormal(12, 12, 0), orthonormal(12, 12, 1)
    w = (u[:, :5] * np.array([5.0, 4, 3, 2, 1])) @ v[:, :5].T
    tuned = dense(w + 4.5 * np.outer(u[:, 7], v[:, 8]))
    for route in (by_bidiagonal, by_gram):
        found = intruders(route(as_matrix(w), vectors=True), tuned, top=6)
        assert found.basis == 5
        assert np.allclose(np.sort(found.cosines), [0, 1, 1, 1, 1, 1], atol=1e-9)
        assert found.cosines[1] < 1e-9, "4.5 stands second"
    nothing = intruders(dense(np.zeros((12, 12))), tuned, top=3)
    assert nothing.basis == 0
    assert nothing.cosines.tolist() == [0.0, 0.0, 0.0]
    assert nothing.count(0.1) == 3


def test_intruders_that_the_tuned_matrix_does_not_determine():
    base, tuned = dense(np.diag([5.0, 4.0, 3.0])), dense(np.diag([5.0, 5.0, 3.0]))
    assert intruders(base, tuned, top=3).resolved.tolist() == [False, False, True]
    assert intruders(base, with_floor(tuned, 2.0), top=3).resolved.tolist() == [False, False, False]
