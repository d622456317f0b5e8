"""What others have done to an adapted layer since, and what a call on it cannot do any more.

Each function raises a LoRAInjectError with the path and the remedy, or returns nothing.
"""

from typing import Any

from torch import nn

from lora_inject.compat.marks import (
    forward_below,
    has_accelerate_hook,
    is_fully_sharded,
    kept_forwards,
)
from lora_inject.core.class_swap import does_as_its_class, is_intact, is_unparametrized
from lora_inject.core.state import State
from lora_inject.core.state_parts import Trained
from lora_inject.errors import LoRAInjectError
from lora_inject.own import own_tensor


def require_parameters(path: str, layer: nn.Module, state: State) -> None:
    """Refuse a layer of which an adapter has lost a parameter."""
    own = layer._parameters
    for adapter in state.adapters:
        for name in adapter.parameters:
            if name not in own:
                raise LoRAInjectError(
                    f"its {name} is no parameter of it any more: something has pruned, normed or "
                    "parametrized it since.",
                    path=path,
                    remedy="Undo that first.",
                )


def require_switchable(path: str, layer: nn.Module, state: State) -> None:
    """Refuse a layer without an adapter in use that cannot run one any more."""
    if not is_intact(layer):
        raise LoRAInjectError(
            f"its class became {type(layer).__name__} while none of its adapters was in use.",
            path=path,
            remedy="Put the adapters in use before that (fully_shard, parametrize).",
        )
    own, kept = state.before.cls.forward, layer.__dict__.get("forward")
    known = kept is None or has_accelerate_hook(layer) or does_as_its_class(layer, state)
    if not known and forward_below(layer) is own:
        raise LoRAInjectError(
            "while none of its adapters was in use, a tool has kept the forward of its class, "
            "which would bypass them.",
            path=path,
            remedy="Take the tool's hook off (del layer.forward), and put it on again with the "
            "adapters in use.",
        )
    parameters: Any = layer._parameters
    for adapter in state.adapters:
        if any(parameters[name].dtype.itemsize < 2 for name in adapter.parameters):
            raise LoRAInjectError(
                f"its adapter {adapter.name!r} was cast to 8 bits while it was not in use, and its "
                "values are gone.",
                path=path,
                remedy="Remove it and load it again; in use, it keeps its dtype.",
            )


def require_intact(path: str, layer: nn.Module, state: State) -> None:
    """Refuse a layer whose class or forward something has changed, or whose adapter it holds."""
    if is_fully_sharded(layer):
        raise LoRAInjectError(
            "FSDP shards and gathers its adapter and would go on doing so.",
            path=path,
            remedy="Save the adapter on all ranks, and load it into a model that is not sharded.",
        )
    if has_accelerate_hook(layer) and any(
        layer.get_parameter(name).is_meta for a in state.adapters for name in a.parameters
    ):
        raise LoRAInjectError(
            "accelerate has offloaded its adapter, and its hook would look for it.",
            path=path,
            remedy="Call accelerate.hooks.remove_hook_from_submodules(model) first.",
        )
    if has_own_forward(layer, state):
        raise LoRAInjectError(
            "a forward was set on this very instance after inject, and it would go on adding.",
            path=path,
            remedy="Remove it first (del layer.forward).",
        )
    if not (is_intact(layer) or is_unparametrized(layer, state)):
        raise LoRAInjectError(
            f"its class is now {type(layer).__name__}, put there after inject.",
            path=path,
            remedy="Undo that first, or strip before it is done.",
        )


def has_own_forward(layer: nn.Module, state: State) -> bool:
    """Whether a forward was set on the instance that does not do what its class does."""
    return "forward" in layer.__dict__ and not (
        has_accelerate_hook(layer)
        or "forward" in kept_forwards(layer)
        or does_as_its_class(layer, state)
    )


def require_restorable(module: nn.Module, trained: Trained) -> None:
    """Refuse a place of a module whose former value cannot come back."""
    tensor, former = own_tensor(module, trained.name), trained.former
    what = f"the former value of {trained.text(module)}"
    places = module._parameters if trained.is_parameter else module._buffers
    if trained.name not in places or (trained.is_parameter and tensor is None):
        kind = "parameter" if trained.is_parameter else "buffer"
        raise LoRAInjectError(
            f"{what} has no place any more: it is no {kind} of its module now.",
            remedy="Undo what replaced it (a parametrization, say) first.",
        )
    if former is not None and former.is_meta and tensor is not None and not tensor.is_meta:
        raise LoRAInjectError(
            f"{what} is not known: the model was on the meta device when inject was called.",
            remedy="Load the base weights, call reset_lora_parameters, then train.",
        )
    if is_fully_sharded(module):
        raise LoRAInjectError(
            f"{what} cannot be put back: FSDP manages the parameter now.",
            remedy="Save the adapter on all ranks, and load it into a model without FSDP.",
        )
    if not trained.is_parameter or tensor is None or former is None:
        return
    if tensor.shape != former.shape:
        raise LoRAInjectError(
            f"{what} has the shape {tuple(former.shape)}, and the parameter now "
            f"{tuple(tensor.shape)}.",
            remedy="Undo the resizing first.",
        )
