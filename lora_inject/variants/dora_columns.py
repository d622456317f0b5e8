"""DoRA by columns: the length of what each input feature gives is trained, and not of each row.

    V diag(m / n)        V = W + s B A; n and m of V's columns, of a convolution over its kernel too

What older files of LyCORIS and OneTrainer hold. A magnitude acts on the input of the layer, so that
it acts in the weight. No gradient flows through n, as in DoRA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.dora import DoRA
from lora_inject.variants.matrices import sizes


@dataclass(frozen=True)
class ColumnDoRA(DoRA):
    """``(W + s B A) diag(m / n) - W``."""

    name = "dora_columns"
    finishes = False
    way = "weight"
    peft = {}  # noqa: RUF012 (a constant of the class)
    keys = {}  # noqa: RUF012

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The magnitude is (in,), of experts (E, in)."""
        size = sizes(spec)
        return {**super().shapes(spec), "magnitude": (*size.experts, size.channels)}

    def refusal(
        self, kind: LayerKind, layer: nn.Module, spec: Spec, beside: bool, dropout: float
    ) -> str | None:
        """Where a column is not of all rows."""
        if spec.groups > 1:
            rows = self.name.replace("_columns", "")
            return f"variant={self.name!r} has no columns of grouped channels. Use {rows!r}."
        return super().refusal(kind, layer, spec, beside, dropout)

    @torch.no_grad()
    def lengths(self, kind: LayerKind, layer: nn.Module, W: Tensor | None, c: Change) -> Tensor:
        """The lengths of the columns of ``W + s B A``: (in,), or (E, in)."""
        V_OI = self.whole(kind, layer, W, c)
        lengths: Tensor = torch.linalg.vector_norm(_by_columns(V_OI, c.spec), dim=(-3, -1))
        return lengths

    def scaled(self, factors: Tensor, V_OI: Tensor, spec: Spec) -> Tensor:
        """The columns of a weight times a factor each."""
        own: Tensor = factors[..., None, :, None] * _by_columns(V_OI, spec)
        return own.reshape(V_OI.shape)


def _by_columns(matrix: Tensor, spec: Spec) -> Tensor:
    """A weight's matrix, or one expert's, as (..., out, in, kernel)."""
    experts = matrix.shape[:-2] if spec.experts else ()
    return matrix.reshape(*experts, spec.n_out, sizes(spec).channels, -1)
