"""Several adapters in one model: which of them are in use, and taking one out."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_inject.core.look import Look
from lora_inject.errors import ArgumentError
from lora_inject.in_place import Slot, show
from lora_inject.layer import detach
from lora_inject.record import (
    Record,
    set_in_use,
    set_trainable,
    uninstall,
)
from lora_inject.refusals import require_switchable
from lora_inject.settings import check_names, check_weights
from lora_inject.statistics import has_statistics, hold


def use(model: nn.Module, *adapters: Any, train: Any = None) -> nn.Module:
    """Choose the adapters that run: one, several that add up, weighted ones, or none.

    Biases and ``train_also`` modules that an adapter trained are swapped in with it. Layers on
    which none of the chosen adapters stands have their own classes and cost what they cost before.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2, adapter="fr")
        >>> _ = inject(model, nn.Linear, r=4, adapter="de")
        >>> _ = use(model, "fr")  # only this one
        >>> _ = use(model, "fr", "de")  # the sum
        >>> _ = use(model, {"fr": 0.7, "de": 0.3})  # a weighted sum, computed at run time
        >>> _ = use(model)  # none: the base model

    Args:
        model: an adapted model.
        adapters: names, or one mapping of names to finite weights.
        train: the names of those that train, in use or not; None for those in use. All other
            adapters are frozen.

    Returns:
        The same object.

    Raises:
        ArgumentError: an adapter is not known, or two own the same bias or ``train_also`` module,
            which cannot be added up, or one that owns some has a weight other than 1.
        LoRAInjectError: the model has no adapters, they are merged, or it is inside a block that
            decides what runs. Nothing has changed then.
    """
    one_mapping = len(adapters) == 1 and isinstance(adapters[0], Mapping)
    given = adapters[0] if one_mapping else dict.fromkeys(check_names(adapters, "adapters"), 1.0)
    wanted = check_weights(given)
    look = Look(model)
    if not look.records:
        look.require_own_record()
    look.require_adapters()
    training = set(wanted if train is None else check_names(train, "train"))
    look.require_known(wanted, "adapters")
    look.require_known(training, "train")
    look.require_awake()
    for record in look.records:
        for path, layer, _ in record.adapters:
            require_switchable(path, layer)
    slots = {slot: _owner(slot, wanted) for slot in look.slots}

    show(look, slots)
    for record in look.records:
        set_in_use(record, wanted)
        record.training = training & record.modes.keys()
        set_training(record)
    return model


def remove(model: nn.Module, adapters: Any) -> nn.Module:
    """Take adapters out, exactly: what is left is as if they had never been there.

    The base's own tensors get back the values from before, for biases and modules that only these
    adapters trained. With the last adapter everything comes back that ``strip`` brings back.

    Example:
        >>> remove(model, "fr")  # doctest: +SKIP

    Args:
        model: an adapted model.
        adapters: a name or several.

    Returns:
        The same object.

    Raises:
        ArgumentError: an adapter is not known.
        LoRAInjectError: they are merged, the model is inside a block that decides what runs, or a
            former value cannot be put back. Nothing has changed then.
    """
    names = check_names(adapters, "adapters")
    look = Look(model)
    look.require_own_record()
    look.require_known(names, "adapters")
    look.require_intact()
    look.require_awake()
    for slot in look.slots:
        if slot.trains.keys() & set(names):
            slot.check_restorable()

    for _, holder, record in look.holders:
        if record.modes.keys() <= set(names):
            record.restore()
            uninstall(holder)
        elif record.modes.keys() & set(names):
            _remove(record, set(names))
    return model


def _remove(record: Record, names: set[str]) -> None:
    """Take some of a record's adapters out; others are left."""
    for _, layer, adapter in record.adapters:
        if adapter.name in names:
            detach(layer, adapter)
    record.disown(names)
    record.adapters = [item for item in record.adapters if item[2].name not in names]
    record.training = record.training - names
    for name in names & record.modes.keys():
        for module in record.modes.pop(name).in_full:
            if has_statistics(module):
                hold(module)
    set_in_use(record, record.in_use)
    set_training(record)


def set_training(record: Record) -> None:
    """Let the record's training adapters train, with what they own, and freeze the others."""
    for _, layer, adapter in record.adapters:
        own: Any = layer._parameters
        parameters = [own[name] for name in adapter.parameters]
        set_trainable(parameters, adapter.name in record.training)
    for slot in record.all_slots():
        owners = {
            slot.tensor(n): trains and n in record.training for n, trains in slot.trains.items()
        }
        for tensor in (slot.current, *owners):
            if isinstance(tensor, nn.Parameter):
                set_trainable([tensor], owners.get(tensor, False))
    modes = record.modes
    moving = set[nn.Module]().union(
        *(modes[n].in_full for n in record.training & record.in_use.keys() & modes.keys())
    )
    for mode in modes.values():
        for module in mode.in_full:
            if has_statistics(module):
                hold(module, module not in moving)


def _owner(slot: Slot, wanted: Mapping[str, float]) -> str | None:
    """The adapter in use whose tensor is to stand in the slot.

    Raises:
        ArgumentError: there are two, or it is to count with a weight.
    """
    owners = [name for name in wanted if name in slot.trains]
    if len(owners) > 1:
        raise ArgumentError(
            f"{owners[0]!r} and {owners[1]!r} both trained {slot.text}, which cannot be added up.",
            remedy="Use one of them at a time.",
        )
    if owners and wanted[owners[0]] != 1.0:
        raise ArgumentError(
            f"{owners[0]!r} trained {slot.text}, which cannot count with a weight.",
            remedy="Use it with a weight of 1.",
        )
    return owners[0] if owners else None
