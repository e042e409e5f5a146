"""Where tensors go: by names, shapes and configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectra.extract import plan
from spectra.extract.places import Place, model_of, module_of, table_kind, task_type
from tests.extract.tuned import save_tensors


@pytest.mark.parametrize(
    ("architecture", "more", "task"),
    [
        ("BertForSequenceClassification", {}, "SEQ_CLS"),
        ("BertForTokenClassification", {}, "TOKEN_CLS"),
        ("BertForQuestionAnswering", {}, "QUESTION_ANS"),
        ("LlamaForCausalLM", {}, "CAUSAL_LM"),
        ("GPT2LMHeadModel", {}, "CAUSAL_LM"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "SEQ_2_SEQ_LM"),
        ("LlavaForConditionalGeneration", {}, None),
        ("BertModel", {}, "FEATURE_EXTRACTION"),
        ("BertForMaskedLM", {}, None),
        ("GPT2DoubleHeadsModel", {}, None),
    ],
)
def test_task_follows_the_class(architecture: str, more: dict[str, bool], task: str | None) -> None:
    assert task_type({"architectures": [architecture], **more}) == task


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": None}, {"architectures": [3]}])
def test_no_class_no_task(config: dict[str, object]) -> None:
    assert task_type(config) is None


@pytest.mark.parametrize(
    ("stored", "place"),
    [
        ("h.0.q.weight", ("h.0.q", "weight")),
        ("module.bert.embeddings.LayerNorm.beta", ("bert.embeddings.LayerNorm", "bias")),
        ("base_model.model.h.0.q.lora_A.default.weight", ("h.0.q", "lora_A.default.weight")),
        ("base_model.model.emb.lora_embedding_A", ("emb", "lora_embedding_A")),
        ("base_model.model.classifier.modules_to_save.default.weight", ("classifier", "weight")),
        ("base_model.model.h.0.q.base_layer.bias", ("h.0.q", "bias")),
    ],
)
def test_module_of_a_stored_name(stored: str, place: tuple[str, str]) -> None:
    assert module_of(stored) == place


def test_tables() -> None:
    kinds = {
        "model.embed_tokens.weight": "embedding",
        "bert.embeddings.position_embeddings.weight": "embedding",
        "model.decoder.embed_positions.weight": "whole",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "whole",
        "electra.embeddings_project.weight": "linear",
        "lm_head.weight": "linear",
        "embed_out.weight": "linear",
        "h.0.mlp.c_fc.weight": "linear",
    }
    assert {name: table_kind(name) for name in kinds} == kinds


def places(
    folder: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **options: object
) -> dict[str, Place]:
    config = json.dumps(options.pop("config", {}))
    one, two = save_tensors(folder / "base", base, config), save_tensors(folder / "tuned", tuned, config)
    todo = plan(one, two, out=folder / "out", rank=1, allow_partial=True, **options)  # type: ignore[arg-type]
    return {place.name: place for place in todo.places}


def test_kinds_of_a_layer(tmp_path: Path) -> None:
    tensors = {
        "wte.weight": torch.zeros(9, 4),
        "h.0.q.weight": torch.zeros(4, 4),
        "h.0.q.bias": torch.zeros(4),
        "h.0.norm.weight": torch.zeros(4),
        "h.0.norm.bias": torch.zeros(4),
        "h.0.conv.weight": torch.zeros(4, 4, 3),
        "h.0.gate": torch.zeros(4, 4),
        "position_ids": torch.zeros(1, 9, dtype=torch.int64),
        "mask.weight": torch.zeros(4, 4, dtype=torch.int32),
    }
    found = places(tmp_path, tensors, tensors | {"head.weight": torch.zeros(2, 4)})
    assert {name: place.kind for name, place in found.items()} == {
        "wte.weight": "embedding",
        "h.0.q.weight": "linear",
        "h.0.q.bias": "bias",
        "h.0.norm.weight": "whole",
        "h.0.norm.bias": "whole",
        "h.0.conv.weight": "whole",
        "h.0.gate": "listed",
        "mask.weight": "listed",
        "head.weight": "whole",
    }
    assert "h.0.gate".rpartition(".")[2] in found["h.0.gate"].reason
    assert "I32" in found["mask.weight"].reason


def test_rest_and_embeddings_can_be_listed(tmp_path: Path) -> None:
    tensors = {"wte.weight": torch.zeros(9, 4), "q.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(4)}
    found = places(tmp_path, tensors, tensors, embeddings="list", rest="list")
    assert {name: place.kind for name, place in found.items()} == {
        "wte.weight": "listed",
        "q.weight": "linear",
        "norm.weight": "listed",
    }


def test_conv1d_is_told_by_its_bias(tmp_path: Path) -> None:
    """A square Conv1D follows the others of the layers; the head, a plain linear map, does not."""
    tensors = {
        "h.0.c_attn.weight": torch.zeros(4, 12),
        "h.0.c_attn.bias": torch.zeros(12),
        "h.0.c_proj.weight": torch.zeros(4, 4),
        "h.0.c_proj.bias": torch.zeros(4),
        "h.0.plain.weight": torch.zeros(4, 4),
        "score.weight": torch.zeros(4, 4),
        "score.bias": torch.zeros(4),
    }
    found = places(tmp_path, tensors, tensors)
    assert {name for name, place in found.items() if place.transposed} == {"h.0.c_attn.weight", "h.0.c_proj.weight"}


def test_linear_maps_are_no_conv1d(tmp_path: Path) -> None:
    tensors = {
        "h.0.up.weight": torch.zeros(12, 4),
        "h.0.up.bias": torch.zeros(12),
        "h.0.o.weight": torch.zeros(4, 4),
        "h.0.o.bias": torch.zeros(4),
    }
    assert not any(place.transposed for place in places(tmp_path, tensors, tensors).values())


def test_all_square_layers_follow_the_model_type(tmp_path: Path) -> None:
    tensors = {"h.0.c_proj.weight": torch.zeros(4, 4), "h.0.c_proj.bias": torch.zeros(4)}
    found = places(tmp_path, tensors, tensors, config={"model_type": "gpt2"})
    assert found["h.0.c_proj.weight"].transposed


def test_base_stored_the_other_way_round(tmp_path: Path) -> None:
    """The fine-tune holds Conv1D's (in, out), the base a linear map's (out, in): the base's view counts."""
    tuned = {"h.0.c_attn.weight": torch.zeros(4, 12), "h.0.c_attn.bias": torch.zeros(12)}
    base = tuned | {"h.0.c_attn.weight": torch.zeros(12, 4)}
    assert not places(tmp_path, base, tuned)["h.0.c_attn.weight"].transposed


def test_a_longer_vocabulary_is_listed(tmp_path: Path) -> None:
    base = {"wte.weight": torch.zeros(9, 4), "h.0.q.weight": torch.zeros(4, 4)}
    found = places(tmp_path, base, base | {"wte.weight": torch.zeros(11, 4)})
    assert found["wte.weight"].kind == "listed"
    assert "9 → 11 rows" in found["wte.weight"].reason


def test_head_is_saved_whatever_is_included(tmp_path: Path) -> None:
    """PEFT looks for the classifier of a classification model."""
    base = {"h.0.q.weight": torch.zeros(4, 4)}
    tuned = base | {"classifier.dense.weight": torch.zeros(4, 4), "classifier.out.weight": torch.zeros(2, 4)}
    found = places(tmp_path, base, tuned, include="h.0", config={"architectures": ["RobertaForSequenceClassification"]})
    assert {name: place.kind for name, place in found.items()} == {
        "h.0.q.weight": "linear",
        "classifier.dense.weight": "whole",
        "classifier.out.weight": "whole",
    }


def test_peft_takes_what_ends_like_a_head_for_one(tmp_path: Path) -> None:
    tensors = {
        "pre_classifier.weight": torch.zeros(4, 4),
        "classifier.weight": torch.zeros(2, 4),
        "q.weight": torch.zeros(4, 4),
    }
    found = places(tmp_path, tensors, tensors, config={"architectures": ["DistilBertForSequenceClassification"]})
    assert found["pre_classifier.weight"].kind == "whole"


def test_ties_are_seen(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(9, 4), "model.layers.0.q.weight": torch.zeros(4, 4)}
    config = {"architectures": ["LlamaForCausalLM"]}
    folder = save_tensors(tmp_path / "m", tensors, json.dumps(config))
    todo = plan(folder, save_tensors(tmp_path / "t", tensors, json.dumps(config)), out=tmp_path / "o", rank=1)
    model = model_of(todo.base, todo.tuned)
    assert (model.tied, model.tied_head) == ("model.embed_tokens", "lm_head")
    own = tensors | {"lm_head.weight": torch.zeros(9, 4)}
    untied = plan(
        save_tensors(tmp_path / "m2", own),
        save_tensors(tmp_path / "t2", own, json.dumps(config)),
        out=tmp_path / "o",
        rank=1,
    )
    assert untied.model.tied is None
