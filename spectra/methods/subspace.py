r"""Training in a subspace: all parameters are θ₀ + P θ_d, and only the d numbers θ_d are trained.

A parameter that moves becomes a buffer of the same name, which every forward pass fills with θ₀ + P θ_d; the gradient
that reaches it is pulled back to θ_d at once, so that no gradient of the model's size is ever kept.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.injection import is_conv1d
from spectra.methods.parts import take
from spectra.projections import PROJECTIONS, Projection, make_projection, moved, smallest_dimension
from spectra.projections.protocol import moved_all

if TYPE_CHECKING:
    from spectra.methods.injection import Injection

NAME = "spectra_subspace"
"""The module of the model that holds the coordinates."""

STRUCTURES = ("did", "said")


@dataclass(frozen=True)
class Subspace:
    r"""Random-subspace training: DID θ₀ + Pθ_d, or SAID θ₀ + λ_layer·Pθ_{d−m} with one trained λ for each of m layers.

    Parameters
    ----------
    dimension : int
        d: numbers that train, SAID's λ among them.
    projection : str
        A key of `spectra.projections.PROJECTIONS`.
    structure : {"did", "said"}
        Whether each layer has a trained scale.
    head : {"subspace", "free"}
        Whether a fresh head moves with the rest, or is trained whole beside the subspace; the trainer reads it.
    gradients : mapping of str to Tensor, optional
        By parameter name, for ``projection="gradient"``.
    seed : int, optional
        Of the projection; by default it is drawn from what `inject` was given.

    Raises
    ------
    UsageError
        If a field is out of its range.

    Notes
    -----
    The learning rate is full fine-tuning's: coordinates take √(D/d) times it, since columns of P have norm 1 and d of
    them then move the D parameters as far in a step as Adam would move them one by one. SAID's scales take the same
    rate, as in [2]_, where one optimizer moves both: .4 a step at d = 128 of MiniLM's 22.7 million, so that they, too,
    decide how far a layer moves. It is what SAID gains by: on subjectivity (d = 128, one seed, 100 steps) accuracy was
    .852 with it, .809 at 10 and .805 at 1 times full's rate; DID reached .798.

    References
    ----------
    .. [1] C. Li, H. Farkhoor, R. Liu and J. Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes",
       ICLR 2018, equation 2.
    .. [2] A. Aghajanyan, L. Zettlemoyer and S. Gupta, "Intrinsic Dimensionality Explains the Effectiveness of Language
       Model Fine-Tuning", ACL 2021, equations 2 and 3.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> inject(model, "", Subspace(dimension=5))
    random subspace at 2 modules matching '', 1 of another kind ignored: 5 of 48 parameters train (10.42%)
    >>> model(torch.zeros(2, 6)).sum().backward()
    >>> tuple(model.spectra_subspace.coordinates.grad.shape)
    (5,)
    """

    name: ClassVar[str] = "random subspace"
    peft_type: ClassVar[str | None] = None

    dimension: int = 1024
    projection: str = "fastfood"
    structure: str = "did"
    head: str = "subspace"
    gradients: Mapping[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        if type(self.dimension) is not int or self.dimension < 1:
            raise UsageError(f"dimension = {self.dimension!r} must be an integer of at least 1")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise UsageError(f"seed = {self.seed!r} must be an integer of at least 0")
        known = {"projection": tuple(PROJECTIONS), "structure": STRUCTURES, "head": ("subspace", "free")}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} = {getattr(self, name)!r} is none of {', '.join(choices)}")

    def accepts(self, module: nn.Module) -> bool:
        """Every module with parameters of its own, but recurrent ones, whose second list of them would not move."""
        own = list(module.parameters(recurse=False))
        return any(parameter.is_floating_point() for parameter in own) and not isinstance(module, nn.RNNBase)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Make every named module's parameters move with the coordinates; see `Method.attach`."""
        places: dict[nn.Parameter, list[tuple[str, str]]] = {}  # a tied weight is one piece with several places
        named = set(names)
        others = [name for name, _ in model.named_modules() if name not in named]
        for name in (*names, *others):
            for key, parameter in model.get_submodule(name)._parameters.items():
                # A module that is not named moves with what it shares, and with nothing else.
                if parameter is not None and parameter.is_floating_point() and (name in named or parameter in places):
                    places.setdefault(parameter, []).append((name, key))
        drawn = int(torch.randint(2**53, (), generator=generator))  # JSON's numbers are exact so far
        seed = drawn if self.seed is None else self.seed
        core = SubspaceCore(model, list(places), list(places.values()), self, seed)
        setattr(model, NAME, core)
        core.enter()
        return {name: SubspacePart(core, name, model.get_submodule(name)) for name in names}

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any]) -> Subspace:
        """The method that `peft_config` describes. Raises `KeyError` or `UsageError`: there is no adapter then."""
        if not isinstance(config["seed"], int):
            raise UsageError(f"seed = {config['seed']!r}: P is drawn from a whole number")
        return cls(**{name: config[name] for name in ("dimension", "projection", "structure", "head", "seed")})

    def peft_config(self, injection: Injection) -> dict[str, Any]:
        """PEFT has no type for it: modules, settings, and the seed that P is drawn from.

        Raises
        ------
        UsageError
            If P is made from gradients: no seed gives it back.
        """
        if self.gradients is not None:
            raise UsageError("a subspace made from gradients cannot be saved as a seed: merge it and save the model")
        (core,) = {part.core for part in injection.parts.values() if isinstance(part, SubspacePart)}
        return {
            "peft_type": self.peft_type,
            "target_modules": list(injection.parts),
            "dimension": self.dimension,
            "projection": self.projection,
            "structure": self.structure,
            "head": self.head,
            "seed": core.seed,
            "moved_parameters": core.total,
        }


class SubspaceCore(nn.Module):
    """The coordinates of a model, where its parameters started, and the projection between.

    Parameters
    ----------
    model : Module
        Whose forward pass is preceded by `install`.
    tensors : list of Parameter
        That move.
    places : list of list of (str, str)
        Module and attribute names of each.
    method : Subspace
        How.
    seed : int
        Of the projection.

    Attributes
    ----------
    coordinates : Parameter of shape (d,), or (d − m,) for SAID
        θ_d, zero at the start; float32, or float64 where the model is.
    scales : Parameter of shape (m,) or None
        SAID's λ, one at the start.
    layers : tuple of str
        Their layers.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: list[nn.Parameter],
        places: list[list[tuple[str, str]]],
        method: Subspace,
        seed: int,
    ) -> None:
        super().__init__()
        self.method, self.seed, self.places = method, seed, places
        self._owner = (model,)  # in a tuple, so that it is no submodule
        layers = [layer_of(at[0][0]) for at in places]
        self.layers = tuple(dict.fromkeys(layers)) if method.structure == "said" else ()
        self._layer = [self.layers.index(layer) for layer in layers] if self.layers else []
        shapes = [tuple(tensor.shape) for tensor in tensors]
        self.total = sum(math.prod(shape) for shape in shapes)
        moving = self._moving(shapes)
        self.projection: Projection = make_projection(
            method.projection, shapes, dimension=moving, seed=seed, gradients=self._gradients()
        )
        wide = torch.promote_types(torch.float32, max((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize))
        device = tensors[0].device
        self.coordinates = nn.Parameter(torch.zeros(moving, dtype=wide, device=device))
        self.scales = nn.Parameter(torch.ones(len(self.layers), dtype=wide, device=device)) if self.layers else None
        for piece, tensor in enumerate(tensors):
            self.register_buffer(f"start_{piece}", tensor.detach(), persistent=False)
        self.merged = True  # parameters stand in the model until `enter`
        self._filled: list[torch.Tensor] | None = None  # what the buffers were last filled from without a graph
        model.register_forward_pre_hook(self._before_forward)  # a bound method, which a copy of the model copies

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """√(D/d) for all that trains; see `Subspace`."""
        factor = math.sqrt(self.total / self.method.dimension)
        return {name: factor for name, _ in self.named_parameters()}

    @property
    def held(self) -> int:
        """Scalars of the model that stand in buffers while they move."""
        return self.total

    def start(self, piece: int) -> torch.Tensor:
        """θ₀ of one piece."""
        found: torch.Tensor = getattr(self, f"start_{piece}")
        return found

    def weight(self, piece: int) -> torch.Tensor:
        """θ₀ + λ·Pθ_d of one piece, differentiable."""
        return moved(self.start(piece), self._wide(), self._scale(piece), self.projection, piece)

    def weights(self) -> list[torch.Tensor]:
        """`weight` of every piece, made together."""
        pieces = range(len(self.places))
        return moved_all(
            [self.start(piece) for piece in pieces],
            self._wide(),
            [self._scale(piece) for piece in pieces],
            self.projection,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What it is given: a Sequential calls every module that it holds, and it may hold this one."""
        return x

    def install(self) -> None:
        """Fill the model's buffers from the coordinates; a call of the model does so by itself.

        Without gradients they are filled once for each value of the coordinates.
        """
        if self.merged:
            return
        graph = torch.is_grad_enabled()
        now = [parameter.detach() for parameter in self.parameters()]
        if not graph and self._filled is not None and all(map(_same, now, self._filled)):
            return
        for value, places in zip(self.weights(), self.places, strict=True):
            for name, key in places:
                self._module(name)._buffers[key] = value
        self._filled = None if graph else [parameter.clone() for parameter in now]

    def enter(self) -> None:
        """Put buffers in the places of the parameters; what those hold is forgotten, the start is kept here."""
        if not self.merged:
            return
        for piece, places in enumerate(self.places):
            for name, key in places:
                module = self._module(name)
                del module._parameters[key]
                module.register_buffer(key, self.start(piece))
        self.merged, self._filled = False, None
        with torch.no_grad():
            self.install()

    def leave(self) -> None:
        """Put parameters that hold θ₀ + λ·Pθ_d in the places of the buffers, frozen."""
        if self.merged:
            return
        for piece, places in enumerate(self.places):
            with torch.no_grad():
                parameter = nn.Parameter(self.weight(piece), requires_grad=False)
            for name, key in places:
                module = self._module(name)
                del module._buffers[key]
                module.register_parameter(key, parameter)
        self.merged = True

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model as it would be had its parameters been trained themselves, for the time of a block."""
        (model,) = self._owner
        was_merged = self.merged
        self.leave()
        delattr(model, NAME)
        try:
            yield
        finally:
            setattr(model, NAME, self)
            if not was_merged:
                self.enter()

    def state(self) -> dict[str, torch.Tensor]:
        """The numbers that trained: ``coordinates``, and ``scales`` for SAID."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        self.install()

    def __deepcopy__(self, memo: dict[int, Any]) -> SubspaceCore:
        """Torch copies no tensor that carries a graph, and the buffers do between two passes: they leave it first.

        The model's hook is copied before its modules, so the core is copied before the buffers are.
        """
        for places in self.places:
            for name, key in places if not self.merged else ():
                buffers = self._module(name)._buffers
                buffers[key] = buffers[key].detach()  # type: ignore[union-attr]  # filled since `enter`
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def _wide(self) -> torch.Tensor:
        """Coordinates as P takes them: a model may be cast after it was injected."""
        return self.coordinates.to(torch.promote_types(torch.float32, self.coordinates.dtype))

    def _scale(self, piece: int) -> torch.Tensor | None:
        return None if self.scales is None else self.scales[self._layer[piece]]

    def _module(self, name: str) -> nn.Module:
        return self._owner[0].get_submodule(name)

    def _moving(self, shapes: list[tuple[int, ...]]) -> int:
        """Coordinates beside SAID's scales; raises `UsageError` where d is too small or above D."""
        d, m = self.method.dimension, len(self.layers)
        least = smallest_dimension(self.method.projection, shapes) + m
        if d < least:
            why = f"{m} layers' scales" if m else "one number a matrix"
            raise UsageError(f"dimension = {d}: {self.method.projection} needs at least {least} here, {why} among them")
        if d > self.total:
            raise UsageError(f"dimension = {d:,} is above the {self.total:,} parameters themselves: nothing is reduced")
        return d - m

    def _gradients(self) -> dict[int, torch.Tensor] | None:
        given = self.method.gradients
        if given is None:
            return None
        by_piece = {}
        for piece, places in enumerate(self.places):
            for name, key in places:
                if (found := given.get(f"{name}.{key}" if name else key)) is not None:
                    by_piece[piece] = found
        return by_piece


class SubspacePart(nn.Module):
    """What one module's parameters have moved by; merging is of the whole model at once."""

    def __init__(self, core: SubspaceCore, name: str, module: nn.Module) -> None:
        super().__init__()
        self._core = (core,)  # in tuples, so that they are no submodules
        self._holder = (module,)
        self._first = core.places[0][0][0] == name
        self._pieces = {key: piece for piece, places in enumerate(core.places) for at, key in places if at == name}

    @property
    def core(self) -> SubspaceCore:
        """The model's coordinates."""
        return self._core[0]

    @property
    def merged(self) -> bool:
        """Whether parameters stand in the model in place of buffers that move."""
        return self.core.merged

    def delta_weight(self) -> torch.Tensor:
        """λ·Pθ_d of ``weight``, or of the largest parameter where none is called so; Conv1D's turned to (out, in)."""
        deltas = self.deltas()
        if "weight" not in deltas:
            return max(deltas.values(), key=torch.Tensor.numel)
        return deltas["weight"].t() if is_conv1d(self._holder[0]) else deltas["weight"]

    @torch.no_grad()
    def deltas(self) -> dict[str, torch.Tensor]:
        """What every parameter moved by."""
        return {key: self.core.weight(piece) - self.core.start(piece) for key, piece in self._pieces.items()}

    def merge(self) -> None:
        """Put parameters in the places of the buffers, in the whole model."""
        self.core.leave()

    def unmerge(self) -> None:
        """Put the buffers back, in the whole model."""
        self.core.enter()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The model's coordinates, the same for every module."""
        yield from self.core.parameters()

    def state(self) -> dict[str, torch.Tensor]:
        """The model's coordinates at its first module, nothing at the others."""
        return self.core.state() if self._first else {}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the coordinates. Raises `MismatchError`."""
        take(self.state(), tensors, part="subspace")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def layer_of(name: str) -> str:
    """The layer that a module belongs to: up to its number, or the first two of its names.

    Examples
    --------
    >>> layer_of("bert.encoder.layer.3.attention.self.query"), layer_of("bert.embeddings.word_embeddings")
    ('bert.encoder.layer.3', 'bert.embeddings')
    """
    numbered = re.match(r"(.*?\.\d+)(\.|$)", name)
    return numbered.group(1) if numbered else ".".join(name.split(".")[:2])
