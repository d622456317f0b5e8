"""What trains and what stands still: bias modes, modules that train in full, running statistics."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lora_inject.errors import UnsupportedLayerError
from lora_inject.layer import LoRALayer
from lora_inject.record import (
    Before,
    adapted_layers,
    adapter_parameters,
    gather,
    install,
    records_in,
    require_own_record,
    set_trainable,
)
from lora_inject.report import Report, report
from lora_inject.roles import is_bias
from lora_inject.selection import View
from lora_inject.settings import BiasMode, check_bias
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
    for layer in layers:
        if any(layer in top.modules() for top in in_full):
            raise UnsupportedLayerError("train_also: an adapted layer cannot train in full.")
    require_own_record(model)

    changes = Before()
    changes.keep_flags(model.modules())
    record = gather(model, changes)
    record.bias, record.train_also = bias, in_full
    mark(model, layers, bias, in_full, record.before, list(model.modules()))
    if records_in(model):
        install(model, record)
    return report(model)


mark_only_lora_as_trainable = freeze  # loralib's name


def select_in_full(view: View, train_also: Any) -> dict[str, nn.Module]:
    """The modules that ``train_also`` selects, by path."""
    if train_also is None or (isinstance(train_also, Sequence) and not train_also):
        return {}
    return view.trainable_modules("train_also", parse(train_also, "train_also"))


def mark(
    model: nn.Module,
    layers: Sequence[LoRALayer],
    bias: BiasMode,
    train_also: Sequence[nn.Module],
    before: Before,
    owners: Sequence[nn.Module],
) -> None:
    """Freeze what these owners hold, then let adapters, biases and ``train_also`` modules train.

    Args:
        model: the model, for the parameters that train.
        layers: the adapted layers whose A, B and (in mode "lora_only") biases train.
        bias: the bias mode.
        train_also: the modules that train in full.
        before: keeps the former value of everything that trains in place, and knows which
            parameters were frozen all along.
        owners: the modules to freeze: all of them, but for those an earlier call has decided about.
    """
    in_full = {module for top in train_also for module in top.modules()}
    in_place = [
        (module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and _can_train(parameter)
        if module in in_full
        or (
            is_bias(name)
            and (bias == "all" or (bias == "lora_only" and module in layers))
            and before.requires_grad[module].get(name, False)
        )
    ]
    statistics = [(module, name) for module in in_full for name in module._buffers]
    for module, name in [*in_place, *statistics]:
        before.keep_value(module, name)

    A, B = adapter_parameters(layers)
    trainable = A | B | {module.get_parameter(name) for module, name in in_place}
    set_trainable({p for m in owners for p in m.parameters(recurse=False)} - trainable, False)
    set_trainable(trainable, True)
    for module in in_full:
        before.release(module)
    for module in owners:
        if module not in in_full:
            hold_statistics(module, before)


def _can_train(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def hold_statistics(module: nn.Module, before: Before) -> None:
    """Keep the running statistics of a BatchNorm-like module from moving; how it normalises stays.

    torch's own layers have a switch for it. Any other module that owns ``running_...`` buffers gets
    two hooks that lend it copies of them for each forward pass in training mode.
    """
    moving = [name for name, b in module._buffers.items() if b is not None and _is_statistic(name)]
    if not moving:
        return
    if isinstance(module, _BatchNorm):
        if module.track_running_stats:  # in eval mode the statistics are used all the same
            before.change_attribute(module, "track_running_stats", False)
    elif isinstance(module, _InstanceNorm):
        before.change_attribute(module, "momentum", 0.0)
    elif module not in before.hooks:
        guard = _StatisticsGuard()
        before.keep_hook(module, module.register_forward_pre_hook(guard.lend_copies))
        after = module.register_forward_hook(guard.put_back, always_call=True)
        before.keep_hook(module, after)


def _is_statistic(name: str) -> bool:
    return name.startswith("running_") or name == "num_batches_tracked"


class _StatisticsGuard:
    """Holds the statistics of one module while it runs."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def lend_copies(self, module: nn.Module, args: Any) -> None:
        if module.training:
            buffers = module._buffers.items()
            self.kept = {n: b for n, b in buffers if b is not None and _is_statistic(n)}
            module._buffers.update({name: b.clone() for name, b in self.kept.items()})

    def put_back(self, module: nn.Module, args: Any, output: Any) -> None:
        module._buffers.update(self.kept)
        self.kept = {}
