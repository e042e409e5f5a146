"""Small models and batches for the trainer's tests, each the same whenever it is made."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from spectra.methods import LoRA, inject

VOCABULARY = 100


def bert(dropout=0.1, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                num_labels=2,
            )
        )


def llama(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
            )
        )


def lora_bert(method=None, dropout=0.1, seed=0):
    """A tiny BERT with LoRA on queries and values and its classifier trained whole."""
    model = bert(dropout, seed)
    inject(model, r"\.(query|value)$", method or LoRA(rank=2, alpha=4.0, dropout=dropout), also="classifier", seed=1)
    return model


def texts(number, size=8, length=12):
    """Rows whose label is whether the first token is of the vocabulary's upper half."""
    generator = torch.Generator().manual_seed(1000 + number)
    ids = torch.randint(VOCABULARY, (size, length), generator=generator)
    return {"input_ids": ids, "labels": (ids[:, 0] >= VOCABULARY // 2).long()}


class Line(nn.Module):
    """A model of one's own: a line, with batch normalization where asked for."""

    def __init__(self, normalized=False, dtype=torch.float32):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=dtype) if normalized else nn.Identity()
        self.line = nn.Linear(3, 1, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.line.weight.copy_(torch.randn(1, 3, generator=generator))
            self.line.bias.zero_()

    def forward(self, x):
        return self.line(self.norm(x))


def squares(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def points(number, size=16, dtype=torch.float32):
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(number), dtype=dtype)
    return {"x": x, "y": x.sum(dim=1, keepdim=True)}
