"""What an adapter adds to an embedding, with the gradients that the layer's options ask for.

Shapes: N any number of leading dimensions, I the embedding's rows, O its width, R rank, n rows that
train. A is (R, I), B is (O, R); ids_N, h_NR and delta_NO are named by their shapes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def looked_up(
    ids_N: Tensor, index_n: Tensor, rows_nO: Tensor, padding_idx: int | None = None
) -> Tensor:
    """The rows of these ids, of shape (N, O), and zeros for ids that have none.

    Args:
        ids_N: the ids.
        index_n: the ids that have rows, ascending.
        rows_nO: their rows.
        padding_idx: an id whose row gets no gradient, as in the layer.
    """
    ids_N = ids_N.to(index_n.dtype)
    at_N = torch.searchsorted(index_n, ids_N.contiguous()).clamp(max=index_n.shape[0] - 1)
    misses_N = (index_n[at_N] != ids_N).unsqueeze(-1)
    found_NO = F.embedding(at_N, rows_nO).masked_fill(misses_N, 0)
    if padding_idx is None:
        return found_NO
    return torch.where((ids_N == padding_idx).unsqueeze(-1), found_NO.detach(), found_NO)


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
