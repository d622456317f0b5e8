"""Merge and exact unmerge: adapters folded into their weights, the former weights kept aside.

A merged weight is the sum in float32 (or float64), rounded once. The Parameter stays the same
object and only exchanges its storage, which costs nothing, keeps the former one as it is, and lets
autograd notice a merge between a forward and its backward pass. The layer has its own class
meanwhile and costs what it cost before.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_inject.adapter import LayerState, Term, adapters_of, is_merged, state_of
from lora_inject.arithmetic.product import without_autocast
from lora_inject.core.look import Look
from lora_inject.errors import ArgumentError, LoRAInjectError, UnsupportedLayerError
from lora_inject.in_place import own_tensor
from lora_inject.kinds.base import Kind, MatrixKind, Spec, is_plain, own_class
from lora_inject.layer import change, pairs_of
from lora_inject.placements import is_fully_sharded, is_partial
from lora_inject.record import exchange, put_back_merged
from lora_inject.settings import check_names
from lora_inject.tables import Section, Tables

Keep = Literal["device", "cpu", False]


@dataclass(frozen=True)
class MergedWeight:
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


@dataclass(frozen=True)
class MergeReport:
    """What ``merge`` did, weight by weight; ``print`` shows it as a table."""

    weights: tuple[MergedWeight, ...]

    @property
    def worst(self) -> float:
        """The largest share of an update that rounding lost."""
        return max((weight.lost for weight in self.weights), default=0.0)

    def _tables(self) -> Tables:
        rows = [
            (w.path, str(w.dtype).removeprefix("torch."), f"{w.lost:.2%}") for w in self.weights
        ]
        columns = ("weight", "dtype", ">lost to rounding")
        return Tables([Section(f"Merged {len(rows)} weights", columns, rows)])

    def __str__(self) -> str:
        return self._tables().text()

    def _repr_html_(self) -> str:
        return self._tables().html()


def merge(model: nn.Module, adapters: Any = None, *, keep: Keep = "device") -> MergeReport:
    """Fold adapters into the weights, so that the model computes the same without them.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject(model, nn.Linear, r=2)
        >>> merge(model).worst, type(model[0]).__name__
        (0.0, 'Linear')
        >>> _ = unmerge(model)

    Args:
        model: an adapted model.
        adapters: a name or several, of adapters in use; None for all of these. Those that are not
            named go on running beside the merged weights, and can be merged later.
        keep: where the former weights are kept for ``unmerge``: on their "device", on the "cpu", or
            not at all (False), after which only ``strip(model, merge=True)`` is possible.

    Returns:
        For each weight, how much of the update its dtype could not hold.

    Raises:
        ArgumentError: ``keep`` is none of the three, or an adapter is not in use.
        LoRAInjectError: the model has no adapters to merge, or is inside a ``disabled`` block.
        UnsupportedLayerError: a weight is tied, quantized, parametrized or on the meta device, its
            layer is not affine, or the sum is not finite. Nothing has changed then.
    """
    if keep is not False and keep not in ("device", "cpu"):
        raise ArgumentError(f'keep must be "device", "cpu" or False, not {keep!r}.')
    return fold(Look(model), adapters, keep)


def fold(look: Look, adapters: Any = None, keep: Keep = "device") -> MergeReport:
    """``merge`` for a model that has been looked at."""
    look.require_own_record()
    look.require_no_block()
    names = _names_in_use(look, adapters)
    todo = {
        path: (layer, state, new)
        for path, layer in look.layers.items()
        if (new := frozenset(_running(state := look.states[layer]) & names))
    }
    if not todo:
        look.require_awake()
        raise LoRAInjectError(
            "the model has no adapters in use to merge.", remedy="Call inject or use first."
        )
    places = [
        (path, layer, weight, new)
        for path, (layer, _, new) in todo.items()
        for weight in _weights(layer, new)
    ]
    _check_mergeable(look, [place[:3] for place in places])
    merged, undo = [], []
    try:
        for path, layer, weight, new in places:
            tensor = own_tensor(layer, weight)
            assert tensor is not None
            undo.append((layer, weight, tensor, tensor.detach()))
            merged.append(_merge_weight(f"{path}.{weight}".lstrip("."), layer, weight, new))
    except BaseException:
        for _, _, tensor, before in undo:
            exchange(tensor, before)
        raise
    former = {layer: state.former for layer, state, _ in todo.values()}
    for layer, weight, _, before in undo:
        kept = before if keep == "device" else before.cpu() if keep == "cpu" else None
        former[layer].setdefault(weight, kept)
    for layer, state, new in todo.values():
        change(layer, folded=state.folded | new)
    return MergeReport(tuple(merged))


def unmerge(model: nn.Module) -> nn.Module:
    """Give merged weights their former values, bit for bit, and the adapters their place.

    Example:
        >>> _ = unmerge(model)  # doctest: +SKIP

    Args:
        model: a model on which ``merge`` was called.

    Returns:
        The same object.

    Raises:
        LoRAInjectError: nothing is merged, or the former weights were not kept.
    """
    look = Look(model)
    look.require_own_record()
    layers = [layer for layer in look.states if is_merged(layer)]
    if not layers:
        raise LoRAInjectError("nothing in the model is merged.", remedy="Call merge first.")
    look.require_no_block()
    look.require_kept()
    for layer in layers:
        put_back_merged(layer)
    return model


@contextmanager
def merged(
    model: nn.Module, adapters: Any = None, *, keep: Literal["device", "cpu"] = "device"
) -> Iterator[MergeReport]:
    """Merge for the length of a ``with`` block, as for generating text.

    Example:
        >>> with merged(model):  # doctest: +SKIP
        ...     model.generate(**inputs)

    Args:
        model: an adapted model.
        adapters: a name or several, of adapters in use; None for all of these.
        keep: where the former weights are kept meanwhile.

    Yields:
        The report of ``merge``.

    Raises:
        ArgumentError: ``keep`` is neither.
        LoRAInjectError: as ``merge``.
    """
    if not keep:
        raise ArgumentError('keep must be "device" or "cpu" here: the block ends with unmerge.')
    report = merge(model, adapters, keep=keep)
    try:
        yield report
    finally:
        unmerge(model)


def _running(state: LayerState) -> set[str]:
    """The adapters of a layer that are in use and not merged yet."""
    return {a.name for a in state.adapters if a.name in state.in_use} - state.folded


def _names_in_use(look: Look, adapters: Any) -> frozenset[str]:
    """The names to merge, which must be in use: else the model would not compute the same."""
    used = frozenset(name for record in look.records for name in record.in_use)
    wanted = used if adapters is None else frozenset(check_names(adapters, "adapters"))
    for name in wanted - used:
        raise ArgumentError(
            f"adapters: {name!r} is not in use; in use: {sorted(used)}.",
            remedy=f"Call use(model, {name!r}) first.",
        )
    return wanted


def _weights(layer: nn.Module, names: frozenset[str]) -> list[str]:
    """The names of the weights that these adapters of the layer are for."""
    specs = [spec for a in adapters_of(layer) if a.name in names for spec in a.specs]
    return list(dict.fromkeys(spec.weight for spec in specs))


def _check_mergeable(look: Look, places: list[tuple[str, nn.Module, str]]) -> None:
    for path, layer, name in places:
        adapter = next(a for a in adapters_of(layer) if name in [s.weight for s in a.specs])
        weight = layer._parameters.get(name)
        reason = adapter.kind.merge_refusal(layer, own_class(layer), adapter.way)
        if is_fully_sharded(layer) or (weight is not None and is_partial(weight)):
            reason = f"its {name} is sharded, and no rank holds it whole."
        elif reason is None and (weight is None or not is_plain(weight)):
            reason = f"its {name} is quantized or parametrized, so that nothing can be added to it."
        elif reason is None and weight is not None and weight.is_meta:
            reason = "it is on the meta device and has no values."
        elif reason is None and len(look.tensor_places[id(weight)]) > 1:
            reason = f"its {name} is tied to that of another layer, which would change with it."
        if reason is not None:
            raise UnsupportedLayerError(
                reason, path=path, remedy="Leave it unmerged: it computes the same."
            )


@torch.no_grad()
def _merge_weight(path: str, layer: nn.Module, name: str, new: frozenset[str]) -> MergedWeight:
    weight, state = own_tensor(layer, name), state_of(layer)
    assert weight is not None
    assert state is not None
    # What is merged already is summed anew from the former weight, so that there is one rounding.
    former = state.former.get(name)
    start = weight if former is None else former.to(weight.device, weight.dtype)
    names = new if former is None else new | state.folded
    terms = state.terms(a for a in state.adapters if a.name in names)
    with without_autocast(weight.device.type):
        exact = _exact_sum(layer, name, start, terms)
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
    exchange(weight, rounded.contiguous())
    return MergedWeight(path, weight.dtype, lost)


def _exact_sum(layer: nn.Module, name: str, weight: Tensor, terms: tuple[Term, ...]) -> Tensor:
    kind, pairs = pairs_of(layer, terms, name)
    assert kind is not None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if len(pairs) == 1 and weight.dtype == dtype and _is_matrix(kind, weight, pairs[0][0]):
        _, A, B, scaling = pairs[0]
        factors = (A.t(), B.t()) if kind.transposes else (B, A)
        # Without a pass to scale the product and one to add it.
        return torch.addmm(weight, *(factor.to(dtype) for factor in factors), alpha=scaling)
    total: Tensor | None = None
    for spec, A, B, scaling in pairs:
        update = kind.update(layer, weight, spec, A.to(dtype), B.to(dtype))
        total = update.mul_(scaling) if total is None else total.add_(update, alpha=scaling)
    assert total is not None
    return total.add_(weight)


def _is_matrix(kind: Kind, weight: Tensor, spec: Spec) -> bool:
    """Whether the update of a weight is the product of two matrices, all of it."""
    return isinstance(kind, MatrixKind) and weight.dim() == 2 and not spec.part
