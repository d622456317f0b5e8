"""What an optimizer should get: exactly what trains, in groups."""

from typing import Any

from torch import nn

from lora_inject.core.drift import warn_of_drift
from lora_inject.core.look import Look
from lora_inject.core.roles import ROLES, biases, roles
from lora_inject.errors import ArgumentError, LoRAInjectError, warn

# Decay would shrink the layer itself by them.
_UNDECAYED = ("bias", "lora_magnitude")


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Everything that trains, each parameter once: adapters, trainable biases, ``train_also``.

    Build the optimizer after ``inject``: one that was built before has none of A and B, and what it
    has is frozen, so that its steps change nothing. A model without adapters, all of which trains,
    is a warning.

    Example:
        >>> report = inject(model, "q_proj")  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-4)  # doctest: +SKIP

    Raises:
        LoRAInjectError: nothing trains, so that an optimizer would have nothing to do, or the
            model is merged, so that nothing would reach the adapters.
    """
    return _trainable(Look(model))


def _trainable(look: Look) -> list[nn.Parameter]:
    look.require_unmerged()
    warn_of_drift(look, "gone", "thawed", "frozen", "class")
    parameters = [p for p in look.parameters if p.requires_grad]
    if not parameters:
        raise LoRAInjectError("no parameter of this model trains.", remedy="Call inject first.")
    if not look.states and len(parameters) == len(look.parameters):
        warn(
            "the model has no adapters, and these are all of its parameters. Call inject first, "
            "and make the optimizer after it."
        )
    return parameters


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    lr_ratio: float = 1.0,
    lr_embedding: float | None = None,
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
        weight_decay: of everything but biases and magnitudes (of DoRA), at least 0.
        lr_ratio: learning rate of B divided by that of A, above 0.
        lr_embedding: learning rate of all that an adapter has on an embedding, which LoRA+ wants
            small (1e-6), above 0, in a group of its own; None for the rates of the others.

    Returns:
        Groups with the keys name, params, lr and weight_decay; empty ones are left out.

    Raises:
        ArgumentError: a number is out of range.
        LoRAInjectError: nothing trains, or the model is merged.
    """
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio), ("lr_embedding", lr_embedding)):
        if value is not None and not value > 0:
            raise ArgumentError(f"{name} must be above 0, not {value!r}.")
    if not weight_decay >= 0:
        raise ArgumentError(f"weight_decay must be at least 0, not {weight_decay!r}.")
    look = Look(model)
    trainable, role_of, without_decay = _trainable(look), roles(look), biases(look)
    apart = set() if lr_embedding is None else _of_embeddings(look)
    named: dict[str, list[nn.Parameter]] = {role: [] for role in (*ROLES, "embedding")}
    for parameter in trainable:
        role = "bias" if parameter in without_decay else role_of[parameter]
        own = parameter in apart and role not in _UNDECAYED
        named["embedding" if own else role].append(parameter)
    rates = {"lora_B": lr * lr_ratio, "embedding": lr_embedding}
    return [
        {
            "name": role,
            "params": parameters,
            "lr": rates.get(role, lr),
            "weight_decay": 0.0 if role in _UNDECAYED else weight_decay,
        }
        for role, parameters in named.items()
        if parameters
    ]


def _of_embeddings(look: Look) -> set[nn.Parameter]:
    """What adapters have on embeddings."""
    return {
        layer.get_parameter(name)
        for layer, adapter in look.adapters
        if isinstance(layer, nn.Embedding)
        for name in adapter.parameters
    }
