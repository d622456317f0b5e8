"""Hooks of ours, known by their function: no handle follows a copy or a pickled model."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_inject.changes.edits import Edit, items_edits


def has_hook(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether a forward pre-hook stands on the module."""
    return any(other is hook for other in module._forward_pre_hooks.values())


def pre_hook_edits(
    module: nn.Module, hook: Callable[..., Any], on: bool, *, first: bool = False
) -> list[Edit]:
    """Put a forward pre-hook on a module that has it not, or take it off.

    Args:
        module: the module.
        hook: a function of a module of ours. One that comes first gets no keyword arguments, and
            one that does not gets them.
        on: whether it is to be there.
        first: whether it comes before all others.
    """
    hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    ours = {key for key, other in hooks.items() if other is hook}
    kept = [item for item in hooks.items() if item[0] not in ours]
    kwargs = [item for item in with_kwargs.items() if item[0] not in ours]
    if on:
        key = _new_key()
        kept = [(key, hook), *kept] if first else [*kept, (key, hook)]
        kwargs = kwargs if first else [*kwargs, (key, True)]
    return [*items_edits(hooks, kept), *items_edits(with_kwargs, kwargs)]


def after_hook_edits(module: nn.Module, hook: Callable[..., Any], on: bool) -> list[Edit]:
    """Put a forward hook on a module that is called after an error too, or take it off."""
    hooks, always = module._forward_hooks, module._forward_hooks_always_called
    ours = {key for key, other in hooks.items() if other is hook}
    kept = [item for item in hooks.items() if item[0] not in ours]
    called = [item for item in always.items() if item[0] not in ours]
    if on:
        key = _new_key()
        kept, called = [*kept, (key, hook)], [*called, (key, True)]
    return [*items_edits(hooks, kept), *items_edits(always, called)]


def _new_key() -> int:
    """One that torch gives to no other hook."""
    return RemovableHandle(OrderedDict()).id
