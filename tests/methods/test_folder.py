"""Adapter folders: what stands in the files, what a broken or foreign folder gets, and writes that are interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spectra.checkpoints.adapter import Adapter
from spectra.errors import (
    CheckpointError,
    CheckpointNotFound,
    MismatchError,
    UnsafeCheckpoint,
    UnsupportedFormat,
)
from spectra.methods import (
    FullFineTune,
    Houlsby,
    Injection,
    LoRA,
    Prompt,
    inject,
    injections,
    load_adapter,
    save_adapter,
)
from tests.methods.kinds import LINEAR, logits, make
from tests.methods.test_common import train_a_little

SELF = r"self\.(query|value)$"


def saved(folder: Path, method: Any = None, pattern: str = SELF, **names: Any) -> tuple[Any, Injection]:
    model = make("bert")
    injection = inject(model, pattern, method or LoRA(rank=2), also="^classifier$")
    train_a_little(injection)
    save_adapter(injection, folder, **{"base_model": "org/base", "task_type": "SEQ_CLS", **names})
    return model, injection


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_files(tmp_path: Path) -> None:
    saved(tmp_path / "deep" / "folder", LoRA(rank=2, alpha=3, rslora=True, dropout=0.1))
    folder = tmp_path / "deep" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {
        "base_model_name_or_path": "org/base",
        "task_type": "SEQ_CLS",
        "inference_mode": True,
        "modules_to_save": ["classifier"],
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["query", "value"],
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    start = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert tensors[f"{start}.lora_A.weight"].shape == (2, 32)
    assert tensors[f"{start}.lora_B.weight"].shape == (32, 2)
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(tensors)
    assert len(tensors) == 2 * 4 + 2


def test_patterns_keep_their_order(tmp_path: Path) -> None:
    """The first pattern that matches wins, so the file may not sort them."""
    method = LoRA(rank=2, rank_pattern={"value": 3, r"layer\.0\..*": 4}, alpha_pattern={"z|query": 3, "a|query": 5})
    model, injection = saved(tmp_path, method)
    loaded = load_adapter(make("bert"), tmp_path)
    assert loaded.method == method
    assert torch.equal(logits(loaded.model), logits(model))
    assert [p.scale for p in loaded.parts.values()] == [p.scale for p in injection.parts.values()]


def test_the_analysis_reads_the_same_update(tmp_path: Path) -> None:
    """What `spectra.report` measures of a folder is `delta_weight`."""
    model = make("gpt2")
    injection = inject(model, LINEAR["gpt2"], LoRA(rank=2, alpha=5, rslora=True))
    train_a_little(injection)
    save_adapter(injection, tmp_path, base_model="base", task_type="CAUSAL_LM")
    from spectra.checkpoints.checkpoint import TensorInfo

    adapter = Adapter.open(tmp_path)
    base = {n: TensorInfo(n, "F32", tuple(t.shape), "", 4 * t.numel()) for n, t in make("gpt2").state_dict().items()}
    updates = {update.name.removesuffix(".weight"): update for update in adapter.updates(base)}
    assert updates.keys() == injection.parts.keys()
    for name, part in injection.parts.items():
        torch.testing.assert_close(adapter.delta(updates[name], None).t(), part.delta_weight())  # stored (in, out)


def test_continues_to_train(tmp_path: Path) -> None:
    saved(tmp_path)
    injection = load_adapter(make("bert"), tmp_path, trainable=True)
    trained = {n.rpartition(".")[2] for n, p in injection.model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "weight", "bias"}
    assert injection.trainable == 4 * 2 * (32 + 32) + 3 * 32 + 3


def test_an_untrained_head_is_written_for_peft(tmp_path: Path) -> None:
    """PEFT looks for a classifier's head by itself: written though frozen, so that a random one is not in its place."""
    injection = inject(make("bert"), SELF, LoRA(rank=2))
    save_adapter(injection, tmp_path, base_model="base", task_type="SEQ_CLS")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    other = make("bert")
    other.classifier.reset_parameters()
    load_adapter(other, tmp_path)
    assert torch.equal(other.classifier.weight, injection.model.classifier.weight)


def test_another_model(tmp_path: Path) -> None:
    saved(tmp_path)
    stranger = make("gpt2")
    before = logits(stranger)
    with pytest.raises(MismatchError, match=r"no place in this GPT2LMHeadModel; the adapter was made for 'org/base'"):
        load_adapter(stranger, tmp_path)
    assert injections(stranger) == []
    assert torch.equal(logits(stranger), before)


def test_another_size(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": nn.Linear(6, 4)})
    save_adapter(inject(model, "q", LoRA(rank=2)), tmp_path, base_model="base", task_type=None)
    with pytest.raises(MismatchError, match=r"q: LoRA of rank 2: lora_A.weight is \(2, 6\) .* \(2, 8\) here"):
        load_adapter(nn.ModuleDict({"q": nn.Linear(8, 4)}), tmp_path)


def test_another_head(tmp_path: Path) -> None:
    saved(tmp_path)
    model = make("bert")
    model.classifier = nn.Linear(32, 5)
    with pytest.raises(MismatchError, match="classifier, stored whole"):
        load_adapter(model, tmp_path)


def test_missing_factor(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"missing: lora_B\.weight"):
        load_adapter(make("bert"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"peft_type": "LOHA"}, UnsupportedFormat),
        ({"peft_type": None}, UnsupportedFormat),
        ({"peft_type": ["LORA"]}, UnsupportedFormat),
        ({"use_dora": True}, UnsupportedFormat),
        ({"spectra_method": "Qlora"}, UnsupportedFormat),
        ({"spectra_method": ["GLoRA"]}, UnsupportedFormat),
        ({"modules_to_save": "classifier"}, UnsupportedFormat),
        ({"r": 0}, UnsafeCheckpoint),
        ({"r": "8"}, UnsafeCheckpoint),
        ({"lora_dropout": 1.5}, UnsafeCheckpoint),
        ({"rank_pattern": {"(": 2}}, UnsafeCheckpoint),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be(fields: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, **fields)
    model = make("bert")
    with pytest.raises(error):
        load_adapter(model, tmp_path)
    assert injections(model) == []


@pytest.mark.parametrize(
    ("method", "pattern", "size"),
    [(Houlsby(bottleneck=2), SELF, "bottleneck"), (Prompt(tokens=2), "word_embeddings$", "num_virtual_tokens")],
    ids=["houlsby", "prompt"],
)
def test_a_size_that_the_tensors_have_not(method: Any, pattern: str, size: str, tmp_path: Path) -> None:
    """Nothing is allocated from a number in the configuration alone."""
    saved(tmp_path, method, pattern)
    edit(tmp_path, **{size: 10**12})
    with pytest.raises(UnsafeCheckpoint, match="it speaks of 1000000000000"):
        load_adapter(make("bert"), tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"adapter_config\.json"):
        load_adapter(make("bert"), tmp_path)
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="pickle"):
        load_adapter(make("bert"), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointNotFound, match=r"adapter_model\.safetensors"):
        load_adapter(make("bert"), tmp_path)


@pytest.mark.parametrize("fail", ["save_file", "_to_disk", "replace"])
def test_a_write_that_fails_leaves_no_mixture(fail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old adapter stays whole, or nothing opens: never new factors at an old scale."""
    model, _ = saved(tmp_path)
    old = logits(model)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fail == "replace":
            patch.setattr(Path, "replace", full)
        else:
            patch.setattr(f"spectra.methods.folder.{fail}", full)
        with pytest.raises(CheckpointError, match="No space left"):
            saved(tmp_path, LoRA(rank=3, alpha=99))
    assert not list(tmp_path.glob(".*"))
    if fail == "replace":
        with pytest.raises(CheckpointNotFound):
            load_adapter(make("bert"), tmp_path)
    else:
        assert torch.equal(logits(load_adapter(make("bert"), tmp_path).model), old)


def test_replaces_an_adapter(tmp_path: Path) -> None:
    saved(tmp_path)
    model, _ = saved(tmp_path, LoRA(rank=3))
    assert torch.equal(logits(load_adapter(make("bert"), tmp_path).model), logits(model))


def test_tied_weights_and_whole_models(tmp_path: Path) -> None:
    """Full fine-tuning in this format: tied weights are written under both names, and read back."""
    model = make("gpt2")
    injection = inject(model, "", FullFineTune())
    train_a_little(injection)
    save_adapter(injection, tmp_path, base_model="base", task_type="CAUSAL_LM")
    fresh = make("gpt2")
    load_adapter(fresh, tmp_path)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(logits(fresh), logits(model))
