"""Which files of a folder are read, what else stands there, and folders that lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import Checkpoint, open_checkpoint, opening
from spectra.checkpoints.digests import SAMPLE_BYTES, SAMPLE_CHUNKS
from spectra.errors import CheckpointError, CheckpointNotFound, UnsafeCheckpoint, UnsupportedFormat

EMPTY = b"\2\0\0\0\0\0\0\0{}"  # a safetensors file without tensors
NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def opened(ref: Path | str) -> Checkpoint:
    checkpoint = open_checkpoint(ref)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


FIRST, SECOND, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"b": torch.ones(2), "c": torch.ones(3)}, tmp_path / FIRST)
    save_file({"a": torch.ones(4)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": SECOND, "b": FIRST, "c": FIRST})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    for ref in (sharded, sharded / INDEX, f"{sharded}/"):
        checkpoint = opened(ref)
        assert list(checkpoint) == ["b", "c", "a"]
        assert [info.file for info in checkpoint.infos().values()] == [FIRST, FIRST, SECOND]
        assert checkpoint["a"].sum() == 4


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert list(opened(sharded)) == ["b", "c", "a"]
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointNotFound, match="1 of the 2 shards"):
        open_checkpoint(sharded)


def test_every_shard_is_checked_when_opening(sharded: Path) -> None:
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(content[:-1])
    with pytest.raises(UnsafeCheckpoint, match=f"{SECOND}: tensor 'a' ends at byte 16 of 15"):
        open_checkpoint(sharded)
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointNotFound, match=SECOND):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": SECOND, "b": FIRST, "c": FIRST, "x": FIRST}, "1 tensors are in the index but in no shard: 'x'"),
        ({"a": SECOND, "b": FIRST}, "1 tensors are in a shard but not in the index: 'c'"),
        ({"a": SECOND, "b": SECOND, "c": FIRST}, "1 tensors are in another shard than the index says: 'b'"),
        ({"a": SECOND, "b": FIRST, "c": FIRST} | {f"x{i}": FIRST for i in range(9)}, "'x3', 'x4' and 4 more"),
        ({}, "no weight_map"),
        ([["a", SECOND]], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_index_and_shards_must_agree(sharded: Path, weight_map: object, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(UnsafeCheckpoint, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "target",
    [
        *("../x.safetensors", "sub/../../x.safetensors", "/etc/x.safetensors", "//host/share/x.safetensors"),
        *("\\\\host\\share\\x.safetensors", "..\\x.safetensors", "C:x.safetensors", "C:/x.safetensors", "~/x", "x.bin"),
        *(
            "",
            ".",
            "..",
            ".safetensors/",
            "x.safetensors\0",
            "x\n.safetensors",
            "a//x.safetensors",
            "x.safetensors:stream",
        ),
        *("x.SAFETENSORS", "x.safetensors ", "\ud800.safetensors", 7, None, ["x.safetensors"]),
    ],
)
def test_index_may_only_name_files_of_its_folder(sharded: Path, target: object) -> None:
    (sharded.parent / "x.safetensors").write_bytes(EMPTY)
    write_index(sharded, {"a": target, "b": FIRST, "c": FIRST})
    with pytest.raises(UnsafeCheckpoint, match=r"tensor 'a' is said to be in"):
        open_checkpoint(sharded)


def test_index_with_a_name_too_long_for_any_file(sharded: Path) -> None:
    write_index(sharded, {"a": "x" * 5000 + ".safetensors", "b": FIRST, "c": FIRST})
    with pytest.raises(CheckpointError):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": {"a": "x", "a": "y"}}', b"\xff\xfe", NESTED])
def test_malformed_index(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(UnsafeCheckpoint, match=INDEX):
        open_checkpoint(sharded)


def test_name_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.zeros(2)}, sharded / SECOND)
    with pytest.raises(UnsafeCheckpoint, match="1 tensors are stored in more than one file: 'b'"):
        open_checkpoint(sharded)


def test_links_may_not_lead_out_of_the_folder(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    inside = sharded / "sub" / "shard.safetensors"
    inside.parent.mkdir()
    (sharded / SECOND).rename(inside)
    (sharded / SECOND).symlink_to(inside)
    assert list(opened(sharded)) == ["b", "c", "a"]
    outside = tmp_path_factory.mktemp("outside") / "shard.safetensors"
    inside.rename(outside)
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(outside)
    with pytest.raises(UnsafeCheckpoint, match="leads out of its folder"):
        open_checkpoint(sharded)
    assert list(opened(sharded / SECOND)) == ["a"]  # the user named it, so it may lead anywhere
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(sharded / SECOND)
    with pytest.raises(CheckpointError):
        open_checkpoint(sharded)


def test_a_folder_named_like_a_blob_store_is_no_excuse(tmp_path: Path) -> None:
    """Only ``snapshots/<commit>`` may link to ``blobs`` beside ``snapshots``."""
    model, blobs = tmp_path / "revisions" / "main", tmp_path / "blobs"
    model.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "x")
    (model / "model.safetensors").symlink_to(blobs / "x")
    with pytest.raises(UnsafeCheckpoint, match="leads out of its folder"):
        open_checkpoint(model)


def test_link_to_a_whole_folder_is_followed(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = tmp_path_factory.mktemp("links") / "model"
    link.symlink_to(sharded)
    assert len(opened(link)) == 3


def test_which_file_of_several(tmp_path: Path) -> None:
    for name in ("consolidated", "diffusion_pytorch_model.fp16", "other"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    checkpoint = opened(tmp_path)
    assert list(checkpoint) == ["diffusion_pytorch_model.fp16", "other"]
    assert "'consolidated.safetensors'" in checkpoint.notes[0]
    for better in ("diffusion_pytorch_model", "model"):
        save_file({better: torch.ones(1)}, tmp_path / f"{better}.safetensors")
        assert list(opened(tmp_path)) == [better]
    assert "'other.safetensors'" in opened(tmp_path).notes[0]
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    assert list(opened(tmp_path)) == ["model"]
    assert "pytorch_model.bin" not in str(opened(tmp_path).notes)


def test_two_versions_of_one_model(tmp_path: Path) -> None:
    for name in ("ema", "last"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UnsafeCheckpoint, match=r"'w' \(the first in ema.safetensors, last.safetensors\).*name one"):
        open_checkpoint(tmp_path)
    assert list(opened(tmp_path / "ema.safetensors")) == ["w"]


def test_adapter_folder_is_opened_as_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Adapter:
        @staticmethod
        def open(path: Path, *, ref: str, revision: str | None, trust_pickle: bool) -> str:
            calls.append((path, ref, revision, trust_pickle))
            return "an adapter"

    monkeypatch.setattr(opening, "Adapter", Adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(EMPTY)
    for ref in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert open_checkpoint(ref) == "an adapter"
        assert calls.pop() == (tmp_path, str(ref), None, False)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "model.safetensors")  # what merging leaves behind
    assert list(opened(tmp_path)) == []


def test_several_indices(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(UnsupportedFormat, match="several indices"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["model.gguf"], UnsafeCheckpoint, "does not begin as a GGUF file"),
        (["model.onnx"], UnsupportedFormat, "ONNX"),
        ([".metadata", "__0_0.distcp"], UnsupportedFormat, "dcp_to_torch_save"),
        (["tf_model.h5"], UnsupportedFormat, "from_tf=True"),
        (["flax_model.msgpack"], UnsupportedFormat, "from_flax=True"),
        (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], UnsupportedFormat, "TensorFlow"),
        (["weights.npz"], UnsupportedFormat, "safetensors.torch.save_file"),
        (["pytorch_model.bin"], UnsafeCheckpoint, "--trust-pickle"),
        (["optimizer.pt", "training_args.bin", "rng_state_0.pth"], CheckpointNotFound, "holds no weights"),
        ([], CheckpointNotFound, "is empty"),
        (["tokenizer.json", "vocab.txt"], CheckpointNotFound, "holds a tokenizer but no weights"),
        (["unet/model.safetensors", "model_index.json"], CheckpointNotFound, "/unet"),
        (["adapter_model.safetensors"], CheckpointNotFound, "adapter_config.json"),
        (["adapter_model.bin", "adapter_config.json"], UnsafeCheckpoint, "--trust-pickle"),
        (["README.md"], CheckpointNotFound, "'README.md'"),
    ],
)
def test_what_has_no_reader_is_refused_by_name(
    tmp_path: Path, files: list[str], error: type[CheckpointError], message: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(error) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["model.npz", "notes.txt", "model"])
def test_single_files_without_a_reader(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UnsupportedFormat, match=name):
        open_checkpoint(tmp_path / name)


# --- what stands beside the weights -------------------------------------------------------------------------------


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    return tmp_path


def test_config(single: Path) -> None:
    assert opened(single).config == {}
    (single / "config.json").write_text('{"hidden_size": 384, "scale": Infinity}')
    for ref in (single, single / "model.safetensors"):
        assert opened(ref).config["hidden_size"] == 384


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", NESTED, b'{"a": "' + b" " * 10_000_000 + b'"}'])
def test_malformed_config(single: Path, content: bytes) -> None:
    (single / "config.json").write_bytes(content)
    with pytest.raises(UnsafeCheckpoint, match=r"config\.json"):
        open_checkpoint(single)


def test_digests_are_of_the_whole_file_below_the_limit(single: Path) -> None:
    (single / "config.json").write_text("{}")
    weights, config = opened(single).digests()
    content = (single / "model.safetensors").read_bytes()
    assert (weights.name, weights.bytes, weights.sampled) == ("model.safetensors", len(content), False)
    assert weights.sha256 == hashlib.sha256(content).hexdigest()
    assert (config.name, config.sampled) == ("config.json", False)


def test_digests_are_sampled_above_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = SAMPLE_CHUNKS * SAMPLE_BYTES + 8 * 2**20
    save_file({"a": torch.zeros(size, dtype=torch.uint8)}, path)

    def digest() -> str:
        (found,) = opened(tmp_path).digests(full_below=size)
        assert found.sampled
        return found.sha256

    def change(position: int) -> None:
        with path.open("r+b") as stream:
            stream.seek(position)
            stream.write(b"x")

    first = digest()
    assert first == digest()
    change(SAMPLE_BYTES + 100)  # between the first two chunks
    assert digest() == first
    change(path.stat().st_size - 1)
    last = digest()
    assert last != first
    change(SAMPLE_BYTES - 1)
    assert digest() != last
    assert not opened(tmp_path).digests(full_below=2 * size)[0].sampled
