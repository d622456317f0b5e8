"""Which buffers a module's forward moves: by their names, and by what its code writes to.

Exponential averages, codebooks of vector quantisation, observers: what a state dict holds of a
module whose forward writes to its buffers. In doubt it is held, which costs copies of it in
training. What is in no state dict is no state of the model (rotary caches, masks).
"""

import dis
import inspect
import weakref
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from lora_inject.own import own_class

# Known by name, as what moves them may be no Python code; the last two are spectral_norm's
# estimates of singular vectors.
_PREFIXES = ("running_", "moving_")
_NAMES = ("num_batches_tracked", "_u", "_v")

_written: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def is_statistic(name: str) -> bool:
    """Whether a buffer of this name is one that moves."""
    return name.startswith(_PREFIXES) or name in _NAMES


def moving_buffers(module: nn.Module) -> tuple[str, ...]:
    """The names of the buffers that the module's forward moves in training mode."""
    buffers = module._buffers
    if not len(buffers):
        return ()
    there = [name for name, buffer in buffers.items() if buffer is not None]
    moving = {name for name in there if is_statistic(name)}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):  # the one from before parametrizations
            moving |= {f"{hook.name}_u", f"{hook.name}_v"} & {*there}
    kept = {name for name in there if name not in module._non_persistent_buffers_set}
    if kept - moving and kept & _written_by(own_class(module)):
        moving |= kept  # one is written to, and the others may be by a function
    return tuple(name for name in there if name in moving)


def _written_by(cls: type[nn.Module]) -> frozenset[str]:
    """The names of attributes to which the forward of a class may write, in place or anew."""
    if cls not in _written:
        _written[cls] = frozenset(_writes(cls))
    return _written[cls]


def _writes(cls: type[nn.Module]) -> Iterator[str]:
    seen, todo = set[str](), ["forward"]
    while todo:
        name = todo.pop()
        member = inspect.getattr_static(cls, name, None)
        if name in seen or member is None or (hasattr(nn.Module, name) and name != "forward"):
            continue
        seen.add(name)
        function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
        if isinstance(function, FunctionType):
            for code in _with_inner(function.__code__):
                yield from _written_in(code)
                todo += code.co_names


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _written_in(code: CodeType) -> Iterator[str]:
    """``self.n = ...``, ``self.n.copy_(...)``, ``self.n.data``, ``self.n[i] = ...``."""
    attribute = ""  # the last one that was read
    follows = False  # whether nothing came after it
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR":
            yield step.argval
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name = step.argval
            if follows and (name == "data" or (name.endswith("_") and not name.startswith("_"))):
                yield attribute
            attribute, follows = name, True
        elif step.opname == "STORE_SUBSCR":
            yield attribute
        elif step.opname not in ("CACHE", "EXTENDED_ARG"):
            follows = False
