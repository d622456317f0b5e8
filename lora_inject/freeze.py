"""What trains and what stands still: bias modes, modules that train in full, running statistics."""

from typing import Any

from torch import nn

from lora_inject.core.look import Look
from lora_inject.core.request import optional_patterns
from lora_inject.core.training import in_place, mark, take
from lora_inject.errors import ArgumentError, UnsupportedLayerError
from lora_inject.record import Before, Mode, Record, install
from lora_inject.report import Report, report_of
from lora_inject.selection import View
from lora_inject.settings import BiasMode, check_bias


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
    patterns = optional_patterns(train_also, "train_also")
    in_full = list(View(look).trainable_modules("train_also", patterns).values())
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


def _adapters_in_use(record: Record) -> set[nn.Parameter]:
    return {
        layer.get_parameter(name)
        for _, layer, adapter in record.adapters
        if adapter.name in record.in_use
        for name in adapter.parameters
    }
