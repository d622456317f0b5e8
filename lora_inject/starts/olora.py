"""OLoRA (arXiv 2406.01775): an orthonormal B, of ``W = Q R``: ``B = Q_r`` and ``A = R_r``.

The paper subtracts the start from the weight; here it is kept beside it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.starts.default import Start, of_matrices, rank_refusal, rows_of
from lora_inject.starts.pissa import matrix_shape
from lora_inject.variants import LayerKind, Spec


@dataclass(frozen=True)
class OLoRA(Start):
    """The first columns of Q and rows of R."""

    name = "olora"
    reads = True
    offset = True

    def refusal(self, kind: LayerKind, layer: nn.Module, spec: Spec) -> str | None:
        """A matrix has no more directions than its smaller side."""
        return rank_refusal(self.name, spec, torch.Size(matrix_shape(kind, layer, spec)))

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The first r columns of Q and rows of R."""
        Q_OQ, R_QI = torch.linalg.qr(rows_of(kind, layer, W, spec))
        return of_matrices(kind, layer, R_QI[..., : spec.rank, :], Q_OQ[..., : spec.rank])
