"""Parameters of which a rank holds a part: how A and B follow the weight, are gathered and filled.

What ``parallelize_module`` and ``fully_shard`` shard are DTensors, which know their global shape.
DeepSpeed's ZeRO-3 leaves empty placeholders with a ``ds_shape``. torch.distributed.tensor is
imported where it is used: it costs as much as the whole library.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_inject.errors import LoRAInjectError


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor is an empty stand-in of a parameter that ZeRO-3 has partitioned."""
    return tensor.numel() == 0 and math.prod(whole_shape(tensor)) > 0


def is_partial(tensor: Tensor) -> bool:
    """Whether a rank holds no more of a tensor than its part."""
    return is_distributed(tensor) or is_placeholder(tensor)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, of which a rank may hold a part."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Tensor) -> int:
    """The elements of the whole parameter."""
    return math.prod(whole_shape(tensor))


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP manages the module's parameters, by ``fully_shard`` or the FSDP1 wrapper."""
    # Both leave this mark, which torch.compile reads.
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard`` put the shards back in place of what it gathered for a forward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole value; of a DTensor it is gathered, for which all ranks must call this."""
    return cast(Tensor, tensor.full_tensor()) if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor; of a DTensor each rank writes its shard."""
    if is_distributed(tensor):
        value = _shards(value, tensor, tensor.placements, source=None)  # type: ignore[attr-defined]
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
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    own = cast(DTensor, tensor)
    local, mesh = own.to_local(), own.device_mesh
    _, offset = compute_local_shape_and_global_offset(own.shape, mesh, own.placements)
    at = torch.unravel_index(places, own.shape)
    index = [i - start for i, start in zip(at, offset, strict=True)]
    inside = [(i >= 0) & (i < size) for i, size in zip(index, local.shape, strict=True)]
    here = torch.stack(inside).all(0)
    found = torch.zeros(len(places), dtype=tensor.dtype, device=local.device)
    found[here.to(local.device)] = local[tuple(i[here].to(local.device) for i in index)]
    # An element is on one rank along a sharded dimension of the mesh, and on all along another.
    parts = [Partial() if p.is_shard() else Replicate() for p in own.placements]
    return DTensor.from_local(found, mesh, parts, run_check=False).full_tensor()


def followed(
    A: Tensor, B: Tensor, weight: Tensor, transposes: bool, part: str
) -> tuple[Tensor, Tensor]:
    """A and B placed as the weight is; all ranks get the values of the mesh's first one.

    Args:
        A: (r, in).
        B: (out, r).
        weight: the weight; where it is no DTensor, A and B stay as they are.
        transposes: whether the weight is (in, out).
        part: the part of a fused projection that they are for, or "".
    """
    if not is_distributed(weight):
        return A, B
    A_placements, B_placements = placements_of_pair(weight, transposes, part)
    return (
        _shards(A, weight, A_placements, source=0),
        _shards(B, weight, B_placements, source=0),
    )


def placements_of_pair(weight: Tensor, transposes: bool, part: str) -> tuple[list[Any], list[Any]]:
    """The placements of A and B that follow from those of a weight.

    What is sharded in its outputs has a B that is, and what is sharded in its inputs an A: then no
    rank computes or holds more of an adapter than of the weight, and nothing is sent in between.
    """
    from torch.distributed.tensor import Replicate, Shard

    A, B = [], []
    for placement in weight.placements:  # type: ignore[attr-defined]
        if not placement.is_shard():
            A.append(Replicate())
            B.append(Replicate())
        elif placement.is_shard(0) != transposes:
            A.append(Replicate())
            # The rows of a part lie on some of the ranks alone.
            B.append(Replicate() if part else Shard(0))
        else:
            A.append(Shard(1))
            B.append(Replicate())
    return A, B


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


def _shards(value: Tensor, like: Tensor, placements: Any, source: int | None) -> Tensor:
    """A value on the mesh of a DTensor; from one rank, or from every rank's own (None)."""
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    own = whole(value).detach().to(like.device)
    return distribute_tensor(own, mesh, placements, src_data_rank=source)
