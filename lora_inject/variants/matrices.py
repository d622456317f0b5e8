"""A weight as one matrix: a row for each output feature, with all that it reads.

What a variant that is no ``B A`` needs of it. Of a grouped convolution, whose rows read the
channels of their own group, it is (out, in/groups * kernel), as other libraries have it.

Shapes: E experts, O out features, I in channels (of a group), k kernel, R rank.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.variants.change import LayerKind, Spec


class Sizes(NamedTuple):
    """The sizes of a weight as one matrix: (*experts, rows, channels * kernel).

    Attributes:
        experts: (E,) of a fused weight, else ().
        rows: output features.
        channels: what a row reads, without the kernel.
        kernel: the sizes of a convolution's kernel, else ().
    """

    experts: tuple[int, ...]
    rows: int
    channels: int
    kernel: tuple[int, ...]

    @property
    def columns(self) -> int:
        """All that a row reads."""
        return self.channels * math.prod(self.kernel)


def sizes(spec: Spec) -> Sizes:
    """The sizes of the weight that a pair is for."""
    experts = (spec.experts,) if spec.experts else ()
    kernel = () if experts else spec.A_shape[2:]
    return Sizes(experts, spec.n_out, spec.n_in // spec.groups, kernel)


def product(A: Tensor, B: Tensor, mid: Tensor | None = None) -> Tensor:
    """``B A``; with a core (R, R, *k) between, A is (R, I) and the result (O, I * k)."""
    return B @ (A if mid is None else inner(A, mid))


def inner(A: Tensor, mid: Tensor) -> Tensor:
    """A core (R, R, *k) and A (R, I) as one matrix (R, I * k)."""
    return torch.einsum("rs...,si->ri...", mid, A).flatten(1)


def to_weight(kind: LayerKind, layer: nn.Module, W: Tensor, matrix: Tensor) -> Tensor:
    """A matrix in the shape of the weight W."""
    return kind.from_matrix(layer, matrix.reshape(kind.to_matrix(layer, W).shape), W.shape)


def of_groups(kind: LayerKind, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the one matrix as those of what the kind has, a convolution's by its groups."""
    groups = getattr(layer, "groups", None)
    if groups is None or A.dim() > 2:
        return A, B
    return A.expand(groups, *A.shape), B.reshape(groups, -1, B.shape[-1])
