"""Which base model an adapter was made for: a few values of each adapted weight.

An adapter on another base computes nonsense without an error. A fingerprint is a shape, a dtype and
a few values at fixed places, so that it costs nothing to take and says at which layer bases differ.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.sharding import elements, has_known_placements, is_distributed, is_placeholder

SAMPLES = 8


def fingerprint(weight: Tensor, samples: int = SAMPLES) -> dict[str, Any] | None:
    """Shape, dtype and so many values of a weight; None where its values cannot be read.

    Quantized weights have other values on every machine, and those on meta have none. The values
    of a sharded one are on several ranks, all of which must call this.
    """
    plain = type(weight) in (Tensor, nn.Parameter) or is_distributed(weight)
    if not plain or not weight.is_floating_point() or weight.is_meta or weight.dtype.itemsize < 2:
        return None
    if is_placeholder(weight) or (is_distributed(weight) and not has_known_placements(weight)):
        return None
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "values": elements(weight.detach(), _places(weight.numel(), samples)).double().tolist(),
    }


def fingerprints(
    weights: Mapping[str, Tensor], samples: int = SAMPLES
) -> dict[str, dict[str, Any]]:
    """Those of all weights that can be read, by name."""
    found = {key: fingerprint(weight, samples) for key, weight in weights.items()}
    return {key: value for key, value in found.items() if value is not None}


def is_fingerprint(value: Any, samples: int = SAMPLES) -> bool:
    """Whether a value of a file is of the form of a fingerprint with so many values."""
    if not isinstance(value, dict):
        return False
    shape, values = value.get("shape"), value.get("values")
    shaped = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    if not isinstance(values, list) or len(values) != samples:
        return False
    return shaped and all(isinstance(number, float) for number in values)


@functools.cache
def _places(elements: int, samples: int) -> Tensor:
    """Where the samples are taken, spread over the whole weight."""
    return torch.linspace(0, elements - 1, samples, dtype=torch.float64, device="cpu").long()


def _again(saved: Mapping[str, Any], weight: Tensor) -> dict[str, Any] | None:
    """The fingerprint of a weight with as many values as another has."""
    values = saved.get("values")
    return fingerprint(weight, len(values) if isinstance(values, list) else SAMPLES)


def how_it_differs(saved: Mapping[str, Any], weight: Tensor) -> str:
    """In what a weight is not the one of a fingerprint that differs: "rows", "rounding" or ""."""
    now, shape = _again(saved, weight), list(saved.get("shape", []))
    if now is None:
        return ""
    if shape != now["shape"]:
        return "rows" if shape[1:] == now["shape"][1:] and shape else ""
    old, new = (
        torch.tensor(side.get("values", []), dtype=torch.float64, device="cpu")
        for side in (saved, now)
    )
    # One place of bfloat16, the coarsest that weights are cast to.
    close = old.shape == new.shape and torch.allclose(old, new, 2.0**-7, 0.0, equal_nan=True)
    return "rounding" if close else ""


def differs(saved: Mapping[str, Any], weight: Tensor) -> bool:
    """Whether a weight is not the one of which a fingerprint was taken.

    Both are compared in the coarsest precision that either has seen, to which the finer is rounded:
    a model that is loaded in bfloat16 is the same base, and so is one that was cast back since.
    """
    now = _again(saved, weight)
    if now is None:
        return False
    if dict(saved) == now:
        return False
    if list(saved.get("shape", [])) != now["shape"]:
        return True
    values = [
        torch.tensor(side.get("values", []), dtype=torch.float64, device="cpu")
        for side in (saved, now)
    ]
    stored: list[Any] = [getattr(torch, str(side.get("dtype")), None) for side in (saved, now)]
    if not all(isinstance(dtype, torch.dtype) for dtype in stored):
        return True
    seen = {*stored, *(_precision(*side) for side in zip(values, stored, strict=True))}
    for dtype in sorted(seen, key=lambda dtype: -dtype.itemsize):
        values = [value.to(dtype).double() for value in values]
    # Of two 16-bit types neither holds the other: rounding twice may differ by one place, and of
    # small numbers float16 holds fewer.
    apart = seen >= {torch.float16, torch.bfloat16}
    rtol, atol = (2.0**-7, 2.0**-24) if apart else (0.0, 0.0)
    return not torch.allclose(values[0], values[1], rtol=rtol, atol=atol, equal_nan=True)


def _precision(values: Tensor, stored: torch.dtype) -> torch.dtype:
    """The coarsest dtype that holds these values: what was cast to it and back has them still."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).double().nan_to_num(), values.nan_to_num()):
            return dtype
    return stored
