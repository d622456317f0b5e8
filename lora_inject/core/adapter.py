"""One adapter on one layer: everything about it but the values of A and B."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor, nn

from lora_inject.arithmetic.thinning import Drops
from lora_inject.kinds.base import Kind, Way
from lora_inject.settings import Settings
from lora_inject.variants import Change, Spec, Variant

DEFAULT_ADAPTER = "default"


def parameter_names(spec: Spec, adapter: str, variant: Variant) -> dict[str, str]:
    """The names of a pair's tensors by role, loralib's for the default adapter.

    Others add their own name: A and B of "fr" are ``lora_A_fr`` and ``lora_B_fr``.
    """
    suffix = "" if adapter == DEFAULT_ADAPTER else f"_{adapter}"
    return {role: f"{spec.prefix}lora_{role}{suffix}" for role in variant.shapes(spec)}


class Dropping(NamedTuple):
    """The names of the children of a layer that say with which probabilities an adapter drops.

    Attributes:
        input: of dropping entries of what A reads.
        rank: of leaving out a rank.
        module: of leaving out the adapter on the layer.
    """

    input: str
    rank: str
    module: str


def dropping_names(spec: Spec, adapter: str) -> Dropping:
    """The names for an adapter whose first pair is this one, made like those of A and B."""
    suffix = "" if adapter == DEFAULT_ADAPTER else f"_{adapter}"
    names = (f"{spec.prefix}lora_{what}dropout{suffix}" for what in ("", "rank_", "module_"))
    return Dropping(*names)


def dropouts_of(spec: Spec, adapter: str, settings: Settings) -> dict[str, float]:
    """The names of the children that an adapter needs, each with the probability asked for."""
    asked = (settings.dropout, *settings.drops)
    if not any(asked):  # as of nearly all, and very many layers are asked
        return {}
    return {name: p for name, p in zip(dropping_names(spec, adapter), asked, strict=True) if p}


class Pair(NamedTuple):
    """The tensors of an adapter on one weight.

    Attributes:
        spec: the weight, and the shapes.
        names: the names of the parameters by role: ``{"A": "lora_A", "B": "lora_B"}``.
    """

    spec: Spec
    names: Mapping[str, str]

    def tensors(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """The tensors of a layer by role."""
        return {role: layer.get_parameter(name) for role, name in self.names.items()}


class Term(NamedTuple):
    """One summand of what an adapted layer computes: the change that one pair makes.

    Attributes:
        kind: the kind of layer, with its arithmetic.
        spec: the pair.
        factor: the scaling times the weight with which the adapter is in use.
        dropout: the probability that was asked for; whether there is one.
        adapter: the adapter's name.
        part: the first feature of the output that it adds to and their number; None for all.
        names: the names of all tensors of the pair by role.
        scaling: alpha / r, or what the rule of scaling makes of them.
        variant: what the tensors are to the weight.
        plain: whether the change is ``B A`` alone.
        drops: what was asked to be left out for one call in training; None for nothing.
        finishes: whether it is made of the output with ``B A`` added: ``Variant.finish``.
        dropping: the names of the children that have the probabilities now.
    """

    kind: Kind
    spec: Spec
    factor: float
    dropout: float
    adapter: str
    part: tuple[int, int] | None
    names: Mapping[str, str]
    scaling: float
    variant: Variant
    plain: bool
    drops: Drops | None
    finishes: bool
    dropping: Dropping

    def change(
        self, tensors: Mapping[str, Tensor], factor: float | Tensor, dropout: float = 0.0
    ) -> Change:
        """The term with its values; those of a tied layer may stand the other way round."""
        if self.spec.swapped:
            tensors = self.variant.turned(tensors)
        return Change(self.spec, tensors, self.scaling, factor, dropout)


@dataclass  # not frozen, but never changed: there are very many, and each would take longer to make
class Adapter:
    """One adapter on one layer: everything about it but the values of A and B.

    Attributes:
        name: the adapter's name.
        settings: rank, alpha, dropout and scaling.
        kind: the kind of layer, with its arithmetic.
        way: whether it acts on the layer's output ("branch") or on its weight.
        specs: the pairs A, B.
        pattern: the target pattern that chose the layer, for reports.
        path: the target's path when it was adapted; with the seed it decides the starting values.
        seed: the seed of the call that made it.
        follows: the path of the tied target whose A and B it shares, or "".
        pairs: each pair's spec with the names of its tensors.
        parameters: the names of all of its parameters, and whether they train when it does.
        dropouts: the names of the layer's children for what it drops, each with the probability
            that was asked for.
        terms: what it adds when it is in use with a weight of 1.
    """

    name: str
    settings: Settings
    kind: Kind
    way: Way
    specs: tuple[Spec, ...]
    pattern: str
    path: str
    seed: int
    follows: str = ""
    pairs: tuple[Pair, ...] = field(init=False)
    parameters: Mapping[str, bool] = field(init=False)
    dropouts: Mapping[str, float] = field(init=False)
    terms: tuple[Term, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.pairs, self.parameters = names_of(self.specs, self.name, self.settings.variant)
        self.dropouts = dropouts_of(self.specs[0], self.name, self.settings)
        self.terms = self.weighted_terms(1.0)

    def weighted_terms(self, weight: float) -> tuple[Term, ...]:
        """What it adds when it is in use with this weight."""
        s = self.settings
        drops = s.drops if any(s.drops) else None
        return _terms(
            self.kind, self.specs, s.variant, s.scaling, s.dropout, drops, self.name, weight
        )


# Very many layers are alike, and these are values: layers that are alike share them. They outlive
# the layers, so that settings, whose start may hold what a model is made of, are no key.


@lru_cache
def names_of(
    specs: tuple[Spec, ...], adapter: str, variant: Variant
) -> tuple[tuple[Pair, ...], Mapping[str, bool]]:
    """The pairs of an adapter, and the names of its parameters with whether they may train."""
    pairs = tuple(Pair(spec, parameter_names(spec, adapter, variant)) for spec in specs)
    named = (item for pair in pairs for item in pair.names.items())
    return pairs, {name: variant.trains(role) for role, name in named}


@lru_cache
def _terms(
    kind: Kind, specs: tuple[Spec, ...], variant: Variant, scaling: float, dropout: float,
    drops: Drops | None, adapter: str, weight: float,
) -> tuple[Term, ...]:  # fmt: skip
    dropping = dropping_names(specs[0], adapter)
    return tuple(
        Term(
            kind=kind,
            spec=spec,
            factor=scaling * weight,
            dropout=dropout,
            adapter=adapter,
            part=(spec.start, spec.n_out) if spec.part else None,
            names=names,
            scaling=scaling,
            variant=variant,
            plain=variant.additive and not variant.offset,
            drops=drops,
            finishes=variant.finishes and not variant.offset and weight == 1.0,
            dropping=dropping,
        )
        for spec, names in names_of(specs, adapter, variant)[0]
    )
