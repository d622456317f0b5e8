"""CorDA (arXiv 2406.05223): singular vectors of the weight as the inputs see it.

With C the mean of ``x x^T`` and ``W C = U S V``: ``B = U_r sqrt(S_r / s)`` and ``A = sqrt(S_r / s)
V_r C^-1``, of the largest singular values, which serve the inputs that were seen ("ipm"), or of the
smallest, which leave what these need as it is ("kpm"). The paper subtracts the start from the
weight; here it is kept beside it.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_inject.errors import ArgumentError
from lora_inject.starts.default import balanced, of_matrices, rank_refusal, rows_of
from lora_inject.starts.measured import Measured
from lora_inject.starts.pissa import MiLoRA, PiSSA
from lora_inject.variants import LayerKind, Spec

Mode = Literal["ipm", "kpm"]
_DAMPING = 0.01  # of the mean of C's diagonal, as the authors have it: C is then invertible


@dataclass(frozen=True)
class CorDA(Measured):
    """Directions of ``W C``.

    Attributes:
        mode: "ipm" to adapt to what was seen (the instruction-previewed mode), "kpm" to preserve
            it (the knowledge-preserved mode).
    """

    mode: Mode = "ipm"
    name = "corda"
    reads = True
    offset = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise ArgumentError(f"mode must be one of {get_args(Mode)}, not {self.mode!r}.")

    def unfit(self, found: Any, spec: Spec, shape: torch.Size) -> str | None:
        """Inputs that are all zero weigh nothing."""
        if not found.second.any():
            return 'init="corda": its inputs were all zero. Exclude it.'
        return rank_refusal(self.name, spec, shape)

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_r C^-1``."""
        W_OI = rows_of(kind, layer, W, spec)
        wide = torch.float32 if W_OI.device.type == "mps" else torch.float64
        C_II = self.data(spec).second.to(W_OI.device, wide)
        diagonal = C_II.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        C_II = C_II + _DAMPING * diagonal * torch.eye(C_II.shape[-1]).to(C_II)
        start = PiSSA() if self.mode == "ipm" else MiLoRA()
        product = (W_OI.to(wide) @ C_II).to(W_OI.dtype)
        U_OR, S_R, V_IR = start.directions(product, spec.rank, generator)
        V_IR = torch.cholesky_solve(V_IR.to(wide), torch.linalg.cholesky(C_II)).to(W_OI.dtype)
        return of_matrices(kind, layer, *balanced(U_OR, S_R, V_IR, scaling))
