"""Attributes put on an adapted model for a while; they go with its adapters at the latest."""

from typing import Any

from torch import nn

from lora_inject.changes.edits import MISSING, Edit, attribute_edit, run
from lora_inject.core.state import state_of
from lora_inject.own import STATE


def lend(module: nn.Module, name: str, value: Any) -> None:
    """Put an attribute on a module that a call has reached; ``strip`` takes it off.

    Args:
        module: the model that ``inject`` was called on, or any module inside of it.
        name: of the attribute.
        value: of the attribute.
    """
    run(_edits(module, name, value))


def take_back(module: nn.Module, name: str) -> None:
    """Take the attribute off again, where it still is."""
    run(_edits(module, name, MISSING))


def _edits(module: nn.Module, name: str, value: Any) -> list[Edit]:
    edits, state = [attribute_edit(module, name, value)], state_of(module)
    if state is not None:
        others = tuple(lent for lent in state.reach.lent if lent != name)
        lent = others if value is MISSING else (*others, name)
        new = state.change(reach=state.reach._replace(lent=lent))
        edits.append(attribute_edit(module, STATE, new))
    return edits
