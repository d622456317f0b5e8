"""What merging makes of weights, and unmerging: new states and values, nothing changed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.product import without_autocast
from lora_inject.changes.edits import Edit, value_edit
from lora_inject.compat.marks import is_fully_sharded
from lora_inject.core.adapter import Term
from lora_inject.core.layer import changes_of
from lora_inject.core.look import Look
from lora_inject.core.path_groups import grouped
from lora_inject.core.state import State, terms
from lora_inject.core.state_parts import Merged
from lora_inject.errors import ArgumentError, LoRAInjectError, UnsupportedLayerError
from lora_inject.kinds.base import is_plain
from lora_inject.own import own_class, own_tensor
from lora_inject.printing import Section, Shown, Tables, count, plural
from lora_inject.settings import check_names
from lora_inject.sharding import is_partial

Keep = Literal["device", "cpu", False]


class MergedWeight(NamedTuple):
    """One merged weight.

    Attributes:
        path: its path in the model.
        dtype: the dtype it was rounded to.
        lost: the norm of what rounding to the weight's dtype changed, relative to the norm of the
            update, scaling * B A; 0 where it is that of the sum, 1 where nothing of it is left.
    """

    path: str
    dtype: torch.dtype
    lost: float


@dataclass(frozen=True, repr=False)
class MergeReport(Shown):
    """What ``merge`` did, weight by weight; ``print`` shows it as a table."""

    weights: tuple[MergedWeight, ...]

    @property
    def worst(self) -> float:
        """The largest share of an update that rounding lost."""
        return max((weight.lost for weight in self.weights), default=0.0)

    def _tables(self) -> Tables:
        rows = [
            (
                path,
                str(same[0].dtype).removeprefix("torch."),
                count(len(same)),
                f"{max(w.lost for w in same):.2%}",
            )
            for path, same in grouped(self.weights, lambda w: w.path, lambda w: w.dtype)
        ]
        columns = ("~weight", "dtype", ">weights", ">lost to rounding, at most")
        return Tables([Section(f"Merged {plural(len(self.weights), 'weight')}", columns, rows)])


class Folded(NamedTuple):
    """What merging or unmerging makes of a model.

    Attributes:
        states: the new states of the layers.
        values: edits that give weights their new values.
        report: of what was merged, how much of each update was lost.
    """

    states: dict[nn.Module, State]
    values: list[Edit]
    report: MergeReport


def folded(look: Look, adapters: Any, keep: Keep) -> Folded:
    """What ``merge`` would make of a model that has been looked at."""
    look.require_adapters()
    look.require_no_block()
    names = _names_in_use(look, adapters)
    todo = {
        path: (layer, state, new)
        for path, layer in look.layers.items()
        if (new := _unmerged(state := look.states[layer]) & names)
    }
    if not todo:
        look.require_unmerged()
        raise LoRAInjectError(
            "the model has no adapters in use to merge.", remedy="Call inject or use first."
        )
    places = [
        (path, layer, weight)
        for path, (layer, state, new) in todo.items()
        for weight in _weights(state, new)
    ]
    _require_mergeable(look, places)
    _require_none_left(todo)
    states, values, rows = dict[nn.Module, State](), list[Edit](), list[MergedWeight]()
    for layer, state, new in todo.values():
        merged = state.merged or Merged(frozenset(), {})
        former = dict(merged.former)
        for name in _weights(state, new):
            weight = layer._parameters[name]
            assert weight is not None
            if name not in former:
                own = weight.detach()
                former[name] = own if keep == "device" else own.cpu() if keep == "cpu" else None
            shown = look.index.path(layer, name)
            value, row = _merged_weight(shown, layer, name, state, merged.adapters | new)
            values.append(value_edit(weight, value))
            rows.append(row)
        states[layer] = state.change(merged=Merged(merged.adapters | new, former))
    return Folded(states, values, MergeReport(tuple(rows)))


def unfolded(look: Look, names: Mapping[nn.Module, frozenset[str]]) -> Folded:
    """What it makes of a model to take adapters out of weights; others stay merged.

    Args:
        look: the model.
        names: by layer, of its merged adapters those to take out.
    """
    states, values = dict[nn.Module, State](), list[Edit]()
    for layer, leaving in names.items():
        state = look.states[layer]
        assert state.merged is not None
        left = state.merged.adapters - leaving
        former, aside = dict(state.merged.former), dict(state.merged.aside)
        for name in list(former):
            weight, value = own_tensor(layer, name), former[name]
            assert weight is not None
            assert value is not None, "require_kept has refused this"
            if name in _weights(state, left):
                path = look.index.path(layer, name)
                value, _ = _merged_weight(path, layer, name, state, left)
            else:
                del former[name]
            if not state.blocks:
                values.append(value_edit(weight, value))
            elif name in former:  # the block, which has outlived ours, shows the former value
                aside[name] = value
        states[layer] = state.change(merged=Merged(left, former, aside) if left else None)
    return Folded(states, values, MergeReport(()))


def _unmerged(state: State) -> frozenset[str]:
    """The adapters of a layer that are in use and not merged yet."""
    used = frozenset(a.name for a in state.adapters if a.name in state.use.weights)
    return used - state.merged.adapters if state.merged else used


def _names_in_use(look: Look, adapters: Any) -> frozenset[str]:
    """The names to merge, which must be in use: else the model would not compute the same."""
    used = frozenset(look.used)
    wanted = used if adapters is None else frozenset(check_names(adapters, "adapters"))
    for name in wanted - used:
        raise ArgumentError(
            f"adapters: {name!r} is not in use; in use: {sorted(used)}.",
            remedy=f"Call use(model, {name!r}) first.",
        )
    return wanted


def _weights(state: State, names: frozenset[str]) -> list[str]:
    """The names of the weights that these adapters of the layer are for."""
    specs = [spec for a in state.adapters if a.name in names for spec in a.specs]
    return list(dict.fromkeys(spec.weight for spec in specs))


def _require_mergeable(look: Look, places: list[tuple[str, nn.Module, str]]) -> None:
    """Refuse weights to which nothing can be added, or to which more would be added than is meant.

    Raises:
        UnsupportedLayerError: there is such.
    """
    for path, layer, name in places:
        state = look.states[layer]
        adapter = next(a for a in state.adapters if name in [s.weight for s in a.specs])
        weight = layer._parameters.get(name)
        reason = adapter.kind.merge_refusal(layer, own_class(layer), adapter.way)
        if is_fully_sharded(layer) or (weight is not None and is_partial(weight)):
            reason = f"its {name} is sharded, and no rank holds it whole."
        elif reason is None and (weight is None or not is_plain(weight)):
            reason = f"its {name} is quantized or parametrized, so that nothing can be added to it."
        elif reason is None and weight is not None and weight.is_meta:
            reason = "it is on the meta device and has no values."
        elif reason is None and weight is not None and len(look.everywhere(weight)) > 1:
            reason = f"its {name} is tied to that of another layer, which would change with it."
        if reason is not None:
            raise UnsupportedLayerError(
                reason, path=path, remedy="Leave it unmerged: it computes the same."
            )


def _require_none_left(todo: Mapping[str, tuple[nn.Module, State, frozenset[str]]]) -> None:
    """Refuse to leave an adapter unmerged that reads the former weight, which it would not find."""
    for path, (_, state, new) in todo.items():
        names = new if state.merged is None else new | state.merged.adapters
        merged = {spec.weight for a in state.adapters if a.name in names for spec in a.specs}
        for adapter in state.adapters:
            variant = adapter.settings.variant
            left = adapter.name in state.use.weights.keys() - names
            if left and variant.of_base and any(s.weight in merged for s in adapter.specs):
                raise UnsupportedLayerError(
                    f"{adapter.name!r} is a {variant.name}, a change of the former weight.",
                    path=path,
                    remedy=f"Merge {adapter.name!r} too, or put it out of use first.",
                )


@torch.no_grad()
def _merged_weight(
    path: str, layer: nn.Module, name: str, state: State, names: frozenset[str]
) -> tuple[Tensor, MergedWeight]:
    """The value of a weight with these adapters merged into it, and what rounding it lost."""
    weight = own_tensor(layer, name)
    assert weight is not None
    # What is merged already is summed anew from the former weight, so that there is one rounding.
    former = None if state.merged is None else state.merged.former.get(name)
    start = weight if former is None else former.to(weight.device, weight.dtype)
    if former is None and state.merged is not None:
        names -= state.merged.adapters  # which are in the weight, as nothing was kept
    chosen = terms((a for a in state.adapters if a.name in names), state.use.weights)
    with without_autocast(weight.device.type):
        exact = _exact_sum(layer, name, start, chosen)
    rounded = exact.to(weight.dtype)
    # The sum is one quick pass; only where it is not finite every element is looked at.
    total = rounded.sum(dtype=exact.dtype).item()
    if not (math.isfinite(total) or rounded.isfinite().all()):
        raise UnsupportedLayerError(
            f"the merged {name} is not finite in {weight.dtype}.",
            path=path,
            remedy="Look for NaN and infinity in its adapter.",
        )
    lost = 0.0
    if rounded.dtype != exact.dtype and (update := (exact - start).norm().item()):
        lost = (rounded - exact).norm().item() / update
    if rounded.stride() != weight.stride():  # channels_last, say
        rounded = torch.empty_like(weight).copy_(rounded)
    return rounded, MergedWeight(path, weight.dtype, lost)


def _exact_sum(layer: nn.Module, name: str, weight: Tensor, terms: tuple[Term, ...]) -> Tensor:
    kind, changes = changes_of(layer, terms, name)
    assert kind is not None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    term = next(term for term in terms if term.spec.weight == name)
    if len(changes) == 1 and weight.dtype == dtype and _is_product(weight, term):
        change = changes[0][1]
        A, B = change.tensors["A"], change.tensors["B"]
        factors = (A.t(), B.t()) if kind.transposes else (B, A)
        # Without a pass to scale the product and one to add it.
        return torch.addmm(weight, *(factor.to(dtype) for factor in factors), alpha=term.factor)
    W, total = weight.to(dtype), None
    for variant, change in changes:
        tensors = {role: tensor.to(dtype) for role, tensor in change.tensors.items()}
        own = change._replace(tensors=tensors)
        start = torch.zeros_like(W) if total is None else total
        total = variant.add_to_weight(kind, layer, W, start, own)
    assert total is not None
    return total.add_(W)


def _is_product(weight: Tensor, term: Term) -> bool:
    """Whether the change of a weight is the product of two matrices, all of it."""
    return weight.dim() == 2 and term.plain and not term.spec.part
