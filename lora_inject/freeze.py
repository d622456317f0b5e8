"""What trains and what stands still: bias modes, modules that train in full, running statistics."""

from collections.abc import Iterable, Sequence, Sized
from typing import Any

from torch import nn

from lora_inject.errors import UnsupportedLayerError
from lora_inject.record import (
    Before,
    adapted_layers,
    adapter_parameters,
    former_flags,
    gather,
    install,
    records_in,
    require_awake,
    require_own_record,
    set_trainable,
)
from lora_inject.report import Report, report
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
        ArgumentError: an argument cannot be used.
        NoMatchError: a ``train_also`` pattern selects nothing that can train.
        UnsupportedLayerError: an adapted layer is to train in full.
        LoRAInjectError: the model is part of one that was adapted as a whole.
    """
    bias = check_bias(bias)
    in_full = list(select_in_full(View(model), train_also).values())
    layers = list(adapted_layers(model).values())
    if {module for top in in_full for module in top.modules()} & set(layers):
        raise UnsupportedLayerError("train_also: an adapted layer cannot train in full.")
    require_own_record(model)
    require_awake(model)

    changes = Before()
    changes.keep_flags(model.modules())
    mark(model, layers, bias, in_full, changes, list(model.modules()))
    if records_in(model):
        record = gather(model, changes)
        record.bias, record.train_also = bias, in_full
        install(model, record)
    return report(model)


mark_only_lora_as_trainable = freeze  # loralib's name


def is_given(patterns: Any) -> bool:
    """Whether an optional argument of patterns holds any."""
    return not (patterns is None or (isinstance(patterns, Sized) and len(patterns) == 0))


def select_in_full(view: View, train_also: Any) -> dict[str, nn.Module]:
    """The modules that ``train_also`` selects, by path."""
    if not is_given(train_also):
        return {}
    return view.trainable_modules("train_also", parse(train_also, "train_also"))


def mark(
    model: nn.Module,
    layers: Iterable[nn.Module],
    bias: BiasMode,
    train_also: Sequence[nn.Module],
    changes: Before,
    owners: Sequence[nn.Module],
) -> None:
    """Freeze what these owners hold, then let adapters, biases and ``train_also`` modules train.

    Args:
        model: the model, for the parameters that train.
        layers: the adapted layers whose A, B and (in mode "lora_only") biases train.
        bias: the bias mode.
        train_also: the modules that train in full.
        changes: keeps the former value of everything that trains in place.
        owners: the modules to freeze: all of them, but for those an earlier call has decided about.
    """
    layers, former = set(layers), former_flags(model)
    in_full = {module for top in train_also for module in top.modules()}
    in_place = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.is_floating_point() or parameter.is_complex())
        if module in in_full
        or (
            (bias == "all" or (bias == "lora_only" and module in layers))
            and is_bias(module, name)
            and former[module].get(name, False)
        )
    ]
    statistics = [(module, name) for module in in_full for name in module._buffers]
    for module, name in [*((m, n) for m, n, _ in in_place), *statistics]:
        changes.keep_value(module, name)

    A, B = adapter_parameters(layers)
    trainable = A | B | {parameter for _, _, parameter in in_place}
    set_trainable({p for m in owners for p in m.parameters(recurse=False)} - trainable, False)
    set_trainable(trainable, True)
    for module in {*owners, *in_full}:
        if has_statistics(module):
            hold(module, module not in in_full)
