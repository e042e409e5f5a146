"""What a `TrainConfig` refuses, and the learning rates it gives."""

import itertools
import json
import math

import pytest

from spectra.errors import UsageError
from spectra.train import TrainConfig


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"accumulation": 0}, "accumulation = 0"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"learning_rate": math.inf}, "learning_rate = inf"),
        ({"warmup": 1.5}, "warmup = 1.5"),
        ({"seed": -1}, "seed = -1"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"optimizer": "adam"}, "adamw, sgd, paged_adamw"),
        ({"precision": "int8"}, "fp32, bf16, fp16"),
        ({"schedule": "step"}, "linear, cosine, constant"),
        ({"resume": True}, "needs out"),
        ({"save_every": 5}, "needs out"),
        ({"save_every": 0, "out": "x"}, "save_every = 0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**fields)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rates_rise_over_the_warm_up_and_never_pass_the_top(schedule):
    config = TrainConfig(steps=50, learning_rate=0.5, warmup=0.2, schedule=schedule)
    rates = [config.learning_rate_at(index) for index in range(50)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)], rel=1e-15)
    assert rates[9] == rates[10] == max(rates) == 0.5
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert min(rates) > 0.0, "no update is to be in vain"


def test_schedules_are_the_closed_forms():
    linear = TrainConfig(steps=10, learning_rate=1.0, warmup=0.0)
    cosine = TrainConfig(steps=10, learning_rate=1.0, warmup=0.0, schedule="cosine")
    for index in range(10):
        assert linear.learning_rate_at(index) == pytest.approx(1 - index / 10, rel=1e-15)
        # cos(π/2) is rounded: absolutely, not relatively, exact
        assert cosine.learning_rate_at(index) == pytest.approx((1 + math.cos(math.pi * index / 10)) / 2, abs=1e-15)


def test_a_warm_up_that_fills_the_run_never_divides_by_zero():
    config = TrainConfig(steps=4, learning_rate=1.0, warmup=1.0)
    assert [config.learning_rate_at(index) for index in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_decisive_fields_are_json_and_leave_out_where_a_run_stands(tmp_path):
    here = TrainConfig(out=tmp_path, save_every=3, resume=True, device="cpu", progress=False)
    assert here.decisive() == TrainConfig().decisive()
    assert json.loads(json.dumps(here.decisive())) == here.decisive()
    assert TrainConfig(seed=1).decisive() != here.decisive()
    assert TrainConfig(loss=test_schedules_are_the_closed_forms).decisive() != here.decisive()
