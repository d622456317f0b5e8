"""A layer with its adapters as one Function, whose backward pass writes the gradient of x once.

Shapes: M rows, I in features, O out features, R rank. t_MR is the gradient of h_MR =
``A dropout(x)``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_inject.arithmetic.factors import keep_factors
from lora_inject.arithmetic.masks import Masks
from lora_inject.arithmetic.product import cast_to, down, down_gradients, never_autocast

_NARROW = 32  # columns of a product that is made as its transpose


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
    keep_factors(y_MO, x_MI)
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
            h_MR = A_RI if is_made else down(cast_MI, A_RI, seeds, masks, dropped)
            own_MO = y_MO if part is None else y_MO.narrow(1, *part)
            own_MO.addmm_(h_MR, B_OR.t(), alpha=scaling)
            made += [None if is_made else h_MR, seeds]
            reads_x = reads_x or not is_made
        x_needed = x_MI if reads_x else None
        W_needed = W_OI if ctx.needs_input_grad[0] else None
        read = _read_by_backward(factors, added, ctx.needs_input_grad)
        ctx.save_for_backward(x_needed, W_needed, *read, *made)
        ctx.dtype = dtype  # and the seeds are saved already
        ctx.added = [a if a.seeds is None else a._replace(seeds=None) for a in added]
        return y_MO

    @staticmethod
    @never_autocast
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
            dx_MI, dA_RI = down_gradients(
                t_MR, x_MI if needs_A else None, read_A, x_MI.shape, seeds, masks, dropped
            )
    if needs_B:
        if is_made:
            h_MR = cast_to(A_RI, dtype)
        elif torch.is_grad_enabled():  # h as a function of x and A
            h_MR = down(cast_to(x_MI, dtype), cast_to(A_RI, dtype), seeds, masks, dropped)
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
