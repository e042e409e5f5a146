"""Prompt tuning: what is put in front, labels, positions and padding, generation, calls of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from spectra.errors import UsageError
from spectra.methods import Prompt, inject
from tests.methods.kinds import EMBEDDING, batch, make

P = 3


def prompted(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A model with a prompt, and the prompt's part."""
    model = make(kind)
    (part,) = inject(model, EMBEDDING[kind], Prompt(tokens=P, **settings), seed=2).parts.values()
    return model, part


def ids_of_start(kind: str) -> torch.Tensor:
    """Ids whose embeddings a prompt from the vocabulary starts as, read off its vectors."""
    _, part = prompted(kind)
    same = (part.prompt_embeddings[:, None] == part.base.weight).all(dim=-1)  # (p, vocabulary)
    assert same.any(dim=1).all()
    return same.int().argmax(dim=1)


@pytest.mark.parametrize("kind", EMBEDDING)
def test_a_prompt_from_the_vocabulary_is_those_tokens(kind: str) -> None:
    """Without training, the model reads the drawn tokens before each text: the same logits."""
    model, _ = prompted(kind)
    given, first = batch(), ids_of_start(kind)
    longer = {
        "input_ids": torch.cat([first.expand(2, P), given["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones(2, P, dtype=torch.long), given["attention_mask"]], dim=1),
    }
    with torch.no_grad():
        got, wanted = model(**given).logits, make(kind)(**longer).logits
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)  # float32 through two layers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_labels_of_tokens_are_lengthened(kind: str) -> None:
    """The loss is over the text's tokens, its first one predicted by the last virtual token."""
    model, _ = prompted(kind)
    ids = batch()["input_ids"]
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        wanted = nn.functional.cross_entropy(out.logits[:, P - 1 : -1].flatten(0, 1), ids.flatten())
    torch.testing.assert_close(out.loss, wanted)


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.rand(2, 3)], ids=["classes", "shares"])
def test_labels_of_texts_are_left_alone(labels: torch.Tensor) -> None:
    model, _ = prompted("bert")
    assert torch.isfinite(model(**batch(), labels=labels).loss)


@pytest.mark.parametrize("kind", EMBEDDING)
def test_padding_changes_nothing(kind: str) -> None:
    model, _ = prompted(kind)
    given = batch()
    with torch.no_grad():
        both, alone = model(**given).logits[1], model(input_ids=given["input_ids"][1:, :5]).logits[0]
    # Masked entries leave the sums, in another order of adding: float32.
    torch.testing.assert_close(both[: P + 5] if kind != "bert" else both, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation(kind: str) -> None:
    """Greedy tokens are the argmax of whole calls one after the other; a cache and padding on the left change none."""
    model, _ = prompted(kind)
    ids = batch()["input_ids"][:1]
    written = ids
    with torch.no_grad():
        for _ in range(6):
            written = torch.cat([written, model(input_ids=written).logits[:, -1:].argmax(-1)], dim=1)
    new = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **new), written)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **new), written)
    padded, mask = nn.functional.pad(ids, (2, 0)), nn.functional.pad(mask, (2, 0))
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **new)[:, 2:], written)


def test_positions_that_are_given_move_up() -> None:
    """Positions that count as the model would itself give what the model gives without them."""
    for kind in EMBEDDING:
        model, _ = prompted(kind)
        ids = batch()["input_ids"]
        with torch.no_grad():
            given = model(input_ids=ids, position_ids=torch.arange(7).expand(2, 7), cache_position=torch.arange(7))
            assert torch.equal(given.logits, model(input_ids=ids).logits)


def test_every_way_to_call() -> None:
    """By position, by name, with types, with embeddings in place of ids."""
    model, part = prompted("bert")
    given = batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        wanted = model(**given).logits
        assert torch.equal(model(ids, mask).logits, wanted)
        assert torch.equal(model(ids, mask, torch.zeros_like(ids)).logits, wanted)
        assert torch.equal(model(inputs_embeds=part(ids), attention_mask=mask).logits, wanted)
        assert not torch.equal(model(ids, mask, torch.ones_like(ids)).logits, wanted)
        with pytest.raises(UsageError, match="neither input_ids nor inputs_embeds"):
            model(attention_mask=mask)


def test_uniform_start() -> None:
    _, part = prompted("bert", start="uniform")
    assert float(part.prompt_embeddings.detach().abs().max()) <= 0.5


def test_what_cannot_be() -> None:
    with pytest.raises(UsageError, match="at least one"):
        Prompt(tokens=0)
    with pytest.raises(UsageError, match="uniform"):
        Prompt(start="text")
    with pytest.raises(UsageError, match=r"matches 3 embeddings .*word_embeddings\$ for instance"):
        inject(make("bert"), "embeddings", Prompt(tokens=2))
    with pytest.raises(UsageError, match="takes inputs_embeds; Sequential does not"):
        inject(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), "0", Prompt(tokens=2))
    whole = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UsageError, match="an encoder with a decoder"):
        inject(whole, "^shared$", Prompt(tokens=2))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_too_many_tokens_for_the_positions(kind: str) -> None:
    model, _ = prompted(kind)  # 32 positions
    assert torch.isfinite(model(input_ids=torch.ones(1, 32 - P, dtype=torch.long)).logits).all()
    with pytest.raises(UsageError, match=f"30 tokens behind {P} virtual ones pass the model's 32 positions; cut .* 29"):
        model(input_ids=torch.ones(1, 30, dtype=torch.long))


def test_a_prepared_mask_is_refused() -> None:
    model, _ = prompted("llama")
    with pytest.raises(UsageError, match="dynamic cache"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))
