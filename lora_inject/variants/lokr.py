"""LoKr (arXiv 2309.14859): the Kronecker product of two matrices, each whole or a product itself.

    W + s kron(w1, w2)        w1 (o1, i1), w2 (o2, i2 * kernel); o1 o2 = out, i1 i2 = in

The tensors by role, with the names that others have for them:

             whole      a product of rank r
    w1       B          B (o1, r)  times  B2 (r, i1)                     lokr_w1, _w1_a, _w1_b
    w2       A          A2 (o2, r) times  A (r, i2 * kernel)             lokr_w2, _w2_a, _w2_b

Between A2 and A, files of convolutions may have a core ``mid`` (r, r, *kernel); A is (r, i2) then.
It acts in the weight. At the start A is zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.lora import Variant
from lora_inject.variants.matrices import Sizes, product, sizes, to_weight


class Factors(NamedTuple):
    """How a weight is divided.

    Attributes:
        rows: o1.
        columns: i1.
        first: whether w1 is a product of rank r.
        second: whether w2 is.
        core: whether w2 has a core of the size of the kernel.
    """

    rows: int
    columns: int
    first: bool
    second: bool
    core: bool = False


@dataclass(frozen=True)
class LoKr(Variant):
    """``kron(w1, w2)``.

    Example:
        >>> inject(model, "q_proj", r=8, variant=LoKr(factor=4))  # doctest: +SKIP

    Attributes:
        factor: o1 and i1, where they divide the features; -1 for sizes as equal as there are.
        both: whether w1 is a product too where r is below half of its larger side, as w2 is.
        given: the sizes that a file has, in place of these rules.
    """

    factor: int = -1
    both: bool = False
    given: Factors | None = None
    name = "lokr"
    more: ClassVar[tuple[str, ...]] = ("A2", "B2", "mid")
    additive = False
    way = "weight"
    own_shapes = True

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "LoKr":
        """With the sizes that the tensors have."""
        columns = tensors.get("B2", tensors["B"]).shape[-1]
        first, second, core = (role in tensors for role in ("B2", "A2", "mid"))
        return cls(given=Factors(tensors["B"].shape[-2], columns, first, second, core))

    def factors(self, size: Sizes, r: int) -> Factors:
        """How a weight is divided."""
        if self.given is not None:
            return self.given
        (o1, o2), (i1, i2) = (divided(n, self.factor) for n in (size.rows, size.channels))
        return Factors(o1, i1, self.both and 2 * r < max(o1, i1), 2 * r < max(o2, i2))

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """w1 and w2, or their factors."""
        size, r = sizes(spec), spec.rank
        E, kernel, of = size.experts, size.kernel, self.factors(size, r)
        o2, i2 = size.rows // of.rows, size.channels // of.columns
        if of.first:
            shapes = {"B": (*E, of.rows, r), "B2": (*E, r, of.columns)}
        else:
            shapes = {"B": (*E, of.rows, of.columns)}
        if not of.second:
            return {"A": (*E, o2, i2, *kernel), **shapes}
        columns = i2 if of.core else i2 * math.prod(kernel)
        core = {"mid": (r, r, *kernel)} if of.core else {}
        return {"A": (*E, r, columns), "A2": (*E, o2, r), **shapes, **core}

    def refusal(
        self, kind: LayerKind, layer: nn.Module, spec: Spec, beside: bool, dropout: float
    ) -> str | None:
        """Where sizes of a file do not divide the weight, or it stands the other way round."""
        if spec.swapped:
            return "LoKr has rows where columns are here. Untie them or use variant='lora'."
        size, of = sizes(spec), self.given
        if of and (size.rows % of.rows or size.channels % of.columns):
            return (
                f"a w1 of {of.rows} x {of.columns} does not divide {size.rows} x {size.channels}."
            )
        return super().refusal(kind, layer, spec, beside, dropout)

    def begin(self, spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
        """Kaiming-uniform values over what each tensor reads, and A zero."""
        rows = 1 if spec.experts else 0
        return {
            role: initial.zeros(shape)
            if role == "A"
            else initial.kaiming_uniform(shape, math.prod(shape[rows + 1 :]), generator)
            for role, shape in LoKr.shapes(self, spec).items()  # and none of what a DoRA adds
        }

    def update(self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change) -> Tensor:
        """``kron(w1, w2)`` in the shape of the weight W."""
        own = c.tensors
        w1 = product(own["B2"], own["B"]) if "B2" in own else own["B"]
        w2 = product(own["A"], own["A2"], own.get("mid")) if "A2" in own else own["A"]
        matrix = torch.einsum("...oi,...pj->...opij", w1, w2.flatten(w1.dim() - 1))
        return to_weight(kind, layer, W, matrix)

    def low_rank(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Its rank is the product of those of both, which is no low one."""
        return None


def divided(size: int, factor: int = -1) -> tuple[int, int]:
    """A number as a product of two: of the factor where it divides it, else as equal as can be.

    The first is at most the factor then, where there is one.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = max(n for n in range(1, max(most, 1) + 1) if size % n == 0)
    return first, size // first
