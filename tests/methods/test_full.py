"""Full fine-tuning as a method: nothing wrapped, every parameter trains, the update is what moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectra.methods import FullFineTune, inject
from tests.methods.kinds import LINEAR, logits, make
from tests.methods.test_common import train_a_little


@pytest.mark.parametrize("kind", LINEAR)
def test_the_model_stays_what_it_was(kind: str) -> None:
    model, plain = make(kind), make(kind)
    injection = inject(model, "", FullFineTune())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert injection.trainable == injection.total == sum(p.numel() for p in plain.parameters())


def test_delta_is_what_moved_and_conv1d_is_turned() -> None:
    model = make("gpt2")
    injection = inject(model, "", FullFineTune())
    fresh = make("gpt2")
    assert not any(part.delta_weight().any() for part in injection.parts.values())
    train_a_little(injection)
    name = "transformer.h.0.attn.c_attn"
    moved = model.get_submodule(name).weight - fresh.get_submodule(name).weight
    assert injection.parts[name].delta_weight().shape == (96, 32)
    assert torch.equal(injection.parts[name].delta_weight(), moved.t().detach())
    bias = model.get_submodule(name).bias - fresh.get_submodule(name).bias
    assert torch.equal(injection.parts[name].deltas()["bias"], bias.detach())


def test_a_module_without_a_weight() -> None:
    """Experts and tokens are parameters without that name: they train, and their update is the largest one's."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(2, 3, 4))
            self.scale = nn.Parameter(torch.ones(2))
            self.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

    injection = inject(nn.Sequential(Experts()), "0", FullFineTune())
    assert injection.trainable == 26
    injection.model[0].gate_up.data.add_(2.0)
    assert torch.equal(injection.parts["0"].delta_weight(), torch.full((2, 3, 4), 2.0))


def test_only_the_pattern_trains() -> None:
    injection = inject(make("bert"), r"attention\.self\.query$", FullFineTune())
    assert injection.trainable == 2 * (32 * 32 + 32)


def test_moving_the_model_keeps_the_update() -> None:
    """`.to` may exchange parameters; the part follows the module, and subtracts in the wider dtype."""
    model = make("llama")
    injection = inject(model, "", FullFineTune())
    before = logits(model)
    model.double()
    part = injection.parts["model.layers.0.self_attn.q_proj"]
    assert not part.delta_weight().any()
    model.model.layers[0].self_attn.q_proj.weight.data.add_(1e-9)  # far below float32's resolution of the weight
    torch.testing.assert_close(part.delta_weight(), torch.full((32, 32), 1e-9, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(model).float(), before, rtol=1e-4, atol=1e-4)
