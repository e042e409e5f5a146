"""Tiny random models of three architectures, and where each method goes in them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VOCABULARY = 61

LINEAR = {
    "bert": r"attention\.self\.(query|key|value)$|attention\.output\.dense$|intermediate\.dense$|\d\.output\.dense$",
    "llama": r"(q|k|v|o|gate|up|down)_proj$",
    "gpt2": r"c_attn$|c_proj$|c_fc$",
}
KEYS = {
    "bert": r"self\.(key|value)$|\d\.output\.dense$",
    "llama": r"(k|v|down)_proj$",
    "gpt2": r"c_attn$|mlp\.c_proj$",
}
ENDS = {"bert": r"output\.dense$", "llama": r"(o|down)_proj$", "gpt2": r"c_proj$"}
EMBEDDING = {"bert": r"word_embeddings$", "llama": r"embed_tokens$", "gpt2": r"wte$"}
EVERYTHING = dict.fromkeys(LINEAR, "")


def make(kind: str, seed: int = 0) -> Any:
    """A model in evaluation mode; one seed gives one model, biases and norms not at their trivial start."""
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3, **SMALL)
        model: Any = transformers.BertForSequenceClassification(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, pad_token_id=0, **SMALL)
        model = transformers.LlamaForCausalLM(config)
    else:
        # 32 wide, so that transposes of the square c_proj would go unseen if shapes alone were looked at.
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: transformers' RMSNorm computes in float32 whatever it is given."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model.double()


def batch() -> dict[str, torch.Tensor]:
    """Two texts, the second padded on the right."""
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any) -> torch.Tensor:
    """Logits of the batch; of a causal model at the tokens that stand there, behind virtual ones."""
    given = batch()
    out: torch.Tensor = model(**given).logits
    return out[:, -given["input_ids"].shape[1] :][given["attention_mask"].bool()] if out.dim() == 3 else out
