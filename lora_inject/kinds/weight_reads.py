"""What a class's methods read and call, from their compiled code, which tells before they run.

A module whose parent reads its weight without calling it would carry a silent adapter. torch's own
``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` do that, WavLM, Mamba and many others.
"""

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from weakref import WeakKeyDictionary

from torch import nn

from lora_inject.own import own_class

# What tells something about a weight without using its values.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta",
          "is_cuda", "is_quantized", "element_size", "_is_hf_initialized"}  # fmt: skip
# Methods that run outside of the forward pass.
_OUTSIDE = ("__init__", "reset_parameters", "_reset_parameters", "init_weights", "_init_weights",
            "extra_repr", "__repr__", "tie_weights", "_tie_weights", "__setstate__")  # fmt: skip


def weights_read_below(module: nn.Module) -> frozenset[str]:
    """The paths of the weights of modules inside of this one that its own methods read."""
    cls = own_class(module)
    if cls not in _known_below:
        read = [_reads(above) for above in _classes_above(cls, nn.Module)]
        _known_below[cls] = frozenset(path for paths in read for path in paths if "." in path)
    return _known_below[cls]


def reads_own_weight(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a method between a class and the base reads ``self.weight``."""
    return any("weight" in _reads(above) for above in _classes_above(cls, base))


def calls_super(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether every forward between a class and the base calls ``super().forward``."""
    own = [vars(c)["forward"] for c in _classes_above(cls, base) if "forward" in vars(c)]
    codes = [getattr(forward, "__code__", None) for forward in own]
    return all(c is not None and {"super", "forward"} <= set(c.co_names) for c in codes)


def _classes_above(cls: type[nn.Module], base: type[nn.Module]) -> tuple[type, ...]:
    order = cls.__mro__
    return order[: order.index(base)]


# Weak: what is known of a class keeps it no longer than others do.
_known: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()
_known_below: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _reads(cls: type) -> frozenset[str]:
    """Attribute paths that end in a weight and that the class's methods read: "q_proj.weight"."""
    if cls not in _known:
        members = [(name, m) for name, m in vars(cls).items() if callable(m)]
        codes = [
            getattr(inspect.unwrap(member), "__code__", None)
            for name, member in members
            if name not in _OUTSIDE
        ]
        _known[cls] = frozenset(
            path for code in codes if isinstance(code, CodeType) for path in _weights_read(code)
        )
    return _known[cls]


def _weights_read(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _weights_read(constant)
    if "weight" not in code.co_names:
        return
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("EXTENDED_ARG", "CACHE")]
    for i, step in enumerate(steps):
        # isinstance(self.wo.weight, ...) asks for the type alone.
        asked = i > 0 and steps[i - 1].argval == "isinstance"
        if asked or not _loads_self(step):
            continue
        chain = []
        for later in steps[i + 1 :]:
            if later.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            chain.append(str(later.argval))
        if "weight" in chain:
            end = chain.index("weight") + 1
            if not (chain[end:] and chain[end] in _FACTS):
                yield ".".join(chain[:end])


def _loads_self(step: dis.Instruction) -> bool:
    """LOAD_FAST self, whatever this Python calls it; some load two names at once.

    In a comprehension or an inner function it is a LOAD_DEREF.
    """
    value = step.argval
    last = value[-1] if isinstance(value, tuple) and value else value
    loads = "LOAD_FAST" in step.opname or "LOAD_DEREF" in step.opname
    return loads and last == "self"
