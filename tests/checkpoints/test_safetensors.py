"""Safetensors files and folders: what is read, and everything that is refused before anything is read."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import Checkpoint, open_checkpoint
from spectra.checkpoints.digests import SAMPLE_BYTES, SAMPLE_CHUNKS
from spectra.checkpoints.safetensors import MAX_HEADER_BYTES, parse_header
from spectra.errors import CheckpointError, CheckpointNotFound, UnsafeCheckpoint, UnsupportedFormat, UsageError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


def opened(ref: Path | str, **options: Any) -> Checkpoint:
    checkpoint = open_checkpoint(ref, **options)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# --- reading ------------------------------------------------------------------------------------------------------


def test_every_element_type_is_read_as_stored(tmp_path: Path) -> None:
    bits = torch.randint(0, 2, (3, 4, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensors = {str(dtype): bits.clone().view(dtype) for dtype in DTYPES}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    assert set(checkpoint) == set(tensors)
    for name, expected in tensors.items():
        found = checkpoint[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8)), name
        rows = checkpoint.read_rows(name, 1, 3)
        assert torch.equal(rows.view(torch.uint8), expected[1:3].view(torch.uint8)), name


def test_shapes_without_axes_or_entries(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 5), "last": torch.zeros(4, 0), "one": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    assert {name: checkpoint[name].shape for name in tensors} == {name: tensors[name].shape for name in tensors}
    assert checkpoint["scalar"].item() == 3.0
    assert checkpoint.read_rows("last", 1, 3).shape == (2, 0)
    assert checkpoint.read_rows("one", 1, 1).shape == (0,)


def test_infos_are_in_the_order_of_the_data(tmp_path: Path) -> None:
    header = {"z": entry(offsets=(0, 8)), "a": entry(offsets=(16, 24)), "m": entry(offsets=(8, 16))}
    (tmp_path / "model.safetensors").write_bytes(raw(header, bytes(24)))
    infos = opened(tmp_path).infos()
    assert list(infos) == ["z", "m", "a"]
    assert (infos["m"].dtype, infos["m"].shape, infos["m"].nbytes, infos["m"].file) == (
        "F32",
        (2,),
        8,
        "model.safetensors",
    )


def test_reads_do_not_share_memory(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    checkpoint["a"].zero_()
    assert checkpoint["a"].sum() == 4


def test_rows_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 2), "scalar": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    for name, start, stop in (("a", -1, 2), ("a", 2, 5), ("a", 3, 2), ("scalar", 0, 1)):
        with pytest.raises(UsageError, match="do not exist"):
            checkpoint.read_rows(name, start, stop)


def test_threads_read_at_once(tmp_path: Path) -> None:
    tensors = {str(index): torch.full((64, 1024), float(index)) for index in range(32)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    barrier = threading.Barrier(8)

    def read_all(_: int) -> bool:
        barrier.wait()
        return all(bool((checkpoint[name] == float(name)).all()) for name in tensors)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(8)))


def test_reading_keeps_one_tensor_in_memory_not_the_file(tmp_path: Path) -> None:
    """32 tensors of 4 MiB: mapped they would add 128 MiB; two at once, with malloc's slack, stay under 32."""
    save_file({str(index): torch.ones(1024, 1024) for index in range(32)}, tmp_path / "model.safetensors")
    program = """if True:
        import resource, sys, torch
        from spectra.checkpoints import open_checkpoint
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        checkpoint = open_checkpoint(sys.argv[1])
        checkpoint["0"].sum()
        before = peak()
        for name in checkpoint:
            checkpoint[name].sum()
        print(peak() - before)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 32


def test_a_bool_other_than_0_and_1_is_true(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry("BOOL", (3,), (0, 3))}, b"\x00\x01\x7f"))
    assert opened(tmp_path)["a"].view(torch.uint8).tolist() == [0, 1, 1]


def test_huge_axis_beside_an_axis_of_zero(tmp_path: Path) -> None:
    header = {
        "fits": entry(shape=(0, 2**40), offsets=(0, 0)),
        "overflows": entry(shape=(2**40, 2**40, 2**40, 0), offsets=(0, 0)),
    }
    (tmp_path / "model.safetensors").write_bytes(raw(header))
    checkpoint = opened(tmp_path)
    assert checkpoint.info("overflows").shape == (2**40, 2**40, 2**40, 0)
    assert checkpoint["fits"].shape == (0, 2**40)
    with pytest.raises(UnsupportedFormat, match="overflows"):
        checkpoint["overflows"]


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F4", (3, 2), 3), ("F6_E2M3", (4,), 3), ("F2_NEW", (1, 7), 5), ("E8", (9,), 0)]
)
def test_types_without_a_reader_are_listed_but_not_read(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], nbytes: int
) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"w": entry(dtype, shape, (0, nbytes))}, bytes(nbytes)))
    checkpoint = opened(tmp_path)
    assert (checkpoint.info("w").dtype, checkpoint.info("w").shape) == (dtype, shape)
    with pytest.raises(UnsupportedFormat, match=f"'w' has element type {dtype}"):
        checkpoint["w"]
    with pytest.raises(UnsupportedFormat, match=f"'w' has element type {dtype}"):
        checkpoint.read_rows("w", 0, 1)


@pytest.mark.parametrize("in_new_process", [False, True])
def test_a_file_that_changes_under_way_is_noticed(tmp_path: Path, in_new_process: bool) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(2)}, path)
    checkpoint = opened(path)
    if in_new_process:
        checkpoint = pickle.loads(pickle.dumps(checkpoint))
    else:
        checkpoint["a"]
    save_file({"c": torch.ones(4), "d": torch.zeros(2)}, path)  # of the same size
    os.utime(path, ns=(0, 0))  # a clock's tick may be longer than this test
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint["a"]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        checkpoint["a"]


# --- headers that lie ---------------------------------------------------------------------------------------------

NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
LYING = {
    "no file": (b"", "has 0 bytes"),
    "seven bytes": (b"1234567", "has 7 bytes"),
    "header past the end": (b"\xff" * 7 + b"\x00{}", "header claims"),
    "header over the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "header claims"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "no JSON": (raw(b"{]"), "not valid JSON"),
    "empty header": (raw(b""), "does not begin with"),
    "not an object": (raw([]), "does not begin with"),
    "leading space": (raw(b" {}"), "does not begin with"),
    "UTF-16": (raw('{"a": 1}'.encode("utf-16-le")), "not valid JSON"),
    "invalid UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "nested": (raw(NESTED), "nested too deeply"),
    "endless integer": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "tensor twice": (raw(b'{"a": 1, "b": 2, "a": 3}'), "key 'a' twice"),
    "field twice": (raw(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "key 'dtype' twice"),
    "lone surrogate": (raw({"\ud800": entry()}, bytes(8)), "not valid Unicode"),
    "metadata no object": (raw({"__metadata__": 1}), "__metadata__"),
    "metadata no strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry no object": (raw({"w": [1]}), "tensor 'w' is not described"),
    "field too many": (raw({"w": entry() | {"x": 1}}, bytes(8)), "tensor 'w' is not described"),
    "bare NaN": (raw(b'{"__metadata__": NaN}'), "NaN is no JSON number"),
    "field missing": (raw({"w": {"dtype": "F32", "shape": []}}), "tensor 'w' is not described"),
    "dtype no string": (raw({"w": entry(dtype=7)}, bytes(8)), "tensor 'w' has no element type"),  # type: ignore[arg-type]
    "dtype no name": (raw({"w": entry("<b>")}, bytes(8)), "tensor 'w' has no element type"),
    "shape no list": (raw({"w": entry(shape="2")}, bytes(8)), "tensor 'w' has no shape"),
    "axis negative": (raw({"w": entry(shape=[-2, -1])}, bytes(8)), "tensor 'w' has no shape"),
    "axis a bool": (raw({"w": entry(shape=[2, True])}, bytes(8)), "tensor 'w' has no shape"),
    "axis a float": (raw({"w": entry(shape=[2.0])}, bytes(8)), "tensor 'w' has no shape"),
    "axis past 64 bits": (raw({"w": entry(shape=[0, 2**63], offsets=(0, 0))}), "tensor 'w' has no shape"),
    "one offset": (raw({"w": entry(offsets=[8])}, bytes(8)), "tensor 'w' has no data_offsets"),
    "offset negative": (raw({"w": entry(offsets=[-8, 0])}, bytes(8)), "tensor 'w' has no data_offsets"),
    "offset a bool": (raw({"w": entry("U8", [1], [False, True])}, b"1"), "tensor 'w' has no data_offsets"),
    "end before begin": (raw({"w": entry(offsets=[8, 0])}, bytes(8)), "tensor 'w' ends at byte 0, before"),
    "shape too large": (raw({"w": entry(shape=[3])}, bytes(8)), "tensor 'w': F32 of shape"),
    "shape too small": (raw({"w": entry(shape=[1])}, bytes(8)), "tensor 'w': F32 of shape"),
    "shape wraps 64 bits": (raw({"w": entry(shape=[2**62 + 1, 4, 2])}, bytes(8)), "tensor 'w': F32 of shape"),
    "half a byte": (raw({"w": entry("F4", [3], [0, 2])}, bytes(2)), "tensor 'w': F4 of shape"),
    "zero axis with bytes": (raw({"w": entry(shape=[0, 2])}, bytes(8)), "tensor 'w': F32 of shape"),
    "truncated": (raw({"w": entry()}, bytes(7)), "tensor 'w' ends at byte 8 of 7"),
    "overlap": (raw({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12)), "tensor 'w' begins at byte 4, inside"),
    "same bytes": (raw({"v": entry(), "w": entry()}, bytes(8)), "tensor 'w' begins at byte 0, inside"),
    "gap": (raw({"v": entry(), "w": entry(offsets=(9, 17))}, bytes(17)), "tensor 'w' begins at byte 9, leaving a gap"),
    "gap at the start": (raw({"w": entry(offsets=(1, 9))}, bytes(9)), "tensor 'w' begins at byte 1, leaving a gap"),
    "trailing bytes": (raw({"w": entry()}, bytes(9)), "1 bytes after the last tensor"),
    "bytes without tensors": (raw({}, bytes(1)), "1 bytes after the last tensor"),
    "unknown type past the end": (raw({"w": entry("F2", [9], [0, 9])}, bytes(8)), "tensor 'w' ends at byte 9 of 8"),
}


@pytest.mark.parametrize(("content", "message"), LYING.values(), ids=LYING.keys())
def test_lying_header_is_refused_before_anything_is_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsafeCheckpoint, match=r"model\.safetensors") as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert caught.value.exit_code == 4


def test_large_shape_product_is_never_formed() -> None:
    """10 000 axes of 2^62: the product has 620 000 bits, and a hundred such tensors would take seconds."""
    header = json.dumps({str(index): entry(shape=[2**62] * 10_000) for index in range(100)}).encode()
    with pytest.raises(UnsafeCheckpoint, match="does not take the 8 bytes given"):
        parse_header(header, data_bytes=8, file="file")


def test_hostile_name_is_escaped_and_cut_in_messages(tmp_path: Path) -> None:
    name = "\x1b[2J\u202e" + "a" * 10_000
    (tmp_path / "model.safetensors").write_bytes(raw({name: entry()}, bytes(7)))
    with pytest.raises(UnsafeCheckpoint) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert "\\x1b[2J\\u202e" in message
    assert message.isprintable()
    assert len(message) < 400 + len(str(tmp_path))


def test_unreadable_and_irregular_files(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointNotFound, match="is empty"):
        open_checkpoint(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe.safetensors")
    for name in ("a\0b.safetensors", "a" * 5000 + ".safetensors"):
        with pytest.raises(CheckpointError):
            open_checkpoint(str(tmp_path / name))


# --- folders ------------------------------------------------------------------------------------------------------

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
    (sharded.parent / "x.safetensors").write_bytes(raw({}))
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
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    model.mkdir()
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

    module = types.ModuleType("spectra.checkpoints.adapter")
    module.Adapter = Adapter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spectra.checkpoints.adapter", module)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(raw({}))
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
        (["model.gguf"], UnsupportedFormat, "'model.gguf': GGUF"),
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


@pytest.mark.parametrize("name", ["model.gguf", "model.npz", "notes.txt", "model"])
def test_single_files_without_a_reader(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UnsupportedFormat, match=name):
        open_checkpoint(tmp_path / name)


def test_bitsandbytes_is_refused_with_the_way_out(tmp_path: Path) -> None:
    state = "layer.weight.quant_state.bitsandbytes__nf4"
    save_file(
        {"layer.weight": torch.zeros(8, 1, dtype=torch.uint8), state: torch.ones(3)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UnsupportedFormat, match="dequantize"):
        open_checkpoint(tmp_path)


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
    import hashlib

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


def test_real_pair_reads_as_safetensors_itself_does(real_pair: tuple[Path, Path]) -> None:
    from safetensors import safe_open

    for folder in real_pair:
        checkpoint = opened(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as peer:
            assert set(peer.keys()) == set(checkpoint)
            assert all(torch.equal(peer.get_tensor(name), checkpoint[name]) for name in checkpoint)
