"""A training step of LoRA against PEFT's: one model, one start, one batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from spectra.methods import load_adapter
from tests.benchmarks.timing import Row, in_turn

# MiniLM's shapes, and the batch of the README's trainings.
SHAPES = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
BATCH, LENGTH, RANK = 32, 64, 8
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def classifier() -> Any:
    """A random BERT of MiniLM's shapes with a head of two classes; each call gives the same one."""
    import transformers

    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **SHAPES)).train()


def batch() -> dict[str, torch.Tensor]:
    """32 texts of 64 tokens with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, SHAPES["vocab_size"], (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(BATCH) % 2}


def stepper(model: nn.Module, *, seed: int = 0) -> Callable[[], float]:
    """One AdamW step a call, from a fixed stream of dropout masks; returns the loss before the step."""
    given = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = iter(range(seed, seed + 10_000))

    def step() -> float:
        torch.manual_seed(next(generator))
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def lora_step(rounds: int = 7) -> Iterator[Row]:
    """LoRA of rank 8 on all six matrices of a layer, without dropout and with, against PEFT."""
    import peft

    for dropout in (0.0, 0.1):
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS
        )
        theirs: Any = peft.get_peft_model(classifier(), config)
        ours = classifier()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            load_adapter(ours, folder, trainable=True)
        mine, rival = in_turn(stepper(ours), stepper(theirs), rounds=rounds)
        apart = abs(mine.result - rival.result) / abs(rival.result)
        yield Row(
            f"LoRA step, r = {RANK}, six matrices, dropout {dropout:g}",
            mine.seconds,
            f"peft {peft.__version__}",
            rival.seconds,
            "≥ 1×",
            mine.seconds <= rival.seconds and apart < 1e-3,
            f"losses of step {rounds} agree to {apart:.0e} (≤ 1e-3)",
        )
