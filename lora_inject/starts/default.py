"""The usual start: one of A and B random, the other zero (LoRA section 4.1).

This is what the other files of this room differ from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_inject.variants import LayerKind, Spec


@dataclass(frozen=True)
class Start:
    """Where the A and B of an adapter begin.

    Attributes:
        name: what ``inject(init=)`` calls it.
        reads: whether it needs the values of the weight, which a model on the meta device has not.
        offset: whether ``B A`` is not zero at the start. The start is then kept as A0 and B0 and
            subtracted, so that the base is never moved and no output changes.
        fixed: the factor that stays as it starts, or None.
        needs: what an object must be made of, where a word is not enough.
    """

    name: ClassVar[str] = "default"
    reads: ClassVar[bool] = False
    offset: ClassVar[bool] = False
    fixed: ClassVar[str | None] = None
    needs: ClassVar[str] = ""

    def at(self, path: str) -> "Start":
        """The start of the layer with this path; most are the same for all."""
        return self

    @property
    def word(self) -> str:
        """What files call it."""
        return self.name

    @property
    def note(self) -> str:
        """What a report says where layers have started so; mostly nothing."""
        return ""

    def zero(self, kind: LayerKind) -> str | None:
        """Which of A and B is zero at the start, and would never learn if it were fixed."""
        return None if self.offset else kind.zero

    def refusal(self, kind: LayerKind, layer: nn.Module, spec: Spec) -> str | None:
        """Why a pair cannot start so, with the remedy; None where it can."""
        return None

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A and B of a pair, in the shapes of its spec.

        Args:
            kind: the kind of layer.
            layer: the layer.
            W: the values of the weight, where ``reads`` asks for them; else it may be None.
            spec: the pair.
            scaling: the factor of ``B A``.
            generator: a generator on the CPU, seeded for this pair.
        """
        return kind.initial(spec, generator)


@dataclass(frozen=True)
class Decomposed(Start):
    """A start from r directions of the weight: what is common to them."""

    reads = True

    def refusal(self, kind: LayerKind, layer: nn.Module, spec: Spec) -> str | None:
        """A matrix has no more directions than its smaller side."""
        return rank_refusal(self.name, spec, matrix_shape(kind, layer, spec))


def balanced(U_OR: Tensor, S_R: Tensor, V_IR: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B of equal lengths, whose product times the scaling is ``U S V``."""
    root_R = (S_R / scaling).sqrt().unsqueeze(-2)
    return (V_IR * root_R).mT, U_OR * root_R


def of_matrices(kind: LayerKind, layer: nn.Module, A: Any, B: Any) -> tuple[Tensor, Tensor]:
    """A (..., r, in) and B (..., out, r) in the shapes that the layer's kind has."""
    made = kind.from_matrices(layer, A, B)
    return made[0].contiguous(), made[1].contiguous()


def rows_of(kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec) -> Tensor:
    """The weight as matrices (..., out, in) in at least float32, in the rows of the pair's part."""
    assert W is not None
    W_OI = kind.to_matrix(layer, W.detach().to(torch.promote_types(W.dtype, torch.float32)))
    return W_OI.narrow(-2, spec.start, spec.n_out) if spec.part else W_OI


def rank_refusal(name: str, spec: Spec, shape: Sequence[int]) -> str | None:
    """Why a decomposition of a matrix (..., out, in) has no r directions."""
    most = min(shape[-2:])
    if spec.rank <= most:
        return None
    return (
        f'init="{name}" has {most} directions here, fewer than r={spec.rank}. Give it a smaller r '
        "by a pattern of its own, or exclude it."
    )


def matrix_shape(kind: LayerKind, layer: nn.Module, spec: Spec) -> tuple[int, int]:
    """(out, in) of the matrix that a pair is for, from the shapes of its A and B."""
    A, B = kind.to_matrices(
        layer, torch.empty(spec.A_shape, device="meta"), torch.empty(spec.B_shape, device="meta")
    )
    return B.shape[-2], A.shape[-1]
