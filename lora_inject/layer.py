"""The class swap: a module becomes an adapted layer and back, and stays the same object.

``module.__class__`` becomes a subclass of its own class, so identity, parameters, hooks,
``isinstance`` and state-dict keys are what they were. A and B are parameters of the module itself;
what else is known of its adapters stands in one private attribute.
"""

import types
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_inject.kinds.base import Kind, Spec, Way
from lora_inject.settings import Settings

_STATE = "_lora_inject_adapters"
DEFAULT_ADAPTER = "default"


def parameter_names(spec: Spec, adapter: str) -> tuple[str, str]:
    """The names of A and B: loralib's for the default adapter, others add their own name."""
    suffix = "" if adapter == DEFAULT_ADAPTER else f"_{adapter}"
    return f"{spec.prefix}lora_A{suffix}", f"{spec.prefix}lora_B{suffix}"


@dataclass(frozen=True)
class Adapter:
    """One adapter on one layer: everything about it but the values of A and B.

    Attributes:
        name: the adapter's name.
        settings: rank, alpha, dropout and scaling.
        kind: the kind of layer, with its arithmetic.
        way: whether it acts on the layer's output ("branch") or on its weight.
        specs: the pairs A, B.
        pattern: the target pattern that chose the layer, for reports.
        path: the target's path when it was adapted; with the seed it decides the starting values.
        seed: the seed of the call that made it.
        pairs: each pair's spec with the names of its A and B.
    """

    name: str
    settings: Settings
    kind: Kind
    way: Way
    specs: tuple[Spec, ...]
    pattern: str
    path: str
    seed: int
    pairs: tuple[tuple[Spec, str, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        pairs = tuple((spec, *parameter_names(spec, self.name)) for spec in self.specs)
        object.__setattr__(self, "pairs", pairs)


class LoRALayer(nn.Module):
    """The class that every adapted layer is an instance of, besides its own.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2)
        >>> isinstance(model[0], LoRALayer), isinstance(model[0], nn.Linear)
        (True, True)
        >>> model[0].lora_A.shape, model[0].lora_adapters[0].settings.scaling
        (torch.Size([2, 4]), 1.0)
    """

    @property
    def lora_adapters(self) -> tuple[Adapter, ...]:
        """The adapters on this layer."""
        adapters: tuple[Adapter, ...] = self.__dict__[_STATE]
        return adapters

    def extra_repr(self) -> str:
        """The layer's own, then the adapters."""
        shown = []
        for a in self.lora_adapters:
            s, weights = a.settings, [spec.part or spec.weight for spec in a.specs]
            on = "" if weights == ["weight"] else f"{'+'.join(weights)}: "
            shown.append(f"{on}{a.name}(r={s.r}, alpha={s.alpha:g}, dropout={s.dropout:g})")
        return ", ".join(filter(None, [super().extra_repr(), "lora=" + " ".join(shown)]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class cannot be imported by name: rebuild it from the layer's own class.
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if args[:1] == (type(self),):
            make, args = _rebuild, (base_class(self), self.lora_adapters, make, args[1:])
        return (make, args, *rest)


def _rebuild(
    base: type[nn.Module], adapters: tuple[Adapter, ...], make: Any, args: tuple[Any, ...]
) -> nn.Module:
    layer: nn.Module = make(lora_class(base, adapters), *args)
    return layer


class BranchLayer(LoRALayer):
    """An adapted layer whose own forward runs, and whose adapters add to what it returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own forward, plus what each adapter adds for its first argument."""
        y: Tensor = super().forward(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        for adapter in self.lora_adapters:
            dropout = adapter.settings.dropout if self.training else 0.0
            scaling = adapter.settings.scaling
            for spec, A_name, B_name in adapter.pairs:
                A, B = getattr(self, A_name), getattr(self, B_name)
                delta = adapter.kind.delta(self, x, y, A, B, dropout).to(y.dtype)
                y = _add(y, delta, scaling, spec)
        return y


def _add(y: Tensor, delta: Tensor, scaling: float, spec: Spec) -> Tensor:
    """The sum; a delta may be for one part of y's last dimension."""
    if not spec.part:
        return torch.add(y, delta, alpha=scaling)
    sizes = [spec.start, spec.n_out, y.shape[-1] - spec.start - spec.n_out]
    before, part, after = torch.split(y, sizes, dim=-1)
    return torch.cat([before, torch.add(part, delta, alpha=scaling), after], dim=-1)


class WeightLayer(LoRALayer):
    """An adapted layer that reads effective weights where its weights were."""

    def _lora_effective(self, name: str) -> Any:
        """W + scaling * B A of the weight of this name, or the weight where nothing adapts it."""
        W = self._parameters[name]
        pairs = [
            (self._parameters[A_name], self._parameters[B_name], adapter.settings.scaling)
            for adapter in self.lora_adapters
            for spec, A_name, B_name in adapter.pairs
            if spec.weight == name
        ]
        if not pairs:
            return W
        kind = next(a.kind for a in self.lora_adapters for s in a.specs if s.weight == name)
        return kind.effective(self, W, pairs)  # type: ignore[arg-type]


_classes: dict[tuple[Any, ...], type[LoRALayer]] = {}


def lora_class(base: type[nn.Module], adapters: tuple[Adapter, ...]) -> type[LoRALayer]:
    """The subclass of a module class for such adapters; the same one at every call."""
    kind, way = adapters[0].kind, adapters[0].way
    weights = tuple(sorted({spec.weight for a in adapters for spec in a.specs}))
    key = (base, way, type(kind), weights if way == "weight" else ())
    if key not in _classes:
        members = kind.members(weights) if way == "weight" else {}
        name = f"LoRA{base.__name__}"
        body = {"__module__": __name__, "__qualname__": name, "_lora_base": base, **members}
        _classes[key] = types.new_class(
            name, _bases(base, kind, way), exec_body=lambda space: space.update(body)
        )
    return _classes[key]


def _bases(base: type[nn.Module], kind: Kind, way: Way) -> tuple[type, ...]:
    """The base classes in the order in which their forward methods call each other."""
    if way == "weight":
        return (WeightLayer, base)
    if kind.below is None or kind.below is base:
        return (BranchLayer, base)
    # base.forward calls super().forward, which finds the branch in front of kind.below.
    key = (kind.below, "below")
    if key not in _classes:
        _classes[key] = types.new_class("BranchBelow", (BranchLayer, kind.below))
    return (base, _classes[key])


def base_class(layer: LoRALayer) -> type[nn.Module]:
    """The class the layer had before it was adapted."""
    swapped = next(c for c in type(layer).__mro__ if "_lora_base" in vars(c))
    base: type[nn.Module] = swapped._lora_base  # type: ignore[attr-defined]
    return base


def attach(module: nn.Module, adapter: Adapter, values: list[tuple[Tensor, Tensor]]) -> LoRALayer:
    """Make the module an adapted layer, or adapt another of its weights; or leave it alone.

    Args:
        module: the layer.
        adapter: what to put on it.
        values: A and B of each of the adapter's pairs; they become trainable parameters.
    """
    former = type(module), module.__dict__.get(_STATE)
    base = base_class(module) if isinstance(module, LoRALayer) else type(module)
    adapters = (*(former[1] or ()), adapter)
    try:
        module.__dict__[_STATE] = adapters
        module.__class__ = lora_class(base, adapters)
        for (_, A_name, B_name), (A, B) in zip(adapter.pairs, values, strict=True):
            module.register_parameter(A_name, nn.Parameter(A))
            module.register_parameter(B_name, nn.Parameter(B))
    except BaseException:
        _take_out(module, adapter, *former)
        raise
    return cast(LoRALayer, module)


def detach(layer: LoRALayer, adapter: Adapter) -> None:
    """Take one adapter out; with the last one the module gets back its class."""
    base = base_class(layer)
    left = tuple(a for a in layer.lora_adapters if a is not adapter)
    _take_out(layer, adapter, lora_class(base, left) if left else base, left)


def _take_out(
    module: nn.Module,
    adapter: Adapter,
    former_class: type[nn.Module],
    former_adapters: tuple[Adapter, ...] | None,
) -> None:
    for _, A_name, B_name in adapter.pairs:
        module._parameters.pop(A_name, None)
        module._parameters.pop(B_name, None)
    module.__class__ = former_class
    if former_adapters:
        module.__dict__[_STATE] = former_adapters
    else:
        module.__dict__.pop(_STATE, None)


def is_intact(layer: nn.Module) -> bool:
    """Whether nothing has swapped the class again since (``fully_shard``, ``parametrize``)."""
    return "_lora_base" in vars(type(layer))
