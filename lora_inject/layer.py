"""The class swap: a module becomes an adapted layer and back, and stays the same object.

``module.__class__`` becomes a subclass of its own class, so identity, parameters, hooks,
``isinstance`` and state-dict keys are what they were. A and B are parameters of the module itself;
what else is known of it stands in one private attribute. A module on which nothing runs (disabled,
merged, no adapter in use) has its own class, and costs what it cost before.
"""

import inspect
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_inject.adapter import Adapter, LayerState, Scales, Term, state_of
from lora_inject.arithmetic.linear import Branch, adapted_linear, may_run_whole
from lora_inject.errors import LoRAInjectError
from lora_inject.kinds.base import STATE, Kind, Pair, Spec, Way, own_class
from lora_inject.placements import (
    is_distributed,
    is_fully_sharded,
    redistributed,
    shards,
)


class _Computed(threading.local):
    """The effective weights of the layers whose forward runs now, in each thread of its own."""

    def __init__(self) -> None:
        self.of: dict[nn.Module, dict[Any, Any]] = {}


_computed = _Computed()


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
        """The adapters on this layer, whether they are in use or not."""
        state: LayerState = self.__dict__[STATE]
        return state.adapters

    def extra_repr(self) -> str:
        """The layer's own, then the adapters."""
        state: LayerState = self.__dict__[STATE]
        shown = []
        for a in state.adapters:
            s, weights = a.settings, [spec.part or spec.weight for spec in a.specs]
            on = "" if weights == ["weight"] else f"{'+'.join(weights)}: "
            used = "" if a.name in state.in_use else ", not in use"
            shown.append(f"{on}{a.name}(r={s.r}, alpha={s.alpha:g}, dropout={s.dropout:g}{used})")
        return ", ".join(filter(None, [super().extra_repr(), "lora=" + " ".join(shown)]))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what ``parallelize_module`` calls: A and B take the placements of their weight."""
        if param is not None and is_distributed(param) and not _is_of_fsdp(self):
            param = _following(self, name, param)
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _hold_scales(self)  # on the device where the adapters are now
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class cannot be imported by name: rebuild it from the layer's own class.
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if args[:1] == (type(self),):
            base = self.__dict__[STATE].base
            make, args = _rebuild, (base, self.lora_adapters, make, args[1:])
        return (make, args, *rest)


def _is_of_fsdp(layer: nn.Module) -> bool:
    """Whether FSDP registers the layer's parameters, whose shards are all alike.

    It writes past ``register_parameter`` where a class has no ``__setattr__`` of its own, so that
    before its mark is there only those of other classes (``nn.LSTM``) come here.
    """
    return is_fully_sharded(layer) or type(layer).__setattr__ is not nn.Module.__setattr__


def _following(layer: LoRALayer, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """A sharded parameter that replaces one of the layer, placed as its adapters need it.

    Raises:
        LoRAInjectError: it is, or follows, a weight that cannot be sharded under its adapter.
    """
    for adapter in layer.lora_adapters:
        for spec, *pair in adapter.pairs:
            weight = layer._parameters.get(spec.weight)
            if name in (spec.weight, *pair):
                _require_follows(adapter)
            if name in pair and weight is not None and is_distributed(weight):
                both = adapter.kind.placements(weight, spec)
                return redistributed(parameter, both[pair.index(name)])
    return parameter


def _require_follows(adapter: Adapter) -> None:
    """Refuse to shard a weight that its adapter could not follow.

    Raises:
        LoRAInjectError: it acts in the weight, or is shared with a tied layer.
    """
    if adapter.way == "weight":
        raise LoRAInjectError(
            f"its adapter {adapter.name!r} acts in its weight, which cannot be sharded with it.",
            path=adapter.path,
            remedy="Leave the layer out of the plan of parallelize_module, or strip.",
        )
    if adapter.follows:
        raise LoRAInjectError(
            f"it is tied to {adapter.follows}, and parallelize_module would untie their adapter.",
            path=adapter.path,
            remedy="Call parallelize_module first and inject then.",
        )


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
        state: LayerState = self.__dict__[STATE]
        if state.rows is not None:
            return cast(Tensor, state.rows.add(self, x, y))
        # A compiler makes a constant of a number, and compiles again when it changes.
        compiles = torch.compiler.is_compiling()
        for term in state.running:
            scaling = state.scales[term.adapter][1] if compiles else term.scaling
            dropout = term.dropout if self.training else 0.0
            A, B = oriented(term.spec, getattr(self, term.A), getattr(self, term.B))
            h = term.kind.down(self, x, y, A, dropout)
            y = add(y, term.kind.up(self, x, h, B), scaling, term.spec)
        return y


class WholeLayer(BranchLayer):
    """A branch layer whose own forward is ``W x + b``, which it computes with the adapters at once.

    Only where that is known to be the same (``may_run_whole``).
    """

    _lora_transposed: ClassVar[bool]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``W x + b``, plus what each adapter adds."""
        x: Tensor = args[0] if args else kwargs[self._lora_input]
        state: LayerState = self.__dict__[STATE]
        own: Any = self._parameters  # a weight that is not here is computed when it is read
        if state.running and "bias" in own:
            W, training = own.get("weight"), self.training
            branches = _branches(own, state.running, training)
            if may_run_whole(x, W, branches):
                W = W.t() if self._lora_transposed else W
                return adapted_linear(x, W, own["bias"], branches)
        return super().forward(*args, **kwargs)


def _branches(own: Any, terms: Sequence[Term], training: bool) -> list[Branch]:
    found = []
    for _, spec, A_name, B_name, scaling, dropout, _, part in terms:
        A, B = own.get(A_name), own.get(B_name)
        if spec.swapped and A is not None and B is not None:
            A, B = oriented(spec, A, B)
        found.append((A, B, scaling, dropout if training else 0.0, part))
    return found


def oriented(spec: Spec, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as the layer's kind wants them: those of a tied layer may stand the other way."""
    return (B.transpose(-2, -1), A.transpose(-2, -1)) if spec.swapped else (A, B)


def add(y: Tensor, delta: Tensor, scaling: float | Tensor, spec: Spec) -> Tensor:
    """``y + scaling * delta`` in y's dtype; a delta may be for one part of y's last dimension."""
    delta = delta.to(y.dtype)
    if isinstance(scaling, Tensor):
        delta, scaling = delta * scaling, 1.0
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
        former = _computed.of.get(self)
        _computed.of[self] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            if former is None:
                del _computed.of[self]
            else:
                _computed.of[self] = former

    def _lora_effective(self, name: str) -> Any:
        """W + scaling * B A of the weight of this name, or the weight where nothing adapts it."""
        computed = None if torch.compiler.is_compiling() else _computed.of.get(self)
        key = (name, torch.is_grad_enabled())
        if computed is not None and key in computed:
            return computed[key]
        state: LayerState = self.__dict__[STATE]
        scales = state.scales if torch.compiler.is_compiling() else None
        kind, pairs = pairs_of(self, state.running, name, scales)
        W = self._parameters[name]
        own = [W, *(factor for _, *pair, _ in pairs for factor in pair)]
        if any(t is not None and is_distributed(t) for t in own) and _is_of_fsdp(self):
            return W  # FSDP looks for its shards; what a forward reads is gathered
        value = kind.effective(self, W, pairs) if kind and W is not None else W
        if computed is not None:
            computed[key] = value
        return value


def pairs_of(
    module: nn.Module, terms: Sequence[Term], weight: str, scales: Scales | None = None
) -> tuple[Kind | None, list[Pair]]:
    """The kind and the pairs with which these terms adapt the module's weight of this name.

    With the layer's scales, which a compiler takes for inputs, B has its scaling already.
    """
    kind: Kind | None = None
    pairs: list[Pair] = []
    for term in terms:
        if term.spec.weight == weight:
            kind = term.kind
            own = module.get_parameter(term.A), module.get_parameter(term.B)
            A, B = oriented(term.spec, *own)
            scaling = term.scaling
            if scales is not None:
                B, scaling = B * scales[term.adapter][1], 1.0
            pairs.append((term.spec, A, B, scaling))
    return kind, pairs


_TOUCHED = "_lora_inject_touched"
# The classes that were made of a class stand on it, so that none outlives it: a notebook's cell
# that is run again makes new classes, and what their methods refer to is to go with the old ones.
_MADE = "_lora_inject_classes"
_making = threading.RLock()  # two threads must not get two classes for one


def lora_class(base: type[nn.Module], adapters: tuple[Adapter, ...]) -> type[LoRALayer]:
    """The subclass of a module class for such adapters; the same one at every call."""
    kind, way = adapters[0].kind, adapters[0].way
    key: Any = type(kind)
    if way == "weight":
        key = frozenset((type(a.kind), s.weight) for a in adapters for s in a.specs)
    found: type[LoRALayer] | None = vars(base).get(_MADE, {}).get(key)
    return _make(base, key, adapters) if found is None else found


def _make(base: type[nn.Module], key: Any, adapters: tuple[Adapter, ...]) -> type[LoRALayer]:
    """Make the class that the key stands for, unless another thread just has."""
    kind, way = adapters[0].kind, adapters[0].way
    name = f"LoRA{base.__name__}"
    body: dict[str, Any] = {"__module__": __name__, "__qualname__": name}
    for adapter in adapters if way == "weight" else ():
        body |= adapter.kind.members(tuple(spec.weight for spec in adapter.specs))
    body["_lora_transposed"] = kind.transposes
    body["_lora_input"] = _first_argument(base if kind.below is None else kind.below)
    made: type[LoRALayer] = _made_on(base, key, name, lambda: _bases(base, kind, way), body)
    return made


def _made_on(
    base: type[nn.Module],
    key: Any,
    name: str,
    bases: Callable[[], tuple[type, ...]],
    body: dict[str, Any],
) -> Any:
    """The class that stands on another one under a key; it is made where there is none."""
    with _making:
        if _MADE not in vars(base):
            type.__setattr__(base, _MADE, {})  # whatever its own class says of attributes
        made = vars(base)[_MADE]
        if key not in made:
            made[key] = types.new_class(name, bases(), exec_body=lambda space: space.update(body))
        return made[key]


def _first_argument(base: type[nn.Module]) -> str:
    """The name of the first argument of forward, which the adapter reads too."""
    return next(iter(list(inspect.signature(base.forward).parameters)[1:]), "input")


def _bases(base: type[nn.Module], kind: Kind, way: Way) -> tuple[type, ...]:
    """The base classes in the order in which their forward methods call each other."""
    if way == "weight":
        return (WeightLayer, base)
    if kind.below is None or kind.below is base:
        return (WholeLayer if kind.is_product(base) else BranchLayer, base)
    # base.forward calls super().forward, which finds the branch in front of kind.below.
    below = kind.below
    return (base, _made_on(below, "below", "BranchBelow", lambda: (BranchLayer, below), {}))


def attach(module: nn.Module, adapter: Adapter, values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put an adapter on a module, not in use yet; or leave the module alone.

    Args:
        module: the layer.
        adapter: what to put on it.
        values: A and B of each of the adapter's pairs; they become trainable parameters, unless
            they are parameters already, those of a tied layer. Beside a sharded weight they are
            placed as it is, with the first rank's values, whatever seed the others drew.
    """
    state = module.__dict__.setdefault(STATE, LayerState(own_class(module)))
    try:
        for (spec, *names), pair in zip(adapter.pairs, values, strict=True):
            weight = adapter.kind.weight(module, spec.weight)
            if is_distributed(weight) and not isinstance(pair[0], nn.Parameter):
                places = adapter.kind.placements(weight, spec)
                pair = shards(pair[0], weight, places[0], 0), shards(pair[1], weight, places[1], 0)
            for name, value in zip(names, pair, strict=True):
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
                module.register_parameter(name, parameter)
        change(module, adapters=(*state.adapters, adapter))
    except BaseException:
        detach(module, adapter)
        raise


def detach(module: nn.Module, adapter: Adapter) -> None:
    """Take one adapter out; with the last one the module gets back its class."""
    state = state_of(module)
    assert state is not None
    for name in adapter.parameters:
        module._parameters.pop(name, None)
    state.scales.pop(adapter.name, None)
    change(module, adapters=tuple(a for a in state.adapters if a is not adapter))
    if not state.adapters:
        del module.__dict__[STATE]


def change(module: nn.Module, **fields: Any) -> None:
    """Change what is known of an adapted module, and give it the class that follows from it."""
    state: LayerState = module.__dict__[STATE]
    state.__dict__.update(fields)
    state.update_running()
    _hold_scales(module)
    wanted = _class_for(state)
    placed = type(module)
    # A class that was put on top of ours (fully_shard) stays; ours below it adds what runs.
    if placed is not wanted and (placed is state.base or _is_made(placed)):
        _bind_anew(module, wanted)
        module.__class__ = wanted
        # torch.compile may take a module for unchanged while nothing was written to its __dict__.
        module.__dict__[_TOUCHED] = None
        del module.__dict__[_TOUCHED]


def _hold_scales(module: nn.Module) -> None:
    """Keep the scaling of what runs as tensors too, on the device of the adapters.

    A tensor for each layer of its own: a compiler notices when two inputs become one object.
    """
    state: LayerState = module.__dict__[STATE]
    for term in state.running:
        A, held = module._parameters.get(term.A), state.scales.get(term.adapter)
        device = torch.device("cpu") if A is None else A.device
        if held is None or held[0] != term.scaling or held[1].device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            with torch.inference_mode(False):
                scale = torch.tensor(term.scaling, dtype=dtype, device=device)
            state.scales[term.adapter] = term.scaling, scale


def _bind_anew(module: nn.Module, wanted: type[nn.Module]) -> None:
    """Let accelerate's hooks, which keep the class's forward on the instance, call the new one."""
    for name in ("_old_forward", "forward"):
        kept = module.__dict__.get(name)
        if getattr(kept, "__func__", None) is type(module).forward:
            module.__dict__[name] = types.MethodType(wanted.forward, module)


def _is_made(cls: type[nn.Module]) -> bool:
    """Whether ``lora_class`` has made this very class, and not one that was derived from it."""
    return "_lora_input" in vars(cls)


def is_intact(module: nn.Module) -> bool:
    """Whether nothing has swapped the class again since (``fully_shard``, ``parametrize``)."""
    state = state_of(module)
    return state is not None and type(module) is _class_for(state)


def _class_for(state: LayerState) -> type[nn.Module]:
    runs = state.running or (state.rows and not state.disabled)
    return lora_class(state.base, state.adapters) if runs else state.base
