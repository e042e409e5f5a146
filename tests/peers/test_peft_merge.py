"""An adapter read here equals what PEFT merges, for tiny random models of real architectures."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import Checkpoint, open_checkpoint
from spectra.checkpoints.adapter import (
    Adapter,
    DoraUpdate,
    LowRankUpdate,
    RebasedUpdate,
    ReplacementUpdate,
    ShiftUpdate,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


def bert(kind: str = "BertModel") -> torch.nn.Module:
    config = transformers.BertConfig(vocab_size=37, max_position_embeddings=16, num_labels=3, **SMALL)
    return getattr(transformers, kind)(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(vocab_size=37, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config)


def vit() -> torch.nn.Module:
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    return transformers.ViTModel(config)


def classifier() -> torch.nn.Module:
    return bert("BertForSequenceClassification")


@dataclass(frozen=True)
class Case:
    """One adapter to make with PEFT: `kinds` are the updates expected, `exact` whether every bit must agree."""

    model: Any
    options: dict[str, Any]
    kinds: set[type]
    dtype: torch.dtype = torch.float32
    exact: bool = True
    adapter_dtype: torch.dtype | None = None


LINEAR = {"target_modules": ["query", "value", "dense"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
ESCAPED = {
    "rank_pattern": {r"encoder\.layer\.0\.attention\.self\.query": 2, "value": 5, r"layer\.1\..*\.query": 3},
    "alpha_pattern": {
        r"layer\.[01]\.attention\.self\.value": 3,
        "^encoder.layer.1.attention.self.query": 40,
        "(key|dense)": 7,
    },
}

# DoRA divides and takes norms. PEFT applies the transposes at other places, so the two round differently: a few units
# in the last place of float32, of entries of order 0.1.
DORA = {"use_dora": True}
CASES = {
    "plain": Case(bert, LINEAR, {LowRankUpdate}),
    "rank-stabilised": Case(bert, LINEAR | {"use_rslora": True, "lora_alpha": 5}, {LowRankUpdate}),
    "patterns": Case(
        bert, LINEAR | {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.1.output.dense": 9}}, {LowRankUpdate}
    ),
    "escaped patterns": Case(bert, LINEAR | ESCAPED | {"use_rslora": True}, {LowRankUpdate}),
    "DoRA": Case(bert, LINEAR | DORA, {DoraUpdate}, exact=False),
    "fan-in-fan-out": Case(gpt2, CONV1D, {LowRankUpdate}),
    "fan-in-fan-out with DoRA": Case(gpt2, CONV1D | DORA, {DoraUpdate}, exact=False),
    "square fan-in-fan-out and a tied head": Case(
        gpt2, {"target_modules": ["c_attn", "c_proj", "lm_head"]}, {LowRankUpdate, RebasedUpdate}
    ),
    "embeddings": Case(bert, {"target_modules": ["word_embeddings", "query"]}, {LowRankUpdate}),
    "embeddings that are saved too": Case(
        llama, {"target_modules": ["embed_tokens", "q_proj"]}, {LowRankUpdate, RebasedUpdate}
    ),
    "position embeddings": Case(bert, {"target_modules": ["position_embeddings"]}, {LowRankUpdate}),
    "embeddings with DoRA": Case(
        bert, {"target_modules": ["position_embeddings", "query"]} | DORA, {DoraUpdate}, exact=False
    ),
    "modules to save": Case(
        classifier, LINEAR | {"task_type": "SEQ_CLS", "target_modules": ["query"]}, {LowRankUpdate, ReplacementUpdate}
    ),
    "bias of B": Case(bert, LINEAR | {"lora_bias": True}, {LowRankUpdate, ShiftUpdate}),
    "every bias": Case(bert, LINEAR | {"bias": "all"}, {LowRankUpdate, ReplacementUpdate}),
    "biases of targets": Case(bert, LINEAR | {"bias": "lora_only"}, {LowRankUpdate, ReplacementUpdate}),
    "biases of targets and of B": Case(
        bert, LINEAR | {"bias": "lora_only", "lora_bias": True}, {LowRankUpdate, RebasedUpdate}
    ),
    "llama": Case(llama, {"target_modules": "all-linear"}, {LowRankUpdate}),
    "bfloat16 base": Case(llama, {"target_modules": "all-linear"}, {LowRankUpdate}, dtype=torch.bfloat16),
    "bfloat16 base and factors": Case(
        llama, {"target_modules": "all-linear"}, {LowRankUpdate}, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16
    ),
    "bfloat16 embeddings": Case(
        bert, {"target_modules": ["position_embeddings", "query"]}, {LowRankUpdate}, dtype=torch.bfloat16
    ),
    "float64 base": Case(bert, LINEAR, {LowRankUpdate}, dtype=torch.float64),
    "float16 DoRA": Case(bert, LINEAR | DORA, {DoraUpdate}, dtype=torch.float16, exact=False),
    "convolution": Case(vit, {"target_modules": ["projection"]}, {LowRankUpdate}, exact=False),
    "convolution with DoRA": Case(vit, {"target_modules": ["projection"]} | DORA, {DoraUpdate}, exact=False),
}


Made = tuple[Case, Checkpoint, Adapter, dict[str, torch.Tensor]]


def merged_by_peft(case: Case, folder: Path) -> tuple[Checkpoint, Adapter, dict[str, torch.Tensor]]:
    """Make a random adapter with PEFT, save it, and let PEFT load and merge it."""
    torch.manual_seed(1)
    model = case.model().to(case.dtype)
    distinct = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}
    (folder / "base").mkdir()
    stored = {name: tensor for name, tensor in model.state_dict().items() if name in distinct.values()}
    save_file(stored, folder / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | case.options))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                    assert parameter.abs().sum() > 0, name
        if case.adapter_dtype is not None:
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(case.adapter_dtype)
        tuned.save_pretrained(folder / "adapter")
        fresh = case.model().to(case.dtype)
        fresh.load_state_dict(stored, strict=False)
        merged = peft.PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload()
    base, adapter = open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter")
    assert isinstance(base, Checkpoint)
    assert isinstance(adapter, Adapter)
    return base, adapter, merged.state_dict()


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case = CASES[request.param]
    return case, *merged_by_peft(case, tmp_path_factory.mktemp("peft"))


def test_merged_tensors_are_those_of_peft(made: Made) -> None:
    case, base, adapter, expected = made
    updates = adapter.updates(base.infos())
    assert {type(update) for update in updates} == case.kinds
    merged = pickle.loads(pickle.dumps(adapter.merged(base)))
    assert set(base) <= set(merged) <= set(expected)
    for name in merged:
        if case.exact:
            # The same operations in the same order on the same factors: no bit may differ.
            assert torch.equal(merged[name], expected[name]), name
        else:
            # A rounding or two of the stored dtype, of entries of order one.
            torch.testing.assert_close(merged[name], expected[name], rtol=4 * torch.finfo(case.dtype).eps, atol=1e-7)
        assert merged[name].dtype == expected[name].dtype
    changed = {name for name in merged if name not in base or not torch.equal(merged[name], base[name])}
    assert changed == {update.name for update in updates}


def test_deltas_are_the_differences_that_peft_makes(made: Made) -> None:
    case, base, adapter, expected = made
    for update in adapter.updates(base.infos()):
        before, after = base[update.name].double(), expected[update.name].double()
        delta = adapter.delta(update, base[update.name])
        assert delta.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        # What was stored is W + ΔW rounded to its dtype (and, for an embedding, ΔW rounded too); ΔW is float32.
        step = 2 * torch.finfo(case.dtype).eps * after.abs().max() + 4e-6 * (case.dtype != torch.float64)
        assert (after - before - delta.double()).abs().max() <= step, update
        if isinstance(update, LowRankUpdate):
            b, a = adapter.factors(update)
            product = update.scale * b.double() @ a.double()
            assert product.shape == delta.flatten(1).shape
            # float32 products of rank at most 5 with entries of order one.
            torch.testing.assert_close(product, delta.double().flatten(1), rtol=1e-5, atol=1e-6)


def test_a_headless_base_takes_the_adapter_of_a_classifier(tmp_path: Path) -> None:
    """The base is stored without ``bert.``; the new head is a replacement of nothing."""
    case = Case(classifier, {"task_type": "SEQ_CLS", "target_modules": ["query"]}, set())
    full, adapter, expected = merged_by_peft(case, tmp_path)
    headless = {name.removeprefix("bert."): full[name] for name in full if name.startswith("bert.")}
    (tmp_path / "headless").mkdir()
    save_file(headless, tmp_path / "headless" / "model.safetensors")
    base = open_checkpoint(tmp_path / "headless")
    assert isinstance(base, Checkpoint)
    merged = adapter.merged(base)
    assert set(merged) == {*headless, "classifier.weight", "classifier.bias"}
    for name in merged:
        assert torch.equal(merged[name], expected[name if "classifier" in name else f"bert.{name}"]), name


def test_a_head_that_the_base_ties_acts_on_the_embeddings(tmp_path: Path) -> None:
    base, adapter, expected = merged_by_peft(CASES["square fan-in-fan-out and a tied head"], tmp_path)
    assert "lm_head.weight" not in base
    assert "transformer.wte.weight" in {update.name for update in adapter.updates(base.infos())}
    assert torch.equal(adapter.merged(base)["transformer.wte.weight"], expected["lm_head.weight"])


PATTERNS = r"""
    query layer.0.query layer\.0\.query ^bert.layer.0.query (query|value) layer.[0-3].key [^.]*key
    layer\.\d+\.key .*\.0\..* qu?ery (?:a|b)+c x{2,3} x{2} x{2,}y a|bc|d \w+\.c []x]+ query$ lay.r.0.qu.ry
    (a|ab)(c|bcd)(d*) ((q)(u)(e?)ry) a*?b v-1 1x [\]a]z [\w.]+end [^\]]x (|a)b x{0,2}y (a*)*b
"""
NAMES = """
    query bert.layer.0.query bert.layer.10.query layer.0.query a.evalue x.value bert.layer.2.key ]x n.x]x abcd acd
    bert.layer.12.key ery qery m.ababc abc xx x.xxx xxxx m.xxxxy bc a n.d p.q.c . a. .a aab b v-1 1x p.]z y xy m.x
    one.two.end layerX0Xquery é.c bert.bert.layer.0.query
"""


def test_patterns_find_what_peft_finds() -> None:
    """Every kind of pattern against every kind of name, PEFT's own function as the oracle."""
    from peft.utils.other import get_pattern_key

    from spectra.checkpoints.module_patterns import PatternTable

    matched = 0
    for pattern in [*PATTERNS.split(), ""]:
        for name in [*NAMES.split(), ""]:
            expected = get_pattern_key([pattern, "never"], name) == pattern and re.match(rf"(.*\.)?({pattern})$", name)
            found = PatternTable({pattern: 1}, source="test").find(name)
            assert (found is not None) == bool(expected), (pattern, name)
            matched += found is not None
    assert matched > 60
