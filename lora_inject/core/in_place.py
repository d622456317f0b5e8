"""What trains besides A and B: what is found in the model for a bias mode, and ``train_also``."""

from collections.abc import Iterable, Sequence

from torch import nn

from lora_inject.core.look import Look
from lora_inject.errors import UnsupportedLayerError
from lora_inject.kinds.bias import is_bias
from lora_inject.own import Place
from lora_inject.settings import BiasMode
from lora_inject.sharding import is_placeholder


def in_place(
    look: Look,
    layers: Iterable[nn.Module],
    bias: BiasMode,
    train_also: Sequence[nn.Module],
) -> dict[Place, bool]:
    """What is to train in place: True for a parameter, False for a buffer that a forward updates.

    Args:
        look: the model.
        layers: the layers whose biases mode "lora_only" names.
        bias: the bias mode.
        train_also: the modules that train in full.
    """
    if bias == "none" and not train_also:
        return {}
    layers = set(layers)
    waiting = {(module, name) for module, _, name in look.waiting()}
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
            and look.former_flag(parameter)
        )
    }
    for module, name in found:
        if is_placeholder(module._parameters[name]):  # type: ignore[arg-type]
            raise UnsupportedLayerError(
                f"{name} of a {type(module).__name__} is to train in place, and ZeRO-3 has "
                "partitioned it, so that its former value cannot be kept.",
                remedy="Call inject inside deepspeed.zero.GatheredParameters(model.parameters()).",
            )
    # Of items, since the mapping of a scripted module is no iterable.
    statistics = [(module, name) for module in in_full for name, _ in module._buffers.items()]
    return found | {place: False for place in statistics if place not in waiting}
