"""An extracted adapter opens in PEFT and gives what it says: base plus truncated update, to the dtype."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectra.checkpoints import open_checkpoint
from spectra.checkpoints.adapter import Adapter
from spectra.checkpoints.checkpoint import Checkpoint
from spectra.extract import Extraction, extract
from tests.extract.tuned import save, truncated, tune
from tests.methods.kinds import VOCABULARY, batch, make

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANK = 3
# Entries are of order 1: a product and a sum in float32, and of logits a few layers of them.
WEIGHTS, LOGITS = 1e-6, 2e-5


def untied(kind: str) -> Any:
    """A model of one kind with a head of its own, where it would be tied."""
    if kind != "gpt2":
        return make(kind)
    model = make("gpt2")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.1)
    return model


def expected(base: Any, tuned: Any, found: Extraction) -> dict[str, torch.Tensor]:
    """Weights that the record says the adapter gives, by the model's names."""
    treatment = {row["module"]: row for row in found.tensors if row["treatment"] == "factors"}
    before, after = base.state_dict(), tuned.state_dict()
    weights = {}
    for name, new in after.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in treatment:
            delta = truncated(new - before[name], treatment[module]["rank"])
            weights[name] = (before[name].double() + delta).float()
        else:
            weights[name] = new
    return weights


def opened(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**batch()).logits
    return out


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("options", [{"rank": RANK}, {"energy": 0.9}, {"rank": RANK, "embeddings": "save"}])
def test_peft_gives_base_plus_truncated_update(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = untied(kind)
    tuned = tune(base)
    found = extract(save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned"), out=tmp_path / "out", **options)
    assert not [row for row in found.tensors if row["treatment"] in ("listed", "failed")]
    want = expected(base, tuned, found)
    model = copy.deepcopy(base)
    model.load_state_dict(want)
    adapted = opened(base, found.out)
    torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=LOGITS)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=LOGITS)
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, want[name], rtol=0, atol=WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_this_package_reads_it_as_peft_does(kind: str, tmp_path: Path) -> None:
    base = untied(kind)
    folder = save(base, tmp_path / "base")
    found = extract(folder, save(tune(base), tmp_path / "tuned"), out=tmp_path / "out", energy=0.8)
    adapter, checkpoint = open_checkpoint(found.out), open_checkpoint(folder)
    assert isinstance(adapter, Adapter)
    assert isinstance(checkpoint, Checkpoint)
    ours = adapter.merged(checkpoint)
    theirs = opened(base, found.out).merge_and_unload().state_dict()
    for name in checkpoint:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=WEIGHTS)


def test_headless_base_and_a_classifier(tmp_path: Path) -> None:
    """The base has other prefixes and no head: the adapter carries the head, and one call loads both."""
    tuned = tune(make("bert"))
    base = copy.deepcopy(make("bert"))
    folder = save(base.bert, tmp_path / "base")
    found = extract(folder, save(tuned, tmp_path / "tuned"), out=tmp_path / "out", rank=RANK)
    config = json.loads((found.out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "classifier" in config["modules_to_save"]
    base.classifier = copy.deepcopy(tuned.classifier)
    model = copy.deepcopy(base)
    model.load_state_dict(expected(base, tuned, found))
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(found.out, num_labels=3).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=LOGITS)


def test_tied_embeddings_are_right_once_merged(tmp_path: Path) -> None:
    base = make("gpt2")
    tuned = tune(base)
    found = extract(save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned"), out=tmp_path / "out", rank=RANK)
    assert any("tied to the output head" in sentence for sentence in found.verdict)
    model = copy.deepcopy(base)
    model.load_state_dict(
        expected(base, tuned, found) | {"lm_head.weight": expected(base, tuned, found)["transformer.wte.weight"]}
    )
    merged = opened(base, found.out).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=LOGITS)


def test_tied_embeddings_saved_whole_are_right_merged_or_not(tmp_path: Path) -> None:
    base = make("gpt2")
    tuned = tune(base)
    found = extract(
        save(base, tmp_path / "base"),
        save(tuned, tmp_path / "tuned"),
        out=tmp_path / "out",
        rank=32,
        embeddings="save",
    )
    adapted = opened(base, found.out)
    torch.testing.assert_close(logits(adapted), logits(tuned), rtol=0, atol=LOGITS)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), logits(tuned), rtol=0, atol=LOGITS)


def test_shifts_of_biases_where_every_target_has_one(tmp_path: Path) -> None:
    base = make("bert")
    tuned = tune(base)
    found = extract(
        save(base, tmp_path / "base"),
        save(tuned, tmp_path / "tuned"),
        out=tmp_path / "out",
        rank=RANK,
        embeddings="list",
    )
    assert found.config["lora_bias"] is True
    model = copy.deepcopy(base)
    want = expected(base, tuned, found)
    listed = {row["name"] for row in found.tensors if row["treatment"] == "listed"}
    assert len(listed) == 3
    model.load_state_dict({name: base.state_dict()[name] if name in listed else new for name, new in want.items()})
    adapted = opened(base, found.out)
    torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=LOGITS)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(base), rtol=0, atol=LOGITS)


def test_rank_patterns_of_layers_one_and_eleven(tmp_path: Path) -> None:
    """A pattern for layer 1 that also matched layer 11 would give it the wrong shape, and PEFT would not load it."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    base = transformers.BertModel(config).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer, rank in ((1, 2), (11, 5), (10, 5)):
            query = tuned.encoder.layer[layer].attention.self.query.weight
            query.add_(truncated(torch.randn(8, 8, generator=torch.Generator().manual_seed(layer)), rank).float())
    found = extract(
        save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned"), out=tmp_path / "out", energy=0.999999
    )
    assert {row["module"]: row["rank"] for row in found.tensors if row["treatment"] == "factors"} == {
        "encoder.layer.1.attention.self.query": 2,
        "encoder.layer.10.attention.self.query": 5,
        "encoder.layer.11.attention.self.query": 5,
    }
    merged = opened(base, found.out).merge_and_unload().state_dict()
    for name, weight in tuned.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-5)  # a millionth of the energy is left


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_factors_give_the_error_that_is_told(dtype: str, tmp_path: Path) -> None:
    base = untied("llama")
    tuned = tune(base)
    found = extract(
        save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned"), out=tmp_path / "out", rank=RANK, dtype=dtype
    )
    merged = opened(base, found.out).merge_and_unload().state_dict()
    for row in found.tensors:
        if row["treatment"] == "factors":
            left = float((tuned.state_dict()[row["name"]].double() - merged[row["name"]].double()).norm())
            # What PEFT leaves is the error of the stored factors and float32's rounding of the sum.
            assert left == pytest.approx(row["error"], rel=1e-5)
            assert row["error"] > row["optimum"] * (1 + 1e-9)


def test_reranked_adapter_of_peft(tmp_path: Path) -> None:
    """LoRA of mixed ranks and scales, rank-stabilised, from PEFT itself: down to rank 2 by its factors."""
    base = untied("bert")
    folder = save(base, tmp_path / "base")
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=6,
        lora_alpha=9,
        use_rslora=True,
        rank_pattern={"key": 4},
        target_modules=["query", "key", "word_embeddings"],
    )
    torch.manual_seed(3)
    trained = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    trained.save_pretrained(tmp_path / "lora")
    whole = trained.merge_and_unload().state_dict()
    found = extract(folder, tmp_path / "lora", out=tmp_path / "out", rank=2)
    assert {row["treatment"] for row in found.tensors} == {"factors", "whole"}
    merged = opened(base, found.out).merge_and_unload().state_dict()
    ranks = {row["module"] + ".weight": row["rank"] for row in found.tensors if row["treatment"] == "factors"}
    assert len(ranks) == 5
    for name, weight in whole.items():
        before = base.state_dict()[name]
        want = (before.double() + truncated(weight - before, ranks[name])).float() if name in ranks else weight
        torch.testing.assert_close(merged[name], want, rtol=0, atol=5e-6)  # the merged float32 sum is the reference


VARIANTS = {
    # Not for a task: beside a head saved whole PEFT 0.21 writes the head's bias twice.
    "bias=all": {"bias": "all", "task_type": None},
    "bias=lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "DoRA, which is not of low rank": {"use_dora": True},
    "a norm saved whole": {"modules_to_save": ["bert.encoder.layer.1.output.LayerNorm"]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_all_of_an_adapter_comes_along(options: dict[str, Any], tmp_path: Path) -> None:
    """At full rank nothing is lost: the extraction merges to what the adapter merges to."""
    base = make("bert")
    settings = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **options}
    config = peft.LoraConfig(**settings)
    torch.manual_seed(4)
    trained = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    trained.save_pretrained(tmp_path / "lora")
    whole = trained.merge_and_unload().state_dict()
    found = extract(save(base, tmp_path / "base"), tmp_path / "lora", out=tmp_path / "out", rank=32)
    assert not [row for row in found.tensors if row["treatment"] in ("listed", "failed")]
    merged = opened(base, found.out).merge_and_unload().state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = torch.nn.Conv2d(3, 8, 3)
        self.fc = torch.nn.Linear(8, 4)
        self.config = {"model_type": "custom"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.stem(x).mean((2, 3)))
        return y


def test_kernels_of_an_adapter_are_reranked(tmp_path: Path) -> None:
    from tests.extract.tuned import save_tensors

    folder = save_tensors(tmp_path / "base", dict(Convolutions().state_dict()))
    trained = peft.get_peft_model(Convolutions(), peft.LoraConfig(r=4, target_modules=["stem", "fc"]))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    trained.save_pretrained(tmp_path / "lora")
    found = extract(folder, tmp_path / "lora", out=tmp_path / "out", rank=2)
    before, after = Convolutions().state_dict(), trained.merge_and_unload().state_dict()
    merged = peft.PeftModel.from_pretrained(Convolutions(), found.out).merge_and_unload().state_dict()
    for name in ("stem.weight", "fc.weight"):
        want = before[name].double() + truncated((after[name] - before[name]).flatten(1), 2).reshape(before[name].shape)
        torch.testing.assert_close(merged[name].double(), want, rtol=0, atol=2e-6)


def test_pruned_adalora_becomes_lora(tmp_path: Path) -> None:
    base = make("bert")
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=6, target_r=3, lora_alpha=7, total_step=9, target_modules=["query", "dense"]
    )
    trained = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    trained.save_pretrained(tmp_path / "adalora")
    whole = trained.merge_and_unload().state_dict()
    found = extract(save(base, tmp_path / "base"), tmp_path / "adalora", out=tmp_path / "out", energy=1.0)
    assert {row["rank"] for row in found.tensors if row["treatment"] == "factors"} == {6}
    merged = opened(base, found.out).merge_and_unload().state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=5e-6)
