"""A plan's content becomes adapted layers, all of it or nothing."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_inject import initial
from lora_inject.adapter import Adapter
from lora_inject.core.look import Look
from lora_inject.core.site import Site
from lora_inject.core.training import mark, take
from lora_inject.in_place import Place
from lora_inject.kinds import Spec
from lora_inject.layer import attach, detach
from lora_inject.placements import fill
from lora_inject.record import Before, Mode, Record, install, reinstall, set_in_use, set_trainable
from lora_inject.settings import BiasMode


@dataclass(frozen=True)
class Content:
    """What an adapter trains besides its A and B, and the values that it has where it is loaded.

    Attributes:
        bias: the bias mode.
        train_also: the modules that train in full, by path.
        in_place: what trains in place, and whether it trains itself or only moves.
        values: A and B by path and prefix of each pair; None for starting values.
        tensors: values of what trains in place; what is not there keeps the base's.
        use: whether the adapter joins those in use and trains; else it waits for ``use``.
    """

    bias: BiasMode = "none"
    train_also: Mapping[str, nn.Module] = field(default_factory=dict)
    in_place: Mapping[Place, bool] = field(default_factory=dict)
    values: Mapping[tuple[str, str], tuple[Tensor, Tensor]] | None = None
    tensors: Mapping[Place, Tensor] = field(default_factory=dict)
    use: bool = True


def adapt(
    look: Look, sites: tuple[Site, ...], name: str, seed: int | None, content: Content
) -> Callable[[], None]:
    """Put an adapter on the sites, all of it or nothing.

    Args:
        look: the model.
        sites: the layers.
        name: the adapter's name.
        seed: of the starting values; None draws one.
        content: what else the adapter is.

    Returns:
        What makes the model what it was before this call, until something else changes it.
    """
    modules = look.index.modules
    decided = {module for record in look.records for module in record.before.training}
    undecided = [module for module in modules if module not in decided]
    gradients = [(parameter, parameter.grad) for parameter in look.parameters]
    seed = initial.draw_seed() if seed is None else seed

    changes, attached = Before(), dict[str, tuple[nn.Module, Adapter]]()
    changes.keep(modules)
    record = look.gathered(copy(changes))
    owned = {slot: set(slot.trains) for slot in record.all_slots()}

    def undo() -> None:
        for layer, adapter in reversed(attached.values()):
            detach(layer, adapter)
        for slot in record.all_slots():
            if name not in owned.get(slot, ()):
                slot.disown(name)
        record.forget_unowned_slots()
        changes.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for former in look.records:
            set_in_use(former, former.in_use)
        reinstall(look.again().holders, look.holders)

    try:
        for site in sites:
            shared = attached[site.follows] if site.follows else None
            attached[site.path] = _adapt_site(site, name, seed, shared, content)
        _enter(look, record, name, attached, content, undecided)
        _fill_slots(record, name, content.tensors)
        install(look, record)
    except BaseException:
        undo()
        raise
    return undo


def _enter(
    look: Look,
    record: Record,
    name: str,
    attached: Mapping[str, tuple[nn.Module, Adapter]],
    content: Content,
    undecided: list[nn.Module],
) -> None:
    """Write a new adapter into the record; put it in use beside the others, and let it train."""
    in_full = list(content.train_also.values())
    take(look, record, name, content.in_place, inside=content.use)
    parameters = {m.get_parameter(n) for m, a in attached.values() for n in a.parameters}
    record.adapters += [(path, *pair) for path, pair in attached.items()]
    record.modes.setdefault(name, Mode(content.bias)).train_also += in_full
    if content.use:
        mark(look, undecided, parameters, content.in_place, in_full)
        record.training = record.training | {name}
        set_in_use(record, {name: 1.0, **record.in_use})
    else:
        set_trainable(parameters, False)
        set_in_use(record, record.in_use)


@torch.no_grad()
def _fill_slots(record: Record, adapter: str, tensors: Mapping[Place, Tensor]) -> None:
    for (module, name), value in tensors.items():
        tensor = record.slots[module][name].tensor(adapter)
        assert tensor is not None
        fill(tensor, value)


def _adapt_site(
    site: Site, name: str, seed: int, shared: tuple[nn.Module, Adapter] | None, content: Content
) -> tuple[nn.Module, Adapter]:
    adapter = Adapter(
        name, site.settings, site.kind, site.way, site.specs, site.pattern, site.path, seed,
        site.follows,
    )  # fmt: skip
    if shared is not None:
        leader, ((_, A_name, B_name),) = shared[0], shared[1].pairs
        pair = leader.get_parameter(A_name), leader.get_parameter(B_name)
        attach(site.module, adapter, [pair])
        return site.module, adapter
    device = site.kind.weight(site.module, site.specs[0].weight).device
    # Tensors made in inference mode could never be trained.
    with torch.inference_mode(False):
        values = []
        for spec in site.specs:
            if content.values is not None:
                A, B = content.values[site.path, spec.prefix]
            elif device.type == "meta":
                A, B = (torch.empty(s, device=device) for s in (spec.A_shape, spec.B_shape))
            else:
                A, B = starting_values(adapter, spec)
            values.append((A.to(device, site.dtype), B.to(device, site.dtype)))
        attach(site.module, adapter, values)
    return site.module, adapter


def starting_values(adapter: Adapter, spec: Spec) -> tuple[Tensor, Tensor]:
    """A and B of a pair as they start, float32 on the CPU."""
    path = f"{adapter.path}/{spec.prefix}" if spec.prefix else adapter.path
    generator = initial.site_generator(adapter.seed, adapter.name, path)
    return adapter.kind.initial(spec, generator)
