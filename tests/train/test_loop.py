"""One update is what it says: against plain torch, by accumulation, clipping, groups, hooks, and what stops it."""

import json
import math
import signal

import pytest
import torch
from torch import nn

from spectra.errors import TrainingError, UsageError
from spectra.methods import LoRA, inject
from spectra.train import TrainConfig, train
from spectra.train.interruption import HeldSignals
from spectra.train.objective import targets
from spectra.train.optimizers import parameter_groups
from tests.train.tiny import Line, bert, llama, lora_bert, points, squares, texts


def config(**fields):
    return TrainConfig(**{"steps": 5, "device": "cpu", "progress": False, **fields})


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- against plain torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_are_plain_torchs(optimizer):
    model, other = Line(), Line()
    steps = list(
        train(
            model,
            points,
            config(loss=squares, optimizer=optimizer, learning_rate=0.01, warmup=0.0, clip=0.5, momentum=0.9),
        )
    )
    kind = {
        "adamw": lambda p: torch.optim.AdamW(p, weight_decay=0.0, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    }[optimizer](list(other.parameters()))
    for index, step in enumerate(steps):
        kind.param_groups[0]["lr"] = 0.01 * (1 - index / 5)
        loss = squares(other, points(index))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        kind.step()
        kind.zero_grad()
        assert (step.number, step.loss, step.gradient_norm) == (index + 1, loss.item(), norm.item())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_classifier_learns_and_only_what_trains_moves():
    model = lora_bert(dropout=0.0)
    before = snapshot(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    steps = list(train(model, lambda n: texts(n % 4), config(steps=100, learning_rate=0.05)))
    assert steps[-1].loss < 0.1 * steps[0].loss
    assert changed(model, before) == trained
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [bert, llama])
def test_no_frozen_weight_ever_gets_a_gradient_buffer(make):
    model = make()
    inject(model, r"(query|q_proj)$", LoRA(rank=2))
    seen = []
    handles = [
        p.register_hook(lambda g, name=name: seen.append(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    batch = texts(0) if make is bert else {"input_ids": texts(0)["input_ids"], "labels": texts(0)["input_ids"]}
    list(train(model, [batch], config(steps=1)))
    assert len(seen) == len(handles) > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# --- accumulation ---------------------------------------------------------------------------------------------------


def joined(batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_accumulation_is_the_large_batch():
    """In float64, where only the order of summation differs; batches of unlike sizes weigh by what they hold."""
    small = [points(n, size=size, dtype=torch.float64) for n, size in enumerate((16, 3, 7, 1))]
    large = [joined(small[:2]), joined(small[2:])]
    a, b = Line(dtype=torch.float64), Line(dtype=torch.float64)
    one = list(train(a, small, config(steps=4, accumulation=2, loss=squares, learning_rate=0.1)))
    other = list(train(b, large, config(steps=4, loss=squares, learning_rate=0.1)))
    # ε of float64 is 2e-16; four steps of sums of at most 19 terms leave the rest to spare. Losses pass as float32.
    assert [s.loss for s in one] == pytest.approx([s.loss for s in other], rel=1e-6)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_accumulation_of_a_language_model_weighs_rows_by_their_targets():
    """Padding differs by batch: the mean of the batches' means would be another loss."""
    ids = torch.randint(100, (4, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 3:], labels[1, 6:] = -100, -100
    whole = {"input_ids": ids, "labels": labels}
    halves = [{key: value[:2] for key, value in whole.items()}, {key: value[2:] for key, value in whole.items()}]
    norms, losses = [], []
    for batches, accumulation in (([whole], 1), (halves, 2)):
        model = llama().double()
        (step,) = train(model, batches, config(steps=1, accumulation=accumulation, learning_rate=0.0))
        norms.append(step.gradient_norm)
        losses.append(step.loss)
    # transformers takes the loss in float32 whatever the model's dtype: a few ε = 1.2e-7 of it
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    uneven = sum(model(**half).loss.item() for half in halves) / 2
    assert abs(uneven - losses[0]) > 1e-4, "the batches were to be uneven enough to tell"


def test_targets_are_what_the_loss_is_a_mean_of():
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    assert targets(llama(), {"input_ids": labels, "labels": labels}) == 1  # the first of a row is predicted by none
    assert targets(bert(), {"labels": torch.tensor([0, 1, -100])}) == 2
    assert targets(bert(), {"labels": torch.rand(3)}) == 3


# --- groups, hooks, checkpointed activations, precision --------------------------------------------------------------


def test_groups_carry_decay_and_loraplus_ratio():
    model = lora_bert(LoRA(rank=2, plus_ratio=16.0))
    found = {name: (g["weight_decay"], g["scale"]) for g in parameter_groups(model, 0.1) for name in g["names"]}
    assert {name: pair for name, pair in found.items() if "classifier" in name} == {
        "classifier.weight": (0.1, 1.0),
        "classifier.bias": (0.0, 1.0),
    }
    scales = {name: scale for name, (_, scale) in found.items() if "lora_" in name}
    assert {scale for name, scale in scales.items() if "lora_A" in name} == {1.0}
    assert {scale for name, scale in scales.items() if "lora_B" in name} == {16.0}


def test_the_ratio_reaches_the_first_update():
    """Adam's first update is the learning rate times the gradient's sign (its ε aside)."""
    model = lora_bert(LoRA(rank=2, plus_ratio=8.0), dropout=0.0)
    before = snapshot(model)
    list(train(model, texts, config(steps=1, learning_rate=1e-3, warmup=0.0, clip=None)))
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["classifier.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert max(v for name, v in moved.items() if "lora_B" in name) == pytest.approx(8e-3, rel=1e-3)


def test_vectors_are_not_decayed_whatever_their_layout():
    module = nn.Module()
    for name, shape in {"row": (1, 5), "column": (5, 1), "vector": (5,), "matrix": (5, 2)}.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    decayed = [name for g in parameter_groups(module, 0.1) if g["weight_decay"] for name in g["names"]]
    assert decayed == ["matrix"]


class Recorder:
    """A method's hooks that write down when they were called and what they saw."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def penalty(self):
        self.calls.append("penalty")
        return 0.5 * self.model.line.weight.square().sum()

    def on_gradients(self, step, total):
        self.calls.append(("gradients", step, total, self.model.line.weight.grad.clone()))

    def after_step(self, step, total):
        self.calls.append(("after", step, total))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_hooks_are_called_in_order_and_the_penalty_counts_once():
    model = Line()
    recorder = Recorder(model)

    class Carrier:
        method, hooks = object(), recorder

    model.spectra_injections = [Carrier()]
    batch = points(0)
    steps = list(
        train(
            model, [batch], config(steps=2, accumulation=3, loss=squares, optimizer="sgd", learning_rate=0.0, clip=None)
        )
    )
    names = [call if isinstance(call, str) else call[:3] for call in recorder.calls]
    assert names == ["penalty", ("gradients", 0, 2), ("after", 0, 2), "penalty", ("gradients", 1, 2), ("after", 1, 2)]
    plain = Line()
    (squares(plain, batch) + 0.5 * plain.line.weight.square().sum()).backward()
    torch.testing.assert_close(recorder.calls[1][3], plain.line.weight.grad)
    assert steps[0].penalty == pytest.approx(0.5 * plain.line.weight.square().sum().item(), rel=1e-6)
    assert steps[0].loss == pytest.approx(squares(plain, batch).item(), rel=1e-6)


def test_checkpointed_activations_give_the_same_steps_and_are_switched_off_again():
    runs = []
    for wanted in (False, True):
        model = lora_bert()
        runs.append([s.loss for s in train(model, texts, config(gradient_checkpointing=wanted))])
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    # the same kernels on the same numbers, dropout's draws included: recomputed, not approximated
    assert runs[0] == runs[1]
    with pytest.raises(UsageError, match="Line offers no gradient checkpointing"):
        next(train(Line(), points, config(loss=squares, gradient_checkpointing=True)))


def test_bf16_computes_in_bf16_and_keeps_parameters_in_float32():
    seen = set()
    model = lora_bert(dropout=0.0)
    model.classifier.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    low = [s.loss for s in train(model, texts, config(precision="bf16"))]
    high = [s.loss for s in train(lora_bert(dropout=0.0), texts, config())]
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert low != high
    # logits of order 1 rounded to 8 bits: errors of order 2⁻⁸ in the loss
    assert low == pytest.approx(high, abs=0.02)
    assert next(train(lora_bert(), texts, config())).loss, "a run of another precision may follow in one process"


def test_fp16_and_devices_that_are_not_here_are_refused():
    with pytest.raises(UsageError, match="needs a GPU"):
        next(train(lora_bert(), texts, config(precision="fp16")))
    with pytest.raises(UsageError, match="abacus"):
        next(train(lora_bert(), texts, config(device="abacus")))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="cuda"):
            next(train(lora_bert(), texts, config(device="cuda")))


# --- what surrounds a step -------------------------------------------------------------------------------------------


def test_random_draws_are_the_runs_own():
    """Neither the caller's seed nor what it draws between steps changes a loss, and the caller's stream goes on."""
    torch.manual_seed(1)
    one = [s.loss for s in train(lora_bert(), texts, config())]
    torch.manual_seed(2)
    expected = torch.rand(6)
    torch.manual_seed(2)
    drawn = [torch.rand(1)]
    other = []
    for step in train(lora_bert(), texts, config()):
        other.append(step.loss)
        drawn.append(torch.rand(1))
    assert one == other
    assert torch.equal(torch.cat(drawn), expected)
    assert one != [s.loss for s in train(lora_bert(), texts, config(seed=1))], "dropout was to be drawn"


def test_evaluation_is_called_when_due_and_at_the_end():
    model, modes = lora_bert(), []

    def evaluate(given):
        modes.append(given is model)
        given.eval()  # and left so: the next step trains all the same
        return {"accuracy": 0.5}

    model.eval()
    steps = list(train(model, texts, config(evaluate_every=2), evaluate=evaluate))
    assert [s.number for s in steps if s.metrics] == [2, 4, 5]
    assert modes == [True] * 3
    assert not model.training, "the mode it came in"
    assert [s.loss for s in steps] == [s.loss for s in train(lora_bert(), texts, config())]


def test_metrics_are_json_lines_of_the_steps(tmp_path):
    steps = list(
        train(lora_bert(), texts, config(out=tmp_path), evaluate=lambda m: {"loss": math.nan, "accuracy": 1.0})
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r["learning_rate"], r["gradient_norm"]) for r in lines] == [
        (s.number, s.loss, s.learning_rate, s.gradient_norm) for s in steps
    ]
    assert lines[-1]["metrics"] == {"loss": None, "accuracy": 1.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"], "no checkpoint was asked for"


def test_a_list_is_taken_round_and_round():
    model = Line()
    model.requires_grad_(True)
    losses = [s.loss for s in train(model, [points(0), points(1)], config(steps=4, learning_rate=0.0, loss=squares))]
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


# --- what stops it ---------------------------------------------------------------------------------------------------


def poisoned(number):
    batch = points(number)
    if number == 7:
        batch["x"][3, 1] = math.nan
    return batch


def test_a_nan_stops_with_step_batch_and_checkpoint_and_moves_nothing(tmp_path):
    model, taken = Line(), []
    run = config(steps=10, accumulation=2, loss=squares, out=tmp_path, save_every=2)
    steps = train(model, poisoned, run)
    taken.extend((next(steps).number, snapshot(model)) for _ in range(3))
    with pytest.raises(TrainingError) as caught:
        next(steps)
    said = str(caught.value)
    assert "step 4: the loss is nan on batch 7" in said
    assert f"{tmp_path / 'checkpoint.pt'} (step 2)" in said
    assert not changed(model, taken[-1][1])
    assert all(p.grad is None for p in model.parameters())
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 2
    assert torch.equal(kept["tensors"]["line.weight"], taken[1][1]["line.weight"])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_infinite_gradient_of_a_finite_loss_stops_too():
    def loss(model, batch):
        return squares(model, batch) + (0.0 * model.line.weight.sum()).sqrt()  # 0, of infinite slope

    with pytest.raises(TrainingError, match=r"step 1: the gradient's norm is (nan|inf) on batch 0"):
        next(train(Line(), points, config(loss=loss)))


def test_a_batch_without_targets_is_named():
    batch = {**texts(0), "labels": torch.full((8,), -100)}
    with pytest.raises(TrainingError, match="batch 1 has no labelled target"):
        list(train(lora_bert(), [texts(0), batch], config()))


def texts_that_end(number):
    return [texts(0)][number]


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (torch.utils.data.DataLoader([1]), "list\\(loader\\)"),
        ([], "are none"),
        ([torch.zeros(3)], "batch 0 is a Tensor"),
        (texts_that_end, "no batch 1: .*taken round and round"),
        ([{"input_ids": torch.zeros(1, 2, dtype=torch.long)}], "give it labels"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(batches, said):
    with pytest.raises(UsageError, match=said):
        list(train(lora_bert(), batches, config()))


def test_a_model_that_trains_nothing_and_a_loss_that_is_none_are_refused():
    with pytest.raises(UsageError, match="no parameter of the model trains"):
        next(train(bert().requires_grad_(False), texts, config()))
    with pytest.raises(UsageError, match="one number as a tensor, not a tensor of shape \\(16, 1\\)"):
        next(train(Line(), points, config(loss=lambda model, batch: model(batch["x"]))))


def interrupt_twice(ended):
    with HeldSignals():
        signal.raise_signal(signal.SIGINT)
        ended.append("first")
        signal.raise_signal(signal.SIGINT)
        ended.append("second")


def test_a_second_signal_does_not_wait():
    ended = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice(ended)
    assert ended == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
