"""A checkpoint is a Mapping like any dict, in this process and in the next."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectra.checkpoints import Checkpoint, open_checkpoint

# Lone surrogates (Cs) are refused: no file can hold them. "__metadata__" is the format's own key.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
FORMS = st.sampled_from(["safetensors", "sharded", "pickle"])


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    return {name: torch.randint(0, 2, draw(SHAPES), generator=generator).to(draw(DTYPES)) for name in names}


def stored(model: dict[str, torch.Tensor], folder: Path, form: str) -> Checkpoint:
    if form == "pickle":
        torch.save(model, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(model, folder / "model.safetensors")
    else:
        for index, (name, tensor) in enumerate(model.items(), start=1):
            save_file({name: tensor}, folder / f"model-{index:05}-of-{len(model):05}.safetensors")
    checkpoint = open_checkpoint(folder, trust_pickle=True)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


@given(models(), FORMS, NAMES)
@settings(max_examples=60, deadline=None)
def test_laws(model: dict[str, torch.Tensor], form: str, other: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = stored(model, Path(folder), form)
        for found in (checkpoint, pickle.loads(pickle.dumps(checkpoint))):
            assert isinstance(found, Mapping)
            assert len(found) == len(model) == len(list(found)) == len(found.infos())
            assert set(found) == set(found.keys()) == set(model)
            assert list(found) == list(found.infos()) == list(checkpoint)
            assert all(same(found[name], model[name]) for name in model)
            assert all(same(tensor, model[name]) for name, tensor in found.items())
            assert len(found.values()) == len(model)
            assert (other in found) == (other in model)
            if other not in model:
                assert found.get(other) is None
                assert found.get(other, 7) == 7
                with pytest.raises(KeyError):
                    found[other]
                with pytest.raises(KeyError):
                    found.info(other)
            assert 7 not in found
            assert found == found
            assert found != model
            assert hash(found) == hash(found)


@given(models(), FORMS)
@settings(max_examples=30, deadline=None)
def test_info_says_what_reading_gives(model: dict[str, torch.Tensor], form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = stored(model, Path(folder), form)
        for name, info in checkpoint.infos().items():
            tensor = checkpoint[name]
            assert info == checkpoint.info(name)
            assert (info.name, info.shape, info.nbytes) == (name, tuple(tensor.shape), tensor.nbytes)
            assert (Path(folder) / info.file).is_file()
            if tensor.ndim:
                middle = tensor.shape[0] // 2
                parts = [checkpoint.read_rows(name, 0, middle), checkpoint.read_rows(name, middle, tensor.shape[0])]
                assert same(torch.cat(parts), tensor)


@given(models(), FORMS)
@settings(max_examples=20, deadline=None)
def test_a_pickle_is_the_same_wherever_it_goes(model: dict[str, torch.Tensor], form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = stored(model, Path(folder), form)
        sent = pickle.dumps(checkpoint)
        for name in checkpoint:
            checkpoint[name]
        received = pickle.loads(sent)
        assert len(pickle.dumps(checkpoint)) == len(sent)  # what was read left nothing behind
        assert (received.ref, received.root, received.infos()) == (checkpoint.ref, checkpoint.root, checkpoint.infos())
        assert received.digests() == checkpoint.digests()


def test_missing_name_tells_the_nearest(tmp_path: Path) -> None:
    model = {f"bert.layer.{index}.query.weight": torch.zeros(1) for index in range(2)} | {"head": torch.zeros(1)}
    checkpoint = stored(model, tmp_path, "safetensors")
    with pytest.raises(KeyError, match=r"nearest: 'bert\.layer\.1\.query\.weight', 'bert\.layer\.0\.query\.weight'"):
        checkpoint["layer.1.query.weight"]
    with pytest.raises(KeyError) as caught:
        checkpoint["zzz"]
    assert "nearest" not in str(caught.value)


def test_repr_is_short(tmp_path: Path) -> None:
    checkpoint = stored({"a": torch.zeros(1)}, tmp_path, "safetensors")
    assert repr(checkpoint) == f"<Checkpoint {tmp_path}: tensors: 1, files: 1>"
