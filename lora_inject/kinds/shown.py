"""How an effective weight stands in a layer: ``layer.weight`` is W + s B A, and W is written to.

What only computes with a weight reads the effective one. What is written to it (``copy_``, what
``nn.init`` does, ``reset_parameters``, ``.data``) reaches W, which is what the name stands for in a
state dict. torch's own tools that take a Parameter away and put something in its place get W itself
where the adapter goes on acting on what they compute, and are refused where it would not.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.compat.torch_private import is_transformed, replaces_weights, wants_parameter
from lora_inject.errors import LoRAInjectError
from lora_inject.kinds.bytecode import WRITING


def effective_property(name: str) -> property:
    """The property by which a layer shows the effective weight in place of one of this name."""

    def read(layer: Any) -> Any:
        if not torch.compiler.is_compiling():
            reader = sys._getframe(1)
            if wants_parameter(reader):
                return bare(layer, name)
            if replaces_weights(reader):
                raise LoRAInjectError(
                    f"{reader.f_globals['__name__']} would put something in place of its {name}, "
                    "in which an adapter acts.",
                    path=layer.lora_adapters[0].path,
                    remedy="Do this before inject, after strip, or exclude the layer.",
                )
        if name not in layer._parameters and name not in layer.__dict__:
            raise AttributeError(name)  # something has taken it away for a while
        return effective(layer, name)

    # Where no Parameter of the name is registered: replicas of DataParallel, FSDP1, pruned layers.
    def write(layer: Any, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: Any) -> None:
        del layer.__dict__[name]

    return property(read, write, delete)


def effective(layer: Any, name: str) -> Any:
    """The effective weight of this name.

    Raises:
        LoRAInjectError: it cannot be computed. An AttributeError would not come out of a property:
            nn.Module goes on looking then, and finds W.
    """
    try:
        return layer._lora_effective(name)
    except AttributeError as error:
        raise LoRAInjectError(
            f"its effective {name} cannot be computed: {error}.",
            path=layer.lora_adapters[0].path,
        ) from error


def bare(layer: nn.Module, name: str) -> Any:
    """The weight of this name without adapters: a Parameter, or what was put in its place."""
    own: Any = layer._parameters
    return own[name] if name in own else layer.__dict__.get(name)


def shown(value: Tensor, W: Tensor) -> Tensor:
    """An effective weight for somebody who may write to it: what is written reaches W."""
    if value is W or is_transformed() or type(value) is not Tensor:
        return value
    weight = value.as_subclass(ShownWeight)
    weight._base_weight = W
    return weight


class ShownWeight(Tensor):
    """W + s B A, whose methods that write in place write to W; it computes plain tensors."""

    _base_weight: Tensor
    __torch_function__ = nn.Parameter.__torch_function__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @property
    def data(self) -> Tensor:
        """The values, cut off from autograd."""
        return shown(self.detach(), self._base_weight.data)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._base_weight.data = value

    @property
    def grad(self) -> Tensor | None:
        """The gradient of W."""
        return self._base_weight.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._base_weight.grad = value


def _writing(name: str) -> Any:
    def write(weight: ShownWeight, *args: Any, **kwargs: Any) -> Any:
        return getattr(weight._base_weight, name)(*args, **kwargs)

    return write


_OPERATORS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
for _name in (*WRITING, *_OPERATORS):
    setattr(ShownWeight, _name, _writing(_name))
