"""Parameters of which a rank holds a part: how A and B follow the weight, are gathered and filled.

What ``parallelize_module`` and ``fully_shard`` shard are DTensors, which know their global shape.
DeepSpeed's ZeRO-3 leaves empty placeholders that know their shape. torch.distributed.tensor is
imported where it is used: it costs as much as the whole library.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_inject.compat.marks import zero_shape
from lora_inject.compat.torch_private import offset_of_shard
from lora_inject.errors import LoRAInjectError


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor is an empty stand-in of a parameter that ZeRO-3 has partitioned."""
    return not is_lazy(tensor) and tensor.numel() == 0 and math.prod(whole_shape(tensor)) > 0


def is_partial(tensor: Tensor) -> bool:
    """Whether a rank holds no more of a tensor than its part."""
    return is_distributed(tensor) or is_placeholder(tensor)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, of which a rank may hold a part."""
    return zero_shape(tensor) or tuple(tensor.shape)


def whole_numel(tensor: Tensor) -> int:
    """The elements of the whole parameter; none of one that is lazy still."""
    return 0 if is_lazy(tensor) else tensor.numel() or math.prod(whole_shape(tensor))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let ``fully_shard`` put the shards back in place of what it gathered for a forward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in modules if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole value; of a DTensor it is gathered, for which all ranks must call this."""
    return cast(Tensor, tensor.full_tensor()) if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def require_whole(key: str, tensor: Tensor, shape: Sequence[int] | None) -> None:
    """Refuse a tensor that is empty or a part of itself, and does not know of what.

    Raises:
        LoRAInjectError: FSDP1 or ZeRO-3 has sharded it.
    """
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        gather = (
            "deepspeed.zero.GatheredParameters(lora_parameters(model))"
            if zero_shape(tensor) is not None
            else "FullyShardedDataParallel.summon_full_params(model)"
        )
        raise LoRAInjectError(
            f"{key} has the shape {tuple(tensor.shape)} here, not {tuple(shape)}: it is sharded.",
            remedy=f"Do this inside {gather}.",
        )


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor, source: int | None = None) -> None:
    """Write a whole value into a tensor; of a DTensor each rank writes its shard.

    Args:
        tensor: what to write into.
        value: the value.
        source: the rank of a DTensor's mesh whose value all get; None where all have the same one.
    """
    if is_distributed(tensor):
        value = shards(value, tensor, source=source)
    tensor.copy_(value)


def on_first_rank(action: Callable[[], object]) -> None:
    """Do something on the first rank alone, while all wait; what it raises is raised on all.

    Raises:
        LoRAInjectError: it failed.
    """
    from torch import distributed

    problem: list[LoRAInjectError | None] = [None]
    if distributed.get_rank() == 0:
        try:
            action()
        except LoRAInjectError as error:
            problem = [error]
        except Exception as error:
            problem = [LoRAInjectError(f"the first rank failed: {error!r}.")]
    distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]


def elements(tensor: Tensor, places: Tensor) -> Tensor:
    """The elements at these places of the flat tensor, without gathering the others."""
    if not is_distributed(tensor):
        return tensor.reshape(-1)[places.to(tensor.device)]
    from torch.distributed.tensor import DTensor, Partial, Replicate

    own = cast(DTensor, tensor)
    local, mesh = own.to_local(), own.device_mesh
    offset = offset_of_shard(own.shape, mesh, own.placements)
    if offset is None:
        return elements(whole(tensor), places)
    at = torch.unravel_index(places, own.shape)
    index = [i - start for i, start in zip(at, offset, strict=True)]
    inside = [(i >= 0) & (i < size) for i, size in zip(index, local.shape, strict=True)]
    here = torch.stack(inside).all(0)
    found = torch.zeros(len(places), dtype=tensor.dtype, device=local.device)
    found[here.to(local.device)] = local[tuple(i[here].to(local.device) for i in index)]
    # An element is on one rank along a sharded dimension of the mesh, and on all along another.
    parts = [Partial() if p.is_shard() else Replicate() for p in own.placements]
    return DTensor.from_local(found, mesh, parts, run_check=False).full_tensor()


def placements_of_pair(weight: Tensor, transposes: bool) -> tuple[list[Any], list[Any]]:
    """The placements of A and B that follow from those of a weight.

    What is sharded in its outputs has a B that is, and what is sharded in its inputs an A: then no
    rank computes or holds more of an adapter than of the weight, and nothing is sent in between.

    Args:
        weight: a DTensor.
        transposes: whether it is (in, out).
    """
    from torch.distributed.tensor import Replicate, Shard

    A, B = [], []
    for placement in weight.placements:  # type: ignore[attr-defined]
        of_outputs = placement.is_shard(1 if transposes else 0)
        A.append(Shard(1) if placement.is_shard() and not of_outputs else Replicate())
        B.append(Shard(0) if of_outputs else Replicate())
    return A, B


def replicated(placements: list[Any]) -> list[Any]:
    """As many placements that keep a tensor whole on every rank."""
    from torch.distributed.tensor import Replicate

    return [Replicate()] * len(placements)


def has_known_placements(weight: Tensor) -> bool:
    """Whether a DTensor is one of those that ``placements_of_pair`` is for."""
    from torch.distributed.tensor import Replicate, Shard

    return all(type(placement) in (Replicate, Shard) for placement in weight.placements)  # type: ignore[attr-defined]


def redistributed(parameter: nn.Parameter, placements: list[Any]) -> nn.Parameter:
    """The same parameter in other placements."""
    if list(parameter.placements) == placements:  # type: ignore[attr-defined]
        return parameter
    value = parameter.detach().redistribute(placements=placements)  # type: ignore[attr-defined]
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def alongside(value: Tensor, other: Tensor) -> Tensor:
    """A whole value in the form in which it can meet another tensor: whole on each of its ranks."""
    if not is_distributed(other):
        return value
    return shards(value, other, replicated(other.placements))  # type: ignore[attr-defined]


def shards(
    value: Tensor, like: Tensor, placements: Any = None, source: int | None = None
) -> Tensor:
    """A whole value on the mesh of a DTensor.

    Args:
        value: the value.
        like: the DTensor.
        placements: where its parts go; None for where those of the DTensor are.
        source: the rank of the mesh whose value all get; None where all have the same one.
    """
    from torch.distributed.tensor import distribute_tensor

    mesh, own = like.device_mesh, like.placements  # type: ignore[attr-defined]
    value = whole(value).detach().to(like.device, copy=True)
    return distribute_tensor(value, mesh, placements or own, src_data_rank=source)
