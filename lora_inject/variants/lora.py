"""LoRA as it was published (arXiv 2106.09685): ``W + alpha / r * B A``, and A and B train.

This is what the other files of this room differ from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Scaling:
    """How alpha and the rank become the factor of ``B A``."""

    name: ClassVar[str] = "lora"  # what ``inject(scaling=)`` calls it
    peft: ClassVar[Mapping[str, Any]] = {}  # what a PEFT config says of it

    def factor(self, alpha: float, r: int) -> float:
        """The factor, of alpha and r."""
        return alpha / r

    def alpha(self, factor: float, r: int) -> float:
        """The alpha, of a factor and r."""
        return factor * r


@dataclass(frozen=True)
class Variant:
    """What the tensors of an adapter are to a weight: ``B A`` here, scaled.

    Attributes:
        scaling: the rule of the factor.
        fixed: the tensor of a pair that stays as it starts, or None.
        roles: the tensors of a pair.
        additive: whether changes of several adapters may be summed, stand beside each other row by
            row, and be computed together with the layer's own product.
    """

    scaling: Scaling = Scaling()
    fixed: str | None = None
    roles: ClassVar[tuple[str, ...]] = ("A", "B")
    additive: ClassVar[bool] = True

    @property
    def text(self) -> str:
        """What differs from plain LoRA, for tables."""
        rule = "" if self.scaling.name == "lora" else f", {self.scaling.name}"
        return rule + (f", {self.fixed} fixed" if self.fixed else "")

    def trains(self, role: str) -> bool:
        """Whether the tensor of this role trains when the adapter does."""
        return role != self.fixed
