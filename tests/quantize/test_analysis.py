"""The analysis of one weight against direct computation, planted errors and updates, theory and real weights."""

import math

import pytest
import torch
from safetensors import safe_open

from spectra.errors import NonFiniteMatrix, UsageError
from spectra.linalg import as_matrix
from spectra.moments import Moments
from spectra.quantize.analysis import quantization_error
from spectra.quantize.qera import qera
from spectra.quantize.scheme import Scheme
from spectra.quantize.whitening import noise_fit, whitened_fit
from spectra.theory.quantization import best_rank_share


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(weight, scheme):
    return weight.double() - Scheme.parse(scheme).quantize(weight).dequantize().double()


@pytest.mark.parametrize("scheme", ["nf4/64/fp32", "int4/row/fp32", "nf2/32/fp32", "fp4/64/fp32"])
def test_gaussian_weights_lose_what_theory_says(scheme):
    found = quantization_error(draw(192, 256), scheme)
    # Mean of 49152 squares whose standard deviation is about their mean or twice it: 1 % is two of its own.
    assert found.relative_mse == pytest.approx(found.gaussian_mse, rel=0.02)
    assert found.sqnr_db == pytest.approx(found.gaussian_db, abs=0.1)
    assert found.shannon_db == pytest.approx(20.0 * math.log10(2.0) * found.bits_per_weight)
    assert found.relative_mse > found.shannon_mse
    assert found.bits_per_weight == Scheme.parse(scheme).quantize(draw(192, 256)).bits_per_weight
    assert (found.scheme, found.status) == (Scheme.parse(scheme).name, "ok")


def test_shares_and_spectrum_of_the_error():
    weight = draw(96, 160) * torch.logspace(-1, 0, 160)
    found = quantization_error(weight, "int4", ranks=[1, 10, 96, 500])
    values = torch.linalg.svdvals(error_of(weight, "int4"))
    # The Gram route is right to 1e-7 σ₁; the error was subtracted in float32.
    torch.testing.assert_close(torch.from_numpy(found.spectrum.values.copy()), values, rtol=0.0, atol=1e-6)
    shares = values.square().cumsum(0) / values.square().sum()
    for rank in (1, 10):
        assert found.absorbed[rank] == pytest.approx(float(shares[rank - 1]), rel=1e-5)
        assert found.absorbed_mp[rank] == pytest.approx(best_rank_share(0.6, rank / 96))
        assert found.absorbed_at(rank / 96) == pytest.approx(found.absorbed[rank])
    assert found.absorbed[96] == found.absorbed[500] == pytest.approx(1.0)
    assert found.absorbed_mp[96] == found.absorbed_mp[500] == 1.0
    between = (float(shares[0]) + float(shares[1])) / 2.0
    assert found.absorbed_at(1.5 / 96) == pytest.approx(between, rel=1e-5)
    assert found.absorbed_at(0.0) == 0.0


def test_bits_are_those_of_everything_stored():
    found = quantization_error(draw(64, 64), "nf4/64/fp32")
    assert (found.bits_per_weight, found.code_bits) == (4.5, 4)
    assert found.shannon_mse == 2.0**-9
    # ⌊2^4.5⌋ = 22 levels: between 4 and 5 bits.
    assert 0.0025 < found.lloyd_max_mse < 0.0095
    assert quantization_error(draw(64, 64), "int8/16/fp32").lloyd_max_mse > 0.0  # 10 bits, the most that there are
    assert quantization_error(draw(64, 64), "int8/8/fp32").lloyd_max_mse is None


@pytest.mark.parametrize("scheme", ["int4-affine", "lloyd3"])
def test_no_theory_where_levels_are_the_tensors_own(scheme):
    found = quantization_error(draw(64, 128), scheme)
    assert found.gaussian_mse is None
    assert found.gaussian_db is None
    assert 0.0 < found.relative_mse < 0.1


def test_the_profile_hides_noise():
    """Rows of very different sizes: the raw error is nothing like Marchenko–Pastur, the whitened one is."""
    weight = draw(256, 320) * torch.logspace(-1, 1, 256)[:, None]
    found = quantization_error(weight, "nf4/row/fp32")
    assert found.raw.outliers > 10
    assert found.raw.distance > 0.2
    assert found.whitened.outliers == 0
    # 2.7/p is usual for noise of p rows, twice that was never seen in 40 draws; the edge fluctuates by p^{−2/3}.
    assert found.whitened.distance < 6.0 / 256
    assert found.whitened.edge_ratio == pytest.approx(1.0, abs=0.05)
    assert found.absorbed[16] > 2.0 * found.absorbed_mp[16]


def test_a_planted_direction_stands_out_of_the_noise():
    u, v = draw(200, 1, seed=1) / 200**0.5, draw(1, 300, seed=2) / 300**0.5
    noise = draw(200, 300)
    size = 2.0 * 300**0.5  # twice the σ√n above which a direction shows (Baik, Ben Arous, Péché)
    fit = whitened_fit(as_matrix(noise + size * u @ v))
    assert fit.outliers == 1
    # √((θ + 1/θ)(θ + β/θ)) over the edge 1 + √β; that of the fitted variance is 1 % more.
    expected = math.sqrt(2.5 * (2.0 + 1.0 / 3.0)) / (1.0 + math.sqrt(2.0 / 3.0))
    assert fit.edge_ratio == pytest.approx(expected, rel=0.05)
    assert fit.distance < 6.0 / 200


def test_rows_and_columns_of_zeros_do_not_count():
    noise = draw(120, 150)
    padded = torch.zeros(140, 200)
    padded[10:130, :150] = noise
    fit, alone = whitened_fit(as_matrix(padded)), whitened_fit(as_matrix(noise))
    assert fit.outliers == alone.outliers
    assert fit.distance == pytest.approx(alone.distance, abs=1e-5)  # float32 sums
    assert whitened_fit(as_matrix(padded.T)).edge_ratio == pytest.approx(alone.edge_ratio, rel=1e-5)


def test_few_values_have_no_law():
    assert math.isnan(noise_fit(torch.linalg.svdvals(draw(30, 400).double()).numpy(), (30, 400)).distance)


def test_on_inputs_the_best_factors_take_more():
    weight, spread = draw(64, 96), torch.logspace(0, -2, 96)
    mix = draw(96, 96, seed=1) * spread
    moments = Moments(mix @ mix.T, 1)
    found = quantization_error(weight, "nf4", ranks=[2, 8, 64], moments=moments).weighted
    error = error_of(weight, "nf4")
    whole = torch.linalg.norm(error @ moments.root) ** 2
    assert found.relative == pytest.approx(float(whole / torch.linalg.norm(weight.double() @ moments.root) ** 2))
    for rank in (2, 8):
        for share, known, diagonal in (
            (found.optimal, moments, False),
            (found.diagonal, moments, True),
            (found.plain, None, False),
        ):
            _, a, b = qera(weight, rank, scale=1.0, moments=known, diagonal=diagonal, scheme="nf4")
            left = torch.linalg.norm((error - b.double() @ a.double()) @ moments.root) ** 2
            assert share[rank] == pytest.approx(1.0 - float(left / whole), abs=1e-5)  # float32 factors
        assert found.optimal[rank] > max(found.diagonal[rank], found.plain[rank])
    assert found.optimal[64] == pytest.approx(1.0)
    assert found.plain[64] == pytest.approx(1.0)
    unread = quantization_error(weight, "nf4", ranks=[2], moments=Moments(torch.zeros(96, 96), 1)).weighted
    assert math.isnan(unread.relative)
    assert math.isnan(unread.optimal[2])


def test_an_update_that_repairs_the_error():
    weight = draw(48, 80)
    error = error_of(weight, "nf4").float()
    found = quantization_error(weight, "nf4", ranks=[4, 48], update=0.5 * error).meeting
    assert found.repaired == pytest.approx(0.5, rel=1e-5)
    assert found.cosine == pytest.approx(1.0, rel=1e-5)
    assert found.left[4].value == pytest.approx(1.0, abs=1e-4)
    assert found.right[4].value == pytest.approx(1.0, abs=1e-4)
    assert found.held[48].value == pytest.approx(1.0)
    assert found.held[48].chance == pytest.approx(1.0)
    best = quantization_error(weight, "nf4", ranks=[4]).absorbed[4]
    assert found.inside[4].value == pytest.approx(best, rel=1e-4)  # E's own spaces hold most
    assert quantization_error(weight, "nf4", update=-error).meeting.repaired == pytest.approx(-1.0, rel=1e-5)


def test_an_update_of_low_rank_against_projections():
    weight, update = draw(48, 80), draw(48, 3, seed=5) @ draw(3, 80, seed=6)
    found = quantization_error(weight, "int4", ranks=[2, 8], update=update).meeting
    assert found.rank == 3
    error = error_of(weight, "int4")
    u, _, vh = torch.linalg.svd(update.double())
    left, _, right = torch.linalg.svd(error)
    for rank, kept in ((2, 2), (8, 3)):
        p, q = u[:, :kept] @ u[:, :kept].T, vh[:kept].T @ vh[:kept]
        outside = (torch.eye(48) - p) @ error @ (torch.eye(80) - q)
        total = error.square().sum()
        assert found.held[rank].value == pytest.approx(float(1.0 - outside.square().sum() / total), abs=1e-5)
        assert found.inside[rank].value == pytest.approx(float((p @ error @ q).square().sum() / total), abs=1e-5)
        shared = (left[:, :rank].T @ u[:, :kept]).square().sum() / min(rank, kept)
        assert found.left[rank].value == pytest.approx(float(shared), abs=1e-4)
        shared = (right[:rank] @ vh[:kept].T).square().sum() / min(rank, kept)
        assert found.right[rank].value == pytest.approx(float(shared), abs=1e-4)
        assert found.left[rank].chance == pytest.approx(max(rank, kept) / 48)
        assert found.inside[rank].chance == pytest.approx(kept**2 / (48 * 80))
        assert found.held[rank].chance == pytest.approx(kept / 48 + kept / 80 - kept**2 / (48 * 80))
    assert abs(found.cosine) < 5.0 * found.cosine_std  # drawn apart from the weight


def test_weights_that_have_no_error_or_no_size():
    zero = quantization_error(torch.zeros(64, 64), "nf4", update=draw(64, 64), moments=Moments(torch.eye(64), 1))
    assert zero.status == "zero"
    assert math.isnan(zero.relative_mse)
    assert math.isnan(zero.sqnr_db)
    assert math.isnan(zero.absorbed[4])
    assert math.isnan(zero.absorbed_at(0.5))
    assert math.isnan(zero.meeting.repaired)
    assert math.isnan(zero.weighted.plain[4])
    constant = quantization_error(torch.full((64, 64), 0.5), "int4/64/fp32")
    assert (constant.status, constant.relative_mse, constant.sqnr_db) == ("exact", 0.0, math.inf)
    assert constant.raw.outliers == 0
    assert math.isnan(quantization_error(draw(32, 64), "nf4", update=torch.zeros(32, 64)).meeting.cosine)


def test_one_row():
    found = quantization_error(draw(1, 300), "nf4", ranks=[1, 4])
    assert found.shape == (1, 300)
    assert found.absorbed == {1: pytest.approx(1.0), 4: pytest.approx(1.0)}
    assert found.absorbed_mp == {1: 1.0, 4: 1.0}
    assert math.isnan(found.raw.distance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_element_types(dtype):
    weight = draw(64, 64).to(dtype)
    found = quantization_error(weight, "nf4")
    exact = weight.double() - Scheme.parse("nf4").quantize(weight).dequantize(torch.float32).double()
    expected = float(exact.square().sum() / weight.double().square().sum())
    assert found.relative_mse == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_a_weights_unit_does_not_matter(scale):
    found, other = (quantization_error(w, "nf4/64/fp32") for w in (draw(64, 96), draw(64, 96) * scale))
    assert other.relative_mse == pytest.approx(found.relative_mse, rel=1e-4)  # blocks' entries are rounded anew
    assert other.absorbed[8] == pytest.approx(found.absorbed[8], rel=1e-4)
    assert other.whitened.distance == pytest.approx(found.whitened.distance, abs=1e-3)


def test_refuses():
    weight = draw(16, 64)
    with pytest.raises(UsageError, match="is no matrix"):
        quantization_error(weight[0], "nf4")
    with pytest.raises(UsageError, match="empty"):
        quantization_error(weight[:0], "nf4")
    with pytest.raises(UsageError, match="at least 1"):
        quantization_error(weight, "nf4", ranks=[0])
    with pytest.raises(UsageError, match="unknown format"):
        quantization_error(weight, "nf5")
    with pytest.raises(UsageError, match="of 16 inputs"):
        quantization_error(weight, "nf4", moments=Moments(torch.eye(16), 1))
    with pytest.raises(UsageError, match="the update is"):
        quantization_error(weight, "nf4", update=weight.T)
    with pytest.raises(UsageError, match="fraction"):
        quantization_error(weight, "nf4").absorbed_at(1.5)
    weight[3, 5] = math.nan
    with pytest.raises(NonFiniteMatrix, match="1 of 1024"):
        quantization_error(weight, "nf4")
    with pytest.raises(NonFiniteMatrix, match="update"):
        quantization_error(draw(16, 64), "nf4", update=weight)


def test_the_error_of_a_real_weight_is_noise_under_a_profile(real_pair):
    with safe_open(real_pair[0] / "model.safetensors", "pt") as file:
        weight = file.get_tensor("encoder.layer.0.output.dense.weight")
    found = quantization_error(weight, "nf4", ranks=[6, 64])
    # Heavier tails than the normal law's: .2 dB worse; scales in eight bits are part of it.
    assert found.gaussian_db - 0.5 < found.sqnr_db < found.gaussian_db
    assert found.raw.outliers > 0
    assert found.raw.edge_ratio > 1.3
    assert found.whitened.outliers == 0
    assert found.whitened.distance < 6.0 / 384
    assert found.absorbed[6] > 1.3 * found.absorbed_mp[6]


def test_an_error_of_few_directions() -> None:
    """Rows of zeros, as pruning leaves them: the error has three directions, and nothing is left to call noise."""
    weight = torch.zeros(256, 256)
    weight[:3] = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found = quantization_error(weight, Scheme.parse("nf4"))
    assert found.absorbed[4] == pytest.approx(1.0)
    assert found.raw is None or math.isnan(found.raw.distance)
