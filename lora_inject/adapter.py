"""What is known of the adapters on one layer: each of them, and which of them run now."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_inject.kinds.base import STATE, Kind, Spec, Way
from lora_inject.settings import Settings

DEFAULT_ADAPTER = "default"
Scales = dict[str, tuple[float, Tensor]]  # by adapter: its scaling, and a tensor that holds it


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
        pairs = tuple((spec, *parameter_names(spec, self.name)) for spec in self.specs)
        object.__setattr__(self, "pairs", pairs)
        names = tuple(name for _, *names in pairs for name in names)
        object.__setattr__(self, "parameters", names)
        object.__setattr__(self, "terms", self.weighted_terms(1.0))

    def weighted_terms(self, weight: float) -> tuple[Term, ...]:
        """What it adds when it is in use with this weight."""
        s = self.settings
        parts = [(spec.start, spec.n_out) if spec.part else None for spec in self.specs]
        return tuple(
            Term(self.kind, spec, A, B, s.scaling * weight, s.dropout, self.name, part)
            for (spec, A, B), part in zip(self.pairs, parts, strict=True)
        )


@dataclass(eq=False)
class LayerState:
    """What is known of an adapted module; changed by ``layer.change`` alone.

    Attributes:
        base: the class it had before.
        adapters: its adapters.
        in_use: the names of the adapters that are in use, here or elsewhere, with their weights.
        disabled: whether nothing is to be added for a while.
        folded: the names of the adapters that are merged into its weights.
        former: the value that each merged weight had before, or None where it was not kept.
        rows: what computes one adapter for each row of a batch, in a block that asks for it.
        running: what is added now, in the way of a plain batch.
        scales: the scaling of each running adapter, as a number and as a tensor that holds it.
    """

    base: type[nn.Module]
    adapters: tuple[Adapter, ...] = ()
    in_use: dict[str, float] = field(default_factory=dict)
    disabled: bool = False
    folded: frozenset[str] = frozenset()
    former: dict[str, Tensor | None] = field(default_factory=dict)
    rows: Any = None
    running: tuple[Term, ...] = ()
    scales: Scales = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether what is in use decides what runs, and nothing else."""
        return not (self.disabled or self.folded or self.rows is not None)

    def update_running(self) -> None:
        """Work out what runs now; layers ask for it far more often than it changes."""
        asleep = self.disabled or self.rows is not None
        self.running = () if asleep else self.terms(self.adapters, without=self.folded)

    def terms(
        self, adapters: Iterable[Adapter], without: frozenset[str] = frozenset()
    ) -> tuple[Term, ...]:
        """What those of the adapters that are in use add, with their weights."""
        terms: tuple[Term, ...] = ()
        for adapter in adapters:
            weight = self.in_use.get(adapter.name)
            if weight is not None and adapter.name not in without:
                terms += adapter.terms if weight == 1.0 else adapter.weighted_terms(weight)
        return terms


def state_of(module: nn.Module) -> LayerState | None:
    """What is known of a module's adapters; None for one that was never adapted."""
    state: LayerState | None = module.__dict__.get(STATE)
    return state


def adapters_of(module: nn.Module) -> tuple[Adapter, ...]:
    """The adapters on a module, whether they run or not."""
    state = state_of(module)
    return state.adapters if state else ()


def is_merged(module: nn.Module) -> bool:
    """Whether an adapter is folded into a weight of the module."""
    state = state_of(module)
    return state is not None and bool(state.folded)
