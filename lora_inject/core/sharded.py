"""How the A and B of an adapted layer follow a weight that is sharded after inject."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_inject.compat.marks import is_fully_sharded
from lora_inject.core.adapter import Adapter
from lora_inject.errors import LoRAInjectError
from lora_inject.sharding import is_distributed, redistributed
from lora_inject.variants import SIDES


def is_of_fsdp(layer: nn.Module) -> bool:
    """Whether FSDP registers the layer's parameters, whose shards are all alike.

    It writes past ``register_parameter`` where a class has no ``__setattr__`` of its own, so that
    before its mark is there only those of other classes (``nn.LSTM``) come here.
    """
    return is_fully_sharded(layer) or type(layer).__setattr__ is not nn.Module.__setattr__


def following(
    layer: nn.Module, adapters: Iterable[Adapter], name: str, parameter: nn.Parameter
) -> nn.Parameter:
    """A sharded parameter that replaces one of the layer, placed as its adapters need it.

    Raises:
        LoRAInjectError: it is, or follows, a weight that cannot be sharded under its adapter.
    """
    for adapter in adapters:
        for spec, names in adapter.pairs:
            weight, roles = layer._parameters.get(spec.weight), {n: r for r, n in names.items()}
            if name == spec.weight or name in roles:
                _require_follows(adapter)
            if name == spec.weight and adapter.settings.variant.more:
                _require_whole_rows(adapter, adapter.kind.placements(parameter, spec)[0])
            if name in roles and weight is not None and is_distributed(weight):
                A, B = adapter.kind.placements(weight, spec)
                # What is no factor, as a magnitude, has a number for each output feature.
                side = SIDES.get(roles[name], "out")
                return redistributed(parameter, A if side == "in" else B)
    return parameter


def _require_follows(adapter: Adapter) -> None:
    """Refuse to shard a weight that its adapter could not follow.

    Raises:
        LoRAInjectError: it acts in the weight, or is shared with a tied layer.
    """
    if adapter.way == "weight":
        raise LoRAInjectError(
            f"its adapter {adapter.name!r} acts in its weight, which cannot be sharded with it.",
            path=adapter.path,
            remedy="Leave the layer out of the plan of parallelize_module, or strip.",
        )
    if "A" not in adapter.settings.variant.roles:
        raise LoRAInjectError(
            f"its adapter {adapter.name!r} is a {adapter.settings.variant.name}, which needs its "
            "whole weight.",
            path=adapter.path,
            remedy="Leave the layer out of the plan of parallelize_module, or strip.",
        )
    if adapter.follows:
        raise LoRAInjectError(
            f"it is tied to {adapter.follows}, and parallelize_module would untie their adapter.",
            path=adapter.path,
            remedy="Call parallelize_module first and inject then.",
        )


def _require_whole_rows(adapter: Adapter, of_A: Iterable[Any]) -> None:
    """Refuse to divide the rows of a weight whose lengths an adapter needs.

    Raises:
        LoRAInjectError: they are, where A is.
    """
    if any(placement.is_shard() for placement in of_A):
        raise LoRAInjectError(
            f"its adapter {adapter.name!r} is a {adapter.settings.variant.name}, which needs whole "
            "rows of its weight.",
            path=adapter.path,
            remedy="Shard it by columns (ColwiseParallel), leave it out of the plan, or strip.",
        )
