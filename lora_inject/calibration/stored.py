"""Statistics in a safetensors file: sums as tensors, and what they are of in its metadata."""

import json
from pathlib import Path
from typing import Any

import torch

from lora_inject.arithmetic.moments import Moments
from lora_inject.calibration.statistics import Layer, Statistics
from lora_inject.errors import FormatError
from lora_inject.files.formats.storage import (
    parse_json,
    read_tensors,
    replaced_together,
    write_tensors,
)

KEY = "lora_inject_statistics"


def write(stats: Statistics, path: Path) -> None:
    """Write statistics; a former file is replaced whole or not at all."""
    tensors = {}
    for i, moments in enumerate(stats.inputs.values()):
        tensors[f"mean.{i}"], tensors[f"scatter.{i}"] = moments.mean, moments.scatter
    tensors |= {f"gradient.{name}": tensor for name, tensor in stats.gradients.items()}
    told = {
        "batches": stats.batches,
        "layers": {name: list(layer) for name, layer in stats.layers.items()},
        "inputs": [[m.count, *paths] for paths, m in stats.inputs.items()],
    }
    with replaced_together(path) as (target,):
        write_tensors(tensors, target, {KEY: json.dumps(told)})


def read(path: Path) -> Statistics:
    """Read statistics.

    Raises:
        FormatError: the file is no such one, or something of it is missing or has another shape.
    """
    tensors, metadata = read_tensors(path)
    if KEY not in metadata:
        raise FormatError(f"{path} holds no statistics of calibrate.")
    told = parse_json(metadata[KEY], f"the metadata of {path}")
    try:
        layers = {str(name): _layer(*values) for name, values in told["layers"].items()}
        inputs = {
            tuple(map(_known(layers), paths)): _moments(
                int(n), tensors.pop(f"mean.{i}"), tensors.pop(f"scatter.{i}")
            )
            for i, (n, *paths) in enumerate(told["inputs"])
        }
        prefix = "gradient."
        named = {_known(layers)(k.removeprefix(prefix)): t for k, t in tensors.items()}
        gradients = {name: named[name] for name in layers if name in named}
        stats = Statistics(layers, inputs, gradients, int(told["batches"]))
        whole = all(k.startswith(prefix) and t.dim() > 1 for k, t in tensors.items())
        if not whole or not all(t.isfinite().all() for t in tensors.values()):
            raise ValueError("a tensor that is none of them")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{path}: its statistics are not whole: {error}.") from error
    return stats


def _layer(pattern: Any, elements: Any, most: Any) -> Layer:
    return Layer(str(pattern), int(elements), int(most))


def _known(layers: dict[str, Layer]) -> Any:
    def known(name: Any) -> str:
        if name not in layers:
            raise ValueError(f"{name!r} is none of the layers")
        return str(name)

    return known


def _moments(n: int, mean: torch.Tensor, scatter: torch.Tensor) -> Moments:
    square = scatter.shape == (*mean.shape, mean.shape[-1] if mean.dim() else 0)
    same = mean.dtype is scatter.dtype and mean.is_floating_point()
    if n < 1 or not square or not same or not (mean.isfinite().all() and scatter.isfinite().all()):
        raise ValueError(f"moments of shapes {tuple(mean.shape)} and {tuple(scatter.shape)}")
    return Moments(n, mean, scatter)
