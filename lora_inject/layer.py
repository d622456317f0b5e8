"""The class swap: a module becomes an adapted layer and back, and stays the same object.

``module.__class__`` becomes a subclass of its own class, so identity, parameters, hooks,
``isinstance`` and state-dict keys are what they were. A and B are parameters of the module itself;
what else is known of its adapters stands in one private attribute.
"""

import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from lora_inject.kinds import Kind
from lora_inject.settings import Settings

_STATE = "_lora_inject_state"
DEFAULT_ADAPTER = "default"


def parameter_names(adapter: str) -> tuple[str, str]:
    """The names of A and B: loralib's for the default adapter, others add their own name."""
    suffix = "" if adapter == DEFAULT_ADAPTER else f"_{adapter}"
    return f"lora_A{suffix}", f"lora_B{suffix}"


@dataclass(frozen=True)
class Adapter:
    """One adapter on one layer: everything about it but the values of A and B.

    Attributes:
        name: the adapter's name.
        settings: rank, alpha, dropout and scaling.
        A_name: the name of the parameter A, of shape (r, in).
        B_name: the name of the parameter B, of shape (out, r).
        pattern: the target pattern that chose the layer, for reports.
        path: the layer's path when it was adapted; with the seed it decides the starting values.
        seed: the seed of the call that made it.
    """

    name: str
    settings: Settings
    A_name: str
    B_name: str
    pattern: str
    path: str
    seed: int


@dataclass
class _State:
    kind: Kind
    adapters: dict[str, Adapter] = field(default_factory=dict)


class LoRALayer(nn.Module):
    """The class that every adapted layer is an instance of, besides its own.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2)
        >>> isinstance(model[0], LoRALayer), isinstance(model[0], nn.Linear)
        (True, True)
        >>> model[0].lora_A.shape, model[0].adapters["default"].settings.scaling
        (torch.Size([2, 4]), 1.0)
    """

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters on this layer by name, read-only."""
        return MappingProxyType(_state(self).adapters)

    @property
    def kind(self) -> Kind:
        """The kind of layer underneath."""
        return _state(self).kind

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own forward, plus what each adapter adds for its first argument."""
        state: _State = self.__dict__[_STATE]
        y: Tensor = super().forward(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        for adapter in state.adapters.values():
            dropout = adapter.settings.dropout if self.training else 0.0
            A, B = getattr(self, adapter.A_name), getattr(self, adapter.B_name)
            delta = state.kind.delta(self, x, A, B, adapter.settings, dropout)
            y = y + delta.to(y.dtype)
        return y

    def extra_repr(self) -> str:
        """The layer's own, then the adapters."""
        shown = [
            f"{name}(r={a.settings.r}, alpha={a.settings.alpha:g}, dropout={a.settings.dropout:g})"
            for name, a in self.adapters.items()
        ]
        return ", ".join(filter(None, [super().extra_repr(), "lora=" + "+".join(shown)]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class cannot be imported by name: rebuild it from the layer's own class.
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if args[:1] == (type(self),):
            make, args = _rebuild, (base_class(self), make, args[1:])
        return (make, args, *rest)


def _rebuild(base: type[nn.Module], make: Any, args: tuple[Any, ...]) -> nn.Module:
    layer: nn.Module = make(lora_class(base), *args)
    return layer


_classes: dict[type[nn.Module], type[LoRALayer]] = {}


def lora_class(base: type[nn.Module]) -> type[LoRALayer]:
    """The adapted subclass of a module class; the same one at every call."""
    if base not in _classes:
        name = f"LoRA{base.__name__}"
        body = {"__module__": __name__, "__qualname__": name, "__doc__": LoRALayer.__doc__}
        made = types.new_class(name, (LoRALayer, base), exec_body=lambda space: space.update(body))
        _classes[base] = made
    return _classes[base]


def base_class(layer: LoRALayer) -> type[nn.Module]:
    """The class the layer had before it was adapted."""
    swapped = next(c for c in type(layer).__mro__ if c.__bases__[:1] == (LoRALayer,))
    return cast("type[nn.Module]", swapped.__bases__[1])


def attach(module: nn.Module, kind: Kind, adapter: Adapter, A: Tensor, B: Tensor) -> LoRALayer:
    """Make the module an adapted layer with A and B as trainable parameters, or leave it alone."""
    base = type(module)
    try:
        module.__dict__[_STATE] = _State(kind, {adapter.name: adapter})
        module.__class__ = lora_class(base)
        module.register_parameter(adapter.A_name, nn.Parameter(A))
        module.register_parameter(adapter.B_name, nn.Parameter(B))
    except BaseException:
        _restore_class(module, base, [adapter])
        raise
    return cast(LoRALayer, module)


def detach(layer: LoRALayer) -> None:
    """Give the module back its class and take out everything that ``attach`` put in."""
    _restore_class(layer, base_class(layer), layer.adapters.values())


def _restore_class(module: nn.Module, base: type[nn.Module], adapters: Iterable[Adapter]) -> None:
    for adapter in list(adapters):
        for name in (adapter.A_name, adapter.B_name):
            module._parameters.pop(name, None)
    module.__dict__.pop(_STATE, None)
    module.__class__ = base


def is_intact(layer: nn.Module) -> bool:
    """Whether nothing has swapped the class again since (``fully_shard``, ``parametrize``)."""
    return isinstance(layer, LoRALayer) and type(layer) is lora_class(base_class(layer))


def _state(layer: LoRALayer) -> _State:
    state: _State = layer.__dict__[_STATE]
    return state
