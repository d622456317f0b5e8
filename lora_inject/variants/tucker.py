"""LoCon with a core (arXiv 2309.14859): the change of a kernel as Tucker's product of three.

    W + s B mid A        A (r, in, 1..) and B (out, r, 1..) are 1x1, mid (r, r, *kernel) between

It has r^2 kernel + r (in + out) parameters, where LoRA has r (in kernel + out). For convolutions
alone; it acts in the weight. Of a grouped one, all groups share A and mid.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.lora import Variant
from lora_inject.variants.matrices import inner, of_groups, product, sizes, to_weight


@dataclass(frozen=True)
class Tucker(Variant):
    """``B mid A``."""

    name = "tucker"
    more = ("mid",)
    additive = False
    way = "weight"
    own_shapes = True

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """A and B without the kernel, which is mid's."""
        size, r = sizes(spec), spec.rank
        ones = (1,) * len(size.kernel)
        A, B = (r, size.channels, *ones), (size.rows, r, *ones)
        return {"A": A, "B": B, "mid": (r, r, *size.kernel)}

    def refusal(
        self, kind: LayerKind, layer: nn.Module, spec: Spec, beside: bool, dropout: float
    ) -> str | None:
        """Where there is no kernel."""
        if not sizes(spec).kernel:
            return "variant='tucker' is for kernels of convolutions. Use variant='lora' here."
        return super().refusal(kind, layer, spec, beside, dropout)

    def begin(self, spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
        """A and mid kaiming-uniform over what they read, B zero."""
        shapes = self.shapes(spec)
        reads = {
            "A": shapes["A"][1],
            "mid": shapes["mid"][1] * torch.Size(shapes["mid"][2:]).numel(),
        }
        own = {
            role: initial.kaiming_uniform(shapes[role], n, generator) for role, n in reads.items()
        }
        return {"A": own["A"], "B": initial.zeros(shapes["B"]), "mid": own["mid"]}

    def update(self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change) -> Tensor:
        """``B mid A`` in the shape of the weight W."""
        A, B = c.tensors["A"].flatten(1), c.tensors["B"].flatten(1)
        return to_weight(kind, layer, W, product(A, B, c.tensors["mid"]))

    def low_rank(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """``mid A`` as one A."""
        A = inner(tensors["A"].flatten(1), tensors["mid"])
        return of_groups(kind, layer, A, tensors["B"].flatten(1))
