"""What a class's methods read and call, from their compiled code, which tells before they run.

A module whose parent reads its weight without calling it would carry a silent adapter. torch's own
``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` do that, WavLM, Mamba and many others.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from lora_inject.kinds.bytecode import (
    WRITING,
    Read,
    function_of,
    may_read,
    names_in,
    weights_read,
    weights_written,
)

# How the names of methods begin that run when a model is made, changed or stored: what these read
# is no part of a forward pass, unless a forward comes to them by their names.
_OUTSIDE = ("init", "reset", "extra_repr", "repr", "tie", "setstate", "getstate", "fuse", "unfuse",
            "load", "save", "resize", "quantize", "convert", "from_", "post_init")  # fmt: skip


class _Method(NamedTuple):
    name: str
    mentions: frozenset[str]
    reads: frozenset[Read]
    writes: frozenset[Read]


def weights_read_below(cls: type[nn.Module]) -> frozenset[Read]:
    """What of the modules inside of it a class reads the weights of, by paths from itself."""
    if cls not in _known_below:
        above = [c for c in cls.__mro__ if c not in (nn.Module, object)]
        _known_below[cls] = frozenset(filter(None, _reads(above)))
    return _known_below[cls]


def weights_written_below(cls: type[nn.Module]) -> frozenset[Read]:
    """What of the modules inside of it a class writes to the weights of, while it runs."""
    above = [c for c in cls.__mro__ if c not in (nn.Module, object)]
    return frozenset(filter(None, (read for m in _running(above) for read in m.writes)))


def reads_own_weight(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a method between a class and the base reads ``self.weight``."""
    return any(not read for read in _reads(_classes_above(cls, base)))


def calls_super(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether every forward between a class and the base calls ``super().forward``."""
    own = [vars(c)["forward"] for c in _classes_above(cls, base) if "forward" in vars(c)]
    codes = [getattr(forward, "__code__", None) for forward in own]
    return all(c is not None and {"super", "forward"} <= set(c.co_names) for c in codes)


def _classes_above(cls: type[nn.Module], base: type[nn.Module]) -> tuple[type, ...]:
    order = cls.__mro__
    return order[: order.index(base)]


# Weak: what is known of a class keeps it no longer than others do.
_known: WeakKeyDictionary[type, list[_Method]] = WeakKeyDictionary()
_known_below: WeakKeyDictionary[type, frozenset[Read]] = WeakKeyDictionary()


def _reads(classes: Iterable[type]) -> set[Read]:
    """What the methods of these classes read in a forward pass."""
    return {read for method in _running(classes) for read in method.reads}


def _running(classes: Iterable[type]) -> list[_Method]:
    """Those of the methods of these classes that a forward pass may come to."""
    methods = [method for cls in classes for method in _methods(cls)]
    setup = [m for m in methods if m.reads and m.name.strip("_").startswith(_OUTSIDE)]
    reached = _reached(methods) if setup else set()
    return [m for m in methods if m not in setup or m.name in reached]


def _reached(methods: Sequence[_Method]) -> set[str]:
    """The names that a forward mentions, and those that the methods of these names do."""
    reached, former = {"forward"}, set[str]()
    while reached != former:
        former = set(reached)
        reached |= {name for m in methods if m.name in former for name in m.mentions}
    return reached


def _methods(cls: type) -> list[_Method]:
    """The methods and properties that a class itself defines."""
    if cls not in _known:
        methods = []  # known when whole: another thread may ask, or change the class
        for name, member in list(vars(cls).items()):
            function = function_of(member)
            if function is not None:
                mentions = names_in(function.__code__)
                may = may_read(function, cls, mentions)
                reads = weights_read(function, cls) if may else frozenset()
                writes = weights_written(function) if reads and mentions & WRITING else frozenset()
                methods.append(_Method(name, mentions, reads, writes))
        _known[cls] = methods
    return _known[cls]
