"""Prefix tuning: keys and values in front, the MLP, generation, gradients, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from spectra.errors import MismatchError, UsageError
from spectra.methods import Prefix, Prompt, inject
from spectra.methods.prefix import VirtualPrefix
from tests.methods.kinds import EMBEDDING, SMALL, VOCABULARY, batch, make

P = 3


def prefixed(kind: str, **settings: Any) -> tuple[Any, VirtualPrefix]:
    """A model with a prefix, and the prefix's part."""
    model = make(kind)
    (part,) = inject(model, EMBEDDING[kind], Prefix(tokens=P, **settings), seed=2).parts.values()
    assert isinstance(part, VirtualPrefix)
    return model, part


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prefix_from_the_vocabulary_is_the_prompt_of_the_same_tokens(kind: str) -> None:
    """In a causal model the tokens in front see nothing behind them: their keys and values are all that acts.

    So an untrained prefix and an untrained prompt of one seed give the text's tokens the same logits.
    """
    model, _ = prefixed(kind)
    prompted = make(kind)
    inject(prompted, EMBEDDING[kind], Prompt(tokens=P), seed=2)
    with torch.no_grad():
        got, wanted = model(**batch()).logits, prompted(**batch()).logits[:, P:]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)  # float32 through two layers


def test_keys_and_values_of_an_encoder() -> None:
    """BERT's first layer attends to [P_K; K] and [P_V; V]: written out for one text, without the model's attention."""
    model, part = prefixed("bert")
    part.prompt_embeddings.data.normal_()
    layer, seen = model.bert.encoder.layer[0].attention, {}
    layer.self.register_forward_hook(lambda m, a, k, out: seen.update(x=a[0], out=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=batch()["input_ids"][:1])
    table = part.prompt_embeddings.detach().view(P, 4, 2, 16)  # key and value of two layers, two heads of 16
    heads = [m(seen["x"]).view(7, 2, 16) for m in (layer.self.query, layer.self.key, layer.self.value)]
    keys, values = torch.cat([table[:, 0], heads[1]]), torch.cat([table[:, 1], heads[2]])
    weights = torch.einsum("qhd,khd->hqk", heads[0], keys).div(16**0.5).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", weights, values).reshape(1, 7, 32)
    torch.testing.assert_close(seen["out"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", EMBEDDING)
def test_padding_changes_nothing(kind: str) -> None:
    model, _ = prefixed(kind)
    given = batch()
    with torch.no_grad():
        both, alone = model(**given).logits[1], model(input_ids=given["input_ids"][1:, :5]).logits[0]
    torch.testing.assert_close(both[:5] if kind != "bert" else both, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", EMBEDDING)
def test_positions_that_are_given_move_up(kind: str) -> None:
    model, _ = prefixed(kind)
    ids = batch()["input_ids"]
    with torch.no_grad():
        given = model(input_ids=ids, position_ids=torch.arange(7).expand(2, 7), cache_position=torch.arange(7))
        assert torch.equal(given.logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation(kind: str) -> None:
    """Greedy tokens are the argmax of whole calls one after the other; a cache and padding on the left change none."""
    model, _ = prefixed(kind)
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


def test_a_call_continues_from_a_cache() -> None:
    """A cache that a call has filled holds the prefix; the next call reads on behind it."""
    model, _ = prefixed("llama")
    ids, cache = batch()["input_ids"], transformers.DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        model(input_ids=ids[:, :4], past_key_values=cache)
        assert cache.get_seq_length() == P + 4
        rest = model(input_ids=ids[:, 4:], past_key_values=cache, attention_mask=torch.ones(2, 7, dtype=torch.long))
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=1e-5, atol=1e-5)


def test_mlp() -> None:
    """P = W₂ tanh(W₁E + b₁) + b₂; its state is P, and what is loaded trains without it."""
    model, part = prefixed("llama", mlp=True, hidden=5)
    assert part.mlp is not None
    first, _, second = part.mlp
    table = torch.tanh(part.prompt_embeddings @ first.weight.t() + first.bias) @ second.weight.t() + second.bias
    torch.testing.assert_close(part.state()["prompt_embeddings"], table.detach())
    # One head of 16 for keys in each of two layers.
    assert [tuple(p.shape) for p in part.trainable_parameters()] == [(P, 16), (5, 16), (5,), (64, 5), (64,)]
    with torch.no_grad():
        wanted = model(**batch()).logits
        part.load_state(part.state())
        assert torch.equal(model(**batch()).logits, wanted)
    assert [tuple(p.shape) for p in part.trainable_parameters()] == [(P, 64)]
    assert part.prompt_embeddings.requires_grad


def test_start_keeps_the_model_as_it_was() -> None:
    """Reading keys off the model leaves modes, dropout's generator and gradients alone."""
    model = make("bert").train()
    model.bert.encoder.layer[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    inject(model, EMBEDDING["bert"], Prefix(tokens=P))
    assert torch.equal(torch.rand(2), wanted)
    # The part came in place of the embeddings, which are its `base` now.
    assert {n.replace(".base", ""): m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())


def test_normal_start() -> None:
    _, part = prefixed("bert", start="normal")
    assert float(part.prompt_embeddings.detach().std()) == pytest.approx(1.0, abs=0.2)  # 384 draws: ±0.04


def test_what_cannot_be() -> None:
    for wrong in ({"tokens": 0}, {"start": "text"}, {"mlp": True, "start": "vocabulary"}, {"hidden": 4}):
        with pytest.raises(UsageError):
            Prefix(**wrong)
    with pytest.raises(UsageError, match=r"matches 3 embeddings"):
        inject(make("bert"), "embeddings", Prefix(tokens=2))
    distil = transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2))
    with pytest.raises(UsageError, match="takes past_key_values; DistilBertModel does not"):
        inject(distil, "word_embeddings$", Prefix(tokens=2))
    _, part = prefixed("bert")
    with pytest.raises(MismatchError, match="prefix of 3 tokens"):
        part.load_state({"prompt_embeddings": torch.zeros(4, 128)})


def test_positions_run_out() -> None:
    model, _ = prefixed("bert")  # 32 positions
    with pytest.raises(UsageError, match="30 tokens behind 3 virtual ones pass the model's 32 positions"):
        model(input_ids=torch.ones(1, 30, dtype=torch.long))
    with pytest.raises(UsageError, match="33 virtual ones"):
        inject(make("bert"), EMBEDDING["bert"], Prefix(tokens=33))


def test_roberta_counts_positions_behind_the_padding() -> None:
    config = transformers.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=12, pad_token_id=1, **SMALL)
    model = transformers.RobertaForSequenceClassification(config).eval()
    inject(model, "word_embeddings$", Prefix(tokens=2))
    assert torch.isfinite(
        model(input_ids=torch.full((1, 8), 5)).logits
    ).all()  # 12 − 2 of the padding − 2 of the prefix
    with pytest.raises(UsageError, match="model's 10 positions"):
        model(input_ids=torch.full((1, 9), 5))


def test_gradient_checkpointing_is_refused() -> None:
    """transformers would drop the prefix without an error."""
    model, _ = prefixed("llama")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient checkpointing"):
        model(**batch())
    model.eval()
    assert torch.isfinite(model(**batch()).logits).all()


def test_a_cache_of_tuples_is_refused() -> None:
    model, _ = prefixed("llama")
    with pytest.raises(UsageError, match="DynamicCache"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=((torch.zeros(1), torch.zeros(1)),))
