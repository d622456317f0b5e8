"""A block after which a model is as it was, whatever ran in it: for one forward and backward pass.

Attributes of modules (modes, hooks, caches, states), what their dicts, lists, sets and deques hold,
flags, gradients, the values of buffers, of other tensors that a module keeps and of adapters, and
random numbers. Parameters of the base are not copied, which would take the memory of the model:
nothing writes to them but by mistake.
"""

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import surely
from lora_inject.compat.torch_private import hooks_after_accumulation
from lora_inject.core.look import Look
from lora_inject.core.state import owned
from lora_inject.own import own_tensor


@contextmanager
def restoring(look: Look) -> Iterator["Kept"]:
    """Put a model back as it is now, at the end.

    Meanwhile parameters hold no gradients, so that those that come are those of the block; and
    hooks that wait for gradients to be accumulated (an optimizer in the backward pass) do not run.
    """
    kept = Kept(look)
    with _random_numbers(look):
        try:
            kept.begin()
            yield kept
        finally:
            surely(kept.put_back)


class Kept:
    """A model as it is when this is made."""

    def __init__(self, look: Look) -> None:
        self._modules = [_Module(module) for module in look.index.modules]
        self._tensors = [_Tensor(tensor) for tensor in self._kept_tensors(look)]
        self._parameters = [(p, p.grad, p.requires_grad, _writes(p)) for p in look.parameters]
        waiting = [hooks_after_accumulation(parameter) for parameter in look.parameters]
        self._hooks = [(own, list(own.items())) for own in waiting if own]

    def _kept_tensors(self, look: Look) -> list[Tensor]:
        """Buffers and others that modules keep, and what adapters have put there, each once."""
        found = {id(tensor): tensor for module in self._modules for tensor in module.tensors}
        for module, state in look.adapted.items():
            for name, _, _ in owned(state):
                tensor = own_tensor(module, name)
                if tensor is not None:
                    found[id(tensor)] = tensor
        # What is of inference mode can be written to in there alone.
        return [t for t in found.values() if not (t.is_meta or t.is_inference())]

    def begin(self) -> None:
        """Take gradients and what waits for them aside."""
        for parameter, *_ in self._parameters:
            parameter.grad = None
        for own, _ in self._hooks:
            own.clear()

    def put_back(self) -> None:
        """Let everything be as it was; what is so already is not touched."""
        for module in self._modules:
            module.put_back()
        for parameter, gradient, trains, _ in self._parameters:
            if parameter.requires_grad is not trains:
                parameter.requires_grad_(trains)
            parameter.grad = gradient
        for tensor in self._tensors:
            tensor.put_back()
        for own, items in self._hooks:
            own.update(items)

    def moved(self) -> list[Tensor]:
        """The buffers, and tensors of adapters, that have other values now, or others in place."""
        replaced = [tensor for module in self._modules for tensor in module.replaced_buffers()]
        return [kept.tensor for kept in self._tensors if kept.has_moved()] + replaced

    def written(self) -> list[nn.Parameter]:
        """The parameters that have been written to."""
        return [p for p, _, _, writes in self._parameters if _writes(p) != writes]


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Module:
    """A module as it is: its attributes, and what those hold that are containers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls, self.own = module, type(module), dict(module.__dict__)
        held = _held(module)
        self.held = [(value, _items(value)) for value in held if isinstance(value, _CONTAINERS)]
        self.tensors = [value for value in held if isinstance(value, Tensor)]

    def put_back(self) -> None:
        """Only what has changed: compilers watch writes to attributes."""
        if type(self.module) is not self.cls:
            object.__setattr__(self.module, "__class__", self.cls)
        now = self.module.__dict__
        for name in [name for name in now if name not in self.own]:
            del now[name]
        for name, value in self.own.items():
            if now.get(name, self) is not value:
                now[name] = value
        for container, items in self.held:
            if not _same(_items(container), items):
                _fill(container, items)

    def replaced_buffers(self) -> Iterator[Tensor]:
        """The former buffers in whose place others stand now."""
        now = self.module._buffers
        for name, buffer in next((items for own, items in self.held if own is now), ()):
            if buffer is not None and now.get(name) is not buffer:
                yield buffer


_CONTAINERS = (dict, list, set, deque)


def _held(module: nn.Module) -> list[Any]:
    """The containers that a module keeps and the tensors in them, but parameters, each once."""
    found: dict[int, Any] = {}
    left = [*module.__dict__.values(), *module._buffers.values()]  # a scripted one's are no dict
    while left:
        value = left.pop()
        if isinstance(value, _CONTAINERS) and id(value) not in found:
            left += value.values() if isinstance(value, dict) else value
        elif not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            continue
        found[id(value)] = value
    return [*found.values()]


def _fill(container: Any, items: list[Any]) -> None:
    """Give a container these items alone, as classes of it understand that (a Counter, say)."""
    container.clear()
    if isinstance(container, dict):
        for key, value in items:
            container[key] = value
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def _items(value: Any) -> list[Any]:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _same(now: list[Any], then: list[Any]) -> bool:
    """Whether two containers hold the same objects in the same order."""
    if len(now) != len(then):
        return False
    pairs = zip(now, then, strict=True)
    return all(a is b or (type(a) is type(b) is tuple and all(map(_is, a, b))) for a, b in pairs)


def _is(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, str) and a == b)


class _Tensor:
    """A tensor with its value."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.value, self.writes = tensor, tensor.detach().clone(), _writes(tensor)
        self.is_dense = tensor.layout is torch.strided and not tensor.is_nested

    def put_back(self) -> None:
        """By ``.data``, which is not counted: what has trained is told by how often it was."""
        if not self.has_moved():
            return
        if not self.is_dense:  # of which ``.data`` is another one
            with torch.no_grad():
                self.tensor.copy_(self.value)
        elif self.tensor.shape == self.value.shape:
            self.tensor.data.copy_(self.value)
        else:
            self.tensor.data = self.value

    def has_moved(self) -> bool:
        """Whether it has other values now; of what is not dense, whether it was written to."""
        if not self.is_dense:
            return _writes(self.tensor) != self.writes
        return not torch.equal(_comparable(self.tensor), _comparable(self.value))


def _comparable(tensor: Tensor) -> Tensor:
    """The values in a type that torch compares, NaN as what is equal to itself."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.is_floating_point():
        return values.nan_to_num() if values.dtype.itemsize > 1 else values.view(torch.uint8)
    return values


@contextmanager
def _random_numbers(look: Look) -> Iterator[None]:
    """Torch's on every device of the model, Python's, and numpy's where it is there."""
    devices: dict[str, set[int]] = {}
    for parameter in look.parameters:
        if parameter.device.type not in ("cpu", "meta"):
            devices.setdefault(parameter.device.type, set()).add(parameter.device.index or 0)
    numpy: Any = sys.modules.get("numpy")
    own, theirs = random.getstate(), numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(own)
            if numpy:
                numpy.random.set_state(theirs)
