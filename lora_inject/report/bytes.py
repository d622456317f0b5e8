"""Bytes: what parameters take as weights, gradients and optimizer state, by dtype.

A parameter that trains holds its weight, a gradient of the same dtype, and the optimizer's tensors
of the same dtype; a frozen one holds its weight. With Adam in float32 that is 16 bytes against 4.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_inject.errors import ArgumentError
from lora_inject.sharding import is_distributed, whole_numel

# Tensors of the parameter's own size and dtype that a torch optimizer keeps for each parameter, in
# its default settings; "sgd-momentum" and "adagrad" keep one. Adam's step counter, 4 bytes for a
# whole parameter, is left out.
OPTIMIZER_STATES = {
    "adamw": 2,
    "adam": 2,
    "nadam": 2,
    "radam": 2,
    "adamax": 2,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd-momentum": 1,
    "sgd": 0,
}


def optimizer_states(optimizer: str) -> int:
    """How many tensors of a parameter's size this optimizer keeps.

    Raises:
        ArgumentError: the optimizer is not known.
    """
    if optimizer not in OPTIMIZER_STATES:
        raise ArgumentError(
            f"optimizer must be one of {', '.join(OPTIMIZER_STATES)}, not {optimizer!r}."
        )
    return OPTIMIZER_STATES[optimizer]


@dataclass
class Bytes:
    """Bytes by dtype name of what a set of parameters needs."""

    weights: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of it."""
        return sum(sum(part.values()) for part in (self.weights, self.gradients, self.optimizer))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**asdict(self), "total": self.total}


def training_bytes(sizes: Mapping[torch.dtype, int], states: int) -> Bytes:
    """Weights, gradients and optimizer state of so many elements that train, by their dtype.

    A quantized weight cannot train as it is: it counts in the dtype it would have unpacked.
    """
    weights = {_name(dtype): n * dtype.itemsize for dtype, n in sizes.items()}
    return Bytes(weights, dict(weights), {name: states * n for name, n in weights.items()})


def frozen_bytes(sizes: Mapping[torch.dtype, int]) -> Bytes:
    """Weights that stand still, of which the bytes are known by dtype."""
    return Bytes({_name(dtype): n for dtype, n in sizes.items()})


def logical_numel(parameter: Tensor) -> int:
    """How many numbers a parameter stands for.

    bitsandbytes packs two 4-bit numbers in a byte and keeps the shape they stand for in
    ``quant_state``; torchao's tensor subclasses have the logical shape themselves. Of a sharded
    parameter all of it counts.
    """
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return whole_numel(parameter) if shape is None else math.prod(shape)


def can_train(parameter: Tensor) -> bool:
    """Whether a parameter can train, or could if it were not quantized."""
    return parameter.is_floating_point() or hasattr(parameter, "quant_state")


def trainable_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype the parameter trains in, or would if it were not quantized (float32 if unknown)."""
    if parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1:
        return parameter.dtype
    unpacked = getattr(getattr(parameter, "quant_state", None), "dtype", None)
    return unpacked if isinstance(unpacked, torch.dtype) else torch.float32


def stored_tensors(parameter: Tensor) -> list[Tensor]:
    """The plain tensors behind a parameter: those inside a tensor subclass, or itself."""
    flatten = getattr(parameter, "__tensor_flatten__", None)
    if flatten is None or is_distributed(parameter):  # of which all shards count
        return [parameter]
    inner = (getattr(parameter, name) for name in flatten()[0])
    return [stored for t in inner if isinstance(t, Tensor) for stored in stored_tensors(t)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
