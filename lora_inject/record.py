"""What a model was before it was adapted, and the way back: the only code that restores.

A ``Record`` is one private attribute of the module that ``inject`` was called on. It refers to
modules by object and to parameters by their owner and name, so it follows deep copies, pickling,
``.to()`` and wrappers, which rename paths or replace parameters but keep modules.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.adapter import Adapter, state_of
from lora_inject.checkpointing import checkpointed, hook, unhook
from lora_inject.in_place import Place, Slot, own_tensor
from lora_inject.layer import change, detach
from lora_inject.refusals import require_intact, require_kept, require_no_block
from lora_inject.settings import BiasMode
from lora_inject.statistics import has_statistics, hold, is_held

RECORD = "_lora_inject_record"
TRAINED = "_lora_inject_trained"  # marks modules of which something trains in place


@dataclass
class Before:
    """The flags that modules had before one call changed them."""

    training: dict[nn.Module, bool] = field(default_factory=dict)
    requires_grad: dict[nn.Module, dict[str, bool]] = field(default_factory=dict)
    held: dict[nn.Module, bool] = field(default_factory=dict)

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Keep each module's ``training``, its parameters' ``requires_grad``, and what is held."""
        for module in modules:
            self.training[module] = module.training
            self.requires_grad[module] = {
                name: p.requires_grad for name, p in module._parameters.items() if p is not None
            }
            if has_statistics(module):
                self.held[module] = is_held(module)

    def restore(self) -> None:
        """Put the flags back; the parameters are those that have the names now."""
        for module, training in self.training.items():
            module.training = training
        for module, flags in self.requires_grad.items():
            for name, flag in flags.items():
                parameter = own_tensor(module, name)
                if parameter is not None:
                    parameter.requires_grad_(flag)
        for module, held in self.held.items():
            hold(module, held)

    def precede(self, older: "Before") -> None:
        """Take over what an earlier call kept; where both know a thing, the earlier is right."""
        self.training = self.training | older.training
        self.held = self.held | older.held
        newer, known = self.requires_grad, older.requires_grad
        self.requires_grad = {m: newer.get(m, {}) | known.get(m, {}) for m in {**newer, **known}}


@dataclass
class Mode:
    """What trains with one adapter besides its A and B.

    Attributes:
        bias: the bias mode.
        train_also: the modules that train in full, as they were selected.
    """

    bias: BiasMode = "none"
    train_also: list[nn.Module] = field(default_factory=list)

    @property
    def in_full(self) -> set[nn.Module]:
        """The ``train_also`` modules with everything inside of them."""
        return {module for top in self.train_also for module in top.modules()}


@dataclass
class Record:
    """Everything that was done to a model.

    Attributes:
        adapters: each adapter on each layer with the path of its target.
        before: the flags that the model had.
        slots: what trains in place, by the owner and name of every place.
        modes: the adapters' bias modes and ``train_also`` modules.
        in_use: the names of the adapters in use, with their weights.
        training: the names of the adapters that train.
        hooked: the modules with a hook of ours, for the sake of gradient checkpointing.
        lent: the attributes that a trainer's callback has put on modules.
        created: when, so that records of nested modules are undone in the right order.
    """

    adapters: list[tuple[str, nn.Module, Adapter]] = field(default_factory=list)
    before: Before = field(default_factory=Before)
    slots: dict[nn.Module, dict[str, Slot]] = field(default_factory=dict)
    modes: dict[str, Mode] = field(default_factory=dict)
    in_use: dict[str, float] = field(default_factory=dict)
    training: set[str] = field(default_factory=set)
    hooked: list[nn.Module] = field(default_factory=list)
    lent: list[tuple[nn.Module, str]] = field(default_factory=list)
    created: int = field(default_factory=time.time_ns)

    @property
    def layers(self) -> dict[nn.Module, None]:
        """The adapted layers, each once, in the order in which they were adapted."""
        return {layer: None for _, layer, _ in self.adapters}

    def adopt(self, older: "Record", path: str) -> None:
        """Take over an earlier record, of the same module or of a submodule at the path."""
        prefix = f"{path}." if path else ""
        self.adapters += [(prefix + name, m, a) for name, m, a in older.adapters]
        self.before.precede(older.before)
        for module, slots in older.slots.items():
            self.slots[module] = {**self.slots.get(module, {}), **slots}
        for name, mode in older.modes.items():
            own = self.modes.setdefault(name, Mode(mode.bias))
            own.train_also = [*mode.train_also, *own.train_also]
        self.in_use = {**self.in_use, **older.in_use}
        self.training = self.training | older.training
        self.lent = self.lent + older.lent

    def tie(self) -> None:
        """Let tied layers share their A and B again, which ``to_empty`` takes apart."""
        leaders = {(a.path, a.name, a.seed): (m, a) for _, m, a in self.adapters if not a.follows}
        for _, layer, adapter in self.adapters:
            if adapter.follows:
                leader, first = leaders[adapter.follows, adapter.name, adapter.seed]
                for name, shared in zip(adapter.parameters, first.parameters, strict=True):
                    layer._parameters[name] = leader.get_parameter(shared)

    def all_slots(self) -> Iterator[Slot]:
        """Every slot once."""
        found = {slot: None for slots in self.slots.values() for slot in slots.values()}
        return iter(found)

    def slot(self, places: list[Place]) -> Slot:
        """The slot of a tensor that is registered in these places; a new one if there is none."""
        known = [s for m, name in places if (s := self.slots.get(m, {}).get(name)) is not None]
        slot = known[0] if known else Slot(places)
        for module, name in places:
            self.slots[module] = {**self.slots.get(module, {}), name: slot}
            module.__dict__[TRAINED] = True
        return slot

    def disown(self, adapters: Iterable[str]) -> None:
        """Take away what these adapters trained in place."""
        for slot in self.all_slots():
            for name in slot.trains.keys() & set(adapters):
                slot.disown(name)
        self.forget_unowned_slots()

    def forget_unowned_slots(self) -> None:
        """Drop the slots that no adapter owns any more."""
        owned = {m: {n: s for n, s in own.items() if s.trains} for m, own in self.slots.items()}
        for module in [module for module, own in owned.items() if not own]:
            module.__dict__.pop(TRAINED, None)
        self.slots = {module: own for module, own in owned.items() if own}

    def check_restorable(self, values: bool = True) -> None:
        """Refuse before anything is changed.

        Args:
            values: whether former values are to come back too.

        Raises:
            LoRAInjectError: something else has changed a layer's class since, or a former value
                cannot be put back.
        """
        for path, layer, _ in self.adapters:
            require_intact(path, layer)
            require_no_block(path, layer)
            if values:
                require_kept(path, layer)
        if values:
            for slot in self.all_slots():
                slot.check_restorable()

    def forget_values(self) -> None:
        """Give up the former values, so that restoring leaves what was merged and trained."""
        for slot in self.all_slots():
            if slot.inside is not None:
                slot.keep_former()
        for layer in self.layers:
            change(layer, former={}, folded=frozenset())

    def restore(self) -> None:
        """Make the model what it was."""
        for _, layer, adapter in self.adapters:
            put_back_merged(layer)
            detach(layer, adapter)
        self.disown(self.modes)
        self.before.restore()


def put_back_merged(layer: nn.Module) -> None:
    """Give merged weights their former values, bit for bit, and let their adapters run."""
    state = state_of(layer)
    if state is None or not state.folded:
        return
    for name, former in state.former.items():
        weight = own_tensor(layer, name)
        assert former is not None, "check_restorable has refused this"
        assert weight is not None
        exchange(weight, former)
    change(layer, former={}, folded=frozenset())


@torch.no_grad()
def exchange(tensor: Tensor, value: Tensor) -> None:
    """Make a value that of a tensor by its storage, cast where ``.to()`` came between.

    What the tensor held is not written to; its version counts up, so that autograd notices.
    """
    tensor.set_(value.to(tensor.device, tensor.dtype))  # type: ignore[call-overload]


Holders = list[tuple[str, nn.Module, Record]]  # the path of a record's module, it, the record


def install(look: Any, record: Record) -> None:
    """Put the record on the model, in place of those of its submodules, which it has adopted."""
    record.hooked = checkpointed(look.index.modules)
    reinstall(look.holders, [("", look.model, record)])


def reinstall(former: Holders, holders: Holders) -> None:
    """Make these the records in a model, in place of former ones, and theirs the hooks in it."""
    for _, holder, _ in former:
        holder.__dict__.pop(RECORD, None)
    for _, holder, record in holders:
        holder.__dict__[RECORD] = record
    hooked = {module: None for _, _, record in holders for module in record.hooked}
    had = [module for _, _, record in former for module in record.hooked]
    unhook(module for module in had if module not in hooked)
    hook(hooked)


def set_in_use(record: Record, weights: dict[str, float]) -> None:
    """Let these of the record's adapters run, with their weights, and no others."""
    record.in_use = {name: weight for name, weight in weights.items() if name in record.modes}
    for layer in record.layers:
        change(layer, in_use=record.in_use)


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    """Set ``requires_grad``, and drop the gradient of what is frozen.

    A stale gradient costs memory, and an optimizer would go on updating the parameter by it.
    """
    for parameter in parameters:
        if parameter.requires_grad is not trainable:
            parameter.requires_grad = trainable
        if not trainable:
            parameter.grad = None


def lend(record: Record, module: nn.Module, name: str, value: Any) -> None:
    """Put an attribute on an adapted model for a while; it goes with the adapters at the latest."""
    module.__dict__[name] = value
    record.lent.append((module, name))


def uninstall(module: nn.Module) -> None:
    """Take the record off the module, and the hooks and attributes that it lists."""
    record: Record = module.__dict__.pop(RECORD)
    unhook(record.hooked)
    for owner, name in record.lent:
        owner.__dict__.pop(name, None)
