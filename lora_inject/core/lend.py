"""Attributes put on an adapted model for a while; they go with its adapters at the latest."""

from typing import Any

from torch import nn

from lora_inject.changes.edits import MISSING, Edit, attribute_edit, run
from lora_inject.core.state import state_of
from lora_inject.own import STATE


def lend(module: nn.Module, name: str, value: Any) -> None:
    """Put an attribute on a module that a call has reached; ``strip`` puts back what was there.

    Args:
        module: the model that ``inject`` was called on, or any module inside of it.
        name: of the attribute.
        value: of the attribute.
    """
    state = state_of(module)
    lent = dict(state.reach.lent) if state else {}
    if name not in lent:
        lent[name] = (module.__dict__[name],) if name in module.__dict__ else ()
    run([attribute_edit(module, name, value), *_noting(module, lent)])


def take_back(module: nn.Module, name: str) -> None:
    """Put back what was there before, where the attribute still is."""
    state = state_of(module)
    lent = dict(state.reach.lent) if state else {}
    former = lent.pop(name, ())
    value = former[0] if former else MISSING
    run([attribute_edit(module, name, value), *_noting(module, lent)])


def _noting(module: nn.Module, lent: dict[str, tuple[Any, ...]]) -> list[Edit]:
    state = state_of(module)
    if state is None:
        return []
    reach = state.reach._replace(lent=tuple(lent.items()))
    return [attribute_edit(module, STATE, state.change(reach=reach))]
