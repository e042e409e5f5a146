"""Safetensors files and folders: what is read, and everything that is refused before anything is read."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import Checkpoint, open_checkpoint
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_reading_keeps_one_tensor_in_memory_not_the_file(tmp_path: Path) -> None:
    """32 tensors of 4 MiB: mapped they would add 128 MiB; two at once, with malloc's slack, stay under 32."""
    save_file({str(index): torch.ones(1024, 1024) for index in range(32)}, tmp_path / "model.safetensors")
    program = """if True:
        import sys
        from spectra.checkpoints import open_checkpoint
        def peak():  # in MiB; getrusage's would begin with the parent's
            status = open("/proc/self/status").read()
            return int(status.partition("VmHWM:")[2].split()[0]) // 1024
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
    """200 000 axes of 2^62: the whole product has 12 million bits, and forming it takes over ten seconds."""
    header = json.dumps({"w": entry(shape=[2**62] * 200_000)}).encode()
    begun = time.perf_counter()
    with pytest.raises(UnsafeCheckpoint, match="does not take the 8 bytes given"):
        parse_header(header, data_bytes=8, file="file")
    assert time.perf_counter() - begun < 1


def test_header_over_the_limit_is_not_read_even_where_the_file_has_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + 100)  # sparse: takes no room on the disk
    with pytest.raises(UnsafeCheckpoint, match=f"the format allows {MAX_HEADER_BYTES}"):
        open_checkpoint(path)


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
    for name in ("a\0b.safetensors", "a" * 5000 + ".safetensors", "", "~nobody/model.safetensors"):
        with pytest.raises(CheckpointError):
            open_checkpoint(name)


def test_real_pair_reads_as_safetensors_itself_does(real_pair: tuple[Path, Path]) -> None:
    from safetensors import safe_open

    for folder in real_pair:
        checkpoint = opened(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as peer:
            assert set(peer.keys()) == set(checkpoint)
            assert all(torch.equal(peer.get_tensor(name), checkpoint[name]) for name in checkpoint)
