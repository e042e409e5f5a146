"""GLoRA: every structure's forward pass, merging with biases, and the search over structures."""

from __future__ import annotations

import copy
import random
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spectra.errors import MismatchError, UsageError
from spectra.methods.glora import CHOICES, GLoRA, GLoRALinear, Structure
from spectra.methods.glora_search import GLoRASupernet, SearchSpace, SupernetHooks, evolve, narrow, search
from spectra.methods.injection import Injection, inject, injections

STRUCTURES = [Structure(*kinds, rank=2) for kinds in product(*CHOICES.values())]


class Conv1D(nn.Module):
    """As transformers': the weight lies (in, out)."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.randn(inner, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def part_of(structure: Structure, base: nn.Module | None = None, seed: int = 0) -> GLoRALinear:
    """A part with every support tensor away from its start, in float64."""
    generator = torch.Generator().manual_seed(seed)
    part = GLoRALinear((base or nn.Linear(6, 5)).double(), structure, generator)
    for parameter in part.trainable_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return part


def full(part: GLoRALinear, letter: str, shape: tuple[int, int]) -> torch.Tensor:
    """A support tensor written out, from the state alone."""
    state = part.state()
    if f"glora_{letter}_left" in state:
        return state[f"glora_{letter}_left"] @ state[f"glora_{letter}_right"]
    return state.get(f"glora_{letter}", torch.zeros(1, 1, dtype=torch.float64)).expand(shape)


@pytest.mark.parametrize("bias", [True, False])
def test_every_structure_computes_the_papers_formula(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=bias)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    for structure in STRUCTURES:
        part = part_of(structure, base)
        w, b = base.weight, base.bias if bias else torch.zeros(5, dtype=torch.float64)
        a, shift = full(part, "a", (5, 6)), full(part, "b", (5, 6))
        c = full(part, "c", (6, 1))[:, 0]
        d, e = full(part, "d", (5, 1))[:, 0], full(part, "e", (5, 1))[:, 0]
        wanted = x @ (w + w * a + shift).T + b + b * d + e + w @ c
        # float64 sums of a dozen terms of order 10.
        torch.testing.assert_close(part(x), wanted, rtol=1e-12, atol=1e-12, msg=str(structure))
        count = sum(p.numel() for p in part.trainable_parameters())
        assert count == structure.parameters(5, 6, bias=bias), structure


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Linear(6, 5, bias=False), lambda: Conv1D(6, 5)])
def test_merging_gives_the_forward_pass_and_unmerging_every_bit(make: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6, dtype=torch.float64)
    for structure in STRUCTURES[::7]:
        base = make()
        part = part_of(structure, base)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        wanted, delta, shift = part(x), part.delta_weight(), part.delta_bias()
        part.merge()
        part.merge()
        torch.testing.assert_close(base(x), wanted, rtol=1e-12, atol=1e-12, msg=str(structure))
        torch.testing.assert_close(part(x), wanted, rtol=1e-12, atol=1e-12)
        assert torch.equal(part.delta_weight(), delta)
        assert torch.equal(part.delta_bias(), shift)
        part.unmerge()
        part.unmerge()
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_the_start_changes_nothing_and_every_tensor_can_leave_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64)
    for structure in STRUCTURES:
        base = nn.Linear(6, 5).double()
        part = GLoRALinear(base, structure, torch.Generator().manual_seed(1))
        assert torch.equal(part(x), base(x)), structure
        if any(True for _ in part.trainable_parameters()):
            part(x).square().sum().backward()
        for name, parameter in part.named_parameters():
            if name.startswith("glora_") and not name.endswith("_right"):  # a right factor waits for its left one
                assert parameter.grad is not None, (structure, name)
                assert parameter.grad.any(), (structure, name)


def test_a_half_precision_base_does_not_swallow_small_updates() -> None:
    structure = Structure("none", "scalar", "none", "none", "none")
    part = GLoRALinear(nn.Linear(2, 1, dtype=torch.bfloat16), structure, torch.Generator())
    with torch.no_grad():
        part.base.weight.copy_(torch.tensor([[1.0, -1.0]]))
        part.base.bias.zero_()
        part.get_parameter("glora_b").fill_(1e-3)  # an eighth of bfloat16's spacing above 1
    out = part(torch.ones(1, 2, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.item() == pytest.approx(2e-3, rel=2**-8)  # one rounding to bfloat16


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"a": "matrix"}, "a is one of lora"), ({"c": "scalar"}, "c is one of"), ({"rank": 0}, "at least 1")],
)
def test_a_structure_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GLoRA(**fields)


def chain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def test_structures_by_module_come_back_from_their_config() -> None:
    method = GLoRA(rank=2, structures={"2": Structure(a="none", b="vector", c="none", rank=1)})
    injection = inject(chain(), r"^[02]$", method)
    assert GLoRA.from_peft_config(method.peft_config(injection)) == method
    shapes = {name: {key: tuple(t.shape) for key, t in part.state().items()} for name, part in injection.parts.items()}
    assert shapes["2"] == {"glora_b": (6, 1), "glora_d": (6, 1), "glora_e": (6, 1)}
    assert shapes["0"]["glora_a_left"] == (8, 2)


def test_a_structure_for_no_module_or_a_rank_too_high_is_refused() -> None:
    with pytest.raises(UsageError, match="does not match: 4"):
        inject(chain(), "^0$", GLoRA(structures={"4": Structure()}))
    with pytest.raises(UsageError, match="4 is 4 × 6"):
        inject(chain(), ".", GLoRA(rank=5))
    inject(chain(), ".", GLoRA(rank=5, a="vector", b="none"))


def supernet_of(seed: int = 0, space: SearchSpace | None = None) -> Injection:
    return inject(chain(), r"^[02]$", GLoRASupernet(space or SearchSpace(ranks=(1, 2)), seed=seed))


def parts_of(injection: Injection) -> dict[str, GLoRALinear]:
    return {name: part for name, part in injection.parts.items() if isinstance(part, GLoRALinear)}


def test_a_supernet_draws_by_seed_and_step() -> None:
    hooks = supernet_of().hooks
    assert isinstance(hooks, SupernetHooks)
    drawn = []
    for step in range(20):
        drawn.append([part.structure for part in hooks.parts.values()])
        hooks.on_gradients(step, 20)
        hooks.after_step(step, 20)
    assert len({str(row) for row in drawn}) > 15
    assert any(row[0] != row[1] for row in drawn)
    state = supernet_of()
    assert state.hooks is not None
    state.hooks.load_state_dict({"next": 7})
    assert [part.structure for part in parts_of(state).values()] == drawn[7]
    other = supernet_of(seed=1)
    assert [part.structure for part in parts_of(other).values()] != drawn[0]


def test_smaller_structures_are_leading_parts_of_the_supernet() -> None:
    part = part_of(SearchSpace(ranks=(1, 3)).largest())
    left, right = part.get_parameter("glora_b_left"), part.get_parameter("glora_b_right")
    cases = {
        "lora": left[:, :1] @ right[:1],
        "vector": left[:, :1].expand(5, 6),
        "scalar": left[:1, :1].expand(5, 6),
        "none": torch.zeros(5, 6, dtype=torch.float64),
    }
    for kind, wanted in cases.items():
        part.structure = Structure("none", kind, "none", "none", "none", rank=1)
        torch.testing.assert_close(part.delta_weight(), wanted)
    part.structure = Structure("none", "none", "none", "none", "scalar")
    torch.testing.assert_close(part.delta_bias(), part.get_parameter("glora_e")[0].expand(5))


def test_evolution_finds_what_chance_would_not() -> None:
    names, space = [f"m{i}" for i in range(12)], SearchSpace()
    target = {name: space.draw(random.Random(f"target{name}")) for name in names}

    def alike(genes: Any) -> float:
        return sum(getattr(genes[n], f) == getattr(target[n], f) for n in names for f in CHOICES) / 60

    found = evolve(names, space, alike, lambda genes: 0, 50, 20, 10, 0.05)
    again = evolve(names, space, alike, lambda genes: 0, 50, 20, 10, 0.05)
    assert found == again
    assert 900 < found.tried <= 50 * 21  # late generations run out of new ones
    assert list(found.best) == sorted(found.best)
    source = random.Random(5)
    chance = max(alike({name: space.draw(source) for name in names}) for _ in range(found.tried))
    assert chance < 0.6
    assert found.score > 0.8


def test_the_search_keeps_to_its_limits_and_leaves_the_best_in_the_model() -> None:
    injection = supernet_of()
    for part in parts_of(injection).values():
        for parameter in part.trainable_parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))

    def score() -> float:
        return injection.model(x).sum().item()

    found = search(injection, score, population=12, generations=4, parents=4, limit=60, least=20)
    assert 20 <= found.parameters <= 60
    assert score() == found.score == max(found.best)
    assert {name: part.structure for name, part in parts_of(injection).items()} == found.genes
    with pytest.raises(UsageError, match="between 0 and -1"):
        search(injection, score, population=2, generations=0, limit=-1)


def test_a_narrowed_supernet_is_plain_glora_with_the_same_output() -> None:
    injection = supernet_of()
    for part in parts_of(injection).values():
        for parameter in part.trainable_parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    found = search(injection, lambda: 0.0, population=3, generations=1, parents=2)
    x = torch.randn(5, 8)
    wanted = injection.model(x)
    plain = narrow(injection, found.genes)
    assert injections(plain.model) == [plain]
    assert torch.equal(plain.model(x), wanted)
    assert plain.trainable == found.parameters
    fresh = inject(chain(), r"^[02]$", GLoRA.from_peft_config(plain.method.peft_config(plain)))
    for name, part in parts_of(fresh).items():
        part.load_state(parts_of(plain)[name].state())
    assert torch.equal(fresh.model(x), wanted)
    with pytest.raises(UsageError, match="the model carries GLoRA"):
        search(plain, lambda: 0.0)


def test_a_supernet_is_no_adapter() -> None:
    injection = supernet_of()
    with pytest.raises(UsageError, match="narrow"):
        injection.method.peft_config(injection)


def test_tensors_of_another_structure_are_refused() -> None:
    part = part_of(Structure(a="vector", b="none", c="none"))
    with pytest.raises(MismatchError, match="glora_a"):
        part.load_state(part_of(Structure(a="lora", b="none", c="none")).state())


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"a": ()}, "no kind for a"), ({"b": ("matrix",)}, "'matrix'"), ({"ranks": ()}, "ranks"), ({"ranks": (0,)}, "ra")],
)
def test_a_space_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SearchSpace(**fields)


@pytest.mark.parametrize("numbers", [(0, 1, 1, 0.1), (1, -1, 1, 0.1), (1, 1, 0, 0.1), (1, 1, 1, 1.5)])
def test_a_search_of_impossible_size_is_refused(numbers: tuple[int, int, int, float]) -> None:
    with pytest.raises(UsageError, match="a search needs"):
        evolve(["m"], SearchSpace(), lambda genes: 0.0, lambda genes: 0, *numbers)


def test_a_trained_supernet_finds_the_structure_that_made_the_data() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher[0].weight.mul_(1.0 + torch.linspace(-0.8, 0.8, 8)[:, None])  # a vector A, and nothing else
    kinds = dict.fromkeys("abcde", ("vector", "none"))
    injection = inject(model, ".", GLoRASupernet(SearchSpace(**kinds, ranks=(1,))))
    hooks = injection.hooks
    assert hooks is not None
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    for step in range(400):
        loss = functional.mse_loss(model(x), teacher(x))
        optimizer.zero_grad()
        if loss.requires_grad:  # the empty structure trains nothing
            loss.backward()
            hooks.on_gradients(step, 400)
            optimizer.step()
        hooks.after_step(step, 400)

    def fitness() -> float:
        with torch.no_grad():
            return -functional.mse_loss(model(x), teacher(x)).item()

    found = search(injection, fitness, population=16, generations=4, parents=4, limit=8)
    assert str(found.genes["0"]) == "vector/none/none/none/none@1"
