"""What is a module's own: its class without adapters, its tensors, and where its state stands."""

from typing import TypeVar

from torch import Tensor, nn

STATE = "_lora_inject_state"  # what is known of a module, in its __dict__

Model = TypeVar("Model", bound=nn.Module)  # what a call gives back as it was given
Place = tuple[nn.Module, str]  # a module and the name of a parameter or buffer of it


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without its adapters."""
    state = module.__dict__.get(STATE)
    return type(module) if state is None else state.before.cls


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the module itself, or None."""
    for owned in (module._parameters, module._buffers):
        if name in owned:  # and no .get: scripted modules have other mappings
            return owned[name]
    return None
