"""QLoRA: LoRA beside weights that are stored in four bits, dequantized on the fly and never trained.

Every matched linear map becomes a `QuantizedLinear`, and a LoRA part is put around it (Dettmers et al. [1]_, eq. 5):
y = dequant(Q(W)) x + γB(Ax). Started by LoftQ [2]_, the factors begin where they make up for the rounding instead.

References
----------
.. [1] T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023.
.. [2] Y. Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from spectra.checkpoints.module_patterns import PatternTable
from spectra.errors import UsageError
from spectra.methods.injection import is_conv1d, is_linear, replace_module
from spectra.methods.lora import LoRA, LoRALinear, check_rank
from spectra.methods.parts import WeightSwap
from spectra.quantize.formats import Format, as_format
from spectra.quantize.linear import QuantizedLinear
from spectra.quantize.loftq import loftq

if TYPE_CHECKING:
    from spectra.methods.injection import Injection


@dataclass(frozen=True)
class QLoRA:
    r"""Low-rank adaptation of quantized linear maps.

    Parameters
    ----------
    rank, alpha, dropout, rslora, plus_ratio, init, rank_pattern, alpha_pattern
        As `LoRA`.
    format : str or Format
        Of the frozen weights: ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int8"`` or a code book of one's own.
    block : int
        Weights a scale.
    double : bool
        Whether the scales are themselves quantized: 4.13 bits a weight in place of 4.5.
    start : {"lora", "loftq"}
        B = 0, so that training starts from the quantized model; or the factors that, beside the quantized weight,
        come nearest to the full one.

    Raises
    ------
    UsageError
        If a field is out of range or the format unknown.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> inject(model, "^0$", QLoRA(rank=2)).matched
    1
    >>> model[0].base
    QuantizedLinear(in_features=64, out_features=64, nf4, block=64, 4.141 bits a weight)
    """

    name: ClassVar[str] = "QLoRA"
    peft_type: ClassVar[str | None] = "LORA"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    plus_ratio: float = 1.0
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    format: str | Format = "nf4"
    block: int = 64
    double: bool = True
    start: str = "lora"

    def __post_init__(self) -> None:
        as_format(self.format)
        _ = self.lora
        if self.block < 1:
            raise UsageError(f"QLoRA needs a block of at least one weight, not {self.block}")
        if self.start not in ("lora", "loftq"):
            raise UsageError(f'QLoRA starts from "lora" or "loftq", not {self.start!r}')

    @property
    def lora(self) -> LoRA:
        """The LoRA that is put around the quantized maps."""
        return LoRA(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            plus_ratio=self.plus_ratio,
            init=self.init,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
        )

    def accepts(self, module: nn.Module) -> bool:
        """Linear, and transformers' Conv1D."""
        return is_linear(module)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Quantize every named module and wrap it; see `Method.attach`.

        Raises
        ------
        UsageError
            If a rank is above min(out, in) of its module; the model is then as it was.
        NonFiniteMatrix
            If a weight holds NaN or infinity; the model is then as it was.
        """
        ranks = PatternTable(self.rank_pattern, source="rank_pattern")
        alphas = PatternTable(self.alpha_pattern, source="alpha_pattern")
        for name in names:
            check_rank(name, model.get_submodule(name), int(ranks.find(name) or self.rank))
        quantized: dict[str, QuantizedLinear] = {}
        starts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in names:
            module = model.get_submodule(name)
            if self.start == "loftq":
                rank = int(ranks.find(name) or self.rank)
                quantized[name], starts[name] = self._loftq(module, rank, self.lora.scale(rank, alphas.find(name)))
            else:
                quantized[name] = QuantizedLinear.of(module, self.format, block=self.block, double=self.double)
        for name, module in quantized.items():
            replace_module(model, name, module)
        parts = self.lora.attach(model, names, generator)
        for name, part in parts.items():
            assert isinstance(part, LoRALinear)  # for the type checker: `accepts` lets no embedding in
            part._swap = cast(WeightSwap, _DenseWeight())
            if name in starts:
                with torch.no_grad():
                    part.lora_A.copy_(starts[name][0])
                    part.lora_B.copy_(starts[name][1])
        return parts

    def _loftq(
        self, module: nn.Module, rank: int, scale: float
    ) -> tuple[QuantizedLinear, tuple[torch.Tensor, torch.Tensor]]:
        conv1d = is_conv1d(module)
        weight, bias = cast(torch.Tensor, module.weight), cast("nn.Parameter | None", module.bias)
        quantized, a, b = loftq(
            weight.t() if conv1d else weight,
            rank,
            scale=scale,
            format=self.format,
            block=self.block,
            double=self.double,
        )
        return QuantizedLinear(quantized, bias, fan_in_fan_out=conv1d), (a, b)

    def learning_rate_scale(self, parameter_name: str) -> float:
        """As `LoRA.learning_rate_scale`."""
        return self.lora.learning_rate_scale(parameter_name)

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields of PEFT's LoraConfig; a LoftQ start is named, since its factors belong to the quantized weights."""
        config = self.lora.peft_config(injection)
        bases = [cast(QuantizedLinear, part.base) for part in injection.parts.values()]
        config["fan_in_fan_out"] = any(base.fan_in_fan_out for base in bases)
        if self.start == "loftq":
            config["init_lora_weights"] = "loftq"
        return config


class _DenseWeight:
    """`WeightSwap` for a quantized map: it computes with the dense sum meanwhile, and its codes never change."""

    def __init__(self) -> None:
        self.holds = False

    def put(self, module: QuantizedLinear, update: torch.Tensor) -> None:
        """Let the map compute with its weight plus an update, in the wider dtype of the two."""
        if not self.holds:
            module.hold(module.quantized.dequantize(torch.promote_types(module.dtype, update.dtype)) + update)
            self.holds = True

    def restore(self, module: QuantizedLinear) -> None:
        """Let it compute with its own weight."""
        module.release()
        self.holds = False
