"""Statistics of several ranks, added up: every rank has seen batches of its own."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lora_inject.arithmetic.moments import Moments
from lora_inject.calibration.statistics import Paths, Statistics, joined
from lora_inject.errors import LoRAInjectError

Shape = tuple[tuple[int, ...], torch.dtype]
Shapes = dict[Paths, Shape]


def across_ranks(stats: Statistics, group: Any) -> Statistics:
    """The sum of the statistics of all ranks of a group, the same on each.

    Raises:
        LoRAInjectError: they have watched different layers, or there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise LoRAInjectError(
            "there is no process group.", remedy="Call torch.distributed.init_process_group first."
        )
    shapes = {key: (tuple(m.mean.shape), m.mean.dtype) for key, m in stats.inputs.items()}
    told: list[Any] = [None] * dist.get_world_size(group)
    own = (dict(stats.layers), shapes, [*stats.gradients], stats.batches)
    dist.all_gather_object(told, own, group=group)
    layers, _, gradients, _ = zip(*told, strict=True)
    if any(other != layers[0] for other in layers) or any(g != gradients[0] for g in gradients):
        raise LoRAInjectError(
            "the ranks have watched different layers.",
            remedy="Call calibrate with the same arguments on all of them.",
        )
    everywhere: Shapes = {key: like for shapes in told for key, like in shapes[1].items()}
    inputs = {
        key: _sum(stats.inputs.get(key), everywhere[key], _device(stats), group)
        for key in sorted(everywhere)
    }
    sums = {name: stats.gradients[name].clone() for name in gradients[0]}
    for tensor in sums.values():
        dist.all_reduce(tensor, group=group)
    batches = sum(rank[3] for rank in told)
    return Statistics(stats.layers, joined(inputs, [*stats.layers]), sums, batches)


def _device(stats: Statistics) -> torch.device:
    return next(iter(stats.inputs.values())).mean.device


def _sum(own: Moments | None, like: Shape, device: torch.device, group: Any) -> Moments:
    """The moments of all ranks, of which one may have none of these inputs."""
    shape, dtype = like
    if own is None:
        mean = torch.zeros(shape, dtype=dtype, device=device)
        own = Moments(0, mean, torch.zeros(*shape, shape[-1], dtype=dtype, device=device))
    count = torch.tensor(own.count, device=own.mean.device)
    dist.all_reduce(count, group=group)
    # About the mean of all, each rank's squares are its own and those of how far it is away.
    mean = _reduced(own.mean * (own.count / int(count)), group)
    apart = (own.mean - mean).unsqueeze(-1)
    scatter = _reduced(own.scatter + own.count * (apart @ apart.mT), group)
    return Moments(int(count), mean, scatter)


def _reduced(tensor: Tensor, group: Any) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor
