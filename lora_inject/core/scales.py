"""The scaling of what runs in a layer as tensors, which a compiler takes for inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.adapter import Term

SCALES = "_lora_inject_scales"  # the scaling of what runs as tensors, in a layer's __dict__
Scales = dict[str, tuple[float, Tensor]]  # by adapter: its scaling, and a tensor that holds it


def scales_of(terms: Sequence[Term], scales: Scales, own: Mapping[str, Any]) -> Scales:
    """The scaling of what runs as numbers and as tensors, on the device of the adapters.

    A compiler makes a constant of a number, and takes a tensor for an input. Each layer has tensors
    of its own: a compiler notices when two inputs become one object.

    Args:
        terms: what runs in the layer.
        scales: what the layer has already; it is returned where it is right.
        own: the layer's parameters.
    """
    for term in terms:
        first, held = own.get(next(iter(term.names.values()))), scales.get(term.adapter)
        device = torch.device("cpu") if first is None else first.device
        if held is None or held[0] != term.factor or held[1].device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            if device.type == "meta":  # where there are no values, and to write one takes long
                scale = torch.empty((), dtype=dtype, device=device)
            else:
                scale = torch.scalar_tensor(term.factor, dtype=dtype, device=device)
            scales = {**scales, term.adapter: (term.factor, scale)}
    return scales
