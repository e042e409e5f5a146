"""Small models on disk, as transformers saves them, and files of labelled texts: what the command is given."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD = ("good", "great", "fine", "lovely", "bright")
BAD = ("bad", "poor", "dull", "awful", "grim")
NEUTRAL = ("a", "the", "film", "plot", "of", "and", "is", "was", "it", "scene")


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, in BERT's frame."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL, *(f"w{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64, eos_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip


def save_model(folder: Path, family: str = "bert") -> Path:
    """A random model of two layers, 32 wide, with its tokenizer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 80, "pad_token_id": 0}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "bert":
        model: Any = BertModel(BertConfig(**shape, **wide, max_position_embeddings=64))
    elif family == "bert-lm":
        model = BertForMaskedLM(BertConfig(**shape, **wide, max_position_embeddings=64))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, **wide, num_key_value_heads=2, max_position_embeddings=64))
    else:
        shape["pad_token_id"] = None
        model = GPT2LMHeadModel(GPT2Config(**shape, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(label, text) of short reviews, told apart by one word."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label, words = (("pos", GOOD), ("neg", BAD))[i % 2]
        text = [*draw.choices(NEUTRAL, k=draw.randint(3, 9)), draw.choice(words), f"w{draw.randrange(40)}"]
        draw.shuffle(text)
        rows.append((label, f"{' '.join(text)}"))
    return rows


def save_reviews(path: Path, count: int = 200, seed: int = 0) -> Path:
    lines = ["label,text", *(f"{label},{text}" for label, text in reviews(count, seed))]
    path.write_text("\n".join(lines) + "\n")
    return path
