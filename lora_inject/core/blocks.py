"""``with`` blocks that decide what runs: a token on every module that they entered.

A block takes its token from the modules it entered, wherever these are by then; so blocks may end
in any order, never refuse at their end, and an interrupted end is tried again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.changes.edits import Edit, surely, value_edit
from lora_inject.core.commit import commit
from lora_inject.core.look import Look
from lora_inject.core.state import State
from lora_inject.core.state_parts import Block
from lora_inject.own import own_tensor
from lora_inject.settings import BASE


@contextmanager
def block(
    look: Look,
    rows: Callable[[nn.Module, State], Any] | None = None,
    around: Callable[[bool], list[Edit]] = lambda on: [],
) -> Iterator[nn.Module]:
    """Show the base model, or what computes rows, for the length of a block.

    Args:
        look: the model.
        rows: makes of an adapted module what computes its rows; None for the base model.
        around: what else is put on for the length of the block, and taken off.

    Yields:
        The model.

    Raises:
        LoRAInjectError: a former value cannot be shown.
    """
    token = object()
    try:
        _enter(look, token, rows, around(True))
        yield look.model
    finally:
        surely(lambda: _leave(look, token, around(False)))


def _enter(
    look: Look,
    token: object,
    rows: Callable[[nn.Module, State], Any] | None,
    around: list[Edit],
) -> None:
    look.require_restorable(
        (module, trained)
        for module, trained in look.trained
        if look.states[module].holder(trained) != BASE
    )
    states, values = dict[nn.Module, State](), [*around]
    for module, state in look.adapted.items():
        computes = None if rows is None else rows(module, state)
        new = state.change(blocks=(*state.blocks, Block(token, computes)))
        if state.merged and not state.blocks:
            aside = {}
            for name, former in state.merged.former.items():
                weight = own_tensor(module, name)
                if weight is not None and former is not None:
                    aside[name] = weight.detach()
                    values.append(value_edit(weight, former))
            new = new.change(merged=state.merged._replace(aside=aside))
        states[module] = new
    commit(look, states, values=values)


def _leave(look: Look, token: object, around: list[Edit]) -> None:
    look = look.again()
    formers = look.loaded_formers(
        (module, trained)
        for module, trained in look.trained
        if [block.token for block in look.states[module].blocks] == [token]
    )
    states, values = dict[nn.Module, State](), [*around]
    for module, state in look.states.items():
        left = tuple(b for b in state.blocks if b.token is not token) if state.blocks else ()
        if len(left) == len(state.blocks):
            continue
        new = state.change(blocks=left).with_formers(formers)
        if state.merged and not left:
            for name, merged in state.merged.aside.items():
                weight = own_tensor(module, name)
                if weight is not None:
                    values.append(value_edit(weight, merged))
            new = new.change(merged=state.merged._replace(aside={}))
        states[module] = new
    commit(look, states, values=values)
