"""New states become classes, parameters, flags and hooks: what changes a model, all or nothing.

``commit`` compares what each module is with what its new state says, makes a list of edits of the
difference and carries it out. There are four ways to the edits of a module: a first touch, which is
nearly every module at its first ``inject``, and its last; one where no tensor comes, goes or moves,
as in most hot swaps; and the general one (``arranging.py``), to which the others are only faster.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import (
    MISSING,
    Edit,
    put_attribute,
    put_flag,
    put_gradient,
    put_items,
    run,
    training_edits,
)
from lora_inject.core.arranging import Arranging, Flags
from lora_inject.core.look import Look
from lora_inject.core.module_edits import (
    add_class_and_scales,
    module_edits,
    root_edits,
    statistics_edits,
)
from lora_inject.core.recomputing import note_commit, note_parts
from lora_inject.core.reduced import require_reduced
from lora_inject.core.state import Fresh, State, States, owned
from lora_inject.core.tensor_marks import Mark, mark_edit, mark_of, unmarking_edits
from lora_inject.own import STATE


def commit(
    look: Look,
    states: States,
    *,
    fresh: Fresh | None = None,
    values: Iterable[Edit] = (),
    flags: Flags = "changed",
    modes: bool = True,
    then: Callable[[], Any] | None = None,
) -> Any:
    """Make these modules what their new states say, all of them or none.

    Args:
        look: the one look of the operation.
        states: the new states; None for a module as it was before us.
        fresh: tensors that did not exist, by module, then by their name (of what trains in place,
            that of the place) and their owner.
        values: edits of the values of tensors, and of hooks.
        flags: which ``requires_grad`` are set.
        modes: whether a module that is as it was before us has the mode from then too.
        then: called when all is done; what it raises takes everything back.

    Returns:
        What ``then`` returned.

    Raises:
        LoRAInjectError: DistributedDataParallel would not reduce what is to train.
    """
    states = _with_notes(look, states)
    with torch.inference_mode(False):  # tensors made in it could never train
        edits = edits_of(look, states, fresh or {}, values, flags, modes)
    require_reduced(look, states, edits, fresh or {})
    note_parts()
    done = run(edits, then)
    note_commit(look, states, lambda former: edits_of(look.again(), former, {}, (), "switched"))
    return done


def _with_notes(look: Look, states: States) -> States:
    """The new states, with those that copies will forget noted on what is around their modules."""
    if not look.forgetful:
        return states
    noted = dict(states)
    for module, inside in look.forgetful.items():
        state = noted.get(module, look.states.get(module))
        if state is not None:
            known = ((path, noted.get(m, look.states.get(m))) for path, m in inside)
            reach = state.reach._replace(noted=tuple(note for note in known if note[1] is not None))
            noted[module] = state.change(reach=reach)
    return noted


def edits_of(
    look: Look,
    states: States,
    fresh: Fresh,
    values: Iterable[Edit],
    flags: Flags,
    modes: bool = True,
) -> list[Edit]:
    """What ``commit`` carries out."""
    edits, general = [*values], dict[nn.Module, State | None]()
    before = look.states
    for module, state in states.items():
        old = before.get(module)
        if old is not None and state is not None:
            moves = old.trained or state.trained or old.adapters is not state.adapters
            sets_flags = flags != "changed" or old.use.trains != state.use.trains
            # A flag that other modules share follows from the states of all of them.
            of_base = flags == "all" and not _is_alone(look, module, state)
            if moves or of_base or (sets_flags and _shares(module, state)):
                general[module] = state
            else:
                _add_still_edits(edits, module, old, state, flags)
        elif state is not None and _is_alone(look, module, state):
            _add_first_edits(edits, module, state, fresh.get(module, {}))
        elif old is not None and _is_alone(look, module, old):
            _add_last_edits(edits, module, old, modes)
        else:
            general[module] = state
    if general:
        edits += Arranging(look, general, states, fresh, flags, modes).edits()
    return edits


# --- a first touch, and the last ----------------------------------------------------------------


def _is_alone(look: Look, module: nn.Module, state: State) -> bool:
    """Whether its parameters stand nowhere else, and no call but those on it has seen them."""
    own = module._parameters
    if state.trained:
        return False
    if len(own):
        is_new = module not in look.states
        for name, parameter in own.items():
            if parameter is not None:
                mark = mark_of(parameter)
                if id(parameter) in look.tied:
                    return False
                if mark is not None and (is_new or not mark.is_at(module, name)):
                    return False
    return True


def _add_first_edits(
    edits: list[Edit],
    module: nn.Module,
    state: State,
    fresh: dict[tuple[str, str], Tensor | None],
) -> None:
    own: Any = module._parameters
    if len(own):
        reference, flags = weakref.ref(module), dict(state.before.flags)
        for name, parameter in own.items():
            if parameter is not None:
                mark = Mark(flags[name], ((reference, name),))
                edits += training_edits(parameter, False)
                edits.append(mark_edit(parameter, mark))
    if fresh:
        now = list(own.items())
        items = now + [(name, tensor) for (name, _), tensor in fresh.items()]
        edits.append((put_items, own, None, now, items))
        own = dict(items)
    edits += module_edits(module, None, state, own)


def _add_last_edits(edits: list[Edit], module: nn.Module, state: State, modes: bool) -> None:
    own: Any = module._parameters
    if len(own):
        ours = {name for adapter in state.adapters for name in adapter.parameters}
        now = list(own.items())
        kept = [item for item in now if item[0] not in ours]
        for name, parameter in kept:
            if parameter is not None:
                flag = state.before.flag(name)
                if flag is not None:
                    edits += training_edits(parameter, flag)
                edits += unmarking_edits(parameter)
        if ours:
            edits.append((put_items, own, None, now, kept))
    edits += module_edits(module, state, None, own, modes)


# --- nothing moves ------------------------------------------------------------------------------


def _shares(module: nn.Module, state: State) -> bool:
    """Whether it shares the A or B of an adapter with what it is tied to."""
    own: Any = module._parameters
    names = (name for adapter in state.adapters for name in adapter.parameters)
    return any(mark_of(own[name]) is not None for name in names)


def _add_still_edits(
    edits: list[Edit], module: nn.Module, old: State, state: State, flags: Flags
) -> None:
    """Append the edits of a module of which no tensor moves: the way of a hot swap."""
    own: Any = module._parameters
    if flags == "all":
        known = {name: trains for name, _, trains in owned(state)}
        for name, parameter in own.items() if len(own) else ():
            if parameter is not None:
                edits += training_edits(parameter, known.get(name, False))
    else:
        differ = old.use.trains ^ state.use.trains
        for adapter in state.adapters:
            if flags == "changed" and adapter.name not in differ:
                continue  # whatever somebody has set since
            trains = adapter.name in state.use.trains
            for name, can_train in adapter.parameters.items():
                parameter, train = own[name], trains and can_train
                if parameter.requires_grad is not train:
                    edits.append((put_flag, parameter, None, not train, train))
                if not train and flags != "switched" and parameter.grad is not None:
                    edits.append((put_gradient, parameter, None, parameter.grad, None))
    edits.append((put_attribute, module, STATE, module.__dict__.get(STATE, MISSING), state))
    if state.adapters:
        add_class_and_scales(edits, module, old, state, own)
    if old.reach is not state.reach:
        edits += statistics_edits(module, old, state)  # such as have come since
        edits += root_edits(module, old, state)
