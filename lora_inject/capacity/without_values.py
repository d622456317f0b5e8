"""A model without values: its copy on the meta device, its inputs, and what accelerators do.

A forward pass on the meta device computes nothing, so that a model of any size runs in seconds.
Some functions keep other tensors for the backward pass there than an accelerator would; inside
``as_on_accelerators`` they keep what an accelerator keeps.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from lora_inject.compat.torch_private import tree_map
from lora_inject.core.state import state_of
from lora_inject.errors import ArgumentError, LoRAInjectError


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model without values and in training mode, whatever the size of the model.

    Attention counts as a fused kernel and experts as one grouped product for all of them: what the
    other ways compute depends on values or is not what one would train with.
    """
    for state in map(state_of, model.modules()):
        if state is not None and state.blocks:
            raise LoRAInjectError(
                f"the model is inside a {state.block_text} block, and its capacity is that of a "
                "model to train.",
                remedy="Leave the with block first.",
            )
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
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, getattr(config, "num_channels", 3), height, width)
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


def to_meta(inputs: Any) -> Any:
    """The same inputs without values."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


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
def as_on_accelerators() -> Iterator[None]:
    """Let some functions keep what they keep there, in this whole process.

    A mode would not do: it does not reach the functions that torch's own call.
    """
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
    return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-any-return, no-untyped-call]


class _GroupedProduct(torch.autograd.Function):
    """Keeps what a product keeps, in every dtype; torch's own knows bfloat16 alone on meta."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        for_x, for_weights, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weights else None, weights if for_x else None, offsets)
        return x @ weights[0]


def _grouped_mm(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """In place of ``F.grouped_mm`` of rows, sorted by group, with a matrix for each group."""
    if has_torch_function((x, weights)):  # adapted experts are no tensors
        return handle_torch_function(_grouped_mm, (x, weights), x, weights, offs=offs)
    return _GroupedProduct.apply(x, weights[:], offs)  # type: ignore[no-any-return, no-untyped-call]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In place of ``F.dropout``; in place or not makes no difference to what is kept."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
