"""AdaLoRA's and IA3's folders, written by PEFT and by `save_adapter`: read as PEFT merges them, and compared."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from spectra.checkpoints.adapter import Adapter, LowRankUpdate, RescaleUpdate
from spectra.delta import deltas
from spectra.errors import MismatchError, SpectraError, UnsupportedFormat
from spectra.methods import IA3, AdaLoRA, inject, save_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def bert() -> torch.nn.Module:
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    return transformers.BertModel(transformers.BertConfig(vocab_size=37, max_position_embeddings=16, **sizes))


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(3, 5, 2), torch.nn.Conv2d(5, 4, 3)
        self.config = {"model_type": "convolutions"}


@dataclass(frozen=True)
class Case:
    """One adapter: `kinds` are the updates expected, `modules` how many have one, `biases` how many biases."""

    model: Any
    options: dict[str, Any]
    kind: type
    modules: int
    biases: int = 0
    dtype: torch.dtype = torch.float32


# All of a layer's maps, and the square ones alone, whose orientation only the configuration tells.
BERT, GPT2, SQUARE = ["query", "value", "dense"], ["c_attn", "c_proj", "c_fc"], ["attn.c_proj"]
# PEFT prunes the first module to half and the second to nothing.
PATTERN = {
    "encoder.layer.0.attention.self.query.lora_E": [True, False, False, True],
    "encoder.layer.1.attention.self.query.lora_E": [False] * 4,
}
ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "tinit": 1, "tfinal": 1, "total_step": 9}
FFN = {"feedforward_modules": ["output.dense"]}

CASES = {
    "AdaLoRA on Bert": Case(bert, ADALORA | {"target_modules": BERT}, LowRankUpdate, 11),
    "AdaLoRA pruned": Case(bert, ADALORA | {"target_modules": ["query"], "rank_pattern": PATTERN}, LowRankUpdate, 1),
    "AdaLoRA, alpha 0": Case(bert, ADALORA | {"target_modules": BERT, "lora_alpha": 0}, LowRankUpdate, 11),
    "AdaLoRA on GPT-2": Case(gpt2, ADALORA | {"target_modules": GPT2}, LowRankUpdate, 8),
    "AdaLoRA on square Conv1D": Case(gpt2, ADALORA | {"target_modules": SQUARE}, LowRankUpdate, 2),
    "AdaLoRA, bfloat16": Case(bert, ADALORA | {"target_modules": BERT}, LowRankUpdate, 11, dtype=torch.bfloat16),
    "AdaLoRA, float64": Case(bert, ADALORA | {"target_modules": BERT}, LowRankUpdate, 11, dtype=torch.float64),
    "AdaLoRA on kernels": Case(Convolutions, ADALORA | {"target_modules": ["one", "two"]}, LowRankUpdate, 2),
    "IA3 on Bert": Case(bert, {"target_modules": [*BERT, "output.dense"]} | FFN, RescaleUpdate, 11, 7),
    "IA3 on Bert's rows": Case(bert, {"target_modules": BERT, "feedforward_modules": []}, RescaleUpdate, 11, 11),
    "IA3 on GPT-2": Case(
        gpt2, {"target_modules": [*GPT2, "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}, RescaleUpdate, 8, 6
    ),
    "IA3 on square Conv1D": Case(gpt2, {"target_modules": SQUARE, "feedforward_modules": []}, RescaleUpdate, 2, 2),
    "IA3 on square Conv1D's inputs": Case(
        gpt2, {"target_modules": SQUARE, "feedforward_modules": SQUARE}, RescaleUpdate, 2
    ),
    "IA3, bfloat16": Case(
        bert, {"target_modules": [*BERT, "output.dense"]} | FFN, RescaleUpdate, 11, 7, dtype=torch.bfloat16
    ),
}


def randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def write_base(model: torch.nn.Module, folder: Path) -> Checkpoint:
    distinct = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}
    return write_base_of({n: t.clone() for n, t in model.state_dict().items() if n in distinct.values()}, folder)


def write_base_of(tensors: dict[str, torch.Tensor], folder: Path) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    base = open_checkpoint(folder)
    assert isinstance(base, Checkpoint)
    return base


def fresh(case: Case) -> torch.nn.Module:
    torch.manual_seed(1)
    return case.model().to(case.dtype)


def merged_by_peft(case: Case, base: Checkpoint, folder: Path) -> dict[str, torch.Tensor]:
    model = fresh(case)
    model.load_state_dict(dict(base), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is corrected
        return dict(peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict())


def check(case: Case, base: Checkpoint, folder: Path) -> Adapter:
    """Every update is what PEFT's merge changes, no tensor besides changes, and the comparison runs."""
    adapter, expected = open_checkpoint(folder), merged_by_peft(case, base, folder)
    assert isinstance(adapter, Adapter)
    updates, merged = {update.name: update for update in adapter.updates(base.infos())}, adapter.merged(base)
    weights = [name for name in updates if name.endswith("weight")]
    assert (len(weights), len(updates) - len(weights)) == (case.modules, case.biases)
    assert {type(update) for update in updates.values()} == {case.kind}
    for name, stored in base.items():
        after, before = expected[name].double(), stored.double()
        if name not in updates:
            assert torch.equal(after, before), name
            continue
        delta = adapter.delta(updates[name], stored)
        # What PEFT stores is W + ΔW rounded to the base's dtype; ΔW is float32 of entries of order one.
        step = 2 * torch.finfo(case.dtype).eps * after.abs().max() + 1e-6 * (case.dtype != torch.float64)
        assert delta.shape == stored.shape
        assert (after - before - delta.double()).abs().max() <= step, name
        assert delta.abs().max() > 0.001, name
        # The same operations as PEFT's, up to the order of two scalar factors: two roundings of the stored dtype.
        torch.testing.assert_close(merged[name].double(), after, rtol=0, atol=float(step))
    for found in deltas(base, adapter):
        stored, dense = base[found.name].double(), found.dense().double()
        exact = torch.linalg.svdvals(adapter.delta(updates[found.name], base[found.name]).double().flatten(1))
        values = torch.tensor(found.spectrum().values)
        assert dense.shape == (stored.shape[0], stored.numel() // stored.shape[0])
        # A float32 matrix's values, to its rounding.
        torch.testing.assert_close(values, exact[: len(values)], rtol=1e-5, atol=1e-5 * float(exact[0]))
    return adapter


def check_comparison(case: Case, base: Path, folder: Path) -> None:
    frame = spectra.compare(base, folder, progress=False, jobs=1).frame
    assert set(frame["status"]) <= {"ok", "vector", "unchanged"}
    compared = frame[frame["status"] == "ok"]
    assert len(compared) == case.modules
    assert (compared["frobenius"] > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_is_read_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = fresh(case)
    randomise(parameter for key, parameter in model.named_parameters() if key.endswith("bias"))
    base = write_base(model, tmp_path / "base")
    method = peft.AdaLoraConfig if case.kind is LowRankUpdate else peft.IA3Config
    pattern = case.options.get("rank_pattern")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {key: value for key, value in case.options.items() if key != "rank_pattern"}
        tuned = peft.get_peft_model(model, method(**options))
        randomise(parameter for parameter in tuned.parameters() if parameter.requires_grad)
        tuned.peft_config["default"].rank_pattern = pattern
        tuned.save_pretrained(tmp_path / "adapter")
    check(case, base, tmp_path / "adapter")
    check_comparison(case, tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("name", ["AdaLoRA on Bert", "AdaLoRA on GPT-2", "IA3 on Bert", "IA3 on GPT-2"])
def test_what_save_adapter_writes_is_read_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = fresh(case)
    randomise(parameter for key, parameter in model.named_parameters() if key.endswith("bias"))
    base = write_base(model, tmp_path / "base")
    method = AdaLoRA(rank=2, init_rank=4, alpha=6.0) if case.kind is LowRankUpdate else IA3()
    targets = "|".join(case.options["target_modules"])
    injection = inject(model, rf"\.({targets})$", method)
    for part in injection.parts.values():
        randomise(part.trainable_parameters())
        if isinstance(method, AdaLoRA):
            keep = torch.tensor([True, False, True, True])
            part.prune(keep)
            part.kept = keep
    save_adapter(injection, tmp_path / "adapter", base_model=str(tmp_path / "base"), task_type=None)
    check(case, base, tmp_path / "adapter")
    check_comparison(case, tmp_path / "base", tmp_path / "adapter")


def adapter_folder(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Adapter:
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return Adapter.open(folder)


TRIPLETS = {"q.lora_A": torch.ones(2, 5), "q.lora_E": torch.ones(2, 1), "q.lora_B": torch.ones(6, 2)}


def test_the_diagonal_is_folded_in_before_any_rounding_and_counts_as_stored(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(t.shape, generator=generator).bfloat16() for name, t in TRIPLETS.items()}
    base = {"q.weight": TensorInfo("q.weight", "F32", (6, 5), "", 120)}
    adapter = adapter_folder(tmp_path, stored | {"q.ranknum": torch.tensor([7.0])}, peft_type="ADALORA", init_r=3)
    (update,) = adapter.updates(base)
    assert isinstance(update, LowRankUpdate)
    assert update.scale == 8 / (3 + 1e-5)
    b, a = adapter.factors(update)
    wide = {name: tensor.double() for name, tensor in stored.items()}
    assert torch.equal(a, wide["q.lora_A"] * wide["q.lora_E"])
    assert torch.equal(b, wide["q.lora_B"])
    assert repr(adapter).endswith("AdaLoRA of 1 modules, rank 3>")


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_the_storage_floor_knows_of_the_diagonals_rounding(shape: tuple[int, int], tmp_path: Path) -> None:
    """E in bfloat16 between float32 factors: its rounding alone is ‖B‖ · ulp(e)/√12 · ‖A‖, in closed form."""
    b, a = torch.arange(1.0, 7.0).reshape(6, 1), torch.arange(1.0, 6.0).reshape(1, 5)
    tensors = {"q.lora_A": a, "q.lora_E": torch.tensor([[1.5]]).bfloat16(), "q.lora_B": b}
    adapter = adapter_folder(tmp_path / "adapter", tensors, peft_type="ADALORA", init_r=1, lora_alpha=3)
    base = write_base_of({"q.weight": torch.ones(shape)}, tmp_path / "base")
    (found,) = deltas(base, adapter)
    scale = 3 / (1 + 1e-5)
    expected = scale * float(b.norm() * a.norm()) * 2.0**-7 / 12**0.5
    # The float32 factors' own rounding is 2^-16 of it, and adds in squares.
    assert found.difference().floor.frobenius == pytest.approx(expected, rel=1e-6)
    assert found.spectrum().values[0] == pytest.approx(scale * 1.5 * float(b.norm() * a.norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("tensors", "fields", "error", "said"),
    [
        ({}, {"peft_type": "PREFIX_TUNING"}, UnsupportedFormat, "acts on activations and has no weight update"),
        ({}, {"peft_type": "PROMPT_TUNING"}, UnsupportedFormat, "acts on activations and has no weight update"),
        ({}, {"peft_type": "SPECTRA_HOULSBY"}, UnsupportedFormat, "acts on activations and has no weight update"),
        ({}, {"peft_type": "SPECTRA_GLORA"}, UnsupportedFormat, "merged/"),
        ({}, {"peft_type": "SPECTRA_FULLFINETUNE"}, UnsupportedFormat, "load_adapter"),
        ({}, {"peft_type": "LOHA"}, UnsupportedFormat, "LOHA.*merge_and_unload"),
        (TRIPLETS, {"init_r": 1}, MismatchError, "rank 1"),
        (TRIPLETS | {"q.lora_E": torch.ones(2)}, {}, MismatchError, r"lora_E' \(2,\)"),
        (TRIPLETS | {"q.lora_E": torch.ones(3, 1)}, {}, MismatchError, r"lora_E' \(3, 1\)"),
        ({name: t for name, t in TRIPLETS.items() if "E" not in name}, {}, MismatchError, "needs a lora_E"),
        ({"q.ia3_l": torch.ones(6, 1)}, {}, UnsupportedFormat, "key of IA3.*says ADALORA"),
        (TRIPLETS, {"peft_type": "IA3"}, UnsupportedFormat, "key of AdaLoRA.*says IA3|not understood"),
        ({"q.ia3_l": torch.ones(7, 1)}, {"peft_type": "IA3"}, MismatchError, r"\(7, 6\).*\(6, 5\)"),
        ({"q.ia3_l": torch.ones(6)}, {"peft_type": "IA3"}, MismatchError, "does not rescale"),
        ({"q.ia3_l": torch.ones(2, 3)}, {"peft_type": "IA3"}, MismatchError, "does not rescale"),
        ({"q.ia3_l": torch.ones(1, 1)}, {"peft_type": "IA3"}, UnsupportedFormat, "does not tell"),
        ({"q.ia3_l": torch.ones(1, 6, 1, 1)}, {"peft_type": "IA3"}, UnsupportedFormat, "does not tell"),
        ({"k.ia3_l": torch.ones(6, 1)}, {"peft_type": "IA3"}, MismatchError, "k.weight"),
        ({"q.ia3_l": torch.ones(6, 1).int()}, {"peft_type": "IA3"}, UnsupportedFormat, "I32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tensors: dict[str, torch.Tensor], fields: dict[str, Any], error: type[SpectraError], said: str, tmp_path: Path
) -> None:
    base = {"q.weight": TensorInfo("q.weight", "F32", (6, 5), "", 120)}
    with pytest.raises(error, match=said):
        adapter_folder(tmp_path, tensors, **{"peft_type": "ADALORA"} | fields).updates(base)
