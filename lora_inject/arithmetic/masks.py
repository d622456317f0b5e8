"""Masks of dropout that are known by seeds: the backward pass makes them again instead of keeping.

Layers that share an input (q, k and v) then keep it once, with no masked copy for each. How a mask
is made from its seeds depends on the device; ``masks_for`` says what a tensor's device has.

Shapes: N any number of leading dimensions, M the rows of N flattened, I features, R rank.
"""

import functools
import importlib.util
import os
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_inject.errors import LoRAInjectError

LANES = 1 << 16  # an element is dropped with a probability in steps of 1 / 65,536
KERNELS = "LORA_INJECT_KERNELS"  # "triton" or "torch" forces either; unset, what measured faster


class Masks:
    """One way to make masks, and the products of a masked input; all are pure functions.

    A mask belongs to the shape of an input, to ``dropped``, which is how many of 65,536 elements
    are dropped on average, and to seeds.
    """

    def draw_seeds(self, x_NI: Tensor) -> Tensor:
        """Seeds for an input, from the generator that checkpointing restores."""
        raise NotImplementedError

    def kept(self, shape: torch.Size, dtype: torch.dtype, dropped: int, seeds: Tensor) -> Tensor:
        """The mask: 1 where an element is kept, 0 where it is dropped."""
        raise NotImplementedError

    def down(
        self, x_NI: Tensor, A_RI: Tensor, dropped: int, seeds: Tensor, differentiable: bool
    ) -> Tensor:
        """``A dropout(x)``, of shape (N, R) and in A's dtype.

        Args:
            x_NI: the input, in any dtype.
            A_RI: the factor.
            dropped: see the class.
            seeds: those of ``draw_seeds``.
            differentiable: whether it has to be made of torch's own operations, because it is
                differentiated, batched or traced.
        """
        kept_NI = self.kept(x_NI.shape, A_RI.dtype, dropped, seeds)
        return F.linear(_masked(kept_NI, x_NI, differentiable), A_RI) * _scale(dropped)

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
        """The gradients of x and A, both in t's dtype, where t is that of ``A dropout(x)``.

        Args:
            t_NR: the gradient of what ``down`` returned.
            x_NI: the input, in any dtype, or None where A needs no gradient.
            A_RI: the factor in t's dtype, or None where x needs no gradient.
            shape: the input's.
            dropped: see the class.
            seeds: those of ``draw_seeds``.
            differentiable: as for ``down``.
        """
        kept_NI, t_NR = self.kept(shape, t_NR.dtype, dropped, seeds), t_NR * _scale(dropped)
        dx_NI = dA_RI = None
        if A_RI is not None:
            dx_NI = (t_NR @ A_RI).mul_(kept_NI)
        if x_NI is not None:
            dA_RI = rows(t_NR).t() @ rows(_masked(kept_NI, x_NI, differentiable))
        return dx_NI, dA_RI


def _masked(kept_NI: Tensor, x_NI: Tensor, differentiable: bool) -> Tensor:
    """What is kept of x, in the mask's dtype; the mask is used up unless it is still needed."""
    return kept_NI * x_NI.to(kept_NI.dtype) if differentiable else kept_NI.mul_(x_NI)


def _scale(dropped: int) -> float:
    """By how much what is kept grows."""
    return LANES / (LANES - dropped)


def rows(x_NI: Tensor) -> Tensor:
    """An input as a matrix."""
    return x_NI if x_NI.dim() == 2 else x_NI.reshape(-1, x_NI.shape[-1])


class HashedMasks(Masks):
    """For the CPU, where torch draws one number after the other, which is what dropout costs there.

    A hash of the seeds of a row and of a block of four columns decides the four elements by 16
    bits each, in vector operations.
    """

    def draw_seeds(self, x_NI: Tensor) -> Tensor:
        """64 bits for each row of an input, then for each block of four columns."""
        columns, n_rows = x_NI.shape[-1], prod(x_NI.shape[:-1])
        seeds = torch.empty(n_rows + -(-columns // 4), dtype=torch.int64, device="cpu")
        # None as the upper end fills all 64 bits; random_() alone would leave the highest one zero.
        return seeds.random_(-(1 << 63), None)

    def kept(self, shape: torch.Size, dtype: torch.dtype, dropped: int, seeds: Tensor) -> Tensor:
        """See the class."""
        columns, n_rows = shape[-1], prod(shape[:-1])
        # Multiply, fold the upper half into the lower one, multiply, with the constants of
        # splitmix64 (Steele et al. 2014). A product has to come last: >> fills in the sign, which
        # would show in the highest lane.
        hashed = torch.bitwise_xor(seeds[:n_rows, None], seeds[None, n_rows:])
        hashed.mul_(-0x61C8864680B583EB)
        hashed.bitwise_xor_(hashed >> 32).mul_(-0x40A7B892E31B1A47)
        # Compared in place, then cast: torch.ge(out=) makes a tensor of bools on the way.
        kept_MI = hashed.view(torch.int16).ge_(dropped - LANES // 2)[:, :columns].to(dtype)
        return kept_MI.reshape(shape)


HASHED = HashedMasks()
# On an H200, for a layer of 4,096 x 4,096 in bfloat16 and 4,096 rows, Triton's masks are faster
# than torch's dropout where launches cost nothing (1.41 against 1.54 times the frozen layer, in
# CUDA graphs), and slower where Python launches each kernel (2.9 against 2.3 times).
_MEASURED_FASTER = False


def masks_for(x_NI: Tensor, dtype: torch.dtype) -> Masks | None:
    """How masks are made for an input whose products are made in a dtype.

    None stands for torch's own dropout, which keeps a masked copy and a mask: where nothing faster
    was measured.

    Raises:
        LoRAInjectError: the environment variable ``LORA_INJECT_KERNELS`` asks for what is not here.
    """
    if x_NI.is_cpu:
        return HASHED
    if not x_NI.is_cuda or not _wants_triton(dtype):
        return None
    from lora_inject.arithmetic.philox import PHILOX

    return PHILOX


def _wants_triton(dtype: torch.dtype) -> bool:
    """Whether Triton's kernels are forced or, where nothing is said, measured to be faster."""
    asked = os.environ.get(KERNELS, "")
    if asked not in ("", "torch", "triton"):
        raise LoRAInjectError(
            f"the environment variable {KERNELS} is {asked!r}.",
            remedy='Set it to "triton" or "torch", or unset it.',
        )
    if asked == "triton" and not _has_triton():
        raise LoRAInjectError(
            f"the environment variable {KERNELS} asks for Triton, which is not installed.",
            remedy="Install triton, or unset the variable.",
        )
    possible = dtype in (torch.bfloat16, torch.float16) and asked != "torch"
    return possible and (asked == "triton" or (_MEASURED_FASTER and _has_triton()))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
