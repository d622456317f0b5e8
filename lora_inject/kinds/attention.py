"""``nn.MultiheadAttention``: it reads its projections as parameters, so they are adapted there.

The output projection is a child, ``out_proj``, and is a target of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.kinds.base import Changes, Form, Kind, Way, out_in_spec, overrides_forward
from lora_inject.kinds.multiplied import multiplied
from lora_inject.kinds.weight_reads import calls_super
from lora_inject.own import own_class
from lora_inject.settings import Settings
from lora_inject.variants import Spec, Variant


class MultiheadAttentionKind(Kind):
    """Packed ``in_proj_weight`` (3E, E), or ``q/k/v_proj_weight`` where kdim or vdim differ."""

    name = "MultiheadAttention"
    linear_like = True

    def matches(self, module: nn.Module) -> bool:
        """Instances of ``nn.MultiheadAttention``."""
        return isinstance(module, nn.MultiheadAttention)

    def way(self, module: nn.Module) -> Way:
        """There is no layer to call."""
        return "weight"

    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """One pair for the packed weight, or one for each of the three."""
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = {name: module._parameters.get(name) for name in names}
        return tuple(
            out_in_spec(name, weight, settings.r)
            for name, weight in weights.items()
            if weight is not None
        )

    def multiplies(self, module: nn.Module, specs: Sequence[Spec], variant: Variant) -> bool:
        """The forward of torch does nothing else."""
        return variant.additive

    def multiplied(self, layer: nn.Module, W: Tensor, changes: Changes) -> Any:
        """In eval mode without gradients torch has a fast path, which reads effective weights."""
        own = (tensor for _, change in changes for tensor in change.tensors.values())
        records = torch.is_grad_enabled() and any(t.requires_grad for t in (W, *own))
        if not (layer.training or records):
            return self.effective(layer, W, changes)
        return multiplied(self, layer, W, changes)

    def form(self, layer: nn.Module) -> Form:
        """PEFT has the packed projections alone."""
        return "linear" if layer._parameters.get("in_proj_weight") is not None else "other"

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """A subclass with a forward of its own may not read these weights."""
        if overrides_forward(module, nn.MultiheadAttention) and not calls_super(
            own_class(module), nn.MultiheadAttention
        ):
            return (
                f"{own_class(module).__name__} has a forward that does not call that of "
                "nn.MultiheadAttention. Target its own layers or parameters."
            )
        return None
