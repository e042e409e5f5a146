"""Weights that bitsandbytes itself quantized and wrote: read as it dequantizes them, and refused where they lie."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectra.checkpoints import Checkpoint, Quantization, open_checkpoint
from spectra.delta import pair_checkpoints
from spectra.errors import CheckpointError, UnsafeCheckpoint, UnsupportedFormat

functional = pytest.importorskip("bitsandbytes.functional")

STATE = "w.quant_state.bitsandbytes__nf4"


def opened(ref: Path) -> Checkpoint:
    checkpoint = open_checkpoint(ref)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(weight: torch.Tensor, name: str = "w", **options: Any) -> dict[str, torch.Tensor]:
    """What a 4-bit layer of bitsandbytes puts into its state dict."""
    codes, state = functional.quantize_4bit(weight, **options)
    return {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def answer(stored: dict[str, torch.Tensor], name: str = "w") -> torch.Tensor:
    """What bitsandbytes makes of a state dict."""
    described = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(described, device=torch.device("cpu"))
    values: torch.Tensor = functional.dequantize_4bit(stored[name], state)
    return values


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "block", "shape"),
    [
        ("nf4", 64, (48, 96)),
        ("fp4", 64, (48, 96)),
        ("nf4", 128, (5, 3, 2, 10)),  # blocks that straddle rows, and a last one that is shorter
        ("nf4", 64, (300, 100)),  # more than one block of scales
        ("nf4", 64, (7, 10)),
        ("fp4", 4096, (1, 64)),
    ],
)
def test_values_are_those_of_bitsandbytes_bit_for_bit(
    tmp_path: Path, kind: str, block: int, shape: tuple[int, ...], dtype: torch.dtype, double: bool
) -> None:
    weight = gaussian(*shape).to(dtype)
    stored = parts(weight, quant_type=kind, blocksize=block, compress_statistics=double) | {"bias": torch.ones(3)}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    assert set(checkpoint) == {"w", "bias"}
    info = checkpoint.info("w")
    assert (info.shape, info.quantization) == (shape, Quantization(kind, block, double=double))
    assert info.nbytes == sum(tensor.nbytes for name, tensor in stored.items() if name != "bias")
    expected = answer(stored)
    found = checkpoint["w"]
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    assert torch.equal(found, expected)
    for start, stop in ((0, 1), (1, shape[0]), (shape[0] // 2, shape[0] // 2 + 1), (1, 1), (0, 0)):
        assert torch.equal(checkpoint.read_rows("w", start, stop), expected[start:stop])
    assert checkpoint.info("bias").quantization is None
    assert torch.equal(checkpoint["bias"], torch.ones(3))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_as_another_type(tmp_path: Path, storage: torch.dtype) -> None:
    stored = parts(gaussian(16, 64), quant_type="nf4", quant_storage=storage)
    assert stored["w"].dtype == storage
    save_file(stored, tmp_path / "model.safetensors")
    assert torch.equal(opened(tmp_path)["w"], answer(stored))


def test_nothing_of_bitsandbytes_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = parts(gaussian(16, 64), quant_type="nf4", compress_statistics=True)
    expected = answer(stored)
    save_file(stored, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert torch.equal(opened(tmp_path)["w"], expected)


def test_parts_in_different_shards(tmp_path: Path) -> None:
    """Savers count bytes, not matrices: a boundary between shards may fall between codes and scales."""
    stored = parts(gaussian(64, 64), quant_type="nf4", compress_statistics=True) | {"bias": torch.ones(3)}
    names = sorted(stored)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, kept in shards.items():
        save_file({name: stored[name] for name in kept}, tmp_path / file)
    index = {"weight_map": {name: file for file, kept in shards.items() for name in kept}}
    for indexed in (False, True):
        if indexed:
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        checkpoint = pickle.loads(pickle.dumps(opened(tmp_path)))
        assert set(checkpoint) == {"w", "bias"}
        assert torch.equal(checkpoint["w"], answer(stored))
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({name: stored[name] for name in names[2:]}, tmp_path / "b.safetensors")
    with pytest.raises(UnsafeCheckpoint, match="more than one file"):
        opened(tmp_path)


def test_a_change_of_the_file_is_noticed(tmp_path: Path) -> None:
    save_file(parts(gaussian(16, 64), quant_type="nf4"), tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    checkpoint["w"]
    save_file(parts(gaussian(16, 64, seed=1), quant_type="fp4"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint["w"]


@pytest.mark.parametrize(("out", "inner"), [(24, 40), (1, 8)])
def test_int8_of_a_linear_layer(tmp_path: Path, out: int, inner: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(inner, out, has_fp16_weights=False)
    layer.load_state_dict({"weight": gaussian(out, inner), "bias": torch.ones(out)})
    layer.to("cpu")
    stored = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert {"layer.weight", "layer.SCB", "layer.weight_format"} <= set(stored)
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    assert set(checkpoint) == {"layer.weight", "layer.bias"}
    assert checkpoint.info("layer.weight").quantization == Quantization("int8", None)
    expected = functional.int8_vectorwise_dequant(stored["layer.weight"], stored["layer.SCB"])
    assert torch.equal(checkpoint["layer.weight"], expected)
    for start in (0, out // 2, out):
        assert torch.equal(checkpoint.read_rows("layer.weight", start, out), expected[start:])
    save_file(stored | {"layer.weight_format": torch.tensor(2, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedFormat, match="save it again"):
        opened(tmp_path)
    save_file(stored | {"layer.SCB": torch.ones(out + 1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsafeCheckpoint, match=f"needs {out} elements"):
        opened(tmp_path)


def test_a_matrix_that_is_described_twice(tmp_path: Path) -> None:
    stored = parts(gaussian(16, 64), "layer.weight", quant_type="nf4")
    stored["layer.weight"] = stored["layer.weight"].view(torch.int8)
    save_file(stored | {"layer.SCB": torch.ones(512)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsafeCheckpoint, match="described twice"):
        opened(tmp_path)


def test_a_tensor_that_only_sounds_like_scales_is_left_alone(tmp_path: Path) -> None:
    save_file(
        {"a.SCB": torch.ones(2), "b.SCB": torch.ones(2), "b.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors"
    )
    assert set(opened(tmp_path)) == {"a.SCB", "b.SCB", "b.weight"}


def test_a_model_that_transformers_saved(tmp_path: Path) -> None:
    """Names, shapes and types are those of the model before it was quantized; each tensor finds its other half."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "quantized")
    plain, quantized = opened(tmp_path / "plain"), opened(tmp_path / "quantized")
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    assert {n: (i.dtype, i.shape) for n, i in plain.infos().items()} == {
        n: (i.dtype, i.shape) for n, i in quantized.infos().items()
    }
    rounded = [name for name in quantized if quantized.info(name).quantization]
    assert len(rounded) == 7  # the linear maps of one layer; not the embeddings, the norms and the head
    assert all(torch.equal(quantized[name], answer(stored, name)) for name in rounded)
    _, found = pair_checkpoints(plain, quantized)
    assert len(found) == len(plain)
    assert {name for name, delta in found.items() if delta.tuned_info.quantization} == set(rounded)
    (note,) = quantized.notes
    assert "7 of 12 tensors are quantized (nf4 in blocks of 64 with quantized scales: 7)" in note


# --- parts that lie -----------------------------------------------------------------------------------------------


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change of the JSON that describes the matrix."""

    def changed(stored: dict[str, torch.Tensor]) -> None:
        described = json.loads(bytes(stored[STATE].tolist()))
        change(described)
        stored[STATE] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

    return changed


def with_state(**values: object) -> Callable[[dict[str, torch.Tensor]], None]:
    return state(lambda described: described.update(values))


def with_part(part: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda stored: stored.update({f"w.{part}" if part else "w": value})


LYING: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], type[CheckpointError], str]] = {
    "no codes": (lambda stored: stored.pop("w"), UnsafeCheckpoint, "stands without 'w'"),
    "no scales": (lambda stored: stored.pop("w.absmax"), UnsafeCheckpoint, "stands without 'w.absmax'"),
    "no code book": (lambda stored: stored.pop("w.quant_map"), UnsafeCheckpoint, "stands without 'w.quant_map'"),
    "no scales of scales": (lambda s: s.pop("w.nested_absmax"), UnsafeCheckpoint, "stands without 'w.nested_absmax'"),
    "no levels of scales": (lambda s: s.pop("w.nested_quant_map"), UnsafeCheckpoint, "without 'w.nested_quant_map'"),
    "short codes": (with_part("", torch.zeros(9, 1, dtype=torch.uint8)), UnsafeCheckpoint, "9 bytes of codes"),
    "a row of codes": (with_part("", torch.zeros(1, 512, dtype=torch.uint8)), UnsupportedFormat, "transposed"),
    "short scales": (
        with_part("absmax", torch.zeros(3, dtype=torch.uint8)),
        UnsafeCheckpoint,
        "needs 16 elements of U8",
    ),
    "wide scales": (with_part("absmax", torch.zeros(16)), UnsafeCheckpoint, "needs 16 elements of U8"),
    "short levels": (with_part("nested_quant_map", torch.zeros(16)), UnsafeCheckpoint, "needs 256 elements of F32"),
    "its own code book": (with_part("quant_map", torch.linspace(-1, 1, 16)), UnsupportedFormat, "model.dequantize()"),
    "NaN in the code book": (with_part("quant_map", torch.full((16,), torch.nan)), UnsupportedFormat, "quant_map"),
    "state that is no JSON": (with_part(STATE[2:], torch.zeros(9, dtype=torch.uint8)), UnsafeCheckpoint, "JSON"),
    "state without end": (
        with_part(STATE[2:], torch.zeros(70_000, dtype=torch.uint8)),
        UnsafeCheckpoint,
        "70000 bytes",
    ),
    "another type": (with_state(quant_type="fp4"), UnsupportedFormat, "readers for nf4 and fp4"),
    "another dtype": (with_state(dtype="int8"), UnsupportedFormat, "dequantizes to 'int8'"),
    "no dtype": (with_state(dtype=None), UnsupportedFormat, "dequantizes to None"),
    "dtype of no name": (with_state(dtype=["float32"]), UnsupportedFormat, "dequantizes to"),
    "another shape": (with_state(shape=[16, 65]), UnsafeCheckpoint, "does not take"),
    "a huge shape": (with_state(shape=[2**62] * 1000), UnsafeCheckpoint, "does not take"),
    "no shape": (with_state(shape="64"), UnsafeCheckpoint, "no shape"),
    "a shape of fractions": (with_state(shape=[16.0, 64]), UnsafeCheckpoint, "no shape"),
    "an empty axis": (with_state(shape=[16, 0]), UnsafeCheckpoint, "no shape"),
    "no block": (with_state(blocksize=0), UnsafeCheckpoint, "no blocksize"),
    "an odd block": (with_state(blocksize=63), UnsafeCheckpoint, "no blocksize"),
    "a huge block": (with_state(blocksize=2**62), UnsafeCheckpoint, "no blocksize"),
    "a truth for a block": (with_state(blocksize=True), UnsafeCheckpoint, "no blocksize"),
    "no offset": (with_state(nested_offset=None), UnsafeCheckpoint, "must be numbers"),
    "an endless offset": (with_state(nested_offset=float("inf")), UnsafeCheckpoint, "JSON"),
    "no nested block": (with_state(nested_blocksize=0), UnsafeCheckpoint, "must be numbers"),
}


@pytest.mark.parametrize("case", LYING)
def test_lying_parts(tmp_path: Path, case: str) -> None:
    change, error, message = LYING[case]
    stored = parts(gaussian(16, 64), quant_type="nf4", compress_statistics=True)
    change(stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(error) as caught:
        opened(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
