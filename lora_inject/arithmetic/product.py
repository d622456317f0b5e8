"""Products whose backward pass keeps their inputs themselves: no masked, cast or transposed copies.

Layers that share an input (q, k and v) then keep it once. The mask of dropout is made again from
seeds, and what was cast is cast again.

Shapes: N any number of leading dimensions, M the rows of N flattened, I in features, O out
features, R rank. t_NR is the gradient of h_NR = ``A dropout(x)``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_inject.arithmetic.masks import LANES, Masks, rows


class Dropout(NamedTuple):
    """How x is dropped out.

    Attributes:
        masks: what makes the mask.
        dropped: how many of 65,536 elements are dropped on average.
        seeds: what the mask is made of.
    """

    masks: Masks
    dropped: int
    seeds: Tensor


def draw_dropout(masks: Masks, x_NI: Tensor, p: float) -> Dropout | None:
    """A dropout with new seeds, or None where p is too small to drop anything."""
    dropped = min(round(p * LANES), LANES - 1)
    return Dropout(masks, dropped, masks.draw_seeds(x_NI)) if dropped else None


# A product by itself ---------------------------------------------------------------------------


def product(x_NI: Tensor, A_RI: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
    """``A dropout(x)``, computed and returned in a dtype.

    Args:
        x_NI: the input, in any dtype.
        A_RI: the matrix, in any dtype.
        dtype: the dtype in which the product is made.
        dropout: what is done to x.

    Returns:
        A new tensor of shape (N, R).
    """
    masks, dropped, seeds = dropout or (None, 0, None)
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
        return F.linear(x_NI.to(A_RI.dtype), A_RI)
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
    dA_RI = None if x_NI is None else rows(t_NR).t() @ rows(x_NI).to(t_NR.dtype)
    return dx_NI, dA_RI


def _is_watched(value: Tensor) -> bool:
    """Whether operations on this are differentiated or batched, here within a Function."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(value)  # is_grads_batched
    )


# A layer with its adapters ---------------------------------------------------------------------


class Added(NamedTuple):
    """What an adapter adds to a layer: ``scaling * B h`` with h = ``A dropout(x)``.

    Attributes:
        A: the first factor, or None where h is given.
        B: the second factor.
        h: where A is None: h, made elsewhere.
        dropout: what is done to x before A.
        scaling: a number.
        part: the first feature of the output that is added to, and how many; None for all.
    """

    A: Tensor | None
    B: Tensor
    h: Tensor | None
    dropout: Dropout | None
    scaling: float
    part: tuple[int, int] | None


def adapted_product(
    x_MI: Tensor, W_OI: Tensor, b_O: Tensor | None, dtype: torch.dtype, branches: list[Added]
) -> Tensor:
    """``W x + b`` and what the branches add to it, with one backward pass for all of it.

    The gradient of x is one sum, written by the products themselves: without passes over an (M, I)
    tensor that add one part to the other.

    Args:
        x_MI: the input, in any dtype.
        W_OI: the layer's weight, in any dtype.
        b_O: the layer's bias.
        dtype: the dtype in which the products are made.
        branches: the adapters.

    Returns:
        A new matrix of shape (M, O) in that dtype.
    """
    settings = [(a.scaling, a.part, *(a.dropout or (None, 0))[:2]) for a in branches]
    # A Function finds tensors only where they are arguments of their own.
    tensors = [t for a in branches for t in (a.A, a.B, a.h, a.dropout and a.dropout.seeds)]
    y_MO: Tensor = _AdaptedProduct.apply(x_MI, W_OI, b_O, dtype, settings, *tensors)  # type: ignore[no-untyped-call]
    return y_MO


# Of each branch: its scaling, its part of the output, and the masks and rate of its dropout.
_Setting = tuple[float, tuple[int, int] | None, Masks | None, int]


class _AdaptedProduct(torch.autograd.Function):
    """Its backward pass can be differentiated again, as that of ``_Product``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        W_OI: Tensor,
        b_O: Tensor | None,
        dtype: torch.dtype,
        settings: list[_Setting],
        *tensors: Tensor | None,
    ) -> Tensor:
        needs_x, needs_W = ctx.needs_input_grad[:2]
        cast_MI = x_MI.to(dtype)
        y_MO = F.linear(cast_MI, W_OI.to(dtype), None if b_O is None else b_O.to(dtype))
        made = []
        for (scaling, part, masks, dropped), (A_RI, B_OR, h_MR, seeds) in _each(settings, tensors):
            if h_MR is None:
                h_MR = _down(cast_MI, A_RI.to(dtype), seeds, masks, dropped)
            made.append(h_MR)
            _part(y_MO, part).addmm_(h_MR.to(dtype), B_OR.to(dtype).t(), alpha=scaling)
        reads_x = needs_W or any(A_RI is not None for A_RI in tensors[::4])
        kept = x_MI if reads_x else None, W_OI if needs_x else None
        ctx.save_for_backward(*kept, *tensors, *made)
        ctx.shape, ctx.dtype, ctx.settings = x_MI.shape, dtype, settings
        return y_MO

    @staticmethod
    def backward(ctx: Any, g_MO: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_W, needs_b, _, _, *needs = ctx.needs_input_grad
        x_MI, W_OI, *saved = ctx.saved_tensors
        n = len(needs)
        made, dx_MI, found = saved[n:], None, []
        for i, (setting, own) in enumerate(_each(ctx.settings, saved[:n])):
            own_needs = needs_x, *needs[4 * i : 4 * i + 4]
            own_dx_MI, *own_found = _branch_gradients(
                g_MO, x_MI, setting, own, made[i], ctx.dtype, own_needs
            )
            found += own_found
            if own_dx_MI is not None:
                dx_MI = own_dx_MI if dx_MI is None else dx_MI.add_(own_dx_MI)
        if needs_x:
            W_OI = W_OI.to(ctx.dtype)
            # On top of what the branches wrote: a large product adds while it works.
            dx_MI = g_MO @ W_OI if dx_MI is None else dx_MI.addmm_(g_MO, W_OI)
        dW_OI = g_MO.t() @ x_MI.to(ctx.dtype) if needs_W else None
        db_O = g_MO.sum(0) if needs_b else None
        return dx_MI, dW_OI, db_O, None, None, *found


def _each(settings: list[_Setting], tensors: Sequence[Tensor | None]) -> Iterator[Any]:
    """The settings of each branch, with its A, B, given h and seeds."""
    return zip(settings, zip(*[iter(tensors)] * 4, strict=True), strict=True)


def _part(y_MO: Tensor, part: tuple[int, int] | None) -> Tensor:
    return y_MO if part is None else y_MO.narrow(1, *part)


def _branch_gradients(
    g_MO: Tensor,
    x_MI: Tensor,
    setting: _Setting,
    tensors: tuple[Any, ...],
    h_MR: Tensor,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """What one branch adds to the gradient of x, and the gradients of its A, B, h and seeds.

    Args:
        g_MO: the gradient of the layer's output.
        x_MI: the input; not read where h was given.
        setting: the branch's.
        tensors: its A, B, given h and seeds.
        h_MR: h, whoever made it.
        dtype: that of the products.
        needs: whether x and each of the four tensors need their gradients.
    """
    scaling, part, masks, dropped = setting
    A_RI, B_OR, given_MR, seeds = tensors
    needs_x, needs_A, needs_B, needs_h, _ = needs
    needs_x = needs_x and A_RI is not None
    own_MO, dx_MI, dA_RI, dB_OR, t_MR = _part(g_MO, part), None, None, None, None
    if needs_x or needs_A or needs_h:
        t_MR = _scaled(own_MO, B_OR.to(dtype), scaling)
    if t_MR is not None and A_RI is not None:
        sources = x_MI if needs_A else None, A_RI.to(dtype) if needs_x else None
        dx_MI, dA_RI = _down_gradients(t_MR, *sources, x_MI.shape, seeds, masks, dropped)
    if needs_B:
        if given_MR is None and torch.is_grad_enabled():  # as a function of x and A
            h_MR = _down(x_MI.to(dtype), A_RI.to(dtype), seeds, masks, dropped)
        # h^T g and not g^T h, which is slower on a CPU.
        dB_OR = _scaled(h_MR.to(dtype).t(), own_MO, scaling).t().contiguous()
    return dx_MI, dA_RI, dB_OR, t_MR if needs_h else None, None


def _scaled(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling * left @ right`` in one operation."""
    if scaling == 1:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
