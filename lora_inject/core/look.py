"""What a model is now: its modules, its adapters and what is known of them, found in one walk.

Every call looks once and passes the look down. A look changes nothing; after a change ``again``
looks at the same modules anew.
"""

from collections.abc import Iterable
from functools import cached_property

from torch import nn

from lora_inject.adapter import LayerState, state_of
from lora_inject.core.index import Index
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.in_place import Place, Slot
from lora_inject.kinds.base import STATE
from lora_inject.record import RECORD, TRAINED, Before, Record
from lora_inject.refusals import require_intact, require_kept, require_no_block, require_ready


class Look:
    """A model as it is when it is looked at.

    Attributes:
        model: the model.
        index: its modules with their paths.
    """

    def __init__(self, model: nn.Module, index: Index | None = None) -> None:
        self.model = model
        self.index = index or Index(model)

    def again(self) -> "Look":
        """The same modules as they are now, without another walk."""
        return Look(self.model, self.index)

    @cached_property
    def states(self) -> dict[nn.Module, LayerState]:
        """What is known of each adapted module."""
        found = ((module, state_of(module)) for module in self.index.modules)
        return {module: state for module, state in found if state is not None}

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The adapted layers by path, awake or not, whoever adapted them."""
        return {self.index.path(m): m for m, state in self.states.items() if state.adapters}

    @cached_property
    def holders(self) -> list[tuple[str, nn.Module, Record]]:
        """(path, module, record) of every record in the model, the newest first."""
        holders = [module for module in self.index.modules if RECORD in vars(module)]
        found = [(self.index.path(module), module, vars(module)[RECORD]) for module in holders]
        return sorted(found, key=lambda item: -item[2].created)

    @cached_property
    def records(self) -> list[Record]:
        """The records, the newest first."""
        return [record for _, _, record in self.holders]

    @cached_property
    def slots(self) -> list[Slot]:
        """What trains in place, each once."""
        return [slot for record in self.records for slot in record.all_slots()]

    @property
    def parameters(self) -> dict[nn.Parameter, None]:
        """Every parameter that is registered now, each once, in registration order."""
        return {
            parameter: None
            for module in self.index.modules
            for parameter in module._parameters.values()
            if parameter is not None
        }

    @cached_property
    def tensor_places(self) -> dict[int, list[Place]]:
        """Every place where a parameter or buffer is registered, by the id of the tensor."""
        places: dict[int, list[Place]] = {}
        for module in self.index.modules:
            for owned in (module._parameters, module._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((module, name))
        return places

    @cached_property
    def former_flags(self) -> dict[nn.Module, dict[str, bool]]:
        """``requires_grad`` of every parameter, by owner and name, before any call changed it."""
        now = Before()
        now.keep(self.index.modules)
        return self.gathered(now).before.requires_grad

    @cached_property
    def in_full(self) -> dict[nn.Module, str]:
        """The modules that train in full, with the name of the adapter that does it."""
        return {
            module: name
            for record in self.records
            for name, mode in record.modes.items()
            for top in mode.train_also
            for module in self.index.below(top)
        }

    def gathered(self, changes: Before) -> Record:
        """One record of everything that was done to the model, these changes being the last."""
        record = Record(before=changes)
        for path, _, older in self.holders:
            record.adopt(older, path)
        return record

    @cached_property
    def marks(self) -> dict[nn.Module, tuple[int, int]]:
        """What tells whether a module's state or record is still the one that was seen."""
        return {
            module: (id(vars(module).get(STATE)), id(vars(module).get(RECORD)))
            for module in self.index.modules
            if STATE in vars(module) or RECORD in vars(module)
        }

    def require_unchanged(self) -> None:
        """Refuse a model that has other modules or adapters now than when it was looked at.

        Raises:
            LoRAInjectError: it has.
        """
        now = Look(self.model)
        if now.index.by_path != self.index.by_path or now.marks != self.marks:
            raise LoRAInjectError(
                "the model has changed since the plan was made.", remedy="Call plan again."
            )

    def require_adapters(self) -> None:
        """Refuse a model without adapters.

        Raises:
            LoRAInjectError: it has none.
        """
        if not self.records:
            raise LoRAInjectError("the model has no adapters.", remedy="Call inject first.")

    def require_layers(self) -> None:
        """Refuse a model without adapted layers, whoever adapted them.

        Raises:
            LoRAInjectError: it has none.
        """
        if not self.states:
            raise LoRAInjectError("the model has no adapters.", remedy="Call inject first.")

    def require_own_record(self) -> None:
        """Refuse a part of a model that was adapted as a whole: the whole keeps the way back.

        Raises:
            LoRAInjectError: the model has adapted layers of which none of its records knows.
        """
        known = {layer for r in self.records for layer in (*r.layers, *r.slots)}
        for module in self.index.modules:
            if module not in known and (module in self.states or TRAINED in vars(module)):
                raise LoRAInjectError(
                    "it was adapted as part of a larger model.",
                    path=self.index.path(module),
                    remedy="Call this on the model that inject was called on.",
                )

    def require_known(self, names: Iterable[str], argument: str) -> None:
        """Refuse names of adapters that are not there.

        Raises:
            ArgumentError: one is not; the message starts with the argument's name.
        """
        known = {name for record in self.records for name in record.modes}
        for name in names:
            if name not in known:
                raise ArgumentError(
                    f"{argument}: there is no adapter {name!r}; known: {sorted(known)}."
                )

    def require_same_use(self) -> None:
        """Refuse parts of a model that were adapted on their own and use one adapter differently.

        Raises:
            LoRAInjectError: they do, so that they cannot become one.
        """
        for name in {name for record in self.records for name in record.modes}:
            if len({r.in_use.get(name) for r in self.records if name in r.modes}) > 1:
                raise LoRAInjectError(
                    f"parts of the model use the adapter {name!r} with different weights.",
                    remedy="Call use on the whole model first.",
                )

    def require_awake(self) -> None:
        """Refuse a model whose adapters are merged, or inside a block that changes what runs.

        Raises:
            LoRAInjectError: they are.
        """
        for module, state in self.states.items():
            if not state.is_plain:
                require_ready(self.index.path(module), module)

    def require_no_block(self) -> None:
        """Refuse a model inside a ``with disabled(...)`` or ``with per_row(...)`` block.

        Raises:
            LoRAInjectError: it is.
        """
        for module, state in self.states.items():
            if not state.is_plain:
                require_no_block(self.index.path(module), module)

    def require_kept(self) -> None:
        """Refuse a model of which a former weight is gone.

        Raises:
            LoRAInjectError: it was merged with ``keep=False``.
        """
        for module, state in self.states.items():
            if state.former:
                require_kept(self.index.path(module), module)

    def require_intact(self) -> None:
        """Refuse a model of which something else has changed an adapted layer.

        Raises:
            LoRAInjectError: a class, a forward or the adapters' parameters were changed.
        """
        for path, layer in self.layers.items():
            require_intact(path, layer)
