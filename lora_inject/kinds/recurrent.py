"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: each weight of each layer and direction."""

import weakref
from typing import Any

from torch import Tensor, nn

from lora_inject.kinds.base import Kind, Way, out_in_spec
from lora_inject.kinds.shown import bare, effective
from lora_inject.own import own_class
from lora_inject.settings import Settings
from lora_inject.variants import Spec


class RecurrentCellKind(Kind):
    """``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell``: ``weight_ih`` and ``weight_hh``."""

    name = "recurrent cell"

    def matches(self, module: nn.Module) -> bool:
        """Instances of torch's cells."""
        return isinstance(module, nn.RNNCellBase)

    def way(self, module: nn.Module) -> Way:
        """The weights are read by a fused operation."""
        return "weight"

    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """One pair for each weight matrix."""
        weights = ((name, module._parameters.get(name)) for name in self.weight_names(module))
        return tuple(
            out_in_spec(name, weight, settings.r) for name, weight in weights if weight is not None
        )

    def weight_names(self, module: nn.Module) -> list[str]:
        """The matrices that the forward reads."""
        return ["weight_ih", "weight_hh"]

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """Every matrix must be a parameter, and the forward torch's."""
        if not any(own_class(module).forward is known.forward for known in _KNOWN):
            return (
                f"{own_class(module).__name__} has a forward of its own, which may read its "
                "weights in another way. Target its parameters."
            )
        gone = [name for name in self.weight_names(module) if module._parameters.get(name) is None]
        if gone:
            return (
                f"its {gone[0]} is normed, pruned or otherwise computed. Undo that or exclude it."
            )
        return None


class RecurrentKind(RecurrentCellKind):
    """``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, which read their weights from a flat list."""

    name = "recurrent"

    def matches(self, module: nn.Module) -> bool:
        """Instances of ``nn.RNNBase``."""
        return isinstance(module, nn.RNNBase)

    def weight_names(self, module: nn.Module) -> list[str]:
        """The matrices of every layer and direction."""
        names: Any = module._flat_weights_names
        return [name for name in names if name.startswith("weight_")]

    def members(self, weights: tuple[str, ...]) -> dict[str, Any]:
        """The flat list with effective weights; what is stored stays the list of parameters."""
        return {
            "_flat_weights": property(_read_flat, _store_flat),
            "_init_flat_weights": _store_flat,
            "__setattr__": _set,
            "flatten_parameters": lambda layer: None,  # effective weights have no common storage
        }


_KNOWN = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def _read_flat(layer: Any) -> list[Tensor | None]:
    return [
        effective(layer, name) if bare(layer, name) is not None else getattr(layer, name, None)
        for name in layer._flat_weights_names
    ]


def _set(layer: Any, name: str, value: Any) -> None:
    """What ``nn.RNNBase`` does, whose list stands behind that of effective weights here."""
    if name in layer.__dict__.get("_flat_weights_names", ()) and "_flat_weights" in layer.__dict__:
        layer.__dict__["_flat_weights"][layer._flat_weights_names.index(name)] = value
    nn.Module.__setattr__(layer, name, value)


def _store_flat(layer: Any, _: Any = None) -> None:
    parameters = [layer._parameters.get(name) for name in layer._flat_weights_names]
    layer.__dict__["_flat_weights"] = parameters
    layer._flat_weight_refs = [p if p is None else weakref.ref(p) for p in parameters]
