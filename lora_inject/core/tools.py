"""What tools of others do to an adapted layer, and how it holds or refuses."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from lora_inject.core.state import owned, path_of, state_of
from lora_inject.errors import LoRAInjectError, UnsupportedLayerError

Cast = Callable[[Tensor], Tensor]


def keeping_values(layer: nn.Module, cast: Cast) -> Cast:
    """What ``nn.Module._apply`` applies, but where it would round what is ours for good.

    A weight may be stored in 8 bits and cast for each forward pass (layerwise casting). What trains
    is small, and would be rounded to a few values; so beside such a weight it keeps its dtype.
    """
    tensors = [layer._parameters.get(name) for name, _, _ in owned(state_of(layer))]
    ours = {id(t) for own in tensors if own is not None for t in (own, own.grad)}
    stored = False

    def kept(tensor: Tensor) -> Tensor:
        nonlocal stored
        new = cast(tensor)
        in_8_bits = new.is_floating_point() and 1 in (new.itemsize, tensor.itemsize)
        if id(tensor) not in ours:
            stored = stored or in_8_bits
        elif new.dtype is not tensor.dtype and (stored or in_8_bits):
            return tensor.detach().to(new.device)
        return new

    return kept


def shallow_copy(layer: nn.Module) -> nn.Module:
    """What ``copy.copy`` makes: the same tensors, in dicts of its own, so that each is stripped."""
    new = type(layer).__new__(type(layer))
    for name, value in layer.__dict__.items():
        new.__dict__[name] = value.copy() if isinstance(value, dict | set) else value
    return new


def refuse_script(layer: nn.Module) -> None:
    """Refuse ``torch.jit.script``.

    Raises:
        UnsupportedLayerError: always.
    """
    raise UnsupportedLayerError(
        "torch.jit.script cannot compile an adapted layer.",
        path=path_of(layer),
        remedy="Script the model after strip(model, merge=True), or use torch.jit.trace or "
        "torch.export, which take it as it is.",
    )


def refuse_removal(layer: nn.Module) -> None:
    """Refuse ``remove_parametrizations`` before it changes anything.

    Raises:
        LoRAInjectError: always.
    """
    raise LoRAInjectError(
        "its norm or other parametrization cannot be removed while an adapter runs in it, on top "
        "of it.",
        path=path_of(layer),
        remedy="Save the adapter and strip, remove the parametrization, and load it again.",
    )


def require_values(layer: nn.Module, x: Tensor, own: Collection[Any]) -> None:
    """Refuse to run an adapter that has no values, beside an input that has some.

    Raises:
        LoRAInjectError: one of its own tensors is on the meta device, and x is not.
    """
    for tensor in own:
        # Of tensors that stand for others (per-sample gradients) not everything can be asked.
        if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_meta or x.is_meta:
            continue
        raise LoRAInjectError(
            "its adapter is on the meta device and has no values, beside an input that has some.",
            path=path_of(layer),
            remedy="Call model.to_empty(device=...) or inject on the right device, then load the "
            "adapter (not in init_empty_weights) or call reset_lora_parameters.",
        )
