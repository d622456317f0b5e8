"""The arithmetic of one layer: what an adapter adds to the output of the layer it sits on.

Shapes: N any number of leading dimensions, M the rows of N flattened, I in features, O out
features, R rank. W is (O, I), b is (O,), A is (R, I), B is (O, R); x_NI, h_NR and delta_NO are
named by their shapes.

There are two ways to the same values. The composed way puts torch's operations one after another:
``down``, ``up``, and the layer adds the delta. The fast way has fewer passes over x and y:
``adapted_linear`` computes a layer and its adapters at once and adds in place; where x is dropped
out or would be cast, ``product`` keeps x itself for the backward pass. ``may_run_whole``,
``_makes_mask``, ``_keeps_x`` and ``_adds_by_function`` decide between them, and nothing else does.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from lora_inject.product import add_product, product

_unsafe_view = torch.ops.aten._unsafe_view.default

# Which way -----------------------------------------------------------------------------------

# Exactly these: a subclass may do anything in its operations.
_PLAIN = frozenset({Tensor, nn.Parameter})
_LARGE = 1 << 14  # with fewer elements, a Function costs more than it saves
_ROWS_TO_UPCAST = 16  # with fewer rows, casting W costs more than it saves


# What an adapter brings to ``adapted_linear``: A, B, its scaling, the dropout in force (0 but in
# training), and the first feature of the output that it adds to with their number, or None for all.
Branch = tuple[Tensor, Tensor, float, float, tuple[int, int] | None]


def _slow_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that this CPU multiplies slower than it casts to float32 and multiplies there."""
    slow = set()
    if torch.cpu._is_avx2_supported():  # x86: other processors do not say what they can do
        if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            slow.add(torch.bfloat16)
        if not torch.cpu._is_amx_fp16_supported():
            slow.add(torch.float16)
    return frozenset(slow)


_SLOW = _slow_dtypes()


def may_run_whole(x_NI: Tensor, W_OI: Tensor | None, branches: Iterable[Branch]) -> bool:
    """Whether ``adapted_linear`` is right for these tensors; the composed way always is.

    Not for tensor subclasses (quantized, DTensor), nor where operations are traced, batched or
    watched. Nor for inputs that ``F.linear`` does not flatten itself: flattened, their products
    would round in another way. None stands for a tensor that is not a parameter of the layer now:
    one that is parametrized, pruned or sharded.
    """
    for A_RI, B_OR, _, _, _ in branches:
        if type(A_RI) not in _PLAIN or type(B_OR) not in _PLAIN:
            return False
    return (
        type(x_NI) in _PLAIN
        and type(W_OI) in _PLAIN
        and (x_NI.dim() == 2 or _is_flattened(x_NI))
        and not _is_transformed()
    )


def _is_flattened(x_NI: Tensor) -> bool:
    """Whether ``F.linear`` flattens an input that is no matrix, which is then the same product."""
    strided = x_NI.layout is torch.strided and not x_NI.is_nested
    return x_NI.dim() == 3 and strided and x_NI.is_contiguous()


def _makes_mask(x_NI: Tensor, A_RI: Tensor) -> bool:
    """Whether dropout is that of ``product``, which keeps x and a seed.

    The same in every grad mode: checkpointing computes without gradients, then with them, and both
    have to draw alike.
    """
    return x_NI.is_cpu and x_NI.numel() >= _LARGE and _may_use_function(x_NI, A_RI)


def _keeps_x(x_NI: Tensor, A_RI: Tensor) -> bool:
    """Whether ``product`` makes ``A x`` where x is not dropped out: it keeps no cast copies."""
    casts = A_RI.dtype != _dtype_of_products(x_NI)
    wanted = (casts and x_NI.numel() >= _LARGE) or _is_slow(x_NI)
    return wanted and _may_use_function(x_NI, A_RI)


def _may_use_function(x_NI: Tensor, A_RI: Tensor) -> bool:
    """Whether a Function is right for these tensors."""
    plain = type(x_NI) in _PLAIN and type(A_RI) in _PLAIN
    return plain and _is_reverse() and not _is_transformed()


def _adds_by_function(y_MO: Tensor, B_OR: Tensor) -> bool:
    """Whether ``add_product`` adds ``B h``: it keeps B as it is, and B's gradient is cheaper."""
    return B_OR.requires_grad and y_MO.numel() >= _LARGE and _is_reverse()


def _is_reverse() -> bool:
    """Whether no forward-mode derivative is being taken, which a Function would not carry."""
    return forward_ad._current_level < 0


def _is_transformed() -> bool:
    """Whether operations are traced, batched or watched, rather than just carried out.

    A compiler fuses the composed way by itself, ``torch.func`` cannot always write in place, and a
    dispatch mode may keep what an operation returned (selective checkpointing does).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


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
    device = x_NI.device.type
    known = torch.amp.is_autocast_available(device)  # not for meta, which raises when it is asked
    if known and torch.is_autocast_enabled(device) and x_NI.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.float32 if _is_slow(x_NI) else x_NI.dtype


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
    wide = _is_slow(x_MI) and x_MI.dtype == W_OI.dtype and _is_reverse()
    y_MO = product(x_MI, W_OI, b_O, torch.float32) if wide else F.linear(x_MI, W_OI, b_O)
    for A_RI, B_OR, scaling, dropout, part in branches:
        h_MR = linear_down(x_MI, A_RI, dropout)
        # y is ours to write: it is new, nobody has seen it, and a product needs no output to
        # find its gradients.
        own_MO = y_MO if part is None else y_MO.narrow(1, *part)
        if torch.is_grad_enabled() and _adds_by_function(own_MO, B_OR):
            add_product(own_MO, h_MR, B_OR, scaling)
        else:
            own_MO.addmm_(h_MR, _cast(B_OR, h_MR.dtype).mT, alpha=scaling)
    if wide:
        y_MO = y_MO.to(x_NI.dtype)
    if x_MI is x_NI:
        return y_MO
    shape = [*x_NI.shape[:-1], y_MO.shape[-1]]
    # As F.linear returns it: a view with a bias, and without one what may be used more freely.
    return y_MO.view(shape) if b_O is not None else cast(Tensor, _unsafe_view(y_MO, shape))


def linear_down(x_NI: Tensor, A_RI: Tensor, dropout: float) -> Tensor:
    """``A dropout(x)``, of shape (N, R) and in the dtype of x, or float32 where that is faster.

    A is cast to x's dtype, never x to its: A is small, and a copy of x in another dtype would be
    kept for the backward pass.
    """
    if dropout and not _makes_mask(x_NI, A_RI):
        x_NI, dropout = F.dropout(x_NI, dropout), 0.0
    if dropout or (torch.is_grad_enabled() and _keeps_x(x_NI, A_RI)):
        return product(x_NI, A_RI, None, _dtype_of_products(x_NI), dropout)
    return F.linear(x_NI, _cast(A_RI, x_NI.dtype))


def linear_up(h_NR: Tensor, B_OR: Tensor) -> Tensor:
    """``B h``, of shape (N, O) and in the dtype of h."""
    return F.linear(h_NR, _cast(B_OR, h_NR.dtype))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)`` without its dispatch where nothing is to do, which one row would feel."""
    return value if value.dtype == dtype else value.to(dtype)


# Embedding -----------------------------------------------------------------------------------


def embedding_down(
    ids_N: Tensor,
    A_RI: Tensor,
    dropout: float,
    *,
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """``A dropout(onehot(ids))``, of shape (N, R), where I counts the embedding's rows.

    Gradients follow the layer's options as if they came through the weight: none for
    ``padding_idx``, or a sparse tensor for A. Dropout acts on the one-hot input: an id keeps its
    whole delta or loses it.
    """
    if sparse:
        h_NR = _sparse_columns(A_RI, ids_N, padding_idx)
    else:
        h_NR = F.embedding(ids_N, A_RI.t(), padding_idx=padding_idx)
    if dropout > 0:
        h_NR = h_NR * F.dropout(torch.ones_like(h_NR[..., :1]), dropout)
    return h_NR


def divide_gradient_by_frequency(delta_NO: Tensor, ids_N: Tensor) -> Tensor:
    """The same value with its gradient divided by how often each id occurs, as for the weight."""
    frequency_N = torch.bincount(ids_N.flatten())[ids_N]
    fixed_NO = delta_NO.detach()
    return fixed_NO + (delta_NO - fixed_NO) / frequency_N.unsqueeze(-1)


def _sparse_columns(A_RI: Tensor, ids_N: Tensor, padding_idx: int | None) -> Tensor:
    """The columns of A for these ids, with a sparse gradient.

    ``F.embedding(sparse=True)`` would need the transpose of a hybrid sparse gradient, which torch
    does not have; ``gather`` makes a plain sparse one.
    """
    index_RN = ids_N.flatten().long().expand(A_RI.shape[0], -1)
    h_NR = A_RI.gather(1, index_RN, sparse_grad=True).t().reshape(*ids_N.shape, A_RI.shape[0])
    if padding_idx is None:
        return h_NR
    return torch.where((ids_N == padding_idx).unsqueeze(-1), h_NR.detach(), h_NR)
