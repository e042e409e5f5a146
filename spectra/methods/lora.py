"""LoRA: a weight's update as a product of two thin factors, with rsLoRA's scale, LoRA+'s rates and dropout.

The forward pass adds γB(Ax) to the frozen module's output, A (r, in) and B (out, r), γ = α/r (Hu et al. [1]_, section
4.1) or γ = α/√r (Kalajdzievski [2]_, eq. 3). B begins at zero, so that training starts from the frozen model.

References
----------
.. [1] E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
.. [2] D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
.. [3] S. Hayou, N. Ghosh and B. Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional

from spectra.checkpoints.adapter_config import parse_adapter_config
from spectra.checkpoints.module_patterns import PatternTable
from spectra.errors import UnsupportedFormat, UsageError
from spectra.methods.injection import features, is_conv1d, is_linear, replace_module
from spectra.methods.parts import WeightSwap, adapter_dtype, device_of, take
from spectra.methods.targets import target_modules

if TYPE_CHECKING:
    from spectra.methods.injection import Injection


@dataclass(frozen=True)
class LoRA:
    r"""Low-rank adaptation of linear maps and embeddings.

    Parameters
    ----------
    rank : int
        r, at most min(out, in) of every module.
    alpha : float
        α, the numerator of the scale.
    dropout : float
        Probability with which an entry of the factors' input is dropped in training; 0 ≤ dropout < 1.
    rslora : bool
        Scale α/√r in place of α/r.
    plus_ratio : float
        LoRA+: learning rate of B in units of A's; 1 is plain LoRA, the paper's advice is 16.
    init : {"kaiming", "gaussian"}
        Start of A: uniform on ±1/√in, or normal with standard deviation 1/r. B starts at zero.
    rank_pattern, alpha_pattern : mapping of str to number
        Ranks and alphas of single modules, looked up by pattern of their names as PEFT does: a pattern matches a name
        whole, or its end after a dot; the first that matches wins.

    Raises
    ------
    UsageError
        If a field is out of range.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> inject(model, "^0$", LoRA(rank=2))
    LoRA at 1 modules matching '^0$': 20 of 63 parameters train (31.75%)
    """

    name: ClassVar[str] = "LoRA"
    peft_type: ClassVar[str | None] = "LORA"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    plus_ratio: float = 1.0
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise UsageError(f"LoRA needs a rank of at least 1, not {rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"LoRA's dropout is a probability below 1, not {self.dropout}")
        if not self.plus_ratio > 0.0:
            raise UsageError(f"LoRA+'s ratio of learning rates is positive, not {self.plus_ratio}")
        if self.init not in ("kaiming", "gaussian"):
            raise UsageError(f'LoRA\'s A starts "kaiming" or "gaussian", not {self.init!r}')

    def scale(self, rank: int, alpha: float | None = None) -> float:
        """Factor γ in front of BA for a module of this rank.

        Examples
        --------
        >>> LoRA(alpha=16).scale(4), LoRA(alpha=16, rslora=True).scale(4)
        (4.0, 8.0)
        """
        alpha = self.alpha if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def accepts(self, module: nn.Module) -> bool:
        """Linear, transformers' Conv1D, and Embedding."""
        return is_linear(module) or isinstance(module, nn.Embedding)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap every named module; see `Method.attach`.

        Raises
        ------
        UsageError
            If a rank is above min(out, in) of its module.
        """
        ranks = PatternTable(self.rank_pattern, source="rank_pattern")
        alphas = PatternTable(self.alpha_pattern, source="alpha_pattern")
        plan = [(name, model.get_submodule(name), int(ranks.find(name) or self.rank)) for name in names]
        for name, module, rank in plan:
            check_rank(name, module, rank)
        parts: dict[str, nn.Module] = {}
        for name, module, rank in plan:
            scale = self.scale(rank, alphas.find(name))
            if isinstance(module, nn.Embedding):
                parts[name] = LoRAEmbedding(module, rank, scale, generator)
            else:
                parts[name] = LoRALinear(module, rank, scale, generator, dropout=self.dropout, init=self.init)
            replace_module(model, name, parts[name])
        return parts

    def learning_rate_scale(self, parameter_name: str) -> float:
        """LoRA+'s ratio for B, 1 for everything else ([3]_, section 4)."""
        return self.plus_ratio if parameter_name.rpartition(".")[2].endswith("_B") else 1.0

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields of PEFT's LoraConfig."""
        parts = injection.parts.values()
        return {
            "peft_type": self.peft_type,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": target_modules(injection),
            "fan_in_fan_out": any(is_conv1d(cast(nn.Module, part.base)) for part in parts),
            "bias": "none",
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
        }

    @classmethod
    def from_peft_config(cls, fields: Mapping[str, Any]) -> LoRA:
        """The method that a PEFT LoraConfig describes.

        Raises
        ------
        UnsafeCheckpoint
            If a field is malformed.
        UnsupportedFormat
            If it is a variant that no part here computes: DoRA, trained biases, factors that belong to a changed base.

        Examples
        --------
        >>> LoRA.from_peft_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}).scale(4)
        4.0
        """
        config = parse_adapter_config(fields, source="adapter_config.json")
        for words, used in (
            ("DoRA (use_dora)", config.use_dora),
            ("trained biases of B (lora_bias)", config.lora_bias),
            (f'biases trained beside it (bias="{config.bias}")', config.bias != "none"),
        ):
            if used:
                raise UnsupportedFormat(f"LoRA with {words} has no part here; merge it with peft (merge_and_unload)")
        dropout = fields.get("lora_dropout")
        return cls(
            rank=config.r,
            alpha=config.lora_alpha,
            dropout=float(dropout) if isinstance(dropout, int | float) else 0.0,
            rslora=config.use_rslora,
            init="gaussian" if fields.get("init_lora_weights") == "gaussian" else "kaiming",
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        )


class LoRALinear(nn.Module):
    """A linear map with a low-rank update beside it.

    Parameters
    ----------
    base : Module
        The frozen map: Linear, Conv1D, or any module with `in_features` and `out_features` (a quantized one).
    rank : int
        r.
    scale : float
        γ.
    generator : Generator
        Source of A's start, on the CPU.
    dropout : float
        Probability of dropping an entry of the factors' input.
    init : {"kaiming", "gaussian"}
        As `LoRA`.

    Attributes
    ----------
    lora_A : Parameter of shape (r, in)
    lora_B : Parameter of shape (out, r)
        In the base's dtype, in float32 where that is narrower.
    merged : bool
        Whether the base's weight holds the update at present.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        generator: torch.Generator,
        *,
        dropout: float = 0.0,
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        rows, cols = _shape(base)
        start = torch.empty(rank, cols)
        if init == "gaussian":
            start.normal_(0.0, 1.0 / rank, generator=generator)
        else:
            bound = 1.0 / math.sqrt(cols)  # Kaiming's uniform start with a = √5, torch's own for Linear
            start.uniform_(-bound, bound, generator=generator)
        dtype, device = adapter_dtype(base), device_of(base)
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.lora_A = nn.Parameter(start.to(dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        self._swap = WeightSwap()

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the update at present."""
        return self._swap.holds

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return cast(torch.Tensor, self.base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Wx + b + γB(Ax), (…, in) → (…, out)."""
        if self.merged:
            return cast(torch.Tensor, self.base(x))
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in): one product adds the update, with no pass for the scale
        h = self.base(flat)  # (tokens, out)
        if self.dropout and self.training:
            flat = functional.dropout(flat, self.dropout)
        if h.dtype == self.lora_B.dtype or torch.is_autocast_enabled(h.device.type):
            h = torch.addmm(h, functional.linear(flat, self.lora_A), self.lora_B.t(), alpha=self.scale)
        else:  # a half-precision base under wider factors: the sum is rounded once
            thin = functional.linear(flat.to(self.lora_A.dtype), self.lora_A)  # (tokens, r)
            h = torch.addmm(h.to(thin.dtype), thin, self.lora_B.t(), alpha=self.scale).to(h.dtype)
        return h.view(*x.shape[:-1], h.shape[-1])

    def delta_weight(self) -> torch.Tensor:
        """γBA, (out, in)."""
        return (self.lora_B @ self.lora_A).detach() * self.scale

    def merge(self) -> None:
        """Exchange the base's weight for W + γBA; a quantized base has none to exchange."""
        update = self.delta_weight()
        self._swap.put(self.base, update.t() if is_conv1d(self.base) else update)

    def unmerge(self) -> None:
        """Put the weight back, bit for bit."""
        self._swap.restore(self.base)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """A and B."""
        yield from (self.lora_A, self.lora_B)

    def state(self) -> dict[str, torch.Tensor]:
        """A and B by PEFT's names."""
        return {"lora_A.weight": self.lora_A.detach(), "lora_B.weight": self.lora_B.detach()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take A and B; raises `MismatchError`."""
        take(self.state(), tensors, part=f"LoRA of rank {self.lora_A.shape[0]}")


class LoRAEmbedding(nn.Module):
    """An embedding with a low-rank update beside it: row i is E_i + γ(BA)ᵀ_i.

    Parameters
    ----------
    base : Embedding
        The frozen embedding, (rows, columns).
    rank : int
        r.
    scale : float
        γ.
    generator : Generator
        Source of B's start: here A starts at zero and B normal, as in the authors' loralib and in PEFT.

    Attributes
    ----------
    lora_embedding_A : Parameter of shape (r, rows)
    lora_embedding_B : Parameter of shape (columns, r)
    """

    def __init__(self, base: nn.Embedding, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, cols = base.weight.shape
        dtype, device = adapter_dtype(base), device_of(base)
        start = torch.randn(cols, rank, generator=generator)
        self.base = base
        self.scale = scale
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, rows, dtype=dtype, device=device))
        self.lora_embedding_B = nn.Parameter(start.to(dtype=dtype, device=device))
        self._swap = WeightSwap()

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the update at present."""
        return self._swap.holds

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(…) of ids → (…, columns)."""
        h: torch.Tensor = self.base(ids)
        if self.merged:
            return h
        thin = functional.embedding(ids, self.lora_embedding_A.t(), padding_idx=self.base.padding_idx)  # (…, r)
        return (h + functional.linear(thin, self.lora_embedding_B) * self.scale).to(h.dtype)

    def delta_weight(self) -> torch.Tensor:
        """γ(BA)ᵀ, (rows, columns) as embeddings are stored."""
        return (self.lora_embedding_B @ self.lora_embedding_A).t().detach() * self.scale

    def merge(self) -> None:
        """Exchange the embedding for E + γ(BA)ᵀ; a head tied to it keeps E."""
        self._swap.put(self.base, self.delta_weight())

    def unmerge(self) -> None:
        """Put the embedding back, bit for bit."""
        self._swap.restore(self.base)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """A and B."""
        yield from (self.lora_embedding_A, self.lora_embedding_B)

    def state(self) -> dict[str, torch.Tensor]:
        """A and B by PEFT's names, which have no ``.weight`` here."""
        return {
            "lora_embedding_A": self.lora_embedding_A.detach(),
            "lora_embedding_B": self.lora_embedding_B.detach(),
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take A and B; raises `MismatchError`."""
        take(self.state(), tensors, part=f"LoRA of rank {self.lora_embedding_A.shape[0]} on an embedding")


def check_rank(name: str, module: nn.Module, rank: int) -> None:
    """Raise `UsageError` where a rank is above what the module's weight can have."""
    shape = tuple(module.weight.shape) if isinstance(module, nn.Embedding) else _shape(module)
    if rank > min(shape):
        raise UsageError(
            f"rank {rank} is above min{shape} of {name}: full fine-tuning is smaller; lower the rank, or give this "
            "module its own in rank_pattern"
        )


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map, or of a module that says so itself."""
    return features(module) if is_linear(module) else (module.out_features, module.in_features)  # type: ignore[return-value]
