"""Running statistics that stand still: the statistics of frozen BatchNorm-like layers do not move.

How such a layer normalises stays as it is: by the batch in training mode, by the statistics in eval
mode. What is needed to let them move again is kept on the module itself.
"""

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import MISSING, Edit, attribute_edit, filling, tensor_edit
from lora_inject.changes.hooks import after_hook_edits, pre_hook_edits
from lora_inject.changes.moving import is_statistic, moving_buffers
from lora_inject.compat.torch_private import calls_on_stack

_HELD = "_lora_inject_held"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def has_statistics(module: nn.Module) -> bool:
    """Whether the module owns buffers that its forward moves in training mode.

    A scripted module calls those inside of it where no hook is: theirs are its own.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return bool(_inside(module))
    return bool(moving_buffers(module))


def is_held(module: nn.Module) -> bool:
    """Whether the module's statistics stand still."""
    return _HELD in module.__dict__


def holding_edits(module: nn.Module, held: bool) -> list[Edit]:
    """Make the module's statistics stand still, or let them move again.

    torch's BatchNorm has a switch: without ``track_running_stats`` it normalises by the batch in
    training mode and moves nothing, and uses the statistics in eval mode all the same. Any other
    module gets two hooks that lend it copies for each forward pass in training mode, or put the
    values back that a scripted one has moved.
    """
    if held == is_held(module):
        return []
    if not held:
        former = module.__dict__[_HELD]
        back = _hook_edits(module, on=False) if isinstance(former, tuple) else [
            attribute_edit(module, "track_running_stats", former)
        ]  # fmt: skip
        return [*back, attribute_edit(module, _HELD, MISSING)]
    if _has_switch(module):
        switch: Any = module
        own = attribute_edit(module, _HELD, switch.track_running_stats)
        return [own, attribute_edit(module, "track_running_stats", False)]
    scripted = isinstance(module, torch.jit.ScriptModule)
    names = () if scripted else moving_buffers(module)
    return [attribute_edit(module, _HELD, names), *_hook_edits(module, on=True)]


def conversion_edits(module: nn.Module) -> list[Edit]:
    """Let a layer move again that ``convert_sync_batchnorm`` has made of one that was held.

    It has the switch as it was then, and no note of that.
    """
    switch: Any = module
    known = _has_switch(module) and not is_held(module) and switch.running_mean is not None
    if not known or switch.track_running_stats:
        return []
    return [attribute_edit(module, "track_running_stats", True)]


def _has_switch(module: nn.Module) -> bool:
    known = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, _BATCH_NORMS) and type(module).forward in known


def _inside(module: nn.Module) -> list[Tensor]:
    """The statistics of a module and of those inside of it."""
    return [b for path, b in module.named_buffers() if is_statistic(path.rpartition(".")[2])]


class _Former(NamedTuple):
    """What is put back after a forward pass: the buffers themselves, or values of theirs."""

    own: dict[str, Tensor]
    noted: list[tuple[Tensor, Tensor]]

    def put_back(self, module: nn.Module) -> None:
        """Let the buffers stand again, with their values."""
        if self.own:  # a scripted module has no such dictionary
            module._buffers.update(self.own)
        for tensor, value in self.noted:
            tensor.data.copy_(value)  # uncounted: a backward pass saves it and does not need it


class _Hidden(threading.local):
    """What puts statistics back, of modules whose forward runs, also where they call themselves."""

    def __init__(self) -> None:
        self.of: dict[nn.Module, list[_Former]] = {}


_hidden = _Hidden()


def _hide(module: nn.Module, args: Any) -> None:
    """Hide the statistics of a module while it trains, behind copies."""
    if module in _hidden.of:
        _put_back_left(module)
    if isinstance(module, torch.jit.ScriptModule):
        # It has its buffers to itself; whether it trains is said by each one inside.
        former = _Former({}, [(tensor, tensor.clone()) for tensor in _inside(module)])
    else:
        names = module.__dict__[_HELD] if module.training else ()
        own: dict[str, Tensor] = {}
        for name in names:  # no comprehension: torch.compile cannot follow its closure
            buffer = module._buffers.get(name)
            if buffer is not None:
                own[name] = buffer
        former = _Former(own, [])
        module._buffers.update({name: b.clone() for name, b in own.items()})
    _hidden.of.setdefault(module, []).append(former)


def _put_back(module: nn.Module, args: Any, output: Any) -> None:
    stack = _hidden.of[module]
    stack.pop().put_back(module)
    if not stack:
        del _hidden.of[module]


def _put_back_left(module: nn.Module) -> None:
    """Put back what calls left hidden that were interrupted: torch calls no hooks after that."""
    stack, others = _hidden.of[module], calls_on_stack(module) - 1
    if len(stack) > others:
        stack[others].put_back(module)
        del stack[others:]


def _forget_left(module: nn.Module, _: None, stack: list[_Former] | None) -> None:
    if stack is None:
        _hidden.of.pop(module, None)
    else:
        _hidden.of[module] = stack


def _hook_edits(module: nn.Module, on: bool) -> list[Edit]:
    before = pre_hook_edits(module, _hide, on, first=True)
    edits = [*before, *after_hook_edits(module, _put_back, on)]
    left = None if on else _hidden.of.get(module)
    if left:
        own = module._buffers
        edits += [tensor_edit(module, name, own[name], t) for name, t in left[0].own.items()]
        edits += [filling(tensor, value) for tensor, value in left[0].noted]
        edits.append((_forget_left, module, None, left, None))
    return edits
