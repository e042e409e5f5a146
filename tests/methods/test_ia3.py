"""IA3: rescaled rows and columns, biases, names in PEFT's configuration."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectra.errors import MismatchError, UsageError
from spectra.methods import IA3, inject
from spectra.methods.ia3 import FEEDFORWARD, IA3Linear
from tests.methods.kinds import KEYS, make


def linear(rows: int = 3, cols: int = 5, *, conv: bool = False) -> nn.Module:
    torch.manual_seed(0)
    module = Conv1D(rows, cols) if conv else nn.Linear(cols, rows)
    module.bias.data.normal_()
    return module.double().requires_grad_(False)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_formula(columns: bool, conv: bool) -> None:
    """l ⊙ (Wx + b) at outputs, W(l ⊙ x) + b at inputs, with W and b read off the plain module."""
    base = linear(conv=conv)
    weight = base.weight.t() if conv else base.weight
    part = IA3Linear(base, columns=columns)
    scale = torch.linspace(-2.0, 3.0, part.ia3_l.numel(), dtype=torch.float64)
    part.ia3_l.data.copy_(scale.view_as(part.ia3_l))
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    wanted = (x * scale) @ weight.t() + base.bias if columns else (x @ weight.t() + base.bias) * scale
    torch.testing.assert_close(part(x), wanted, rtol=1e-13, atol=1e-13)  # sums of five terms in float64
    torch.testing.assert_close(part.delta_weight(), weight * (scale if columns else scale[:, None]) - weight)


@pytest.mark.parametrize("columns", [False, True])
def test_merging_scales_the_bias_of_rows_alone(columns: bool) -> None:
    base = linear()
    weight, bias = base.weight, base.bias
    before, delta = bias.clone(), None
    part = IA3Linear(base, columns=columns)
    part.ia3_l.data.fill_(2.0)
    delta = part.delta_weight()
    part.merge()
    torch.testing.assert_close(base.bias.data, before if columns else 2 * before)
    assert torch.equal(part.delta_weight(), delta)  # of the frozen weight, merged or not
    part.unmerge()
    assert base.weight is weight
    assert base.bias is bias
    assert torch.equal(bias, before)


def test_a_layer_without_bias_merges() -> None:
    part = IA3Linear(nn.Linear(3, 2, bias=False), columns=False)
    part.ia3_l.data.fill_(0.5)
    x = torch.randn(2, 3)
    wanted = part(x)
    part.merge()
    torch.testing.assert_close(part(x), wanted)


@pytest.mark.parametrize("kind", KEYS)
def test_vectors_of_the_paper(kind: str) -> None:
    """Keys and values are rescaled where they come out, the feed-forward's activation where it goes in."""
    model = make(kind)
    parts = inject(model, KEYS[kind], IA3()).parts
    assert {name.rpartition(".")[2] for name, part in parts.items() if part.columns} == {
        {"bert": "dense", "llama": "down_proj", "gpt2": "c_proj"}[kind]
    }
    assert all((part.ia3_l.shape[0] == 1) == part.columns for part in parts.values())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bert.encoder.layer.0.output.dense", True),
        ("bert.encoder.layer.0.intermediate.dense", False),
        ("bert.encoder.layer.0.attention.self.value", False),
        ("transformer.h.3.mlp.c_proj", True),
        ("transformer.h.3.attn.c_proj", False),
        ("encoder.block.0.layer.1.DenseReluDense.wo", True),
        ("decoder.layers.0.fc2", True),
        ("decoder.layers.0.xfc2", False),
    ],
)
def test_feedforward_names(name: str, found: bool) -> None:
    module = nn.Linear(2, 2)
    assert inject(_nested(name, module), ".", IA3()).parts[name].columns is found
    assert IA3().feedforward == FEEDFORWARD


def _nested(name: str, module: nn.Module) -> nn.Module:
    for segment in reversed(name.split(".")):
        holder = nn.Module()
        holder.add_module(segment, module)
        module = holder
    return module


def test_names_for_peft_are_short_where_they_can_be() -> None:
    model = make("bert")
    method = IA3()
    config = method.peft_config(inject(model, KEYS["bert"], method))
    assert set(config["feedforward_modules"]) < set(config["target_modules"])
    assert set(config["target_modules"]) == {"key", "value", "0.output.dense", "1.output.dense"}
    assert config["fan_in_fan_out"] is False


def test_names_that_endings_would_confuse_are_given_whole() -> None:
    """PEFT takes an ending of letters: "1" would make "11" a feed-forward module."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    method = IA3(feedforward="^1$")
    config = method.peft_config(inject(model, "^(1|11)$", method))
    assert config["feedforward_modules"] == "1"
    assert sorted(config["target_modules"].split("|")) == ["1", "11"]


def test_wrong_settings_and_vectors() -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        IA3(feedforward="(")
    part = IA3Linear(nn.Linear(3, 2), columns=True)
    with pytest.raises(MismatchError, match="IA3 vector over inputs"):
        part.load_state({"ia3_l": torch.ones(2, 1)})
