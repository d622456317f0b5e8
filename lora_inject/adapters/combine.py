"""A new adapter out of several: their weighted sum, exactly, truncated, or by a merging rule.

Of each adapter i with weight w and scaling s, the rules see the matrices A and B:

    cat     the ranks side by side: exactly the sum of w s B A, of the summed rank
    svd     that sum, truncated to rank r by a singular value decomposition (best in its norm)
    linear  A = sum of sign(w s) sqrt|w s| A_i, B = sum of sqrt|w s| B_i, of the same rank
    ties    as linear, keeping the largest entries and, of these, the majority's sign
            (TIES-Merging, arXiv 2306.01708)
    dare    as linear, of randomly kept entries, rescaled (DARE, arXiv 2311.03099)

The last three act on A and B and not on their product, as PEFT's ``add_weighted_adapter`` does; the
report says how far the result is from the sum.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.adapters.combine_rules import Method, Rule, check_options
from lora_inject.arithmetic.low_rank import difference_norm, product_norm, side_by_side
from lora_inject.core.adaptation import reached
from lora_inject.core.adapter import Adapter, Term
from lora_inject.core.commit import commit
from lora_inject.core.look import Look
from lora_inject.core.starting import as_parameters
from lora_inject.core.state import Fresh
from lora_inject.core.state_parts import Injection
from lora_inject.errors import ArgumentError, UnsupportedLayerError
from lora_inject.kinds.base import Kind
from lora_inject.printing import Section, Shown, Tables
from lora_inject.settings import Settings, check_adapter, check_choice, check_weights
from lora_inject.sharding import whole
from lora_inject.variants import Change, Spec


class CombinedLayer(NamedTuple):
    """One layer of a combined adapter.

    Attributes:
        path: its path.
        r: the new adapter's rank there.
        off: the norm of the difference between its update and the weighted sum of those it is made
            of, relative to the norm of that sum.
    """

    path: str
    r: int
    off: float


@dataclass(frozen=True, repr=False)
class CombineReport(Shown):
    """What ``combine`` made, layer by layer; ``print`` shows it as a table."""

    adapter: str
    layers: tuple[CombinedLayer, ...]

    @property
    def worst(self) -> float:
        """The largest relative difference from the weighted sum."""
        return max(layer.off for layer in self.layers)

    def _tables(self) -> Tables:
        rows = [(layer.path, str(layer.r), f"{layer.off:.2%}") for layer in self.layers]
        title = f"Adapter {self.adapter!r} on {len(rows)} layers"
        return Tables([Section(title, ("~layer", ">r", ">off the weighted sum"), rows)])


def combine(
    model: nn.Module,
    adapters: Mapping[str, float],
    name: str,
    how: Method = "cat",
    *,
    r: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> CombineReport:
    """Make a new adapter out of several; it stands beside them and is not in use yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2, adapter="fr")
        >>> _ = inject(model, nn.Linear, r=4, adapter="de")
        >>> print(combine(model, {"fr": 0.7, "de": 0.3}, "both").layers[0].r)
        6
        >>> _ = use(model, "both")

    Args:
        model: an adapted model.
        adapters: names with finite weights. Where one does not stand on a layer, the others are
            combined there.
        name: the new adapter's name.
        how: "cat", "svd", "linear", "ties" or "dare"; see the module's first lines.
        r: the rank for "svd"; None for the largest among the adapters of a layer.
        density: for "ties" and "dare", the share of entries to keep, above 0 and at most 1.
        seed: for "dare", decides what is kept; None takes one draw from torch's global generator.

    Returns:
        The rank of each layer, and how far its update is from the weighted sum.

    Raises:
        ArgumentError: an argument cannot be used, an adapter is not known, the ranks differ where
            they must not, or an adapter has trained biases or modules in place.
        UnsupportedLayerError: the adapters divide the weights of a layer in different ways.
        LoRAInjectError: the model is merged or inside a block. Nothing has changed then.
    """
    name, how = check_adapter(name), check_choice(how, "how", Method)
    weights = check_weights(adapters)
    look = Look(model)
    look.require_adapters()
    look.require_whole(weights)
    _check_names(look, weights, name)
    rule = Rule(how, *check_options(how, r, density, seed), name)
    look.require_awake()
    look.require_intact()

    with torch.inference_mode(False), torch.no_grad():  # tensors made in it could never train
        made = _combined(look, weights, name, rule)
    layers = frozenset(new.adapter.path for new in made)
    injection = Injection(secrets.randbits(63), name, "none", layers=layers)
    states, fresh = reached(look, injection), Fresh()
    for new in made:
        state = states[new.layer]
        states[new.layer] = state.change(adapters=(*state.adapters, new.adapter))
        values = (new.leader or new).parameters
        named = zip(new.adapter.parameters, values, strict=True)
        fresh.setdefault(new.layer, {}).update({(key, name): value for key, value in named})
    commit(look, states, fresh=fresh)
    shown = [CombinedLayer(n.path, n.adapter.settings.r, n.off) for n in made if not n.leader]
    return CombineReport(name, tuple(shown))


@dataclass
class _Made:
    """A new adapter for one layer; tied layers share the parameters of their leader."""

    path: str
    layer: nn.Module
    adapter: Adapter
    values: list[tuple[Tensor, Tensor]]
    off: float
    leader: "_Made | None" = None
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        own = zip(self.adapter.specs, self.values, strict=not self.leader)
        kind = self.adapter.kind
        frozen = {"A": False, "B": False}
        pairs = [
            as_parameters(kind, self.layer, spec, {"A": A, "B": B}, frozen) for spec, (A, B) in own
        ]
        self.parameters = [parameter for pair in pairs for parameter in pair.values()]


def _combined(look: Look, weights: Mapping[str, float], name: str, rule: Rule) -> list[_Made]:
    """The new adapters of a model's layers, in the order in which these were adapted."""
    groups: dict[tuple[nn.Module, tuple[str, ...]], list[tuple[str, Adapter]]] = {}
    for layer, adapter in look.leaders_first:
        if adapter.name in weights:
            targets = tuple(dict.fromkeys(spec.weight for spec in adapter.specs))
            path = look.target_path(layer, adapter)
            groups.setdefault((layer, targets), []).append((path, adapter))
    made: list[_Made] = []
    leaders: dict[frozenset[int], _Made] = {}
    for (layer, targets), own in groups.items():
        others = [w for other, w in groups if other is layer and w != targets]
        if any(set(w) & set(targets) for w in others):
            raise UnsupportedLayerError(
                "its adapters divide its weights in different ways.", path=own[0][0]
            )
        sources = [adapter for _, adapter in own]
        key = frozenset(id(layer.get_parameter(n)) for a in sources for n in a.parameters)
        new = _combine_layer(own[0][0], layer, sources, weights, name, rule, leaders.get(key))
        leaders.setdefault(key, new)
        made.append(new)
    return made


def _combine_layer(
    path: str,
    layer: nn.Module,
    sources: list[Adapter],
    weights: Mapping[str, float],
    name: str,
    rule: Rule,
    leader: "_Made | None",
) -> _Made:
    first = sources[0]
    if leader is not None:
        swapped = first.kind.transposes != leader.adapter.kind.transposes
        specs = tuple(
            replace(spec, weight=own.weight, swapped=swapped)
            for spec, own in zip(leader.adapter.specs, first.specs, strict=True)
        )
        adapter = replace(
            leader.adapter, kind=first.kind, way=first.way, specs=specs, path=first.path,
            pattern=f"tied to {leader.path}", follows=leader.adapter.path,
        )  # fmt: skip
        return _Made(path, layer, adapter, [], 0.0, leader)
    parts: dict[tuple[Any, ...], list[tuple[Term, float]]] = {}
    for source in sources:
        for term in source.terms:
            weighted = (term, term.factor * weights[source.name])
            parts.setdefault(term.spec.place, []).append(weighted)
    pairs, offs = [], []
    for terms in parts.values():
        A, B, off = _combine_pair(path, layer, terms, rule)
        pairs.append((A, B))
        offs.append(off)
    prefixes = [terms[0][0].spec.prefix for terms in parts.values()]
    if len(set(prefixes)) < len(prefixes):
        raise UnsupportedLayerError(
            "its adapters have parts of one name in different places.", path=path
        )
    r = max(A.shape[-2] for A, _ in pairs)
    shaped = [
        _shaped(first.kind, layer, terms[0][0], A, B, r)
        for (A, B), terms in zip(pairs, parts.values(), strict=True)
    ]
    values = [value for _, value in shaped]
    settings = Settings(r=r, alpha=float(r), dropout=0.0, how=first.settings.how,
                        layout=first.settings.layout, parts=first.settings.parts)  # fmt: skip
    pattern = " + ".join(source.name for source in sources)
    adapter = Adapter(
        name, settings, first.kind, first.way, tuple(spec for spec, _ in shaped), pattern,
        first.path, rule.seed,
    )  # fmt: skip
    return _Made(path, layer, adapter, values, max(offs))


def _combine_pair(
    path: str, layer: nn.Module, terms: list[tuple[Term, float]], rule: Rule
) -> tuple[Tensor, Tensor, float]:
    """One pair as matrices, in at least float32, and how far it is from the weighted sum."""
    As, Bs = [], []
    for term, _ in terms:
        values = {role: whole(layer.get_parameter(name)) for role, name in term.names.items()}
        own = term.change(values, term.factor).tensors
        if any(tensor.is_meta or not tensor.isfinite().all() for tensor in own.values()):
            raise UnsupportedLayerError(
                f"the A or B of {term.adapter!r} has no finite values.", path=path
            )
        wide = {role: t.to(torch.promote_types(t.dtype, torch.float32)) for role, t in own.items()}
        pair = term.variant.low_rank(term.kind, layer, wide)
        if pair is None and not (rule.how == "svd" and rule.r and "rows" not in term.names):
            raise UnsupportedLayerError(
                f"{term.adapter!r} is a {term.variant.name}, which is no product of low rank.",
                path=path,
                remedy='Use several at once, use(model, {...}), or for DoRA how="svd" with r=.',
            )
        if pair is None:
            W = whole(term.kind.weight(layer, term.spec.weight))
            change = Change(term.spec, wide, term.scaling, term.scaling)
            A, B = term.variant.full_rank(term.kind, layer, W.to(wide["A"].dtype), change)
            pair = A, B / term.scaling
        As.append(pair[0])
        Bs.append(pair[1])
    factors = [factor for _, factor in terms]
    exact = side_by_side([(A * f, B) for A, B, f in zip(As, Bs, factors, strict=True)])
    made = rule(path, As, Bs, factors, exact)
    norm = product_norm(*exact)
    return *made, difference_norm(exact, made) / norm if norm else 0.0


def _shaped(
    kind: Kind, layer: nn.Module, term: Term, A: Tensor, B: Tensor, r: int
) -> tuple[Spec, tuple[Tensor, Tensor]]:
    """Matrices padded to rank r, in the shapes of the layer's kind and its adapters' dtype."""
    dtype = layer.get_parameter(term.names["A"]).dtype
    A, B = F.pad(A, (0, 0, 0, r - A.shape[-2])), F.pad(B, (0, r - B.shape[-1]))
    A, B = (tensor.to(dtype).contiguous() for tensor in kind.from_matrices(layer, A, B))
    old = term.spec
    n_in, n_out = (old.n_out, old.n_in) if old.swapped else (old.n_in, old.n_out)
    spec = Spec(
        old.weight, n_in, n_out, tuple(A.shape), tuple(B.shape), old.part, old.start, old.experts,
        groups=old.groups,
    )  # fmt: skip
    return spec, (A, B)


def _check_names(look: Look, weights: Mapping[str, float], name: str) -> None:
    look.require_known(weights, "adapters")
    if not weights:
        raise ArgumentError('adapters must name at least one adapter: {"fr": 0.7, "de": 0.3}.')
    if name in look.known:
        raise ArgumentError(f"name: there is an adapter {name!r} already.")
    for module, trained in look.trained:
        for other in weights.keys() & trained.owners.keys():
            what = trained.text(module)
            raise ArgumentError(f"{other!r} trained {what}, which cannot be combined.")
