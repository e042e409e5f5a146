"""Search for GLoRA's structure, module by module: train a supernet of all structures, then evolve the best in it.

1. *Supernet*: one set of support tensors a module, from which every structure takes its part; each training step runs
   a structure drawn at random for each module (Chavan et al. [1]_, section 3; the scheme is Guo et al.'s [2]_).
2. *Evolution*: structures for all modules together, scored as the trained supernet runs them, with no training of their
   own; the best are mutated and crossed, generation by generation, within limits on the number of parameters.
3. *Narrowing*: the winner's tensors are cut out of the supernet; it may be trained on, saved and merged as any GLoRA.

References
----------
.. [1] A. Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv:2306.07967, 2023.
.. [2] Z. Guo et al., "Single Path One-Shot Neural Architecture Search with Uniform Sampling", ECCV 2020.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias, cast

import torch
from torch import nn

from spectra.errors import UsageError
from spectra.methods.glora import CHOICES, GLoRA, GLoRALinear, Structure, check_rank
from spectra.methods.injection import Injection, features, is_linear, replace_module

if TYPE_CHECKING:
    from spectra.methods.protocol import TrainingHooks

Genes: TypeAlias = Mapping[str, Structure]
"""A structure for each module, by its name."""

# A generation gives up on candidates that are new and within the limits after this many draws for each one wanted, the
# authors' figure.
_DRAWS = 10


@dataclass(frozen=True)
class SearchSpace:
    """Structures that a search may choose from: any combination of these.

    Parameters
    ----------
    a, b, c, d, e : tuple of str
        Kinds of each support tensor, among those of `Structure`; all of them by default.
    ranks : tuple of int
        Ranks of the products.

    Examples
    --------
    >>> space = SearchSpace(a=("none",), c=("none",), d=("none", "vector"), ranks=(2, 4))
    >>> str(space.largest()), len(space)
    ('none/lora/none/vector/vector@4', 48)
    """

    a: tuple[str, ...] = CHOICES["a"]
    b: tuple[str, ...] = CHOICES["b"]
    c: tuple[str, ...] = CHOICES["c"]
    d: tuple[str, ...] = CHOICES["d"]
    e: tuple[str, ...] = CHOICES["e"]
    ranks: tuple[int, ...] = (4,)

    def __post_init__(self) -> None:
        for letter, kinds in self._kinds().items():
            if not kinds:
                raise UsageError(f"the search space leaves no kind for {letter}")
            foreign = [kind for kind in kinds if kind not in CHOICES[letter]]
            if foreign:
                raise UsageError(f"GLoRA's {letter} is one of {', '.join(CHOICES[letter])}, not {foreign[0]!r}")
        if not self.ranks or min(self.ranks) < 1:
            raise UsageError(f"the search space's ranks are 1 at least, not {self.ranks}")

    def __len__(self) -> int:
        """Number of combinations for one module; those without a product are counted once a rank."""
        count = len(self.ranks)
        for kinds in self._kinds().values():
            count *= len(kinds)
        return count

    def largest(self) -> Structure:
        """The structure whose tensors hold every other's as leading rows and columns."""
        widest = {letter: min(kinds, key=CHOICES[letter].index) for letter, kinds in self._kinds().items()}
        return Structure(**widest, rank=max(self.ranks))

    def draw(self, source: random.Random) -> Structure:
        """One of the structures, uniformly."""
        kinds = {letter: source.choice(choices) for letter, choices in self._kinds().items()}
        return Structure(**kinds, rank=source.choice(self.ranks))

    def mutated(self, structure: Structure, rate: float, source: random.Random) -> Structure:
        """Each field drawn anew with a probability."""
        fresh = self.draw(source)
        return Structure(**{name: getattr(fresh if source.random() < rate else structure, name) for name in _FIELDS})

    def _kinds(self) -> dict[str, tuple[str, ...]]:
        return {letter: getattr(self, letter) for letter in CHOICES}


_FIELDS = (*CHOICES, "rank")


@dataclass(frozen=True)
class GLoRASupernet:
    """All structures of a space in one set of support tensors a module; training runs a random one each step.

    Parameters
    ----------
    space : SearchSpace
        The structures.
    seed : int
        Of the draws: step and seed give the structures, so that a resumed run draws as an uninterrupted one.

    Examples
    --------
    >>> from spectra.methods import inject
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> supernet = inject(model, ".", GLoRASupernet(SearchSpace(ranks=(1, 2))))
    >>> found = search(supernet, lambda: 0.0, population=4, generations=1, parents=2, limit=12)
    >>> narrow(supernet, found.genes).trainable <= 12
    True
    """

    name: ClassVar[str] = "GLoRA supernet"
    peft_type: ClassVar[str | None] = None

    space: SearchSpace = SearchSpace()
    seed: int = 0

    def accepts(self, module: nn.Module) -> bool:
        """Linear, and transformers' Conv1D."""
        return is_linear(module)

    def attach(self, model: nn.Module, names: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
        """Wrap every named module; see `Method.attach`. Raises `UsageError` for a rank above min(out, in)."""
        largest = self.space.largest()
        modules = {name: model.get_submodule(name) for name in names}
        for name, module in modules.items():
            check_rank(name, module, largest)
        parts: dict[str, nn.Module] = {}
        for name, module in modules.items():
            parts[name] = GLoRALinear(module, largest, generator)
            replace_module(model, name, parts[name])
        return parts

    def hooks(self, injection: Injection) -> TrainingHooks:
        """A new structure for every module before each step."""
        return SupernetHooks(self, _parts(injection))

    def peft_config(self, injection: Injection) -> NoReturn:
        """Refused: a supernet is a stage of the search.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError("a GLoRA supernet is not an adapter: `search` in it, `narrow` it to what was found, then save")


class SupernetHooks:
    """Draws the structures of the next step.

    Parameters
    ----------
    method : GLoRASupernet
        Space and seed.
    parts : dict of str to GLoRALinear
        What was injected, by module name.
    """

    def __init__(self, method: GLoRASupernet, parts: dict[str, GLoRALinear]) -> None:
        self.method = method
        self.parts = parts
        self._draw(0)

    def penalty(self) -> torch.Tensor | None:
        """None: GLoRA adds nothing to the loss."""
        return None

    def on_gradients(self, step: int, total: int) -> None:
        """Nothing happens between backward pass and step."""

    def after_step(self, step: int, total: int) -> None:
        """Draw the structures of the step to come."""
        self._draw(step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Number of the step to come, which with the seed gives its structures."""
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._draw(state["next"])

    def _draw(self, step: int) -> None:
        self._next = step
        source = random.Random(f"{self.method.seed}/{step}")
        for part in self.parts.values():
            part.structure = self.method.space.draw(source)


@dataclass(frozen=True)
class Found:
    """Outcome of a search.

    Attributes
    ----------
    genes : dict of str to Structure
        The best structures.
    score : float
        What they scored.
    parameters : int
        Scalars that they train.
    best : tuple of float
        Best score so far, at the start and after each generation.
    tried : int
        Number of candidates that were scored.
    """

    genes: dict[str, Structure]
    score: float
    parameters: int
    best: tuple[float, ...]
    tried: int


def search(
    supernet: Injection,
    evaluate: Callable[[], float],
    *,
    population: int = 50,
    generations: int = 20,
    parents: int = 10,
    mutation_rate: float = 0.2,
    limit: int | None = None,
    least: int = 0,
    seed: int = 0,
) -> Found:
    """Evolve structures in a trained supernet; the defaults are the authors'.

    Parameters
    ----------
    supernet : Injection
        What `inject(model, …, GLoRASupernet(…))` gave, after training. It is left with the structures found.
    evaluate : callable
        Score of the model as it stands, higher is better: a validation accuracy, for instance. It is called once for
        each candidate.
    population : int
        Candidates of the first generation, and of every later one: half mutated, half crossed.
    generations : int
        Generations after the first.
    parents : int
        The best so far that the next generation comes from.
    mutation_rate : float
        Probability with which a mutation draws a field anew.
    limit, least : int
        Most and fewest scalars that the structures may train.
    seed : int
        Of every draw.

    Returns
    -------
    Found

    Raises
    ------
    UsageError
        If the injection is no supernet, a number is out of range, or no structures are within the limits.
    """
    parts = _parts(supernet)
    method = supernet.method
    if not isinstance(method, GLoRASupernet):
        raise UsageError(f"structures are searched in a GLoRA supernet; the model carries {method.name}")

    def score(genes: Genes) -> float:
        _express(parts, genes)
        return float(evaluate())

    def cost(genes: Genes) -> int:
        return sum(
            genes[name].parameters(*features(part.base), bias=part.plain_bias is not None)
            for name, part in parts.items()
        )

    sizes = (population, generations, parents, mutation_rate)
    found = evolve(list(parts), method.space, score, cost, *sizes, limit=limit, least=least, seed=seed)
    _express(parts, found.genes)
    return found


def evolve(
    names: Sequence[str],
    space: SearchSpace,
    score: Callable[[Genes], float],
    cost: Callable[[Genes], int],
    population: int,
    generations: int,
    parents: int,
    mutation_rate: float,
    *,
    limit: int | None = None,
    least: int = 0,
    seed: int = 0,
) -> Found:
    """Evolve structures by any score; `search` is this on a model.

    Examples
    --------
    >>> def vectors(genes):
    ...     return sum(structure.b == "vector" for structure in genes.values())
    >>> evolve(["p", "q"], SearchSpace(), vectors, lambda genes: 0, 20, 5, 5, 0.2).score
    2.0
    """
    if min(population, parents) < 1 or generations < 0 or not 0.0 <= mutation_rate <= 1.0:
        raise UsageError(
            f"a search needs population = {population} and parents = {parents} of 1 at least, generations = "
            f"{generations} of 0 at least, and mutation_rate = {mutation_rate} in [0, 1]"
        )
    source = random.Random(seed)
    seen: set[tuple[Structure, ...]] = set()
    ranked: list[tuple[float, tuple[Structure, ...]]] = []

    def alike(genes: Sequence[Structure]) -> dict[str, Structure]:
        return dict(zip(names, genes, strict=True))

    def try_new(wanted: int, make: Callable[[], tuple[Structure, ...]]) -> None:
        made: list[tuple[float, tuple[Structure, ...]]] = []
        for _ in range(_DRAWS * wanted):
            genes = make()
            within = genes not in seen and least <= cost(alike(genes)) <= (limit if limit is not None else 1 << 62)
            seen.add(genes)
            if within:
                made.append((float(score(alike(genes))), genes))
            if len(made) == wanted:
                break
        ranked.extend(made)
        ranked.sort(key=lambda pair: -pair[0])  # stable: of equal scores the earlier leads

    def chance() -> tuple[Structure, ...]:
        return tuple(space.draw(source) for _ in names)

    def mutant() -> tuple[Structure, ...]:
        return tuple(space.mutated(gene, mutation_rate, source) for gene in source.choice(elders)[1])

    def child() -> tuple[Structure, ...]:
        pairs = zip(source.choice(elders)[1], source.choice(elders)[1], strict=True)
        return tuple(_crossed(mother, father, source) for mother, father in pairs)

    try_new(population, chance)
    if not ranked:
        raise UsageError(
            f"none of {_DRAWS * population} structures drawn at random trains between {least} and {limit} scalars; "
            "widen the limits or the search space"
        )
    best = [ranked[0][0]]
    for _ in range(generations):
        elders = ranked[:parents]
        try_new(population - population // 2, mutant)
        try_new(population // 2, child)
        best.append(ranked[0][0])
    top, genes = ranked[0]
    return Found(alike(genes), top, cost(alike(genes)), tuple(best), len(ranked))


def narrow(supernet: Injection, genes: Genes) -> Injection:
    """Cut structures out of a supernet, tensors and all: from here on it is plain GLoRA.

    Parameters
    ----------
    supernet : Injection
        What `inject` gave for a `GLoRASupernet`; its model is changed in place.
    genes : mapping of str to Structure
        A structure for each module.

    Returns
    -------
    Injection
        With `GLoRA(structures=genes)` as its method.
    """
    old = _parts(supernet)
    _express(old, genes)
    parts: dict[str, nn.Module] = {}
    for name, part in old.items():
        fresh = GLoRALinear(part.base, part.structure, torch.Generator())
        fresh.load_state(part.state())
        fresh.train(part.training)
        parts[name] = fresh
        replace_module(supernet.model, name, fresh)
    method = GLoRA(structures=dict(genes))
    injection = Injection(supernet.model, method, supernet.pattern, parts, supernet.also, supernet.ignored)
    supernet.model.spectra_injections = [injection]  # type: ignore[assignment]  # a plain attribute, as `inject` sets
    return injection


def _crossed(mother: Structure, father: Structure, source: random.Random) -> Structure:
    """Each field from either parent."""
    return Structure(**{name: getattr(source.choice((mother, father)), name) for name in _FIELDS})


def _express(parts: Mapping[str, GLoRALinear], genes: Genes) -> None:
    """Run these structures from now on."""
    for name, part in parts.items():
        part.structure = genes[name]


def _parts(injection: Injection) -> dict[str, GLoRALinear]:
    return cast("dict[str, GLoRALinear]", injection.parts)
