"""What makes an injection wrong whatever layers it is for: refused before anything is changed."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lora_inject.changes.statistics import has_statistics
from lora_inject.core.look import Look
from lora_inject.core.site import Site
from lora_inject.core.state import adapters_of, state_of
from lora_inject.errors import ArgumentError, LoRAInjectError, UnsupportedLayerError, warn
from lora_inject.kinds.refusals import LAZY
from lora_inject.own import Place, own_tensor
from lora_inject.printing import plural
from lora_inject.settings import BASE, BiasMode, Settings

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def require_injectable(look: Look) -> None:
    """Refuse what makes any injection wrong, wherever in the model it stands."""
    if isinstance(look.model, torch.jit.ScriptModule):
        raise UnsupportedLayerError(
            "the model is a ScriptModule, whose forward cannot be changed.",
            remedy="Adapt it before scripting.",
        )
    for named in look.index.named:
        if isinstance(named.module, _WRAPPERS):
            raise UnsupportedLayerError(
                f"{type(named.module).__name__} would not know of new parameters.",
                path=named.path,
                remedy="Inject first, then wrap the model.",
            )
        if isinstance(named.module, LazyModuleMixin) and has_statistics(named.module):
            raise UnsupportedLayerError(LAZY, path=named.path)  # held, they would stay so
        for name, parameter in named.module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and parameter.is_inference():
                raise UnsupportedLayerError(
                    f"its {name} was made in inference mode and can never train again.",
                    path=named.path,
                    remedy="Build or load the model outside of torch.inference_mode.",
                )


def warn_of_adapters_of_peft(look: Look) -> None:
    """Warn of adapters that PEFT has put into the model and that an injection freezes."""
    layers = {
        look.index.path(layer): None
        for module, layer in look.of_peft.items()
        if any(p is not None and p.requires_grad for p in module._parameters.values())
    }
    if layers:
        warn(
            f"{plural(len(layers), 'layer')} carry adapters of PEFT, such as {next(iter(layers))}: "
            "they are part of the base now, go on acting and train no more. To train them here, "
            "let PEFT unload() them and load(model, their directory)."
        )


def require_extensible(look: Look, adapter: str, bias: BiasMode) -> None:
    """Refuse to add layers to an adapter whose weight in use is not 1, or in another bias mode."""
    for module, state in look.adapted.items():
        if adapter in state.on_it and state.use.weights.get(adapter) != 1.0:
            raise ArgumentError(
                f"adapter: {adapter!r} is there already and not in use with a weight of 1.",
                path=look.index.path(module),
                remedy=f"Call use(model, {adapter!r}) first to add layers to it.",
            )
    look.require_one_mode(adapter, bias)


def require_free_places(look: Look, adapter: str, tensors: Collection[Place]) -> None:
    """Refuse to train in place what another adapter in use has trained: one value at a time."""
    for module, name in tensors:
        state = look.states.get(module)
        trained = None if state is None else state.find(name)
        if state is not None and trained is not None:
            holder = state.holder(trained)
            if holder not in (BASE, adapter):
                raise ArgumentError(
                    f"{adapter!r} is to train {trained.text(module)}, which {holder!r} has trained "
                    "and which is in use.",
                    remedy="Call use(model) first, which puts no adapter in use.",
                )


def require_alive(sites: Sequence[Site]) -> None:
    """Refuse new adapters that could never learn: the factor that starts at zero would stay so.

    What is tied has the values of the site that it follows, whatever its own kind starts with.
    """
    for site in sites:
        if site.follows:
            continue
        zero = site.settings.start.zero(site.kind)
        if zero is not None and site.settings.variant.fixed == zero:
            other = "A" if zero == "B" else "B"
            raise UnsupportedLayerError(
                f"fixed={zero!r}: its {zero} starts at zero, and the adapter could never learn.",
                path=site.path,
                remedy=f"Give it fixed={other!r} by a pattern of its own, or exclude it.",
            )


def require_exchangeable(look: Look, tensors: Collection[Place]) -> None:
    """Refuse to train in place what cannot give way to a former value, or has none yet."""
    for module, name in tensors:
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayerError(
                f"its {name} is to train in place, and a ScriptModule lets no other tensor stand "
                "there.",
                path=look.index.path(module),
                remedy='Take it out of train_also (or bias="all"), or script it after strip.',
            )
        tensor = own_tensor(module, name)
        if tensor is not None and is_lazy(tensor):
            raise UnsupportedLayerError(LAZY, path=look.index.path(module))


def require_one_owner(look: Look, tensors: Collection[Place]) -> None:
    """Refuse to train what is trained already, through another part, where it is tied.

    There would be two former values for one tensor, and which is right depends on the order in
    which the parts are stripped.
    """
    for module, name in tensors:
        tensor = own_tensor(module, name)
        places = [] if tensor is None else look.everywhere(tensor)
        known = {(at, k): state.find(k) for at, k in places if (state := state_of(at)) is not None}
        inside = [known.get(place) for place in places if place[0] in look.index.paths]
        outside = any(known[place] for place in known if place[0] not in look.index.paths)
        if outside or len({id(trained and trained.former) for trained in inside}) > 1:
            raise LoRAInjectError(
                f"its {name} is tied, and trained already through a part of the model that has not "
                "all of the places.",
                path=look.index.path(module),
                remedy="Take the adapter that trains it out, or call this on that part.",
            )


def require_apart(look: Look, sites: Sequence[Site], in_full: Mapping[str, nn.Module]) -> None:
    """Refuse to adapt what another adapter trains in full, and the other way round."""
    for site in sites:
        if (name := look.in_full.get(site.module)) is not None:
            raise UnsupportedLayerError(
                f"the adapter {name!r} trains it in full.",
                path=site.path,
                remedy="Exclude it.",
            )
    for path, top in in_full.items():
        for module in look.index.below(top):
            if adapters := adapters_of(module):
                raise UnsupportedLayerError(
                    f"train_also: the adapter {adapters[0].name!r} stands on a layer in it.",
                    path=path,
                    remedy="Take it out of train_also.",
                )


def require_finite(settings: Settings, dtype: torch.dtype, path: str) -> None:
    """Refuse a scaling that is infinite in the dtype of the base, in which the layer computes."""
    computes = dtype.is_floating_point and dtype.itemsize > 1
    if computes and settings.scaling > torch.finfo(dtype).max:
        raise ArgumentError(
            f"alpha: a scaling of {settings.scaling:g} overflows {dtype}.",
            path=path,
            remedy="Use a smaller alpha.",
        )
