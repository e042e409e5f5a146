"""The numbers of a record: planted answers, and everything once more by dense float64 algebra."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.checkpoints import Adapter
from spectra.delta import AdapterDelta, LowRankDelta
from spectra.pairwise import RANKS, row, unit
from spectra.pairwise.ranks import TOP
from tests.pairwise.small import SHAPES, base_tensors, svd, update, write_checkpoint, write_lora

NAMES = list(SHAPES)
AT8 = RANKS.index(8)


@pytest.fixture(scope="module")
def pair(family):
    return spectra.geometry(family.full, family.found, family.base, progress=False)


def test_what_an_adapter_found_is_measured_as_planted(pair):
    for name in NAMES:
        record = pair.record(name)
        found = record["pairs"][0]
        # The full fine-tune is stored in float32, 1e-8 of the weights: seven digits of the update.
        assert found["overlap_left"][AT8][AT8] == pytest.approx(1.0, abs=1e-10)
        assert found["overlap_right"][AT8][AT8] == pytest.approx(1.0, abs=1e-10)
        assert found["capture"]["a_in_b"]["both"][AT8] == pytest.approx(record["updates"][0]["optimum"][AT8], abs=1e-7)
        assert found["capture"]["b_in_a"]["both"][AT8] == pytest.approx(1.0, abs=1e-7)
        assert found["cosine"] == pytest.approx(found["norm_ratio"], abs=1e-7)  # ⟨A, A₈⟩ = ‖A₈‖²
        assert max(found["angles_left"][:8]) < 1e-6
        assert record["updates"][0]["resolved"] >= 8
        assert record["updates"][1]["rank_limit"] == record["updates"][1]["held"] == 8


def test_a_dense_update_agrees_with_dense_algebra(pair, family):
    for name in NAMES:
        record = pair.record(name)
        mine, pairing = record["updates"][0], record["pairs"][0]
        delta = (family.tuned[name] - family.tensors[name]).double().numpy()  # rounded once, as floats subtract
        weights = family.tensors[name].double().numpy()
        u, s, v = svd(delta, 32)
        assert mine["frobenius"] == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert mine["values"][:32] == pytest.approx(list(s), abs=1e-9)
        optimum = np.cumsum(s**2) / np.linalg.norm(delta) ** 2
        assert mine["optimum"][AT8] == pytest.approx(optimum[7], abs=1e-10)
        core = np.linalg.norm(u[:, :8].T @ weights @ v[:, :8])
        assert mine["amplification"][AT8] == pytest.approx(np.linalg.norm(delta) / core, rel=1e-6)
        random = np.linalg.norm(delta) * math.sqrt(delta.size) / (8 * np.linalg.norm(weights))
        assert mine["amplification_random"][AT8] == pytest.approx(random, rel=1e-12)
        b, a = family_factors(family.found, name)
        x, _, y = svd(b @ a, 8)
        overlap = np.linalg.norm(u[:, :4].T @ x[:, :6]) ** 2 / 4
        assert pairing["overlap_left"][RANKS.index(4)][RANKS.index(6)] == pytest.approx(overlap, abs=1e-10)
        half = np.linalg.norm(x.T @ delta) ** 2 / np.linalg.norm(delta) ** 2
        assert pairing["capture"]["a_in_b"]["left"][AT8] == pytest.approx(half, abs=1e-10)
        half = np.linalg.norm(delta @ y) ** 2 / np.linalg.norm(delta) ** 2
        assert pairing["capture"]["a_in_b"]["right"][AT8] == pytest.approx(half, abs=1e-10)


def family_factors(folder, name):
    adapter = spectra.open_checkpoint(folder)
    module = name.removesuffix(".weight")
    a, b = (adapter[f"base_model.model.{module}.lora_{side}.weight"].double().numpy() for side in "AB")
    return b, a


def test_adapters_give_the_numbers_of_their_dense_products(tmp_path):
    """Two adapters against two full fine-tunes that store exactly their products, in float64."""
    base = {name: tensor for name, tensor in base_tensors().items() if name in SHAPES}
    sides, dense = [], []
    for seed in (1, 2):
        factors, merged = {}, {}
        for i, (name, shape) in enumerate(SHAPES.items()):
            shared = update(shape, [1.0, 0.7, 0.5], seed=i)[1:]
            own = update(shape, [1.0, 0.7, 0.5], seed=100 * seed + i)[1:]
            u, v = (0.8 * s + 0.6 * o for s, o in zip(shared, own, strict=True))
            b, a = torch.from_numpy(u * [1.0, 0.7, 0.5]).float(), torch.from_numpy(v.T.copy()).float()
            factors[name] = b, a
            merged[name] = base[name].double() + b.double() @ a.double()
        sides.append(write_lora(tmp_path / f"lora{seed}", factors, base="x", rank=3))
        dense.append(write_checkpoint(tmp_path / f"full{seed}", merged))
    folder = write_checkpoint(tmp_path / "base", {name: tensor.double() for name, tensor in base.items()})
    thin = spectra.geometry(*sides, folder, progress=False)
    whole = spectra.geometry(*dense, folder, progress=False)
    for name in SHAPES:
        one, two = thin.record(name), whole.record(name)
        x, y = one["pairs"][0], two["pairs"][0]
        # W + Δ is rounded once to float64, 1e-16 of W, against values of about .5.
        for key in ("cosine", "norm_ratio"):
            assert x[key] == pytest.approx(y[key], abs=1e-12)
        for side in ("left", "right"):
            for i in range(3):
                assert x[f"overlap_{side}"][i][:3] == pytest.approx(y[f"overlap_{side}"][i][:3], abs=1e-10)
            assert x[f"overlap_{side}"][3] == [None] * len(RANKS)
        for way in ("a_in_b", "b_in_a"):
            for side in ("left", "right", "both"):
                assert x["capture"][way][side][:3] == pytest.approx(y["capture"][way][side][:3], abs=1e-10)
        for mine, theirs in zip(one["updates"], two["updates"], strict=True):
            assert mine["kind"] == "factors"
            assert theirs["kind"] == "dense"
            assert mine["values"] == pytest.approx(theirs["values"][:3], rel=1e-12)
            assert mine["amplification"][:3] == pytest.approx(theirs["amplification"][:3], rel=1e-9)
            assert mine["intruder_cosines"] == pytest.approx(theirs["intruder_cosines"], abs=1e-7)


def test_an_adapter_is_never_formed(family, monkeypatch):
    def refuse(*_):
        pytest.fail("an adapter's update was formed")

    for method in ("dense", "difference"):
        monkeypatch.setattr(LowRankDelta, method, refuse)
        monkeypatch.setattr(AdapterDelta, method, refuse)
    monkeypatch.setattr(Adapter, "delta", refuse)
    found = spectra.geometry(family.found, family.other, progress=False)
    assert (found.frame.status == "ok").sum() == 2


def test_intruders_are_those_that_were_planted(tmp_path):
    """Three directions outside the span of W's leading ones, larger than all of them."""
    shape = (160, 136)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=generator) * 0.1
    b, a = torch.randn(160, 3, generator=generator), torch.randn(3, 136, generator=generator)
    scale = 10 * float(torch.linalg.matrix_norm(w, 2)) / float(torch.linalg.matrix_norm(b @ a, 2))
    base = write_checkpoint(tmp_path / "base", {"q.weight": w})
    big = write_lora(tmp_path / "big", {"q.weight": (b * scale, a)}, base=str(base), rank=3)
    small = write_lora(tmp_path / "small", {"q.weight": (b * scale * 1e-5, a)}, base=str(base), rank=3)
    record = spectra.geometry(big, small, progress=False).record("q.weight")
    large, little = (np.array(update["intruder_cosines"]) for update in record["updates"])
    assert len(large) == len(little) == TOP
    assert record["basis"] == 136
    assert (large[:3] < 0.5).all()
    assert (little > 0.99).all()
    u = svd(w.double().numpy(), 136)[0]
    tuned = svd((w.double() + scale * b.double() @ a.double()).numpy(), TOP)[0]
    # Of float32 sums the vectors are those to 1e-7 over the relative gaps of noise, about 1e-2.
    assert large == pytest.approx(np.abs(u.T @ tuned).max(0), abs=1e-4)


def test_every_kind_of_tensor_has_its_status(tmp_path):
    base = base_tensors()
    one = {name: tensor.clone() for name, tensor in base.items()}
    two = {name: tensor.clone() for name, tensor in base.items()}
    query, up, second, last = SHAPES
    one[query] += 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    two[query] += 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(2))
    one[up] *= 1.1
    two[second][0, 0] = math.nan
    one[last] *= 1.1
    two[last] *= 1.2
    one["new.head.weight"] = torch.ones(3, 3)
    one["encoder.layer.0.norm.weight"] = base["encoder.layer.0.norm.weight"] * 2
    paths = [write_checkpoint(tmp_path / n, t) for n, t in (("one", one), ("two", two), ("base", base))]
    found = spectra.geometry(*paths, allow_partial=True, progress=False)
    assert {record["name"]: record["status"] for record in found.records} == {
        query: "ok",
        up: "one_sided",
        second: "nonfinite",
        last: "ok",
        "encoder.layer.0.norm.weight": "vector",
        "encoder.positions": "integer",
        "new.head.weight": "tuned_only",
    }
    assert found.record(second)["reason"].startswith("two: ")
    assert [update["kind"] for update in found.record(second)["updates"]] == ["none", "none"]
    alone = found.record(up)
    assert [update["kind"] for update in alone["updates"]] == ["dense", "none"]
    assert alone["updates"][0]["relative_frobenius"] == pytest.approx(0.1, rel=1e-5)
    assert alone["pairs"] == []
    # Both scaled the same matrix: one direction, twice the length.
    same = found.record(last)["pairs"][0]
    assert same["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert same["norm_ratio"] == pytest.approx(2.0, rel=1e-5)


def test_a_tensor_that_nobody_changed_is_unchanged(family, tmp_path):
    base = base_tensors()
    one = dict(base) | {NAMES[0]: base[NAMES[0]] * 1.1}
    paths = [write_checkpoint(tmp_path / name, tensors) for name, tensors in (("a", one), ("b", one), ("base", base))]
    found = spectra.geometry(*paths, progress=False)
    assert found.record(NAMES[1])["status"] == "unchanged"
    assert found.record(NAMES[0])["status"] == "ok"


def test_updates_of_different_shapes_fail_the_tensor_and_not_the_rest(tmp_path):
    """One of two resized the embeddings."""
    base = {"embed.weight": torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), **base_tensors()}
    one = {name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    two = dict(one) | {"embed.weight": one["embed.weight"][:36].clone()}
    paths = [write_checkpoint(tmp_path / name, tensors) for name, tensors in (("a", one), ("b", two), ("base", base))]
    found = spectra.geometry(*paths, allow_partial=True, progress=False)
    record = found.record("embed.weight")
    assert record["status"] == "failed"
    assert record["reason"] == "MatrixError: b: 36 × 16 entries, where a has 40 × 16"
    assert found.record(NAMES[0])["status"] == "ok"


def of_three(tmp_path, spoil):
    """Three fine-tunes of one base, the first spoiled; compared, and compared without it."""
    base = {name: tensor for name, tensor in base_tensors().items() if name in SHAPES}
    base["embed.weight"] = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    paths = [write_checkpoint(tmp_path / "base", base)]
    for seed, label in enumerate(("bad", "one", "two"), 1):
        generator = torch.Generator().manual_seed(seed)
        tuned = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        if label == "bad":
            spoil(tuned)
        paths.append(write_checkpoint(tmp_path / label, tuned))
    base, bad, one, two = paths
    rest = {"allow_partial": True, "progress": False}
    return spectra.geometry(bad, one, base, also=[two], **rest), spectra.geometry(one, two, base, **rest)


def test_a_nan_in_one_of_three_leaves_the_other_two_compared(tmp_path):
    def spoil(tuned):
        tuned[NAMES[1]][3, 4] = math.nan

    three, two = of_three(tmp_path, spoil)
    record, without = three.record(NAMES[1]), two.record(NAMES[1])
    assert record["status"] == "ok"
    assert record["reason"].startswith("bad: ")
    assert [update.get("status", "") for update in record["updates"]] == ["nonfinite", "", ""]
    (pair,) = record["pairs"]
    assert (pair["a"], pair["b"]) == (1, 2)
    assert pair == without["pairs"][0] | {"a": 1, "b": 2}
    assert record["updates"][1:] == without["updates"]
    assert len(three.record(NAMES[0])["pairs"]) == 3
    assert list(three.pairs.matrices) == [4, 4, 5]


@pytest.mark.parametrize(("name", "rows", "status"), [("embed.weight", 36, "failed"), (NAMES[0], 40, "shape_mismatch")])
def test_one_of_three_that_is_resized_is_left_out_alone(tmp_path, name, rows, status):
    """An embedding that lost rows is compared in part, but not with whole ones; any other matrix does not match."""

    def spoil(tuned):
        tuned[name] = tuned[name][:rows].clone()

    three, two = of_three(tmp_path, spoil)
    record = three.record(name)
    assert record["status"] == "ok"
    assert [update.get("status", "") for update in record["updates"]] == [status, "", ""]
    assert record["updates"][0]["reason"].partition(": ")[2 if status == "failed" else 0].startswith("bad")
    assert record["pairs"] == [two.record(name)["pairs"][0] | {"a": 1, "b": 2}]


def test_a_resized_matrix_is_not_said_to_be_changed_by_one_alone(tmp_path):
    base = {NAMES[0]: base_tensors()[NAMES[0]], NAMES[1]: base_tensors()[NAMES[1]]}
    one = {name: tensor * 1.1 for name, tensor in base.items()}
    two = one | {NAMES[0]: one[NAMES[0]][:40].clone()}
    paths = [write_checkpoint(tmp_path / name, tensors) for name, tensors in (("a", one), ("b", two), ("base", base))]
    record = spectra.geometry(*paths, allow_partial=True, progress=False).record(NAMES[0])
    assert record["status"] == "shape_mismatch"
    assert record["reason"] == "b: shape (48, 48) in base, (40, 48) in tuned"


def test_an_update_that_is_no_float_is_said_to_be_unreadable(tmp_path):
    base = {name: tensor for name, tensor in base_tensors().items() if name in SHAPES}
    one = {name: tensor * 1.1 for name, tensor in base.items()}
    two = one | {NAMES[0]: torch.ones(48, 48, dtype=torch.int8)}
    paths = [write_checkpoint(tmp_path / name, tensors) for name, tensors in (("a", one), ("b", two), ("base", base))]
    record = spectra.geometry(*paths, progress=False).record(NAMES[0])
    assert record["status"] == "unsupported_dtype"
    assert "b: I8, where the base is F32" in record["reason"]


def test_what_is_said_of_bf16_copies_is_true_of_the_models_they_copy(tmp_path):
    """Two rounded fine-tunes: no leading subspace and no direction of the tuned matrix is turned further than said."""
    shape = (160, 136)
    # Half of the ten leading values stand apart, the rest lie as close as those of noise do.
    weights = update(shape, [2.0, 1.8, 1.6, 1.4, 1.2, *np.linspace(0.8, 0.7, 131)], seed=3)[0]
    deltas = [update(shape, np.arange(1, 17) ** -0.7 * size, seed=seed)[0] for seed, size in ((7, 0.3), (8, 0.05))]
    true = {"base": weights, "one": weights + deltas[0], "two": weights + deltas[1]}
    stored = {label: torch.from_numpy(w).bfloat16() for label, w in true.items()}
    base, one, two = (write_checkpoint(tmp_path / label, {"q.weight": w}) for label, w in stored.items())
    record = spectra.geometry(one, two, base, progress=False).record("q.weight")
    for delta, label, told in zip(deltas, ("one", "two"), record["updates"], strict=True):
        held = stored[label].double().numpy() - stored["base"].double().numpy()
        (u, _, v), (x, _, y) = svd(delta, 16), svd(held, 16)
        for i in range(1, 17):
            turned = max(np.linalg.norm(b[:, :i] - a[:, :i] @ (a[:, :i].T @ b[:, :i]), 2) for a, b in ((u, x), (v, y)))
            assert turned <= told["sines"][i - 1] + 1e-9
        # Rounding within the sixteen directions above the floor, an eighth of all, is not counted: 6 % of the norm.
        assert told["storage_frobenius"] == pytest.approx(np.linalg.norm(held - delta), rel=0.15)
        found, kept = svd(stored[label].double().numpy(), TOP)[0], svd(true[label], TOP)[0]
        sines = np.sqrt(np.maximum(1 - np.sum(found * kept, axis=0) ** 2, 0))
        clear = np.array(told["intruder_resolved"])
        assert sines[clear].max() <= 0.5
        assert 3 <= clear.sum() < TOP


def test_an_update_that_is_neither_dense_nor_low_rank_as_stored_is_measured(family, tmp_path):
    """IA3 scales the outputs of a layer: W ⊙ (l − 1), formed from the base."""
    name = NAMES[0]
    scale = torch.linspace(0.5, 1.5, 48).reshape(48, 1)
    folder = tmp_path / "ia3"
    folder.mkdir()
    save_file({f"base_model.model.{name.removesuffix('.weight')}.ia3_l": scale}, folder / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["query"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    record = spectra.geometry(folder, family.found, family.base, progress=False).record(name)
    delta = family.tensors[name].double().numpy() * (scale.double().numpy() - 1)
    assert record["updates"][0]["kind"] == "dense"
    assert record["updates"][0]["frobenius"] == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    b, a = family_factors(family.found, name)
    cosine = np.sum(delta * (b @ a)) / np.linalg.norm(delta) / np.linalg.norm(b @ a)
    assert record["pairs"][0]["cosine"] == pytest.approx(cosine, abs=1e-6)


def test_rank_past_the_smaller_dimension_holds_all_there_is(family):
    record = spectra.geometry(family.full, family.found, family.base, rank=500, progress=False).record(NAMES[0])
    assert record["updates"][0]["held"] == 48
    assert record["pairs"][0]["overlap_left"][-1][0] is None


def test_few_directions_can_be_asked_for(family):
    record = spectra.geometry(family.full, family.found, family.base, rank=2, progress=False).record(NAMES[0])
    assert [update["held"] for update in record["updates"]] == [2, 2]
    assert record["updates"][1]["rank_limit"] == 8
    assert len(record["updates"][0]["values"]) == 2


def test_certified_directions_of_a_large_matrix_agree_with_all(tmp_path, monkeypatch):
    """Past the size up to which everything is taken: a sketch, without intruders."""
    shape = (700, 640)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=generator) * 0.1
    delta, u, v = update(shape, np.linspace(3.0, 1.0, 10), seed=5)
    noise = torch.randn(*shape, generator=generator).double() * 1e-3
    base = write_checkpoint(tmp_path / "base", {"q.weight": w})
    full = write_checkpoint(tmp_path / "full", {"q.weight": (w.double() + torch.from_numpy(delta) + noise).float()})
    lora = write_lora(tmp_path / "lora", {"q.weight": (u[:, :4], v[:, :4].T)}, base=str(base), rank=4)
    whole = spectra.geometry(full, lora, base, rank=16, progress=False).record("q.weight")
    monkeypatch.setattr(unit, "EXACT_BELOW", 256)
    cut = spectra.geometry(full, lora, base, rank=16, progress=False).record("q.weight")
    assert "Lanczos" in cut["route"]
    assert "basis" in whole
    assert "basis" not in cut
    assert cut["updates"][0]["resolved"] >= 10
    error = cut["pairs"][0]["overlap_left_error"][AT8][RANKS.index(4)]
    assert abs(cut["pairs"][0]["overlap_left"][AT8][RANKS.index(4)] - 1.0) < max(error, 1e-4)
    assert cut["pairs"][0]["cosine"] == pytest.approx(whole["pairs"][0]["cosine"], abs=1e-12)
    small = [cut["pairs"][0]["capture"]["a_in_b"]["both"][i] for i in range(3)]
    assert small == pytest.approx([whole["pairs"][0]["capture"]["a_in_b"]["both"][i] for i in range(3)], abs=1e-6)


def test_the_floor_of_nf4_is_what_quantizing_does():
    w = torch.randn(300, 256, generator=torch.Generator().manual_seed(3)) * 0.05
    from spectra.quantize import quantize

    error = (w - quantize(w, "nf4").dequantize()).double()
    # The floor adds the largest row and column norm of the error: at least the norm, and for noise close to it.
    norm = float(torch.linalg.matrix_norm(error, 2))
    assert norm * 0.95 < row.nf4_floor(w) < 1.3 * norm


def test_blurred_bases_resolve_fewer_directions(pair):
    for name in NAMES:
        for mine in pair.record(name)["updates"]:
            assert 0 <= mine["resolved_nf4"] <= mine["resolved"] <= mine["held"]
