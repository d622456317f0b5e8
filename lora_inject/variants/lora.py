"""LoRA as it was published (arXiv 2106.09685): ``W + alpha / r * B A``, and A and B train.

This is what the other files of this room differ from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.arithmetic.low_rank import side_by_side
from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.lora_fa import OTHER


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
    """What the tensors of an adapter are to a weight: an additive change of its former value.

    Several adapters add up, each times its weight in use, in whatever order: 0 is the base, 1 is
    the adapter.

    Attributes:
        scaling: the rule of the factor.
        fixed: the tensor of a pair that stays as it starts, or None.
        offset: whether the adapter starts elsewhere than at zero: its start is then kept as A0 and
            B0, and subtracted, so that the base is never moved: ``B A - B0 A0`` stands wherever
            this room says ``B A``.
        more: the tensors that a pair has besides A and B.
        finishes: whether the change is made of the layer's output with ``B A`` added, alone and in
            use with a weight of 1, by ``finish``.
        derived: those of ``more`` that follow from the base alone; files do not have them.
        additive: whether changes of several adapters may stand beside each other row by row, and be
            computed together with the layer's own product: whether the change is a ``B A``.
        of_base: whether the change depends on the former weight, so that it cannot stay beside one
            into which others are merged.
        way: "weight" for what can act in the weight alone; None for what can act either way.
        own_shapes: whether its tensors have shapes and starting values of its own, whatever the
            kind of layer says of A and B.
        peft: what a PEFT config says of it.
        keys: what PEFT calls the tensors of ``more``.
    """

    scaling: Scaling = Scaling()
    fixed: str | None = None
    offset: bool = False
    name: ClassVar[str] = "lora"  # what ``inject(variant=)`` calls it
    more: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = True
    finishes: ClassVar[bool] = False
    of_base: ClassVar[bool] = False
    way: ClassVar[Literal["weight"] | None] = None
    own_shapes: ClassVar[bool] = False
    peft: ClassVar[Mapping[str, Any]] = {}
    keys: ClassVar[Mapping[str, str]] = {}

    @property
    def roles(self) -> tuple[str, ...]:
        """The tensors that a pair may have; ``shapes`` says those that one has."""
        return ("A", "B", *(("A0", "B0") if self.offset else ()), *self.more)

    @property
    def argument(self) -> str:
        """The argument of ``inject`` that asks for it."""
        return f"variant={self.name!r}"

    @property
    def text(self) -> str:
        """What differs from plain LoRA, for tables."""
        words = (
            "" if self.name == Variant.name else self.name,
            "" if self.scaling.name == Scaling.name else self.scaling.name,
            f"{self.fixed} fixed" if self.fixed else "",
            "start subtracted" if self.offset else "",
        )
        return "".join(f", {word}" for word in words if word)

    @property
    def meaning(self) -> str:
        """All that the meaning of its tensors depends on besides the rank and alpha."""
        return self.text

    def trains(self, role: str) -> bool:
        """Whether the tensor of this role trains when the adapter does."""
        return role != self.fixed and role not in ("A0", "B0")

    def spec(self, kind: LayerKind, spec: Spec) -> Spec:
        """The spec that the variant makes of the one that a kind of layer has for a pair."""
        return spec

    def turned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A pair's tensors for a tied layer that keeps the weight the other way round."""
        return {OTHER[role]: tensor.transpose(-2, -1) for role, tensor in tensors.items()}

    def packed(self) -> "Variant":
        """The same for a weight that only the layer's own forward can read."""
        return self

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The shapes of a pair's tensors by role."""
        start = {"A0": spec.A_shape, "B0": spec.B_shape} if self.offset else {}
        return {"A": spec.A_shape, "B": spec.B_shape, **start}

    def elements(self, spec: Spec) -> int:
        """How many parameters a pair has."""
        if type(self) is Variant:  # as nearly always
            return spec.elements * (2 if self.offset else 1)
        return sum(math.prod(shape) for shape in self.shapes(spec).values())

    def dtype(self, role: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tensor, of that which the adapter is to have."""
        return dtype

    def refusal(
        self, kind: LayerKind, layer: nn.Module, spec: Spec, beside: bool, dropout: float
    ) -> str | None:
        """Why a pair cannot be had, with the remedy; None where it can.

        Args:
            kind: the kind of layer.
            layer: the layer.
            spec: the pair.
            beside: whether it acts beside the layer's own forward, else in its weight.
            dropout: the probability that was asked for.
        """
        if self.offset and dropout and kind.zero == "A":
            return "dropout of a start that is subtracted acts on the input, and ids have none."
        return None

    def starting(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec,
        tensors: Mapping[str, Tensor], scaling: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The starting values of ``more``, of those of the other tensors.

        Args:
            kind: the kind of layer.
            layer: the layer.
            W: its weight's values, or None where it is packed.
            spec: the pair.
            tensors: A and B, and A0 and B0 where there are such.
            scaling: the factor of ``B A``.
        """
        return {}

    def begin(self, spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
        """The starting values of all tensors, where they have shapes of their own."""
        raise NotImplementedError(f"{self.name} starts as its start says")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Variant":
        """The variant as the tensors of a file tell it."""
        return cls()

    def delta(self, kind: LayerKind, layer: nn.Module, x: Tensor, y: Tensor, c: Change) -> Tensor:
        """``B A x`` of an input x, before scaling.

        Two products of one shape cancel exactly where they are equal, as those of A and A0 are at
        the start; with dropout, both see the same x.
        """
        own, dropout = c.tensors, c.dropout
        if self.offset and dropout:
            x, dropout = F.dropout(x, dropout), 0.0
        made = kind.up(layer, x, kind.down(layer, x, y, own["A"], dropout), own["B"])
        if self.offset:
            made = made - kind.up(layer, x, kind.down(layer, x, y, own["A0"], 0.0), own["B0"])
        return made

    def update(self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change) -> Tensor:
        """``B A`` in the shape of the weight W, before scaling."""
        made = kind.update(layer, W, c.spec, c.tensors["A"], c.tensors["B"])
        if self.offset:
            made = made - kind.update(layer, W, c.spec, c.tensors["A0"], c.tensors["B0"])
        return made

    def products(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The A (..., r, in) and B (..., out, r) whose ``B A`` an ``additive`` change is.

        Before scaling; where a start is subtracted, a second pair is taken away from the first.
        """
        roles = [("A", "B"), *([("A0", "B0")] if self.offset else [])]
        return [kind.to_matrices(layer, tensors[A], tensors[B]) for A, B in roles]

    def low_rank(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The change before scaling as one A (..., r, in) and one B (..., out, r), if it is one."""
        return self.with_start(kind, layer, tensors)

    def with_start(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A and B as matrices, with a start that is subtracted beside them: of twice the rank."""
        (A, B), *start = self.products(kind, layer, tensors)
        return side_by_side([(A, B), *((A0, -B0) for A0, B0 in start)]) if start else (A, B)

    def full_rank(
        self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change
    ) -> tuple[Tensor, Tensor]:
        """The change, scaling included, as matrices: A (..., r, in) and B (..., out, r), exactly.

        One of them is the change and the other the identity; r is the smaller side of the weight.
        """
        own = c._replace(factor=c.scaling)
        change = self.add_to_weight(kind, layer, W, torch.zeros_like(W), own)
        D_OI = kind.to_matrix(layer, change)
        if c.spec.part:
            D_OI = D_OI.narrow(-2, c.spec.start, c.spec.n_out)
        n_out, n_in = D_OI.shape[-2:]
        eye = torch.eye(min(n_out, n_in), dtype=D_OI.dtype, device=D_OI.device)
        eye = eye.expand(*D_OI.shape[:-2], -1, -1)
        return (D_OI, eye) if n_out < n_in else (eye, D_OI)

    def add_to_output(
        self, kind: LayerKind, layer: nn.Module, x: Tensor, former: Tensor, y: Tensor, c: Change
    ) -> Tensor:
        """An output y with what the change makes of the input x.

        Args:
            kind: the kind of layer.
            layer: the layer.
            x: its first input.
            former: what the layer computed without adapters.
            y: the same, with what other adapters added.
            c: the change.
        """
        return add(y, self.delta(kind, layer, x, former, c), c.factor, c.spec)

    def finish(self, kind: LayerKind, layer: nn.Module, y: Tensor, c: Change) -> Tensor:
        """The output of the layer, of ``(W + s B A) x + b``, where ``finishes`` says so."""
        return y

    def add_to_weight(
        self, kind: LayerKind, layer: nn.Module, W: Tensor, total: Tensor, c: Change
    ) -> Tensor:
        """A weight with the change added.

        Args:
            kind: the kind of layer.
            layer: the layer.
            W: the former weight, of which the change is one.
            total: the same, with what other adapters added.
            c: the change.
        """
        if isinstance(c.factor, Tensor):
            return total + self.update(kind, layer, W, c) * c.factor
        return torch.add(total, self.update(kind, layer, W, c), alpha=c.factor)


def add(y: Tensor, delta: Tensor, factor: float | Tensor, spec: Spec) -> Tensor:
    """``y + factor * delta`` in y's dtype; a delta may be for one part of y's last dimension."""
    delta = delta.to(y.dtype)
    if isinstance(factor, Tensor):
        delta, factor = delta * factor, 1.0
    if not spec.part:
        return torch.add(y, delta, alpha=factor)
    sizes = [spec.start, spec.n_out, y.shape[-1] - spec.start - spec.n_out]
    before, part, after = torch.split(y, sizes, dim=-1)
    return torch.cat([before, torch.add(part, delta, alpha=factor), after], dim=-1)
