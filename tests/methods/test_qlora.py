"""QLoRA on tiny models: what it replaces, how it starts, trains, merges and is copied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectra.errors import NonFiniteMatrix, UsageError
from spectra.methods import LoRA, QLoRA, inject
from spectra.quantize import QuantizedLinear

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, **SMALL)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {
    bert: r"\.(query|key|value)$|\.dense$",
    llama: r"_proj$",
    gpt2: r"\.(c_attn|c_proj|c_fc)$",
}
IDS = torch.arange(24).view(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def adapted(request):
    make = request.param
    model = make()
    return model, inject(model, MODELS[make], QLoRA(rank=4, block=32)), make


def disturb(injection) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for part in injection.parts.values():
            part.lora_B.normal_(0.0, 0.1)


def test_starts_at_the_quantized_model(adapted):
    model, injection, make = adapted
    plain = make()
    for name in injection.parts:
        module = plain.get_submodule(name)
        rounded = QuantizedLinear.of(module, "nf4", block=32).weight
        module.weight.data = rounded if isinstance(module, nn.Linear) else rounded.t().contiguous()
    # The same sums of 32 to 64 float32 products a layer, not always in the same order.
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_only_the_factors_train_and_no_dense_weight_is_left(adapted):
    model, injection, _ = adapted
    model(input_ids=IDS).logits.sum().backward()
    own = {id(p) for part in injection.parts.values() for p in part.trainable_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name
    for part in injection.parts.values():
        assert isinstance(part.base, QuantizedLinear)
        assert all(p.ndim == 1 for p in part.base.parameters())  # the bias at most


def test_gradients_are_right_in_float64():
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    injection = inject(model, "", QLoRA(rank=2, block=8, format="fp4"))
    model.double()
    disturb(injection)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    own = tuple(p for part in injection.parts.values() for p in part.trainable_parameters())
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *own))


def test_merge_and_unmerge(adapted):
    model, injection, _ = adapted
    disturb(injection)
    before = logits(model)
    injection.merge()
    injection.merge()
    # float32: the update is added to the weight once, to the output otherwise.
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert all(part.merged for part in injection.parts.values())
    injection.unmerge()
    assert torch.equal(logits(model), before)
    for part in injection.parts.values():
        assert part.base.dense is None
        torch.testing.assert_close(part.delta_weight(), 4.0 * part.lora_B @ part.lora_A)


def test_copies_states_and_dtypes(adapted):
    model, injection, make = adapted
    disturb(injection)
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    other = make()
    there = inject(other, injection.pattern, QLoRA(rank=4, block=32), seed=7)
    for name, part in there.parts.items():
        part.load_state(injection.parts[name].state())
    assert torch.equal(logits(other), before)
    half = logits(copy.deepcopy(model).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    # Eight bits of mantissa through two layers.
    torch.testing.assert_close(half.float(), before, rtol=0.1, atol=0.05)


def test_the_same_seed_draws_lora_s_start():
    model, plain = bert(), bert()
    quantized = inject(model, "query", QLoRA(rank=4), seed=3)
    lora = inject(plain, "query", LoRA(rank=4), seed=3)
    for name, part in quantized.parts.items():
        assert torch.equal(part.lora_A, lora.parts[name].lora_A)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_loftq_starts_nearer_to_the_full_model(make, rslora):
    whole = make()
    distance = {}
    for start in ("lora", "loftq"):
        model = make()
        injection = inject(model, MODELS[make], QLoRA(rank=4, alpha=32, rslora=rslora, format="int4", start=start))
        off = 0.0
        for name, part in injection.parts.items():
            module = whole.get_submodule(name)
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
            off += float((weight.detach() - part.base.weight - part.delta_weight()).square().sum())
        distance[start] = off
    # The four leading of 32 directions of rounding errors hold more than 4/32 of their energy.
    assert distance["loftq"] < (1 - 4 / 32) * distance["lora"]


def test_learning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    injection = inject(model, "", QLoRA(rank=2, alpha=4))
    codes = [part.base.codes.clone() for part in injection.parts.values()]
    x = torch.randn(64, 16)
    target = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(part.base.codes, c) for part, c in zip(injection.parts.values(), codes, strict=True))


def test_refusals_leave_the_model_alone():
    model = bert()
    before = logits(model)
    with pytest.raises(UsageError, match="above min"):
        inject(model, "query|classifier", QLoRA(rank=8))
    model.bert.encoder.layer[1].attention.self.query.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteMatrix):
        inject(model, "query", QLoRA(rank=8))
    model.bert.encoder.layer[1].attention.self.query.weight.data[0, 0] = 0.0
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert logits(model).shape == before.shape
    with pytest.raises(UsageError, match="known are nf4"):
        QLoRA(format="nf5")
    with pytest.raises(UsageError, match="loftq"):
        QLoRA(start="pissa")
    with pytest.raises(UsageError, match="dropout"):
        QLoRA(dropout=1.0)


def test_peft_config():
    assert inject(bert(), "query", QLoRA(rank=4)).method.peft_type == "LORA"
    injection = inject(gpt2(), "c_attn", QLoRA(rank=4, start="loftq"))
    config = injection.method.peft_config(injection)
    assert config["fan_in_fan_out"] is True
    assert config["init_lora_weights"] == "loftq"
    assert config["target_modules"] == ["c_attn"]


def test_weights_held_as_codes_are_counted():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3))
    before = sum(p.numel() for p in model.parameters())
    injection = inject(model, "^0$", QLoRA(rank=2))
    assert injection.total == before + 2 * (64 + 64)
