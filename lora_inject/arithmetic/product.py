"""A product whose backward pass keeps its inputs themselves: no masked, cast or transposed copies.

Layers that share an input (q, k and v) then keep it once. The mask of dropout is made again from
seeds, and what was cast is cast again.

Shapes: N any number of leading dimensions, I in features, R rank. t_NR is the gradient of h_NR =
``A dropout(x)``.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_inject.arithmetic.factors import keep_factors
from lora_inject.arithmetic.masks import LANES, Masks, rows
from lora_inject.compat.torch_private import is_autocast_anywhere, is_batched

Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]
Dropout = tuple[Masks, int, Tensor | None]  # what makes the mask, of how many dropped, from what


def draw_dropout(masks: Masks, x_NI: Tensor, p: float) -> Dropout:
    """A dropout with new seeds, or none where p is too small to drop anything."""
    dropped = min(round(p * LANES), LANES - 1)
    return masks, dropped, masks.draw_seeds(x_NI) if dropped else None


def never_autocast(backward: Backward) -> Backward:
    """A backward pass in the dtypes of the forward one, wherever it is called."""

    @functools.wraps(backward)
    def called(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not is_autocast_anywhere():
            return backward(ctx, gradient)
        with without_autocast(gradient.device.type):
            return backward(ctx, gradient)

    return called


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which operations have the dtypes of their tensors."""
    # A compiler cannot read the cached answer, and has no cost of a context.
    if torch.compiler.is_compiling() or (
        has_autocast(device) and torch.is_autocast_enabled(device)
    ):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@functools.cache
def has_autocast(device: str) -> bool:
    """Whether a kind of device has autocast; meta raises when it is asked whether it is on."""
    return torch.amp.is_autocast_available(device)


def product(
    x_NI: Tensor,
    A_RI: Tensor,
    dtype: torch.dtype,
    masks: Masks | None,
    dropped: int,
    seeds: Tensor | None,
) -> Tensor:
    """``A dropout(x)``, computed and returned in a dtype.

    Args:
        x_NI: the input, in any dtype.
        A_RI: the matrix, in any dtype.
        dtype: the dtype in which the product is made.
        masks: what makes the mask of the dropout, or None for none.
        dropped: how many of 65,536 elements are dropped on average.
        seeds: what the mask is made of.

    Returns:
        A new tensor of shape (N, R).
    """
    h_NR: Tensor = _Product.apply(x_NI, A_RI, seeds, dtype, masks, dropped)  # type: ignore[no-untyped-call]
    keep_factors(h_NR, x_NI)
    return h_NR


class _Product(torch.autograd.Function):
    """The backward pass is made of differentiable operations on what was saved.

    It is linear in each of them, so that it can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        A_RI: Tensor,
        seeds: Tensor | None,
        dtype: torch.dtype,
        masks: Masks | None,
        dropped: int,
    ) -> Tensor:
        needs_x, needs_A = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_NI if needs_A else None, A_RI if needs_x else None, seeds)
        ctx.shape, ctx.dtype, ctx.masks, ctx.dropped = x_NI.shape, dtype, masks, dropped
        return down(x_NI, A_RI.to(dtype), seeds, masks, dropped)

    @staticmethod
    @never_autocast
    def backward(ctx: Any, t_NR: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, A_RI, seeds = ctx.saved_tensors
        A_RI = None if A_RI is None else A_RI.to(ctx.dtype)
        found = down_gradients(t_NR, x_NI, A_RI, ctx.shape, seeds, ctx.masks, ctx.dropped)
        return *found, None, None, None, None


def down(
    x_NI: Tensor, A_RI: Tensor, seeds: Tensor | None, masks: Masks | None, dropped: int
) -> Tensor:
    """``A dropout(x)`` in A's dtype."""
    if masks is None or seeds is None:
        return F.linear(cast_to(x_NI, A_RI.dtype), A_RI)
    return masks.down(x_NI, A_RI, dropped, seeds, _is_watched(x_NI))


def down_gradients(
    t_NR: Tensor,
    x_NI: Tensor | None,
    A_RI: Tensor | None,
    shape: torch.Size,
    seeds: Tensor | None,
    masks: Masks | None,
    dropped: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and A from that of ``down``: None where the other one is None."""
    if masks is not None and seeds is not None:
        again = _is_watched(t_NR)
        return masks.gradients(t_NR, x_NI, A_RI, shape, dropped, seeds, again)
    dx_NI = None if A_RI is None else t_NR @ A_RI
    dA_RI = None if x_NI is None else rows(t_NR).t() @ cast_to(rows(x_NI), t_NR.dtype)
    return dx_NI, dA_RI


def _is_watched(value: Tensor) -> bool:
    """Whether operations on this are differentiated or batched, here within a Function."""
    return torch.is_grad_enabled() or is_batched(value)


def cast_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)`` without its dispatch where nothing is to do, which small layers feel."""
    return value if value.dtype == dtype else value.to(dtype)
