"""Running statistics that stand still: the statistics of frozen BatchNorm-like layers do not move.

How such a layer normalises stays as it is: by the batch in training mode, by the statistics in eval
mode. What is needed to let them move again is kept on the module itself.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

_HELD = "_lora_inject_held"


def has_statistics(module: nn.Module) -> bool:
    """Whether the module owns buffers that its forward moves in training mode."""
    return any(b is not None and _is_statistic(name) for name, b in module._buffers.items())


def is_held(module: nn.Module) -> bool:
    """Whether the module's statistics stand still."""
    return _HELD in module.__dict__


def hold(module: nn.Module, held: bool = True) -> None:
    """Make the module's statistics stand still, or let them move again.

    torch's BatchNorm has a switch: without ``track_running_stats`` it normalises by the batch in
    training mode and moves nothing, and uses the statistics in eval mode all the same. Any other
    module gets two hooks that lend it copies for each forward pass in training mode.
    """
    if held == is_held(module):
        return
    if held:
        module.__dict__[_HELD] = _Switch(module) if _has_switch(module) else _Loan(module)
    else:
        module.__dict__.pop(_HELD).release(module)


def _is_statistic(name: str) -> bool:
    # The last two are spectral_norm's estimates of singular vectors.
    return name.startswith(("running_", "moving_")) or name in ("num_batches_tracked", "_u", "_v")


def _has_switch(module: nn.Module) -> bool:
    own_forward = type(module).forward not in (_BatchNorm.forward, SyncBatchNorm.forward)
    return isinstance(module, _BatchNorm) and not own_forward


class _Switch:
    """Turns ``track_running_stats`` off and remembers what it was."""

    def __init__(self, module: Any) -> None:
        self.former = module.track_running_stats
        module.track_running_stats = False

    def release(self, module: Any) -> None:
        module.track_running_stats = self.former


class _Loan:
    """Hides the statistics of a module while it trains, also when it calls itself."""

    def __init__(self, module: nn.Module) -> None:
        self.hidden: list[dict[str, Tensor]] = []
        before = module.register_forward_pre_hook(self.lend, prepend=True)
        after = module.register_forward_hook(self.put_back, always_call=True)
        self.handles = (before, after)

    def lend(self, module: nn.Module, args: Any) -> None:
        buffers = module._buffers.items()
        own = {n: b for n, b in buffers if b is not None and _is_statistic(n) and module.training}
        self.hidden.append(own)
        module._buffers.update({name: b.clone() for name, b in own.items()})

    def put_back(self, module: nn.Module, args: Any, output: Any) -> None:
        module._buffers.update(self.hidden.pop())

    def release(self, module: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
