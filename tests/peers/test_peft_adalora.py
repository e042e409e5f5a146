"""AdaLoRA against PEFT's RankAllocator on the same gradients, step by step, and where the two part on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectra.importance import budget, read_recorded, replay
from spectra.methods.adalora import AdaLoRA, AdaLoRALinear
from spectra.methods.adalora_budget import AdaLoRAHooks
from spectra.methods.folder import load_adapter, save_adapter
from spectra.methods.injection import Injection, inject
from spectra.train.recorder import ImportanceRecorder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOTAL, WARMUP, FINAL, INTERVAL = 40, 5, 12, 3
NAMES = ("lora_A", "lora_E", "lora_B")


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = torch.nn.Linear(10, 14), torch.nn.Linear(14, 9), torch.nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def ours(**fields: Any) -> tuple[Injection, AdaLoRAHooks]:
    shares = {"warmup": WARMUP / TOTAL, "final": FINAL / TOTAL, "interval": INTERVAL / TOTAL}
    injection = inject(Small(), ".", AdaLoRA(**{"rank": 2, "init_rank": 4, "alpha": 8.0, **shares, **fields}))
    assert isinstance(injection.hooks, AdaLoRAHooks)
    assert injection.hooks.method.schedule(TOTAL) == (WARMUP, FINAL, INTERVAL)
    return injection, injection.hooks


def theirs(**fields: Any) -> Any:
    steps = {"tinit": WARMUP, "tfinal": FINAL, "deltaT": INTERVAL, "total_step": TOTAL}
    config = peft.AdaLoraConfig(
        target_modules=["one", "two", "three"], **{"init_r": 4, "target_r": 2, "lora_alpha": 8, **steps, **fields}
    )
    return peft.get_peft_model(Small(), config)


def pairs(injection: Injection, model: Any) -> list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
    found = []
    for name, part in injection.parts.items():
        layer = model.base_model.model.get_submodule(name)
        found += [(f"{name}.{key}", part.get_parameter(key), getattr(layer, key)["default"]) for key in NAMES]
    return found


def alike(injection: Injection, model: Any) -> None:
    with torch.no_grad():
        for _, mine, yours in pairs(injection, model):
            yours.copy_(mine)


def give_gradients(injection: Injection, model: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, mine, yours in pairs(injection, model):
        mine.grad = torch.randn(mine.shape, generator=generator)
        yours.grad = mine.grad.clone()


def move(parameters: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            assert parameter.grad is not None
            parameter -= 0.05 * parameter.grad


def test_scores_budget_and_masks_agree_at_every_step() -> None:
    injection, hooks = ours()
    model = theirs()
    alike(injection, model)
    allocator = model.base_model.rankallocator
    for step in range(TOTAL):
        give_gradients(injection, model, step)
        hooks.on_gradients(step, TOTAL)
        move([mine for _, mine, _ in pairs(injection, model)])
        hooks.after_step(step, TOTAL)
        # PEFT scores and masks in one call. To give it weights and gradients of one moment, as the paper has them,
        # the move is undone for its scores: they are taken before, its masks after.
        if step < TOTAL - FINAL:
            allocator.update_ipt(model.base_model.model)
        move([yours for _, _, yours in pairs(injection, model)])
        allocator.update_ipt = lambda model: None
        model.base_model.update_and_allocate(step)
        del allocator.update_ipt
        wanted, _ = allocator.budget_schedule(step)
        assert budget(step, total=TOTAL, warmup=WARMUP, final=FINAL, start=12, end=6) == wanted
        for name, mine, yours in pairs(injection, model):
            assert torch.equal(mine, yours), (step, name)
            if step < TOTAL - FINAL:
                key = f"{name}.default"
                smoothed = hooks.smoothed[name]
                assert torch.equal(smoothed.sensitivity, allocator.exp_avg_ipt[key]), (step, name)
                assert torch.equal(smoothed.uncertainty, allocator.exp_avg_unc[key]), (step, name)
    pattern = injection.method.peft_config(injection)["rank_pattern"]
    assert {f"{name}.default": row for name, row in pattern.items()} == model.peft_config["default"].rank_pattern


def peft_scores(allocator: Any, module: str) -> torch.Tensor:
    """Triplet scores of one module by the allocator's own functions, as its ``mask_to_budget`` puts them together."""
    score = {key: allocator._element_score(f"{module}.{key}.default") for key in NAMES}
    vectors = [score["lora_A"].mean(dim=1, keepdim=True), score["lora_B"].mean(dim=0).view(-1, 1)]
    combined: torch.Tensor = allocator._combine_ipt(score["lora_E"], torch.cat(vectors, dim=1))
    return combined


def test_triplet_scores_and_a_replay_of_their_record_agree_at_every_step(tmp_path: Path) -> None:
    injection, hooks = ours()
    model = theirs()
    alike(injection, model)
    allocator = model.base_model.rankallocator
    recorder = ImportanceRecorder(injection.model, tmp_path, every=1, total=TOTAL)
    recorder.begin(0, None)
    wanted_scores: list[torch.Tensor] = []
    wanted_ranks: list[list[int]] = []
    for step in range(TOTAL):
        give_gradients(injection, model, step)
        hooks.on_gradients(step, TOTAL)
        recorder.on_gradients(step + 1, 1.0)
        move([mine for _, mine, _ in pairs(injection, model)])
        hooks.after_step(step, TOTAL)
        if step < TOTAL - FINAL:
            allocator.update_ipt(model.base_model.model)
            wanted_scores.append(torch.cat([peft_scores(allocator, name) for name in injection.parts]))
            # Three terms in another order: an ulp or two of float32.
            torch.testing.assert_close(torch.cat(hooks.scores()), wanted_scores[-1], rtol=3e-7, atol=0)
        move([yours for _, _, yours in pairs(injection, model)])
        allocator.update_ipt = lambda model: None
        model.base_model.update_and_allocate(step)
        del allocator.update_ipt
        wanted_ranks.append(
            [int(yours.count_nonzero()) for name, _, yours in pairs(injection, model) if name.endswith("lora_E")]
        )
    recorder.close(finished=True)
    recorded = read_recorded(tmp_path)
    found = torch.cat([torch.from_numpy(scores.copy()) for scores in recorded.directions("adalora").values()], dim=1)
    torch.testing.assert_close(found[: TOTAL - FINAL], torch.stack(wanted_scores), rtol=3e-7, atol=0)
    ranks = replay(recorded, kept=6).ranks.tolist()
    # Between two prunings λ grows again; the rule's ranks are those right behind one.
    pruned = [t for t in range(TOTAL) if t >= TOTAL - FINAL or (t > WARMUP and t % INTERVAL == 0)]
    assert len(pruned) > FINAL + 5
    assert [ranks[t] for t in pruned] == [wanted_ranks[t] for t in pruned]
    assert len(set(map(tuple, ranks))) > 3


@pytest.mark.parametrize(
    ("total", "warmup", "final", "interval"), [(40, 5, 12, 3), (97, 0, 1, 1), (200, 20, 100, 10), (33, 30, 2, 1)]
)
def test_budgets_agree_at_every_step_of_any_schedule(total: int, warmup: int, final: int, interval: int) -> None:
    model = theirs(total_step=total, tinit=warmup, tfinal=final, deltaT=interval, init_r=5, target_r=1)
    allocator = model.base_model.rankallocator
    assert (allocator.init_bgt, allocator.target_bgt) == (15, 3)
    for step in range(total):
        found = budget(step, total=total, warmup=warmup, final=final, start=15, end=3)
        assert found == allocator.budget_schedule(step)[0], step


def test_peft_scores_moved_weights_when_called_as_its_documentation_says() -> None:
    injection, hooks = ours()
    model = theirs()
    alike(injection, model)
    give_gradients(injection, model, 0)
    hooks.on_gradients(0, TOTAL)
    before = {name: (yours.detach() * yours.grad).abs() for name, _, yours in pairs(injection, model)}
    move([yours for _, _, yours in pairs(injection, model)])
    after = {name: (yours.detach() * yours.grad).abs() for name, _, yours in pairs(injection, model)}
    model.base_model.update_and_allocate(0)
    for name in before:
        theirs_now = model.base_model.rankallocator.ipt[f"{name}.default"]
        assert torch.equal(theirs_now, after[name])
        assert not torch.equal(theirs_now, before[name])
        # (1 − β) twice over, each a rounding of float32.
        torch.testing.assert_close(hooks.smoothed[name].sensitivity, 0.15 * before[name], rtol=1e-6, atol=0)


def test_the_penalty_squares_and_sums_where_peft_averages_norms() -> None:
    injection, hooks = ours(regularizer=0.5, start="gaussian")
    model = theirs(orth_reg_weight=0.5)
    alike(injection, model)
    parts = [part for part in injection.parts.values() if isinstance(part, AdaLoRALinear)]
    grams = [part.lora_A @ part.lora_A.T for part in parts] + [part.lora_B.T @ part.lora_B for part in parts]
    distances = torch.stack([torch.linalg.matrix_norm(gram - torch.eye(4)) for gram in grams]).detach()
    inner = model.base_model.model
    plain = inner.forward
    inner.forward = lambda x: type("Output", (), {"loss": plain(x).sum() * 0.0})()
    average = model.base_model.forward(torch.zeros(1, 10)).loss
    # float32 sums of 96 squares.
    torch.testing.assert_close(average, 0.5 * distances.mean(), rtol=1e-5, atol=0)
    penalty = hooks.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty.detach(), 0.5 * distances.square().sum(), rtol=1e-5, atol=0)


def test_equal_scores_fall_together_in_peft_and_to_the_budget_here() -> None:
    injection, hooks = ours()
    model = theirs()
    with torch.no_grad():
        for _, mine, yours in pairs(injection, model):
            mine.fill_(1.0), yours.fill_(1.0)
            mine.grad, yours.grad = torch.zeros_like(mine), torch.zeros_like(yours)
    step = WARMUP + 1  # a multiple of the interval
    hooks.on_gradients(step, TOTAL)
    hooks.after_step(step, TOTAL)
    model.base_model.update_and_allocate(step)
    kept = {
        who: sum(int(p.count_nonzero()) for p in values)
        for who, values in (
            ("ours", [part.get_parameter("lora_E") for part in injection.parts.values()]),
            ("theirs", [yours for name, _, yours in pairs(injection, model) if name.endswith("lora_E")]),
        )
    }
    assert kept == {"ours": budget(step, total=TOTAL, warmup=WARMUP, final=FINAL, start=12, end=6), "theirs": 0}


def test_a_constant_rank_trains_here_and_stops_peft() -> None:
    injection, hooks = ours(rank=4)
    model = theirs(target_r=4)
    give_gradients(injection, model, 0)
    step = WARMUP + 1
    hooks.on_gradients(step, TOTAL)
    hooks.after_step(step, TOTAL)
    with pytest.raises((RuntimeError, IndexError)):
        model.base_model.update_and_allocate(step)


def test_without_a_final_stretch_peft_lets_pruned_values_grow_again() -> None:
    injection = inject(Small(), ".", AdaLoRA(rank=2, init_rank=4, warmup=0.125, final=0.0, interval=0.125))
    hooks = injection.hooks
    assert isinstance(hooks, AdaLoRAHooks)
    assert hooks.method.schedule(TOTAL) == (5, 1, 5)
    model = theirs(tfinal=0, deltaT=5)
    alike(injection, model)
    for step in range(TOTAL):
        give_gradients(injection, model, step)
        hooks.on_gradients(step, TOTAL)
        move([mine for _, mine, _ in pairs(injection, model)])
        hooks.after_step(step, TOTAL)
        move([yours for _, _, yours in pairs(injection, model)])
        model.base_model.update_and_allocate(step)
    values = [(mine, yours) for name, mine, yours in pairs(injection, model) if name.endswith("lora_E")]
    assert [sum(int(v.count_nonzero()) for v in column) for column in zip(*values, strict=True)] == [6, 12]


def test_the_forward_pass_is_pefts_at_any_rank() -> None:
    injection, hooks = ours()
    model = theirs()
    for step in range(TOTAL):
        give_gradients(injection, model, step)
        hooks.on_gradients(step, TOTAL)
        move([mine for _, mine, _ in pairs(injection, model)])
        hooks.after_step(step, TOTAL)
    alike(injection, model)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    # Products in another order: float32 rounding of sums of order 10.
    torch.testing.assert_close(injection.model(x), model(x), rtol=1e-5, atol=1e-5)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 15).reshape(2, 7)
    out: torch.Tensor = model(input_ids=ids).logits
    return out.detach()


# Sums over the kept triplets alone against sums with exact zeros among them: float32 rounding of logits of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_a_pruned_adapter_opens_in_peft_with_the_same_logits(tmp_path: Path) -> None:
    model = bert()
    injection = inject(model, r"\.(query|value)$", AdaLoRA(rank=2, init_rank=4), also="^classifier$")
    hooks = injection.hooks
    assert isinstance(hooks, AdaLoRAHooks)
    parameters = [p for part in injection.weight_parts().values() for p in part.trainable_parameters()]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        hooks.on_gradients(step, 20)
        move(parameters)
        hooks.after_step(step, 20)
    ranks = [len(part.state()["lora_A"]) for part in injection.weight_parts().values()]
    assert sum(ranks) == 8
    assert len(set(ranks)) > 1
    save_adapter(injection, tmp_path, base_model="bert", task_type="SEQ_CLS")
    opened = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(logits(opened), logits(model), **CLOSE)
    assert not torch.equal(logits(bert()), logits(model))
    again = bert()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), **CLOSE)


def test_an_adapter_that_peft_pruned_opens_here_with_the_same_logits(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=2, tinit=2, tfinal=8, total_step=20, target_modules=["query", "value"]
    )
    model = peft.get_peft_model(bert(), config).eval()
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        move([p for p in parameters if p.requires_grad])
        model.base_model.update_and_allocate(step)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    fresh = bert()
    injection = load_adapter(fresh, tmp_path)
    assert sum(len(part.state()["lora_A"]) for part in injection.weight_parts().values()) == 8
    torch.testing.assert_close(logits(fresh), wanted, **CLOSE)
