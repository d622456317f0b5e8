"""Reads of a weight from outside of its layer's own forward, noticed when they happen.

An adapter beside a forward does nothing to what others compute with the weight. Where a class says
in its code that it reads one, the adapter acts in the weight from the start (``weight_reads.py``);
a fused loss that is given ``lm_head.weight``, or a loop over ``self.modules()``, says nothing.
"""

import sys
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.compiler import is_compiling

from lora_inject.compat.torch_private import is_call_of_module
from lora_inject.core.state import State
from lora_inject.errors import is_ours, warn
from lora_inject.kinds.bytecode import function_of
from lora_inject.kinds.reading import Reading, reading_at
from lora_inject.own import STATE

# By the code that reads: where in it, and by the calls that put adapters there.
_told: WeakKeyDictionary[CodeType, set[Any]] = WeakKeyDictionary()


def noticing_property(name: str, base: type[nn.Module], ours: Iterable[type]) -> property:
    """The property by which a layer with adapters beside its forward shows a weight: the weight.

    It costs the layer's own forward less than ``nn.Module.__getattr__`` does.

    Args:
        name: of the weight.
        base: the layer's own class.
        ours: the classes whose forward runs the layer's own.
    """
    members = [vars(cls).get("forward") for cls in base.__mro__]
    own = [function.__code__ for member in members if (function := function_of(member))]
    runs = [vars(cls)["forward"].__code__ for cls in ours if "forward" in vars(cls)]

    def read(layer: Any) -> Any:
        values = layer._parameters
        if name not in values:
            values = layer.__dict__  # what pruning, FSDP1 and replicas have put there
            if name not in values:
                raise AttributeError(name)
        if not is_compiling():
            reader = sys._getframe(1)
            for code in own:  # not a set, as hashing code takes longer than all of this
                if reader.f_code is code:
                    break
            else:
                _notice(layer, name, reader, runs)
        return values[name]

    def write(layer: Any, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: Any) -> None:
        del layer.__dict__[name]

    return property(read, write, delete)


def _notice(layer: nn.Module, name: str, reader: FrameType, runs: list[CodeType]) -> None:
    """Warn, once for a place in code, where something is computed with what it reads."""
    reading = reading_at(reader, name)
    if reading is Reading.NOTHING or is_ours(reader):
        return
    state: State = layer.__dict__[STATE]
    key = (reader.f_lasti, *(call.id for call in state.reach.injections))
    told = _told.setdefault(reader.f_code, set())
    if key in told or not _computes(layer, reading, reader, runs, state):
        return
    told.add(key)
    code, module = reader.f_code, reader.f_globals.get("__name__")
    where = f"{getattr(code, 'co_qualname', code.co_name)} of {module}, line {reader.f_lineno}"
    warn(
        f"{state.adapters[0].path}: its {name} is read outside of its forward, by {where}, and its "
        "adapter acts beside that forward: what is computed there lacks it. Strip, and inject the "
        'layer with how="weight", or exclude it.'
    )


def _computes(
    layer: nn.Module, reading: Reading, reader: FrameType, runs: list[CodeType], state: State
) -> bool:
    """Whether it is read to compute with, and not in a call of the layer itself.

    That is known in the forward of another module. Elsewhere people look at weights too, and only
    what is given to a function of somebody's in a step of training is taken for it: a fused loss.
    """
    frame: FrameType | None = reader
    while frame is not None:
        if frame.f_code in runs and frame.f_locals.get("self") is layer:
            return False
        if is_call_of_module(frame):
            return frame.f_locals.get("self") is not layer
        frame = frame.f_back
    trains = torch.is_grad_enabled() and layer.training and bool(state.use.trains)
    return trains and reading is Reading.HANDED_ON
