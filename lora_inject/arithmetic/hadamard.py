"""Two products multiplied element by element, of which the backward pass makes both again.

Each is of the size of a weight, and autograd would keep both.
"""

from typing import Any

import torch
from torch import Tensor

from lora_inject.arithmetic.product import never_autocast
from lora_inject.compat.torch_private import is_forward_mode, is_transformed


def hadamard(A_RI: Tensor, B_OR: Tensor, A2_RI: Tensor, B2_OR: Tensor) -> Tensor:
    """``(B A) o (B2 A2)``: (..., O, I). Traced or batched, it is composed of torch's operations."""
    if is_transformed() or is_forward_mode():
        return (B_OR @ A_RI) * (B2_OR @ A2_RI)
    made: Tensor = _Hadamard.apply(A_RI, B_OR, A2_RI, B2_OR)  # type: ignore[no-untyped-call]
    return made


class _Hadamard(torch.autograd.Function):
    """The backward pass is made of differentiable operations, so that it can be again."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        ctx.save_for_backward(A, B, A2, B2)
        return (B @ A).mul_(B2 @ A2)

    @staticmethod
    @never_autocast
    def backward(ctx: Any, g_OI: Tensor) -> tuple[Tensor, ...]:
        A, B, A2, B2 = ctx.saved_tensors
        wide = torch.promote_types(g_OI.dtype, A.dtype)
        A, B, A2, B2, g_OI = (tensor.to(wide) for tensor in (A, B, A2, B2, g_OI))
        first, second = g_OI * (B2 @ A2), g_OI * (B @ A)
        return B.mT @ first, first @ A.mT, B2.mT @ second, second @ A2.mT
