"""The tensors of an adapter as they come into a model: starting values, or those that are given."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.changes.edits import filling, run
from lora_inject.core.adapter import Adapter
from lora_inject.core.site import Site
from lora_inject.core.state import state_of
from lora_inject.errors import UnsupportedLayerError
from lora_inject.kinds import Kind, Spec
from lora_inject.sharding import is_distributed, shards
from lora_inject.variants import SIDES


def pair_parameters(
    site: Site,
    adapter: Adapter,
    values: Mapping[tuple[str, str], Mapping[str, Tensor]] | None,
    trains: bool,
    generator: torch.Generator,
) -> list[dict[str, nn.Parameter]]:
    """The tensors of each pair of a site by role, as parameters.

    Args:
        site: the layer.
        adapter: the adapter on it.
        values: the tensors by path and prefix of each pair; None for starting values.
        trains: whether the adapter does.
        generator: one that may be seeded anew.
    """
    device = site.kind.weight(site.module, site.specs[0].weight).device
    pairs, variant = [], site.settings.variant
    for spec in site.specs:
        flags = {role: trains and variant.trains(role) for role in variant.shapes(spec)}
        if values is not None:
            given = values[site.path, spec.prefix]
            tensors = {  # copies, since those of a file are pieces of one buffer
                role: tensor.to(device, variant.dtype(role, site.dtype), copy=True)
                for role, tensor in given.items()
            }
            if missing := set(variant.derived) - tensors.keys():
                W = site.kind.dense(site.module, spec)
                own = variant.starting(
                    site.kind, site.module, W, spec, tensors, site.settings.scaling
                )
                tensors |= {role: own[role] for role in missing}
        elif device.type == "meta":
            tensors = {
                role: torch.empty(shape, dtype=variant.dtype(role, site.dtype), device=device)
                for role, shape in variant.shapes(spec).items()
            }
        else:
            tensors = starting_values(adapter, site.module, spec, site.dtype, generator)
        pairs.append(as_parameters(site.kind, site.module, spec, tensors, flags))
    return pairs


def as_parameters(
    kind: Kind,
    layer: nn.Module,
    spec: Spec,
    tensors: Mapping[str, Tensor],
    trains: Mapping[str, bool],
) -> dict[str, nn.Parameter]:
    """The tensors of a pair as parameters of a layer.

    Beside a sharded weight they are placed as it is, with the first rank's values, whatever seed
    the others drew.
    """
    weight = kind.weight(layer, spec.weight)
    if is_distributed(weight):
        places = dict(zip(("in", "out"), kind.placements(weight, spec), strict=True))
        tensors = {role: shards(t, weight, places[SIDES[role]], 0) for role, t in tensors.items()}
    return {role: nn.Parameter(t, requires_grad=trains[role]) for role, t in tensors.items()}


@torch.no_grad()
def starting_values(
    adapter: Adapter,
    layer: nn.Module,
    spec: Spec,
    dtype: torch.dtype,
    used: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The tensors of a pair as they start, by role; a used generator makes it faster.

    Args:
        adapter: the adapter.
        layer: the layer that it is for.
        spec: the pair.
        dtype: the dtype of A and B.
        used: a generator that may be seeded anew.
    """
    kind, s, variant = adapter.kind, adapter.settings, adapter.settings.variant
    path = f"{adapter.path}/{spec.prefix}" if spec.prefix else adapter.path
    generator = initial.site_generator(adapter.seed, adapter.name, path, used)
    device = kind.weight(layer, spec.weight).device
    W = kind.dense(layer, spec) if reads_weight(adapter) else None
    tensors: dict[str, Tensor] = {}
    if variant.own_shapes:
        own = variant.begin(spec, generator)
        tensors = {role: t.to(device, variant.dtype(role, dtype)) for role, t in own.items()}
    elif "A" in variant.roles:
        A, B = s.start.values(kind, layer, W, spec, s.scaling, generator)
        if not (A.device == B.device == device and A.dtype is B.dtype is dtype):
            A, B = A.to(device, dtype), B.to(device, dtype)
        tensors = {"A": A, "B": B}
    if variant.offset:
        tensors |= {"A0": A.clone(), "B0": B.clone()}
    more = variant.starting(kind, layer, W, spec, tensors, s.scaling)
    tensors |= {role: t.to(device, variant.dtype(role, dtype)) for role, t in more.items()}
    _require_alive(adapter, tensors)
    return tensors


def reads_weight(adapter: Adapter) -> bool:
    """Whether an adapter starts from the values of its weight."""
    return adapter.settings.start.reads or adapter.settings.variant.of_base


def _require_alive(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Refuse values from which no gradient leads away, where only they tell.

    Raises:
        UnsupportedLayerError: the adapter could never learn.
    """
    s = adapter.settings
    if "magnitude" in tensors and not tensors["magnitude"].any():
        raise UnsupportedLayerError(
            f"{s.variant.argument}: its weight is zero, and so are the lengths that it would have.",
            path=adapter.path,
            remedy="Give it variant='lora' by a pattern of its own, or exclude it.",
        )
    if "A" not in tensors or s.start.zero(adapter.kind) is not None:
        return
    zero = [role for role in ("A", "B") if not tensors[role].any()]
    if len(zero) == 2 or s.variant.fixed in zero:
        still = "A and B both start" if len(zero) == 2 else f"its fixed {zero[0]} starts"
        raise UnsupportedLayerError(
            f"init={s.start.name!r}: {still} at zero, and the adapter could never learn.",
            path=adapter.path,
            remedy="Give it another start by a pattern of its own, or exclude it.",
        )


def without_values(layer: nn.Module) -> list[tuple[Adapter, Spec, dict[str, str]]]:
    """The pairs of a layer that are on the meta device: their names by role."""
    state, own = state_of(layer), layer._parameters
    return [
        (adapter, pair.spec, dict(pair.names))
        for adapter in (state.adapters if state else ())
        for pair in adapter.pairs
        if all((p := own.get(name)) is not None and p.is_meta for name in pair.names.values())
    ]


@torch.no_grad()
def start_anew(layer: nn.Module, pairs: Iterable[tuple[Adapter, Spec, dict[str, str]]]) -> None:
    """Give pairs their starting values that had none, where ``to_empty`` has made room for them.

    What starts from the values of the weight, which come later, is NaN until
    ``reset_lora_parameters``. The pair of a tied layer, which that ties again, adds nothing.
    """
    for adapter, spec, names in pairs:
        tensors = {role: layer.get_parameter(name) for role, name in names.items()}
        if any(tensor.is_meta for tensor in tensors.values()):
            continue
        variant, reads = adapter.settings.variant, adapter.settings.start.reads
        if adapter.follows or reads or variant.more:
            for tensor in tensors.values():
                tensor.fill_(0.0 if adapter.follows else math.nan)
        else:
            values = starting_values(adapter, layer, spec, tensors["A"].dtype)
            for role, tensor in tensors.items():
                run([filling(tensor, values[role], source=0)])
