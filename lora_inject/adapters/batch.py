"""Which rows of a batch the first dimension of a layer's input counts.

A model's batch is known where its forward begins. Where that has more entries than there are rows,
each row may have been expanded in place, as ``repeat_interleave`` does for beams: the inputs tell,
and layers inside then see as many. Parts that read no token ids, where the model's batch is one of
those (the image tower of a vision-language model), have rows of their own, even where there happen
to be as many.
"""

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import Edit
from lora_inject.changes.hooks import after_hook_edits, pre_hook_edits
from lora_inject.compat.marks import reads_token_ids
from lora_inject.compat.torch_private import tree_leaves
from lora_inject.core.index import Index
from lora_inject.core.output_heads import find_heads


class Batch:
    """The rows that a model computes.

    Args:
        model: the model that a block was entered with.
        rows: how many rows it is given.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model, self.rows = model, rows
        self._times = 1  # how many entries each row was last expanded to
        self._caches: list[weakref.ref[Any]] = []  # what that call was given besides tensors
        self._running = 0  # how many calls of the model's forward have begun and not ended
        # One object each: that is how hooks are found again.
        self._hooks = self._begin, self._end
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]

    def edits(self, on: bool) -> list[Edit]:
        """Follow the model's forward, or follow it no more."""
        begin, end = self._hooks
        before = pre_hook_edits(self.model, begin, on)
        return [*before, *after_hook_edits(self.model, end, on)]

    def times(self, entries: int) -> int | None:
        """How many entries in a row a layer sees of each row; None where that cannot be told.

        Args:
            entries: the size of the first dimension of the layer's input.
        """
        if entries == self.rows and (self._times == 1 or not self._running):
            return 1
        return self._times if entries == self.rows * self._times else None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running += 1
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ordered = [given.pop(name) for name in self._names if name in given]
        leaves = tree_leaves([ordered, list(given.values())])
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim()]
        entries = tensors[0].shape[0] if tensors else 0
        # A call that goes on from there, as generate does with its cache, shows it no more.
        caches = [leaf for leaf in leaves if _is_cache(leaf)]
        goes_on = any(known() is cache for known in self._caches for cache in caches)
        if entries == self.rows * self._times and goes_on:
            return
        times, left = divmod(entries, self.rows)
        batched = [tensor for tensor in tensors if tensor.shape[0] == entries]
        self._times = times if times > 1 and not left and _is_expanded(batched, self.rows) else 1
        self._caches = [weakref.ref(cache) for cache in caches]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running -= 1


def _is_cache(leaf: Any) -> bool:
    """Whether an argument may hold what a call leaves for the next one."""
    return (
        not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__") and hasattr(leaf, "__weakref__")
    )


def _is_expanded(tensors: Sequence[Tensor], rows: int) -> bool:
    """Whether the entries of each row are next to each other, and the tensors show that."""
    if any(tensor.is_meta for tensor in tensors):
        return False
    next_to = all(
        _are_equal(tensor.detach().reshape(rows, -1, *tensor.shape[1:]), 1) for tensor in tensors
    )
    return next_to and not all(
        _are_equal(tensor.detach().reshape(-1, rows, *tensor.shape[1:]), 0) for tensor in tensors
    )


def _are_equal(tensor: Tensor, dim: int) -> bool:
    """Whether everything along a dimension is the same."""
    return torch.equal(tensor, tensor.narrow(dim, 0, 1).expand_as(tensor))


def apart(index: Index) -> set[nn.Module]:
    """The modules of a model whose batch is not that of its token ids.

    Known for models of transformers, which say what they read; of what joins models that read
    different things (projections) nothing is known, but for the output heads.
    """
    reads = {path: reads_token_ids(module) for path, module in index.by_path.items()}
    models = {path for path, read in reads.items() if read is not None}
    others = {path for path in models if not reads[path]}
    found, heads = set[nn.Module](), None
    for path, module in index.by_path.items() if others else ():
        around = [above for above in _prefixes(path) if above in models]
        if not around or not reads[around[0]]:
            continue
        if not all(reads[above] for above in around):
            found.add(module)
        elif any(other.startswith(f"{around[-1]}.".lstrip(".")) for other in others):
            heads = find_heads(index.named) if heads is None else heads
            if module not in heads:
                found.add(module)
    return found


def _prefixes(path: str) -> list[str]:
    """A path and those of the modules around it, from the model itself on."""
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
