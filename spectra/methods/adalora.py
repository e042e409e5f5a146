"""AdaLoRA: the update as PΛQ, whose least important triplets are pruned until a budget of ranks is met.

The forward pass adds γPΛQx, P (out, r) and Q (r, in) kept near orthonormal by a penalty, Λ diagonal and zero at the
start. After a warm-up the triplets of all matrices together are ranked by importance, and only as many keep their λ as
the budget allows; one that was pruned may come back until the budget is final (Zhang et al. [1]_, algorithm 1). The
scores and the budget are `spectra.importance`, the steps that prune `spectra.methods.adalora_budget`.

PEFT's implementation departs from the paper, and from this file, in five points:

* Its penalty takes ‖PᵀP − I‖_F unsquared and averages it over all P and Q; equation (4) squares, and sums.
* Its documented call comes after the optimizer's step and multiplies gradients with weights that have moved on; the
  scores here are taken in between.
* Its mask compares with a threshold, so that equal scores fall together: it can prune below the budget, and at the
  first steps, while all scores are zero, everything. Here the budget is met exactly.
* With steps counted from 0 and ``tfinal=0`` it never settles: what it pruned last may have grown again at the end.
  The final stretch has a step at least here.
* It stops where nothing is to be pruned (``target_r == init_r``). Here that is AdaLoRA of constant rank.

References
----------
.. [1] Q. Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional

from spectra.errors import MismatchError, UsageError
from spectra.importance import Stretches, stretches
from spectra.methods.adalora_budget import AdaLoRAHooks
from spectra.methods.injection import features, is_conv1d, is_linear, replace_module
from spectra.methods.parts import WeightSwap, adapter_dtype, device_of, take
from spectra.methods.targets import target_modules

if TYPE_CHECKING:
    from spectra.methods.injection import Injection

# Standard deviation of P's and Q's Gaussian start, the authors' and PEFT's.
_SPREAD = 0.02
# PEFT divides α by r + 1e-5, so that a module of rank 0 does not divide by zero; its folders mean this scale.
_NO_ZERO = 1e-5
# Schedule that an adapter which was never trained names in its folder: PEFT refuses a total of 0.
_UNTRAINED_STEPS = 100


@dataclass(frozen=True)
class AdaLoRA:
    r"""Low-rank adaptation that spreads a budget of ranks over the modules by importance.

    Parameters
    ----------
    rank : int
        Average rank a module at the end, b_T over the number of modules.
    init_rank : int, optional
        Rank of every module at the start, b_0 over the number of modules; 1.5 times `rank` by default.
    alpha : float
        Numerator of the scale γ = α/init_rank, which pruning does not change.
    dropout : float
        Probability with which an entry of the factors' input is dropped in training; 0 ≤ dropout < 1.
    beta1, beta2 : float
        Weights of the past in the smoothed sensitivity and in its uncertainty.
    warmup, final, interval : float
        Shares of all steps: before pruning begins, with the final budget, and from one pruning to the next (a step at
        least). The authors' scripts for GLUE take .09 to .15, .44 to .58 and .0003 to .002.
    regularizer : float
        Weight of the penalty on P and Q.
    score : {"sensitivity", "magnitude"}
        The paper's triplet score, or \|λ\|(‖P‖ + ‖Q‖)/2.
    start : {"orthonormal", "gaussian"}
        P and Q as orthonormal bases of the spans of Gaussian matrices, or, as in the paper, normal with standard
        deviation .02. From there the penalty first has to stretch their vectors to length 1, and Adam remembers its
        gradients: on a planted task (width 384, 200 steps at a rate of .002) the loss fell a third as far as from
        orthonormal factors.

    Raises
    ------
    UsageError
        If a field is out of range.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> inject(model, "^0$", AdaLoRA(rank=2))
    AdaLoRA at 1 modules matching '^0$': 33 of 76 parameters train (43.42%)
    >>> AdaLoRA().schedule(200)
    Stretches(warmup=20, final=100, interval=1)
    """

    name: ClassVar[str] = "AdaLoRA"
    peft_type: ClassVar[str | None] = "ADALORA"

    rank: int = 4
    init_rank: int | None = None
    alpha: float = 64.0
    dropout: float = 0.0
    beta1: float = 0.85
    beta2: float = 0.85
    warmup: float = 0.1
    final: float = 0.5
    interval: float = 0.002
    regularizer: float = 0.5
    score: str = "sensitivity"
    start: str = "orthonormal"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"AdaLoRA needs an average rank of at least 1, not {self.rank}")
        if self.start_rank < self.rank:
            raise UsageError(f"AdaLoRA prunes: init_rank = {self.init_rank} is below the final rank = {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"AdaLoRA's dropout is a probability below 1, not {self.dropout}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 < beta < 1.0:
                raise UsageError(f"AdaLoRA's {name} lies in (0, 1), not {beta}")
        if min(self.warmup, self.final, self.interval) < 0 or self.warmup + self.final >= 1.0:
            raise UsageError(
                f"AdaLoRA's warmup = {self.warmup} and final = {self.final} are shares of all steps that leave some to "
                f"prune in, and interval = {self.interval} is not negative"
            )
        if self.regularizer < 0.0:
            raise UsageError(f"AdaLoRA's regularizer is not negative, unlike {self.regularizer}")
        if self.score not in ("sensitivity", "magnitude"):
            raise UsageError(f'AdaLoRA scores by "sensitivity" or "magnitude", not {self.score!r}')
        if self.start not in ("orthonormal", "gaussian"):
            raise UsageError(f'AdaLoRA\'s P and Q start "orthonormal" or "gaussian", not {self.start!r}')

    @property
    def start_rank(self) -> int:
        """Rank of every module at the start."""
        return math.ceil(1.5 * self.rank) if self.init_rank is None else self.init_rank

    def schedule(self, total: int) -> Stretches:
        """The budget's stretches in a training of this many steps; one of two steps or more reaches the last budget."""
        return stretches(total, warmup=self.warmup, final=self.final, interval=self.interval)

    def accepts(self, module: nn.Module) -> bool:
        """Linear, and transformers' Conv1D."""
        return is_linear(module)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap every named module; see `Method.attach`.

        Raises
        ------
        UsageError
            If the start's rank is above min(out, in) of a module.
        """
        modules = {name: model.get_submodule(name) for name in names}
        for name, module in modules.items():
            if self.start_rank > min(features(module)):
                out, inner = features(module)
                raise UsageError(
                    f"{name} is {out} × {inner}: AdaLoRA cannot start it at rank {self.start_rank}; lower rank or "
                    f"init_rank to {min(out, inner)}"
                )
        parts: dict[str, nn.Module] = {}
        for name, module in modules.items():
            parts[name] = AdaLoRALinear(
                module, self.start_rank, self.alpha, generator, dropout=self.dropout, start=self.start
            )
            replace_module(model, name, parts[name])
        return parts

    def hooks(self, injection: Injection) -> AdaLoRAHooks:
        """Penalty, scores and pruning."""
        return AdaLoRAHooks(self, cast("dict[str, AdaLoRALinear]", injection.parts))

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """Fields of PEFT's AdaLoraConfig; ``rank_pattern`` says which triplets of the start are in the file."""
        hooks = cast(AdaLoRAHooks, injection.hooks)
        parts = cast("dict[str, AdaLoRALinear]", injection.parts)
        total = max(2, hooks.total or _UNTRAINED_STEPS)
        schedule = self.schedule(total)
        whole = all(len(part.pattern()) == int(sum(part.pattern())) for part in parts.values())
        return {
            "peft_type": self.peft_type,
            "target_r": self.rank,
            "init_r": self.start_rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "tinit": schedule.warmup,
            "tfinal": schedule.final,
            "deltaT": schedule.interval,
            "total_step": total,
            "orth_reg_weight": self.regularizer,
            "rank_pattern": None if whole else {f"{name}.lora_E": part.pattern() for name, part in parts.items()},
            "target_modules": target_modules(injection),
            "fan_in_fan_out": any(is_conv1d(part.base) for part in parts.values()),
            "bias": "none",
        }

    @classmethod
    def from_peft_config(cls, fields: Mapping[str, Any]) -> AdaLoRA:
        """The method that a PEFT AdaLoraConfig describes; its steps become shares of its total.

        Examples
        --------
        >>> AdaLoRA.from_peft_config({"target_r": 2, "init_r": 3, "total_step": 50, "tinit": 5, "tfinal": 10}).final
        0.2
        """
        start, total = int(fields.get("init_r") or 12), max(1, int(fields.get("total_step") or 1))
        alpha = float(fields.get("lora_alpha", 8))
        return cls(
            rank=min(int(fields.get("target_r") or 8), start),
            init_rank=start,
            alpha=alpha if alpha > 0 else float(start),
            dropout=float(fields.get("lora_dropout") or 0.0),
            beta1=float(fields.get("beta1") or 0.85),
            beta2=float(fields.get("beta2") or 0.85),
            regularizer=float(fields.get("orth_reg_weight") or 0.0),
            warmup=(fields.get("tinit") or 0) / total,
            final=(fields.get("tfinal") or 0) / total,
            interval=(fields.get("deltaT") or 1) / total,
        )


class AdaLoRALinear(nn.Module):
    """A linear map with an update of prunable triplets beside it.

    Parameters
    ----------
    base : Module
        The frozen map, Linear or Conv1D.
    rank : int
        r at the start.
    alpha : float
        γ = α/(r + 1e-5).
    generator : Generator
        Source of P's and Q's start, on the CPU.
    dropout : float
        Probability of dropping an entry of the factors' input.
    start : {"orthonormal", "gaussian"}
        As `AdaLoRA`.

    Attributes
    ----------
    lora_A : Parameter of shape (r, in)
        Q.
    lora_E : Parameter of shape (r, 1)
        The diagonal of Λ.
    lora_B : Parameter of shape (out, r)
        P. All in the base's dtype, in float32 where that is narrower.
    kept : bool Tensor of shape (r,)
        False for triplets that the final budget left out; `state` leaves them out too.
    merged : bool
        Whether the base's weight holds the update at present.
    """

    kept: torch.Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        *,
        dropout: float = 0.0,
        start: str = "orthonormal",
    ) -> None:
        super().__init__()
        out, inner = features(base)
        dtype, device = adapter_dtype(base), device_of(base)
        right, left = (_SPREAD * torch.randn(size, rank, generator=generator) for size in (inner, out))
        if start == "orthonormal":
            right, left = torch.linalg.qr(right).Q, torch.linalg.qr(left).Q
        self.base = base
        self.start_rank = rank
        self.scale = alpha / (rank + _NO_ZERO)
        self.dropout = dropout
        self.lora_A = nn.Parameter(right.t().contiguous().to(device, dtype))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(left.contiguous().to(device, dtype))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=device), persistent=False)
        self._swap = WeightSwap()

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the update at present."""
        return self._swap.holds

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: models look at its dtype and device."""
        return cast(torch.Tensor, self.base.weight)

    @property
    def rank(self) -> int:
        """Number of triplets with a λ."""
        return int(torch.count_nonzero(self.lora_E.detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Wx + b + γPΛQx, (…, in) → (…, out)."""
        if self.merged:
            return cast(torch.Tensor, self.base(x))
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        h = self.base(flat)  # (tokens, out)
        if self.dropout and self.training:
            flat = functional.dropout(flat, self.dropout)
        right = self.lora_A * (self.lora_E * self.scale)  # (r, in): scaling r rows costs less than scaling the output
        if h.dtype == right.dtype or torch.is_autocast_enabled(h.device.type):
            h = torch.addmm(h, functional.linear(flat, right), self.lora_B.t())
        else:  # a half-precision base under wider factors: the sum is rounded once
            thin = functional.linear(flat.to(right.dtype), right)  # (tokens, r)
            h = torch.addmm(h.to(thin.dtype), thin, self.lora_B.t()).to(h.dtype)
        return h.view(*x.shape[:-1], h.shape[-1])

    def delta_weight(self) -> torch.Tensor:
        """γPΛQ, (out, in)."""
        return (self.lora_B @ (self.lora_A * (self.lora_E * self.scale))).detach()

    def merge(self) -> None:
        """Exchange the base's weight for W + γPΛQ."""
        update = self.delta_weight()
        self._swap.put(self.base, update.t() if is_conv1d(self.base) else update)

    def unmerge(self) -> None:
        """Put the weight back, bit for bit."""
        self._swap.restore(self.base)

    def penalty(self) -> torch.Tensor:
        """‖PᵀP − I‖_F² + ‖QQᵀ − I‖_F² ([1]_, eq. 4)."""
        one = torch.eye(len(self.lora_E), device=self.lora_E.device, dtype=self.lora_E.dtype)
        left = self.lora_B.t() @ self.lora_B - one
        right = self.lora_A @ self.lora_A.t() - one
        return left.square().sum() + right.square().sum()

    def prune(self, keep: torch.Tensor) -> None:
        """Set λ to zero where `keep`, bool of shape (r,), is false."""
        with torch.no_grad():
            self.lora_E.masked_fill_(~keep.reshape(-1, 1), 0.0)

    def pattern(self) -> list[bool]:
        """Which triplets of the start `state` holds, as PEFT's ``rank_pattern`` lists them."""
        kept = [bool(k) for k in self.kept.tolist()]
        return kept + [False] * (self.start_rank - len(kept))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Q, Λ and P."""
        yield from (self.lora_A, self.lora_E, self.lora_B)

    def state(self) -> dict[str, torch.Tensor]:
        """Q, Λ and P by PEFT's names; once the budget is final without the triplets that it left out."""
        tensors = {"lora_A": self.lora_A[self.kept], "lora_E": self.lora_E[self.kept]}
        return {name: tensor.detach() for name, tensor in {**tensors, "lora_B": self.lora_B[:, self.kept]}.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take Q, Λ and P of the start's rank or of any below it, as pruning left them.

        A lower rank replaces the parameters: an optimizer must be made after it.

        Raises
        ------
        MismatchError
            If a tensor is missing, foreign or misshapen.
        """
        part = f"AdaLoRA that starts at rank {self.start_rank}"
        rank = tensors["lora_E"].shape[0] if "lora_E" in tensors and tensors["lora_E"].dim() else self.start_rank
        if rank > self.start_rank:
            raise MismatchError(f"{part} was given {rank} triplets; set init_rank to what the adapter began with")
        fresh = {
            "lora_A": self.lora_A.new_empty(rank, self.lora_A.shape[1]),
            "lora_E": self.lora_E.new_empty(rank, 1),
            "lora_B": self.lora_B.new_empty(self.lora_B.shape[0], rank),
        }
        take(fresh, tensors, part=part)
        with torch.no_grad():
            for name, tensor in fresh.items():
                old = getattr(self, name)
                if old.shape == tensor.shape:
                    old.copy_(tensor)
                else:
                    setattr(self, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
        self.kept = torch.ones(rank, dtype=torch.bool, device=self.lora_E.device)
