"""Gradient checkpointing: no block loses its gradients because its input needs none.

``torch.utils.checkpoint`` in its reentrant form returns something that needs a gradient only if an
input of the block does. With everything before the first block frozen none does, and the adapters
inside would silently not train. A hook on each block that can be checkpointed lets its input need a
gradient then; it changes no value, and does nothing at other times.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import Edit
from lora_inject.changes.hooks import after_hook_edits, pre_hook_edits
from lora_inject.compat.marks import checkpointing_switch, may_be_reentrant


def is_checkpointed(module: nn.Module) -> bool:
    """Whether it has the switch by which transformers and diffusers checkpoint a module."""
    return isinstance(checkpointing_switch(module), bool)


def checkpointing_edits(module: nn.Module, on: bool) -> list[Edit]:
    """Put the hook on a module that can be checkpointed, or take it off."""
    return pre_hook_edits(module, _let_input_need_gradient, on)


def _let_input_need_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The inputs with the first floating-point one needing a gradient, where that is necessary."""
    # The compiler has a checkpointing of its own, which is not reentrant.
    if torch.compiler.is_compiling() or not _is_on(module) or not torch.is_grad_enabled():
        return None
    values: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if not tensors or any(tensor.requires_grad for tensor in tensors.values()):
        return None
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    key = next(iter(tensors))
    values[key] = tensors[key].detach().requires_grad_()
    return tuple(values[i] for i in range(len(args))), {name: values[name] for name in kwargs}


def _is_on(module: nn.Module) -> bool:
    """Whether the module is checkpointed now, in a form that may be the reentrant one."""
    on = bool(checkpointing_switch(module)) and module.training
    return on and may_be_reentrant(module)


def is_needed_early(module: nn.Module) -> bool:
    """Whether gradients are let flow from before the first layer that trains, for checkpoints."""
    asked = any(hook is _let_output_need_gradient for hook in module._forward_hooks.values())
    return asked or bool(checkpointing_switch(module))  # transformers has a hook of its own then


def needing_edits(module: nn.Module, on: bool) -> list[Edit]:
    """Let what a module returns need a gradient while it trains, or no more."""
    return after_hook_edits(module, _let_output_need_gradient, on)


def _let_output_need_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
        return None
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor) or first.requires_grad or not first.is_floating_point():
        return None
    needing = first.detach().requires_grad_()
    return needing if first is output else type(output)([needing, *output[1:]])
