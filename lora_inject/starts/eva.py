"""EVA (arXiv 2410.07170): A spans what the layer's inputs vary in most, and B is zero.

The rows of A are the first principal directions of the inputs. ``allocate`` gives each layer a rank
by how much of their variance such directions explain.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.starts.default import matrix_shape, of_matrices
from lora_inject.starts.measured import Measured
from lora_inject.variants import LayerKind, Spec


@dataclass(frozen=True)
class EVA(Measured):
    """The first r principal directions of the inputs, and zero.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> stats = calibrate(model, "0", [torch.randn(8, 4)])
        >>> inject(model, "0", r=2, init=EVA(stats)).trainable
        16
    """

    name = "eva"

    def unfit(self, found: Any, spec: Spec, shape: torch.Size) -> str | None:
        """N vectors differ in N - 1 directions at most."""
        most = min(found.count - 1, shape[1])
        if spec.rank > most:
            return (
                f'init="eva": {found.count:,} inputs of {shape[1]:,} features vary in {most} '
                f"directions at most, fewer than r={spec.rank}. Calibrate on more, or take less."
            )
        return None

    def zero(self, kind: LayerKind) -> str | None:
        """B, whatever the kind of layer."""
        return "B"

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``A = V_r^T``, ``B = 0``."""
        A_RI = self.data(spec).directions(spec.rank)
        n_out, _ = matrix_shape(kind, layer, spec)
        B_OR = A_RI.new_zeros(*A_RI.shape[:-2], n_out, spec.rank)
        return of_matrices(kind, layer, A_RI, B_OR)
