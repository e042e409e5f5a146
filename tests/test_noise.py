"""Noise floors and random-matrix laws: published constants, simulation, Painlevé II, real weights."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special

from spectra import measures
from spectra.delta import difference
from spectra.record import _against_noise
from spectra.theory import noise
from tests.planted import planted


@pytest.mark.parametrize(
    ("beta", "star", "median", "omega"),
    [(1.0, 2.3094, 0.65278, 2.8584), (0.5, 1.9786, 0.83047, 2.1712), (0.25, None, None, 1.8369)],
)
def test_gavish_donoho_constants(beta, star, median, omega):
    if star is not None:
        assert noise.gavish_donoho(beta) == pytest.approx(star, abs=5e-5)
        assert noise.mp_median(beta) == pytest.approx(median, abs=5e-6)
    assert noise.gavish_donoho_unknown(beta) == pytest.approx(omega, abs=6e-5)


def test_gavish_donoho_is_four_over_root_three():
    assert noise.gavish_donoho(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-15)


@pytest.mark.parametrize("beta", [1.0, 0.6, 0.1, 1e-3])
def test_marchenko_pastur_has_mass_one(beta):
    assert noise._mp_mass_above((1 - math.sqrt(beta)) ** 2, beta) == pytest.approx(1.0, abs=1e-9)
    assert noise._mp_mass_above((1 + math.sqrt(beta)) ** 2, beta) == 0.0


@pytest.mark.parametrize("shape", [(400, 400), (600, 150)])
def test_noise_level_from_the_median(shape):
    values = np.linalg.svd(np.random.default_rng(0).standard_normal(shape) * 0.3, compute_uv=False)
    # the median of p eigenvalues fluctuates by O(1/p): 2 % at p = 150
    assert noise.noise_std(float(np.median(values)), shape) == pytest.approx(0.3, rel=0.02)


def test_tracy_widom_quantile_from_painleve():
    """F₁(s) = exp(−½∫_s^∞ q) √F₂(s), F₂ = exp(−∫_s^∞ (x−s) q²), q'' = sq + 2q³, q ~ Ai."""
    start = 6.0
    ai, ai_prime, _, _ = special.airy(start)

    def right(s, y):
        q, dq, i, _, _ = y  # i = ∫q², j = ∫∫q² = ∫(x−s)q², last: ∫q
        return [dq, s * q + 2 * q**3, -(q**2), -i, -q]

    tail = integrate.quad(lambda x: special.airy(x)[0], start, 20)[0]
    solution = integrate.solve_ivp(
        right, (start, 2.0), [ai, ai_prime, 0.0, 0.0, tail], rtol=1e-11, atol=1e-18, dense_output=True
    )

    def cdf(s):
        _, _, _, j, k = solution.sol(s)
        return math.exp(-0.5 * k - 0.5 * j)

    quantile = optimize.brentq(lambda s: cdf(s) - 0.999, 2.5, 4.5)
    assert pytest.approx(quantile, abs=2e-3) == noise.TRACY_WIDOM_999


def test_noise_alone_stays_below_the_finite_edge():
    rng = np.random.default_rng(1)
    over = sum(
        np.linalg.svd(rng.standard_normal((120, 80)), compute_uv=False)[0] > noise.finite_edge((120, 80))
        for _ in range(400)
    )
    assert over <= 4  # mean .4 at one in a thousand: P(> 4) < 1e-4
    assert noise.finite_edge((120, 80)) > noise.marchenko_pastur_edge((120, 80)) * 0.99


def test_planted_value_appears_where_bbp_says():
    shape, theta = (600, 300), 1.6
    rng = np.random.default_rng(2)
    a = planted(np.array([theta * math.sqrt(600)]), *shape) + rng.standard_normal(shape)
    top = np.linalg.svd(a, compute_uv=False)
    # fluctuations of an outlier are O(n^-1/2): 2 %
    assert top[0] / math.sqrt(600) == pytest.approx(noise.bbp_image(theta, 0.5), rel=0.02)
    hidden = planted(np.array([0.5 * math.sqrt(600)]), *shape) + rng.standard_normal(shape)
    assert np.linalg.svd(hidden, compute_uv=False)[0] < noise.finite_edge(shape)


@pytest.mark.parametrize("beta", [0.0, 1.2, -1.0])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="outside"):
        noise.mp_median(beta)


def test_profiles_of_two_matrices_are_refused():
    with pytest.raises(ValueError, match="row profile"):
        noise.storage_floor([1.0], [2.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_ulp_is_the_spacing_of_the_grid(dtype):
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[
        dtype
    ]
    integer = torch.int16 if dtype.itemsize == 2 else torch.int8
    codes = torch.arange(1, 100 if dtype.itemsize == 1 else 20000, dtype=torch.int16).to(integer)
    values = codes.view(dtype).double().numpy()
    steps = np.diff(values)
    assert np.array_equal(noise.ulp(values[:-1], name), steps)


def cast_pair(dtype, relative, seed=0, rank=None, shape=(384, 384)):
    """Base stored in a dtype, an exact update of relative size, and both cast."""
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(rng.standard_normal(shape) * 0.04).to(dtype)
    update = planted(np.ones(rank), *shape, seed=seed) if rank else rng.standard_normal(shape)
    update *= relative * float(torch.linalg.norm(base.double())) / np.linalg.norm(update)
    tuned = (base.double() + torch.from_numpy(update)).to(dtype)
    return base, tuned, update


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_storage_floor_predicts_the_rounding_error(dtype, name):
    """Base and tuned both rounded from float64: the floor from the weights alone against the true error."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((300, 200)) * 0.04
    update = rng.standard_normal((300, 200)) * 0.002
    base, tuned = torch.from_numpy(w).to(dtype), torch.from_numpy(w + update).to(dtype)
    error = (tuned.double() - base.double()).numpy() - update
    found = difference(base, tuned, name, name)
    # 60 000 independent errors: their sum of squares is within 1 % of its mean
    assert found.floor.frobenius == pytest.approx(np.linalg.norm(error), rel=0.01)
    top = np.linalg.svd(error, compute_uv=False)[0]
    assert top <= found.floor.spectral <= 1.3 * top


def test_untouched_rows_carry_no_rounding():
    base = torch.randn(100, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tuned = base.clone()
    tuned[:10] = (tuned[:10].float() * 1.1).bfloat16()
    found = difference(base, tuned.clone(), "BF16", "BF16")
    part = difference(base[:10], tuned[:10].clone(), "BF16", "BF16")
    assert found.floor.frobenius == pytest.approx(part.floor.frobenius, rel=1e-6)
    assert found.zero_fraction >= 0.9


def test_tiny_and_huge_weights_have_a_floor():
    for scale in (1e-25, 1e25):
        base = torch.full((4, 4), 1.5 * scale)
        found = difference(base, base * 1.25, "F32", "F32")
        one = 2.0 ** (math.floor(math.log2(1.5 * scale)) - 23)
        other = 2.0 ** (math.floor(math.log2(1.875 * scale)) - 23)
        assert found.floor.frobenius == pytest.approx(4 * math.sqrt((one**2 + other**2) / 12), rel=1e-4)


def test_the_trap_a_rank_eight_update_in_bf16():
    """Relative size 0.2 %: rounding is half of the stored delta, and entropy rank is in the hundreds."""
    for seed in range(4):
        base, tuned, _ = cast_pair(torch.bfloat16, 0.002, seed=seed, rank=8)
        found = difference(base, tuned, "BF16", "BF16")
        A = found.spectrum()
        assert measures.entropy_rank(A) > 150, "the trap: the stored delta looks full rank"
        assert measures.signal_rank(A) == 8
        assert _against_noise(A)["mp_rank"] == 8
        assert found.floor.frobenius > 0.4 * found.frobenius


def test_pure_rounding_holds_no_direction():
    for seed in range(4):
        w = torch.from_numpy(np.random.default_rng(seed).standard_normal((384, 384)) * 0.04)
        # the same weights, moved by far less than a grid step, then rounded: only rounding differs
        noise_only = torch.from_numpy(np.random.default_rng(99 + seed).standard_normal((384, 384))) * 1e-6
        base, tuned = w.bfloat16(), (w + noise_only).bfloat16()
        A = difference(base, tuned, "BF16", "BF16").spectrum()
        assert measures.signal_rank(A) == 0
        assert _against_noise(A)["mp_rank"] == 0
