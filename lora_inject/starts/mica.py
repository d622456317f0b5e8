"""MiCA (arXiv 2604.01694): B is fixed to the last left singular vectors of the weight, A is zero.

Only what the weight hardly does is learnt, and nothing is subtracted, since ``B A`` starts at zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.starts.default import Decomposed, of_matrices, rows_of
from lora_inject.variants import LayerKind, Spec


@dataclass(frozen=True)
class MiCA(Decomposed):
    """The last r left singular vectors."""

    name = "mica"
    fixed = "B"

    def zero(self, kind: LayerKind) -> str | None:
        """A learns from zero."""
        return "A"

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``A = 0``, ``B = U[:, -r:]``."""
        W_OI = rows_of(kind, layer, W, spec)
        U_OQ = torch.linalg.svd(W_OI, full_matrices=False).U
        A_RI = W_OI.new_zeros(*W_OI.shape[:-2], spec.rank, W_OI.shape[-1])
        return of_matrices(kind, layer, A_RI, U_OQ[..., -spec.rank :])
