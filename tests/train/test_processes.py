"""Two processes under ``accelerate launch`` on the CPU: the same run as one process that accumulates their batches."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from spectra.methods import AdaLoRA, inject
from spectra.train import TrainConfig, train

ROOT = Path(__file__).parents[2]


def model():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    inject(made, ".", AdaLoRA(rank=1, init_rank=2, warmup=0.1, final=0.2, interval=1))  # a penalty, and pruning
    return made


def batch(number):
    """Batches of unlike sizes: processes weigh by what they hold."""
    x = torch.randn(3 + number % 5, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return {"x": x}


def loss(model, batch):
    return (model(batch["x"]) - batch["x"][:, :4]).square().mean()


def config(out, **fields):
    return TrainConfig(
        steps=6, learning_rate=0.05, device="cpu", progress=False, out=out, save_every=3, loss=loss, **fields
    )


SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from spectra.train import train
from spectra.train.evaluate import evaluate
from tests.train.test_processes import batch, config, loss, model

class Judged(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x):
        return {"loss": loss(self.inner, {"x": x})}

def interrupted(number):
    if number == 17 and os.environ["RANK"] == "1":  # step 5 takes batches 16 to 19
        signal.raise_signal(signal.SIGINT)
    return batch(number)

run = config(sys.argv[1], resume=True, accumulation=2)
taken = []
try:
    taken.extend(step.number for step in train(model(), interrupted, run))
except KeyboardInterrupt:
    assert torch.load(run.out / "checkpoint.pt", weights_only=True)["step"] == 5
else:
    raise SystemExit(f"not interrupted: {taken}")

held = [batch(number) for number in range(100, 103)]
steps = list(train(model(), batch, run, evaluate=lambda trained: evaluate(Judged(trained), held)))
assert [step.number for step in steps] == [6], steps
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A run of two processes, one of which is interrupted in the fifth step; both leave it and take it up again."""
    out = tmp_path_factory.mktemp("launched")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = out / "script.py"
    script.write_text(SCRIPT)
    # --multi_gpu is accelerate's word for several processes; on the CPU it starts them all the same.
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    flags += f" --main_process_port {port}"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), str(script), str(out)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(out), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_are_one_that_accumulates_their_batches(launched, tmp_path):
    alone = model()
    steps = list(train(alone, batch, config(tmp_path, accumulation=4)))
    lines = [json.loads(line) for line in (launched / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # losses pass as float32
    assert [line["loss"] for line in lines] == pytest.approx([s.loss for s in steps], rel=1e-6)
    tensors = torch.load(launched / "checkpoint.pt", weights_only=True)["tensors"]
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            # float64 through six updates; sums in another order
            torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-10, atol=1e-12)


def test_processes_share_an_evaluation(launched):
    """Three batches over two processes: the mean over all rows, on the model after the last step."""
    final = model()
    tensors = torch.load(launched / "checkpoint.pt", weights_only=True)["tensors"]
    with torch.no_grad():
        for name, parameter in final.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
        held = [batch(n) for n in range(100, 103)]
        rows = sum(len(b["x"]) for b in held)
        expected = sum(loss(final, b).item() * len(b["x"]) for b in held) / rows
    last = json.loads((launched / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["metrics"]["loss"] == pytest.approx(expected, rel=1e-12)
