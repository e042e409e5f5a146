"""Deltas of real files: upcasting, views, adapters, what one pass sums, and what bad tensors become."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.checkpoints import open_checkpoint
from spectra.delta import Delta, LowRankDelta, deltas, matrix_shape, pair_checkpoints
from spectra.difference import difference
from spectra.errors import MatrixError, NonFiniteMatrix, UsageError


def checkpoint(path, **tensors):
    save_file({name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}, path)
    return open_checkpoint(path)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_upcast_comes_before_subtraction(tmp_path):
    w = noise(64, 48).bfloat16()
    t = (w.float() + 0.01 * noise(64, 48, seed=1)).bfloat16()
    base, tuned = checkpoint(tmp_path / "a.safetensors", w=w), checkpoint(tmp_path / "b.safetensors", w=t)
    (delta,) = deltas(base, tuned)
    assert torch.equal(delta.dense(), t.float() - w.float())
    assert not torch.equal(delta.dense(), (t - w).float()), "bf16 subtraction must differ, or this test tests nothing"


def test_one_pass_sums_what_it_says():
    base, tuned = noise(300, 70), noise(300, 70)
    tuned[5:] += 0.01 * noise(295, 70, seed=2)
    found = difference(base, tuned.clone(), "F32", "F32")
    exact = tuned.double() - base.double()
    assert found.frobenius == pytest.approx(float(exact.norm()), rel=1e-6)  # differences are rounded to float32
    assert found.base_frobenius == pytest.approx(float(base.double().norm()), rel=1e-14)
    assert found.zero_fraction == pytest.approx(5 / 300)


def test_the_base_is_not_written_to():
    base, tuned = noise(10, 10), noise(10, 10, seed=1)
    kept = base.clone()
    difference(base, tuned, "F32", "F32")
    assert torch.equal(base, kept)


def test_nonfinite_entries_are_counted_on_each_side():
    base, tuned = noise(10, 10), noise(10, 10, seed=1)
    base[0, 0] = float("nan")
    tuned[1, :2] = float("inf")
    with pytest.raises(NonFiniteMatrix, match="1 NaN or infinite entries in base, 3 in the difference, of 100"):
        difference(base, tuned, "F32", "F32", name="w")


def test_views(tmp_path):
    stack, rows = noise(3, 8, 6), noise(20, 6, seed=1)
    base = checkpoint(tmp_path / "a.safetensors", stack=stack, rows=rows, conv1d=noise(8, 6))
    tuned = checkpoint(
        tmp_path / "b.safetensors", single=stack[1].T * 1.5, rows=torch.cat([rows * 2, rows]), conv1d=noise(8, 6).T * 3
    )
    expert = Delta("e", base, tuned, "stack", "single", "expert:1:base|transpose_tuned")
    assert torch.allclose(expert.dense(), stack[1] * 0.5, atol=1e-6)
    assert expert.shape == (8, 6)
    resized = Delta("r", base, tuned, "rows", "rows", "rows:20")
    assert torch.equal(resized.dense(), rows)
    turned = Delta("c", base, tuned, "conv1d", "conv1d", "transpose_tuned")
    assert torch.allclose(turned.dense(), noise(8, 6) * 2)
    with pytest.raises(MatrixError, match=r"\(20, 6\).*\(40, 6\)"):
        Delta("r", base, tuned, "rows", "rows").dense()


def test_kernels_are_flattened_and_vectors_stand():
    assert matrix_shape((8, 3, 5, 5)) == (8, 75)
    assert matrix_shape((9,)) == (9, 1)
    assert matrix_shape(()) == (1, 1)


def test_deltas_are_picklable_and_lazy(tmp_path):
    base = checkpoint(tmp_path / "a.safetensors", w=noise(40, 30))
    tuned = checkpoint(tmp_path / "b.safetensors", w=noise(40, 30, seed=1))
    (delta,) = deltas(base, tuned)
    sent = pickle.dumps(delta)
    assert len(sent) < 5000, "a delta carries references, not matrices"
    assert torch.equal(pickle.loads(sent).dense(), delta.dense())


def test_include_and_exclude(tmp_path):
    base = checkpoint(tmp_path / "a.safetensors", a__query=noise(9, 9), a__key=noise(9, 9), bias=noise(9))
    tuned = checkpoint(tmp_path / "b.safetensors", a__query=noise(9, 9), a__key=noise(9, 9), bias=noise(9))
    assert [d.name for d in deltas(base, tuned, include="query|key", exclude="key")] == ["a.query"]
    with pytest.raises(UsageError, match="regular expression"):
        list(deltas(base, tuned, include="("))


@pytest.fixture
def adapter(tmp_path):
    """A base of two matrices and a rank-3 adapter of the first, α/r = 2."""
    base = checkpoint(tmp_path / "base.safetensors", q__weight=noise(50, 40), k__weight=noise(50, 40, seed=1))
    folder = tmp_path / "adapter"
    folder.mkdir()
    b, a = noise(50, 3, seed=2) * 0.1, noise(3, 40, seed=3) * 0.1
    save_file(
        {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "org/base"}'
    )
    return base, open_checkpoint(folder), 2.0 * b.double() @ a.double()


def test_adapter_spectrum_never_forms_the_product(adapter, monkeypatch):
    base, tuned, exact = adapter
    (delta,) = deltas(base, tuned)
    assert isinstance(delta, LowRankDelta)
    monkeypatch.setattr(LowRankDelta, "dense", lambda self: pytest.fail("the product was formed"))
    A = delta.spectrum()
    assert np.allclose(A.values[:3], np.linalg.svd(exact.numpy(), compute_uv=False)[:3], rtol=1e-12)
    assert np.all(A.values[3:] == 0)
    assert A.frobenius == pytest.approx(float(exact.norm()), rel=1e-12)
    assert 0 < A.certificate.storage_floor < 1e-5 * A.values[0]  # factors are stored in float32


def test_adapter_difference_agrees_with_the_formed_product(adapter):
    base, tuned, exact = adapter
    (delta,) = deltas(base, tuned)
    found = delta.difference()
    assert found.frobenius == pytest.approx(float(exact.norm()), rel=1e-6)
    assert found.base_frobenius == pytest.approx(float(base["q.weight"].double().norm()), rel=1e-12)
    assert torch.allclose(delta.dense().double(), exact, atol=1e-6)


def test_merge_loss_is_what_rounding_to_the_base_dtype_loses(tmp_path, adapter):
    _, tuned, exact = adapter
    w = noise(50, 40).bfloat16()
    base = checkpoint(tmp_path / "half.safetensors", q__weight=w)
    (delta,) = deltas(base, tuned)
    merged = (w.double() + exact).float().bfloat16().double()
    expected = float((merged - (w.double() + exact)).norm() / exact.norm())
    assert expected > 0.01
    # Δ is formed in float32 before it is added: 1e-7 of W against a loss of 2^-9 of W
    assert delta.difference().merge_loss == pytest.approx(expected, rel=1e-3)


def test_pairing_with_an_adapter_lists_what_it_leaves(adapter):
    base, tuned, _ = adapter
    pairing, found = pair_checkpoints(base, tuned)
    assert {pair.name: pair.status for pair in pairing.pairs} == {"q.weight": "ok", "k.weight": "unchanged"}
    assert list(found) == ["q.weight"]


def test_an_adapter_is_no_base(adapter):
    base, tuned, _ = adapter
    with pytest.raises(UsageError, match="org/base"):
        list(deltas(tuned, base))


def test_spectrum_of_a_delta_carries_the_floor(tmp_path):
    w = noise(64, 48).bfloat16()
    base = checkpoint(tmp_path / "a.safetensors", w=w)
    tuned = checkpoint(tmp_path / "b.safetensors", w=(w.float() * 1.1).bfloat16())
    (delta,) = deltas(base, tuned)
    A = delta.spectrum()
    assert A.certificate.storage_floor == delta.difference().floor.spectral > 0
    assert 0 < spectra.signal_rank(A) <= 48
