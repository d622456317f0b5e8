"""What each parameter of a model is: an adapter's, a bias, of what trains in full, or other."""

from torch import nn

from lora_inject.core.look import Look
from lora_inject.kinds.bias import is_bias
from lora_inject.variants import ROLES as ROLES_OF_PAIRS

ADAPTER_ROLES = tuple(f"lora_{role}" for role in ROLES_OF_PAIRS)
ROLES = (*ADAPTER_ROLES, "bias", "train_also", "other")
_BY_PLACE = ("other", "bias", "train_also", *ADAPTER_ROLES)  # of tied places the last one counts


def roles(look: Look) -> dict[nn.Parameter, str]:
    """The role of every parameter, each once, in registration order."""
    found: dict[nn.Parameter, str] = {}
    waits = dict[nn.Module, dict[str, str]]()  # the names of the places that they are for
    for module, trained, name in look.waiting():
        waits.setdefault(module, {})[name] = trained.name
    for module in look.index.modules:
        own = module._parameters
        if not len(own):
            continue
        state = look.adapted.get(module)
        ours = {
            name: f"lora_{role}"
            for adapter in (state.adapters if state else ())
            for pair in adapter.pairs
            for role, name in pair.names.items()
        }
        in_full, places = module in look.in_full, waits.get(module, {})
        for name, parameter in own.items():
            if parameter is None:
                continue
            if name in ours:
                role = ours[name]
            elif in_full:
                role = "train_also"
            else:
                role = "bias" if is_bias(module, places.get(name, name)) else "other"
            known = found.setdefault(parameter, role)
            if known != role and _BY_PLACE.index(known) < _BY_PLACE.index(role):
                found[parameter] = role
    return found


def biases(look: Look) -> set[nn.Parameter]:
    """Every bias, those included that wait while another adapter's stands in their place."""
    waiting = [
        module._parameters[name]
        for module, trained, name in look.waiting()
        if trained.is_parameter and is_bias(module, trained.name)
    ]
    return {p for p in waiting if p is not None} | {
        parameter
        for module in look.index.modules
        for name, parameter in module._parameters.items()
        if parameter is not None and is_bias(module, name)
    }
