"""LoRA's own arithmetic: scales, starts, dropout, rates, ties, mixed precision; what all methods share is elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from spectra.errors import UnsupportedFormat, UsageError
from spectra.methods import LoRA, inject
from spectra.methods.lora import LoRALinear
from tests.methods.kinds import EMBEDDING, LINEAR, batch, logits, make
from tests.methods.test_common import train_a_little


def part_of(base: nn.Module, method: LoRA) -> Any:
    return inject(nn.Sequential(base), "0", method).parts["0"]


def filled(base: nn.Module, method: LoRA) -> Any:
    part = part_of(base, method)
    generator = torch.Generator().manual_seed(2)
    for parameter in part.trainable_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return part


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_forward_is_the_paper_s(rslora: bool, scale: float) -> None:
    base = nn.Linear(7, 5, dtype=torch.float64)
    part = filled(base, LoRA(rank=4, alpha=16, rslora=rslora))
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    dense = base.weight + scale * part.lora_B @ part.lora_A
    torch.testing.assert_close(part(x), nn.functional.linear(x, dense, base.bias))  # any number of leading axes
    torch.testing.assert_close(part(x[0, 0]), nn.functional.linear(x[0, 0], dense, base.bias))
    torch.testing.assert_close(part.delta_weight(), dense - base.weight)
    assert part(x[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("padding", [None, 1])
def test_embedding(padding: int | None) -> None:
    base = nn.Embedding(9, 5, padding_idx=padding, dtype=torch.float64)
    part = filled(base, LoRA(rank=2, alpha=6))
    ids = torch.tensor([[1, 4], [8, 4]])
    table = base.weight + 3 * (part.lora_embedding_B @ part.lora_embedding_A).t()
    torch.testing.assert_close(part(ids), nn.functional.embedding(ids, table))
    part(ids).sum().backward()
    trained = part.lora_embedding_A.grad.abs().sum(0) > 0  # padding's row gets no gradient, as torch's does not
    assert trained.nonzero().flatten().tolist() == ([1, 4, 8] if padding is None else [4, 8])


def test_starts() -> None:
    uniform = part_of(nn.Linear(400, 300), LoRA(rank=50)).lora_A.detach()
    normal = part_of(nn.Linear(400, 300), LoRA(rank=50, init="gaussian")).lora_A.detach()
    bound = 1 / math.sqrt(400)
    assert float(uniform.abs().max()) <= bound
    # 20 000 entries: the standard deviation is known to 0.5 %, six times that is never seen.
    assert float(uniform.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert float(normal.std()) == pytest.approx(1 / 50, rel=0.03)


def test_seeds_differ() -> None:
    starts = [inject(nn.Sequential(nn.Linear(6, 4)), "0", LoRA(rank=2), seed=s).parts["0"].lora_A for s in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_dropout_is_on_the_factors_input_in_training_alone() -> None:
    base = nn.Linear(200, 4, dtype=torch.float64)
    part = filled(base, LoRA(rank=2, alpha=2, dropout=0.5))
    x = torch.randn(1, 200, dtype=torch.float64)
    torch.manual_seed(0)
    out = part(x) - base(x)
    torch.manual_seed(0)
    thinned = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(out, thinned @ part.lora_A.t() @ part.lora_B.t())
    part.eval()
    torch.testing.assert_close(part(x) - base(x), x @ part.lora_A.t() @ part.lora_B.t())


def test_rates_of_lora_plus() -> None:
    injection = inject(make("gpt2"), "c_attn|wte", LoRA(rank=2, plus_ratio=16))
    rates = {
        name: LoRA(plus_ratio=16).learning_rate_scale(name)
        for name, parameter in injection.model.named_parameters()
        if parameter.requires_grad
    }
    assert {name.rpartition(".")[2]: rate for name, rate in rates.items()} == {
        "lora_A": 1,
        "lora_B": 16,
        "lora_embedding_A": 1,
        "lora_embedding_B": 16,
    }


def test_tied_head_keeps_its_weight() -> None:
    """Merging into embeddings that a language model's head shares must not change the head, and unmerging reties it."""
    model = make("gpt2")
    injection = inject(model, EMBEDDING["gpt2"], LoRA(rank=2))
    train_a_little(injection)
    adapted, head = logits(model), model.lm_head.weight.clone()
    injection.merge()
    assert torch.equal(model.lm_head.weight, head)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)  # float32
    injection.unmerge()
    assert model.lm_head.weight is model.transformer.wte.base.weight


def test_merged_part_trains_no_more_and_moves() -> None:
    """A model that is moved while it is merged gets its weight back in the new dtype."""
    model = make("bert")
    injection = inject(model, LINEAR["bert"], LoRA(rank=2))
    train_a_little(injection)
    before = logits(model)
    injection.merge()
    model.double()
    injection.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)
    torch.testing.assert_close(logits(model).float(), before, rtol=1e-4, atol=1e-4)  # float32's roundings


def test_half_base_is_rounded_once() -> None:
    base = nn.Linear(64, 32).bfloat16()
    part = filled(base, LoRA(rank=4, alpha=4))
    x = torch.randn(5, 64).bfloat16()
    exact = base(x).double() + x.double() @ part.lora_A.double().t() @ part.lora_B.double().t()
    error = (part(x).double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-5).all())  # half a unit in bfloat16's last place, and float32's sum


def test_no_gradient_for_the_frozen_weight() -> None:
    part = part_of(nn.Linear(6, 4), LoRA(rank=2))
    x = torch.randn(3, 6, requires_grad=True)
    part(x).sum().backward()
    assert part.base.weight.grad is part.base.bias.grad is None
    assert x.grad is not None


def test_hooks_of_the_base_see_its_own_output() -> None:
    part = filled(nn.Linear(6, 4), LoRA(rank=2))
    seen: list[torch.Tensor] = []
    part.base.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(3, 6)
    part(x)
    assert torch.equal(seen[0], nn.functional.linear(x, part.base.weight, part.base.bias))


def test_patterns_first_match_wins() -> None:
    method = LoRA(rank=2, alpha=4, rank_pattern={"value": 3, r"layer\.0\..*": 4}, alpha_pattern={"query": 9})
    injection = inject(make("bert"), r"self\.(query|value)$", method)
    found = {name.split("encoder.layer.")[1]: (p.lora_A.shape[0], p.scale) for name, p in injection.parts.items()}
    assert found == {
        "0.attention.self.query": (4, 9 / 4),
        "0.attention.self.value": (3, 4 / 3),
        "1.attention.self.query": (2, 9 / 2),
        "1.attention.self.value": (3, 4 / 3),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"plus_ratio": 0.0},
        {"init": "zeros"},
        {"rank_pattern": {"q": 0}},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LoRA(**wrong)


def test_rank_above_the_matrix_names_it_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 4))
    with pytest.raises(UsageError, match=r"rank 5 is above min\(4, 9\) of 1"):
        inject(model, "0|1", LoRA(rank=5))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_variants_without_a_part_are_refused() -> None:
    for fields in ({"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}):
        with pytest.raises(UnsupportedFormat):
            LoRA.from_peft_config({"peft_type": "LORA", **fields})


def test_learns() -> None:
    """Twenty steps take a classifier's loss on one batch down by half."""
    model = make("bert")
    injection = inject(model, LINEAR["bert"], LoRA(rank=4), also="^classifier$")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([0, 2])
    losses = []
    for _ in range(20):
        loss = model(**batch(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(part.delta_weight().any() for part in injection.parts.values())
