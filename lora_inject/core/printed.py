"""What an adapted layer says of its adapters where it is printed: in one line, as it did before."""

from typing import Any

from torch import nn

from lora_inject.arithmetic.thinning import Drops
from lora_inject.core.adapter import Adapter, dropping_names
from lora_inject.core.dropping import LoRADropout
from lora_inject.core.state import State
from lora_inject.own import STATE


def adapters_text(layer: nn.Module) -> str:
    """The adapters of a layer, with the probabilities with which they drop now in training."""
    state: State = layer.__dict__[STATE]
    shown = []
    for a in state.adapters:
        s, weights = a.settings, [spec.part or spec.weight for spec in a.specs]
        on = "" if weights == ["weight"] else f"{'+'.join(weights)}: "
        used = "" if a.name in state.use.weights else ", not in use"
        own = f"r={s.r}, alpha={s.alpha:g}, {_dropout_text(layer, a)}{s.variant.text}"
        shown.append(f"{on}{a.name}({own}{used})")
    return "lora=" + " ".join(shown)


def _dropout_text(layer: nn.Module, adapter: Adapter) -> str:
    children: Any = layer._modules
    names = dropping_names(adapter.specs[0], adapter.name)
    now = [getattr(children.get(name), "p", 0.0) for name in names]
    return f"dropout={now[0]:g}{Drops(*now[1:]).text}"


def has_other_children(layer: nn.Module) -> bool:
    """Whether a layer has children besides those that say with which probability it drops."""
    return not all(isinstance(child, LoRADropout) for child in layer._modules.values())
