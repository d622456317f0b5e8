"""Which parameters are matrices that their module multiplies by, where it is no known layer."""

import dis
from collections.abc import Iterator
from types import CodeType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lora_inject.compat.marks import compiles_to_own_operator, experts_function
from lora_inject.kinds.bytecode import function_of
from lora_inject.own import own_class
from lora_inject.sharding import whole_shape

_PRODUCTS = {"linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot",
             "multi_head_attention_forward", "grouped_mm", "_grouped_mm"}  # fmt: skip
# Of these words in the name of a class a weight is no factor: it is a table, or a scale.
_OTHERS = ("embed", "norm", "conv", "scale")


def is_factor(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix, or several, that its module multiplies by.

    Told by its name, a weight, or by the module's code; this decides of what is said alone.
    """
    shape = whole_shape(parameter)
    if len(shape) not in (2, 3) or min(shape[-2:]) < 2 or not parameter.is_floating_point():
        return False
    cls = own_class(module)
    if name == "weight" or name.endswith("_weight"):
        return not any(word in cls.__name__.lower() for word in _OTHERS)
    fused_experts = len(shape) == 3 and hasattr(module, "num_experts")
    return fused_experts or name in _factors(cls)


def is_multiplied(module: nn.Module, name: str) -> bool:
    """Whether it is known how the module's own forward multiplies by a parameter of this name.

    It stands in statements with products of torch, or the module runs a function of transformers
    that does nothing else.
    """
    function = experts_function(module)
    if function is None:
        return name in _factors(own_class(module))
    return function in ("batched_mm", "grouped_mm")


def is_multiplied_when_compiled(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a compiler sees how fused experts multiply, in one graph: where a function does it.

    It lets nobody but tensors into torch's product by groups, and transformers' operator does.
    """
    function = experts_function(module)
    grouped = function == "grouped_mm" and compiles_to_own_operator(dtype)
    return grouped or function == "batched_mm"


_known: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _factors(cls: type[nn.Module]) -> frozenset[str]:
    """The attributes of itself that stand in a statement with a product in a class's methods."""
    if cls not in _known:
        bases = [base for base in cls.__mro__ if base is not nn.Module]
        members = [m for base in bases for m in list(vars(base).values())]  # at once, for threads
        codes = [function.__code__ for member in members if (function := function_of(member))]
        _known[cls] = frozenset(name for code in codes for name in _multiplied(code))
    return _known[cls]


def _multiplied(code: CodeType) -> Iterator[str]:
    own, product, of_self = set[str](), False, False
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_ATTR" and of_self:
            own.add(str(step.argval))
        product |= step.opcode in dis.hasname and step.argval in _PRODUCTS
        product |= step.argrepr == "@" or step.opname == "BINARY_MATRIX_MULTIPLY"
        is_local = step.opname.startswith("LOAD_FAST")
        value = step.argval[-1] if is_local and isinstance(step.argval, tuple) else step.argval
        of_self = is_local and (value,) == code.co_varnames[:1]
        if step.opname.startswith(("STORE_", "POP_TOP", "RETURN_")):
            yield from own if product else ()
            own, product = set(), False
