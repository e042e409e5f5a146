"""`inject`: put a method into any torch model, by a pattern on module names, and say what matched."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.protocol import Method, TrainingHooks, WeightMethod


@dataclass(eq=False)
class Injection:
    """What `inject` did to a model, and the handle to undo it.

    Parameters
    ----------
    model : Module
        The model, changed in place.
    method : Method
        What was put in.
    pattern : str
        Where: the regular expression that was searched in module names.
    parts : dict of str to Module
        What was put at each module, by the module's name before.
    also : tuple of str
        Modules trained whole beside the method, a classifier's head for instance.
    ignored : tuple of str
        Modules whose name matched but whose kind the method has no part for.
    hooks : TrainingHooks or None
        What the method adds to training.
    """

    model: nn.Module
    method: Method
    pattern: str
    parts: dict[str, nn.Module]
    also: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    hooks: TrainingHooks | None = field(default=None)

    @property
    def matched(self) -> int:
        """Number of modules that carry a part."""
        return len(self.parts)

    @property
    def trainable(self) -> int:
        """Number of scalars that training changes, the modules trained whole included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def total(self) -> int:
        """Number of scalars in the model, the method's own included; weights in codes or buffers count by entries."""
        bases: list[Any] = [getattr(part, "base", None) for part in self.parts.values()]
        coded = [base for base in bases if base is not None and not isinstance(base.weight, nn.Parameter)]
        held = sum(p.numel() for p in self.model.parameters())
        for module in self.model.modules():
            moving = getattr(module, "held", 0)
            held += moving if isinstance(moving, int) else 0
        return held + sum(int(base.in_features * base.out_features) for base in coded)

    def weight_parts(self) -> dict[str, WeightMethod]:
        """Parts that change a weight by a matrix."""
        return {name: part for name, part in self.parts.items() if isinstance(part, WeightMethod)}

    def merge(self) -> None:
        """Merge every part into the weights.

        Raises
        ------
        UsageError
            If the method acts on activations and has nothing to merge.
        """
        if len(self.weight_parts()) < len(self.parts):
            raise UsageError(f"{self.method.name} acts on activations; there is no weight it could be merged into")
        for part in self.weight_parts().values():
            part.merge()

    def unmerge(self) -> None:
        """Put back every weight as it was before `merge`, bit for bit."""
        for part in self.weight_parts().values():
            part.unmerge()

    def __repr__(self) -> str:
        ignored = f", {len(self.ignored)} of another kind ignored" if self.ignored else ""
        also = f", {', '.join(self.also)} trained whole" if self.also else ""
        return (
            f"{self.method.name} at {self.matched} modules matching {self.pattern!r}{ignored}{also}: "
            f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / max(1, self.total):.2%})"
        )


def inject(model: nn.Module, pattern: str, method: Method, *, also: str | None = None, seed: int = 0) -> Injection:
    r"""Freeze a model and put a method's parts at every module that a pattern matches.

    Parameters
    ----------
    model : Module
        Any torch model; it is changed in place.
    pattern : str
        Regular expression searched in module names (``r"\.(query|value)$"``).
    method : Method
        ``LoRA(rank=8)``, for instance.
    also : str, optional
        Regular expression of modules to train whole beside it, a fresh classifier's head for instance.
    seed : int
        Seed of the parts' random starts.

    Returns
    -------
    Injection

    Raises
    ------
    UsageError
        If a pattern is malformed or matches nothing the method accepts, or the model carries parts already.
    """
    if injections(model):
        raise UsageError(f"the model carries {injections(model)[0]!r} already; start from a fresh one")
    named = {name: module for name, module in model.named_modules() if name}
    found = _matching(named, pattern)
    fit = [name for name in found if method.accepts(named[name])]
    if not fit:
        raise UsageError(_nothing_matched(named, pattern, found, method))
    whole = _outermost(_matching(named, also)) if also else []
    if also and not whole:
        raise UsageError(f"also = {also!r} matches no module; {_some(list(named))}")
    ignored = tuple(name for name in found if name not in set(fit))
    fit = [name for name in fit if not any(name == w or name.startswith(w + ".") for w in whole)]
    if not fit:
        raise UsageError(f"every module that {pattern!r} matches is trained whole by also = {also!r}")
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        parts = method.attach(model, fit, torch.Generator().manual_seed(seed))
    except UsageError:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    for name in whole:
        for parameter in named[name].parameters():
            parameter.requires_grad_(True)
    injection = Injection(model, method, pattern, parts, tuple(whole), ignored)
    make_hooks = getattr(method, "hooks", None)
    if make_hooks is not None:
        injection.hooks = make_hooks(injection)
    model.spectra_injections = [injection]  # type: ignore[assignment]  # a plain attribute: copies keep it consistent
    return injection


def injections(model: nn.Module) -> list[Injection]:
    """What was injected into a model, by `inject`."""
    return list(getattr(model, "spectra_injections", []))


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a named one, and the attribute it holds it by."""
    path, _, attribute = name.rpartition(".")
    return (model.get_submodule(path) if path else model), attribute


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of a named one."""
    holder, attribute = parent_of(model, name)
    setattr(holder, attribute, module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear map that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: torch's Linear, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)  # for the type checker: `is_linear` modules hold one
    rows, cols = weight.shape
    return (int(cols), int(rows)) if is_conv1d(module) else (int(rows), int(cols))


def _matching(named: dict[str, nn.Module], pattern: str) -> list[str]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"not a regular expression: {pattern!r}: {error}") from error
    return [name for name in named if wanted.search(name)]


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(other + ".") for other in names)]


def _nothing_matched(named: dict[str, nn.Module], pattern: str, found: list[str], method: Method) -> str:
    if found:
        kinds = sorted({type(named[name]).__name__ for name in found})
        return f"{pattern!r} matches {len(found)} modules ({', '.join(kinds)}), none of a kind {method.name} accepts"
    fit = [name for name, module in named.items() if method.accepts(module)]
    return f"{pattern!r} matches no module; {_some(fit)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"the model has {shown or 'none of a fitting kind'}" + (
        f" and {len(names) - 6} more" if len(names) > 6 else ""
    )
