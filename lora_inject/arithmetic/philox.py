"""Masks of dropout on a GPU, by Triton: a counter-based generator inside of the products.

A mask is Philox-4x32 with seven rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3"), of one seed for an input and of an element's row and block of eight columns: of the 128 bits
that this gives each sixteen decide one of the eight elements. The products make the mask where they
read x, so that no masked copy of x is ever written.

Shapes: M rows, I in features, R rank; t_MR is the gradient of h_MR = ``A dropout(x)``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_inject.arithmetic.masks import LANES, Masks, rows

_ROUNDS = tl.constexpr(7)


@triton.jit
def _kept(seed, rows_M, first_column, dropped, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask of a tile, whose first column is a multiple of eight."""
    blocks = first_column // 8 + tl.arange(0, COLUMNS // 8)
    row = tl.broadcast_to(rows_M[:, None], (ROWS, COLUMNS // 8))
    block = tl.broadcast_to(blocks[None, :], (ROWS, COLUMNS // 8))
    zero = row * 0
    a, b, c, d = tl.philox(seed, row, block, zero, zero, _ROUNDS)
    words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))
    lanes = tl.interleave(words & 0xFFFF, words >> 16)
    return lanes >= dropped


@triton.jit
def _mask_kernel(
    kept_ptr,
    seed_ptr,
    M,
    I,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a whole mask: for what differentiates again, and for tests."""
    first = tl.program_id(1) * COLUMNS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    kept = _kept(tl.load(seed_ptr), row, first, dropped, ROWS, COLUMNS)
    at = row.to(tl.int64)[:, None] * I + column[None, :]
    inside = (row < M)[:, None] & (column < I)[None, :]
    tl.store(kept_ptr + at, kept.to(kept_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(
    x_ptr, A_ptr, h_ptr, seed_ptr, M, R, stride, dropped, scale,
    I: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some rows of h: all of their x is read once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * stride
    seed = tl.load(seed_ptr)
    h = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, I, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < M)[:, None] & (column < I)[None, :]
        x = tl.load(x_rows + column[None, :], mask=inside, other=0.0)
        A_inside = (column < I)[:, None] & (rank < R)[None, :]
        A = tl.load(A_ptr + rank[None, :] * I + column[:, None], mask=A_inside, other=0.0)
        kept = _kept(seed, row, first, dropped, ROWS, COLUMNS)
        masked = tl.where(kept, x, 0.0).to(A.dtype)
        h = tl.dot(masked, A, h, input_precision=PRECISION)
    at = row.to(tl.int64)[:, None] * R + rank[None, :]
    inside = (row < M)[:, None] & (rank < R)[None, :]
    tl.store(h_ptr + at, (h * scale).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(
    t_ptr, x_ptr, A_ptr, dx_ptr, dA_ptr, seed_ptr, M, I, R, stride, dropped, scale,
    NEEDS_X: tl.constexpr, NEEDS_A: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of dx and, summed over a share of the rows, of dA, from one mask."""
    first, share = tl.program_id(0) * COLUMNS, tl.program_id(1)
    column = first + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    A_at = rank[:, None] * I + column[None, :]
    A_inside = (rank < R)[:, None] & (column < I)[None, :]
    seed = tl.load(seed_ptr)
    if NEEDS_X:
        A = tl.load(A_ptr + A_at, mask=A_inside, other=0.0)
    dA = tl.zeros((RANK, COLUMNS), tl.float32)
    for step in range(STEPS):
        row = (share * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < I)[None, :]
        t_inside = (row < M)[:, None] & (rank < R)[None, :]
        t = tl.load(t_ptr + row[:, None] * R + rank[None, :], mask=t_inside, other=0.0)
        kept = _kept(seed, row, first, dropped, ROWS, COLUMNS)
        if NEEDS_A:
            x_at = row.to(tl.int64)[:, None] * stride + column[None, :]
            x = tl.load(x_ptr + x_at, mask=inside, other=0.0)
            masked = tl.where(kept, x, 0.0).to(t.dtype)
            dA = tl.dot(tl.trans(t), masked, dA, input_precision=PRECISION)
        if NEEDS_X:
            dx = tl.where(kept, tl.dot(t, A, input_precision=PRECISION) * scale, 0.0)
            at = row.to(tl.int64)[:, None] * I + column[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if NEEDS_A:
        tl.store(dA_ptr + share * R * I + A_at, dA * scale, mask=A_inside)


class PhiloxMasks(Masks):
    """See the module; A and t are in bfloat16, float16 or float32, and x in any of them."""

    def draw_seeds(self, x_NI: Tensor) -> Tensor:
        """One seed, from the generator of x's device."""
        return torch.randint(1 << 62, (1,), device=x_NI.device)

    def kept(self, shape: torch.Size, dtype: torch.dtype, dropped: int, seeds: Tensor) -> Tensor:
        """As a tensor, which the products do without."""
        kept_NI = torch.empty(shape, dtype=dtype, device=seeds.device)
        M, I = rows(kept_NI).shape
        grid = triton.cdiv(M, 32), triton.cdiv(I, 128)
        if kept_NI.numel():
            _mask_kernel[grid](kept_NI, seeds, M, I, dropped, 32, 128)
        return kept_NI

    def down(
        self, x_NI: Tensor, A_RI: Tensor, dropped: int, seeds: Tensor, differentiable: bool
    ) -> Tensor:
        """As the class above has it, in one kernel."""
        if differentiable or not x_NI.numel():
            return super().down(x_NI, A_RI, dropped, seeds, differentiable)
        x_MI, A_RI = _matrix(x_NI), A_RI.contiguous()
        (M, I), R = x_MI.shape, A_RI.shape[0]
        h_MR = torch.empty(M, R, dtype=A_RI.dtype, device=x_MI.device)
        tile, options = _tile(_DOWN, R)
        _down_kernel[(triton.cdiv(M, tile["ROWS"]),)](
            x_MI, A_RI, h_MR, seeds, M, R, x_MI.stride(0), dropped, LANES / (LANES - dropped),
            I, **tile, PRECISION=_precision(A_RI), **options,
        )  # fmt: skip
        return h_MR.view(*x_NI.shape[:-1], R)

    def gradients(
        self,
        t_NR: Tensor,
        x_NI: Tensor | None,
        A_RI: Tensor | None,
        shape: torch.Size,
        dropped: int,
        seeds: Tensor,
        differentiable: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As the class above has it, in one kernel and a sum over shares of the rows."""
        if differentiable or not t_NR.numel():
            return super().gradients(t_NR, x_NI, A_RI, shape, dropped, seeds, differentiable)
        t_MR, I = rows(t_NR).contiguous(), shape[-1]
        M, R = t_MR.shape
        tile, options = _tile(_GRADIENTS, R)
        # A power of two: a kernel is compiled for each number of steps.
        steps = triton.next_power_of_2(triton.cdiv(M, _SHARES * tile["ROWS"]))
        shares = triton.cdiv(M, steps * tile["ROWS"])
        x_MI = t_MR if x_NI is None else _matrix(x_NI)
        A_RI = None if A_RI is None else A_RI.contiguous()
        dx_NI = None if A_RI is None else torch.empty(shape, dtype=t_MR.dtype, device=t_MR.device)
        sums = (0 if x_NI is None else shares, R, I)
        dA_SRI = torch.empty(sums, dtype=torch.float32, device=t_MR.device)
        _gradients_kernel[(triton.cdiv(I, tile["COLUMNS"]), shares)](
            t_MR, x_MI, t_MR if A_RI is None else A_RI, t_MR if dx_NI is None else dx_NI, dA_SRI,
            seeds, M, I, R, x_MI.stride(0), dropped, LANES / (LANES - dropped),
            A_RI is not None, x_NI is not None, steps,
            **tile, PRECISION=_precision(t_MR), **options,
        )  # fmt: skip
        return dx_NI, None if x_NI is None else dA_SRI.sum(0).to(t_MR.dtype)


PHILOX = PhiloxMasks()

# Tiles, and how many warps and stages a program has: what measured best on an H200 for 4,096 rows
# and columns in bfloat16 and a rank of 16.
_DOWN: dict[str, int] = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4, "num_stages": 3}
_GRADIENTS: dict[str, int] = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
_SHARES = 16


def _tile(chosen: dict[str, int], R: int) -> tuple[dict[str, int], dict[str, Any]]:
    """The sizes of a tile for a rank, and the options of a launch."""
    options = {name: chosen[name] for name in ("num_warps", "num_stages")}
    rank = max(16, triton.next_power_of_2(R))  # the least that the matrix units take
    return {"ROWS": chosen["ROWS"], "COLUMNS": chosen["COLUMNS"], "RANK": rank}, options


def _matrix(x_NI: Tensor) -> Tensor:
    """An input as a matrix whose rows are contiguous."""
    x_MI = rows(x_NI)
    return x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()


def _precision(A_RI: Tensor) -> str:
    """float32 is multiplied as such, and not in fewer bits."""
    return "ieee" if A_RI.dtype == torch.float32 else "tf32"
