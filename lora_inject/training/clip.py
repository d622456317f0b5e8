"""The size of an adapter, held below a limit after each step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.low_rank import gram_norm
from lora_inject.changes.edits import filling, run
from lora_inject.core.adapter import Adapter, Pair
from lora_inject.core.look import Look
from lora_inject.errors import ArgumentError, UnsupportedLayerError
from lora_inject.sharding import is_distributed, is_placeholder


@torch.no_grad()
def clip_norms(model: nn.Module, most: float) -> dict[str, float]:
    """Shrink every adapter that trains and whose update is larger than a limit.

    To be called after a step. The size of an update is the Frobenius norm of ``alpha / r * B A``,
    which is not made for it. Where it is above the limit, A and B are both scaled by the square
    root of what is missing; where one of them is fixed, the other bears all of it. kohya's scripts
    call this ``scale_weight_norms``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2)
        >>> clip_norms(model, 1.0)
        {}

    Args:
        model: an adapted model.
        most: the limit, above 0.

    Returns:
        The norms that were above it, by the path of the weight.

    Raises:
        ArgumentError: the limit is no finite number above 0.
        UnsupportedLayerError: an update is no ``B A`` alone, or sharded; nothing is changed.
        LoRAInjectError: the model has no adapters, is merged or inside a block.
    """
    if isinstance(most, bool) or not isinstance(most, int | float) or not 0 < most < math.inf:
        raise ArgumentError(f"most must be a finite number above 0, not {most!r}.")
    look = Look(model)
    look.require_adapters()
    look.require_unmerged()
    look.require_no_block()
    found: dict[str, tuple[nn.Module, Adapter, Pair]] = {}
    for layer, adapter in look.adapters:
        if adapter.name in look.states[layer].use.trains and not adapter.follows:
            path = look.index.path(layer)
            _require_product(path, layer, adapter)
            for pair in adapter.pairs:
                name = pair.spec.part or pair.spec.weight
                found[f"{path}.{name} ({adapter.name})".lstrip(".")] = (layer, adapter, pair)
    norms = [_norm(*own).cpu() for own in found.values()]
    sizes = torch.stack(norms).tolist() if norms else []  # one wait for the device
    large = {path: size for path, size in zip(found, sizes, strict=True) if size > most}
    edits = []
    for path, size in large.items():
        layer, adapter, pair = found[path]
        for tensor, factor in _shares(pair.tensors(layer), adapter, most / size):
            edits.append(filling(tensor, tensor * factor))
    run(edits)
    return large


def _require_product(path: str, layer: nn.Module, adapter: Adapter) -> None:
    variant = adapter.settings.variant
    if not variant.additive or variant.offset:
        start = ", whose start is subtracted" if variant.offset else ""
        raise UnsupportedLayerError(
            f"{adapter.name!r} is a {variant.name}{start}, and no B A alone, which A and B could "
            "be scaled for.",
            path=path,
            remedy="Limit its gradients instead (torch.nn.utils.clip_grad_norm_).",
        )
    for pair in adapter.pairs:
        for tensor in pair.tensors(layer).values():
            if is_distributed(tensor) or is_placeholder(tensor) or tensor.is_meta:
                raise UnsupportedLayerError(
                    "its A and B are sharded or on the meta device, where no rank has their norm.",
                    path=path,
                    remedy="Limit its gradients instead (torch.nn.utils.clip_grad_norm_).",
                )


def _norm(layer: nn.Module, adapter: Adapter, pair: Pair) -> Tensor:
    own = pair.tensors(layer)
    A, B = adapter.kind.to_matrices(layer, own["A"], own["B"])
    return gram_norm(A, B) * adapter.settings.scaling


def _shares(
    tensors: Mapping[str, nn.Parameter], adapter: Adapter, factor: float
) -> list[tuple[nn.Parameter, float]]:
    """The tensors to be scaled, and by how much."""
    free = [tensor for role, tensor in tensors.items() if adapter.settings.variant.trains(role)]
    return [(tensor, factor ** (1 / len(free))) for tensor in free]
