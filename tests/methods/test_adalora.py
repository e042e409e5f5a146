"""AdaLoRA's parts and hooks: what is pruned when, what a folder says, how a run resumes, and that it learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spectra.errors import MismatchError, UsageError
from spectra.importance import Stretches, budget
from spectra.methods.adalora import AdaLoRA, AdaLoRALinear
from spectra.methods.adalora_budget import AdaLoRAHooks
from spectra.methods.injection import Injection, inject


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 8)).to(dtype)


def hooks_of(injection: Injection) -> AdaLoRAHooks:
    assert isinstance(injection.hooks, AdaLoRAHooks)
    return injection.hooks


def parts_of(injection: Injection) -> dict[str, AdaLoRALinear]:
    return {name: part for name, part in injection.parts.items() if isinstance(part, AdaLoRALinear)}


def moved(injection: Injection, seed: int = 1) -> None:
    """Parameters away from the start, λ of 0 among them."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts_of(injection).values():
        for parameter in part.trainable_parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 12, generator=generator)
    return x, torch.stack([x[:, i] * x[:, i + 1] for i in range(8)], dim=1)


def run(
    injection: Injection, optimizer: torch.optim.Optimizer, steps: range, total: int, skip: frozenset[int] = frozenset()
) -> list[float]:
    hooks, losses = hooks_of(injection), []
    for step in steps:
        x, y = batch(step)
        loss = functional.mse_loss(injection.model(x), y)
        penalty = hooks.penalty()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        losses.append(loss.item())
        if step in skip:
            continue
        hooks.on_gradients(step, total)
        optimizer.step()
        hooks.after_step(step, total)
    return losses


def adam(injection: Injection, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in injection.model.parameters() if p.requires_grad], lr=rate)


def ranks(injection: Injection) -> list[int]:
    return [part.rank for part in parts_of(injection).values()]


def test_the_budget_is_met_at_every_step_and_held_to_the_end() -> None:
    total = 40
    injection = inject(small(), ".", AdaLoRA(rank=2, init_rank=4, warmup=0.1, final=0.5))
    optimizer = adam(injection)
    for step in range(total):
        run(injection, optimizer, range(step, step + 1), total)
        wanted = budget(step, total=total, warmup=4, final=20, start=12, end=6)
        # λ leaves zero at the first step, so ranks count what is kept.
        assert sum(ranks(injection)) == wanted, step
    kept = [part.kept.tolist() for part in parts_of(injection).values()]
    assert sum(map(sum, kept)) == 6
    assert [[bool(v) for v in part.lora_E.ravel()] for part in parts_of(injection).values()] == kept


def test_pruned_triplets_may_return_until_the_budget_is_final() -> None:
    total, returned = 60, False
    injection = inject(small(3), ".", AdaLoRA(rank=2, init_rank=4, warmup=0.0, final=0.2))
    optimizer = adam(injection, 3e-2)
    before = torch.zeros(0)
    for step in range(total):
        run(injection, optimizer, range(step, step + 1), total)
        now = torch.cat([part.lora_E.detach().ravel() for part in parts_of(injection).values()]) != 0
        returned |= len(before) > 0 and bool((now & ~before).any()) and step < 48
        if step > 48:
            assert torch.equal(now, before)
        before = now
    assert returned


def test_the_interval_leaves_steps_out() -> None:
    injection = inject(small(), ".", AdaLoRA(rank=2, init_rank=4, warmup=0.1, final=0.5, interval=0.125))
    optimizer, total = adam(injection), 40
    counts = []
    for step in range(total):
        run(injection, optimizer, range(step, step + 1), total)
        counts.append(sum(ranks(injection)))
    pruned = [step for step in range(21) if counts[step] < 12]
    assert pruned == [5, 10, 15, 20]


def test_an_overflowed_step_at_the_end_of_pruning_is_made_up_for() -> None:
    injection = inject(small(), ".", AdaLoRA(rank=2, init_rank=4, final=0.5))
    run(injection, adam(injection), range(40), 40, skip=frozenset({20, 21}))
    assert hooks_of(injection).settled
    assert sum(ranks(injection)) == 6


@pytest.mark.parametrize("total", range(1, 12))
@pytest.mark.parametrize("shares", [(0.1, 0.5), (0.0, 0.0), (0.6, 0.39)])
def test_short_runs_reach_the_budget(total: int, shares: tuple[float, float]) -> None:
    injection = inject(small(), ".", AdaLoRA(rank=2, init_rank=3, warmup=shares[0], final=shares[1]))
    run(injection, adam(injection), range(total), total)
    assert sum(ranks(injection)) == (9 if total == 1 else 6)


def test_magnitude_prunes_by_the_parameters_alone() -> None:
    injection = inject(small(), ".", AdaLoRA(rank=1, init_rank=2, score="magnitude", regularizer=0.0))
    hooks = hooks_of(injection)
    moved(injection)
    hooks.on_gradients(99, 100)
    hooks.after_step(99, 100)
    assert not hooks.smoothed
    assert hooks.penalty() is None
    assert sum(ranks(injection)) == 3


def test_the_penalty_is_the_squared_distance_from_orthonormal() -> None:
    injection = inject(small(), "^0$", AdaLoRA(rank=2, init_rank=3, regularizer=0.25))
    moved(injection)
    part = parts_of(injection)["0"]
    p, q = part.lora_B.detach().numpy(), part.lora_A.detach().numpy()
    by_hand = ((p.T @ p - torch.eye(3).numpy()) ** 2).sum() + ((q @ q.T - torch.eye(3).numpy()) ** 2).sum()
    penalty = hooks_of(injection).penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.25 * by_hand, rel=1e-5)  # float32 sums of 18 squares
    part.lora_B.data.copy_(torch.eye(16, 3))
    part.lora_A.data.copy_(torch.eye(3, 12))
    assert hooks_of(injection).penalty() == 0


def test_a_resumed_run_repeats_the_uninterrupted_one() -> None:
    method, total = AdaLoRA(rank=2, init_rank=4, final=0.4), 30
    whole = inject(small(), ".", method)
    losses = run(whole, adam(whole), range(total), total)
    for stop in (10, 18, 25):  # while pruning, at the step that settles, after it
        first = inject(small(), ".", method)
        optimizer = adam(first)
        run(first, optimizer, range(stop), total)
        saved = copy.deepcopy((first.model.state_dict(), optimizer.state_dict(), hooks_of(first).state_dict()))
        second = inject(small(), ".", method, seed=5)
        again = adam(second)
        second.model.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        hooks_of(second).load_state_dict(saved[2])
        assert run(second, again, range(stop, total), total) == losses[stop:]
        assert ranks(second) == ranks(whole)


def test_state_of_other_modules_is_refused() -> None:
    state = hooks_of(inject(small(), "^0$", AdaLoRA(rank=2))).state_dict()
    with pytest.raises(MismatchError, match=r"other modules.*: 0, 2"):
        hooks_of(inject(small(), "^2$", AdaLoRA(rank=2))).load_state_dict(state)


def test_a_settled_part_stores_what_is_kept_and_loads_with_the_same_output() -> None:
    injection = inject(small(), ".", AdaLoRA(rank=2, init_rank=4))
    whole = {name: part.state()["lora_A"].shape[0] for name, part in parts_of(injection).items()}
    assert set(whole.values()) == {4}
    assert injection.method.peft_config(injection)["rank_pattern"] is None
    run(injection, adam(injection), range(30), 30)
    fields = injection.method.peft_config(injection)
    assert fields["total_step"] == 30
    assert fields["tinit"] < fields["total_step"] - fields["tfinal"]
    for name, part in parts_of(injection).items():
        pattern = fields["rank_pattern"][f"{name}.lora_E"]
        assert len(pattern) == 4
        assert part.state()["lora_A"].shape == (sum(pattern), part.lora_A.shape[1])
    again = inject(small(), ".", AdaLoRA.from_peft_config(fields), seed=9)
    for name, part in parts_of(again).items():
        part.load_state(parts_of(injection)[name].state())
    x, _ = batch(0)
    # Sums over fewer terms of which the missing ones are exact zeros: rounding of float32 sums of order 1.
    torch.testing.assert_close(again.model(x), injection.model(x), rtol=1e-5, atol=1e-6)
    stored = again.method.peft_config(again)["rank_pattern"]
    assert {name: sum(row) for name, row in stored.items()} == {
        name: sum(row) for name, row in fields["rank_pattern"].items()
    }
    assert all(len(row) == 4 for row in stored.values())


def test_a_module_may_lose_every_triplet() -> None:
    part = parts_of(inject(small(), "^0$", AdaLoRA(rank=2)))["0"]
    state = {name: tensor.narrow(1 if name == "lora_B" else 0, 0, 0) for name, tensor in part.state().items()}
    part.load_state(state)
    x, _ = batch(0)
    assert torch.equal(part(x), part.base(x))
    assert not part.delta_weight().any()
    assert part.pattern() == [False] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_E": torch.zeros(4, 1), "lora_A": torch.zeros(4, 12), "lora_B": torch.zeros(16, 4)}, "init_rank"),
        ({"lora_B": torch.zeros(15, 3)}, "lora_B is"),
        ({"lora_Z": torch.zeros(1)}, "lora_Z"),
    ],
)
def test_tensors_of_another_shape_are_refused(change: dict[str, Any], words: str) -> None:
    part = parts_of(inject(small(), "^0$", AdaLoRA(rank=2)))["0"]
    with pytest.raises(MismatchError, match=words):
        part.load_state({**part.state(), **change})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": 4, "init_rank": 3}, "below the final"),
        ({"dropout": 1.0}, "dropout"),
        ({"beta1": 1.0}, "beta1"),
        ({"warmup": 0.5, "final": 0.5}, "shares"),
        ({"interval": -0.1}, "interval"),
        ({"regularizer": -1.0}, "regularizer"),
        ({"score": "size"}, "sensitivity"),
        ({"start": "zero"}, "orthonormal"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AdaLoRA(**fields)


def test_a_rank_above_a_module_is_refused_before_anything_changes() -> None:
    model = small()
    with pytest.raises(UsageError, match=r"4 is 8 × 10.*rank 9"):
        inject(model, ".", AdaLoRA(rank=6))
    assert all(isinstance(m, nn.Linear | nn.Tanh) for m in model)


def test_the_default_schedule_follows_the_authors_shares() -> None:
    assert AdaLoRA(rank=4).start_rank == 6
    assert AdaLoRA(rank=3).start_rank == 5
    assert AdaLoRA().schedule(200) == Stretches(warmup=20, final=100, interval=1)
    assert AdaLoRA().schedule(50_000) == Stretches(warmup=5_000, final=25_000, interval=100)


def test_dropout_acts_in_training_alone() -> None:
    injection = inject(small(), "^0$", AdaLoRA(rank=2, dropout=0.5))
    moved(injection)
    x, _ = batch(0)
    torch.manual_seed(0)
    assert not torch.equal(injection.model(x), injection.model(x))
    injection.model.eval()
    assert torch.equal(injection.model(x), injection.model(x))


def test_a_half_precision_base_keeps_wide_factors() -> None:
    injection = inject(small(dtype=torch.bfloat16), ".", AdaLoRA(rank=2))
    moved(injection)
    part = parts_of(injection)["0"]
    assert part.lora_A.dtype == torch.float32
    x = batch(0)[0].to(torch.bfloat16)
    exact = part.base(x).float() + x.float() @ part.delta_weight().T
    assert part(x).dtype == torch.bfloat16
    # One rounding of the sum to bfloat16, at half a unit in the last of 8 bits, and one of float32's order.
    torch.testing.assert_close(part(x).float(), exact, rtol=2**-8, atol=1e-5)


class Branches(nn.Module):
    """Two maps of one input, so that neither can make up for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.two(x)], dim=-1)


@pytest.mark.parametrize("start", ["orthonormal", "gaussian"])
def test_ranks_go_where_an_update_was_planted(start: str) -> None:
    torch.manual_seed(0)
    model, total = Branches(), 200
    teacher = copy.deepcopy(model)
    left, right = (torch.linalg.qr(torch.randn(24, 4)).Q for _ in range(2))
    teacher.two.weight.data += left @ right.T
    injection = inject(model, ".", AdaLoRA(rank=2, init_rank=4, start=start))
    hooks, optimizer = hooks_of(injection), adam(injection)
    losses = []
    for step in range(total):
        x = torch.randn(32, 24, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - teacher(x)).square().sum(dim=-1).mean()
        losses.append(loss.item())
        penalty = hooks.penalty()
        assert penalty is not None
        optimizer.zero_grad()
        (loss + penalty).backward()
        hooks.on_gradients(step, total)
        optimizer.step()
        hooks.after_step(step, total)
    assert ranks(injection) == [0, 4]
    assert losses[-1] < 0.02 * losses[0]


def test_the_start_is_what_it_is_called() -> None:
    for start, spread in (("orthonormal", 24**-0.5), ("gaussian", 0.02)):
        part = parts_of(inject(Branches(), "one", AdaLoRA(rank=8, init_rank=12, start=start)))["one"]
        for factor in (part.lora_A, part.lora_B):
            # 288 draws: their standard deviation is within 4.2 % of the truth two times in three; five times that.
            assert factor.std().item() == pytest.approx(spread, rel=0.21)
        # Orthonormal to rounding: Gram matrices of 12 by 12 in float32.
        assert (part.penalty().item() < 1e-10) == (start == "orthonormal")
