"""Starting values anew, and first ones for a model that was adapted on the meta device."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from lora_inject.changes.edits import Edit, filling, tensor_edit
from lora_inject.core.adaptation import former_value
from lora_inject.core.adapter import Adapter
from lora_inject.core.commit import commit
from lora_inject.core.look import Look
from lora_inject.core.starting import reads_weight, starting_values
from lora_inject.core.state import State
from lora_inject.core.state_parts import Trained
from lora_inject.errors import LoRAInjectError
from lora_inject.own import own_tensor
from lora_inject.sharding import is_placeholder, require_whole, reshard


def reset_lora_parameters(model: nn.Module) -> None:
    """Give every A and B the starting values again that ``inject`` gave or would have given.

    After ``inject`` on the meta device this makes the adapters real. The order is then: build on
    meta, inject, ``to_empty``, load the base weights, ``reset_lora_parameters``, train. What starts
    from the values of its weight (PiSSA, DoRA) waits for that; ``fully_shard`` or
    ``parallelize_module`` may come before ``to_empty``: each weight is gathered in its turn, for
    which all ranks must call this.

    Example:
        >>> reset_lora_parameters(model)  # doctest: +SKIP

    Raises:
        LoRAInjectError: an adapter is still on the meta device; nothing is changed.
    """
    look = Look(model)
    reshard(look.index.modules)
    edits: list[Edit] = []
    for path, layer in look.layers.items():
        for adapter in look.states[layer].adapters:
            if not adapter.follows:
                edits += _starting(path, layer, adapter)
    edits += _tying(look)
    came = {m: s for m, s in look.adapted.items() for t in s.trained if _come(m, t) is not None}
    formers: dict[int, Tensor] = {}
    new = {m: _known(m, state, formers, edits) for m, state in came.items()}
    commit(look, new, values=edits)


def _starting(path: str, layer: nn.Module, adapter: Adapter) -> Iterator[Edit]:
    """Edits that write the starting values into A and B."""
    for pair in adapter.pairs:
        spec, tensors = pair.spec, pair.tensors(layer)
        shapes = adapter.settings.variant.shapes(spec)
        if reads_weight(adapter) and is_placeholder(adapter.kind.weight(layer, spec.weight)):
            raise LoRAInjectError(
                "its adapter starts from its weight, which ZeRO-3 has partitioned.",
                path=path,
                remedy="Do this inside deepspeed.zero.GatheredParameters([*model.parameters()]).",
            )
        for role, tensor in tensors.items():
            require_whole(f"lora_{role} of {path}", tensor, shapes[role])
        if any(tensor.is_meta for tensor in tensors.values()):
            raise LoRAInjectError(
                "its adapter is on the meta device and has no values to set.",
                path=path,
                remedy='Call model.to_empty(device="cpu") first, then load the base weights.',
            )
        values = starting_values(adapter, layer, spec, next(iter(tensors.values())).dtype)
        for role, tensor in tensors.items():
            yield filling(tensor, values[role], source=0)  # whatever seed the other ranks drew


def _tying(look: Look) -> Iterator[Edit]:
    """Edits that let tied layers share their A and B again, which ``to_empty`` takes apart."""
    for layer, adapter in look.adapters:
        if adapter.follows:
            leader, first = look.leader(layer, adapter)
            for name, shared in zip(adapter.parameters, first.parameters, strict=True):
                old, new = layer._parameters[name], leader.get_parameter(shared)
                if old is not new:
                    yield tensor_edit(layer, name, old, new)


def _come(module: nn.Module, trained: Trained) -> Tensor | None:
    """What has come into being in a place whose former value was on the meta device."""
    tensor, former = own_tensor(module, trained.name), trained.former
    is_there = tensor is not None and not tensor.is_meta
    return tensor if is_there and former is not None and former.is_meta else None


def _known(module: nn.Module, state: State, formers: dict[int, Tensor], edits: list[Edit]) -> State:
    """The state with the values that came as former ones; other adapters start from them."""
    trained = []
    for place in state.trained:
        tensor = _come(module, place)
        if tensor is not None:
            key = id(place.former)
            if key not in formers:
                formers[key] = former_value(tensor)
            former = formers[key]
            place = replace(place, former=former)
            for home in state.homes(place).values():
                own = own_tensor(module, home)
                if home != place.name and own is not None:
                    edits.append(filling(own, former))
        trained.append(place)
    return state.change(trained=tuple(trained))
