"""LoRA-GA (arXiv 2407.05000): the first step moves the weight as a full gradient step would.

With the gradient of the weight ``G = U S V`` and ``c = out^(1/4) / sqrt(gamma)``: ``A = c V_[:r]``
and ``B = c U_[r:2r]``, as in the paper and its authors' code. They subtract the start from the
weight; here it is kept beside it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import ArgumentError
from lora_inject.starts.default import of_matrices, rank_refusal
from lora_inject.starts.measured import Measured
from lora_inject.starts.pissa import PiSSA
from lora_inject.variants import LayerKind, Spec


@dataclass(frozen=True)
class LoRAGA(Measured):
    """Singular vectors of the gradient.

    Attributes:
        gamma: the larger, the smaller the start.
    """

    gamma: float = 16.0
    name = "lora_ga"
    offset = True
    of_loss = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma < math.inf:
            raise ArgumentError(f"gamma must be a finite number above 0, not {self.gamma!r}.")

    def unfit(self, found: Any, spec: Spec, shape: torch.Size) -> str | None:
        """A and B take r directions each."""
        if not found.any():
            return 'init="lora_ga": its gradient was zero. Exclude it.'
        twice = replace(spec, B_shape=_doubled(spec))
        return rank_refusal("lora_ga", twice, shape)

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``A = c V_[:r]``, ``B = c U_[r:2r]``."""
        G_OI, r = self.data(spec), spec.rank
        U_OR, _, V_IR = PiSSA().directions(G_OI, 2 * r, generator)
        c = G_OI.shape[-2] ** 0.25 / math.sqrt(self.gamma)
        return of_matrices(kind, layer, c * V_IR[..., :r].mT, c * U_OR[..., r:])


def _doubled(spec: Spec) -> tuple[int, ...]:
    """The shape of a B of twice the rank."""
    at = 2 if spec.experts else 1
    return (*spec.B_shape[:at], 2 * spec.B_shape[at], *spec.B_shape[at + 1 :])
