"""Products whose backward pass keeps their inputs themselves: no masked, cast or transposed copies.

Layers that share an input (q, k and v) then keep it once. The mask of dropout is made again from
seeds, and what was cast is cast again.

Shapes: N any number of leading dimensions, M the rows of N flattened, I in features, O out
features, R rank. t_NR is the gradient of h_NR = ``A dropout(x)``.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_inject.arithmetic.masks import LANES, Masks, rows
from lora_inject.torch_private import is_batched

_NARROW = 32  # columns of a product that is made as its transpose

Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]
Dropout = tuple[Masks, int, Tensor | None]  # what makes the mask, of how many dropped, from what


def draw_dropout(masks: Masks, x_NI: Tensor, p: float) -> Dropout:
    """A dropout with new seeds, or none where p is too small to drop anything."""
    dropped = min(round(p * LANES), LANES - 1)
    return masks, dropped, masks.draw_seeds(x_NI) if dropped else None


def _without_autocast(backward: Backward) -> Backward:
    """A backward pass in the dtypes of the forward one, wherever it is called."""

    @functools.wraps(backward)
    def called(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(gradient.device.type):
            return backward(ctx, gradient)

    return called


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which operations have the dtypes of their tensors."""
    if has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@functools.cache
def has_autocast(device: str) -> bool:
    """Whether a kind of device has autocast; meta raises when it is asked whether it is on."""
    return torch.amp.is_autocast_available(device)


# A product by itself ---------------------------------------------------------------------------


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
        return _down(x_NI, A_RI.to(dtype), seeds, masks, dropped)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, t_NR: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, A_RI, seeds = ctx.saved_tensors
        A_RI = None if A_RI is None else A_RI.to(ctx.dtype)
        found = _down_gradients(t_NR, x_NI, A_RI, ctx.shape, seeds, ctx.masks, ctx.dropped)
        return *found, None, None, None, None


def _down(
    x_NI: Tensor, A_RI: Tensor, seeds: Tensor | None, masks: Masks | None, dropped: int
) -> Tensor:
    """``A dropout(x)`` in A's dtype."""
    if masks is None or seeds is None:
        return F.linear(cast_to(x_NI, A_RI.dtype), A_RI)
    return masks.down(x_NI, A_RI, dropped, seeds, _is_watched(x_NI))


def _down_gradients(
    t_NR: Tensor,
    x_NI: Tensor | None,
    A_RI: Tensor | None,
    shape: torch.Size,
    seeds: Tensor | None,
    masks: Masks | None,
    dropped: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and A from that of ``_down``: None where the other one is None."""
    if masks is not None and seeds is not None:
        again = _is_watched(t_NR)
        return masks.gradients(t_NR, x_NI, A_RI, shape, dropped, seeds, again)
    dx_NI = None if A_RI is None else t_NR @ A_RI
    dA_RI = None if x_NI is None else rows(t_NR).t() @ cast_to(rows(x_NI), t_NR.dtype)
    return dx_NI, dA_RI


def _is_watched(value: Tensor) -> bool:
    """Whether operations on this are differentiated or batched, here within a Function."""
    return torch.is_grad_enabled() or is_batched(value)


# A layer with its adapters ---------------------------------------------------------------------


class Added(NamedTuple):
    """What an adapter adds to a layer: ``scaling * B h`` with h = ``A dropout(x)``.

    Attributes:
        scaling: a number.
        part: the first feature of the output that is added to, and how many; None for all.
        is_made: whether the tensor that stands for A is h already, made elsewhere.
        masks: what makes the masks of the dropout, or None for none.
        dropped: how many of 65,536 elements are dropped on average.
        seeds: what the mask is made of.
    """

    scaling: float
    part: tuple[int, int] | None
    is_made: bool = False
    masks: Masks | None = None
    dropped: int = 0
    seeds: Tensor | None = None


def adapted_product(
    x_MI: Tensor,
    W_OI: Tensor,
    b_O: Tensor | None,
    dtype: torch.dtype,
    added: list[Added],
    factors: list[Tensor],
) -> Tensor:
    """``W x + b`` and what adapters add to it, with one backward pass for all of it.

    The gradient of x is one sum, written by the products themselves: without passes over an (M, I)
    tensor that add one part to the other.

    Args:
        x_MI: the input, in any dtype.
        W_OI: the layer's weight, in any dtype.
        b_O: the layer's bias.
        dtype: the dtype in which the products are made.
        added: how each adapter adds.
        factors: A and B of each adapter in turn, in any dtype; h in place of A where it is made.

    Returns:
        A new matrix of shape (M, O) in that dtype.
    """
    y_MO: Tensor = _AdaptedProduct.apply(x_MI, W_OI, b_O, dtype, added, *factors)  # type: ignore[no-untyped-call]
    return y_MO


class _AdaptedProduct(torch.autograd.Function):
    """Its backward pass can be differentiated again, as that of ``_Product``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        W_OI: Tensor,
        b_O: Tensor | None,
        dtype: torch.dtype,
        added: list[Added],
        *factors: Tensor,
    ) -> Tensor:
        cast_MI = cast_to(x_MI, dtype)
        y_MO = F.linear(cast_MI, cast_to(W_OI, dtype), None if b_O is None else cast_to(b_O, dtype))
        made, reads_x = [], ctx.needs_input_grad[1]
        for i, (scaling, part, is_made, masks, dropped, seeds) in enumerate(added):
            A_RI, B_OR = cast_to(factors[2 * i], dtype), cast_to(factors[2 * i + 1], dtype)
            h_MR = A_RI if is_made else _down(cast_MI, A_RI, seeds, masks, dropped)
            own_MO = y_MO if part is None else y_MO.narrow(1, *part)
            own_MO.addmm_(h_MR, B_OR.t(), alpha=scaling)
            made += [None if is_made else h_MR, seeds]
            reads_x = reads_x or not is_made
        x_needed = x_MI if reads_x else None
        W_needed = W_OI if ctx.needs_input_grad[0] else None
        read = _read_by_backward(factors, added, ctx.needs_input_grad)
        ctx.save_for_backward(x_needed, W_needed, *read, *made)
        ctx.shape, ctx.dtype, ctx.added = x_MI.shape, dtype, [a._replace(seeds=None) for a in added]
        return y_MO

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, g_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, W_OI, *saved = ctx.saved_tensors
        needs, dtype, n = ctx.needs_input_grad, ctx.dtype, 2 * len(ctx.added)
        dx_MI, found = None, []
        for i, own in enumerate(ctx.added):
            own_dx_MI, dA_RI, dB_OR = _gradients_of_added(
                g_MO, x_MI, own, saved[2 * i : 2 * i + 2], saved[n + 2 * i : n + 2 * i + 2],
                dtype, (needs[0], *needs[5 + 2 * i : 7 + 2 * i]),
            )  # fmt: skip
            found += [dA_RI, dB_OR]
            if own_dx_MI is not None:
                dx_MI = own_dx_MI if dx_MI is None else dx_MI.add_(own_dx_MI)
        if W_OI is not None:
            W_OI = cast_to(W_OI, dtype)
            # On top of what the adapters wrote: a large product adds while it works.
            dx_MI = g_MO @ W_OI if dx_MI is None else dx_MI.addmm_(g_MO, W_OI)
        dW_OI = g_MO.t() @ cast_to(x_MI, dtype) if needs[1] else None
        db_O = g_MO.sum(0) if needs[2] else None
        return dx_MI, dW_OI, db_O, None, None, *found


def _read_by_backward(
    factors: tuple[Tensor, ...], added: list[Added], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The factors that the backward pass reads: others may be written to before it."""
    kept: list[Tensor | None] = []
    for i, own in enumerate(added):
        needs_A, needs_B = needs[5 + 2 * i : 7 + 2 * i]
        reads_A = own.is_made or needs[0] or needs_B  # the last for second derivatives
        reads_B = needs_A or (needs[0] and not own.is_made)
        kept += [factors[2 * i] if reads_A else None, factors[2 * i + 1] if reads_B else None]
    return tuple(kept)


def _gradients_of_added(
    g_MO: Tensor,
    x_MI: Tensor,
    added: Added,
    factors: Sequence[Tensor],
    made: Sequence[Tensor],
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What one adapter adds to the gradient of x, and the gradients of A, or the made h, and of B.

    Args:
        g_MO: the gradient of the layer's output.
        x_MI: the input; not read where h was made elsewhere.
        added: how the adapter adds.
        factors: A, or h, and B.
        made: h, where it was not made elsewhere, and the seeds of the dropout.
        dtype: that of the products.
        needs: whether x, A, or h, and B need their gradients.
    """
    scaling, part, is_made, masks, dropped, _ = added
    (A_RI, B_OR), (h_MR, seeds), (needs_x, needs_A, needs_B) = factors, made, needs
    own_MO = g_MO if part is None else g_MO.narrow(1, *part)
    dx_MI = dA_RI = dB_OR = None
    if needs_A or (needs_x and not is_made):
        dA_RI = t_MR = _narrow(own_MO, cast_to(B_OR, dtype), scaling)
        if not is_made:
            read_A = cast_to(A_RI, dtype) if needs_x else None
            dx_MI, dA_RI = _down_gradients(
                t_MR, x_MI if needs_A else None, read_A, x_MI.shape, seeds, masks, dropped
            )
    if needs_B:
        if is_made:
            h_MR = cast_to(A_RI, dtype)
        elif torch.is_grad_enabled():  # h as a function of x and A
            h_MR = _down(cast_to(x_MI, dtype), cast_to(A_RI, dtype), seeds, masks, dropped)
        # h^T g and not g^T h, which is slower on a CPU.
        dB_OR = _scaled(h_MR.t(), own_MO, scaling).t().contiguous()
    return dx_MI, dA_RI, dB_OR


def _narrow(g_MO: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """``scaling * g B``, which is much narrower than g: t of an adapter.

    In float32 a CPU makes few rows of many columns up to three times as fast as the other way
    round; it was measured up to rank 32, and not in other dtypes.
    """
    if g_MO.dtype == torch.float32 and g_MO.is_cpu and B_OR.shape[1] <= _NARROW:
        return _scaled(B_OR.t(), g_MO.t(), scaling).t()
    return _scaled(g_MO, B_OR, scaling)


def _scaled(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling * left @ right`` in one operation."""
    if scaling == 1:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def cast_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)`` without its dispatch where nothing is to do, which small layers feel."""
    return value if value.dtype == dtype else value.to(dtype)
