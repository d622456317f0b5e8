"""Rows sorted by group, times a change of low rank for each group: of fused experts, as a Function.

It keeps the rows as they are, the factors as they are and h, whatever the products are made in. A
CPU makes torch's product by groups with a call for each group. In 16 bits a call takes longer than
its arithmetic, so that the rows are rather stacked, as many for each group as the largest has.

Shapes: N rows, of which the first ``ends[0]`` are of the first group, those up to ``ends[1]`` of
the second and so on; G groups, T rows of a group in a stack, I in features, O out features, R rank.
t_NR is the gradient of h_NR.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_inject.arithmetic.factors import keep_factors
from lora_inject.arithmetic.linear import is_slow_on_cpu, may_use_function
from lora_inject.arithmetic.product import cast_to, never_autocast

Product = Callable[..., Tensor]  # (rows, matrices, offs=): one matrix for the rows of each group
_CALL = 16  # what a call for a group costs a CPU in 16 bits, in rows of the group


def may_be_one_function(x_NI: Tensor, factors: Iterable[Tensor]) -> bool:
    """Whether ``grouped_change`` is right for these tensors: not where they are traced."""
    return all(may_use_function(x_NI, factor) for factor in factors)


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
    slow = x_NI.is_cpu and is_slow_on_cpu(x_NI.dtype)
    dtype = torch.float32 if slow else x_NI.dtype
    way = (_stacked(x_NI, ends_G) if dtype.itemsize < 4 else None) or _Grouped(ends_G, product)
    delta_NO: Tensor = _GroupedChange.apply(x_NI, L_GIR, R_GRO, way, dtype)  # type: ignore[no-untyped-call]
    if delta_NO.grad_fn is not None:
        keep_factors(delta_NO, x_NI)
    return delta_NO


class _Grouped(NamedTuple):
    """Products by torch's own product by groups."""

    ends: Tensor
    product: Product

    def of_rows(self, x_NI: Tensor) -> Tensor:
        return x_NI

    def to_rows(self, y_NO: Tensor) -> Tensor:
        return y_NO

    def factors(self, L_GIR: Tensor, R_GRO: Tensor) -> tuple[Tensor, Tensor]:
        return padded(L_GIR, R_GRO)

    def times(self, x_NI: Tensor, M_GIO: Tensor) -> Tensor:
        return self.product(x_NI, M_GIO, offs=self.ends)

    def sums(self, left_NI: Tensor, right_NO: Tensor) -> Tensor:
        """``left^T right`` of the rows of each group."""
        return self.product(left_NI.mT, right_NO, offs=self.ends)


class _Stacked(NamedTuple):
    """Products of stacks of equally many rows, of which zeros fill up the smaller groups."""

    places: Tensor
    groups: int
    rows: int

    def of_rows(self, x_NI: Tensor) -> Tensor:
        stack = x_NI.new_zeros(self.groups * self.rows, x_NI.shape[1])
        return stack.index_copy_(0, self.places, x_NI).view(self.groups, self.rows, -1)

    def to_rows(self, y_GTO: Tensor) -> Tensor:
        return y_GTO.flatten(0, 1).index_select(0, self.places)

    def factors(self, L_GIR: Tensor, R_GRO: Tensor) -> tuple[Tensor, Tensor]:
        return L_GIR, R_GRO

    def times(self, x_GTI: Tensor, M_GIO: Tensor) -> Tensor:
        return torch.bmm(x_GTI, M_GIO)

    def sums(self, left_GTI: Tensor, right_GTO: Tensor) -> Tensor:
        """``left^T right`` of the rows of each group."""
        return torch.bmm(left_GTI.mT, right_GTO)


def _stacked(x_NI: Tensor, ends_G: Tensor) -> _Stacked | None:
    """How rows are stacked on a CPU; None where calls for each group cost less, and elsewhere."""
    if not (x_NI.is_cpu and ends_G.is_cpu):
        return None
    count, groups, ends_G = len(x_NI), len(ends_G), ends_G.long()
    if groups == 0 or int(ends_G[-1]) != count:
        return None
    sizes_G = ends_G.diff(prepend=ends_G.new_zeros(1))
    rows = -(-int(sizes_G.max()) // 4) * 4  # torch makes a program for each shape
    if groups * rows > 2 * count + _CALL * groups:
        return None
    shifts_G = torch.arange(groups) * rows - (ends_G - sizes_G)
    return _Stacked(torch.arange(count) + shifts_G.repeat_interleave(sizes_G), groups, rows)


class _GroupedChange(torch.autograd.Function):
    """Its backward pass can be differentiated again, as that of ``_Product``."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, L_GIR: Tensor, R_GRO: Tensor, way: "_Grouped | _Stacked",
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        L, R = way.factors(cast_to(L_GIR, dtype), cast_to(R_GRO, dtype))
        h = way.times(way.of_rows(cast_to(x_NI, dtype)), L)
        _, needs_L, needs_R = ctx.needs_input_grad[:3]
        kept_x_NI = x_NI if needs_L or needs_R else None  # R's for second derivatives
        ctx.save_for_backward(kept_x_NI, L_GIR, R_GRO, way.to_rows(h) if needs_R else None)
        ctx.way, ctx.dtype, ctx.of_x = way, dtype, x_NI.dtype
        return way.to_rows(way.times(h, R))

    @staticmethod
    @never_autocast
    def backward(ctx: Any, g_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, L_GIR, R_GRO, h_NR = ctx.saved_tensors
        needs_x, needs_L, needs_R = ctx.needs_input_grad[:3]
        way, dtype = ctx.way, ctx.dtype
        L, R = way.factors(cast_to(L_GIR, dtype), cast_to(R_GRO, dtype))
        g = way.of_rows(g_NO)
        dx_NI = dL_GIR = dR_GRO = None
        if needs_L or torch.is_grad_enabled():
            x = way.of_rows(cast_to(x_NI, dtype))
        if needs_R:  # differentiated again, h is a function of x and L
            h = way.times(x, L) if torch.is_grad_enabled() else way.of_rows(h_NR)
            dR_GRO = _gradient(h, g, R_GRO, way)
        if needs_x or needs_L:
            t = way.times(g, R.mT)
            dL_GIR = _gradient(x, t, L_GIR, way) if needs_L else None
            dx_NI = cast_to(way.to_rows(way.times(t, L.mT)), ctx.of_x) if needs_x else None
        return dx_NI, dL_GIR, dR_GRO, None, None


def _gradient(left: Tensor, right: Tensor, factor: Tensor, way: "_Grouped | _Stacked") -> Tensor:
    """``left^T right``: the gradient of a factor, laid out as it is and without its padding."""
    turned = factor.mT.is_contiguous()
    found = way.sums(right, left).mT if turned else way.sums(left, right)
    rows, columns = factor.shape[-2:]
    return cast_to(found[:, :rows, :columns], factor.dtype)


def padded(L_GIR: Tensor, R_GRO: Tensor) -> tuple[Tensor, Tensor]:
    """With a rank that has rows of whole 16 bytes, as products by groups want it."""
    more = -L_GIR.shape[-1] % (16 // L_GIR.dtype.itemsize)
    return (F.pad(L_GIR, (0, more)), F.pad(R_GRO, (0, 0, 0, more))) if more else (L_GIR, R_GRO)
