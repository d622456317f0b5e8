"""Edits: every change of a model is a list of them, carried out as a whole or taken back.

An edit says what to put where, and what was there. Everything that allocates or may be refused is
done before; what is left moves references and flags, and may be done twice. So that whatever is
raised between two edits, a ``KeyboardInterrupt`` included, the old values go back in reverse order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.sharding import is_distributed, shards

MISSING: Any = object()  # the value of an attribute that is not there
_TRIES = 100  # to take an edit back while interrupts go on coming


# (put, target, key, old, new): a setter, its target (a module, a tensor, a dict), what of it (None
# where the setter needs no more), what is there now and what is to be there. A plain tuple: a model
# has very many.
Setter = Callable[[Any, Any, Any], None]
Edit = tuple[Setter, Any, Any, Any, Any]


def run(edits: Sequence[Edit], then: Callable[[], Any] | None = None) -> Any:
    """Carry out all edits, or none.

    Args:
        edits: in their order; none for one thing twice.
        then: called when all is done; what it raises takes the edits back too.

    Returns:
        What ``then`` returned.
    """
    try:
        for put, target, key, _, new in edits:
            put(target, key, new)
        return None if then is None else then()
    except BaseException:
        undo(edits)
        raise


def surely(action: Callable[[], Any]) -> None:
    """Do what has to be done, and changes nothing where it fails: again, until it is done.

    What was raised is raised in the end.
    """
    raised: BaseException | None = None
    for _ in range(_TRIES):
        try:
            action()
            break
        except BaseException as error:
            raised = raised or error
    if raised is not None:
        raise raised


def undo(edits: Sequence[Edit]) -> None:
    """Put every old value back, where it still is too; go on where that is interrupted."""
    left, tries = list(edits), 0
    while left:
        try:
            while left:
                put, target, key, old, _ = left[-1]
                put(target, key, old)
                left.pop()
        except BaseException:
            tries += 1
            if tries > _TRIES:
                raise


# --- setters ------------------------------------------------------------------------------------


def put_class(module: nn.Module, _: None, cls: type[nn.Module]) -> None:
    """The module's class."""
    object.__setattr__(module, "__class__", cls)
    # torch.compile may take a module for unchanged while nothing was written to its __dict__.
    module.__dict__["_lora_inject_touched"] = None
    del module.__dict__["_lora_inject_touched"]


def put_attribute(target: Any, name: str, value: Any) -> None:
    """An attribute of a module or tensor, past whatever its class makes of setting one."""
    if value is MISSING:
        target.__dict__.pop(name, None)
    else:
        target.__dict__[name] = value


def put_items(owner: Any, _: None, items: Iterable[tuple[Any, Any]]) -> None:
    """All of a dict: where names come or go, so that the order is right too."""
    owner.clear()
    owner.update(items)


def put_parameter(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """The parameter under a name that stays."""
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = tensor  # type: ignore[assignment]
    else:
        setattr(module, name, tensor)  # a class that keeps lists of them hears of it (nn.LSTM)


def put_buffer(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """The buffer under a name that stays."""
    module._buffers[name] = tensor


def put_members(names: set[str], _: None, members: frozenset[str]) -> None:
    """All of a set."""
    names.clear()
    names.update(members)


def put_flag(tensor: Tensor, _: None, trains: bool) -> None:
    """``requires_grad``."""
    tensor.requires_grad = trains


def put_gradient(tensor: Tensor, _: None, gradient: Tensor | None) -> None:
    """``grad``."""
    tensor.grad = gradient


@torch.no_grad()
def put_storage(tensor: Tensor, _: None, value: Tensor) -> None:
    """The storage of a value; its version counts up, so that autograd notices."""
    tensor.set_(value)  # type: ignore[call-overload]


@torch.no_grad()
def put_values(tensor: Tensor, _: None, value: Tensor) -> None:
    """Values, written in place."""
    tensor.copy_(value)


# --- edits that need some preparation -----------------------------------------------------------


def value_edit(tensor: Tensor, value: Tensor) -> Edit:
    """Give a tensor a value, on its device and in its dtype.

    By its storage, so that what it held is not written to; a DTensor's shards are written in place.
    The value is handed over and not copied: clone what is to be kept apart.
    """
    if is_distributed(tensor):
        return filling(tensor, value)
    new = value.detach().to(tensor.device, tensor.dtype)
    return (put_storage, tensor, None, tensor.detach(), new)


def filling(tensor: Tensor, value: Tensor, source: int | None = None) -> Edit:
    """Write a whole value into a tensor in place, of a DTensor each rank its shard.

    For tensors whose storage others hold: an optimizer's flat views, captured graphs.
    """
    if is_distributed(tensor):
        value = shards(value, tensor, source=source)
    return (put_values, tensor, None, tensor.detach().clone(), value)


def training_edits(tensor: Tensor, trains: bool, keeps_gradient: bool = False) -> list[Edit]:
    """Let a tensor train or not; what is frozen loses its gradient, unless it is to keep it.

    A stale gradient costs memory, and an optimizer would go on updating the parameter by it.
    """
    edits: list[Edit] = []
    if tensor.requires_grad is not trains:
        edits.append((put_flag, tensor, None, not trains, trains))
    if not trains and not keeps_gradient and tensor.grad is not None:
        edits.append((put_gradient, tensor, None, tensor.grad, None))
    return edits


def tensor_edit(module: nn.Module, name: str, old: Tensor | None, new: Tensor | None) -> Edit:
    """Put another parameter or buffer in the place of one."""
    # Which of the two is decided now: while an edit is taken back, the name may be missing.
    put = put_parameter if name in module._parameters else put_buffer
    return (put, module, name, old, new)


def attribute_edit(target: Any, name: str, value: Any) -> Edit:
    """Set an attribute, or take it away."""
    return (put_attribute, target, name, target.__dict__.get(name, MISSING), value)


def items_edits(owner: Any, items: Sequence[tuple[Any, Any]]) -> list[Edit]:
    """Give a dict these items in this order, where it has them not."""
    now = list(owner.items())
    same = [(k, id(v)) for k, v in now] == [(k, id(v)) for k, v in items]
    return [] if same else [(put_items, owner, None, now, items)]
