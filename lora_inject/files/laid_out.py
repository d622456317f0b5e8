"""A pair and a tensor of a file, each with its place in a model."""

from typing import NamedTuple

from torch import Tensor, nn

from lora_inject.files.formats.data import PairData
from lora_inject.kinds import find_kind


class LaidOutPair(NamedTuple):
    """A pair of the file with the module that it is for, turned as that needs it.

    Attributes:
        pair: the pair, with the module's path in the bare model.
        module: the module.
        real: the module's path in the model as it is, wrappers included.
    """

    pair: PairData
    module: nn.Module
    real: str

    @property
    def target(self) -> str:
        """What ``inject`` is to be told to get it."""
        if find_kind(self.module) is not None:
            return self.real
        return f"{self.real}.{self.pair.weight}".lstrip(".")


class LaidOutTensor(NamedTuple):
    """A tensor of the file that is none of a pair's, with its place in the model.

    Attributes:
        path: the module's path in the bare model.
        module: the module.
        name: what the module calls it.
        value: its value in the file.
        given: what the file calls it.
    """

    path: str
    module: nn.Module
    name: str
    value: Tensor
    given: str

    @property
    def key(self) -> str:
        """Its name in the bare model."""
        return f"{self.path}.{self.name}".lstrip(".")
