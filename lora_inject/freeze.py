"""What trains and what stands still: bias modes, modules that train in full, running statistics."""

from collections.abc import Collection, Iterable, Sequence, Sized
from typing import Any

from torch import nn

from lora_inject.core.look import Look
from lora_inject.errors import ArgumentError, UnsupportedLayerError
from lora_inject.in_place import Place, own_tensor
from lora_inject.placements import is_placeholder
from lora_inject.record import Before, Mode, Record, install, set_trainable
from lora_inject.report import Report, report_of
from lora_inject.roles import is_bias
from lora_inject.selection import View
from lora_inject.settings import BiasMode, check_bias
from lora_inject.statistics import has_statistics, hold
from lora_inject.targets import parse


def freeze(model: nn.Module, bias: BiasMode = "none", train_also: Any = ()) -> Report:
    """Leave only A and B, the biases of this mode and ``train_also`` modules trainable.

    Everything else gets ``requires_grad=False`` and loses its ``.grad``, and the running statistics
    of frozen BatchNorm-like layers stand still in training mode too (they still normalise by the
    batch there, as before). ``inject`` has done this already; call it to change the mode later. On
    an injected model ``strip`` undoes it; on any other nothing remembers, as with
    ``requires_grad_(False)``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> report = freeze(model, bias="all")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.bias', '1.bias']

    Args:
        model: any ``nn.Module``.
        bias: "none", "all" (every bias in the model) or "lora_only" (biases of adapted layers).
            Biases that were frozen before stay frozen.
        train_also: patterns for modules that train in full, such as a new head.

    Returns:
        The report of what trains now.

    Raises:
        ArgumentError: an argument cannot be used, or several adapters are in use, of which only one
            could own what trains in place.
        NoMatchError: a ``train_also`` pattern selects nothing that can train.
        UnsupportedLayerError: an adapted layer is to train in full.
        LoRAInjectError: the model is part of one that was adapted as a whole.
    """
    bias = check_bias(bias)
    look = Look(model)
    in_full = list(select_in_full(View(look), train_also).values())
    if any(module in look.states for top in in_full for module in look.index.below(top)):
        raise UnsupportedLayerError("train_also: an adapted layer cannot train in full.")
    look.require_own_record()
    look.require_awake()
    look.require_same_use()

    changes = Before()
    changes.keep(look.index.modules)
    record = look.gathered(changes)
    used = [layer for _, layer, a in record.adapters if a.name in record.in_use]
    tensors = in_place(look, used, bias, in_full)
    if record.adapters and tensors and list(record.in_use.values()) != [1.0]:
        raise ArgumentError(
            f"{len(record.in_use)} adapters are in use, and what trains in place belongs to one, "
            "with a weight of 1.",
            remedy='Name that one first: use(model, "default").',
        )
    for slot in record.all_slots():
        slot.trains |= dict.fromkeys(slot.trains.keys() & record.in_use.keys(), False)
    for name in record.in_use:
        record.modes[name] = Mode(bias, in_full)
        take(look, record, name, tensors)
    mark(look, look.index.modules, _adapters_in_use(record), tensors, in_full)
    if record.adapters:
        record.training = set(record.in_use)
        install(look, record)
    return report_of(look.again())


mark_only_lora_as_trainable = freeze  # loralib's name


def is_given(patterns: Any) -> bool:
    """Whether an optional argument of patterns holds any."""
    return not (patterns is None or (isinstance(patterns, Sized) and len(patterns) == 0))


def select_in_full(view: View, train_also: Any) -> dict[str, nn.Module]:
    """The modules that ``train_also`` selects, by path."""
    if not is_given(train_also):
        return {}
    return view.trainable_modules("train_also", parse(train_also, "train_also"))


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
    tensors: dict[Place, bool],
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
    tensors: dict[Place, bool],
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


def _adapters_in_use(record: Record) -> set[nn.Parameter]:
    return {
        layer.get_parameter(name)
        for _, layer, adapter in record.adapters
        if adapter.name in record.in_use
        for name in adapter.parameters
    }
