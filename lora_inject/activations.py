"""What a forward pass keeps for its backward pass, counted on the meta device, where nothing is computed.

The model's own forward runs on a copy without values, and every storage that autograd keeps is
counted once. Two things are counted as an accelerator does them, not as the meta device would:
``scaled_dot_product_attention`` is one fused kernel, and dropout keeps one byte for each element.
"""

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_inject.errors import ArgumentError, LoRAInjectError

# What a model finds when it looks at values that are not there: no padding, nothing packed, nothing
# infinite.
_CHECKS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}

# How tensor parallelism divides what is computed with a weight: "split" products are divided among
# the devices (column-wise), "whole" ones are summed up on each (row-wise).
Products = Literal["split", "whole"]


@dataclass(frozen=True)
class Saved:
    """Bytes that are kept from the forward to the backward pass.

    Attributes:
        total: all of it.
        checkpointed: what is kept where each block is computed again in the backward pass: what
            stands in no block (embeddings, the head, the loss), the blocks' inputs, and one block.
        largest: the largest tensor.
    """

    total: int
    checkpointed: int
    largest: int


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
            _as_on_accelerators(),
            torch.enable_grad(),
            saved_tensors_hooks(tape.pack, lambda tensor: tensor),
            tape,
        ):
            model(*listed, **named)
    except LoRAInjectError:
        raise
    except Exception as error:  # a forward can fail in as many ways as there are models
        text = str(error).strip().split("\n")[0]
        raise LoRAInjectError(
            f"the forward of {type(model).__name__} cannot run without values: "
            f"{type(error).__name__}: {text}",
            remedy="Give it other inputs= from Python, if they are what is wrong.",
        ) from error
    return tape.result(tp)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model without values and in training mode, whatever the size of the model.

    Attention counts as a fused kernel and experts as one grouped product for all of them: what the
    other ways compute depends on values or is not what one would train with.
    """
    with _WithoutValues():
        twin = copy.deepcopy(model)
    for name, parameter in [*twin.named_parameters(), *twin.named_buffers()]:
        if not parameter.is_meta:
            raise LoRAInjectError("it cannot be moved to the meta device.", path=name)
    twin.train()
    for config in {id(c): c for m in twin.modules() if (c := getattr(m, "config", None))}.values():
        if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            config._attn_implementation = "sdpa"
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "grouped_mm"
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return twin


def example_inputs(model: nn.Module, batch: int, seq: int | None) -> dict[str, Tensor]:
    """Inputs of a transformers model, with labels where its head predicts tokens.

    Args:
        model: the model.
        batch: rows.
        seq: tokens in a row; None for a model that reads images.

    Raises:
        ArgumentError: ``seq`` is missing or out of place, or nothing tells what the model reads.
    """
    reads, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    names = inspect.signature(model.forward).parameters
    if reads == "pixel_values" and reads in names:
        if seq is not None:
            raise ArgumentError("seq: this model reads images, whose size its config says.")
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": torch.empty(shape, device="meta", dtype=_dtype(model))}
    if reads != "input_ids" or reads not in names:
        raise ArgumentError(
            f"inputs: nothing tells what {type(model).__name__} reads.",
            remedy="Call lora_inject.capacity(model, inputs) from Python.",
        )
    if seq is None:
        raise ArgumentError("seq: this model reads tokens; say how many there are in a row.")
    ids = torch.empty((batch, seq), device="meta", dtype=torch.long)
    heads = getattr(model, "get_output_embeddings", lambda: None)() is not None
    more = [*(["labels"] if heads else []), "token_type_ids", "decoder_input_ids"]
    return {"input_ids": ids} | {name: ids for name in more if name in names}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: what stands in its outermost lists, in registration order."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        return list(model.children())
    found = [block for child in model.children() for block in blocks(child)]
    return list(dict.fromkeys(found))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@dataclass
class _Kept:
    """A storage, where it was first kept, and whether each device has a part of it."""

    storage: torch.UntypedStorage
    block: int | None
    split: bool

    def bytes(self, tp: int) -> int:
        return math.ceil(self.storage.nbytes() / (tp if self.split else 1))


@dataclass
class _Known:
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
        self._block: int | None = None
        self._kept: dict[int, _Kept] = {}
        self._inputs: dict[int, _Kept] = {}
        self._now: Products | None = None  # what the operation that runs now returns
        self._known: dict[int, _Known] = {}
        self._own: set[int] = set()
        for tensor in [*model.parameters(), *model.buffers()]:
            storage = tensor.untyped_storage()
            self._own.add(storage._cdata)
            self._known[storage._cdata] = _Known(storage, products.get(tensor), True)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Be told which block runs, and with which inputs."""
        handles = []
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

    def pack(self, tensor: Tensor) -> Tensor:
        """Called by autograd with each tensor that it keeps."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            split = self._is_split(storage)
            self._kept.setdefault(storage._cdata, _Kept(storage, self._block, split))
        return tensor

    def _is_split(self, storage: torch.UntypedStorage) -> bool:
        known = self._known.get(storage._cdata)
        return (self._now if known is None else known.products) == "split"

    def result(self, tp: int) -> Saved:
        """The bytes on one of so many devices."""
        by_block: dict[int | None, int] = {None: 0}
        for key, kept in self._kept.items():
            if key not in self._inputs:
                by_block[kept.block] = by_block.get(kept.block, 0) + kept.bytes(tp)
        outside = by_block.pop(None) + sum(kept.bytes(tp) for kept in self._inputs.values())
        sizes = [kept.bytes(tp) for kept in self._kept.values()]
        return Saved(
            total=sum(sizes),
            checkpointed=outside + max(by_block.values(), default=0) if sizes else 0,
            largest=max(sizes, default=0),
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CHECKS and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.tensor(_CHECKS[func])
        known = [
            self._known.get(tensor.untyped_storage()._cdata) for tensor in _tensors((args, kwargs))
        ]
        weight = bool(known) and all(k is not None and k.weight for k in known)
        found = {k.products for k in known if k is not None}
        self._now = _products(found, weight or len(known) == 1)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self._known[storage._cdata] = _Known(storage, self._now, weight)
        self._now = None
        return result


def _products(found: set[Products | None], inherits: bool) -> Products | None:
    """How what comes of tensors with these kinds of products is divided."""
    if "whole" in found:
        return "whole" if inherits else None
    return "split" if "split" in found else None


def _tensors(tree: Any) -> Iterable[Tensor]:
    # Those inside torch.func.vmap (masks are made there) have no storage of their own.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not wrapped(leaf)]


class _WithoutValues(TorchFunctionMode):
    """Inside, deep copies of tensors are on the meta device, so that a copy takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        if func is Tensor.clone:  # what Parameter.__deepcopy__ calls
            return args[0].to("meta")
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_on_accelerators() -> Iterator[None]:
    """Let some functions keep what they keep there; a mode would not reach those inside others."""
    ours = {
        "scaled_dot_product_attention": _attention,
        "dropout": _dropout,
        "grouped_mm": _grouped_mm,
    }
    theirs = {name: getattr(F, name) for name in ours if hasattr(F, name)}
    for name in theirs:
        setattr(F, name, ours[name])
    try:
        yield
    finally:
        for name, function in theirs.items():
            setattr(F, name, function)


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, its output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        *rows, heads, tokens, _ = q.shape if q.dim() > 3 else (1, *q.shape)
        # The kernels write the heads of a token side by side.
        out = q.new_empty(*rows, tokens, heads, v.shape[-1]).transpose(-3, -2)
        logsumexp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        return out if q.dim() > 3 else out[0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """In place of ``F.scaled_dot_product_attention``."""
    result: Tensor = _Attention.apply(query, key, value, attn_mask)
    return result


class _GroupedProduct(torch.autograd.Function):
    """Keeps what a product keeps, in every dtype: on the meta device torch's own is for bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        for_x, for_weights, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weights else None, weights if for_x else None, offsets)
        return x @ weights[0]


def _grouped_mm(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """In place of ``F.grouped_mm`` of rows, sorted by group, with a matrix for each group."""
    # Indexed, as adapted experts are weights that can be indexed and no tensor.
    result: Tensor = _GroupedProduct.apply(x, weights[:], offs)
    return result


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In place of ``F.dropout``; in place or not makes no difference to what is kept."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def to_meta(inputs: Any) -> Any:
    """The same inputs without values."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
