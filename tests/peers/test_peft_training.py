"""Adapters trained here open in PEFT with the same logits, PEFT's open here, and both learn alike."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from spectra.errors import UnsupportedFormat
from spectra.methods import FullFineTune, GLoRA, Houlsby, LoRA, inject, load_adapter, save_adapter
from tests.methods.kinds import EVERYTHING, LINEAR, batch, logits, make
from tests.methods.test_common import CASES, train_a_little

peft = pytest.importorskip("peft")

TASK = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
SHORT = {
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
every = pytest.mark.parametrize("kind", LINEAR)

# What PEFT adds to logits of order one in another order of operations, float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def opened(model: Any, folder: Path) -> Any:
    """The model with an adapter in PEFT's hands, which complains of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


WITH_PEFT = {
    name: case
    for name, case in CASES.items()
    if case.method in {"LoRA", "QLoRA", "AdaLoRA", "IA3", "Prefix", "Prompt"} and not case.quantized
}


@every
@pytest.mark.parametrize("case", WITH_PEFT.values(), ids=WITH_PEFT)
def test_ours_opens_in_peft(case: Any, kind: str, tmp_path: Path) -> None:
    model = make(kind)
    injection = inject(model, case.where[kind], case.build(), also="^classifier$" if kind == "bert" else None)
    train_a_little(injection)
    if kind == "bert":
        model.classifier.weight.data.add_(0.5)
    save_adapter(injection, tmp_path, base_model="base", task_type=TASK[kind])
    theirs = opened(make(kind), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


@dataclass(frozen=True)
class Rival:
    """One of PEFT's configurations."""

    config: str
    options: Mapping[str, Any]
    refused: str | None = None


THEIRS = {
    "lora": Rival("LoraConfig", {"r": 3, "lora_alpha": 5}),
    "rslora": Rival("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True, "init_lora_weights": "gaussian"}),
    "patterns": Rival(
        "LoraConfig",
        {
            "r": 2,
            "rank_pattern": {r"\w*\.?[01]\..*": 5},
            "alpha_pattern": {r"(layers?|h)\.1\..*": 3, "c_attn|query|q_proj": 7},
        },
    ),
    "ia3": Rival("IA3Config", {}),
    "adalora": Rival("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2}),
    "prefix": Rival("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": Rival("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "dora": Rival("LoraConfig", {"r": 2, "use_dora": True}, refused="DoRA"),
    "lora-bias": Rival("LoraConfig", {"r": 2, "bias": "lora_only"}, refused="bias"),
    "vera": Rival("VeraConfig", {"r": 2}, refused="VERA"),
}


def of_peft(rival: Rival, kind: str) -> Any:
    """A model in PEFT's hands, every trained parameter moved from its start."""
    options = dict(rival.options)
    if rival.config not in ("PrefixTuningConfig", "PromptTuningConfig"):
        options.update(target_modules=SHORT[kind], fan_in_fan_out=kind == "gpt2")
    if rival.config == "VeraConfig":  # whose modules share one shape
        options["target_modules"] = SHORT[kind][:1]
    if rival.config == "IA3Config":
        options["feedforward_modules"] = SHORT[kind][-1:]
    model = peft.get_peft_model(make(kind), getattr(peft, rival.config)(task_type=TASK[kind], **options)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@every
@pytest.mark.parametrize("rival", THEIRS.values(), ids=THEIRS)
@pytest.mark.filterwarnings("ignore")
def test_theirs_opens_here(rival: Rival, kind: str, tmp_path: Path) -> None:
    theirs = of_peft(rival, kind)
    theirs.save_pretrained(tmp_path)
    model = make(kind)
    before = logits(model)
    if rival.refused:
        with pytest.raises(UnsupportedFormat, match=rival.refused):
            load_adapter(model, tmp_path)
        assert torch.equal(logits(model), before)
        return
    injection = load_adapter(model, tmp_path)
    assert "classifier" in injection.also or kind != "bert"
    # Opened again: PEFT sorts patterns when it saves, and which of two that match comes first decides.
    torch.testing.assert_close(logits(model), logits(opened(make(kind), tmp_path)), **CLOSE)


@every
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_learns_as_peft_does(kind: str, dropout: float, tmp_path: Path) -> None:
    """From one start, with one stream of dropout masks, five steps of AdamW give the same losses."""
    config = peft.LoraConfig(
        r=3, lora_alpha=6, lora_dropout=dropout, target_modules=SHORT[kind], fan_in_fan_out=kind == "gpt2"
    )
    theirs = peft.get_peft_model(make(kind), config)
    theirs.save_pretrained(tmp_path)
    ours = make(kind)
    load_adapter(ours, tmp_path, trainable=True)
    losses = []
    for model in (theirs.eval(), ours.eval()):
        for module in model.modules():
            if type(module).__name__ in ("LoRALinear", "Dropout") and (
                type(module).__name__ == "LoRALinear" or getattr(module, "p", None) == 0.3
            ):
                module.train()
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        labels = torch.tensor([0, 2]) if kind == "bert" else batch()["input_ids"]
        losses.append([])
        for _ in range(5):
            loss = model(**batch(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][0] != losses[0][-1]
    # At most one unit in float32's last place was seen, 1.2e-7; ten of them leave room for another machine's sums.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    "method", [FullFineTune(), GLoRA(rank=2), Houlsby(bottleneck=2)], ids=lambda m: type(m).__name__
)
def test_methods_that_peft_has_not(method: Any, tmp_path: Path) -> None:
    """PEFT refuses their folders by the type's name, before it touches the model."""
    where = EVERYTHING if isinstance(method, FullFineTune) else LINEAR
    save_adapter(inject(make("bert"), where["bert"], method), tmp_path, base_model="base", task_type=None)
    name = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    with pytest.raises((KeyError, ValueError), match=name):
        peft.PeftModel.from_pretrained(make("bert"), tmp_path)


def test_own_continues_there(tmp_path: Path) -> None:
    """A folder opens for training in PEFT, with the rank and alpha of every module as here."""
    method = LoRA(rank=2, rank_pattern={"query": 4}, alpha_pattern={"value": 3.0}, dropout=0.25)
    injection = inject(make("bert"), LINEAR["bert"], method)
    save_adapter(injection, tmp_path, base_model="base", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(make("bert"), tmp_path, is_trainable=True)
    query = theirs.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.query")
    value = theirs.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.value")
    assert (query.r["default"], query.scaling["default"]) == (4, 4.0)
    assert (value.r["default"], value.scaling["default"]) == (2, 1.5)
    assert query.lora_dropout["default"].p == 0.25
    assert query.lora_A["default"].weight.requires_grad
