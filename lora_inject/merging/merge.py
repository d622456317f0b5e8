"""Merge and exact unmerge: adapters folded into their weights, the former weights kept aside.

A merged weight is the sum in float32 (or float64), rounded once. The Parameter stays the same
object and only exchanges its storage, which costs nothing, keeps the former one as it is, and lets
autograd notice a merge between a forward and its backward pass. The layer has its own class
meanwhile and costs what it cost before.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from lora_inject.changes.edits import surely
from lora_inject.core.commit import commit
from lora_inject.core.drift import warn_of_drift
from lora_inject.core.look import Look
from lora_inject.core.state_parts import Merged
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.merging.folding import Folded, Keep, MergeReport, folded, unfolded
from lora_inject.own import Model


def merge(model: nn.Module, adapters: Any = None, *, keep: Keep = "device") -> MergeReport:
    """Fold adapters into the weights, so that the model computes the same without them.

    Nothing of a merged adapter trains: ``loss.backward()`` ends in torch's "element 0 of tensors
    does not require grad", or where a head trains too, it trains alone. Call ``unmerge`` before
    training; ``lora_parameters`` refuses a merged model, and ``audit`` finds one.

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
    look = Look(model)
    new = folded(look, adapters, keep)
    warn_of_drift(look, "gone", "came", "class")
    commit(look, new.states, values=new.values)
    return new.report


def unmerge(model: Model) -> Model:
    """Give merged weights their former values, bit for bit, and the adapters their place.

    Example:
        >>> _ = unmerge(model)  # doctest: +SKIP

    Args:
        model: a model on which ``merge`` was called, or a part of one.

    Returns:
        The same object.

    Raises:
        LoRAInjectError: nothing is merged, or the former weights were not kept.
    """
    look = Look(model)
    names = {m: state.merged.adapters for m, state in look.adapted.items() if state.merged}
    if not names:
        raise LoRAInjectError("nothing in the model is merged.", remedy="Call merge first.")
    look.require_no_block()
    look.require_kept()
    new = unfolded(look, names)
    commit(look, new.states, values=new.values)
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
    look = Look(model)
    look.require_kept()
    new = folded(look, adapters, keep)
    before = {layer: look.states[layer].merged for layer in new.states}
    try:
        commit(look, new.states, values=new.values)
        yield new.report
    finally:
        surely(lambda: _end(look, new, before))


def _end(look: Look, new: Folded, before: Mapping[nn.Module, Merged | None]) -> None:
    """Unmerge what the block has merged and is merged still."""
    look = look.again()
    names: dict[nn.Module, frozenset[str]] = {}
    for layer, state in new.states.items():
        former, now = before[layer], look.states.get(layer)
        assert state.merged is not None
        own = state.merged.adapters - (former.adapters if former else frozenset())
        if now is not None and now.merged is not None and own & now.merged.adapters:
            names[layer] = own & now.merged.adapters
    left = unfolded(look, names)
    commit(look, left.states, values=left.values)
