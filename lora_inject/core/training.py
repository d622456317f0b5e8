"""What trains besides A and B: what is found in the model for a bias mode, and marked so."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from lora_inject.core.look import Look
from lora_inject.errors import UnsupportedLayerError
from lora_inject.in_place import Place, own_tensor
from lora_inject.placements import is_placeholder
from lora_inject.record import Record, set_trainable
from lora_inject.roles import is_bias
from lora_inject.settings import BiasMode
from lora_inject.statistics import has_statistics, hold


def in_place(
    look: Look,
    layers: Iterable[nn.Module],
    bias: BiasMode,
    train_also: Sequence[nn.Module],
) -> dict[Place, bool]:
    """What is to train in place, and whether it trains itself or only moves, as statistics do.

    Args:
        look: the model.
        layers: the layers whose biases mode "lora_only" names.
        bias: the bias mode.
        train_also: the modules that train in full.
    """
    if bias == "none" and not train_also:
        return {}
    layers, former = set(layers), look.former_flags
    waiting = {place for slot in look.slots for place in slot.waiting}
    in_full = {module for top in train_also for module in look.index.below(top)}
    found = {
        (module, name): True
        for module in look.index.modules
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.is_floating_point() or parameter.is_complex())
        if (module, name) not in waiting
        if module in in_full
        or (
            (bias == "all" or (bias == "lora_only" and module in layers))
            and is_bias(module, name)
            and former[module].get(name, False)
        )
    }
    for module, name in found:
        if is_placeholder(module._parameters[name]):  # type: ignore[arg-type]
            raise UnsupportedLayerError(
                f"{name} of a {type(module).__name__} is to train in place, and ZeRO-3 has "
                "partitioned it, so that its former value cannot be kept.",
                remedy="Call inject inside deepspeed.zero.GatheredParameters(model.parameters()).",
            )
    statistics = [(module, name) for module in in_full for name in module._buffers]
    return found | {place: False for place in statistics if place not in waiting}


def take(
    look: Look,
    record: Record,
    adapter: str,
    tensors: Mapping[Place, bool],
    inside: bool = True,
) -> None:
    """Make an adapter an owner of these tensors; one in use stands inside, and is the only one."""
    places = look.tensor_places if tensors else {}
    for (module, name), trains in tensors.items():
        tensor = own_tensor(module, name)
        slot = record.slot(places.get(id(tensor), [(module, name)]))
        slot.own(adapter, trains, inside)


def mark(
    look: Look,
    owners: Collection[nn.Module],
    adapters: set[nn.Parameter],
    tensors: Mapping[Place, bool],
    train_also: Sequence[nn.Module],
) -> None:
    """Freeze what these owners hold, then let what is to train do so.

    Args:
        look: the model.
        owners: the modules to freeze: all of them, but for those an earlier call has decided about.
        adapters: the A and B that train.
        tensors: what trains in place.
        train_also: the modules that train in full.
    """
    own = {own_tensor(module, name) for (module, name), trains in tensors.items() if trains}
    trainable = adapters | {p for p in own if isinstance(p, nn.Parameter)}
    held = {p for module in owners for p in module._parameters.values() if p is not None}
    set_trainable(held - trainable, False)
    set_trainable(trainable, True)
    in_full = {module for top in train_also for module in look.index.below(top)}
    for module in {*owners, *in_full}:
        if has_statistics(module):
            hold(module, module not in in_full)
