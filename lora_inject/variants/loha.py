"""LoHa (arXiv 2108.06098, 2309.14859): two products of rank r, multiplied element by element.

    W + s (B A) o (B2 A2)        A, A2 (r, in); B, B2 (out, r); s = alpha / r

The change has a rank of up to r^2 with twice LoRA's parameters. It acts in the weight. Files of
convolutions may have a core (r, r, *kernel) between the factors, ``mid`` and ``mid2``; A and A2 are
(r, in) then, without the kernel.

Starting values are those of its authors: normal ones, and B2 zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.arithmetic.hadamard import hadamard
from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.lora import Variant
from lora_inject.variants.matrices import inner, of_groups, sizes, to_weight

_SPREAD = {"A": 1.0, "B": 0.1, "mid": 0.1, "A2": 1.0, "B2": 0.0, "mid2": 0.1}


@dataclass(frozen=True)
class LoHa(Variant):
    """``(B A) o (B2 A2)``.

    Attributes:
        cores: whether a convolution has cores between its factors (Tucker).
    """

    cores: bool = False
    name = "loha"
    more: ClassVar[tuple[str, ...]] = ("A2", "B2", "mid", "mid2")
    additive = False
    way = "weight"
    own_shapes = True

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "LoHa":
        """With cores, or without."""
        return cls(cores="mid" in tensors)

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """Twice A and B."""
        size, r = sizes(spec), spec.rank
        cores = self.cores and bool(size.kernel)
        A = (*size.experts, r, size.channels if cores else size.columns)
        B, mid = (*size.experts, size.rows, r), (r, r, *size.kernel)
        return {"A": A, "B": B, "A2": A, "B2": B, **({"mid": mid, "mid2": mid} if cores else {})}

    def begin(self, spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
        """Normal values, and B2 zero."""
        return {
            role: initial.normal(shape, generator) * _SPREAD[role]
            for role, shape in LoHa.shapes(self, spec).items()  # and none of what a DoRA adds
        }

    def update(self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change) -> Tensor:
        """``(B A) o (B2 A2)`` in the shape of the weight W."""
        own = c.tensors
        A, A2 = _inner(own)
        return to_weight(kind, layer, W, hadamard(A, own["B"], A2, own["B2"]))

    def low_rank(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """One A and one B of rank r^2: each row of A times each of A2, and so of columns of B."""
        A = torch.einsum("...ri,...si->...rsi", *_inner(tensors)).flatten(-3, -2)
        B = torch.einsum("...or,...os->...ors", tensors["B"], tensors["B2"]).flatten(-2)
        return of_groups(kind, layer, A, B)


def _inner(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and A2 with all that a row reads: with the kernels of their cores."""
    if "mid" not in own:
        return own["A"], own["A2"]
    return inner(own["A"], own["mid"]), inner(own["A2"], own["mid2"])
