"""The edits of a module that are not about its parameters: state, class, statistics, hooks."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_inject.changes.checkpointing import checkpointing_edits, is_checkpointed, needing_edits
from lora_inject.changes.edits import MISSING, Edit, attribute_edit
from lora_inject.changes.statistics import has_statistics, holding_edits
from lora_inject.compat.marks import RESIZE, TIED_KEYS, can_resize
from lora_inject.core.class_swap import add_class_edits
from lora_inject.core.dropping import dropping_edits
from lora_inject.core.resizing import Resizing
from lora_inject.core.scales import SCALES, Scales, scales_of
from lora_inject.core.state import State
from lora_inject.core.travelling import travelling_edits
from lora_inject.core.unreached import unreached_edits
from lora_inject.own import STATE


def module_edits(
    module: nn.Module,
    old: State | None,
    state: State | None,
    parameters: Mapping[str, Any],
    modes: bool = True,
) -> list[Edit]:
    """All that a module gets with a state, and loses without one, but for its tensors.

    Args:
        module: the module.
        old: its state until now.
        state: the new one.
        parameters: the parameters that it has then.
        modes: whether its mode comes back where it has no state any more.
    """
    edits: list[Edit] = [attribute_edit(module, STATE, MISSING if state is None else state)]
    add_class_and_scales(edits, module, old, state, parameters)
    edits += dropping_edits(module, old, state)
    edits += statistics_edits(module, old, state)
    edits += lent_edits(module, old, state)
    edits += root_edits(module, old, state)
    edits += tied_edits(module, old, state)
    if (old is None) != (state is None):
        if can_resize(module):
            edits.append(attribute_edit(module, RESIZE, Resizing(module) if state else MISSING))
        if is_checkpointed(module):
            edits += checkpointing_edits(module, state is not None)
    if old is not None and state is None:
        edits += needing_edits(module, False)
        if modes and module.training is not old.before.training:
            edits.append(attribute_edit(module, "training", old.before.training))
    return edits


def add_class_and_scales(
    edits: list[Edit],
    module: nn.Module,
    old: State | None,
    state: State | None,
    parameters: Mapping[str, Any],
) -> None:
    """Append the class that follows from a state, and the scaling of what runs as tensors."""
    known = module.__dict__.get(SCALES)
    if state is not None and state.adapters:
        scales: Scales = known or {}
        if scales and old is not None and old.adapters is not state.adapters:
            names = {adapter.name for adapter in state.adapters}
            scales = {name: scale for name, scale in scales.items() if name in names}
        scales = scales_of(state.running, scales, parameters)
        if scales is not known:
            edits.append(attribute_edit(module, SCALES, scales))
    elif known is not None:
        edits.append(attribute_edit(module, SCALES, MISSING))
    if (known_state := old or state) is not None:
        add_class_edits(edits, module, known_state.before.cls, state)


def root_edits(module: nn.Module, old: State | None, state: State | None) -> list[Edit]:
    """The hooks of what ``inject`` was called on."""
    return [*travelling_edits(module, old, state), *unreached_edits(module, old, state)]


def tied_edits(module: nn.Module, old: State | None, state: State | None) -> list[Edit]:
    """Name the A and B that stand in another layer too, so that transformers saves them once."""
    before, now = (_shared(s) for s in (old, state))
    if before == now:
        return []
    return [attribute_edit(module, TIED_KEYS, dict.fromkeys(now) if now else MISSING)]


def _shared(state: State | None) -> list[str]:
    adapters = state.adapters if state else ()
    return [name for adapter in adapters if adapter.follows for name in adapter.parameters]


def statistics_edits(module: nn.Module, old: State | None, state: State | None) -> list[Edit]:
    """Let running statistics stand still or move, as the state says."""
    if not has_statistics(module):
        return []
    if state is not None:
        return holding_edits(module, not state.statistics_move())
    return holding_edits(module, old is not None and old.before.held)


def lent_edits(module: nn.Module, old: State | None, state: State | None) -> list[Edit]:
    """Take off what was lent to a module and is not any more."""
    if old is None or not old.reach.lent:
        return []
    kept = dict(state.reach.lent) if state else {}
    gone = [(name, former) for name, former in old.reach.lent if name not in kept]
    return [attribute_edit(module, name, former[0] if former else MISSING) for name, former in gone]
