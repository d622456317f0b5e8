"""Products whose backward pass keeps their inputs themselves: no masked, cast or transposed copies.

Layers that share an input (q, k and v) then keep it once. The mask of dropout is made again from
a seed for each row and column, and what was cast is cast again.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LANES = 1 << 16


def product(
    x_NI: Tensor, W_OI: Tensor, b_O: Tensor | None, dtype: torch.dtype, dropout: float = 0.0
) -> Tensor:
    """``W dropout(x) + b``, computed and returned in a dtype; with dropout on the CPU only.

    Args:
        x_NI: the input, in any dtype.
        W_OI: the matrix, in any dtype.
        b_O: the bias, for a dropout of 0.
        dtype: the dtype in which the product is made.
        dropout: the probability, in steps of 1 / 65,536. The seeds come from the generator that
            ``torch.manual_seed`` sets and that checkpointing restores.

    Returns:
        A new tensor of shape (N, O).
    """
    dropped = min(round(dropout * _LANES), _LANES - 1)
    seeds = draw_seeds(x_NI.shape) if dropped else None
    y_NO: Tensor = _Product.apply(x_NI, W_OI, b_O, dtype, dropped, seeds)  # type: ignore[no-untyped-call]
    return y_NO


class _Product(torch.autograd.Function):
    """The backward pass is made of differentiable operations on what was saved.

    It is linear in each of them, so that it can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        W_OI: Tensor,
        b_O: Tensor | None,
        dtype: torch.dtype,
        dropped: int,
        seeds: Tensor | None,
    ) -> Tensor:
        needs_x, needs_W = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_NI if needs_W else None, W_OI if needs_x else None, seeds)
        ctx.x_shape, ctx.dtype, ctx.dropped = x_NI.shape, dtype, dropped
        W_OI = W_OI.to(dtype)
        if seeds is None:
            return F.linear(x_NI.to(dtype), W_OI, None if b_O is None else b_O.to(dtype))
        kept_NI = kept(x_NI.shape, dtype, dropped, seeds).mul_(x_NI)
        return F.linear(kept_NI, W_OI).mul_(_LANES / (_LANES - dropped))

    @staticmethod
    def backward(ctx: Any, g_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, W_OI, seeds = ctx.saved_tensors
        kept_NI = None
        if seeds is not None:
            kept_NI = kept(ctx.x_shape, ctx.dtype, ctx.dropped, seeds)
            g_NO = g_NO * (_LANES / (_LANES - ctx.dropped))
        dx_NI = dW_OI = db_O = None
        if W_OI is not None:
            dx_NI = g_NO @ W_OI.to(ctx.dtype)
            dx_NI = dx_NI if kept_NI is None else dx_NI.mul_(kept_NI)
        if x_NI is not None:
            masked_NI = x_NI.to(ctx.dtype)
            if kept_NI is not None and torch.is_grad_enabled():  # dx may be differentiated again
                masked_NI = masked_NI * kept_NI
            elif kept_NI is not None:
                masked_NI = kept_NI.mul_(masked_NI)
            dW_OI = _rows(g_NO).t() @ _rows(masked_NI)
        if ctx.needs_input_grad[2]:
            db_O = _rows(g_NO).sum(0)
        return dx_NI, dW_OI, db_O, None, None, None


def add_product(y_MO: Tensor, h_MR: Tensor, B_OR: Tensor, scaling: float) -> None:
    """Add ``scaling * B h`` to y in place.

    Args:
        y_MO: a matrix that may be written to.
        h_MR: a matrix in y's dtype.
        B_OR: the factor, in any dtype.
        scaling: a number.
    """
    _AddedProduct.apply(y_MO, h_MR, B_OR, scaling)  # type: ignore[no-untyped-call]


class _AddedProduct(torch.autograd.Function):
    """The backward pass of ``addmm_``, with B's gradient as h^T g: g^T h is slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, y_MO: Tensor, h_MR: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
        needs_h, needs_B = ctx.needs_input_grad[1:3]
        ctx.mark_dirty(y_MO)
        ctx.save_for_backward(h_MR if needs_B else None, B_OR if needs_h else None)
        ctx.scaling = scaling
        return y_MO.addmm_(h_MR, B_OR.to(y_MO.dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, g_MO: Tensor) -> tuple[Tensor | None, ...]:
        h_MR, B_OR = ctx.saved_tensors
        dh_MR = None if B_OR is None else (g_MO @ B_OR.to(g_MO.dtype)) * ctx.scaling
        dB_OR = None if h_MR is None else ((h_MR.t() @ g_MO) * ctx.scaling).t().contiguous()
        return g_MO, dh_MR, dB_OR, None


def _rows(x_NI: Tensor) -> Tensor:
    return x_NI.reshape(-1, x_NI.shape[-1])


def draw_seeds(shape: torch.Size) -> Tensor:
    """64 bits for each row of an input, then for each block of four columns."""
    columns, rows = shape[-1], prod(shape[:-1])
    seeds = torch.empty(rows + -(-columns // 4), dtype=torch.int64, device="cpu")
    # None as the upper end fills all 64 bits; random_() alone would leave the highest one zero.
    return seeds.random_(-(1 << 63), None)


def kept(shape: torch.Size, dtype: torch.dtype, dropped: int, seeds: Tensor) -> Tensor:
    """A mask of dropout: 1 where an element is kept, 0 where it is dropped.

    Drawing a number for each element is what dropout costs on a CPU, where torch draws one after
    the other. Here a hash of the seeds of a row and of a block of four columns decides the four
    elements by 16 bits each, in vector operations.

    Args:
        shape: the input's.
        dtype: the mask's.
        dropped: how many of 65,536 elements are dropped on average.
        seeds: those of ``draw_seeds``.
    """
    columns, rows = shape[-1], prod(shape[:-1])
    # Multiply, fold the upper half into the lower one, multiply, with the constants of splitmix64
    # (Steele et al. 2014). A product has to come last: >> fills in the sign, which would show in
    # the highest lane.
    hashed = torch.bitwise_xor(seeds[:rows, None], seeds[None, rows:]).mul_(-0x61C8864680B583EB)
    hashed.bitwise_xor_(hashed >> 32).mul_(-0x40A7B892E31B1A47)
    lanes_NI = hashed.view(torch.int16)[:, :columns].reshape(shape)
    kept_NI = torch.empty(shape, dtype=dtype, device="cpu")
    return torch.ge(lanes_NI, dropped - _LANES // 2, out=kept_NI)
