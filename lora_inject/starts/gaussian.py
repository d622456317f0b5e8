"""Normal values of a standard deviation of 1 / r in the factor that does not start at zero.

What diffusers' training scripts use, and PEFT calls ``init_lora_weights="gaussian"``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.starts.default import Start
from lora_inject.variants import LayerKind, Spec


@dataclass(frozen=True)
class Gaussian(Start):
    """``N(0, 1 / r^2)``, and zero."""

    name = "gaussian"

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One factor is normal, the other zero."""
        if kind.zero == "A":
            B = initial.normal(spec.B_shape, generator) / spec.rank
            return initial.zeros(spec.A_shape), B
        A = initial.normal(spec.A_shape, generator) / spec.rank
        return A, initial.zeros(spec.B_shape)
