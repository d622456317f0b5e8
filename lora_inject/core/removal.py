"""The way back: the states of a model without some of its adapters, or without any."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from lora_inject.changes.edits import Edit, value_edit
from lora_inject.changes.statistics import conversion_edits
from lora_inject.core.commit import commit
from lora_inject.core.look import Look
from lora_inject.core.state import Fresh, State
from lora_inject.core.state_parts import Reach, Trained
from lora_inject.core.tensor_marks import mark_of, places_of
from lora_inject.errors import warn
from lora_inject.own import own_tensor
from lora_inject.settings import BASE


def remove_adapters(
    look: Look,
    names: Collection[str],
    *,
    keep: bool = False,
    values: Collection[Edit] = (),
) -> None:
    """Take adapters out of a model; where the last call on a module goes, it is what it was.

    Args:
        look: the model.
        names: the adapters.
        keep: leave the values that are there, merged and trained ones.
        values: edits of values that come before.
    """
    leaving = [(m, trained) for m, trained in look.trained if trained.owners.keys() & names]
    if not keep:
        look.require_restorable(leaving)
    for module, trained in leaving:
        look.require_all_places(module, trained)
    removal = _Removal(look, frozenset(names), keep)
    new = {m: removal.state(m, s) for m, s in look.states.items()}
    gone = dict.fromkeys(_marked_elsewhere(look))  # no state, and no adapter any more
    lost = _replaced(look, new)
    converted = [  # by convert_sync_batchnorm: other modules in the places of those that were held
        edit
        for parent, _, module in look.index.children
        if module not in look.states and parent in new and new[parent] is None
        for edit in conversion_edits(module)
    ]
    commit(
        look,
        {**gone, **new},
        fresh=removal.fresh,
        values=[*values, *removal.values.values(), *converted],
        modes=not keep,
    )
    if lost:
        warn(
            f"{lost[0]} is gone: something has replaced it since inject, and whether what did it "
            f"trains is left as it is{f' ({len(lost)} such places)' if lost[1:] else ''}."
        )


class _Removal:
    """What taking some adapters out makes of states and values.

    Args:
        look: the model.
        names: the adapters.
        keep: whether merged and trained values stay.
    """

    def __init__(self, look: Look, names: frozenset[str], keep: bool) -> None:
        self.look, self.names, self.keep = look, names, keep
        self.fresh: Fresh = {}
        self._ended: dict[int, set[int]] = {}  # by the reach
        self.values: dict[int, Edit] = {}  # by the tensor: tied ones are written once
        self.formers = look.loaded_formers(look.trained)

    def state(self, module: nn.Module, state: State) -> State | None:
        """The state of a module without the adapters; None for one that no call reaches then.

        What a call on something larger has frozen stays so.
        """
        reach, names, over = state.reach, self.names, self._over(state.reach)
        if state.merged and not self.keep:
            for name, former in state.merged.former.items():
                weight = own_tensor(module, name)
                assert former is not None, "require_kept has refused this"
                assert weight is not None
                self.values[id(weight)] = value_edit(weight, former)
        trained = [self._without(module, state, t) for t in state.trained]
        if len(over) == len(reach.injections):
            return None
        weights = {n: w for n, w in state.use.weights.items() if n not in names}
        return State(
            state.before,
            reach._replace(
                injections=tuple(i for i in reach.injections if i.id not in over),
                roots=reach.roots - over,
                in_full=tuple(n for n in reach.in_full if n not in names),
                tops=tuple(n for n in reach.tops if n not in names),
            ),
            state.use._replace(weights=weights, trains=state.use.trains - names),
            adapters=tuple(a for a in state.adapters if a.name not in names),
            trained=tuple(t for t in trained if t is not None),
        )

    def _over(self, reach: Reach) -> set[int]:
        """The ids of the calls that end; very many modules share a reach."""
        if id(reach) not in self._ended:
            own = (i for i in reach.injections if i.adapter in self.names)
            self._ended[id(reach)] = {i.id for i in own if i.id in self.look.roots}
        return self._ended[id(reach)]

    def _without(self, module: nn.Module, state: State, trained: Trained) -> Trained | None:
        owners = {n: trains for n, trains in trained.owners.items() if n not in self.names}
        original = trained.original
        stays = self.keep and state.holder(trained) in self.names  # whoever's tensor it is in now
        if original in self.names or stays:
            self._give_back(module, state, trained)
            original = None
        return replace(trained, owners=owners, original=original) if owners else None

    def _give_back(self, module: nn.Module, state: State, trained: Trained) -> None:
        """The base's own tensor gets back its value from before, or the one that is to stay."""
        tensor = self.look.tensor(module, trained, trained.original or BASE)
        value = self.formers.get(id(trained.former), trained.former)
        if self.keep:
            if state.holder(trained) == trained.original:
                return
            value = own_tensor(module, trained.name)
        if value is not None and value.is_meta:
            return
        if tensor is None or value is None:  # a buffer that came or went since
            like: Tensor | None = next((b for b in module._buffers.values() if b is not None), None)
            own = value if value is None or like is None else value.to(like.device)
            self.fresh.setdefault(module, {})[trained.name, BASE] = own
        else:
            self.values[id(tensor)] = value_edit(tensor, value.clone())


def _marked_elsewhere(look: Look) -> list[nn.Module]:
    """Modules without a state with a parameter that a call has seen in another place.

    Pruning and parametrizations move a parameter to another name or into a module of their own.
    """
    return [
        module
        for module in look.index.modules
        if module not in look.states and len(module._parameters)
        if any(p is not None and mark_of(p) is not None for p in module._parameters.values())
    ]


def _replaced(look: Look, states: Mapping[nn.Module, State | None]) -> list[str]:
    """Parameters that trained before any call and that are not in the model any more, by path."""
    gone = [
        (module, name)
        for module, state in look.states.items()
        if states[module] is None
        for name, flag in state.before.flags
        if flag and name not in module._parameters
    ]
    if not gone:
        return []
    seen = {place for p in look.parameters for place in places_of(mark_of(p))}
    return [look.index.path(m, n) for m, n in gone if (m, n) not in seen]
