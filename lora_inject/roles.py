"""What each parameter of a model is: A, B, a bias, part of a module that trains in full, or other.

And from that what an optimizer should get.
"""

from typing import Any

from torch import nn

from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.record import adapted_layers, adapter_parameters, records_in

ADAPTER_ROLES = ("lora_A", "lora_B")
ROLES = (*ADAPTER_ROLES, "bias", "train_also", "other")


def is_bias(owner: nn.Module, name: str) -> bool:
    """Whether a module uses its parameter of this name as a bias.

    ``bias``, ``in_proj_bias``, ``bias_ih_l0``, ``q_bias``: the owner's own name for it decides, so
    that ``relative_attention_bias.weight`` is a weight. A matrix is one only beside the weight it
    belongs to (``gate_up_proj_bias`` of fused experts) or in ``nn.MultiheadAttention``, ``bias_k``.
    """
    if not (name == "bias" or name.startswith("bias_") or name.endswith("_bias")):
        return False
    parameter = owner._parameters[name]
    if parameter is None or parameter.dim() <= 1:
        return True
    return name.removesuffix("_bias") in owner._parameters or (
        isinstance(owner, nn.MultiheadAttention)
    )


def roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """The role of every parameter, each once, in registration order."""
    A, B = adapter_parameters(adapted_layers(model).values())
    in_full = {
        parameter
        for _, _, record in records_in(model)
        for mode in record.modes.values()
        for module in mode.train_also
        for parameter in module.parameters()
    }
    biases = _biases(model)
    members = {"lora_A": A, "lora_B": B, "train_also": in_full, "bias": biases}
    return {
        p: next((role for role, group in members.items() if p in group), "other")
        for p in model.parameters()
    }


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Everything that trains, each parameter once: adapters, trainable biases, ``train_also``.

    Example:
        >>> optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-4)  # doctest: +SKIP

    Raises:
        LoRAInjectError: nothing trains, so that an optimizer would have nothing to do.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise LoRAInjectError("no parameter of this model trains.", remedy="Call inject first.")
    return parameters


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups of exactly what trains: A, B, biases and ``train_also``.

    B learns at ``lr * lr_ratio``: LoRA+ (arXiv 2402.12354) trains faster with a ratio of about 16.
    Biases, those inside ``train_also`` modules included, get no weight decay.

    Example:
        >>> groups = param_groups(model, lr=2e-4, weight_decay=0.01, lr_ratio=16)  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(groups)  # doctest: +SKIP

    Args:
        model: an adapted model.
        lr: learning rate of everything but B, above 0.
        weight_decay: of everything but biases, at least 0.
        lr_ratio: learning rate of B divided by that of A, above 0.

    Returns:
        Groups with the keys name, params, lr and weight_decay; empty ones are left out.

    Raises:
        ArgumentError: a number is out of range.
        LoRAInjectError: nothing trains.
    """
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio)):
        if not value > 0:
            raise ArgumentError(f"{name} must be above 0, not {value!r}.")
    if not weight_decay >= 0:
        raise ArgumentError(f"weight_decay must be at least 0, not {weight_decay!r}.")
    trainable, role_of, biases = lora_parameters(model), roles(model), _biases(model)
    named: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for parameter in trainable:
        named["bias" if parameter in biases else role_of[parameter]].append(parameter)
    return [
        {
            "name": role,
            "params": parameters,
            "lr": lr * lr_ratio if role == "lora_B" else lr,
            "weight_decay": 0.0 if role == "bias" else weight_decay,
        }
        for role, parameters in named.items()
        if parameters
    ]


def _biases(model: nn.Module) -> set[nn.Parameter]:
    waiting = [
        module._parameters[name]
        for _, _, record in records_in(model)
        for slot in record.all_slots()
        if slot.places[0][1] in slot.places[0][0]._parameters and is_bias(*slot.places[0])
        for module, name in slot.waiting
    ]
    return {p for p in waiting if p is not None} | {
        parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_bias(module, name)
    }
