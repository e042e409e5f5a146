"""Files of torch.save: closed without trust, read without running anything with it."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import Checkpoint, open_checkpoint, torch_pickle
from spectra.errors import CheckpointError, CheckpointNotFound, UnsafeCheckpoint, UnsupportedFormat

WEIGHT = torch.arange(12, dtype=torch.float32).reshape(4, 3)


def opened(ref: Path) -> Checkpoint:
    checkpoint = open_checkpoint(ref, trust_pickle=True)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def rewritten(path: Path, change: Callable[[str, bytes], bytes], *, compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite the records of the archive that torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


# --- trust --------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("form", ["archive", "old", "plain", "plain protocol 4"])
def test_malicious_pickle_runs_nothing(tmp_path: Path, form: str, trust: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model" / "pytorch_model.bin"
    path.parent.mkdir()
    content = {"weight": WEIGHT, "extra": Malicious(canary)}
    if form.startswith("plain"):
        path.write_bytes(pickle.dumps(content, protocol=4 if "4" in form else 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    for ref in (path, path.parent):
        with pytest.raises(UnsafeCheckpoint) as caught:
            open_checkpoint(ref, trust_pickle=trust)
        assert caught.value.exit_code == 4
        assert not canary.exists()
        if not trust:
            assert "--trust-pickle" in str(caught.value)
        elif form in ("archive", "old"):
            assert "system" in str(caught.value)
    if form != "plain protocol 4":  # the canary is alive: an unrestricted unpickler would have set it off
        pickle.loads(path.read_bytes()) if form == "plain" else torch.load(path, weights_only=False)
        assert canary.exists()


def test_messages_never_suggest_to_load_the_file_unsafely(tmp_path: Path) -> None:
    torch.save({"module": torch.nn.Linear(2, 2)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"\x80\x04\x95junk")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UnsafeCheckpoint) as caught:
            opened(tmp_path / name)
        assert "weights_only=False" not in str(caught.value)
        assert "`weights_only`" not in str(caught.value)
        assert str(caught.value).isprintable()
    with pytest.raises(UnsafeCheckpoint, match=r"torch\.nn\.modules\.linear\.Linear"):
        opened(tmp_path / "a.pt")


def test_pickles_are_not_even_opened_without_trust(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    os.mkfifo(path)  # to open it would wait for ever
    with pytest.raises(UnsafeCheckpoint, match="--trust-pickle"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path, trust_pickle=True)


def test_safetensors_come_first_even_with_trust(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    save_file({"a": WEIGHT}, tmp_path / "model.safetensors")
    assert opened(tmp_path).info("a").file == "model.safetensors"


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.pt", "epoch=3.ckpt", "best.pth"])
def test_tensors_are_read_as_stored(tmp_path: Path, name: str, archive: bool) -> None:
    tensors = OrderedDict(
        z=WEIGHT,
        a=torch.nn.Parameter(WEIGHT.bfloat16()),
        f8=WEIGHT.to(torch.float8_e4m3fn if archive else torch.float16),  # the old format has no 8-bit floats
        flag=torch.tensor(True),
        empty=torch.zeros(0, 4),
        turned=torch.arange(12.0).reshape(3, 4).T,
    )
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=archive)
    checkpoint = opened(tmp_path)
    assert list(checkpoint) == list(tensors)
    assert [info.dtype for info in checkpoint.infos().values()] == [
        "F32",
        "BF16",
        "F8_E4M3" if archive else "F16",
        "BOOL",
        "F32",
        "F32",
    ]
    for key, expected in tensors.items():
        found = checkpoint[key]
        assert (found.dtype, found.shape, found.requires_grad) == (expected.dtype, expected.shape, False)
        assert torch.equal(found.float(), expected.detach().float())
        assert found.is_contiguous()
    assert torch.equal(checkpoint.read_rows("z", 1, 3), WEIGHT[1:3])
    checkpoint["z"].zero_()
    assert torch.equal(checkpoint["z"], WEIGHT)
    assert ("old format" in str(checkpoint.notes)) is not archive


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_training_checkpoint_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    optimizer = {"state": {0: {"exp_avg": WEIGHT}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "optimizer": optimizer, wrapper: {"w": WEIGHT, "n": 1}}, tmp_path / "last.pt")
    checkpoint = opened(tmp_path)
    assert list(checkpoint) == ["w"]
    assert "'n'" in checkpoint.notes[0]


def test_dicts_one_level_deeper_are_joined(tmp_path: Path) -> None:
    content = {"encoder": {"w": WEIGHT}, "decoder": {"w": WEIGHT + 1, "n": 1}, 7: "seven", "b": torch.ones(2)}
    torch.save(content, tmp_path / "last.pt")
    checkpoint = opened(tmp_path)
    assert list(checkpoint) == ["encoder.w", "decoder.w", "b"]
    assert checkpoint.notes == ("last.pt: left out what is no tensor: 'decoder.n', '7'",)
    torch.save({"a": {"b": WEIGHT}, "a.b": WEIGHT}, tmp_path / "last.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"'a\.b' is there twice"):
        opened(tmp_path)


@pytest.mark.parametrize("archive", [True, False])
def test_tied_tensors_are_aliases_and_parts_are_not(tmp_path: Path, archive: bool) -> None:
    content = {"embed": WEIGHT, "head": WEIGHT, "part": WEIGHT[1:], "flat": WEIGHT.view(-1), "copy": WEIGHT.clone()}
    torch.save(content, tmp_path / "last.pt", _use_new_zipfile_serialization=archive)
    checkpoint = opened(tmp_path)
    assert dict(checkpoint.aliases) == {"head": "embed"}
    assert list(checkpoint) == list(content)
    assert torch.equal(checkpoint["head"], WEIGHT)


def test_shards_with_an_index(tmp_path: Path) -> None:
    torch.save({"a": WEIGHT}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": WEIGHT + 1}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for ref in (tmp_path, index):
        assert torch.equal(opened(ref)["b"], WEIGHT + 1)
        with pytest.raises(UnsafeCheckpoint, match="--trust-pickle"):
            open_checkpoint(ref)
    index.write_text(json.dumps({"weight_map": weight_map | {"c": "../evil.bin"}}))
    with pytest.raises(UnsafeCheckpoint, match="'c' is said to be in"):
        opened(tmp_path)
    index.unlink()
    assert list(opened(tmp_path)) == ["a", "b"]
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointNotFound, match="1 of the 2 shards"):
        opened(tmp_path)


def test_training_state_is_no_model_and_several_models_are_a_question(tmp_path: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "first.pt"):
        torch.save({name: WEIGHT}, tmp_path / name)
    assert list(opened(tmp_path)) == ["first.pt"]
    torch.save({"w": WEIGHT}, tmp_path / "second.pt")
    with pytest.raises(UnsupportedFormat, match=r"several pickles \('first.pt', 'second.pt'\); name"):
        opened(tmp_path)


def test_travels_to_another_process_without_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000, 1000)}, tmp_path / "last.pt")
    checkpoint = opened(tmp_path)
    checkpoint["w"]
    sent = pickle.dumps(checkpoint)
    assert len(sent) < 4000
    assert pickle.loads(sent)["w"].sum() == 1e6


def test_threads_read_at_once_while_the_map_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(index): torch.full((1000,), float(index)) for index in range(20)}
    torch.save(tensors, tmp_path / "last.pt")
    monkeypatch.setattr(torch_pickle, "MAPPED_BYTES", 10_000)
    checkpoint = opened(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda name: bool((checkpoint[name] == float(name)).all()), list(tensors) * 20))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_mapped_pages_do_not_pile_up(tmp_path: Path) -> None:
    """64 tensors of 4 MiB: all mapped, the peak would grow by 256 MiB; renewing every 32 MiB bounds it."""
    torch.save({str(index): torch.ones(1024, 1024) for index in range(64)}, tmp_path / "last.pt")
    program = """if True:
        import sys
        from spectra.checkpoints import open_checkpoint, torch_pickle
        torch_pickle.MAPPED_BYTES = 32 * 1024**2
        def peak():  # in MiB; getrusage's would begin with the parent's
            status = open("/proc/self/status").read()
            return int(status.partition("VmHWM:")[2].split()[0]) // 1024
        checkpoint = open_checkpoint(sys.argv[1], trust_pickle=True)
        checkpoint["0"].sum()
        before = peak()
        assert sum(float(checkpoint[name].sum()) for name in checkpoint) == 2**26
        print(peak() - before)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 128


def test_a_file_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"w": WEIGHT}, path)
    checkpoint = opened(tmp_path)
    elsewhere = pickle.loads(pickle.dumps(checkpoint))
    checkpoint["w"]
    for content in ({"v": WEIGHT}, {"w": torch.ones(4, 4)}):
        torch.save(content, path)
        os.utime(path, ns=(0, 0))  # a clock's tick may be longer than this test
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            checkpoint["w"]
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            elsewhere["w"]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
        checkpoint["w"]


# --- files that lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4, 100, -1, -100])
def test_truncated_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "last.pt"
    torch.save({"w": WEIGHT}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UnsafeCheckpoint, match=r"last\.pt"):
        opened(path)


def test_record_shorter_than_the_pickle_claims(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"w": WEIGHT}, path)
    rewritten(path, lambda name, content: content[:8] if "/data/" in name else content)
    with pytest.raises(UnsafeCheckpoint, match="no record of the archive has the 48 bytes"):
        opened(path)


def test_compressed_archive_is_not_read_as_if_it_were_not(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"w": WEIGHT}, path)
    rewritten(path, lambda _, content: content, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeCheckpoint, match="compressed archive"):
        opened(path)


@pytest.mark.parametrize("archive", [True, False])
def test_a_few_bytes_that_stand_for_many_are_never_expanded(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "last.pt"
    torch.save({"w": torch.zeros(1).expand(2**40)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(UnsafeCheckpoint, match=r"'w' of shape .* claims more bytes than the file has"):
        opened(path)
    torch.save({"w": torch.ones(3).expand(2, 3)}, path, _use_new_zipfile_serialization=archive)
    assert opened(path)["w"].sum() == 6


def test_tensor_without_data(tmp_path: Path) -> None:
    torch.save({"w": torch.empty(3, device="meta")}, tmp_path / "last.pt")
    with pytest.raises(UnsafeCheckpoint, match="without its data"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [WEIGHT, [WEIGHT], 7, {}, {"epoch": 3}, {3: WEIGHT.tolist()}])
def test_no_tensors_by_name(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UnsupportedFormat, match=r"last\.pt"):
        opened(tmp_path)


def test_sparse_and_foreign_types_are_listed_but_not_read(tmp_path: Path) -> None:
    torch.save({"sparse": WEIGHT.to_sparse(), "wide": WEIGHT.to(torch.complex128), "w": WEIGHT}, tmp_path / "last.pt")
    checkpoint = opened(tmp_path)
    assert checkpoint.info("wide").dtype == "COMPLEX128"
    for name in ("sparse", "wide"):
        with pytest.raises(UnsupportedFormat, match=f"'{name}' is"):
            checkpoint[name]
    assert torch.equal(checkpoint["w"], WEIGHT)


def test_torchscript_is_refused_with_the_way_out(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    (tmp_path / "last.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UnsupportedFormat, match="TorchScript"):
        opened(tmp_path)


def test_damaged_bytes_give_only_errors_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for archive in (True, False):
        torch.save({"w": WEIGHT, "b": torch.ones(2)}, path, _use_new_zipfile_serialization=archive)
        content = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            for position in torch.randint(len(content), (3,), generator=generator).tolist():
                damaged[position] = int(torch.randint(256, (1,), generator=generator))
            path.write_bytes(damaged)
            try:
                checkpoint = opened(path)
                for name in checkpoint:
                    checkpoint[name]
            except CheckpointError:
                refused += 1
    assert refused > 30
