"""The class swap: a module becomes an adapted layer and back, and stays the same object.

``module.__class__`` becomes a subclass of its own class, so identity, parameters, hooks,
``isinstance`` and state-dict keys are what they were. A and B are parameters of the module itself;
what else is known of it stands in one private attribute. A module whose adapters are asleep
(disabled or merged) has its own class, and costs what it cost before.
"""

import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_inject.errors import LoRAInjectError
from lora_inject.kinds.base import Kind, Pair, Spec, Way
from lora_inject.settings import Settings

_STATE = "_lora_inject_adapters"
_COMPUTED = "_lora_inject_computed"
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
        follows: the path of the tied target whose A and B it shares, or "".
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
    follows: str = ""
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
        state: _State = self.__dict__[_STATE]
        return state.adapters

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
            base = self.__dict__[_STATE].base
            make, args = _rebuild, (base, self.lora_adapters, make, args[1:])
        return (make, args, *rest)


def _rebuild(
    base: type[nn.Module], adapters: tuple[Adapter, ...], make: Any, args: tuple[Any, ...]
) -> nn.Module:
    layer: nn.Module = make(lora_class(base, adapters), *args)
    return layer


class BranchLayer(LoRALayer):
    """An adapted layer whose own forward runs, and whose adapters add to what it returns."""

    _lora_input: ClassVar[str]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own forward, plus what each adapter adds for its first argument."""
        y: Tensor = super().forward(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise LoRAInjectError(
                f"its forward returned a {type(y).__name__}, to which nothing can be added.",
                path=self.lora_adapters[0].path,
                remedy='strip, and inject with how="weight".',
            )
        x: Tensor = args[0] if args else kwargs[self._lora_input]
        for adapter in self.lora_adapters:
            dropout = adapter.settings.dropout if self.training else 0.0
            scaling = adapter.settings.scaling
            for spec, A_name, B_name in adapter.pairs:
                A, B = _oriented(spec, getattr(self, A_name), getattr(self, B_name))
                delta = adapter.kind.delta(self, x, y, A, B, dropout).to(y.dtype)
                y = _add(y, delta, scaling, spec)
        return y


def _oriented(spec: Spec, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as the layer's kind wants them: those of a tied layer may stand the other way."""
    return (B.transpose(-2, -1), A.transpose(-2, -1)) if spec.swapped else (A, B)


def _add(y: Tensor, delta: Tensor, scaling: float, spec: Spec) -> Tensor:
    """The sum; a delta may be for one part of y's last dimension."""
    if not spec.part:
        return torch.add(y, delta, alpha=scaling)
    sizes = [spec.start, spec.n_out, y.shape[-1] - spec.start - spec.n_out]
    before, part, after = torch.split(y, sizes, dim=-1)
    return torch.cat([before, torch.add(part, delta, alpha=scaling), after], dim=-1)


class WeightLayer(LoRALayer):
    """An adapted layer that reads effective weights where its weights were.

    A weight is computed when it is read, and once for each forward pass of the layer itself, which
    may read it several times.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        if torch.compiler.is_compiling():  # the compiler computes equal things once by itself
            return super().forward(*args, **kwargs)
        former = self.__dict__.get(_COMPUTED)
        self.__dict__[_COMPUTED] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            if former is None:
                self.__dict__.pop(_COMPUTED, None)
            else:
                self.__dict__[_COMPUTED] = former

    def _lora_effective(self, name: str) -> Any:
        """W + scaling * B A of the weight of this name, or the weight where nothing adapts it."""
        computed = self.__dict__.get(_COMPUTED)
        key = (name, torch.is_grad_enabled())
        if computed is not None and key in computed:
            return computed[key]
        kind, pairs = pairs_of(self, name)
        W = self._parameters[name]
        value = kind.effective(self, W, pairs) if kind and W is not None else W
        if computed is not None:
            computed[key] = value
        return value


def pairs_of(module: nn.Module, weight: str) -> tuple[Kind | None, list[Pair]]:
    """The kind and the pairs that adapt the module's weight of this name."""
    kind: Kind | None = None
    pairs: list[Pair] = []
    for adapter in adapters_of(module):
        for spec, A_name, B_name in adapter.pairs:
            if spec.weight == weight:
                kind = adapter.kind
                own = module.get_parameter(A_name), module.get_parameter(B_name)
                A, B = _oriented(spec, *own)
                pairs.append((spec, A, B, adapter.settings.scaling))
    return kind, pairs


_classes: dict[tuple[Any, ...], type[LoRALayer]] = {}


def lora_class(base: type[nn.Module], adapters: tuple[Adapter, ...]) -> type[LoRALayer]:
    """The subclass of a module class for such adapters; the same one at every call."""
    kind, way = adapters[0].kind, adapters[0].way
    weights = tuple(sorted({spec.weight for a in adapters for spec in a.specs}))
    key = (base, way, type(kind), weights if way == "weight" else ())
    if key not in _classes:
        members = kind.members(weights) if way == "weight" else {}
        name = f"LoRA{base.__name__}"
        body = {"__module__": __name__, "__qualname__": name, **members}
        body["_lora_input"] = _first_argument(base if kind.below is None else kind.below)
        _classes[key] = types.new_class(
            name, _bases(base, kind, way), exec_body=lambda space: space.update(body)
        )
    return _classes[key]


def _first_argument(base: type[nn.Module]) -> str:
    """The name of the first argument of forward, which the adapter reads too."""
    return next(iter(list(inspect.signature(base.forward).parameters)[1:]), "input")


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


@dataclass
class _State:
    """What is known of an adapted module.

    Attributes:
        base: the class it had before.
        adapters: its adapters.
        asleep: whether the module has its own class now, so that nothing is added.
        merged: the former value of each weight that the adapters are folded into, or None where it
            was not kept.
    """

    base: type[nn.Module]
    adapters: tuple[Adapter, ...]
    asleep: bool = False
    merged: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def module_class(self) -> type[nn.Module]:
        """The class the module should have."""
        return self.base if self.asleep else lora_class(self.base, self.adapters)


def _state(module: nn.Module) -> _State | None:
    state: _State | None = module.__dict__.get(_STATE)
    return state


def adapters_of(module: nn.Module) -> tuple[Adapter, ...]:
    """The adapters on a module, awake or not; none on a module that was never adapted."""
    state = _state(module)
    return state.adapters if state else ()


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was adapted."""
    state = _state(module)
    return state.base if state else type(module)


def attach(module: nn.Module, adapter: Adapter, values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Make the module an adapted layer, or adapt another of its weights; or leave it alone.

    Args:
        module: the layer.
        adapter: what to put on it.
        values: A and B of each of the adapter's pairs; they become trainable parameters, unless
            they are parameters already, those of a tied layer.
    """
    former, base = _state(module), base_class(module)
    state = _State(base, (*adapters_of(module), adapter))
    try:
        _set_state(module, state)
        for (_, A_name, B_name), (A, B) in zip(adapter.pairs, values, strict=True):
            for name, value in ((A_name, A), (B_name, B)):
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
                module.register_parameter(name, parameter)
    except BaseException:
        _remove_pairs(module, adapter)
        _set_state(module, former or _State(base, ()))
        raise


def detach(module: nn.Module, adapter: Adapter) -> None:
    """Take one adapter out; with the last one the module gets back its class."""
    state = _state(module)
    assert state is not None
    _remove_pairs(module, adapter)
    left = tuple(a for a in state.adapters if a is not adapter)
    _set_state(module, replace(state, adapters=left))


def put_to_sleep(module: nn.Module, asleep: bool) -> None:
    """Give the module its own class back for a while, or end that."""
    state = _state(module)
    assert state is not None
    _set_state(module, replace(state, asleep=asleep))


def is_asleep(module: nn.Module) -> bool:
    """Whether the module's adapters do nothing for the moment."""
    state = _state(module)
    return state is not None and state.asleep


def merged_weights(module: nn.Module) -> dict[str, Tensor | None]:
    """The former values of the weights that the adapters are folded into; changed in place."""
    state = _state(module)
    assert state is not None
    return state.merged


def is_intact(module: nn.Module) -> bool:
    """Whether nothing has swapped the class again since (``fully_shard``, ``parametrize``)."""
    state = _state(module)
    return state is not None and type(module) is state.module_class


def _set_state(module: nn.Module, state: _State) -> None:
    if state.adapters:
        module.__dict__[_STATE] = state
        module.__class__ = state.module_class
    else:
        module.__dict__.pop(_STATE, None)
        module.__class__ = state.base


def _remove_pairs(module: nn.Module, adapter: Adapter) -> None:
    for _, A_name, B_name in adapter.pairs:
        module._parameters.pop(A_name, None)
        module._parameters.pop(B_name, None)
