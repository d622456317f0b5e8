"""One adapter on one layer: everything about it but the values of A and B."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from lora_inject.kinds.base import Kind, Spec, Way
from lora_inject.settings import Settings

DEFAULT_ADAPTER = "default"


def parameter_names(spec: Spec, adapter: str) -> tuple[str, str]:
    """The names of A and B: loralib's for the default adapter, others add their own name."""
    suffix = "" if adapter == DEFAULT_ADAPTER else f"_{adapter}"
    return f"{spec.prefix}lora_A{suffix}", f"{spec.prefix}lora_B{suffix}"


class Term(NamedTuple):
    """One summand of what an adapted layer computes: ``scaling * B A`` of one pair.

    Attributes:
        kind: the kind of layer, with its arithmetic.
        spec: the pair.
        A: the name of the parameter A.
        B: the name of the parameter B.
        scaling: alpha / r, times the weight with which the adapter is in use.
        dropout: the probability in training mode.
        adapter: the adapter's name.
        part: the first feature of the output that it adds to and their number; None for all.
    """

    kind: Kind
    spec: Spec
    A: str
    B: str
    scaling: float
    dropout: float
    adapter: str
    part: tuple[int, int] | None


@dataclass(frozen=True)
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
        pairs: each pair's spec with the names of its A and B.
        parameters: the names of all of its parameters.
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
    pairs: tuple[tuple[Spec, str, str], ...] = field(init=False)
    parameters: tuple[str, ...] = field(init=False)
    terms: tuple[Term, ...] = field(init=False)

    def __post_init__(self) -> None:
        pairs = _named_pairs(self.specs, self.name)
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "parameters", tuple(n for _, *names in pairs for n in names))
        object.__setattr__(self, "terms", self.weighted_terms(1.0))

    def weighted_terms(self, weight: float) -> tuple[Term, ...]:
        """What it adds when it is in use with this weight."""
        return _terms(self.kind, self.specs, self.settings, self.name, weight)


# Very many layers are alike, and these are values: layers that are share them.


@lru_cache
def _named_pairs(specs: tuple[Spec, ...], adapter: str) -> tuple[tuple[Spec, str, str], ...]:
    return tuple((spec, *parameter_names(spec, adapter)) for spec in specs)


@lru_cache
def _terms(
    kind: Kind, specs: tuple[Spec, ...], settings: Settings, adapter: str, weight: float
) -> tuple[Term, ...]:
    return tuple(
        Term(
            kind,
            spec,
            A,
            B,
            settings.scaling * weight,
            settings.dropout,
            adapter,
            (spec.start, spec.n_out) if spec.part else None,
        )
        for spec, A, B in _named_pairs(specs, adapter)
    )
