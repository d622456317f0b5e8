"""The class swap: a module becomes an adapted layer and back, and stays the same object.

``module.__class__`` becomes a subclass of its own class, so identity, parameters, hooks,
``isinstance`` and state-dict keys are what they were. A module on which nothing runs (disabled,
merged, no adapter in use) has its own class, and costs what it cost before.
"""

import inspect
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_inject.changes.edits import Edit, attribute_edit, put_class
from lora_inject.compat.marks import forward_below, kept_forwards
from lora_inject.core.adapter import Adapter
from lora_inject.core.layer import BranchLayer, LoRALayer, WeightLayer, WholeLayer
from lora_inject.core.outside import noticing_property
from lora_inject.core.state import State, state_of
from lora_inject.kinds.base import Kind, Way

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
    # Of its module, since torch.fx takes layers for leaves by that.
    body: dict[str, Any] = {"__module__": base.__module__, "__qualname__": name}
    for adapter in adapters if way == "weight" else ():
        body |= adapter.kind.members(tuple(spec.weight for spec in adapter.specs))
    for weight in {spec.weight for spec in adapters[0].specs} if way == "branch" else ():
        if inspect.getattr_static(base, weight, None) is None:  # and not parametrized, say
            body[weight] = noticing_property(weight, base, (BranchLayer, WholeLayer))
    body["_lora_rebuild"], body["_lora_base"] = staticmethod(_rebuild), base
    body["_lora_transposed"] = kind.transposes
    at = kind.branches_at(base) or base
    body["_lora_input"], body["_lora_product"] = place_of_input(at), (at, at.forward)
    made: type[LoRALayer] = _made_on(base, key, lambda: _derived(base, name, body, kind, way))
    return made


def _made_on(base: type[nn.Module], key: Any, make: Callable[[], type]) -> Any:
    """The class that stands on another one under a key; it is made where there is none."""
    with _making:
        if _MADE not in vars(base):
            type.__setattr__(base, _MADE, {})  # whatever its own class says of attributes
        made = vars(base)[_MADE]
        if key not in made:
            made[key] = make()
        return made[key]


def place_of_input(base: type[nn.Module]) -> tuple[int, str]:
    """Where the input stands among the arguments of forward, which the adapter reads too.

    That is the first one, where none has the name that torch or transformers give to it.
    """
    names = list(inspect.signature(base.forward).parameters)[1:] or ["input"]
    known = (name for name in ("input", "x", "hidden_states") if name in names)
    name = next(known, names[0])
    return names.index(name), name


def _derived(base: type[nn.Module], name: str, body: dict[str, Any], kind: Kind, way: Way) -> type:
    """A class of ours and of a module's own, in the order in which their forwards call each other.

    It can take the place of the module's own: Python allows that where both have their layout from
    one class, and a class has its layout from the first of its bases.
    """
    below = kind.branches_at(base) if way == "branch" else None
    below = None if below is base else below
    layer: type = WeightLayer
    if way == "branch":
        layer = WholeLayer if kind.is_product(below or base) else BranchLayer
    if not _has_usual_layout(base) or (below is not None and _is_told_of_subclasses(base)):
        at = 0 if below is None else base.__mro__.index(below)
        ours = layer.__mro__[: layer.__mro__.index(nn.Module)]
        return _ordered(base, name, body, (*base.__mro__[:at], *ours, *base.__mro__[at:]))
    bases: tuple[type, ...] = (layer, base)
    if below is not None:
        # base.forward calls super().forward, which finds the branch in front of the class below it.
        bases = (base, _made_on(below, "below", lambda: _new("BranchBelow", (layer, below), {})))
    return _new(name, bases, body)


def _new(name: str, bases: tuple[type, ...], body: dict[str, Any], **options: Any) -> type:
    return types.new_class(name, bases, options, lambda space: space.update(body))


def _has_usual_layout(base: Any) -> bool:
    """Whether a class has its layout from ``nn.Module``, and not from an ABC that stands first."""
    while base not in (nn.Module, object):
        base = base.__base__
    return base is nn.Module


def _is_told_of_subclasses(base: type) -> bool:
    return any("__init_subclass__" in vars(cls) for cls in base.__mro__ if cls is not object)


class _Quiet:
    """Keeps from a class that one of ours is derived from it: it may ask for arguments then."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        pass


def _ordered(
    base: type[nn.Module], name: str, body: dict[str, Any], order: tuple[type, ...]
) -> type:
    """A class with the layout of a module's class, whose methods are looked for in this order."""
    mro = {"mro": lambda cls: [cls, _Quiet, *order]}
    return _new(name, (base, LoRALayer), body, metaclass=_new("Ordered", (type(base),), mro))


_refusals: weakref.WeakKeyDictionary[type, str | None] = weakref.WeakKeyDictionary()


def class_refusal(base: type[nn.Module]) -> str | None:
    """Why no class can be derived from a module's class, with the remedy; else None."""
    if type(base) is type:
        return None
    if base not in _refusals:
        try:
            if _has_usual_layout(base):
                _new("Tried", (LoRALayer, base), {})
            else:
                _ordered(base, "Tried", {}, (LoRALayer, *base.__mro__))
            _refusals[base] = None
        except Exception as error:
            reason = f"no class can be derived from {base.__name__} ({error}). Exclude it."
            _refusals[base] = reason
    return _refusals[base]


def _rebuild(
    base: type[nn.Module], adapters: tuple[Adapter, ...], make: Any, args: tuple[Any, ...]
) -> nn.Module:
    """An adapted layer out of a copy or a pickle."""
    layer: nn.Module = make(lora_class(base, adapters), *args)
    return layer


def add_class_edits(
    edits: list[Edit], module: nn.Module, base: type[nn.Module], state: State | None
) -> None:
    """Append what gives a module the class that follows from its state.

    A class that was put on top of ours (``fully_shard``) stays; ours below it adds what runs.
    """
    wanted = base if state is None else class_for(state)
    placed = type(module)
    if placed is wanted or not (placed is base or _is_made(placed)):
        return
    if "forward" in module.__dict__:
        for name in kept_forwards(module):  # let them call the new one
            forward = types.MethodType(wanted.forward, module)
            edits.append(attribute_edit(module, name, forward))
    edits.append((put_class, module, None, placed, wanted))


def class_for(state: State) -> type[nn.Module]:
    """The class of a module with this state, where nothing else has put one on top."""
    if state.running or state.rows:
        return lora_class(state.before.cls, state.adapters)
    return state.before.cls


def does_as_its_class(module: nn.Module, state: State) -> bool:
    """Whether a forward that was set on the instance does what its class does, whichever it is.

    Methods that a tool has kept of our classes ask for the class when they are called.
    """
    return forward_below(module) is lora_class(state.before.cls, state.adapters).forward


def is_unparametrized(module: nn.Module, state: State) -> bool:
    """Whether what was a parametrized layer is none any more, since its norm was removed."""
    before = state.before.cls
    known = before.__name__ == f"Parametrized{type(module).__name__}"
    return known and before.__bases__ == (type(module),) and not is_parametrized(module)


def is_intact(module: nn.Module) -> bool:
    """Whether nothing has swapped the class again since (``fully_shard``, ``parametrize``)."""
    state = state_of(module)
    return state is not None and type(module) is class_for(state)


def _is_made(cls: type[nn.Module]) -> bool:
    """Whether ``lora_class`` has made this very class, and not one that was derived from it."""
    return "_lora_input" in vars(cls)
