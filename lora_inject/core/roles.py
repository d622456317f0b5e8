"""What each parameter of a model is: A, B, a bias, part of what trains in full, or other."""

from torch import nn

from lora_inject.core.look import Look
from lora_inject.kinds.bias import is_bias

ADAPTER_ROLES = ("lora_A", "lora_B")
ROLES = (*ADAPTER_ROLES, "bias", "train_also", "other")


def roles(look: Look) -> dict[nn.Parameter, str]:
    """The role of every parameter, each once, in registration order."""
    found = dict.fromkeys(look.parameters, "other")
    found |= dict.fromkeys(biases(look), "bias")
    for module in look.in_full:
        found |= {p: "train_also" for p in module._parameters.values() if p is not None}
    for layer, state in look.own.items():
        for pair in (pair for adapter in state.adapters for pair in adapter.pairs):
            found |= {tensor: f"lora_{role}" for role, tensor in pair.tensors(layer).items()}
    return found


def biases(look: Look) -> set[nn.Parameter]:
    """Every bias, those included that wait while another adapter's stands in their place."""
    waiting = [
        module._parameters[name]
        for module, trained, name in look.waiting()
        if trained.is_parameter and is_bias(module, trained.name)
    ]
    return {p for p in waiting if p is not None} | {
        parameter
        for module in look.index.modules
        for name, parameter in module._parameters.items()
        if parameter is not None and is_bias(module, name)
    }
