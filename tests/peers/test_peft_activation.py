"""IA3, prefixes and prompts against PEFT: the same logits, both ways and with padding, and the same generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectra.methods import IA3, Prefix, Prompt, inject, load_adapter, save_adapter
from tests.methods.kinds import EMBEDDING, KEYS, VOCABULARY, batch, make

peft = pytest.importorskip("peft")

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
HEAD = {"bert": "^classifier$", "llama": None, "gpt2": None}
METHODS = {
    "ia3": (IA3(), KEYS),
    "prefix": (Prefix(tokens=3), EMBEDDING),
    "prefix-mlp": (Prefix(tokens=3, mlp=True, hidden=5), EMBEDDING),
    "prompt": (Prompt(tokens=3), EMBEDDING),
}

every = pytest.mark.parametrize("kind", TASKS)
pytestmark = pytest.mark.filterwarnings("ignore")


def their_config(method: str, kind: str) -> Any:
    """PEFT's configuration of the same method, as a user of PEFT writes it."""
    task = {"task_type": TASKS[kind]}
    if method == "ia3":
        feedforward = {"bert": "output.dense", "llama": "down_proj", "gpt2": "mlp.c_proj"}[kind]
        targets = {"bert": ["key", "value"], "llama": ["k_proj", "v_proj"], "gpt2": ["c_attn"]}[kind]
        return peft.IA3Config(target_modules=[*targets, feedforward], feedforward_modules=[feedforward], **task)
    if method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", **task)
    return peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=method == "prefix-mlp", **task)


def shake(parameters: Any) -> None:
    """Move parameters away from a start that could hide a difference."""
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def ours(method: str, kind: str, folder: Path) -> Any:
    """A model with our method, shaken, and its folder."""
    model, (what, where) = make(kind), METHODS[method]
    injection = inject(model, where[kind], what, also=HEAD[kind])
    shake(p for p in model.parameters() if p.requires_grad)
    save_adapter(injection, folder, base_model="", task_type=TASKS[kind])
    return model.eval()


def theirs(method: str, kind: str, folder: Path) -> Any:
    """A model with PEFT's method, shaken, as PEFT reads it back from the folder."""
    model = peft.get_peft_model(make(kind), their_config(method, kind))
    shake(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(make(kind), folder).eval()


def compare(mine: Any, their: Any, kind: str) -> None:
    """Logits and losses, with and without a mask, are the same: one computation in one order, so bit for bit."""
    given = batch()
    labels = torch.tensor([0, 2]) if kind == "bert" else given["input_ids"]
    with torch.no_grad():
        for kwargs in (given, {"input_ids": given["input_ids"]}):
            got, wanted = mine(**kwargs, labels=labels), their(**kwargs, labels=labels)
            assert torch.equal(got.logits, wanted.logits)
            assert torch.equal(got.loss, wanted.loss)


@every
@pytest.mark.parametrize("method", METHODS)
def test_ours_opens_in_peft(method: str, kind: str, tmp_path: Path) -> None:
    mine = ours(method, kind, tmp_path)
    their = peft.PeftModel.from_pretrained(make(kind), tmp_path).eval()
    compare(mine, their, kind)


@every
@pytest.mark.parametrize("method", METHODS)
def test_theirs_opens_here(method: str, kind: str, tmp_path: Path) -> None:
    their = theirs(method, kind, tmp_path)
    mine = make(kind)
    load_adapter(mine, tmp_path)
    compare(mine, their, kind)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_generation(method: str, kind: str, tmp_path: Path) -> None:
    """Greedy search and beams write the same tokens."""
    mine = ours(method, kind, tmp_path)
    their = peft.PeftModel.from_pretrained(make(kind), tmp_path).eval()
    given = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    for kwargs in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
        written = mine.generate(**given, **settings)
        assert written.shape == (2, 15)
        assert torch.equal(written, their.generate(**given, **settings))


@every
@pytest.mark.parametrize("method", ["ia3", "prefix", "prompt"])
def test_training_steps(method: str, kind: str, tmp_path: Path) -> None:
    """Three steps of SGD from one start leave the same tensors: gradients agree, not only values."""
    mine, (what, where) = make(kind), METHODS[method]
    injection = inject(mine, where[kind], what, also=HEAD[kind])
    folder = save_adapter(injection, tmp_path, base_model="", task_type=TASKS[kind])
    start = peft.load_peft_weights(str(folder), device="cpu")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # as saved, it is for reading
    their = peft.get_peft_model(make(kind), config)
    peft.set_peft_model_state_dict(their, start)
    for model in (mine, their):
        model.eval()  # no dropout
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            labels = torch.tensor([0, 2]) if kind == "bert" else batch()["input_ids"]
            model(**batch(), labels=labels).loss.backward()
            optimizer.step()
    trained = peft.get_peft_model_state_dict(their)
    own = peft.load_peft_weights(str(save_adapter(injection, tmp_path, base_model="", task_type=None)), device="cpu")
    assert own.keys() == trained.keys()
    for key, tensor in own.items():
        assert not torch.equal(tensor, start[key])
        torch.testing.assert_close(tensor, trained[key], rtol=1e-6, atol=1e-6)  # float32, gradients summed in any order


def test_peft_reads_padding_on_the_left_as_text(tmp_path: Path) -> None:
    """Why positions are kept here: PEFT drops them for prompts, and what it writes depends on the padding."""
    mine = ours("prompt", "gpt2", tmp_path)
    their = peft.PeftModel.from_pretrained(make("gpt2"), tmp_path).eval()
    ids = torch.randint(1, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0))
    padded, mask = torch.nn.functional.pad(ids, (9, 0)), torch.nn.functional.pad(torch.ones_like(ids), (9, 0))
    logits = {}
    for name, model in (("mine", mine), ("their", their)):
        out = model.generate(
            input_ids=padded, attention_mask=mask, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        logits[name] = out.logits[0]
    with torch.no_grad():
        wanted = mine(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(logits["mine"], wanted, rtol=1e-5, atol=1e-5)  # float32, masked sums in another order
    assert float((logits["their"] - wanted).abs().max()) > 1e-2
