"""Products ``B A`` of low rank, worked with without making them.

A is (..., r, in) and B is (..., out, r); leading dimensions are groups or experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def side_by_side(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of all ``B A`` as one pair of the summed rank."""
    return torch.cat([A for A, _ in pairs], -2), torch.cat([B for _, B in pairs], -1)


def truncated(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``B A`` by rank r, in its Frobenius norm; B holds the values.

    The product is never made: with ``B = Q R`` and ``A^T = P S`` its singular values are those of
    the small ``R S^T``. Where the shapes allow less than r, the rest is zero.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.transpose(-2, -1))
    U, S, Vh = torch.linalg.svd(R_B @ R_A.transpose(-2, -1), full_matrices=False)
    rank = min(r, S.shape[-1])
    new_B = (Q_B @ U[..., :rank]) * S[..., None, :rank]
    new_A = Vh[..., :rank, :] @ Q_A.transpose(-2, -1)
    return F.pad(new_A, (0, 0, 0, r - rank)), F.pad(new_B, (0, r - rank))


def dominant(
    W: Tensor, q: int, iterations: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The q largest singular values of a matrix with their vectors (U, S, V), to an approximation.

    What ``torch.svd_lowrank`` computes (Halko et al. 2009, algorithms 4.4 and 5.1), but with random
    numbers that neither come from a global generator nor depend on the device.
    """
    if W.shape[-2] < W.shape[-1]:
        V, S, U = dominant(W.mT, q, iterations, generator)
        return U, S, V
    generator = generator or torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(W.shape[-1], q, generator=generator, dtype=W.dtype, device="cpu")
    Q = torch.linalg.qr(W @ start.to(W.device)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W.mT @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return Q @ U, S, Vh.mT


def gram_norm(A: Tensor, B: Tensor) -> Tensor:
    """The Frobenius norm of ``B A`` on its device, of r x r products, in at least float32."""
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt()


def product_norm(A: Tensor, B: Tensor) -> float:
    """The Frobenius norm of ``B A`` in float64, without making the product."""
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.double().transpose(-2, -1), mode="r").R
    return float((R_B @ R_A.transpose(-2, -1)).norm())


def difference_norm(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The Frobenius norm of the difference of two products of pairs A, B of any ranks."""
    return product_norm(*side_by_side([one, (other[0], -other[1])]))


def same_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether two pairs A, B of matrices have one product, whatever their ranks."""
    if one[0].shape[-1] != other[0].shape[-1] or one[1].shape[-2] != other[1].shape[-2]:
        return False
    return difference_norm(one, other) <= 1e-6 * product_norm(*one)
