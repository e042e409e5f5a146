"""Which base, which tensors, in what order, within what: a geometry as a user asks for it."""

import json
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import spectra
from spectra.checkpoints import Checkpoint
from spectra.errors import CheckpointNotFound, JournalMismatch, MismatchError, UnsafeCheckpoint, UsageError
from spectra.pairwise import Geometry, plan, plan_geometry
from spectra.pairwise.opening import short_labels
from spectra.report.pairs.build import build_report
from tests.pairwise.small import SHAPES, base_tensors, write_checkpoint, write_lora

NAMES = list(SHAPES)


def test_adapters_name_their_base(family):
    todo = plan_geometry(family.found, family.other)
    assert str(todo.base.root) == str(family.base.resolve())
    assert todo.notes == ()


def test_a_base_beside_the_adapters_is_found(tmp_path):
    base = write_checkpoint(tmp_path / "base", base_tensors())
    factors = {NAMES[0]: (torch.ones(48, 1), torch.ones(1, 48))}
    adapters = [write_lora(tmp_path / name, factors, base="../base", rank=1) for name in "ab"]
    found = spectra.geometry(*adapters, progress=False)
    assert found.record(NAMES[0])["pairs"][0]["cosine"] == pytest.approx(1.0)
    assert found.info["base"]["ref"] == str(base.resolve())


def test_runs_bring_their_base_and_are_checked_against_it(family, tmp_path):
    base = write_checkpoint(tmp_path / "base", family.tensors)
    run = spectra.compare(base, family.full, progress=False)
    direct = spectra.geometry(family.full, family.other, base, progress=False)
    by_run = run.compare(family.other, progress=False)
    assert by_run.records == direct.records
    assert any("names" in note for note in by_run.info["notes"])  # the adapter names another copy of the base
    write_checkpoint(tmp_path / "base", family.tensors | {NAMES[0]: family.tensors[NAMES[0]] * 2})
    with pytest.raises(MismatchError, match="changed since the run"):
        run.compare(family.other, progress=False)


def test_runs_of_different_bases_are_refused_by_name(family, tmp_path):
    other = write_checkpoint(tmp_path / "other", base_tensors(seed=9))
    runs = [spectra.compare(base, family.full, progress=False) for base in (family.base, other)]
    with pytest.raises(UsageError, match=f"different bases, .*base and .*{other.name}"):
        runs[0].compare(runs[1], progress=False)


def test_what_names_no_base_says_how_to_give_one(family):
    with pytest.raises(UsageError, match=r"full does not say .*--base REF \(base=REF\)"):
        spectra.geometry(family.full, family.found)


def test_different_bases_are_refused_with_both_names(family, tmp_path):
    factors = {NAMES[0]: (torch.ones(48, 1), torch.ones(1, 48))}
    stranger = write_lora(tmp_path / "stranger", factors, base="org/another-model", rank=1)
    with pytest.raises(UsageError, match=r"base, .*stranger of org/another-model") as error:
        spectra.geometry(family.found, stranger)
    assert str(family.base) in str(error.value)
    given = plan_geometry(family.found, stranger, family.base)
    assert len(given.notes) == 1
    assert "names org/another-model as its base" in given.notes[0]


def test_an_adapter_is_no_base(family):
    with pytest.raises(UsageError, match="is an adapter"):
        spectra.geometry(family.full, family.found, family.other)


def test_an_update_of_another_model_is_named(family, tmp_path):
    stranger = write_checkpoint(tmp_path / "stranger", {f"other.{i}.weight": torch.ones(5, 5) for i in range(9)})
    with pytest.raises(MismatchError, match="stranger"):
        spectra.geometry(family.full, stranger, family.base)
    factors = {"decoder.query.weight": (torch.ones(48, 1), torch.ones(1, 48))}
    lost = write_lora(tmp_path / "lost", factors, base=str(family.base), rank=1)
    with pytest.raises(MismatchError, match="lost"):
        spectra.geometry(family.full, lost, family.base)


def test_nothing_in_common_lists_what_each_changes(family, tmp_path):
    one, two = (
        write_lora(tmp_path / n, {name: (torch.ones(s[0], 1), torch.ones(1, s[1]))}, base=str(family.base), rank=1)
        for n, (name, s) in zip("ab", list(SHAPES.items())[:2], strict=True)
    )
    with pytest.raises(MismatchError, match=f"(?s)no tensor is changed by two.*a: {NAMES[0]}.*b: {NAMES[1]}"):
        spectra.geometry(one, two)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"include": "nothing here"}, "no tensor is left"),
        ({"include": "("}, "not a regular expression"),
        ({"jobs": 0}, "jobs = 0"),
        ({"device": "nonsense"}, "device 'nonsense'"),
    ],
)
def test_arguments_that_cannot_work(family, flags, words):
    with pytest.raises(UsageError, match=words):
        spectra.geometry(family.full, family.found, family.base, **flags)


def test_a_missing_base_is_a_clean_error(family):
    with pytest.raises(CheckpointNotFound):
        spectra.geometry(family.full, family.found, family.base / "nowhere")


def test_nothing_is_written_among_the_inputs(family):
    for folder in (family.base, family.full, family.found):
        with pytest.raises(UsageError, match="folder of its own"):
            spectra.geometry(family.full, family.found, family.base, out=folder, progress=False)


def test_a_plan_reads_no_tensor_and_says_what_it_would_do(family, monkeypatch):
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    text = "\n".join(plan_geometry(family.full, family.found, family.base).lines())
    assert "full: 5 of 5 tensors match" in text
    assert "4 × adapter factors and every singular value, intruders" in text


def test_three_updates_make_three_pairs(family):
    found = spectra.geometry(family.full, family.found, family.base, also=[family.other], progress=False)
    assert found.labels == ("full", "found", "other")
    query, up = NAMES[:2]
    assert [(pair["a"], pair["b"]) for pair in found.record(query)["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    assert [(pair["a"], pair["b"]) for pair in found.record(up)["pairs"]] == [(0, 1)]
    two = spectra.geometry(family.full, family.found, family.base, progress=False)
    assert found.record(up)["pairs"] == two.record(up)["pairs"]
    assert list(zip(found.pairs.a, found.pairs.b, found.pairs.matrices, strict=True)) == [
        ("full", "found", 4),
        ("full", "other", 2),
        ("found", "other", 2),
    ]


@pytest.mark.parametrize("jobs", [1, 3])
def test_bytes_do_not_depend_on_jobs(family, tmp_path, jobs):
    one = spectra.geometry(family.full, family.found, family.base, jobs=2, progress=False)
    two = spectra.geometry(family.full, family.found, family.base, jobs=jobs, progress=False)
    assert one.save(tmp_path / "one").read_bytes() == two.save(tmp_path / "two").read_bytes()


def test_a_device_that_is_named_gives_the_same(family):
    sides = family.full, family.found, family.base
    named = spectra.geometry(*sides, device="cpu", progress=False)
    assert named.records == spectra.geometry(*sides, progress=False).records


def test_an_interrupted_geometry_goes_on_to_the_same_bytes(family, tmp_path, monkeypatch):
    sides = family.full, family.found, family.base
    whole = spectra.geometry(*sides, progress=False).save(tmp_path / "whole").read_bytes()
    real, seen = plan.measured, []

    def dies_after_two(*args):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(args[0].record["name"])
        return real(*args)

    monkeypatch.setattr(plan, "measured", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        spectra.geometry(*sides, out=tmp_path / "out", jobs=1, progress=False)
    first = list(seen)
    seen.clear()
    monkeypatch.setattr(plan, "measured", lambda *args: seen.append(args[0].record["name"]) or real(*args))
    resumed = spectra.geometry(*sides, out=tmp_path / "out", jobs=1, progress=False)
    assert set(first).isdisjoint(seen)
    assert len(seen) == 6 - 2
    assert resumed.save(tmp_path / "resumed").read_bytes() == whole
    seen.clear()
    spectra.geometry(*sides, out=tmp_path / "out", progress=False)
    assert seen == []


def test_another_question_or_a_comparison_in_the_folder_is_refused(family, tmp_path):
    sides = family.full, family.found, family.base
    spectra.geometry(*sides, out=tmp_path / "out", progress=False)
    with pytest.raises(JournalMismatch, match=r"settings.rank was 64, is 4"):
        spectra.geometry(*sides, out=tmp_path / "out", rank=4, progress=False)
    spectra.compare(family.base, family.full, out=tmp_path / "run", progress=False)
    with pytest.raises(JournalMismatch, match='kind was null, is "geometry"'):
        spectra.geometry(*sides, out=tmp_path / "run", progress=False)


def test_too_little_memory_fails_the_matrix_and_not_the_rest(family):
    found = spectra.geometry(family.full, family.found, family.base, max_memory=150_000, progress=False)
    assert found.record(NAMES[1])["status"] == "failed"
    assert "MB are left" in found.record(NAMES[1])["reason"]
    assert found.record("encoder.layer.0.norm.weight")["status"] == "vector"


def test_geometry_is_kept_and_read_back_to_the_same_bytes(family, tmp_path):
    found = spectra.geometry(family.full, family.found, family.base, also=[family.other], progress=False)
    first = found.save(tmp_path / "one").read_bytes()
    loaded = Geometry.load(tmp_path / "one")
    assert loaded.records == found.records
    assert loaded.info == json.loads(json.dumps(found.info))
    pd.testing.assert_frame_equal(loaded.frame, found.frame)
    assert loaded.save(tmp_path / "two").read_bytes() == first
    with pytest.raises(CheckpointNotFound, match="no geometry is saved there"):
        Geometry.load(tmp_path / "nowhere")
    run = spectra.compare(family.base, family.full, progress=False).save(tmp_path / "run")
    with pytest.raises(UnsafeCheckpoint, match="no geometry"):
        Geometry.load(run)


def test_tables_and_plots(family):
    found = spectra.geometry(family.full, family.found, family.base, also=[family.other], progress=False)
    row = found.frame[(found.frame.name == NAMES[0]) & (found.frame.b == "found")].iloc[0]
    assert row.common_rank == 8
    assert row.above_chance_left_8 == pytest.approx(1.0)
    assert row.capture_a_in_b_64 == row.capture_a_in_b_8  # found has eight directions, and no more
    assert row.optimum_b_64 == 1.0
    alone = found.frame[found.frame.name == "encoder.layer.0.norm.weight"].iloc[0]
    assert (alone.status, alone.a, alone.b) == ("vector", "", "")
    assert math.isnan(alone.cosine)
    pooled = found.pairs.iloc[0]
    energy = [found.record(name)["updates"][0]["frobenius"] ** 2 for name in NAMES]
    share = [found.record(name)["pairs"][0]["capture"]["a_in_b"]["held"]["both"] for name in NAMES]
    by_hand = sum(e * s for e, s in zip(energy, share, strict=True)) / sum(energy)
    assert pooled.capture_a_in_b_8 == pytest.approx(by_hand, rel=1e-12)
    assert pooled.optimum_a_8 == pytest.approx(by_hand, abs=1e-6)
    assert pooled.cosine == pytest.approx(pooled.norm_ratio, abs=1e-6)
    assert "<svg" in found._repr_html_()
    for axes in (found.plot.overlap(NAMES[0]), found.plot.capture(), found.plot.intruders(), found.plot.spectra()):
        assert axes.has_data()
    flipped = found.plot.overlap(NAMES[0], 1, 0, side="right")
    assert flipped.get_ylabel() == "leading i of found"
    with pytest.raises(UsageError, match="vector"):
        found.plot.overlap("encoder.layer.0.norm.weight")
    with pytest.raises(KeyError, match=r"geometry.frame.name"):
        found.record("nothing")


def test_pooled_numbers_are_those_of_the_report(family):
    """One pooling serves both: the notebook's table and the page cannot disagree."""
    found = spectra.geometry(family.full, family.found, family.base, also=[family.other], progress=False)
    data = build_report(found)
    assert len(found.pairs) == len(data.pairs) == 3
    for (_, row), pair in zip(found.pairs.iterrows(), data.pairs, strict=True):
        assert (row.a, row.b) == (data.labels[pair.a], data.labels[pair.b])
        assert (row.matrices, row.cosine, row.cosine_std) == (pair.matrices, pair.cosine, pair.cosine_std)
        assert (row["rank"], row.above_chance_left) == (pair.rank, pair.shared_above("left"))
        for way, own in (("a_in_b", "a"), ("b_in_a", "b")):
            held = pair.captured[way]
            told = row[f"capture_{way}"], row[f"optimum_{own}"], row[f"capture_{way}_chance"]
            assert told == (held.share, held.best, held.random)
        update = data.updates[pair.a]
        assert (row.intruders_a, row.matched_a, row.determined_a) == (
            update.count(0.5),
            update.directions,
            update.clear,
        )
        assert update.directions == 10 * update.matrices


def test_a_name_with_dollars_is_no_formula(family, tmp_path):
    copy = write_checkpoint(tmp_path / "$\\frac$", family.tuned)
    found = spectra.geometry(copy, family.found, family.base, progress=False)
    assert "<svg" in found._repr_html_()
    for axes in (found.plot.overlap(NAMES[0]), found.plot.capture(), found.plot.intruders(), found.plot.spectra()):
        axes.figure.canvas.draw()
    plt.close("all")


def test_updates_that_share_no_matrix_have_no_curve(family):
    found = spectra.geometry(family.full, family.found, family.base, progress=False)
    with pytest.raises(UsageError, match="no matrix is changed by both updates 0 and 7"):
        found.plot.capture(0, 7)


def test_labels_are_the_shortest_endings_that_differ():
    assert short_labels(["a/x", "b/x"]) == ("a/x", "b/x")
    assert short_labels(["runs/full/", "runs/lora"]) == ("full", "lora")
    assert short_labels(["x", "a/x"]) == ("x", "a/x")
    assert short_labels(["same", "same", "same"]) == ("same", "same (2)", "same (3)")
