"""Quantized Linear layers that are not ``nn.Linear`` (GPTQ, AWQ and the like): a branch is added.

Found by what they have: the features of a Linear, and integer tensors where its weight would be.
"""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_inject.kinds.base import Way
from lora_inject.kinds.linear import LinearKind

_NAMES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


class QuantizedLinearKind(LinearKind):
    """``y = W x + b`` with a packed W that only the layer's own forward can read."""

    name = "quantized Linear"

    def matches(self, module: nn.Module) -> bool:
        """Features of a Linear, no floating-point weight, and a packed tensor."""
        return (
            not isinstance(module, nn.Linear)
            and self._packed(module) is not None
            and self._feature_names(module) is not None
        )

    def features(self, module: nn.Module) -> tuple[int, int]:
        """From the attributes, of which two spellings are in use."""
        names = self._feature_names(module)
        assert names is not None
        return getattr(module, names[0]), getattr(module, names[1])

    def has_own_forward(self, module: nn.Module) -> bool:
        """It has, which nothing but itself can run."""
        return False

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """There is no weight to add to."""
        return 'its weight is packed. Adapt it without how="weight".' if way == "weight" else None

    def merge_refusal(self, module: nn.Module, base: type[nn.Module], way: Way) -> str | None:
        """There is no weight to fold into."""
        return "its weight is packed."

    def weight(self, module: nn.Module, name: str) -> Tensor:
        """The packed tensor, for its device."""
        packed = self._packed(module)
        assert packed is not None
        return packed

    def _feature_names(self, module: nn.Module) -> tuple[str, str] | None:
        for names in _NAMES:
            if all(isinstance(getattr(module, name, None), int) for name in names):
                return names
        return None

    def _packed(self, module: nn.Module) -> Tensor | None:
        """The integers in place of a weight; a mask beside a weight is none."""
        found = None
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items() if len(owned) else ():
                if tensor is None or "weight" not in name:
                    continue
                if is_lazy(tensor):
                    return None
                if tensor.is_floating_point() and tensor.dim() > 1 and "scale" not in name:
                    return None
                if not tensor.is_floating_point() and tensor.dtype != torch.bool and found is None:
                    found = tensor
        return found
