"""Houlsby's adapters: the formula, the start near the identity, counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods import Houlsby, inject
from spectra.methods.houlsby import Bottleneck
from tests.methods.kinds import ENDS, make


@pytest.mark.parametrize(
    ("activation", "function"),
    [("gelu", nn.GELU()), ("relu", nn.ReLU()), ("silu", nn.SiLU()), ("tanh", nn.Tanh())],
)
def test_formula(activation: str, function: nn.Module) -> None:
    """h + W_up f(W_down h), weights written out."""
    base = nn.Linear(5, 4)
    part = Bottleneck(base, 3, torch.Generator().manual_seed(0), activation=activation)
    for parameter in part.trainable_parameters():
        parameter.data.normal_()
    state = part.state()
    x = torch.randn(2, 6, 5)
    h = base(x)
    inner = function(h @ state["adapter_down.weight"].t() + state["adapter_down.bias"])
    wanted = h + inner @ state["adapter_up.weight"].t() + state["adapter_up.bias"]
    torch.testing.assert_close(part(x), wanted)


def test_start_is_a_truncated_normal() -> None:
    """Standard deviation 1e-2 cut at two of them, biases zero; a cut normal's own deviation is 0.88 of that."""
    part = Bottleneck(nn.Linear(4, 300), 200, torch.Generator().manual_seed(0))
    for weight in (part.adapter_down.weight, part.adapter_up.weight):
        assert float(weight.detach().abs().max()) <= 2e-2
        # 60 000 draws: the deviation is known to 0.3 %.
        assert float(weight.detach().std()) == pytest.approx(0.8796e-2, rel=0.02)
    assert not part.adapter_down.bias.any()
    assert not part.adapter_up.bias.any()


def test_start_leaves_the_global_generator_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    inject(model, "0", Houlsby(bottleneck=2))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("kind", ENDS)
def test_counts(kind: str) -> None:
    """2·m·d + m + d scalars behind each of two projections a layer."""
    model = make(kind)
    injection = inject(model, ENDS[kind], Houlsby(bottleneck=6))
    assert injection.matched == 4
    assert injection.trainable == 4 * (2 * 6 * 32 + 6 + 32)


def test_layer_norms_train_beside_it() -> None:
    """The paper trains them too: `also` names them."""
    model = make("bert")
    injection = inject(model, ENDS["bert"], Houlsby(bottleneck=2), also=r"LayerNorm$")
    assert len(injection.also) == 5
    assert model.bert.encoder.layer[0].output.LayerNorm.weight.requires_grad


def test_wrong_settings() -> None:
    with pytest.raises(UsageError, match="at least 1 wide"):
        Houlsby(bottleneck=0)
    with pytest.raises(UsageError, match=r"gelu, relu, silu, tanh, not 'swish'"):
        Houlsby(activation="swish")
