"""The general way to the edits of a commit: where tensors come, go, move or are tied.

Which tensor stands under which name of a module is a function of its state (``State.homes``). What
is not ours stays in its order; ours comes after it. Flags follow from all the states that know a
tensor.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import (
    Edit,
    items_edits,
    put_gradient,
    put_members,
    tensor_edit,
    training_edits,
)
from lora_inject.core.look import Look
from lora_inject.core.module_edits import module_edits
from lora_inject.core.state import Fresh, State, States, owned, state_of
from lora_inject.core.state_parts import Trained
from lora_inject.core.tensor_marks import mark_of, marking_edits, unmarking_edits
from lora_inject.own import Place, own_tensor
from lora_inject.settings import BASE
from lora_inject.sharding import is_distributed, shards

# Which flags are set: those that the new states change, those of all that adapters own, or all.
# What is frozen loses its gradient, but not where adapters are only switched.
Flags = Literal["changed", "owned", "switched", "all"]

_STAND_IN = ""  # the owner of a tensor with the former value, while an adapter has the base's own


class Arrangement(NamedTuple):
    """What a module is to have.

    Attributes:
        parameters: its parameters by name, in their order.
        buffers: its buffers.
        unsaved: the names of buffers that are in no state dict.
    """

    parameters: list[tuple[str, Any]]
    buffers: list[tuple[str, Any]]
    unsaved: set[str]


class Fact(NamedTuple):
    """What the state of a module tells of a tensor on it.

    Attributes:
        trains: whether it trains.
        is_adapters: whether an adapter put it there.
    """

    trains: bool
    is_adapters: bool


class Arranging:
    """The edits of modules of which tensors come, go, move or are tied.

    Args:
        look: the one look of the operation.
        states: the new states of these modules.
        every: those of all modules that change, these among them.
        fresh: tensors that did not exist.
        flags: which ``requires_grad`` are set.
        modes: whether modes come back.
    """

    def __init__(
        self, look: Look, states: States, every: States, fresh: Fresh, flags: Flags, modes: bool
    ) -> None:
        self.look, self.states, self.every = look, states, every
        self.flags, self.modes = flags, modes
        self.fresh: Fresh = {**fresh}
        for module, stand_ins in self._stand_ins().items():
            self.fresh[module] = {**fresh.get(module, {}), **stand_ins}
        self.replaced: dict[int, tuple[Tensor, Tensor | None]] = {}  # what stood in a place, stands

    def edits(self) -> Iterator[Edit]:
        """All of them, in their order."""
        after = {module: self._arranged(module) for module in self.states}
        for module, arrangement in after.items():
            yield from _placing_edits(module, arrangement)
        yield from self._tied_edits()
        yield from self._tensor_edits({m: own.parameters for m, own in after.items()})
        for module, state in self.states.items():
            own = dict(after[module].parameters)
            yield from module_edits(module, self.look.states.get(module), state, own, self.modes)

    def _stand_ins(self) -> Fresh:
        """Tensors with former values for places of which an adapter has the base's own tensor."""
        made: dict[int, Tensor | None] = {}
        fresh: Fresh = {}
        for module, state in self.states.items():
            old = self.look.states.get(module)
            if state is None or old is None:
                continue
            for trained in state.trained:
                before = old.find(trained.name)
                asleep = trained.original is not None and state.holder(trained) == BASE
                if asleep and before is not None and old.holder(before) != BASE:
                    key = id(trained.former)
                    if key not in made:
                        made[key] = stand_in(trained, own_tensor(module, trained.name))
                    fresh.setdefault(module, {})[trained.name, _STAND_IN] = made[key]
        return fresh

    def _arranged(self, module: nn.Module) -> Arrangement:
        """The parameters and buffers that a module is to have.

        What is not ours stays in its order; ours comes after it, in the order of the state.
        """
        old, state = self.look.states.get(module), self.states[module]
        tensors = self._by_owner(module)
        ours = {name for adapter in (old.adapters if old else ()) for name in adapter.parameters}
        ours |= {home for trained, _, home in _homes(old) if home != trained.name}
        trained = [*(old.trained if old else ()), *(state.trained if state else ())]
        standing = {t.name: self._standing(module, t.name, tensors) for t in trained}
        placed: dict[str, Tensor | None] = {}  # what is ours, by its own name
        for adapter in state.adapters if state else ():
            for name in adapter.parameters:
                key = (name, adapter.name)
                placed[name] = tensors[key] if key in tensors else own_tensor(module, name)
        waiting = [
            (t, home, tensors[t.name, who]) for t, who, home in _homes(state) if home != t.name
        ]
        placed |= {home: tensor for t, home, tensor in waiting if t.is_parameter}
        kept = [(n, standing.get(n, t)) for n, t in module._parameters.items() if n not in ours]
        buffers = [(n, standing.get(n, t)) for n, t in module._buffers.items() if n not in ours]
        buffers += [(home, tensor) for t, home, tensor in waiting if not t.is_parameter]
        unsaved = module._non_persistent_buffers_set
        hidden = {n for n in unsaved if n not in ours}
        hidden |= {home for t, home, _ in waiting if not t.is_parameter and t.name in unsaved}
        return Arrangement([*kept, *placed.items()], buffers, hidden)

    def _by_owner(self, module: nn.Module) -> dict[tuple[str, str], Tensor | None]:
        """The tensors of a module by name and owner, those that are new among them.

        The base's own tensor goes to the adapter that trains it then, or back to the base.
        """
        old, state = self.look.states.get(module), self.states[module]
        found = {(t.name, who): own_tensor(module, home) for t, who, home in _homes(old)}
        for name in {t.name for s in (old, state) if s for t in s.trained}:
            before, now = (s.find(name) if s else None for s in (old, state))
            if before is None:
                found[name, BASE] = own_tensor(module, name)
            was, then = ((t.original if t else None) or BASE for t in (before, now))
            found[name, then] = found.pop((name, was))
        return found | self.fresh.get(module, {})

    def _standing(
        self, module: nn.Module, name: str, tensors: Mapping[tuple[str, str], Tensor | None]
    ) -> Tensor | None:
        """The tensor that is to stand in a place, noted where it takes that of another."""
        state, current = self.states[module], own_tensor(module, name)
        now = state.find(name) if state else None
        holder = state.holder(now) if state and now else BASE
        if holder == BASE and now is not None and now.original is not None:
            tensor = tensors.get((name, _STAND_IN), current)
        else:
            tensor = tensors[name, holder]
        if tensor is not current and current is not None:
            self.replaced[id(current)] = current, tensor
        return tensor

    def _tied_edits(self) -> Iterator[Edit]:
        """The same in places that are tied to one, of which no state says so."""
        for before, after in self.replaced.values():
            for module, name in self.look.everywhere(before):
                state = self.states.get(module)
                if state is None or state.find(name) is None:
                    yield tensor_edit(module, name, before, after)

    def _tensor_edits(self, after: Mapping[nn.Module, list[tuple[str, Any]]]) -> Iterator[Edit]:
        """Flags, gradients and marks of every parameter on these modules."""
        seen: dict[int, tuple[Tensor, list[Place]]] = {}
        for module, items in after.items():
            for name, tensor in items:
                if tensor is not None:
                    seen.setdefault(id(tensor), (tensor, []))[1].append((module, name))
            for tensor in module._parameters.values():  # which may go, and stand elsewhere still
                if tensor is not None and mark_of(tensor) is not None:
                    seen.setdefault(id(tensor), (tensor, []))
        came_from = {id(now): before for before, now in self.replaced.values() if now is not None}
        for tensor, here in seen.values():
            others = self.look.everywhere(tensor)
            if id(tensor) in came_from:
                others = [*others, *self.look.everywhere(came_from[id(tensor)])]
            places = [*here, *(p for p in dict.fromkeys(others) if p[0] not in after)]
            yield from self._flag_edits(tensor, places)

    def _flag_edits(self, tensor: Tensor, places: list[Place]) -> Iterator[Edit]:
        facts = [fact for place in places if (fact := _fact(self._new(place[0]), place[1]))]
        now = self.look.everywhere(tensor)
        before = [fact for m, name in now if (fact := _fact(self._old(m), name))]
        former = self._former(tensor, places)
        is_adapters = any(fact.is_adapters for fact in facts)
        was_adapters = any(fact.is_adapters for fact in before)
        if was_adapters and not is_adapters and tensor.grad is not None:  # a switch keeps it
            yield (put_gradient, tensor, None, tensor.grad, None)
        if not facts:  # no call reaches it any more
            if former is not None:
                yield from training_edits(tensor, former)
            yield from unmarking_edits(tensor)
            return
        trains = any(fact.trains for fact in facts)
        is_new = not before or any(fact.trains for fact in before) is not trains  # else the user's
        sets = self.flags in ("owned", "switched") and is_adapters
        if is_new or self.flags == "all" or sets:
            yield from training_edits(tensor, trains, keeps_gradient=self.flags == "switched")
        is_base = not is_adapters or any(self._is_base(*place) for place in places)
        if (former is not None and is_base) or len(places) > 1:
            yield from marking_edits(tensor, former, places)

    def _new(self, module: nn.Module) -> State | None:
        return self.every[module] if module in self.every else state_of(module)

    def _old(self, module: nn.Module) -> State | None:
        return self.look.states.get(module) or state_of(module)

    def _former(self, tensor: Tensor, places: list[Place]) -> bool | None:
        """The flag from before any call; None of what was not there then."""
        if (mark := mark_of(tensor)) is not None and mark.flag is not None:
            return mark.flag
        known = (
            state.before.flag(name)
            for module, name in places
            for state in (self._old(module), self._new(module))
            if state is not None
        )
        return next((flag for flag in known if flag is not None), None)

    def _is_base(self, module: nn.Module, name: str) -> bool:
        """Whether the base's own tensor stands there, which adapters train in place."""
        state = self.states.get(module)
        return state is not None and any(
            state.homes(trained).get(trained.original or BASE) == name for trained in state.trained
        )


def _homes(state: State | None) -> list[tuple[Trained, str, str]]:
    """What trains in place, with each of its owners and the name of that one's tensor."""
    trained = state.trained if state else ()
    return [(t, who, home) for t in trained for who, home in state.homes(t).items()]  # type: ignore[union-attr]


def _fact(state: State | None, name: str) -> Fact | None:
    """What is known of the tensor under a name; None where there is no state to know it."""
    if state is None:
        return None
    known = (Fact(trains, True) for n, _, trains in owned(state) if n == name)
    return next(known, Fact(False, False))


def _placing_edits(module: nn.Module, after: Arrangement) -> Iterator[Edit]:
    parameters, buffers = module._parameters, module._buffers
    for owner, items in ((parameters, after.parameters), (buffers, after.buffers)):
        if not len(owner) and not items:
            continue
        now: dict[str, Any] = dict(owner.items())
        keeps = type(module).__setattr__ is not nn.Module.__setattr__  # a list of them (nn.LSTM)
        moved = [(n, now[n], t) for n, t in items if n in now and now[n] is not t]
        comes_or_goes = list(now) != [name for name, _ in items]
        for name, old, new in moved if keeps or not comes_or_goes else ():
            yield tensor_edit(module, name, old, new)
        if comes_or_goes:  # last, so that taking it back, interrupted or not, comes first
            yield from items_edits(owner, items)
    own = module._non_persistent_buffers_set
    if own != after.unsaved:
        yield (put_members, own, None, frozenset(own), frozenset(after.unsaved))


def stand_in(trained: Trained, like: Tensor | None) -> Tensor | None:
    """A new tensor with the former value, frozen, like the one in the place."""
    value = trained.former
    if value is None:
        return None
    like = value if like is None else like
    with torch.inference_mode(False):  # where it could never train
        value = value.to(like.device, like.dtype, copy=True)
        if is_distributed(like):
            value = shards(value, like)
        return nn.Parameter(value, requires_grad=False) if trained.is_parameter else value
