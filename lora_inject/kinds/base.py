"""What lora_inject must know of a kind of layer to adapt it: the interface, with usual answers."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_inject import initial
from lora_inject.settings import Settings


class Kind(ABC):
    """One kind of layer that computes ``y = f(x)`` and whose adapter adds ``scaling * B A x``.

    Stateless; an adapted layer holds a reference to its kind. Shapes: A is (r, in), B is (out, r).

    Attributes:
        name: what reports call the kind.
        linear_like: whether ``"all-linear"`` selects it.
    """

    name: ClassVar[str]
    linear_like: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this kind is for the module."""

    @abstractmethod
    def features(self, module: nn.Module) -> tuple[int, int]:
        """(in, out): the sizes that A reads and B writes."""

    @abstractmethod
    def delta(
        self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor, settings: Settings, dropout: float
    ) -> Tensor:
        """What the adapter adds to the layer's output for input x.

        Args:
            layer: the adapted layer, for its options.
            x: the layer's first input.
            A: (r, in).
            B: (out, r).
            settings: rank, alpha and scaling of the adapter.
            dropout: the probability that is in force: the adapter's in training mode, else 0.

        Returns:
            A tensor that can be added to the layer's output.
        """

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module of this kind cannot be adapted, with the remedy; None where it can."""
        return None

    def weight(self, module: nn.Module) -> Tensor:
        """The tensor whose device and dtype the adapter follows."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    def shapes(self, features: tuple[int, int], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        n_in, n_out = features
        return (r, n_in), (n_out, r)

    def initial(
        self, features: tuple[int, int], r: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Starting values, float32 on the CPU: A kaiming-uniform, B zero (LoRA section 4.1)."""
        A_shape, B_shape = self.shapes(features, r)
        fan_in = math.prod(A_shape[1:])
        return initial.kaiming_uniform(A_shape, fan_in, generator), initial.zeros(B_shape)


def general_refusal(module: nn.Module, parameter_names: tuple[str, ...]) -> str | None:
    """Why a module of any kind cannot be adapted by a class swap, with the remedy; else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule, whose forward cannot be changed. Adapt it before scripting."
    if "forward" in module.__dict__:
        return (
            "a forward was set on this very instance (accelerate's hooks do that), and it would "
            "bypass the adapter. Remove it, inject, and set it again."
        )
    taken = [name for name in parameter_names if hasattr(module, name)]
    if taken:
        return f"it has an attribute {taken[0]} of its own. Give the adapter another name."
    return None


def weight_refusal(weight: Tensor, features: tuple[int, int]) -> str | None:
    """Why an adapter cannot follow this weight, with the remedy; else None."""
    if min(features) < 1:
        return f"it has the size {features[0]} x {features[1]}, so there is nothing to adapt."
    if weight.is_complex():
        return f"its weight is complex ({weight.dtype}), which is not supported. Exclude it."
    if _is_distributed(weight):
        return (
            "its weight is already sharded (DTensor). Inject before fully_shard or "
            "parallelize_module."
        )
    return None


def unread_refusal(parent: nn.Module, name: str) -> str | None:
    """Why a layer of this parent is never called, so that an adapter would be dead; else None."""
    if isinstance(parent, nn.MultiheadAttention):
        return (
            f"nn.MultiheadAttention reads the weight of {name} and never calls it, so an adapter "
            "would be dead. Exclude it."
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2"):
        return (
            f"the inference path of nn.TransformerEncoderLayer reads the weight of {name} and does "
            "not call it, so the adapter would be silent in eval mode. Exclude it."
        )
    return None


def _is_distributed(tensor: Tensor) -> bool:
    # By what it has: importing torch.distributed.tensor costs as much as the whole library.
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")
