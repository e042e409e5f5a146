"""A run for tests to kill: ``python -m tests.train.killed OUT WAIT``, WAIT seconds a batch."""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from spectra.methods import LoRA, inject
from spectra.train import TrainConfig, train


def run(out, wait):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 8))
    inject(model, ".", LoRA(rank=2, dropout=0.2))

    def batch(number):
        time.sleep(wait)
        return {"x": torch.randn(16, 8, generator=torch.Generator().manual_seed(number))}

    config = TrainConfig(
        steps=40, learning_rate=0.01, device="cpu", progress=False, out=out, save_every=4, resume=True, loss=copying
    )
    return list(train(model, batch, config))


def copying(model, batch):
    return (model(batch["x"]) - batch["x"]).square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], float(sys.argv[2]))
