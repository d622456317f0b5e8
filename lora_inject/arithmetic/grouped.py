"""Rows sorted by group, times a change of low rank for each group: of fused experts, as a Function.

It keeps the rows as they are, the factors as they are and h, whatever the products are made in. A
CPU makes such a product group by group, and has to be called for each.

Shapes: N rows, of which the first ``ends[0]`` are of the first group, those up to ``ends[1]`` of
the second and so on; G groups, I in features, O out features, R rank. t_NR is the gradient of h_NR.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_inject.arithmetic.factors import keep_factors
from lora_inject.arithmetic.linear import is_slow_on_cpu, may_use_function
from lora_inject.arithmetic.product import cast_to, never_autocast

Product = Callable[..., Tensor]  # (rows, matrices, offs=): one matrix for the rows of each group
_ROWS_OF_A_GROUP = 16  # with fewer, a call in 16 bits costs a CPU more than its arithmetic


def may_be_one_function(x_NI: Tensor, L_GIR: Tensor, R_GRO: Tensor) -> bool:
    """Whether ``grouped_change`` is right for these tensors: not where they are traced."""
    return may_use_function(x_NI, L_GIR) and may_use_function(x_NI, R_GRO)


def grouped_change(
    x_NI: Tensor, L_GIR: Tensor, R_GRO: Tensor, ends_G: Tensor, product: Product
) -> Tensor:
    """``x L R`` for each group, in the dtype that it is best made in.

    Args:
        x_NI: the rows.
        L_GIR: the first factors, in any dtype.
        R_GRO: the second ones.
        ends_G: where the rows of each group end.
        product: torch's product by groups.

    Returns:
        A new tensor of shape (N, O).
    """
    dtype = _dtype_of_products(x_NI, len(L_GIR))
    delta_NO: Tensor = _GroupedChange.apply(x_NI, L_GIR, R_GRO, ends_G, product, dtype)  # type: ignore[no-untyped-call]
    if delta_NO.grad_fn is not None:
        keep_factors(delta_NO, x_NI)
    return delta_NO


def _dtype_of_products(x_NI: Tensor, groups: int) -> torch.dtype:
    """That of the rows, or on a CPU float32 where that is faster, casts of rows included."""
    dtype, few = x_NI.dtype, x_NI.shape[0] < _ROWS_OF_A_GROUP * groups
    casts = x_NI.is_cpu and dtype.itemsize < 4 and (few or is_slow_on_cpu(dtype))
    return torch.float32 if casts else dtype


class _GroupedChange(torch.autograd.Function):
    """Its backward pass can be differentiated again, as that of ``_Product``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        L_GIR: Tensor,
        R_GRO: Tensor,
        ends_G: Tensor,
        product: Product,
        dtype: torch.dtype,
    ) -> Tensor:
        L, R = padded(L_GIR, R_GRO, dtype)
        h_NR = product(cast_to(x_NI, dtype), L, offs=ends_G)
        needs_x, needs_L, needs_R = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            x_NI if needs_L or needs_R else None, L_GIR, R_GRO, ends_G, h_NR if needs_R else None
        )
        ctx.product, ctx.dtype, ctx.of_x = product, dtype, x_NI.dtype
        return product(h_NR, R, offs=ends_G)

    @staticmethod
    @never_autocast
    def backward(ctx: Any, g_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, L_GIR, R_GRO, ends_G, h_NR = ctx.saved_tensors
        needs_x, needs_L, needs_R = ctx.needs_input_grad[:3]
        product, dtype = ctx.product, ctx.dtype
        L, R = padded(L_GIR, R_GRO, dtype)
        dx_NI = dL_GIR = dR_GRO = None
        if x_NI is not None:
            x_NI = cast_to(x_NI, dtype)
        if needs_R:
            if torch.is_grad_enabled():  # h as a function of x and L
                h_NR = product(x_NI, L, offs=ends_G)
            dR_GRO = _by_group(h_NR, g_NO, R_GRO, ends_G, product)
        if needs_x or needs_L:
            t_NR = product(g_NO, R.mT, offs=ends_G)
            if needs_L:
                dL_GIR = _by_group(x_NI, t_NR, L_GIR, ends_G, product)
            if needs_x:
                dx_NI = cast_to(product(t_NR, L.mT, offs=ends_G), ctx.of_x)
        return dx_NI, dL_GIR, dR_GRO, None, None, None


def _by_group(
    left: Tensor, right: Tensor, factor: Tensor, ends: Tensor, product: Product
) -> Tensor:
    """``left^T right`` of the rows of each group: the gradient of a factor, laid out as it is."""
    if factor.mT.is_contiguous():
        found = product(right.mT, left, offs=ends).mT
    else:
        found = product(left.mT, right, offs=ends)
    rows, columns = factor.shape[-2:]
    return cast_to(found[:, :rows, :columns], factor.dtype)


def padded(L_GIR: Tensor, R_GRO: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in a dtype, with a rank that has rows of whole 16 bytes, as grouped products want."""
    L_GIR, R_GRO = cast_to(L_GIR, dtype), cast_to(R_GRO, dtype)
    more = -L_GIR.shape[-1] % (16 // dtype.itemsize)
    return (F.pad(L_GIR, (0, more)), F.pad(R_GRO, (0, 0, 0, more))) if more else (L_GIR, R_GRO)
