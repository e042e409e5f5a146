"""The conformance table: what every method promises, on a BERT, a Llama and a GPT-2, whose linear maps are Conv1D."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectra.methods
from spectra.errors import MismatchError, UsageError
from spectra.methods import Injection, inject, injections, load_adapter, save_adapter
from spectra.methods.injection import is_conv1d
from spectra.methods.protocol import ActivationMethod, WeightMethod
from tests.methods.kinds import EMBEDDING, ENDS, EVERYTHING, KEYS, LINEAR, in_float64, logits, make

HEAD = {"bert": "^classifier$", "llama": None, "gpt2": None}
METHODS = {"AdaLoRA", "FullFineTune", "GLoRA", "Houlsby", "IA3", "LoRA", "Prefix", "Prompt", "QLoRA", "Subspace"}


@dataclass(frozen=True)
class Case:
    """One row: a method's class, its settings, where it goes, and what it promises at the start.

    `start` is how far the injected model's logits may be from the model's, relative to the largest of them: 0 is bit
    for bit, and None no promise. Of `quantized` methods the model to compare with is one of quantized weights.
    """

    method: str
    settings: Mapping[str, Any]
    where: Mapping[str, str]
    start: float | None = 0.0
    weights: bool = True
    quantized: bool = False

    def build(self) -> Any:
        return getattr(spectra.methods, self.method)(**self.settings)


CASES = {
    "full": Case("FullFineTune", {}, EVERYTHING),
    "subspace": Case("Subspace", {"dimension": 20}, EVERYTHING),
    "subspace-said": Case("Subspace", {"dimension": 40, "structure": "said", "projection": "kronecker"}, EVERYTHING),
    "lora": Case("LoRA", {"rank": 3}, LINEAR),
    "lora-gaussian": Case("LoRA", {"rank": 3, "init": "gaussian"}, LINEAR),
    "rslora": Case("LoRA", {"rank": 4, "rslora": True, "plus_ratio": 16.0}, LINEAR),
    "lora-patterns": Case(
        "LoRA", {"rank": 2, "rank_pattern": {r"\w*\.?[01]\..*": 5}, "alpha_pattern": {"c_attn|query|q_proj": 3}}, LINEAR
    ),
    "lora-embedding": Case("LoRA", {"rank": 3}, EMBEDDING),
    "qlora": Case("QLoRA", {"rank": 3}, LINEAR, quantized=True),
    "adalora": Case("AdaLoRA", {"rank": 2}, LINEAR),
    "glora": Case("GLoRA", {"rank": 2}, LINEAR),
    "ia3": Case("IA3", {}, KEYS),
    # Weights of standard deviation 0.01 in both maps: the update is of order 0.01² · width of what passes.
    "houlsby": Case("Houlsby", {"bottleneck": 4}, ENDS, start=1e-3, weights=False),
    # Virtual tokens are attended to from the first step on: no start leaves the model as it was.
    "prefix": Case("Prefix", {"tokens": 3}, EMBEDDING, start=None, weights=False),
    "prefix-mlp": Case("Prefix", {"tokens": 3, "mlp": True}, EMBEDDING, start=None, weights=False),
    "prompt": Case("Prompt", {"tokens": 3}, EMBEDDING, start=None, weights=False),
}

every = pytest.mark.parametrize("kind", LINEAR)
methods = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
on_weights = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.weights], ids=[k for k, c in CASES.items() if c.weights]
)


def put(case: Case, kind: str, *, head: bool = False) -> tuple[Any, Injection]:
    model = make(kind)
    return model, inject(model, case.where[kind], case.build(), also=HEAD[kind] if head else None)


def own(injection: Injection) -> dict[int, nn.Parameter]:
    parts = injection.parts.values()
    assert all(isinstance(part, ActivationMethod) for part in parts)
    return {id(p): p for part in parts for p in part.trainable_parameters()}


def train_a_little(injection: Injection, seed: int = 3) -> None:
    """Move every trained parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in own(injection).values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.1 * noise.to(parameter.dtype))


def test_every_method_is_in_the_table() -> None:
    public = set(spectra.methods.__all__) - {"Injection", "inject", "injections", "load_adapter", "save_adapter"}
    assert public == METHODS == {case.method for case in CASES.values()}


@every
@methods
def test_start(case: Case, kind: str) -> None:
    """At the start an injected model is the model."""
    before = logits(make(kind))
    model, injection = put(case, kind)
    after = logits(model)
    assert injection.matched > 0
    assert torch.isfinite(after).all()
    if case.quantized:
        assert not torch.equal(after, before)  # the base is: its weights are rounded
        for part in injection.parts.values():
            assert not part.delta_weight().any()
    elif case.start is not None:
        assert float((after - before).detach().abs().max()) <= case.start * float(before.detach().abs().max())
    else:
        assert not torch.equal(after, before)


@every
@methods
def test_gradients(case: Case, kind: str) -> None:
    """Its own parameters and the head get gradients; nothing else has so much as a buffer for one."""
    model, injection = put(case, kind, head=True)
    allowed = own(injection)
    for name in injection.also:
        allowed |= {id(p): p for p in model.get_submodule(name).parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(allowed)
    train_a_little(injection)  # products with a factor at zero give the other one no gradient
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in allowed), name
    moved = [p for p in allowed.values() if p.grad is not None and p.grad.any()]
    assert len(moved) >= 0.9 * len(allowed)  # a position or type that no text has gets zeros


@every
@methods
def test_gradcheck(case: Case, kind: str) -> None:
    """Gradients are the function's, by differences in float64 along random directions (gradcheck's fast mode)."""
    model = in_float64(make(kind))
    injection = inject(model, case.where[kind], case.build())
    train_a_little(injection)
    parameters = tuple(own(injection).values())[:12]
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(lambda *_: logits(model).sum(0), parameters, fast_mode=True)


@every
@on_weights
def test_merge(case: Case, kind: str) -> None:
    """A merged model computes what the adapted one does; taken out, every bit is back."""
    model, injection = put(case, kind)
    model.double()
    train_a_little(injection)
    assert all(isinstance(part, WeightMethod) for part in injection.parts.values())
    adapted, stored = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    injection.merge()
    injection.merge()  # twice is once
    assert all(part.merged for part in injection.parts.values())
    # Sums in another order, float64: some hundred roundings of numbers of order ten.
    torch.testing.assert_close(logits(model), adapted, rtol=1e-11, atol=1e-11)
    injection.unmerge()
    assert not any(part.merged for part in injection.parts.values())
    restored = model.state_dict()
    assert restored.keys() == stored.keys()
    assert all(torch.equal(restored[name], stored[name]) for name in stored)
    assert torch.equal(logits(model), adapted)


@every
@on_weights
def test_delta_weight(case: Case, kind: str) -> None:
    """`delta_weight` is (out, in), and what merging adds to the stored weight."""
    model, injection = put(case, kind)
    model.double()
    train_a_little(injection)
    deltas = {name: part.delta_weight() for name, part in injection.parts.items()}
    fresh = make(kind).double()
    if case.quantized:
        fresh = make(kind)
        inject(fresh, case.where[kind], case.build()).merge()
        fresh.double()
    injection.merge()
    for name in injection.parts:
        now, before = (getattr(m, "base", m) for m in (model.get_submodule(name), fresh.get_submodule(name)))
        moved = now.weight - before.weight
        moved = moved.t() if is_conv1d(now) else moved
        assert deltas[name].any()
        torch.testing.assert_close(deltas[name], moved.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if not c.weights], ids=[k for k, c in CASES.items() if not c.weights]
)
def test_nothing_to_merge(case: Case) -> None:
    """A method on activations says so; it has no `delta_weight` to be called by mistake."""
    _, injection = put(case, "bert")
    assert not any(hasattr(part, "delta_weight") for part in injection.parts.values())
    with pytest.raises(UsageError, match="acts on activations"):
        injection.merge()


@every
@methods
def test_folder(case: Case, kind: str, tmp_path: Path) -> None:
    """What is saved and loaded into a fresh base gives the same bits, the head trained whole included."""
    model, injection = put(case, kind, head=True)
    train_a_little(injection)
    for name in injection.also:
        for parameter in model.get_submodule(name).parameters():
            parameter.data.add_(1.0)
    save_adapter(injection, tmp_path, base_model="somewhere/base", task_type=None)
    fresh = make(kind)
    loaded = load_adapter(fresh, tmp_path, method=case.build() if case.quantized else None)
    assert loaded.parts.keys() == injection.parts.keys()
    assert torch.equal(logits(fresh), logits(model))
    assert not any(p.requires_grad for p in fresh.parameters())
    assert injections(fresh) == [loaded]


@every
@methods
def test_state(case: Case, kind: str) -> None:
    """A part takes what another gave; a missing, foreign or misshapen tensor is named."""
    (name, part), *_ = put(case, kind)[1].parts.items()
    _, injection = put(case, kind)
    train_a_little(injection)
    state = {key: tensor.clone() for key, tensor in injection.parts[name].state().items()}
    assert state
    part.load_state(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in part.state().items())
    (key, tensor), *rest = state.items()
    for wrong in (dict(rest), {**state, "stranger": tensor}, {**state, key: torch.cat([tensor, tensor])}):
        with pytest.raises(MismatchError):
            part.load_state(wrong)


@every
@methods
def test_copy(case: Case, kind: str) -> None:
    """A deep copy is a model of its own, and its injection is the copy's."""
    model, injection = put(case, kind)
    train_a_little(injection)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    (its,) = injections(twin)
    assert its.model is twin
    held = {id(p) for p in twin.parameters()}
    assert all(id(p) in held for p in own(its).values())
    train_a_little(its, seed=4)
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)


@every
@methods
def test_dtypes(case: Case, kind: str) -> None:
    """A model that is moved to another dtype computes in it."""
    model, injection = put(case, kind)
    train_a_little(injection)
    single = logits(model)
    double = logits(model.double())
    assert double.dtype == torch.float64
    # float32's roundings through two layers, against logits of order one.
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    half = logits(model.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()


@every
@methods
def test_half_base(case: Case, kind: str) -> None:
    """On a base in bfloat16 the part trains in float32, and the model's output keeps the base's dtype."""
    model = make(kind).bfloat16()
    injection = inject(model, case.where[kind], case.build())
    out = logits(model)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    if case.method != "FullFineTune":  # which trains the base's own weights
        assert {p.dtype for p in own(injection).values()} == {torch.float32}


@every
@methods
def test_autocast(case: Case, kind: str) -> None:
    """Under autocast a step runs, and gradients come in the parameters' dtype."""
    model, injection = put(case, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        out = logits(model)
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in own(injection).values())


@every
@methods
def test_seed(case: Case, kind: str) -> None:
    """One seed, one start."""
    first, second = (put(case, kind)[1] for _ in range(2))
    for a, b in zip(own(first).values(), own(second).values(), strict=True):
        assert torch.equal(a, b)


def test_rates() -> None:
    """A method that speaks of rates gives a positive one for each of its parameters."""
    for case in CASES.values():
        scale: Callable[[str], float] | None = getattr(case.build(), "learning_rate_scale", None)
        if scale is not None:
            _, injection = put(case, "bert")
            assert all(scale(n) > 0 for part in injection.parts.values() for n, _ in part.named_parameters())
