"""`inject` on any module tree: counts, what it freezes, and each way to ask for something that cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods import IA3, LoRA, Prompt, inject, injections
from spectra.methods.injection import features, is_conv1d, is_linear, parent_of
from spectra.methods.targets import module_names, shortest_endings, target_modules
from tests.methods.kinds import LINEAR, make


def tree() -> nn.Module:
    return nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
            "b": nn.ModuleDict({"query": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "drop": nn.Dropout()}),
            "head": nn.Linear(6, 2),
        }
    )


def test_counts() -> None:
    injection = inject(tree(), "^a|^b", LoRA(rank=2), also="^head$")
    assert sorted(injection.parts) == ["a.0", "b.query"]
    assert injection.matched == 2
    assert set(injection.ignored) == {"a", "a.1", "b", "b.norm", "b.drop"}
    assert injection.also == ("head",)
    assert injection.trainable == 2 * (4 + 4) + 2 * (4 + 6) + (6 * 2 + 2)
    assert injection.total == injection.trainable + (4 * 4 + 4) + 2 * 4 + (4 * 6 + 6) + 2 * 6
    assert repr(injection) == (
        "LoRA at 2 modules matching '^a|^b', 5 of another kind ignored, head trained whole: 50 of 120 parameters "
        "train (41.67%)"
    )


def test_everything_else_is_frozen_and_the_head_is_not_wrapped() -> None:
    model = tree()
    inject(model, "query|head", LoRA(rank=2), also="head")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"b.query.lora_A", "b.query.lora_B", "head.weight", "head.bias"}


def test_a_module_of_its_own_kind() -> None:
    """Any torch module does, and the outermost of those trained whole is listed."""
    model = tree()
    injection = inject(model, "a", LoRA(rank=1), also="b|head")
    assert injection.also == ("b", "head")
    assert injections(model) == [injection]


@pytest.mark.parametrize(
    ("pattern", "also", "message"),
    [
        ("(", None, "not a regular expression"),
        ("nothing", None, r"'nothing' matches no module; the model has a\.0, b\.query, head"),
        ("norm", None, "matches 1 modules .LayerNorm., none of a kind LoRA accepts"),
        ("query", "tail", "also = 'tail' matches no module"),
        ("query", "b", "is trained whole by also"),
    ],
)
def test_what_cannot_be(pattern: str, also: str | None, message: str) -> None:
    model = tree()
    with pytest.raises(UsageError, match=message):
        inject(model, pattern, LoRA(rank=1), also=also)
    assert injections(model) == []


def test_twice_is_refused() -> None:
    model = tree()
    inject(model, "query", LoRA(rank=1))
    with pytest.raises(UsageError, match="carries LoRA at 1 modules"):
        inject(model, "head", IA3())


def test_a_method_without_a_place() -> None:
    with pytest.raises(UsageError, match="none of a fitting kind"):
        inject(tree(), "word_embeddings", Prompt(tokens=2))


def test_linear_maps() -> None:
    model = make("gpt2")
    conv = model.transformer.h[0].attn.c_attn
    assert is_conv1d(conv)
    assert is_linear(conv)
    assert features(conv) == (96, 32)
    assert conv.weight.shape == (32, 96)
    assert features(nn.Linear(5, 3)) == (3, 5)
    assert parent_of(model, "lm_head") == (model, "lm_head")


@pytest.mark.parametrize("kind", LINEAR)
def test_endings_match_the_parts_alone(kind: str) -> None:
    injection = inject(make(kind), LINEAR[kind], LoRA(rank=1))
    endings = target_modules(injection)
    assert isinstance(endings, list)
    matched = {n for n in module_names(injection) if any(n == e or n.endswith(f".{e}") for e in endings)}
    assert matched == set(injection.parts)
    assert module_names(injection) == [name for name, _ in make(kind).named_modules() if name]


def test_a_name_that_ends_another() -> None:
    """No ending tells ``dense`` from ``x.dense``: the names become one expression, which PEFT matches whole."""
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "x": nn.ModuleDict({"dense": nn.Linear(2, 2)})})
    assert shortest_endings(["dense"], ["dense", "x", "x.dense"]) is None
    assert target_modules(inject(model, "^dense$", LoRA(rank=1))) == "dense"
    assert torch.equal(model["dense"](torch.zeros(1, 2)), model["dense"].base.bias[None])
