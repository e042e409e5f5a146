"""`compare` as a user meets it: every tensor a row, every status, journal and resume, memory, the same bytes always."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra import schedule
from spectra.errors import JournalBusy, JournalError, JournalMismatch, MismatchError, UsageError
from spectra.journal import Journal
from spectra.record import COLUMNS
from spectra.run import Run
from tests.planted import planted


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.04


@pytest.fixture
def pair(tmp_path):
    """A small transformer-like pair with one tensor of every kind."""
    update = torch.from_numpy(planted(np.array([0.5, 0.3, 0.1]), 96, 64)).float()
    base = {
        "model.embed.weight": noise(200, 32),
        "model.layers.0.attn.q_proj.weight": noise(96, 64, seed=1),
        "model.layers.0.attn.k_proj.weight": noise(48, 48, seed=2),
        "model.layers.0.norm.weight": torch.ones(64),
        "model.layers.1.attn.q_proj.weight": noise(96, 64, seed=3).bfloat16(),
        "model.layers.1.attn.k_proj.weight": noise(48, 48, seed=4),
        "model.layers.1.conv.weight": noise(8, 4, 3, 3, seed=5),
        "model.position_ids": torch.arange(10),
        "model.mask": torch.ones(3, 3, dtype=torch.bool),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["model.layers.0.attn.q_proj.weight"] += update
    tuned["model.layers.1.attn.q_proj.weight"] = (base["model.layers.1.attn.q_proj.weight"].float() + 0.001).bfloat16()
    tuned["model.layers.1.attn.k_proj.weight"][3, 4] = float("nan")
    tuned["model.layers.0.norm.weight"] *= 1.5
    tuned["model.layers.1.conv.weight"] *= 1.1
    tuned["model.mask"][0, 0] = False
    del tuned["model.position_ids"]
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_every_tensor_gets_a_row_with_its_status(pair):
    run = spectra.compare(*pair, progress=False)
    assert dict(zip(run.frame.name, run.frame.status, strict=True)) == {
        "model.embed.weight": "unchanged",
        "model.layers.0.attn.q_proj.weight": "ok",
        "model.layers.0.attn.k_proj.weight": "unchanged",
        "model.layers.0.norm.weight": "vector",
        "model.layers.1.attn.q_proj.weight": "ok",
        "model.layers.1.attn.k_proj.weight": "nonfinite",
        "model.layers.1.conv.weight": "ok",
        "model.position_ids": "base_only",
        "model.mask": "integer",
    }
    assert list(run.frame.columns) == list(COLUMNS)
    rows = run.frame.set_index("name")
    assert "1 in the difference" in rows.reason["model.layers.1.attn.k_proj.weight"]
    assert rows.reason["model.mask"] == "1 of 9 entries differ"


def test_planted_update_is_found(pair):
    row = spectra.compare(*pair, progress=False).frame.set_index("name").loc["model.layers.0.attn.q_proj.weight"]
    # float32 storage rounds the update at 1e-9: five digits are exact
    assert np.allclose(row.singular_values[:3], [0.5, 0.3, 0.1], atol=1e-6)
    assert row.signal_rank == 3
    assert row.rank_90 == 2  # .25 + .09 of .35 is 97 %
    assert row.error_r1 == pytest.approx(math.sqrt(0.1 / 0.35), rel=1e-5)
    assert row.layer == 0
    assert row.role == "attn.q_proj"
    assert (row.rows, row.cols) == (96, 64)


def test_convolutions_are_measured_flat(pair):
    row = spectra.compare(*pair, progress=False).frame.set_index("name").loc["model.layers.1.conv.weight"]
    assert (row.rows, row.cols) == (8, 36)
    assert row.relative_frobenius == pytest.approx(0.1, rel=1e-5)


def test_run_gives_spectra_back_and_says_why_not(pair):
    run = spectra.compare(*pair, progress=False)
    A = run.spectrum("model.layers.0.attn.q_proj.weight")
    assert A.complete
    assert A.certificate.storage_floor > 0
    assert spectra.energy_rank(A, 0.9) == 2
    with pytest.raises(UsageError, match="vector"):
        run.spectrum("model.layers.0.norm.weight")
    with pytest.raises(KeyError, match="no tensor"):
        run.spectrum("nothing")


def test_groups_card_and_plots(pair):
    run = spectra.compare(*pair, progress=False)
    assert list(run.groups.role) == ["embed", "attn.q_proj", "attn.k_proj", "conv"] or "attn.q_proj" in set(
        run.groups.role
    )
    card = run._repr_html_()
    assert "<svg" in card
    assert "attn.q_proj" in card
    for plot in (run.plot.spectra, run.plot.truncation_error, run.plot.relative_change):
        assert plot().has_data()


def test_save_and_load_round_trip_to_the_same_bytes(pair, tmp_path):
    run = spectra.compare(*pair, progress=False)
    first = run.save(tmp_path / "one").read_bytes()
    loaded = Run.load(tmp_path / "one")
    pd.testing.assert_frame_equal(loaded.frame, run.frame)
    assert loaded.info == json.loads(json.dumps(run.info))
    assert loaded.save(tmp_path / "two").read_bytes() == first


@pytest.mark.parametrize("jobs", [1, 3])
def test_bytes_do_not_depend_on_jobs(pair, tmp_path, jobs):
    one = spectra.compare(*pair, jobs=2, progress=False).save(tmp_path / "two").read_bytes()
    assert spectra.compare(*pair, jobs=jobs, progress=False).save(tmp_path / "other").read_bytes() == one


def test_resume_measures_nothing_twice_and_gives_the_same_bytes(pair, tmp_path, monkeypatch):
    whole = spectra.compare(*pair, progress=False).save(tmp_path / "whole").read_bytes()
    real, count = schedule.measured, 0

    def dies_after_three(*args):
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(schedule, "measured", dies_after_three)
    with pytest.raises(KeyboardInterrupt):
        spectra.compare(*pair, out=tmp_path / "out", jobs=1, progress=False)
    seen = []
    monkeypatch.setattr(schedule, "measured", lambda *args: seen.append(args[0].name) or real(*args))
    run = spectra.compare(*pair, out=tmp_path / "out", jobs=1, progress=False)
    assert len(seen) == 8 - 3
    assert run.save(tmp_path / "resumed").read_bytes() == whole
    seen.clear()
    spectra.compare(*pair, out=tmp_path / "out", progress=False)
    assert seen == []
    spectra.compare(*pair, out=tmp_path / "out", resume=False, progress=False)
    assert len(seen) == 8


def test_changed_flags_or_inputs_are_refused_by_name(pair, tmp_path):
    spectra.compare(*pair, out=tmp_path / "out", progress=False)
    with pytest.raises(JournalMismatch, match=r"settings.seed was 0, is 7.*--no-resume"):
        spectra.compare(*pair, out=tmp_path / "out", seed=7, progress=False)
    base, tuned = pair
    save_file({"model.embed.weight": noise(200, 32)}, tuned)
    with pytest.raises(JournalMismatch, match=r"tuned.digests"):
        spectra.compare(base, tuned, out=tmp_path / "out", allow_partial=True, progress=False)


def test_a_second_run_in_the_same_folder_is_told_who_owns_it(pair, tmp_path):
    with Journal(tmp_path / "out", {}), pytest.raises(JournalBusy, match=r"process [0-9]+ on"):
        spectra.compare(*pair, out=tmp_path / "out", progress=False)


def test_journal_refuses_links_and_strange_files(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(JournalError, match="symbolic link"):
        Journal(tmp_path / "link", {})
    (tmp_path / "real" / "journal.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 40)
    with pytest.raises(JournalError, match="not a journal"):
        Journal(tmp_path / "real", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="output folder"):
        Journal(tmp_path / "file", {})
    with Journal(tmp_path / "real", {}, resume=False) as journal:  # and begins anew where it is asked to
        assert journal.rows() == {}


def test_too_few_matches_are_refused_with_the_nearest_names(pair, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"model.layers.0.attn.q_project.weight": noise(96, 64), "model.embed.weight": noise(200, 32)}, other)
    with pytest.raises(MismatchError, match=r"(?s)1 of 8.*q_proj.*allow-partial") as error:
        spectra.compare(pair[0], other, progress=False)
    assert error.value.exit_code == 3
    run = spectra.compare(pair[0], other, allow_partial=True, progress=False)
    assert (run.frame.status == "ok").sum() == 1 or (run.frame.status == "unchanged").sum() == 1


def test_arguments_that_contradict_each_other(pair):
    with pytest.raises(UsageError, match="rank"):
        spectra.compare(*pair, rank=4, exact=True)
    with pytest.raises(UsageError, match="rank"):
        spectra.compare(*pair, rank=0)
    with pytest.raises(UsageError, match="no tensor is left"):
        spectra.compare(*pair, include="nothing here")
    with pytest.raises(UsageError, match="jobs"):
        spectra.compare(*pair, jobs=0)


def test_too_little_memory_fails_the_matrix_and_not_the_run(pair):
    run = spectra.compare(*pair, max_memory=150_000, progress=False)
    rows = run.frame.set_index("name")
    assert rows.status["model.layers.0.attn.q_proj.weight"] == "failed"
    assert "MB are left" in rows.reason["model.layers.0.attn.q_proj.weight"]
    assert rows.status["model.layers.0.norm.weight"] == "vector"


def test_plan_says_what_would_be_done_and_reads_nothing(pair, monkeypatch):
    from spectra.checkpoints import Checkpoint

    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    text = "\n".join(spectra.plan(*pair).lines())
    assert "7 of 7 tensors match" in text
    assert "bidiagonal" in text


def test_truncated_rows_carry_certified_intervals(tmp_path):
    update = planted(np.arange(1, 501) ** -0.8, 500, 500)
    w = noise(500, 500).double()
    save_file({"w": w}, tmp_path / "a.safetensors")
    save_file({"w": w + torch.from_numpy(update)}, tmp_path / "b.safetensors")
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    exact = spectra.compare(*files, exact=True, progress=False).frame.iloc[0]
    cut = spectra.compare(*files, rank=16, progress=False).frame.iloc[0]
    assert len(exact.singular_values) == 500
    assert len(cut.singular_values) == 16
    assert "Lanczos" in cut.route
    assert pd.isna(cut.entropy_rank)
    for name in (
        "entropy_rank",
        "participation_ratio",
        "nuclear_norm",
        "rank_90",
        "rank_99",
        "error_r8",
        "error_r64",
        "stable_rank",
    ):
        low, high = cut[f"{name}_low"], cut[f"{name}_high"]
        assert low * (1 - 1e-9) <= exact[name] <= high * (1 + 1e-9), name
    assert np.all(cut.singular_values <= exact.singular_values[:16] * (1 + 1e-6))
    assert np.all(exact.singular_values[:16] <= cut.singular_values_high * (1 + 1e-9))


def test_scaled_eight_bit_weights_are_refused_by_row_and_bare_ones_are_read(tmp_path):
    w = noise(32, 32).to(torch.float8_e4m3fn)
    t = (w.float() * 1.5).to(torch.float8_e4m3fn)
    save_file(
        {"bare.weight": w, "q.weight": w.clone(), "q.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "a.safetensors"
    )
    save_file(
        {"bare.weight": t, "q.weight": t.clone(), "q.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "b.safetensors"
    )
    run = spectra.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=False)
    rows = run.frame.set_index("name")
    assert rows.status["bare.weight"] == "ok"
    assert rows.frobenius["bare.weight"] == pytest.approx(float((t.double() - w.double()).norm()), rel=1e-12)
    assert rows.status["q.weight"] == "unsupported_dtype"
    assert "q.weight_scale_inv" in rows.reason["q.weight"]


def test_square_kernels_turn_with_the_others(tmp_path):
    """GPT-2's attn.c_proj is square: nothing but its neighbours tells that it is stored transposed."""
    base = {
        f"h.{i}.{name}.weight": noise(*shape, seed=i)
        for i in range(2)
        for name, shape in (("c_fc", (32, 96)), ("c_proj", (32, 32)))
    }
    tuned = {name: (w * 1.5).T.contiguous() for name, w in base.items()}
    save_file(base, tmp_path / "a.safetensors")
    save_file(tuned, tmp_path / "b.safetensors")
    frame = spectra.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=False).frame
    assert np.allclose(frame.relative_frobenius, 0.5, atol=1e-6)
    assert frame.reason.str.contains("transposed").all()


def test_rounding_is_never_said_to_be_what_stands_above_the_floor(tmp_path):
    """Rank 8 at 0.2 % on a base that lies on the bf16 grid: less is rounded than the cells of the grid predict."""
    base = noise(384, 384).bfloat16()
    update = planted(np.ones(8), 384, 384)
    update *= 0.002 * float(base.double().norm()) / np.linalg.norm(update)
    tuned = (base.double() + torch.from_numpy(update)).bfloat16()
    save_file({"w": base}, tmp_path / "a.safetensors")
    save_file({"w": tuned}, tmp_path / "b.safetensors")
    row = spectra.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=False).frame.iloc[0]
    error = float((tuned.double() - base.double() - torch.from_numpy(update)).norm())
    assert row.signal_rank == 8
    # the update itself sticks out into the rest by a few per cent of its norm
    assert row.storage_frobenius == pytest.approx(error, rel=0.1)


def test_inputs_are_read_only_and_devices_are_checked_first(pair, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    pair[0].rename(folder / "model.safetensors")
    with pytest.raises(UsageError, match="folder of its own"):
        spectra.compare(folder, pair[1], out=folder, progress=False)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    with pytest.raises(UsageError, match="device 'nonsense'"):
        spectra.plan(folder, pair[1], device="nonsense")


def test_the_real_pair(real_pair):
    """THE pair: every encoder matrix is there, the pooler is unchanged, and the decay is as slow as it was found."""
    run = spectra.compare(*real_pair, progress=False)
    counts = run.frame.status.value_counts().to_dict()
    assert counts == {"vector": 63, "ok": 39, "unchanged": 1, "base_only": 1}
    rows = run.frame.set_index("name")
    assert rows.status["pooler.dense.weight"] == "unchanged"
    encoder = run.frame[run.frame.layer.notna() & (run.frame.status == "ok")]
    assert len(encoder) == 36
    assert encoder.relative_frobenius.between(0.007, 0.026).all()
    held = 1 - encoder.error_r8**2  # share of the energy in eight directions
    assert held.between(0.2, 0.6).all()
    assert encoder.rank_90.between(55, 190).all()


@pytest.fixture
def batched(monkeypatch):
    """The path that an accelerator takes, on the CPU."""
    monkeypatch.setattr(schedule, "_batched", lambda device: True)


def many(tmp_path, poison=()):
    base = {f"model.layers.{i}.mlp.up.weight": noise(320, 288, seed=i) for i in range(6)}
    base |= {f"model.layers.{i}.norm.weight": torch.ones(288) for i in range(6)}
    tuned = {name: tensor + noise(*tensor.shape, seed=99) * 0.1 for name, tensor in base.items()}
    tuned["model.layers.2.mlp.up.weight"] = base["model.layers.2.mlp.up.weight"]
    for name in poison:
        tuned[name] = torch.full_like(tuned[name], math.nan)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_a_batch_gives_what_one_at_a_time_gives(tmp_path, monkeypatch):
    pair = many(tmp_path, poison=["model.layers.4.mlp.up.weight"])
    alone = spectra.compare(*pair, progress=False).frame.set_index("name")
    monkeypatch.setattr(schedule, "_batched", lambda device: True)
    together = spectra.compare(*pair, progress=False).frame.set_index("name")
    assert together.status.to_dict() == alone.status.to_dict()
    assert (alone.status == "nonfinite").sum() == 1
    assert (alone.status == "unchanged").sum() == 1
    assert together.route.str.contains("batched").sum() == 4
    for name in alone.index[alone.status == "ok"]:
        a, b = alone.singular_values[name], together.singular_values[name]
        assert np.abs(a - b).max() <= 2 * alone.roundoff[name]  # both within their own certificate
        # What lies below the floor is a norm of as many values, each within the route's roundoff.
        within = 2 * alone.roundoff[name] * min(alone.rows[name], alone.cols[name]) ** 0.5
        assert together.storage_frobenius[name] == pytest.approx(alone.storage_frobenius[name], rel=1e-12, abs=within)


@pytest.mark.usefixtures("batched")
def test_a_batched_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    pair = many(tmp_path)
    monkeypatch.setattr(schedule, "BATCH", 4)
    whole = spectra.compare(*pair, progress=False).save(tmp_path / "whole").read_bytes()
    real, sizes = schedule.measured_together, []

    def dies_in_the_second(deltas, records, question):
        if len(sizes) == 1:
            raise KeyboardInterrupt
        sizes.append(len(deltas))
        return real(deltas, records, question)

    monkeypatch.setattr(schedule, "measured_together", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        spectra.compare(*pair, out=tmp_path / "out", progress=False)
    monkeypatch.setattr(schedule, "measured_together", real)
    run = spectra.compare(*pair, out=tmp_path / "out", progress=False)
    assert sizes == [4]
    assert run.save(tmp_path / "resumed").read_bytes() == whole
