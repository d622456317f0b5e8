"""One pair of an adapter where it stands in a model."""

from typing import NamedTuple

from torch import Tensor, nn

from lora_inject.core.adapter import Adapter, Pair
from lora_inject.kinds.base import Spec


class StoredPair(NamedTuple):
    """One pair of an adapter where it stands."""

    path: str
    layer: nn.Module
    adapter: Adapter
    pair: Pair

    @property
    def spec(self) -> Spec:
        """The weight that it is for, and its shapes."""
        return self.pair.spec

    @property
    def key(self) -> str:
        """The start of loralib's keys for it: the path and the prefix of what is not a weight."""
        return f"{self.path}.{self.spec.prefix}".lstrip(".")

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        tensors = self.pair.tensors(self.layer)
        return tensors["A"], tensors["B"]
