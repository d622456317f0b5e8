"""What a forward pass keeps for its backward pass, counted where nothing is computed.

The model's own forward runs on the meta device, and every storage that autograd keeps is counted
once. With tensor parallelism each storage is followed from the weights it comes from, as it may be
divided among the devices.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lora_inject.capacity.shards import Products, blocks
from lora_inject.capacity.without_values import as_on_accelerators
from lora_inject.compat.torch_private import is_functorch_wrapped, tells_of_hooks, tree_leaves
from lora_inject.core.state import adapters_of
from lora_inject.errors import LoRAInjectError
from lora_inject.report.bytes import stored_tensors

# What a model finds when it looks at values that are not there: no padding, nothing packed, nothing
# infinite.
_CHECKS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}


class Saved(NamedTuple):
    """Bytes that are held from the forward to the backward pass.

    Attributes:
        total: all of it; products that adapted layers make again of their factors are not kept.
        checkpointed: what is kept where each block is computed again in the backward pass: what
            stands in no block (embeddings, the head, the loss), the blocks' inputs, and one block,
            with its products, as hooks stand between autograd and what it keeps then.
        largest: the largest tensor that is kept.
        outputs: what the forward returns and is not kept for another reason.
    """

    total: int
    checkpointed: int
    largest: int
    outputs: int


def saved_for_backward(
    model: nn.Module,
    inputs: Any,
    products: Mapping[Tensor, Products],
    tp: int,
) -> Saved:
    """Run a model's forward on the meta device and count what it keeps for the backward pass.

    Args:
        model: a copy of ``on_meta``.
        inputs: its arguments: a mapping of names, a tuple or a tensor, on the meta device.
        products: how the products of its weights are divided; the others' are not.
        tp: among how many devices.

    Raises:
        LoRAInjectError: the forward depends on values, or cannot use these inputs.
    """
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    listed = () if named else (inputs if isinstance(inputs, tuple) else (inputs,))
    tape = _Tape(model, products)
    try:
        with (
            tape.hooks(),
            as_on_accelerators(),
            torch.enable_grad(),
            saved_tensors_hooks(tape.pack, lambda tensor: tensor),
            tape,
        ):
            output = model(*listed, **named)
    except LoRAInjectError:
        raise
    except Exception as error:  # a forward can fail in as many ways as there are models
        text = str(error).strip().split("\n")[0]
        raise LoRAInjectError(
            f"the forward of {type(model).__name__} cannot run without values: "
            f"{type(error).__name__}: {text}",
            remedy="Give it other inputs= from Python, if they are what is wrong.",
        ) from error
    return tape.result(output, tp)


@dataclass
class _Kept:
    """A storage, where it was first kept, and whether each device has a part or makes it again."""

    storage: torch.UntypedStorage
    block: int | None
    split: bool
    made_again: bool = False

    def bytes(self, tp: int) -> int:
        return math.ceil(self.storage.nbytes() / (tp if self.split else 1))


class _Known(NamedTuple):
    """What tensor parallelism makes of a tensor, and whether it is made of weights alone."""

    storage: torch.UntypedStorage  # held, so that no later one has its address
    products: Products | None
    weight: bool


class _Tape(TorchFunctionMode):
    """Notes what is kept for the backward pass, and follows what is divided through operations.

    Column-wise weights divide their products, everything computed from those is divided too, and
    row-wise weights make it whole again. What is computed of weights alone (casts of A and B, W +
    B A) counts as a weight.
    """

    def __init__(self, model: nn.Module, products: Mapping[Tensor, Products]) -> None:
        super().__init__()
        self._blocks = blocks(model)
        self._adapted = [module for module in model.modules() if adapters_of(module)]
        self._in_adapted = self._in_operation = False
        self._products_of_kept: set[int] = set()
        self._block: int | None = None
        self._kept: dict[int, _Kept] = {}
        self._inputs: dict[int, _Kept] = {}
        self._now: Products | None = None  # what the operation that runs now returns
        self._known: dict[int, _Known] = {}
        self._own: set[int] = set()
        for tensor in [*model.parameters(), *model.buffers()]:
            for part in (tensor, *stored_tensors(tensor)):
                storage = part.untyped_storage()
                self._own.add(storage._cdata)
                self._known[storage._cdata] = _Known(storage, products.get(tensor), True)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Be told which block runs, and with which inputs, and when an adapted layer does."""
        handles = []
        for layer in self._adapted:
            handles += [
                layer.register_forward_pre_hook(partial(self._run_adapted, True)),
                layer.register_forward_hook(partial(self._run_adapted, False), always_call=True),
            ]
        for index, block in enumerate(self._blocks):
            handles += [
                block.register_forward_pre_hook(self._enter(index), with_kwargs=True),
                block.register_forward_hook(self._leave, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int) -> Any:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in _tensors((args, kwargs)):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._own:
                    kept = _Kept(storage, None, self._is_split(storage))
                    self._inputs.setdefault(storage._cdata, kept)
            self._block = index

        return enter

    def _leave(self, *_: Any) -> None:
        self._block = None

    def _run_adapted(self, begins: bool, *_: Any) -> None:
        self._in_adapted = begins

    def pack(self, tensor: Tensor) -> Tensor:
        """Called by autograd with each tensor that it keeps."""
        for part in stored_tensors(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in self._own:
                kept = _Kept(
                    storage, self._block, self._is_split(storage), self._is_made_again(part)
                )
                first = self._kept.setdefault(storage._cdata, kept)
                first.made_again = first.made_again and kept.made_again
        return tensor

    def _is_made_again(self, tensor: Tensor) -> bool:
        """Whether it is a product that a Function of an adapted layer makes again of its factors.

        Other readers are operations, or stand in no adapted layer (``arithmetic/factors.py``).
        """
        storage = tensor.untyped_storage()
        own_function = self._in_adapted and not self._in_operation
        whole = tensor._version == 0 and tensor.nbytes == storage.nbytes()
        return own_function and whole and storage._cdata in self._products_of_kept

    def _is_split(self, storage: torch.UntypedStorage) -> bool:
        known = self._known.get(storage._cdata)
        return (self._now if known is None else known.products) == "split"

    def result(self, output: Any, tp: int) -> Saved:
        """The bytes on one of so many devices."""
        returned = {
            storage._cdata: _Kept(storage, None, self._is_split(storage))
            for storage in (tensor.untyped_storage() for tensor in _tensors(output))
            if storage._cdata not in self._own | self._kept.keys()
        }
        by_block: dict[int | None, int] = {None: 0}
        for key, kept in self._kept.items():
            if key not in self._inputs:
                by_block[kept.block] = by_block.get(kept.block, 0) + kept.bytes(tp)
        outside = by_block.pop(None) + sum(kept.bytes(tp) for kept in self._inputs.values())
        sizes = [kept.bytes(tp) for kept in self._kept.values()]
        # Where weights are DTensors, a layer and its adapters are no Function of ours.
        makes_again = tp == 1 and tells_of_hooks
        again = [k.bytes(tp) for k in self._kept.values() if k.made_again and makes_again]
        return Saved(
            total=sum(sizes) - sum(again),
            checkpointed=outside + max(by_block.values(), default=0) if sizes else 0,
            largest=max(sizes, default=0),
            outputs=sum(kept.bytes(tp) for kept in returned.values()),
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CHECKS and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.tensor(_CHECKS[func])
        read = _tensors((args, kwargs))
        known = [self._known.get(tensor.untyped_storage()._cdata) for tensor in read]
        weight = bool(known) and all(k is not None and k.weight for k in known)
        found = {k.products for k in known if k is not None}
        self._now = _products(found, weight or len(known) == 1)
        # What an adapted weight does of itself, and is no tensor, is not one operation.
        self._in_operation = all(issubclass(kind, Tensor) for kind in types)
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._in_operation = False
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self._known[storage._cdata] = _Known(storage, self._now, weight)
                if _keeps_both_factors(tensor, read):
                    self._products_of_kept.add(storage._cdata)
        self._now = None
        return result


def _products(found: set[Products | None], inherits: bool) -> Products | None:
    """How what comes of tensors with these kinds of products is divided."""
    if "whole" in found:
        return "whole" if inherits else None
    return "split" if "split" in found else None


def _keeps_both_factors(result: Tensor, read: Sequence[Tensor]) -> bool:
    """Whether it is an elementwise product whose factors are kept for each other's gradients."""
    if result.grad_fn is None or result.grad_fn.name() != "MulBackward0" or len(read) != 2:
        return False
    return all(
        t.requires_grad and t.shape == result.shape and t.dtype == result.dtype for t in read
    )


def _tensors(tree: Any) -> Sequence[Tensor]:
    # Those inside torch.func.vmap (masks are made there) have no storage of their own.
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [tensor for tensor in tensors if not is_functorch_wrapped(tensor)]
