"""GGUF files that the gguf package wrote: read as it and transformers read them, and refused where they lie."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import Quantization
from spectra.checkpoints.gguf_names import in_order
from spectra.errors import CheckpointError, CheckpointNotFound, UnsafeCheckpoint, UnsupportedFormat
from spectra.examples import fetch
from tests.checkpoints.gguf_files import LLAMA, TYPES, gguf, numbers, opened, write

# Every type that the package turns into float32; BF16 is among them, but no block of several entries.
QUANTIZED = sorted((kind for kind in gguf.quants._type_traits if kind != TYPES.BF16), key=lambda kind: kind.name)


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_type_is_dequantized_as_by_the_package(tmp_path: Path, kind: Any) -> None:
    """Of any bytes: the package has no quantizer for most types. Scales among them may be NaN or infinite."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(int(kind)).integers(0, 256, (3, 5, 2 * width), dtype=np.uint8)
    row = np.ascontiguousarray(data[0, 0])
    checkpoint = opened(write(tmp_path / "model.gguf", {"w": (data, kind), "v": (row, kind)}))
    info = checkpoint.info("w")
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (3, 5, 2 * block), data.nbytes)
    assert info.quantization is not None
    assert (info.quantization.format, info.quantization.block) == (kind.name.lower(), block)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, kind)
    assert np.array_equal(checkpoint["w"], expected, equal_nan=True)
    assert np.array_equal(checkpoint.read_rows("w", 1, 3), expected[1:3], equal_nan=True)
    for start, stop in ((0, 2 * block), (1, block + 1), (block, block), (0, 1)):  # of a vector, rows are its entries
        assert np.array_equal(checkpoint.read_rows("v", start, stop), expected[0, 0, start:stop], equal_nan=True)


def test_pieces_of_a_large_tensor_meet(tmp_path: Path) -> None:
    data = gguf.quants.quantize(numbers(5000, 64), TYPES.Q8_0)  # more than two pieces, and no whole number of them
    checkpoint = opened(write(tmp_path / "model.gguf", {"w": (data, TYPES.Q8_0)}))
    assert np.array_equal(checkpoint["w"], gguf.quants.dequantize(data, TYPES.Q8_0))
    assert checkpoint.info("w").quantization == Quantization("q8_0", 32)


def test_plain_numbers_are_read_as_stored(tmp_path: Path) -> None:
    values = numbers(4, 3)
    wide = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
    tensors = {
        "f32": values,
        "f16": values.astype(np.float16),
        "f64": values.astype(np.float64),
        "bf16": (wide, TYPES.BF16),
        **{f"i{8 * n}": np.arange(6, dtype=f"i{n}").reshape(2, 3) for n in (1, 2, 4, 8)},
    }
    checkpoint = pickle.loads(pickle.dumps(opened(write(tmp_path / "model.gguf", tensors))))
    assert {name: checkpoint.info(name).dtype for name in checkpoint} == {name: name.upper() for name in tensors}
    for name, stored in tensors.items():
        expected = torch.from_numpy(values).bfloat16() if name == "bf16" else torch.from_numpy(stored)
        assert torch.equal(checkpoint[name], expected)
        for start, stop in ((0, 1), (1, 2), (1, 1)):
            assert torch.equal(checkpoint.read_rows(name, start, stop), expected[start:stop])
        assert checkpoint.info(name).quantization is None
    (note,) = checkpoint.notes  # nothing is quantized, and says so by silence
    assert "'example': names and order of rows are the file's own" in note


def test_places_are_those_of_the_packages_own_reader(tmp_path: Path) -> None:
    """Long and short metadata of every type before the tensors, and an alignment of its own."""

    def more(writer: Any) -> None:
        writer.add_custom_alignment(256)
        writer.add_array("tokenizer.ggml.tokens", [f"token {n} – ß" for n in range(500)])
        writer.add_array("tokenizer.ggml.scores", [float(n) for n in range(500)])
        writer.add_chat_template("{{ messages }}" * 1000)
        for n, add in enumerate((writer.add_uint8, writer.add_int8, writer.add_uint16, writer.add_int16)):
            add(f"small.{n}", n)
        for n, add in enumerate((writer.add_int32, writer.add_uint64, writer.add_int64, writer.add_float64)):
            add(f"large.{n}", n)
        writer.add_bool("flag", True)
        writer.add_float32("ratio", 0.5)

    tensors: dict[str, Any] = {f"t{n}": numbers(n + 1, 32, seed=n) for n in range(5)}
    tensors["q"] = (gguf.quants.quantize(numbers(3, 64), TYPES.Q4_1), TYPES.Q4_1)
    path = write(tmp_path / "model.gguf", tensors, more=more)
    checkpoint, peer = opened(path), gguf.GGUFReader(path)
    assert list(checkpoint) == [tensor.name for tensor in peer.tensors]
    for tensor in peer.tensors:
        assert np.array_equal(checkpoint[tensor.name], gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert checkpoint.info(tensor.name).nbytes == tensor.n_bytes


@pytest.mark.slow
def test_smollm2_is_read_as_by_the_package() -> None:
    path = fetch("smollm2")
    checkpoint = opened(path)
    named = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_up.weight": "model.layers.7.mlp.up_proj.weight",
    }
    moved = {"blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", 9),
             "blk.29.attn_k.weight": ("model.layers.29.self_attn.k_proj.weight", 3)}  # fmt: skip
    peer = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(checkpoint) == len(peer) == 272
    for name, tensor in peer.items():
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        if name in named:
            assert torch.equal(checkpoint[named[name]], values)
        if name in moved:
            own, heads = moved[name]
            assert torch.equal(permuted(checkpoint[own], heads), values)
    assert checkpoint.info("model.embed_tokens.weight").quantization == Quantization("q8_0", 32)


def test_without_the_package_plain_tensors_are_read_and_others_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gguf.quants.quantize(numbers(2, 32), TYPES.Q4_0)
    path = write(tmp_path / "model.gguf", {"plain": numbers(2, 3), "w": (data, TYPES.Q4_0)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    checkpoint = opened(path)
    assert np.array_equal(checkpoint["plain"], numbers(2, 3))
    with pytest.raises(UnsupportedFormat, match=r"pip install 'spectra-weights\[gguf\]'"):
        checkpoint["w"]


def test_a_type_that_the_package_does_not_dequantize_is_listed_but_not_read(tmp_path: Path) -> None:
    _, width = gguf.GGML_QUANT_SIZES[TYPES.Q8_K]
    path = write(tmp_path / "model.gguf", {"w": (np.zeros((2, width), np.uint8), TYPES.Q8_K)})
    checkpoint = opened(path)
    assert checkpoint.info("w").shape == (2, 256)
    with pytest.raises(UnsupportedFormat, match="Q8_K"):
        checkpoint["w"]


def test_a_file_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {"a": numbers(2, 3)})
    kept, sent = opened(path), pickle.dumps(opened(path))
    kept["a"]
    write(path, {"b": numbers(2, 3)})
    for checkpoint in (kept, pickle.loads(sent)):
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            checkpoint["a"]


# --- names and rows -----------------------------------------------------------------------------------------------


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of query and key."""
    rows = weight.shape[0]
    turned = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2)
    return turned.reshape(weight.shape)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_moving_rows_back_undoes_the_converter(heads: int, rest: tuple[int, ...]) -> None:
    weight = torch.arange(24 * 5).reshape(24, 5)[:, 0] if not rest else torch.arange(24 * 5).reshape(24, 5)
    assert torch.equal(in_order(permuted(weight, heads), heads), weight)
    assert heads == 12 or not torch.equal(permuted(weight, heads), weight)


def layer(heads: int = 4, key_heads: int = 2, width: int = 32, hidden: int = 64) -> dict[str, Any]:
    """Tensors of a Llama of one layer, by GGUF's names."""
    kv = width * key_heads // heads
    shapes = {
        "token_embd": (20, width), "output_norm": (width,), "output": (20, width),
        "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (kv, width), "blk.0.attn_v": (kv, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width), "blk.0.ffn_up": (hidden, width), "blk.0.ffn_down": (width, hidden),
    }  # fmt: skip
    return {f"{name}.weight": numbers(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}


def test_a_llama_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Every name and every row, from a file that is quantized in part."""
    transformers = pytest.importorskip("transformers")
    tensors = layer()
    tensors["blk.0.attn_q.weight"] = (gguf.quants.quantize(tensors["blk.0.attn_q.weight"], TYPES.Q4_0), TYPES.Q4_0)
    sizes = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "vocab_size": 20,
    }
    metadata = LLAMA | {f"llama.{name}": value for name, value in sizes.items()} | {"llama.rope.dimension_count": 8}
    path = write(
        tmp_path / "model.gguf",
        tensors,
        architecture="llama",
        metadata=metadata,
        more=lambda writer: (writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(10000.0)),
    )
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    checkpoint, expected = opened(path), peer.state_dict()
    assert set(checkpoint) == set(expected)
    for name, values in expected.items():
        assert torch.equal(checkpoint[name], values)
        for start, stop in ((0, 1), (3, 13), (5, 5), (len(values) - 1, len(values))):
            assert torch.equal(checkpoint.read_rows(name, start, stop), values[start:stop])
    assert "as in transformers (llama)" in checkpoint.notes[0]
    assert "1 of 12 tensors are quantized (q4_0 in blocks of 32: 1)" in checkpoint.notes[1]


def test_rows_of_a_qwen_stay_where_they_are(tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.weight": numbers(8, 4),
        "blk.10.attn_k.bias": numbers(8),
        "blk.0.attn_q_norm.weight": numbers(4),
    }
    checkpoint = opened(write(tmp_path / "model.gguf", tensors, architecture="qwen3"))
    assert list(checkpoint) == [
        "model.layers.0.self_attn.q_proj.weight", "model.layers.10.self_attn.k_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
    ]  # fmt: skip
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(checkpoint.values(), tensors.values(), strict=True))


@pytest.mark.parametrize(
    ("architecture", "metadata"),
    [
        ("gemma2", LLAMA),
        ("llama4", LLAMA),
        ("llama", {}),
        ("llama", {"llama.attention.head_count": 5}),
        ("llama", {"llama.attention.head_count": 0}),
    ],
)
def test_what_is_not_known_keeps_its_names_and_says_so(
    tmp_path: Path, architecture: str, metadata: dict[str, int]
) -> None:
    tensors = {"blk.0.attn_q.weight": numbers(8, 4), "token_embd.weight": numbers(3, 4)}
    checkpoint = opened(write(tmp_path / "model.gguf", tensors, architecture=architecture, metadata=metadata))
    assert list(checkpoint) == list(tensors)
    assert np.array_equal(checkpoint["blk.0.attn_q.weight"], tensors["blk.0.attn_q.weight"])
    assert "names and order of rows are the file's own" in checkpoint.notes[0]


def test_key_heads_are_as_many_as_query_heads_where_nothing_else_is_said(tmp_path: Path) -> None:
    weight = torch.from_numpy(numbers(16, 4))
    tensors = {"blk.0.attn_k.weight": permuted(weight, 4).numpy(), "rope_freqs.weight": numbers(4)}
    path = write(tmp_path / "m.gguf", tensors, architecture="llama", metadata={"llama.attention.head_count": 4})
    assert torch.equal(opened(path)["model.layers.0.self_attn.k_proj.weight"], weight)
    assert np.array_equal(opened(path)["rope_freqs.weight"], tensors["rope_freqs.weight"])


def test_a_block_of_a_bias_may_hold_several_heads(tmp_path: Path) -> None:
    data = gguf.quants.quantize(numbers(32), TYPES.Q8_0)
    tensors = {"blk.0.attn_q.bias": (data, TYPES.Q8_0)}
    checkpoint = opened(write(tmp_path / "model.gguf", tensors, architecture="llama", metadata=LLAMA))
    expected = in_order(torch.from_numpy(gguf.quants.dequantize(data, TYPES.Q8_0)), 4)
    assert torch.equal(checkpoint["model.layers.0.self_attn.q_proj.bias"], expected)
    assert torch.equal(checkpoint.read_rows("model.layers.0.self_attn.q_proj.bias", 3, 20), expected[3:20])


def test_two_tensors_of_one_name_after_renaming(tmp_path: Path) -> None:
    tensors = {"output.weight": numbers(2, 2), "lm_head.weight": numbers(2, 2)}
    path = write(tmp_path / "model.gguf", tensors, architecture="qwen2")
    with pytest.raises(UnsafeCheckpoint, match=r"would both be called 'lm_head\.weight'"):
        opened(path)


# --- folders ------------------------------------------------------------------------------------------------------


def test_which_file_of_a_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path / "some-q4.gguf", {"a": numbers(2, 3)})
    assert opened(tmp_path).info("a").file == "some-q4.gguf"
    write(tmp_path / "some-q8.gguf", {"a": numbers(2, 3)})
    with pytest.raises(UnsupportedFormat, match=r"several GGUF files .* name the one to read"):
        opened(tmp_path)
    assert opened(tmp_path / "some-q8.gguf").info("a").file == "some-q8.gguf"
    (tmp_path / "pytorch_model.bin").write_bytes(b"exact, if it were trusted")
    with pytest.raises(UnsafeCheckpoint, match="--trust-pickle"):
        opened(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(opened(tmp_path)) == ["b"]


def test_a_piece_of_a_split_model(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    write(path, {"a": numbers(2, 3)}, more=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(UnsupportedFormat, match="llama-gguf-split --merge"):
        opened(path)
    with pytest.raises(CheckpointNotFound, match="1 of the 2 shards"):
        opened(tmp_path)
