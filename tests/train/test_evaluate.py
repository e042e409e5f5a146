"""What `evaluate` reports, against the same figures taken by hand."""

import math

import pytest
import torch
from torch import nn

from spectra.errors import UsageError
from spectra.train.evaluate import evaluate
from tests.train.tiny import bert, llama, texts


def test_classification_is_the_mean_over_rows_and_the_share_of_right_ones():
    model = bert(dropout=0.5).train()
    batches = [texts(0, size=8), texts(1, size=3)]
    found = evaluate(model, batches)
    assert model.training, "the mode it came in"
    model.eval()
    rows = torch.cat([b["input_ids"] for b in batches])
    labels = torch.cat([b["labels"] for b in batches])
    with torch.no_grad():
        logits = model(input_ids=rows).logits
    assert found.keys() == {"loss", "accuracy"}
    # float32 logits, taken in batches of another size
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["accuracy"] == (logits.argmax(-1) == labels).sum().item() / 11


def test_a_language_models_perplexity_is_that_of_all_its_targets():
    """Batches of unlike numbers of targets: the mean over tokens, not over batches."""
    ids = torch.randint(100, (4, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 2:] = -100
    model = llama()
    found = evaluate(model, [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(4)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 100), labels[:, 1:].reshape(-1)).item()
    assert found.keys() == {"loss", "perplexity"}
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_bf16_is_used_where_asked_for():
    high, low = (evaluate(bert(), [texts(0)], precision=p)["loss"] for p in ("fp32", "bf16"))
    assert high != low
    assert low == pytest.approx(high, abs=0.02)  # logits of order 1 rounded to 8 bits


def test_nothing_to_evaluate_on_is_said():
    with pytest.raises(UsageError, match="nothing to evaluate on"):
        evaluate(bert(), [])
    with pytest.raises(UsageError, match="none with a labelled target"):
        evaluate(bert(), [{**texts(0), "labels": torch.full((8,), -100)}])
