"""The words that variants, starts and kinds of layers share: a pair's shapes, and its values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

# Which features of the weight a factor of ``B A`` has, by its role.
SIDES: Mapping[str, str] = {"A": "in", "B": "out", "A0": "in", "B0": "out"}


def name_prefix(weight: str, part: str) -> str:
    """What stands before ``lora_A`` in a parameter's name: nothing for a plain weight."""
    own = part or ("" if weight == "weight" else weight)
    return f"{own}_" if own else ""


@dataclass(frozen=True)
class Spec:
    """One pair A, B of a layer.

    Attributes:
        weight: the name of the parameter that it adapts.
        n_in: features that A reads.
        n_out: features that B writes.
        A_shape: (r, in), or what the kind makes of it.
        B_shape: (out, r), or what the kind makes of it.
        part: the name of the part of a fused projection that it is for, or "".
        start: where that part begins in the layer's output.
        experts: how many experts the weight holds, each with an A and a B; 0 for a plain weight.
        swapped: whether A and B are those of a tied layer that keeps the weight the other way
            round: this layer's A is then B transposed, and its B is A transposed.
        groups: how many groups a convolution has.
    """

    weight: str
    n_in: int
    n_out: int
    A_shape: tuple[int, ...]
    B_shape: tuple[int, ...]
    part: str = ""
    start: int = 0
    experts: int = 0
    swapped: bool = False
    groups: int = 1

    @property
    def prefix(self) -> str:
        """What stands before ``lora_A`` in the parameter's name."""
        return name_prefix(self.weight, self.part)

    @property
    def place(self) -> tuple[str, str, int, int]:
        """What of the layer it adapts: pairs of one place add up."""
        return (self.weight, self.part, self.start, self.n_out if self.part else 0)

    @property
    def rank(self) -> int:
        """The rank r, of each group and each expert."""
        return self.B_shape[2 if self.experts else 1]

    @property
    def elements(self) -> int:
        """How many parameters A and B have."""
        return math.prod(self.A_shape) + math.prod(self.B_shape)


class Change(NamedTuple):
    """What one adapter does to a weight, with its values.

    Attributes:
        spec: the weight and the shapes.
        tensors: the adapter's tensors by role, as the layer's kind wants them.
        scaling: alpha / r, or what the rule of scaling makes of them.
        factor: the scaling times the weight with which the adapter is in use; a tensor where a
            compiler would make a constant of a number.
        dropout: the probability in force: the adapter's in training mode, else 0.
    """

    spec: Spec
    tensors: Mapping[str, Tensor]
    scaling: float
    factor: "float | Tensor"
    dropout: float = 0.0

    @property
    def weight(self) -> "float | Tensor":
        """The weight with which the adapter is in use."""
        return self.factor / self.scaling


class LayerKind(Protocol):
    """What variants and starts ask of a kind of layer: ``kinds.base.Kind``, which stands above."""

    @property
    def zero(self) -> str:
        """Which of A and B usually starts at zero."""

    @property
    def transposes(self) -> bool:
        """Whether the weight is (in, out)."""

    @property
    def has_rows(self) -> bool:
        """Whether the weight is a table with a row for each id."""

    def add_rows(
        self, layer: nn.Module, x: Tensor, y: Tensor, index: Tensor, rows: Tensor
    ) -> Tensor:
        """An output y with what rows, added to those of the table, make of the input x."""

    def down(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, dropout: float) -> Tensor:
        """``h = A dropout(x)``."""

    def up(self, layer: nn.Module, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """``B h``."""

    def update(self, layer: nn.Module, W: Tensor, spec: Spec, A: Tensor, B: Tensor) -> Tensor:
        """``B A``, in the shape of the weight W."""

    def to_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A as (..., r, in) and B as (..., out, r)."""

    def from_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The way back."""

    def to_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        """A tensor of the weight's shape as (..., out, in)."""

    def from_matrix(self, layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The way back, to the weight's shape."""

    def initial(self, spec: Spec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A and B as they usually start."""

    def affine_refusal(self, layer: nn.Module) -> str | None:
        """Why what the layer computes is not known to be ``W x + b``; None where it is."""

    def dense(self, layer: nn.Module, spec: Spec) -> Tensor | None:
        """The values of the weight, worked out where they are packed; None where they cannot be."""

    def product(self, layer: nn.Module, spec: Spec, rows: Tensor) -> Tensor:
        """``W`` of rows (N, in) by the layer's own forward, where the weight is packed."""

    def bias(self, layer: nn.Module, spec: Spec) -> Tensor | None:
        """What the layer adds to ``W x``: (out,), or None."""

    def beside_output(self, layer: nn.Module, vector: Tensor) -> Tensor:
        """A vector (out,) in a shape in which it multiplies what the layer returns."""
