"""transformers' ``Conv1D`` (GPT-2): a Linear that keeps its weight transposed, as (in, out)."""

import sys

from torch import Tensor, nn

from lora_inject.kinds.linear import LinearKind
from lora_inject.own import own_class
from lora_inject.sharding import whole_shape


class Conv1DKind(LinearKind):
    """``y = x W + b`` with W of shape (in, out); found by its class name, as nothing imports it."""

    name = "Conv1D"
    transposes = True
    has_rows = False

    def matches(self, module: nn.Module) -> bool:
        """A class named ``Conv1D`` (torch's is ``Conv1d``) with a two-dimensional weight."""
        named = any(base.__name__ == "Conv1D" for base in own_class(module).__mro__)
        weight = module._parameters.get("weight") if named else None
        return isinstance(weight, Tensor) and len(whole_shape(weight)) == 2

    def is_product(self, base: type[nn.Module]) -> bool:
        """Transformers' own forward; a class of this name from elsewhere may do more."""
        known = sys.modules.get("transformers.pytorch_utils")
        return known is not None and base.forward is known.Conv1D.forward

    def has_own_forward(self, module: nn.Module) -> bool:
        """A class of this name from elsewhere, or one derived from it."""
        return not self.is_product(own_class(module))

    def features(self, module: nn.Module) -> tuple[int, int]:
        """The weight's shape as it is."""
        n_in, n_out = whole_shape(self.weight(module, "weight"))
        return n_in, n_out
