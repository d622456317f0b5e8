"""The arithmetic of one layer: what an adapter adds to the output of the layer it sits on.

Shapes: N any number of leading dimensions, M the rows of N flattened, I in features, O out
features, R rank. W is (O, I), b is (O,), A is (R, I), B is (O, R); x_NI, h_NR and delta_NO are
named by their shapes.

There are two ways to the same values. The composed way puts torch's operations one after another:
``linear_down``, ``linear_up``, and the layer adds the delta. The fast way has fewer passes over x
and y: ``adapted_linear`` computes a layer and its adapters at once. The Functions of ``product``
and ``whole`` keep x itself for the backward pass where it is dropped out or would be cast, and
write the gradient of x in one piece. ``may_run_whole``, ``_dtype_of_function``, ``_masks`` and
``_keeps_x`` decide between them, and nothing else does.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.arithmetic.masks import Masks, masks_for
from lora_inject.arithmetic.product import cast_to, draw_dropout, has_autocast, product
from lora_inject.arithmetic.whole import Added, adapted_product
from lora_inject.compat.torch_private import (
    has_instructions,
    is_autocast_anywhere,
    is_forward_mode,
    is_transformed,
    unsafe_view,
)

# Which way -----------------------------------------------------------------------------------

# Exactly these: a subclass may do anything in its operations.
_PLAIN = frozenset({Tensor, nn.Parameter})
_CAST_BY_AUTOCAST = frozenset({torch.float32, torch.bfloat16, torch.float16})
_LARGE = 1 << 14  # with fewer elements, a Function costs more than it saves
_ROWS_TO_UPCAST = 16  # with fewer rows, casting W costs more than it saves


# What an adapter brings to ``adapted_linear``: A, B, its scaling, the dropout in force (0 but in
# training), and the first feature of the output that it adds to with their number, or None for all.
Branch = tuple[Tensor, Tensor, float, float, tuple[int, int] | None]


def _slow_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that this CPU multiplies slower than it casts to float32 and multiplies there."""
    slow = set()
    if has_instructions("avx2", False):  # x86: other processors do not say what they can do
        if not (has_instructions("avx512_bf16", True) or has_instructions("amx_tile", True)):
            slow.add(torch.bfloat16)
        if not has_instructions("amx_fp16", True):
            slow.add(torch.float16)
    return frozenset(slow)


_SLOW = _slow_dtypes()


def is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether a CPU makes products in float32 faster, casts included."""
    return dtype in _SLOW


def may_run_whole(x_NI: Tensor, W_OI: Tensor | None, branches: Iterable[Branch]) -> bool:
    """Whether ``adapted_linear`` is right for these tensors; the composed way always is.

    Not for tensor subclasses (quantized, DTensor), nor where operations are traced, batched or
    watched. Nor for inputs that ``F.linear`` does not flatten itself: flattened, their products
    would round in another way. None stands for a tensor that is not a parameter of the layer now:
    one that is parametrized, pruned or sharded. Nor for adapters without values beside an x with.
    """
    meta = x_NI.is_meta
    for A_RI, B_OR, _, _, _ in branches:
        if type(A_RI) not in _PLAIN or type(B_OR) not in _PLAIN:
            return False
        if A_RI.is_meta is not meta or B_OR.is_meta is not meta:
            return False
    return (
        type(x_NI) in _PLAIN
        and type(W_OI) in _PLAIN
        and (x_NI.dim() == 2 or _is_flattened(x_NI))
        and not is_transformed()
    )


def _is_flattened(x_NI: Tensor) -> bool:
    """Whether ``F.linear`` flattens an input that is no matrix, which is then the same product."""
    strided = x_NI.layout is torch.strided and not x_NI.is_nested
    return x_NI.dim() == 3 and strided and x_NI.is_contiguous()


def _is_drawn(x_NI: Tensor, p: float) -> bool:
    """Whether masks are made here: of a large input. Of 1, and of what is none, torch knows."""
    return 0 < p < 1 and x_NI.numel() >= _LARGE  # in this order: of what is traced it is a tensor


def _masks(x_NI: Tensor, A_RI: Tensor, p: float) -> Masks | None:
    """What makes the masks of dropout, or None for torch's own dropout.

    The same in every grad mode: checkpointing computes without gradients, then with them, and both
    have to draw alike.
    """
    if not _is_drawn(x_NI, p) or not may_use_function(x_NI, A_RI):
        return None
    return masks_for(x_NI, _dtype_of_products(x_NI))


def _dtype_of_function(x_MI: Tensor, W_OI: Tensor, b_O: Tensor | None) -> torch.dtype | None:
    """In which dtype a layer and its adapters are one Function; None for the composed way.

    The composed way also where torch refuses the layer's own tensors: it has an error for that.
    """
    if not torch.is_grad_enabled() or is_forward_mode():
        return None
    slow, autocast, dtype = _is_slow(x_MI), _autocast_dtype(x_MI), x_MI.dtype
    if max(x_MI.numel(), x_MI.shape[0] * W_OI.shape[0]) < _LARGE and not slow:
        return None
    if autocast is not None:
        dtypes = {dtype, W_OI.dtype, W_OI.dtype if b_O is None else b_O.dtype}
        return autocast if dtypes <= _CAST_BY_AUTOCAST else None
    if W_OI.dtype != dtype or (b_O is not None and b_O.dtype != dtype):
        return None
    return torch.float32 if slow else dtype


def _keeps_x(x_NI: Tensor, A_RI: Tensor) -> bool:
    """Whether ``product`` makes ``A x`` where x is not dropped out: it keeps no cast copies."""
    if not may_use_function(x_NI, A_RI):  # first, since compilers cannot read what follows
        return False
    casts = A_RI.dtype != _dtype_of_products(x_NI)
    return (casts and x_NI.numel() >= _LARGE) or _is_slow(x_NI)


def may_use_function(x_NI: Tensor, A_RI: Tensor) -> bool:
    """Whether a Function is right for these tensors."""
    plain = type(x_NI) in _PLAIN and type(A_RI) in _PLAIN
    return plain and not is_forward_mode() and not is_transformed()


def _is_slow(x_NI: Tensor) -> bool:
    """Whether products with x are better made in float32.

    In training only: rounding once more or less changes the last bit, and without gradients the
    adapted layer is to start from what the layer returned before. Under autocast the dtype is the
    user's wish.
    """
    return (
        x_NI.dtype in _SLOW
        and x_NI.is_cpu
        and torch.is_grad_enabled()
        and x_NI.numel() >= _ROWS_TO_UPCAST * x_NI.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


def _dtype_of_products(x_NI: Tensor) -> torch.dtype:
    """The dtype in which products with x are made."""
    return _autocast_dtype(x_NI) or (torch.float32 if _is_slow(x_NI) else x_NI.dtype)


def _autocast_dtype(x_NI: Tensor) -> torch.dtype | None:
    """The dtype in which autocast makes products with x, if it does."""
    if not is_autocast_anywhere():
        return None
    device = x_NI.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device) and x_NI.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


# Linear --------------------------------------------------------------------------------------


def adapted_linear(
    x_NI: Tensor, W_OI: Tensor, b_O: Tensor | None, branches: Iterable[Branch]
) -> Tensor:
    """``W x + b`` and what the branches add to it, where ``may_run_whole`` allows it.

    Nothing is kept for the backward pass but x, h and what is as small as A and B, and there is no
    pass over an (N, O) tensor besides the product that adds to it.

    Args:
        x_NI: the layer's input.
        W_OI: the layer's weight.
        b_O: the layer's bias.
        branches: the adapters.

    Returns:
        The adapted output, of shape (N, O) and in the dtype of the layer's own.
    """
    # Flattened first: F.linear returns a view for other shapes, and autograd pays for writing into
    # a view with copies in the backward pass.
    x_MI = x_NI if x_NI.dim() == 2 else x_NI.reshape(-1, x_NI.shape[-1])
    dtype = _dtype_of_function(x_MI, W_OI, b_O)
    if dtype is not None:
        y_MO = _at_once(x_MI, W_OI, b_O, dtype, branches)
    else:
        y_MO, differentiable = F.linear(x_MI, W_OI, b_O), torch.is_grad_enabled()
        for A_RI, B_OR, scaling, dropout, part in branches:
            if dropout or differentiable or A_RI.dtype != x_MI.dtype:
                h_MR = linear_down(x_MI, A_RI, dropout)
            else:  # the same without its questions, which a single row feels
                h_MR = F.linear(x_MI, A_RI)
            if B_OR.dtype != h_MR.dtype:
                B_OR = B_OR.to(h_MR.dtype)
            # y is ours to write: it is new, nobody has seen it, and a product needs no output to
            # find its gradients.
            own_MO = y_MO if part is None else y_MO.narrow(1, *part)
            if scaling == 1:
                own_MO.addmm_(h_MR, B_OR.mT)
            else:  # a keyword, which a single row feels too
                own_MO.addmm_(h_MR, B_OR.mT, alpha=scaling)
    if x_MI is x_NI:
        return y_MO
    shape = [*x_NI.shape[:-1], y_MO.shape[-1]]
    # No view, which allows less than what F.linear returns: that is one where there is a bias and
    # torch is older, and never else.
    return cast(Tensor, unsafe_view(y_MO, shape))


def _at_once(
    x_MI: Tensor,
    W_OI: Tensor,
    b_O: Tensor | None,
    dtype: torch.dtype,
    branches: Iterable[Branch],
) -> Tensor:
    """The same as one Function, whose products are made in a dtype."""
    added, factors = [], []
    for branch in branches:
        own, A_RI = _added(x_MI, branch, dtype)
        added.append(own)
        factors += [A_RI, branch[1]]
    y_MO = adapted_product(x_MI, W_OI, b_O, dtype, added, factors)
    return y_MO.to(x_MI.dtype) if _is_slow(x_MI) else y_MO


def _added(x_MI: Tensor, branch: Branch, dtype: torch.dtype) -> tuple[Added, Tensor]:
    """A branch of the one Function: with its A where x is kept for A's gradient anyway, else h."""
    A_RI, _, scaling, p, part = branch
    if A_RI.requires_grad:
        if not p:
            return Added(scaling, part), A_RI
        # What else _masks asks holds wherever there is one Function.
        masks = masks_for(x_MI, dtype) if _is_drawn(x_MI, p) else None
        if masks is not None:
            return Added(scaling, part, False, *draw_dropout(masks, x_MI, p)), A_RI
    return Added(scaling, part, True), linear_down(x_MI, A_RI, p)


def linear_down(x_NI: Tensor, A_RI: Tensor, dropout: float) -> Tensor:
    """``A dropout(x)``, of shape (N, R) and in the dtype of x, or float32 where that is faster.

    A is cast to x's dtype, never x to its: A is small, and a copy of x in another dtype would be
    kept for the backward pass.
    """
    masks = _masks(x_NI, A_RI, dropout)
    if dropout and masks is None:
        x_NI = F.dropout(x_NI, dropout)
    if masks or (torch.is_grad_enabled() and _keeps_x(x_NI, A_RI)):
        drawn = draw_dropout(masks, x_NI, dropout) if masks else (None, 0, None)
        return product(x_NI, A_RI, _dtype_of_products(x_NI), *drawn)
    return F.linear(x_NI, cast_to(A_RI, x_NI.dtype))


def linear_up(h_NR: Tensor, B_OR: Tensor) -> Tensor:
    """``B h``, of shape (N, O) and in the dtype of h."""
    return F.linear(h_NR, cast_to(B_OR, h_NR.dtype))
