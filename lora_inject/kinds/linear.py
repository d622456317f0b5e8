"""``nn.Linear`` and its subclasses: whatever their own forward does, the branch is added to it."""

from torch import Tensor, nn

from lora_inject.functional import linear_delta
from lora_inject.kinds.base import Kind
from lora_inject.settings import Settings


class LinearKind(Kind):
    """``y = W x + b`` with W of shape (out, in)."""

    name = "Linear"
    linear_like = True

    def matches(self, module: nn.Module) -> bool:
        """Instances of ``nn.Linear``, quantized subclasses with a forward of their own included."""
        return isinstance(module, nn.Linear)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """From the attributes: the weight of a quantized layer is packed and has another shape."""
        assert isinstance(module, nn.Linear)
        return module.in_features, module.out_features

    def delta(
        self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor, settings: Settings, dropout: float
    ) -> Tensor:
        """``scaling * B A dropout(x)``."""
        return linear_delta(x, A, B, settings.scaling, dropout)
