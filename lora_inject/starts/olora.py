"""OLoRA (arXiv 2406.01775): an orthonormal B, of ``W = Q R``: ``B = Q_r`` and ``A = R_r``.

The paper subtracts the start from the weight; here it is kept beside it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.starts.default import Decomposed, of_matrices, rows_of
from lora_inject.variants import LayerKind, Spec


@dataclass(frozen=True)
class OLoRA(Decomposed):
    """The first columns of Q and rows of R."""

    name = "olora"
    offset = True

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The first r columns of Q and rows of R."""
        Q_OQ, R_QI = torch.linalg.qr(rows_of(kind, layer, W, spec))
        return of_matrices(kind, layer, R_QI[..., : spec.rank, :], Q_OQ[..., : spec.rank])
