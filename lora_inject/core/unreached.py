"""Adapters that no gradient can reach are named in the first step under DistributedDataParallel.

It waits for a gradient of every parameter, and fails in the second step with numbers for names.
Told from the graph behind what the model returns, once for each wrapper.
"""

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from lora_inject.changes.edits import Edit, items_edits
from lora_inject.changes.hooks import new_key
from lora_inject.compat.torch_private import tree_leaves
from lora_inject.core.look import Look
from lora_inject.core.state import State
from lora_inject.errors import warn
from lora_inject.printing import few

# In its reentrant form a checkpointed part shows nothing of what is in it.
_CLOSED = "CheckpointFunctionBackward"
_looked: WeakSet[DistributedDataParallel] = WeakSet()


def unreached_edits(module: nn.Module, old: State | None, state: State | None) -> list[Edit]:
    """Let what ``inject`` was called on look at its graph, in a program of several processes."""
    on = bool(state and state.reach.roots)
    hooks = module._forward_hooks
    kept = [item for item in hooks.items() if item[1] is not _look]
    if on and (len(kept) < len(hooks) or (old and old.reach.roots) or not _is_distributed()):
        return []
    return items_edits(hooks, [*kept, (new_key(), _look)] if on else kept)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _look(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: the first time under a wrapper, say which adapters get no gradient."""
    if is_compiling() or not torch.is_grad_enabled():
        return
    wrapper = _wrapper_that_calls()
    if wrapper is None or wrapper in _looked:
        return
    _looked.add(wrapper)
    if wrapper.find_unused_parameters or wrapper.static_graph:
        return
    reached = _reached(output)
    look = Look(module)
    left = [
        path
        for path, layer in look.layers.items()
        for name in {n for term in look.states[layer].running for n in term.names.values()}
        if reached and (own := layer._parameters.get(name)) is not None
        if own.requires_grad and id(own) not in reached
    ]
    if paths := list(dict.fromkeys(left)):
        warn(
            f"{few(paths)}: no gradient reaches its adapter from what the model "
            "returns, and DistributedDataParallel will fail in the next step, as it waits for one. "
            "Exclude it, or wrap the model with find_unused_parameters=True."
        )


def _wrapper_that_calls() -> DistributedDataParallel | None:
    """The wrapper whose forward has called the model."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is DistributedDataParallel.forward.__code__:
            found: DistributedDataParallel = frame.f_locals["self"]
            return found
        frame = frame.f_back
    return None


def _reached(output: Any) -> set[int]:
    """The ids of the parameters that a gradient reaches; none where that cannot be told."""
    found = set[int]()
    for node in nodes_behind(t for t in tree_leaves(output) if isinstance(t, Tensor)):
        if node.name() == _CLOSED:
            return set()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
    return found


def nodes_behind(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the graph that some tensors hang on, each once."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        new = [below for below, _ in node.next_functions if below is not None and below not in seen]
        seen.update(new)
        nodes += new
