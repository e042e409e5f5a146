"""Quantization and the QLoRA step against bitsandbytes, and peft with it, on one CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from spectra import open_checkpoint
from spectra.examples import fetch
from spectra.methods import QLoRA, inject
from spectra.quantize import FORMATS, Scheme, kernels, quantize
from spectra.quantize.analysis import quantization_error
from tests.benchmarks.timing import Row, in_turn

_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def quantization() -> Iterator[Row]:
    """NF4 of 1536 × 1536 with double quantization, there and back; then every format."""
    from bitsandbytes import functional

    w = torch.randn(1536, 1536, generator=torch.Generator().manual_seed(0)) * 0.02
    ours, theirs = in_turn(
        lambda: quantize(w, "nf4"),
        lambda: functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4"),
        rounds=7,
    )
    q, (packed, state) = ours.result, theirs.result
    same = torch.equal(q.codes, packed.view(-1)) and torch.equal(q.scales.nested_absmax, state.state2.absmax)
    bits = q.bits_per_weight
    yield Row(
        "NF4, double-quantized, 1536 × 1536",
        ours.seconds,
        "bitsandbytes",
        theirs.seconds,
        "≥ 2×",
        theirs.seconds / ours.seconds >= 2.0 and same and bits <= 4.13,
        f"the same bits: {same}; {bits:.3f} bits a weight (≤ 4.13)",
    )
    back, again = in_turn(
        lambda: q.dequantize(backend="torch"), lambda: functional.dequantize_4bit(packed, state), rounds=21
    )
    same = torch.equal(back.result, again.result)
    yield Row(
        "and back, torch alone",
        back.seconds,
        "bitsandbytes",
        again.seconds,
        "≥ 0.4×",
        again.seconds / back.seconds >= 0.4 and same,
        f"the same bits: {same}",
    )
    yield from _every_format()


def _every_format() -> Iterator[Row]:
    """Every format on 2048 × 2048, there and back by torch alone, beside bitsandbytes' NF4."""
    from bitsandbytes import functional

    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    energy = float(w.square().mean())
    for name in FORMATS:
        there, theirs = in_turn(
            lambda name=name: quantize(w, name),
            lambda: functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4"),
            rounds=5,
        )
        q = there.result
        back, again = in_turn(
            lambda q=q: q.dequantize(backend="torch"),
            lambda packed=theirs.result: functional.dequantize_4bit(*packed),
            rounds=11,
        )
        error = float((w - back.result).square().mean()) / energy
        accuracy = f"{q.bits_per_weight:.3f} bits a weight, relative squared error {error:.2g}"
        # Fitting a code book reads every entry once more. Odd widths take their bytes apart before they look levels up,
        # where the rival is one loop over four bits.
        for work, ours, rival, least in (("", there, theirs, 0.2), (", and back", back, again, 0.05)):
            ratio = rival.seconds / ours.seconds
            yield Row(
                f"{name}, 2048 × 2048{work}: {w.nbytes / 1e9 / ours.seconds:.2g} GB/s of float32",
                ours.seconds,
                "bitsandbytes NF4",
                rival.seconds,
                f"≥ {least:.2g}×",
                ratio >= least,
                accuracy,
            )


def analysis(rounds: int = 3) -> Iterator[Row]:
    """The error of every matrix of MiniLM in four formats, against reading and quantizing it in them."""
    base = open_checkpoint(fetch("minilm"))
    names = [name for name, info in base.infos().items() if len(info.shape) == 2 and info.dtype == "F32"]
    schemes = [Scheme.parse(text) for text in ("nf4", "fp4", "int4", "int8")]

    def ours() -> float:
        return max(quantization_error(base[name], scheme).relative_mse for name in names for scheme in schemes)

    def read_and_quantized() -> None:
        for name in names:
            weight = base[name]
            for scheme in schemes:
                scheme.quantize(weight)

    mine, theirs = in_turn(ours, read_and_quantized, rounds=rounds)
    times = mine.seconds / theirs.seconds
    yield Row(
        f"quantization error of MiniLM's {len(names)} matrices, four formats",
        mine.seconds,
        "only reading and quantizing",
        theirs.seconds,
        "≥ 1/10×",
        times < 10.0,
        f"{times:.1f} times; largest relative error² {mine.result:.4f}",
    )


def qlora_step() -> Iterator[Row]:
    """A QLoRA step on a MiniLM-shaped encoder (random weights), batch 32, length 64, against peft's."""
    import peft
    import transformers
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    rival = copy.deepcopy(model)
    pattern = rf"encoder.*\.({'|'.join(_TARGETS)})$"
    parts = inject(model, pattern, QLoRA(rank=8, alpha=16), also="classifier").parts
    for name in parts:
        module = rival.get_submodule(name)
        four = Linear4bit(module.in_features, module.out_features, quant_type="nf4", compute_dtype=torch.float32)
        four.load_state_dict(module.state_dict())
        holder, _, attribute = name.rpartition(".")
        setattr(rival.get_submodule(holder), attribute, four.to("cpu"))
    # peft looks for this mark to put its 4-bit layers in.
    rival.is_loaded_in_4bit = True
    setup = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(parts), modules_to_save=["classifier"])
    rival = peft.get_peft_model(rival, setup)
    with torch.no_grad():
        for name, part in parts.items():
            theirs = rival.get_submodule(f"base_model.model.{name}")
            theirs.lora_A["default"].weight.copy_(part.lora_A)
    batch = {
        "input_ids": torch.randint(1000, 30000, (32, 64)),
        "attention_mask": torch.ones(32, 64, dtype=torch.long),
        "labels": torch.randint(0, 2, (32,)),
    }
    with_kernels, without = _step(model, batch), _step(copy.deepcopy(model), batch)

    def alone() -> float:
        real, kernels.obstacle = kernels.obstacle, lambda quantized: "switched off for this timing"
        try:
            return without()
        finally:
            kernels.obstacle = real

    ours, own, theirs = in_turn(with_kernels, alone, _step(rival, batch), rounds=9)
    off = abs(ours.result - theirs.result)
    for work, timing, least in (("", ours, 1.0), (", torch alone", own, 1 / 1.5)):
        ratio = theirs.seconds / timing.seconds
        yield Row(
            f"QLoRA step, r = 8, batch 32 × 64{work}",
            timing.seconds,
            "peft + bitsandbytes",
            theirs.seconds,
            f"≥ {least:.2g}×",
            ratio >= least and off < 1e-3,
            f"losses after as many steps {off:.0e} apart (≤ 1e-3)",
        )


def _step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    """One update by AdamW, as a function that gives the loss before it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> float:
        loss: torch.Tensor = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
