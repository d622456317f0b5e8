"""PiSSA (arXiv 2404.02948) and MiLoRA (arXiv 2406.09044): singular vectors of the weight.

With ``W = U S V``: ``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_r``, of the largest singular
values (PiSSA) or of the smallest (MiLoRA). The papers subtract the start from the weight; here it
is kept beside it, and the weight is what it was.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.low_rank import dominant
from lora_inject.starts.default import Decomposed, balanced, of_matrices, rows_of
from lora_inject.variants import LayerKind, Spec

_EXACT = 2048  # with a smaller side, all singular values are computed


@dataclass(frozen=True)
class PiSSA(Decomposed):
    """The largest singular values.

    Those of a large matrix are found by a randomized decomposition (Halko et al. 2009), with random
    numbers of the pair's own seed.

    Attributes:
        oversample: how many more directions than the rank it follows; None for as many again.
        power: its power iterations.
        exact: whether to compute all singular values; None does so below 2,048 rows or columns.
    """

    oversample: int | None = None
    power: int = 2
    exact: bool | None = None
    name = "pissa"
    offset = True

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_r``."""
        U_OR, S_R, V_IR = self.directions(rows_of(kind, layer, W, spec), spec.rank, generator)
        return of_matrices(kind, layer, *balanced(U_OR, S_R, V_IR, scaling))

    def directions(
        self, W_OI: Tensor, r: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V of the r singular values to start from."""
        q = min(r + (r if self.oversample is None else self.oversample), *W_OI.shape[-2:])
        if not (min(W_OI.shape[-2:]) <= _EXACT if self.exact is None else self.exact):
            U_OQ, S_Q, V_IQ = dominant(W_OI, q, self.power, generator)
            return U_OQ[..., :r], S_Q[..., :r], V_IQ[..., :r]
        U_OQ, S_Q, Vh_QI = torch.linalg.svd(W_OI, full_matrices=False)
        return U_OQ[..., :r], S_Q[..., :r], Vh_QI[..., :r, :].mT


@dataclass(frozen=True)
class MiLoRA(PiSSA):
    """The smallest singular values, which have to be computed all."""

    name = "milora"

    def directions(
        self, W_OI: Tensor, r: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V of the r smallest singular values."""
        U_OQ, S_Q, Vh_QI = torch.linalg.svd(W_OI, full_matrices=False)
        return U_OQ[..., -r:], S_Q[..., -r:], Vh_QI[..., -r:, :].mT
