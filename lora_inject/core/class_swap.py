"""The class swap: a module becomes an adapted layer and back, and stays the same object.

``module.__class__`` becomes a subclass of its own class, so identity, parameters, hooks,
``isinstance`` and state-dict keys are what they were. A module on which nothing runs (disabled,
merged, no adapter in use) has its own class, and costs what it cost before.
"""

import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_inject.changes.edits import Edit, attribute_edit, put_class
from lora_inject.compat.marks import kept_forwards
from lora_inject.core.adapter import Adapter
from lora_inject.core.layer import BranchLayer, LoRALayer, WeightLayer, WholeLayer
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
    body: dict[str, Any] = {"__module__": __name__, "__qualname__": name}
    for adapter in adapters if way == "weight" else ():
        body |= adapter.kind.members(tuple(spec.weight for spec in adapter.specs))
    body["_lora_rebuild"] = staticmethod(_rebuild)
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


def is_intact(module: nn.Module) -> bool:
    """Whether nothing has swapped the class again since (``fully_shard``, ``parametrize``)."""
    state = state_of(module)
    return state is not None and type(module) is class_for(state)


def _is_made(cls: type[nn.Module]) -> bool:
    """Whether ``lora_class`` has made this very class, and not one that was derived from it."""
    return "_lora_input" in vars(cls)
