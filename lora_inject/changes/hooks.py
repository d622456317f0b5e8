"""Hooks of ours, known by their function: no handle follows a copy or a pickled model."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_inject.changes.edits import Edit, items_edits


def pre_hook_edits(
    module: nn.Module, hook: Callable[..., Any], on: bool, *, first: bool = False
) -> list[Edit]:
    """Put a forward pre-hook on a module that has it not, or take it off.

    Args:
        module: the module.
        hook: a function of a module of ours, of the module, its arguments and keyword arguments.
        on: whether it is to be there.
        first: whether it comes before all others; it gets no keyword arguments then.
    """
    hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    return _hook_edits(hooks, with_kwargs, hook, on, first=first)


def after_hook_edits(module: nn.Module, hook: Callable[..., Any], on: bool) -> list[Edit]:
    """The same with a forward hook, which is called after an error too."""
    return _hook_edits(module._forward_hooks, module._forward_hooks_always_called, hook, on)


def _hook_edits(
    hooks: Any, marked: Any, hook: Callable[..., Any], on: bool, *, first: bool = False
) -> list[Edit]:
    """Edits of a dict of hooks, and of the one that marks all but a hook that comes first."""
    ours = {key for key, other in hooks.items() if other is hook}
    if bool(ours) is on:
        return []
    kept = [item for item in hooks.items() if item[0] not in ours]
    marks = [item for item in marked.items() if item[0] not in ours]
    if on:
        key = new_key()
        kept = [(key, hook), *kept] if first else [*kept, (key, hook)]
        marks = marks if first else [*marks, (key, True)]
    return [*items_edits(hooks, kept), *items_edits(marked, marks)]


def new_key() -> int:
    """The key of a hook, one that torch gives to no other hook."""
    return RemovableHandle(OrderedDict()).id
